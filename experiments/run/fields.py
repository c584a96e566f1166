"""Fields of settings: their names on the command line, their bounds, and whether they decide the result.

A field says all of that itself, where it is declared:

    sigma: float = positive(0.1, number=True)
    devices: int | None = count(None, role=Role.FREE)
"""

import dataclasses
import enum
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import tyro

from experiments.run.errors import UsageError, suggestion

Settings = TypeVar("Settings")
# Whole numbers fit 32 bits, and no setting that is a length, a rate or a weight has use for more than this.
MOST_COUNT, MOST_NUMBER = 2**31 - 1, 1e38
# Positive numbers, and their squares, are above 0 in float32.
LEAST_NUMBER = 1e-18


class Role(enum.Enum):
    """What a field decides.

    Attributes:
        RESULT: the result: a run is continued with the same value only.
        ROUNDING: rounding alone; the result where `same_bits` asks for equal bits.
        FREE: where, how long or beside what a run is made.
    """

    RESULT = enum.auto()
    ROUNDING = enum.auto()
    FREE = enum.auto()


class Range(NamedTuple):
    """The values that a number may have.

    Attributes:
        low: the smallest, or what it must be above if `open_low`.
        high: the largest, or what it must be below if `open_high`.
        whole: whether it is a whole number.
        even: whether it must be even, as members come in pairs.
    """

    low: int | float
    high: int | float
    whole: bool
    open_low: bool = False
    open_high: bool = False
    even: bool = False

    def problem(self, value: int | float) -> str | None:
        """What would be right, where the value is not."""
        low = value > self.low if self.open_low else value >= self.low
        high = value < self.high if self.open_high else value <= self.high
        if self.even and (not low or value % 2):
            return (
                f"members come in opposite pairs, so choose an even number of at least {self.low:g}"
            )
        if low and math.isfinite(value) and not high and not self._narrow:
            return f"choose at most {self.high if self.whole else format(self.high, 'g')}"
        if low and high and self.low == 0 and self.open_low and value < LEAST_NUMBER:
            return f"choose at least {LEAST_NUMBER:g}"
        return None if low and high else f"choose {self.words}"

    @property
    def _narrow(self) -> bool:
        return self.high < (MOST_COUNT if self.whole else MOST_NUMBER)

    @property
    def words(self) -> str:
        """The values in words."""
        if self.whole:
            ends = (
                f"from {self.low} to {self.high}" if self._narrow else f"of at least {self.low:g}"
            )
            return f"a whole number {ends}"
        if not self._narrow and self.low == 0:
            return "a positive number" if self.open_low else "0 or a positive number"
        if self.open_low:
            return f"a number above {self.low:g}, {'below' if self.open_high else 'up to'} {self.high:g}"
        if self.open_high:
            return f"a number from {self.low:g} to below {self.high:g}"
        return f"a number from {self.low:g} to {self.high:g}"


def setting(
    default: Any = dataclasses.MISSING,
    *,
    role: Role = Role.RESULT,
    number: bool = False,
    range: Range | None = None,
) -> Any:
    """A field of settings.

    Args:
        default: its default; without one it must be given.
        role: what it decides.
        number: whether a compiled program takes it as an array, so that runs that differ in such fields
            alone can be one program.
        range: of numbers.
    """
    metadata = {"role": role, "number": number, "range": range}
    return dataclasses.field(default=default, metadata=metadata)


def count(
    default: Any = dataclasses.MISSING,
    *,
    least: int = 1,
    most: int = MOST_COUNT,
    even: bool = False,
    role: Role = Role.RESULT,
    number: bool = False,
) -> Any:
    """A field with a whole number."""
    return setting(
        default, role=role, number=number, range=Range(least, most, whole=True, even=even)
    )


def positive(
    default: Any = dataclasses.MISSING, *, role: Role = Role.RESULT, number: bool = False
) -> Any:
    """A field with a number above 0."""
    return setting(
        default, role=role, number=number, range=Range(0, MOST_NUMBER, False, open_low=True)
    )


def from_zero(default: Any = dataclasses.MISSING, *, role: Role = Role.RESULT) -> Any:
    """A field with 0 or a positive number."""
    return setting(default, role=role, range=Range(0, MOST_NUMBER, False))


