"""Tasks with answers that can be checked: home-made, of reasoning-gym, from files or a user's own code."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.reasoning import rewards
from experiments.reasoning.tasks.files import jsonl
from experiments.reasoning.tasks.gym import check_name, gym
from experiments.reasoning.tasks.home_made import HOME_MADE
from experiments.reasoning.tasks.settings import check_settings
from experiments.reasoning.tasks.task import Question, Task, checked, columns, split, with_fresh
from experiments.run import own_code
from experiments.run.errors import UsageError
from experiments.run.paths import exists

__all__ = ["Question", "Task", "check", "columns", "files", "load", "split"]


def load(name: str, **settings: Any) -> Task:
    """A task by its name.

    Args:
        name: one of `HOME_MADE`, a task of reasoning-gym, a path that ends with ".jsonl", or a user's own
            function that makes a :class:`Task`, as "folder/file.py:make" or "package.module:make".
        **settings: arguments of the function that makes the task.

    Raises:
        UsageError: where there is no such task, it does not take one of the settings, or a user's function
            does not give a task.

    Example:
        >>> task = load("sums", digits=1)
        >>> len(task.train), len(task.held_out), len(task.fresh)
        (92, 6, 2)
        >>> load("sums", digit=1)
        Traceback (most recent call last):
        ...
        experiments.run.errors.UsageError: the task 'sums' has no setting 'digit'; did you mean 'digits'?
    """
    subject = f"the task {name!r}"
    if own_code.is_own(name):
        own = own_code.load(name, f"--task {name}")
        check_settings(own, settings, subject)
        return checked(own_code.call(own, f"--task {name}", **settings), f"--task {name}")
    make = _maker(name)
    check_settings(make, settings, subject)
    return with_fresh(make(**settings))


def check(name: str, **settings: Any) -> None:
    """Raises UsageError for what is wrong with a task as far as that is seen without making it.

    Neither a user's code nor a package that takes time is imported.

    Args:
        name: as in :func:`load`.
        **settings: as in :func:`load`.
    """
    if own_code.is_own(name):
        own_code.check(name, f"--task {name}")
        return
    for file in _questions(name, settings):
        if not exists(file, f"--task {name}"):
            raise UsageError(f"--task {name}: there is no file {file}")
    if not name.endswith(".jsonl") and name not in HOME_MADE:
        check_name(name)
    check_settings(_maker(name), settings, f"the task {name!r}")
    if name.endswith(".jsonl") and isinstance(reward := settings.get("reward"), str):
        rewards.check(reward, "reward")


def _maker(name: str) -> Callable[..., Task]:
    if name.endswith(".jsonl"):
        return functools.partial(jsonl, Path(name))
    return HOME_MADE[name] if name in HOME_MADE else functools.partial(gym, name)


def files(name: str, settings: Mapping[str, Any]) -> list[Path]:
    """The files that a task and its reward are read from, once it is loaded; a run does not go on where they
    have changed.

    Example:
        >>> files("train.jsonl", {"held_out": "test.jsonl", "reward": "exact,mine.py:score"})
        [PosixPath('train.jsonl'), PosixPath('test.jsonl'), PosixPath('mine.py')]
        >>> files("sums", {})
        []
    """
    if own_code.is_own(name):
        found = own_code.file_of(name)
        return [] if found is None else [found]
    read, reward = _questions(name, settings), settings.get("reward")
    return [*read, *(rewards.files(reward) if read and isinstance(reward, str) else [])]


def _questions(name: str, settings: Mapping[str, Any]) -> list[Path]:
    """The files of a task's questions."""
    if not name.endswith(".jsonl"):
        return []
    other = settings.get("held_out")
    return [Path(name), *([Path(other)] if isinstance(other, str) else [])]
