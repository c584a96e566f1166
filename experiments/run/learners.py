"""Learners that several drivers share: an evolution strategy from settings, and backpropagation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import Array, PyTree

import eggroll
from experiments.run.devices import ONE, Layout
from experiments.run.optimizers import decayed, make_optimizer
from experiments.run.settings import Evolution, Optimizer
from experiments.run.sizes import sizes

Number = float | int | Array


class Rates(NamedTuple):
    """The numbers that may be arrays in a program: runs that differ in them alone need one program.

    A decay of 1 stays the Python number: without a schedule the optimizer has another state.
    """

    sigma: Number
    sigma_decay: Number
    learning_rate: Number
    learning_rate_decay: Number


def rates_of(evolution: Evolution, optimizer: Optimizer) -> Rates:
    """The rates that settings name."""
    return Rates(
        evolution.sigma,
        evolution.sigma_decay,
        optimizer.learning_rate,
        optimizer.learning_rate_decay,
    )


def strategy(
    evolution: Evolution,
    optimizer: Optimizer,
    layout: Layout = ONE,
    rates: Rates | None = None,
    /,
    **own: Any,
) -> eggroll.EvolutionStrategy:
    """The evolution strategy that settings describe.

    Args:
        evolution: the group of settings.
        optimizer: the group of settings.
        layout: the devices.
        rates: in place of those of the settings; they may be traced.
        **own: what the problem decides: plan, credit, shaping, rows, ...; takes precedence.

    Raises:
        UsageError: for an optimizer that there is not.
    """
    rates = rates or rates_of(evolution, optimizer)
    sigma: Any = decayed(rates.sigma, rates.sigma_decay)
    if not (callable(sigma) or isinstance(sigma, int | float)):
        # A strategy takes a number that it can look at, or a schedule.
        sigma = lambda _: rates.sigma
    settings: dict[str, Any] = dict(
        optimizer=optimizer_of(optimizer, rates),
        population=evolution.population,
        sigma=sigma,
        rank=evolution.rank,
        chunk=evolution.chunk,
        on_dense="error",
        mesh=layout.mesh,
        deterministic=layout.same_bits,
    )
    return eggroll.EvolutionStrategy(**{**settings, **own})


def optimizer_of(optimizer: Optimizer, rates: Rates | None = None) -> optax.GradientTransformation:
    """The optimizer that settings name, at their learning rate with its decay, or at that of `rates`.

    Raises:
        UsageError: for an optimizer that there is not.
    """
    rate = optimizer if rates is None else rates
    return make_optimizer(optimizer.name, decayed(rate.learning_rate, rate.learning_rate_decay))


def row_of(
    metrics: eggroll.Metrics, es: eggroll.EvolutionStrategy, state: eggroll.State
) -> dict[str, Array | None]:
    """An update as a row; None for what was not measured.

    Args:
        metrics: of the update; the generation is left out, which the loop counts.
        es: the strategy.
        state: before the update; its sizes are in the row, by which steps are judged.
    """
    row = metrics._asdict()
    del row["generation"]
    return row | sizes(es, state)


class Trained(NamedTuple):
    """The state of backpropagation.

    Attributes:
        params: the parameters.
        optimizer: the optimizer's state.
    """

    params: PyTree
    optimizer: Any


class Backprop(NamedTuple):
    """Learning by backpropagation.

    Attributes:
        optimizer: what moves the parameters.
    """

    optimizer: optax.GradientTransformation

    def start(self, params: PyTree) -> Trained:
        """The state before the first update."""
        return Trained(params, self.optimizer.init(params))

    def step(
        self, state: Trained, loss: Callable[..., tuple[Array, Any]], *args: Any
    ) -> tuple[Trained, Array, Any, PyTree]:
        """One update.

        Args:
            state: before it.
            loss: (params, *args) -> (loss, what it gives beside).
            *args: for the loss.

        Returns:
            The next state, the loss, what the loss gave beside, and the gradient.
        """
        (value, beside), grads = jax.value_and_grad(loss, has_aux=True)(state.params, *args)
        return self.apply(state, grads), value, beside, grads

    def apply(self, state: Trained, grads: PyTree) -> Trained:
        """The state after a step along a gradient."""
        updates, optimizer = self.optimizer.update(grads, state.optimizer, state.params)
        return Trained(optax.apply_updates(state.params, updates), optimizer)
