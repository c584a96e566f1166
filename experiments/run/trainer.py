"""The interface of what trains: a start, generations, measurements, and what the run taught."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from jaxtyping import PyTree

from experiments.run.metrics import Row
from experiments.run.plots import Curve
from experiments.run.settings import RunSettings
from experiments.run.tensors import write_tensors

Config = TypeVar("Config", bound=RunSettings)


class Carry(NamedTuple):
    """All that decides the future of a run, beside its settings and its data.

    With several seeds in one program every leaf has a leading axis [seeds].

    Attributes:
        learner: the learner's state; its `params` are the trained parameters.
        own: what the problem carries, such as statistics of observations or hidden states.
        generation: updates done, int32.
        seed: what everything random comes from, int32.
    """

    learner: Any
    own: PyTree
    generation: Any
    seed: Any


class Outcome(NamedTuple):
    """What a finished run came to.

    Attributes:
        state: the last one.
        generations: done, in all processes that worked on the run.
        before: what was measured before training.
        after: what was measured of the last state.
        fresh: the same of data that decided nothing, by other names; None, as all figures, where not finite.
        learned: whether the target was reached on fresh data, by all seeds; None without a target.
        rows: all metric rows.
    """

    state: Carry
    generations: int
    before: Row
    after: Row
    fresh: Row
    learned: bool | None
    rows: list[Row]

    @property
    def totals(self) -> Row:
        """The last row, which has the totals of the run; empty without any."""
        return self.rows[-1] if self.rows else {}


class Conclusion(NamedTuple):
    """What a run taught.

    Attributes:
        lesson: in words; the title of the picture and the beginning of the sentence.
        path: how it came there, with which the sentence goes on: "after 3 updates by adam".
        curve: what the picture shows.
        results: values for result.json, by the driver's `results`.
    """

    lesson: str
    path: str
    curve: Curve
    results: Mapping[str, Any] = {}


class Trainer(ABC, Generic[Config]):
    """One run: how it starts, what a generation does, how it is measured and what it comes to.

    A subclass makes its data, model and learner in `__init__`, raises UsageError there for settings that
    cannot be right, and gives what must be closed to `resources`.

    Args:
        config: the settings, checked.

    Attributes:
        measured: names of what `measure` gives.
        totals: names of row values that are summed over the generations of the run.
        sharding: where the state lies on several devices, a tree of which its own begins; None for one.
        notes: sentences that are said before training.
        files: whose content decides what is learned, beside the settings; with others a run does not go on.
        keeps_history: whether rows have `scores`, which go to history.jsonl and rebuild the update
            (:mod:`experiments.run.history`).
    """

    measured: tuple[str, ...]
    totals: tuple[str, ...] = ()
    sharding: PyTree | None = None
    notes: Sequence[str] = ()
    files: Sequence[Path] = ()
    keeps_history: bool = False

    def __init__(self, config: Config) -> None:
        self.config = config
        self.resources = contextlib.ExitStack()

    def __enter__(self) -> "Trainer[Config]":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.resources.__exit__(kind, error, trace)

    @abstractmethod
    def start(self) -> Carry:
        """The state before generation 0: arrays only, a function of the settings alone."""

    @abstractmethod
    def generation(self, carry: Carry) -> tuple[Carry, Mapping[str, Any]]:
        """The next state, and a row: numbers, or lists with one number for each of several seeds."""

    @abstractmethod
    def measure(self, carry: Carry) -> Mapping[str, Any]:
        """Held-out figures of a state, by the names of `measured`."""

    @abstractmethod
    def confirm(self, carry: Carry) -> Mapping[str, Any]:
        """The driver's figure, under its fresh name, on data that decided nothing before."""

    @abstractmethod
    def conclude(self, config: Config, outcome: Outcome) -> Conclusion:
        """What a run taught.

        Args:
            config: the run's settings; in a program of several runs they differ from those of the trainer.
            outcome: what it came to.
        """

    @abstractmethod
    def evaluate(self, carry: Carry, episodes: int, seed: int) -> Mapping[str, Sequence[float]]:
        """Scores of a state for `eggroll eval`, by their names.

        Args:
            carry: the state.
            episodes: how many to play, where episodes are played.
            seed: decides what is drawn.
        """

    def export(self, carry: Carry, to: Path | None) -> str:
        """Writes a state for other programs; says what was written.

        Args:
            carry: the state, on the host.
            to: the file or folder; in the run folder by default.
        """
        tree = {"params": carry.learner.params}
        return write_tensors(self.config, int(np.max(carry.generation)), tree, to)

    def prepare(self, folder: Path) -> None:
        """Writes what the run folder has beside the files of all runs, before training."""


class LanguageTrainer(Trainer[Config]):
    """A trainer of a language model.

    Attributes:
        sample_every: generations from one sample in samples.txt to the next; None for the first and last.
    """

    sample_every: int | None = None

    @abstractmethod
    def sample(self, carry: Carry) -> bytes | str:
        """What the model writes, for samples.txt."""

    @abstractmethod
    def write(
        self,
        carry: Carry | None,
        prompts: Sequence[str],
        length: int | None,
        temperature: float,
        seed: int,
    ) -> list[str]:
        """What the model writes after prompts, for `eggroll sample`.

        Args:
            carry: the state; None for the model that training begins with.
            prompts: texts to go on from.
            length: tokens of an answer at most; by default as in training.
            temperature: of sampling; 0 takes the likeliest token.
            seed: decides what is drawn.
        """


class Adapts(ABC):
    """A trainer whose model can be written as adapters (LoRA), which servers of language models load."""

    @abstractmethod
    def export_update(self, carry: Carry, to: Path | None, rank: int) -> str:
        """Writes what was learned as an adapter of the model that training began with; says what was written.

        Args:
            carry: the state, on the host.
            to: the folder; adapter, in the run folder by default.
            rank: of the adapter, at most.

        Raises:
            UsageError: where an adapter cannot hold it.
        """

    @abstractmethod
    def export_members(
        self, carry: Carry, to: Path | None, members: str, rank: int | None = None
    ) -> str:
        """Writes members of the coming generation as adapters of the mean; says what was written.

        Args:
            carry: the state, on the host.
            to: the folder; members, in the run folder by default.
            members: their numbers, as in "0,1,2" or "0-7".
            rank: makes them adapters of the model that training began with, which have the update since then
                in this rank at most.

        Raises:
            UsageError: if the noise has no low-rank factors, or there is no such member.
        """


class Replays(ABC):
    """A trainer whose updates can be made again from their scores."""

    @abstractmethod
    def replay(self, carry: Carry, scores: np.ndarray) -> tuple[Carry, Mapping[str, Any]]:
        """The next state, and the figures of the update.

        Args:
            carry: the state before the update.
            scores: of the members, as the history has them.
        """


class Films(ABC):
    """A trainer whose episodes can be drawn."""

    @abstractmethod
    def draws(self, config: Any) -> bool:
        """Whether an episode is drawn at the end of a run with these settings."""

    @abstractmethod
    def film(self, config: Any, carry: Carry, seed: int) -> str:
        """Writes an episode as episode.gif into the run folder; says what was written.

        Args:
            config: the run's settings; in a program of several runs they differ from those of the trainer.
            carry: the state.
            seed: decides the episode.

        Raises:
            UsageError: where the environment cannot be drawn.
        """
