"""Values of a sweep's file as values of settings."""

import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from experiments.run.errors import suggestion
from experiments.run.fields import members


def find(name: object, known: Mapping[str, Any]) -> str:
    """The field that is called so, with "-" or "_" between its words.

    Raises:
        ValueError: for an unknown one, with the nearest.
    """
    field = str(name).replace("-", "_")
    if field not in known:
        near = suggestion(field, known) or suggestion(
            field.rpartition(".")[2], {key.rpartition(".")[2] for key in known}
        )
        raise ValueError(f"{name!r} is no setting of this driver{near}")
    return field


def fit(value: Any, hint: Any) -> Any:
    """The value as the field's type; YAML reads 1e-3 as a text, and knows neither tuples nor paths.

    Raises:
        ValueError: saying what would be right.

    Example:
        >>> fit("1e-3", float), fit(2, float), fit([1, 2], tuple[int, ...])
        (0.001, 2.0, (1, 2))
        >>> fit("fast", int | Literal["full"])
        Traceback (most recent call last):
        ValueError: choose a whole number or 'full'
    """
    for one in members(hint):
        try:
            return _fit(value, one)
        except (TypeError, ValueError, OverflowError):  # an infinity is no whole number
            continue
    raise ValueError(f"choose {in_words(hint)}")


def _fit(value: Any, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin is Literal:
        if any(value == known and type(value) is type(known) for known in typing.get_args(hint)):
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        return tuple(fit(one, typing.get_args(hint)[0]) for one in value)
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint is float and not isinstance(value, bool):
        return float(value)
    elif hint is int and not isinstance(value, bool):
        if float(value) == int(float(value)):
            return int(float(value))
    elif isinstance(value, hint if isinstance(hint, type) else ()):
        return value
    raise ValueError


def in_words(hint: Any) -> str:
    """What values of a type are, for the end of an error sentence."""
    words: list[str] = []
    known = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        Path: "a path",
        type(None): "null",
    }
    for one in members(hint):
        if typing.get_origin(one) is Literal:
            words += map(repr, typing.get_args(one))
        elif typing.get_origin(one) is tuple:
            words.append("a list")
        else:
            words.append(known.get(one, str(one)))
    return " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def whole(hint: Any) -> bool | None:
    """Whether a field's numbers are whole; None where it has no numbers."""
    found = members(hint)
    return False if float in found else True if int in found else None
