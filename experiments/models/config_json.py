"""JSON files of a model's folder: read, and each field checked for its type and its range.

They come from others, and a field may hold anything that JSON has: text for a number, NaN, a list. Every
function takes the settings as they were read, and gives a field in the type that it names, or raises one
sentence with the field, its value and what would be right.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.run.errors import UsageError

# Sizes of no model are larger, and products of two of them with MOST_LAYERS still fit 64 bits.
MOST, MOST_LAYERS, MOST_HEADS = 2**24, 10_000, 2**12
# Numbers beyond have no square in float32, in which models compute.
SMALLEST, LARGEST = 1e-18, 1e18

Settings = Mapping[str, Any]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder.

    Raises:
        UsageError: if the file is absent, or holds something else.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UsageError(
            f"{path.parent} is not a folder of a model: it has no {path.name}"
        ) from error
    # RecursionError: brackets within brackets without end.
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def whole(told: Settings, name: str, *, least: int = 1, most: int = MOST, within: str = "") -> int:
    """A whole number.

    Args:
        told: the settings.
        name: of the field.
        least: the smallest that is right.
        most: the largest.
        within: the field that holds these settings, for messages.

    Raises:
        UsageError: where it is absent, no whole number, or out of this range.

    Example:
        >>> whole({"hidden_size": 8}, "hidden_size")
        8
        >>> whole({"hidden_size": "8"}, "hidden_size")
        Traceback (most recent call last):
        ...
        experiments.run.errors.UsageError: config.json: hidden_size '8' must be a whole number from 1 to
        16777216
    """
    found = told.get(name)
    # True is an int of Python, and 8.0 is how no size is written.
    if type(found) is int and least <= found <= most:
        return found
    raise wrong(told, name, f"a whole number from {least} to {most}", within)


def number(
    told: Settings, name: str, *, least: float = SMALLEST, most: float = LARGEST, within: str = ""
) -> float:
    """A number, as a float.

    Args:
        told: the settings.
        name: of the field.
        least: the smallest that is right.
        most: the largest.
        within: the field that holds these settings, for messages.

    Raises:
        UsageError: where it is absent, no number, not finite, or out of this range.

    Example:
        >>> number({"rope_theta": 10000}, "rope_theta", least=1.0)
        10000.0
    """
    found = told.get(name)
    # True is an int of Python; NaN is in no range.
    if isinstance(found, int | float) and not isinstance(found, bool) and least <= found <= most:
        return float(found)
    raise wrong(told, name, f"a number from {least:g} to {most:g}", within)


def flag(told: Settings, name: str, within: str = "") -> bool:
    """True or false.

    Raises:
        UsageError: where it is absent or something else.
    """
    found = told.get(name)
    if type(found) is bool:
        return found
    raise wrong(told, name, "true or false", within)


def text(told: Settings, name: str, within: str = "") -> str:
    """A text.

    Raises:
        UsageError: where it is absent or something else.
    """
    found = told.get(name)
    if isinstance(found, str):
        return found
    raise wrong(told, name, "a text", within)


def texts(told: Settings, name: str, within: str = "") -> list[str]:
    """A list of texts, with one at least.

    Raises:
        UsageError: where it is absent or something else.
    """
    found = told.get(name)
    if isinstance(found, list) and found and all(isinstance(one, str) for one in found):
        return found
    raise wrong(told, name, "a list of texts", within)


def nested(told: Settings, name: str, within: str = "") -> dict[str, Any]:
    """An object; an empty one where the field is absent or null.

    Raises:
        UsageError: where it is something else.
    """
    found = told.get(name)
    if found is None:
        return {}
    if isinstance(found, dict):
        return found
    raise wrong(told, name, "an object or null", within)


def wrong(told: Settings, name: str, right: str, within: str = "") -> UsageError:
    """The sentence for a field that is not as it must be.

    Example:
        >>> str(wrong({"factor": "2"}, "factor", "a number", within="rope_scaling"))
        "config.json: rope_scaling.factor '2' must be a number"
        >>> str(wrong({}, "factor", "a number"))
        'config.json: factor is missing; it must be a number'
    """
    field = f"{within}.{name}" if within else name
    if name not in told:
        return UsageError(f"config.json: {field} is missing; it must be {right}")
    return UsageError(f"config.json: {field} {shown(told[name])} must be {right}")


def shown(value: Any) -> str:
    """A value, cut off, as JSON reads it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int) and abs(value) > 10**40:
        return f"{'-' * (value < 0)}(a number of {value.bit_length()} bits)"
    shown = repr(value)
    return shown if len(shown) <= 100 else shown[:97] + "..."
