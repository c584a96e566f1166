"""The settings that every driver has, and groups of settings that several drivers have."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import tyro
from tyro.conf import OmitArgPrefixes as Flat  # a group whose flags lack the group's name

from experiments.run.errors import UsageError
from experiments.run.fields import (
    Role,
    check_ranges,
    count,
    flat,
    free_keys,
    from_zero,
    places,
    positive,
    setting,
    share,
    to_json,
    within,
)
from experiments.run.optimizers import check_optimizer
from experiments.run.paths import check_writable

Own = TypeVar("Own", bound="RunSettings")
# The largest seed: two more, and it is no whole number of 32 bits.
SEED = 2**31 - 2


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices and processes."""

    devices: int | None = count(None, role=Role.FREE)
    """Devices that a population is divided over; by default all GPUs or TPUs, but one CPU device. Several
    processes use all they have."""
    same_bits: bool = False
    """Results to the bit whatever the number of devices; slower. Integers have that without."""
    coordinator: str | None = setting(None, role=Role.FREE)
    """Address HOST:PORT of process 0, for a run of several processes; "auto" on clusters that JAX knows (TPU
    pods, Slurm, GKE, Open MPI). Else JAX_COORDINATOR_ADDRESS, if set."""
    processes: int | None = count(None, role=Role.FREE)
    """How many processes there are; else JAX_NUM_PROCESSES."""
    process: int | None = count(None, least=0, role=Role.FREE)
    """Which of them this is, from 0; else JAX_PROCESS_ID."""
    lost_seconds: int = count(100, role=Role.FREE)
    """Seconds after which a process that does not come, or gives no sign of life, counts as lost, which ends
    the others."""


@dataclass(frozen=True, kw_only=True)
class Evolution:
    """Evolution strategies."""

    population: int = count(512, least=2, even=True)
    """Members of a generation; even, as they come in opposite pairs."""
    sigma: float = positive(0.1, number=True)
    """Standard deviation of the noise on every parameter, or under node noise on every output of a layer."""
    sigma_decay: float = share(1.0, number=True)
    """Factor on sigma after every generation."""
    rank: int | Literal["full"] = count(1)
    """Rank of the noise on matrices; "full" is dense evolution strategies."""
    chunk: int | None = count(None, least=2, even=True, role=Role.ROUNDING)
    """Members evaluated at a time, which bounds memory; by default as many as fit, or all."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What moves the parameters."""

    name: Annotated[str, tyro.conf.arg(name="optimizer")] = "adam"
    """An optimizer of optax, or of this project as "optim.NAME"."""
    learning_rate: float = positive(0.01, number=True)
    """Learning rate of the optimizer."""
    learning_rate_decay: float = share(1.0, number=True)
    """Factor on the learning rate after every generation."""

    def check(self, scheduled: bool = False) -> None:
        """Raises UsageError for an optimizer that no driver can use.

        Args:
            scheduled: whether the learning rate changes for another reason than its decay.
        """
        check_optimizer(self.name, scheduled or self.learning_rate_decay != 1)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What every run has beside its task."""

    driver: ClassVar[str]

    run_dir: Path = setting(role=Role.FREE)
    """Folder for all that the run leaves behind; the same command again continues it."""
    seed: int = count(0, least=0, most=SEED, number=True)
    """Decides everything random."""
    generations: int | None = count(None, role=Role.FREE)
    """Train for exactly this many generations; switches early stopping off."""
    max_generations: int = count(role=Role.FREE)
    """Stop after this many generations where `generations` is not given."""
    evaluate_every: int = count(1)
    """Generations from one held-out measurement to the next."""
    target: float | None = within(None, -1e38, 1e38)
    """Value of the held-out figure at which training stops early, once fresh data confirm it."""
    patience: int | None = count(None, role=Role.FREE)
    """Stop after so many held-out measurements without a better one than before, unless `generations` says
    how long to train."""
    checkpoint_seconds: float = from_zero(30.0, role=Role.FREE)
    """Seconds from one checkpoint to the next; 0 saves every generation."""
    overwrite: bool = setting(False, role=Role.FREE)
    """Replace an earlier run in the run folder."""
    accept_changes: bool = setting(False, role=Role.FREE)
    """Continue a run although its settings are not those that it began with."""
    tensorboard: bool = setting(False, role=Role.FREE)
    """Also write the metrics for TensorBoard, into the run folder."""
    wandb_project: str | None = setting(None, role=Role.FREE)
    """Also send the metrics to this project of Weights & Biases."""
    cluster: Flat[Cluster] = Cluster()
    """Devices and processes."""

    @property
    def limit(self) -> int:
        """Generations after which training stops in any case."""
        return self.max_generations if self.generations is None else self.generations

    @property
    def together(self) -> str | None:
        """Runs of which this is the same can be one program; None for a run that has to be alone."""
        return None

    def on_one_device(self: Own) -> Own:
        """The same by one process on one device, as a run is read, however many trained it."""
        alone = replace(self.cluster, devices=1, coordinator=None, processes=None, process=None)
        return replace(self, cluster=alone)

    def settled(self: Own) -> Own:
        """The same with what follows from other settings filled in."""
        return self

    def check(self) -> None:
        """Raises UsageError for the first setting that cannot be right; subclasses go on from here."""
        check_ranges(self)

    def check_places(self) -> None:
        """Raises UsageError for the first file, folder or name outside the settings that is not there.

        Like :meth:`check` it imports nothing heavy. It is asked where a run is to start, not where a sweep
        for other machines is planned.
        """
        if not self.cluster.coordinator:
            check_writable(self.run_dir, f"--run-dir {self.run_dir}")


def program_of(settings: RunSettings) -> str | None:
    """All settings but those that a program takes as numbers, and but for where and how long to train.

    A decay of 1 is another program than any other decay: it needs no schedule.
    """
    # What is logged elsewhere is logged for one run.
    if settings.tensorboard or settings.wandb_project is not None:
        return None
    if settings.cluster.devices not in (None, 1) or settings.cluster.same_bits:
        return None
    kind = type(settings)
    content = dict(flat(to_json(settings)))
    numbers = {place.key for place in places(kind).values() if place.number}
    # What changes rounding or memory is of the one program.
    free = free_keys(kind, same_bits=True)
    own = {k: v for k, v in content.items() if k not in numbers | free}
    own |= {f"{k} is 1": content[k] == 1 for k in numbers if k.endswith("_decay")}
    return repr(sorted(own.items(), key=lambda item: item[0]))


def shared_numbers(settings: RunSettings) -> dict[str, Any]:
    """The settings that a program takes as numbers, by their names, without the seed."""
    found = {name: place for name, place in places(type(settings)).items() if place.number}
    del found["seed"]
    return found


def target_is_share(settings: RunSettings, what: str) -> None:
    """Raises UsageError where the target is no share of questions or images."""
    if settings.target is not None and not 0 < settings.target <= 1:
        raise UsageError(f"--target {settings.target}: choose {what} above 0, up to 1")