def within(
    default: Any = dataclasses.MISSING,
    low: int | float = 0.0,
    high: int | float = 1.0,
    *,
    open_low: bool = False,
    open_high: bool = False,
    number: bool = False,
) -> Any:
    """A field with a number between two others."""
    found = Range(low, high, False, open_low=open_low, open_high=open_high)
    return setting(default, number=number, range=found)


def share(default: Any = dataclasses.MISSING, *, number: bool = False) -> Any:
    """A field with a number above 0, up to 1."""
    return within(default, open_low=True, number=number)


class Place(NamedTuple):
    """Where a setting is.

    Attributes:
        path: names of the fields that lead to it.
        hint: its type.
        role: what it decides.
        number: whether a program takes it as an array.
        range: of its numbers; None where it has none.
    """

    path: tuple[str, ...]
    hint: Any
    role: Role
    number: bool
    range: Range | None

    @property
    def key(self) -> str:
        """Its name in config.json, "outer.inner"."""
        return ".".join(self.path)


def places(kind: type) -> Mapping[str, Place]:
    """All settings of a class by their names, which are those of their flags with underscores.

    Example:
        >>> from experiments.rl.config import Config
        >>> [places(Config)[name].key for name in ("population", "optimizer", "ppo.steps")]
        ['evolution.population', 'optimizer.name', 'ppo.steps']
    """
    return _all_places(kind)


@functools.cache
def _all_places(kind: type) -> Mapping[str, Place]:
    return dict(_places(kind, "", ()))


def _places(kind: type, prefix: str, path: tuple[str, ...]) -> Iterator[tuple[str, Place]]:
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        marks: list[Any] = []
        if typing.get_origin(hint) is typing.Annotated:
            hint, *marks = typing.get_args(hint)
        own = (*path, field.name)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            inner = prefix if tyro.conf.OmitArgPrefixes in marks else f"{prefix}{field.name}."
            yield from _places(hint, inner, own)
            continue
        name = next((mark.name for mark in marks if getattr(mark, "name", None)), field.name)
        known = field.metadata
        yield (
            prefix + name,
            Place(
                own,
                typing.get_type_hints(kind)[field.name],
                known.get("role", Role.RESULT),
                known.get("number", False),
                known.get("range"),
            ),
        )


def value_at(settings: object, place: Place) -> Any:
    """The value of a setting."""
    for name in place.path:
        settings = getattr(settings, name)
    return settings


def changed(
    settings: Settings, values: Mapping[str, Any] | None = None, /, **more: Any
) -> Settings:
    """The same settings with other values, by the names of their flags with underscores.

    Raises:
        UsageError: for a name that is no setting.

    Example:
        >>> from experiments.rl.config import PRESETS
        >>> changed(PRESETS["cartpole"], {"ppo.steps": 8}, population=64).evolution.population
        64
    """
    known = places(type(settings))
    for name, value in {**(values or {}), **more}.items():
        if dataclasses.is_dataclass(value):  # A whole group goes by the name of its field.
            groups = {field.name: (field.name,) for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
            path: tuple[str, ...] | None = groups.get(name)
        else:
            path = known[name].path if name in known else None
        if path is None:
            raise UsageError(f"{name!r} is no setting{suggestion(name, known)}")
        settings = _put(settings, path, value)
    return settings


def _put(settings: Settings, path: tuple[str, ...], value: Any) -> Settings:
    if path[1:]:
        value = _put(getattr(settings, path[0]), path[1:], value)
    return dataclasses.replace(settings, **{path[0]: value})  # type: ignore[type-var]


def check_ranges(settings: object) -> None:
    """Raises UsageError for the first number that is out of its field's range, or text that is none."""
    for name, place in places(type(settings)).items():
        value = value_at(settings, place)
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, str | Path) and not is_text(str(one)):
                raise UsageError(f"{flag(name)} {str(one)!r}: must be text in UTF-8 without NUL")
        if place.range is None or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if problem := place.range.problem(value):
            raise UsageError(f"{flag(name)} {value}: {problem}")


