"""The settings of tasks, checked by the arguments of the function that makes one."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.run.errors import UsageError, suggestion

# As it stands; a model that was trained on conversations needs its own form around it.
TEMPLATE = "{question}\n"

# Questions of a task that memory holds; no other setting has use for more.
MOST = 10**7

# What a setting may be, by the annotation of the argument.
KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    int | None: ((int, type(None)), "a whole number"),
    str: ((str,), "a text"),
    str | None: ((str, type(None)), "a text"),
    float | str | Path: ((int, float, str, Path), "a share, or the path of a file"),
    Sequence[str]: ((list, tuple), "a list of names"),
}


def check_kind(place: str, value: Any, kind: Any) -> None:
    """Raises UsageError where a value is not of the kind that an argument is annotated with."""
    types, words = KINDS.get(kind, ((object,), ""))
    listed = value if isinstance(value, list | tuple) else ()
    if (
        not isinstance(value, types)
        or isinstance(value, bool)
        or not all(isinstance(one, str) for one in listed)
    ):
        raise UsageError(f"{place} must be {words}, got {value!r}")


def check(template: str, **positive: int | None) -> None:
    """Raises UsageError for a template without its place, or a number below 1."""
    if "{question}" not in template:
        raise UsageError(f"the template {template!r} has no {{question}} in it")
    for name, value in positive.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}: choose a whole number of at least 1")


def check_settings(make: Callable[..., Any], settings: Mapping[str, Any], subject: str) -> None:
    """Raises UsageError for the first setting that a function does not take, or lacks, or that is too large.

    Args:
        make: makes a task.
        settings: to call it with.
        subject: what messages begin with, such as "the task 'sums'".
    """
    known = inspect.signature(make).parameters
    others = any(one.kind is one.VAR_KEYWORD for one in known.values())
    for setting, value in settings.items():
        if setting in known:
            check_kind(f"{subject}: {setting}", value, known[setting].annotation)
            # A seed is no number of things.
            if isinstance(value, int) and value > MOST and setting != "seed":
                raise UsageError(f"{subject}: {setting} is {value}: choose at most {MOST}")
        elif not others:
            raise UsageError(f"{subject} has no setting {setting!r}{suggestion(setting, known)}")
    for name, one in known.items():
        needed = one.default is one.empty and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
        if needed and name not in settings:
            raise UsageError(
                f"{subject} needs the setting {name!r}: --task-settings '{{\"{name}\": ...}}'"
            )
