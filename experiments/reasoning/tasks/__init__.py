"""Tasks with answers that can be checked: home-made, of reasoning-gym, from files or a user's own code."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.reasoning.tasks.files import jsonl
from experiments.reasoning.tasks.gym import gym
from experiments.reasoning.tasks.home_made import HOME_MADE
from experiments.reasoning.tasks.settings import check_settings
from experiments.reasoning.tasks.task import Question, Task, checked, columns, split, with_fresh
from experiments.run import own_code

__all__ = ["Question", "Task", "columns", "files", "load", "split"]


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
    if name.endswith(".jsonl"):
        make: Callable[..., Task] = functools.partial(jsonl, Path(name))
    elif name in HOME_MADE:
        make = HOME_MADE[name]
    else:
        make = functools.partial(gym, name)
    check_settings(make, settings, subject)
    return with_fresh(make(**settings))


def files(name: str, settings: Mapping[str, Any]) -> list[Path]:
    """The files that a task is read from, once it is loaded; a run does not go on where they have changed.

    Example:
        >>> files("train.jsonl", {"held_out": "test.jsonl"}), files("sums", {})
        ([PosixPath('train.jsonl'), PosixPath('test.jsonl')], [])
    """
    if own_code.is_own(name):
        found = own_code.file_of(name)
        return [] if found is None else [found]
    if not name.endswith(".jsonl"):
        return []
    other = settings.get("held_out")
    return [Path(name), *([Path(other)] if isinstance(other, str) else [])]