def is_text(value: str) -> bool:
    """Whether a text can be written to a file, and name one.

    Example:
        >>> is_text("runs/größer"), is_text("a\\0b"), is_text("\\udcff")
        (True, False, False)
    """
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:  # bytes of a command line that were none of UTF-8
        return False


def flag(name: str) -> str:
    """A setting as it is typed on the command line.

    Example:
        >>> flag("ppo.learning_rate")
        '--ppo.learning-rate'
    """
    return "--" + name.replace("_", "-")


def free_keys(kind: type, same_bits: bool = False) -> frozenset[str]:
    """The settings, by their names in config.json, that a run may be continued with other values of."""
    roles = {Role.FREE} if same_bits else {Role.FREE, Role.ROUNDING}
    return frozenset(place.key for place in places(kind).values() if place.role in roles)


# ---------------------------------------------------------------- config.json


def to_json(settings: Any) -> dict[str, Any]:
    """Settings as JSON values: nested dataclasses as objects, paths as strings."""
    return _plain(dataclasses.asdict(settings))


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _plain(value)
        if isinstance(value, Mapping)
        else str(value)
        if isinstance(value, Path)
        else value
        for name, value in content.items()
    }


def from_json(kind: type[Settings], content: Mapping[str, Any]) -> Settings:
    """Settings from :func:`to_json`; what the class no longer has is an error.

    Raises:
        UsageError: naming the first field that is unknown, of another type, or missing without a default.

    Example:
        >>> from experiments.supervised.config import PRESETS
        >>> settings = PRESETS["digits"]
        >>> from_json(type(settings), {**to_json(settings), "width": "x"})
        Traceback (most recent call last):
        experiments.run.errors.UsageError: config.json: width must be a whole number, got 'x'
    """
    return _from_json(kind, content, "")


def _from_json(kind: Any, content: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    for name in content:
        if name not in names:
            raise UsageError(
                f"config.json has the setting {prefix + name!r}, unknown to this version"
            )
    values = {}
    for name, value in content.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            values[name] = _from_json(hint, value, f"{prefix}{name}.")
            continue
        for member in members(hint):
            if _fits(value, member):
                break
        else:
            kinds = " or ".join(map(_in_words, members(hint)))
            raise UsageError(f"config.json: {prefix}{name} must be {kinds}, got {value!r}")
        if member is Path:
            value = Path(value)
        elif member is float:
            value = float(value)
        values[name] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**values)
    except TypeError as error:
        raise UsageError(f"config.json lacks a setting of this version: {error}") from error


def members(hint: Any) -> tuple[Any, ...]:
    """The types of a union; a type alone as one."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is one of this type of a setting."""
    if typing.get_origin(hint) is Literal:
        return any(type(value) is type(one) and value == one for one in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        return isinstance(value, list | tuple) and all(_fits(one, inner) for one in value)
    if hint is float:
        # A number without a fraction is written as it was given.
        return type(value) is float or (type(value) is int and abs(value) < 2**63)
    if hint is Path:
        return type(value) is str and "\0" not in value
    return type(value) is (hint if isinstance(hint, type) else type(None))


def _in_words(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return "a list"
    kinds: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text"}
    kinds |= {bool: "true or false", Path: "a path", type(None): "null"}
    return kinds.get(hint, "an object")


def flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of config.json by their names, "outer.inner".

    Example:
        >>> dict(flat({"seed": 0, "ppo": {"clip": 0.2}}))
        {'seed': 0, 'ppo.clip': 0.2}
    """
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, list(value) if isinstance(value, tuple) else value


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], kind: type, same_bits: bool
) -> Iterator[str]:
    """Settings that decide results and are not the same, as "--flag old -> new".

    Args:
        old: of a config.json.
        new: as :func:`to_json` gives them.
        kind: the class of the settings.
        same_bits: whether rounding counts as a result.
    """
    a, b = dict(flat(old)), dict(flat(new))
    free = free_keys(kind, same_bits)
    flags = {place.key: flag(name) for name, place in places(kind).items()}
    for key in sorted(a.keys() | b.keys(), key=lambda key: flags.get(key, flag(key))):
        if key not in free and a.get(key, "absent") != b.get(key, "absent"):
            yield f"{flags.get(key, flag(key))} {a.get(key, 'absent')} -> {b.get(key, 'absent')}"
