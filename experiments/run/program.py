"""Trainers whose run is one traced function: it can be mapped over seeds, and over runs of other rates."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from experiments.run.devices import ONE, Layout, layout_of
from experiments.run.learners import Rates
from experiments.run.trainer import Carry, Config, Trainer


def many(seeds: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function of one seed's things as one of all seeds' things, with leading axes [seeds]."""
    return jax.vmap if seeds > 1 else lambda f: f


class Program(NamedTuple):
    """What a run with one seed is made of, as functions that can be traced.

    Attributes:
        start: seed -> the state before generation 0.
        generation: state -> (next state, row).
        measure: state -> held-out figures.
        confirm: state -> the driver's figure of data that decided nothing.
    """

    start: Callable[[Int[Array, ""]], Carry]
    generation: Callable[[Carry], tuple[Carry, Mapping[str, Any]]]
    measure: Callable[[Carry], Mapping[str, Any]]
    confirm: Callable[[Carry], Mapping[str, Any]]


class ProgramTrainer(Trainer[Config]):
    """A trainer that is a :class:`Program`; `config.seeds` of them are one.

    Args:
        config: the settings, which have `seeds` and the group `evolution`.
        alone: why a run has one device, if it has.
    """

    def __init__(self, config: Config, alone: str | None = None) -> None:
        super().__init__(config)
        seeds: int = config.seeds  # type: ignore[attr-defined]
        if seeds > 1:
            alone = alone or f"--seeds {seeds} are one program"
        self.layout = layout_of(config.cluster, config.evolution.population, alone)  # type: ignore[attr-defined]
        every = many(seeds)
        run = self.program(config, self.layout)
        start, generation = every(run.start), every(run.generation)
        measure, confirm = every(run.measure), every(run.confirm)
        numbers = config.seed + jnp.arange(seeds)
        jit = self.layout.jit
        self._start = jit(lambda: start(numbers if seeds > 1 else numbers[0]))
        self._generation = jit(generation, donate_argnums=0)
        self._measure, self._confirm = jit(measure), jit(confirm)
        self.sharding = self.layout.everywhere

    @abstractmethod
    def program(self, config: Config, layout: Layout = ONE, rates: Rates | None = None) -> Program:
        """The functions of a run with one seed.

        Args:
            config: the settings.
            layout: the devices.
            rates: in place of those of the settings; they may be traced.
        """

    def start(self) -> Carry:
        return self._start()

    def generation(self, carry: Carry) -> tuple[Carry, Mapping[str, Any]]:
        return self._generation(carry)

    def measure(self, carry: Carry) -> Mapping[str, Any]:
        return self._measure(carry)

    def confirm(self, carry: Carry) -> Mapping[str, Any]:
        return self._confirm(carry)
