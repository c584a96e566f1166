"""The settings that every driver has, and how settings are written, read and compared."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from experiments.run.errors import UsageError

Settings = TypeVar("Settings", bound="RunSettings")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What every run has beside its task."""

    run_dir: Path
    """Folder for all that the run leaves behind; the same command again continues it."""
    seed: int = 0
    """Decides everything random."""
    generations: int | None = None
    """Train for exactly this many generations; switches early stopping off."""
    max_generations: int
    """Stop after this many generations where `generations` is not given."""
    evaluate_every: int = 1
    """Generations from one held-out measurement to the next."""
    checkpoint_seconds: float = 30.0
    """Seconds from one checkpoint to the next; 0 saves every generation."""
    overwrite: bool = False
    """Replace an earlier run in the run folder."""
    accept_changes: bool = False
    """Continue a run although its settings are not those that it began with."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, into the run folder."""
    wandb_project: str | None = None
    """Also send the metrics to this project of Weights & Biases."""
    devices: int | None = None
    """Devices that a population is divided over; by default all GPUs or TPUs, but one CPU device. Several
    processes use all they have."""
    same_bits: bool = False
    """Results to the bit whatever the number of devices; slower. Integers have that without."""
    coordinator: str | None = None
    """Address HOST:PORT of process 0, for a run of several processes; "auto" on clusters that JAX knows (TPU
    pods, Slurm, GKE, Open MPI). Else JAX_COORDINATOR_ADDRESS, if set."""
    processes: int | None = None
    """How many processes there are; else JAX_NUM_PROCESSES."""
    process: int | None = None
    """Which of them this is, from 0; else JAX_PROCESS_ID."""
    lost_seconds: int = 100
    """Seconds after which a process that does not come, or gives no sign of life, counts as lost, which ends
    the others."""

    @property
    def together(self) -> str | None:
        """Runs of which this is the same can be one program, by the driver's `train_many`; None for a run
        that has to be alone."""
        return None

    @property
    def limit(self) -> int:
        """Generations after which training stops in any case."""
        return self.max_generations if self.generations is None else self.generations

    def on_one_device(self) -> Any:
        """The same by one process on one device, as a run is read, however many trained it."""
        return replace(self, devices=1, coordinator=None, processes=None, process=None)

    def check_run(self) -> None:
        """Raises UsageError for the first of these settings that cannot be right."""
        at_least_one(self, "generations", "max_generations", "evaluate_every")
        at_least_one(self, "devices", "processes", "lost_seconds")
        if not 0 <= self.seed < 2**31:
            raise UsageError(f"--seed {self.seed}: choose a whole number from 0 to {2**31 - 1}")
        if not (math.isfinite(self.checkpoint_seconds) and self.checkpoint_seconds >= 0):
            raise UsageError(
                f"--checkpoint-seconds {self.checkpoint_seconds}: choose 0 or a positive number"
            )


# These say where and for how long, not what: a run may be continued with others.
FREE = frozenset(
    {"run_dir", "generations", "max_generations", "checkpoint_seconds", "overwrite"}
    | {"accept_changes", "tensorboard", "wandb_project", "preset", "render"}
    | {"devices", "tensor_parallel", "coordinator", "processes", "process", "lost_seconds"}
)


# What runs may differ in and still be one program; what is logged elsewhere is logged for one run.
SHARED = ("seed", "sigma", "learning_rate", "sigma_decay", "learning_rate_decay")


def program_of(settings: RunSettings) -> str | None:
    """All settings but those that a program takes as numbers, and but for where and how long to train.

    A decay of 1 is another program than any other decay: it needs no schedule.
    """
    if settings.tensorboard or settings.wandb_project is not None or settings.seeds != 1:  # type: ignore[attr-defined]
        return None
    if settings.devices not in (None, 1) or settings.same_bits:
        return None
    own = {
        name: value
        for name, value in _flat(to_json(settings))
        if name not in FREE and name not in SHARED
    }
    for name in SHARED[3:]:
        own[f"{name} is 1"] = getattr(settings, name) == 1
    return repr(sorted(own.items()))


def at_least_one(settings: Any, *fields: str, prefix: str = "") -> None:
    """Raises UsageError for the first of the fields that is a whole number below 1."""
    for name in fields:
        value = getattr(settings, name)
        if isinstance(value, int) and value < 1:
            raise UsageError(f"{flag(prefix + name)} {value}: choose a whole number of at least 1")


def even(settings: Any, field: str) -> None:
    """Raises UsageError where the number of members cannot be divided into pairs."""
    value = getattr(settings, field)
    if value < 2 or value % 2:
        raise UsageError(
            f"{flag(field)} {value}: members come in opposite pairs, "
            "so choose an even number of at least 2"
        )


def positive(settings: Any, *fields: str, prefix: str = "") -> None:
    """Raises UsageError for the first of the fields that is not a finite number above 0."""
    for name in fields:
        value = getattr(settings, name)
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"{flag(prefix + name)} {value}: choose a positive number")


def fraction(settings: Any, *fields: str, prefix: str = "") -> None:
    """Raises UsageError for the first of the fields that is not in (0, 1]."""
    for name in fields:
        value = getattr(settings, name)
        if not 0 < value <= 1:
            raise UsageError(f"{flag(prefix + name)} {value}: choose a number above 0, up to 1")


def flag(field: str) -> str:
    """A field as it is typed on the command line.

    Example:
        >>> flag("ppo.learning_rate")
        '--ppo.learning-rate'
    """
    return "--" + field.replace("_", "-")


def to_json(settings: Any) -> dict[str, Any]:
    """Settings as JSON values: nested dataclasses as objects, paths as strings."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(settings).items()
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
        experiments.run.errors.UsageError: config.json: width is 'x'; a whole number is right
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
        for member in _members(hint):
            if _fits(value, member):
                break
        else:
            kinds = " or ".join(map(_in_words, _members(hint)))
            raise UsageError(f"config.json: {prefix}{name} is {value!r}; {kinds} is right")
        if member is Path:
            value = Path(value)
        elif member is float:
            value = float(value)
        values[name] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**values)
    except TypeError as error:
        raise UsageError(f"config.json lacks a setting of this version: {error}") from error


def _members(hint: Any) -> tuple[Any, ...]:
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is one of this type of a setting."""
    if typing.get_origin(hint) is typing.Literal:
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
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return "a list"
    kinds: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text"}
    kinds |= {bool: "true or false", Path: "a path", type(None): "null"}
    return kinds.get(hint, "an object")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Settings that decide results and are not the same, as "--flag old -> new"."""
    a, b = dict(_flat(old)), dict(_flat(new))
    # What shares a product sums it in another order.
    free = FREE - {"tensor_parallel"} if b.get("same_bits") else FREE
    for name in sorted(a.keys() | b.keys()):
        if name not in free and a.get(name, "absent") != b.get(name, "absent"):
            yield f"{flag(name)} {a.get(name, 'absent')} -> {b.get(name, 'absent')}"


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, list(value) if isinstance(value, tuple) else value
