"""The second half of a generation of int8 parameters, and what a strategy for them must be like.

Everything that the next state depends on is integer arithmetic: the signs of the pairs, the sum
``Z = sum_p F_p A_p B_p``, the optimizer. Metrics are floats, and computed by a program of their own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Bool, Int8, Int32

from eggroll import estimator, shaping
from eggroll.generation import advance, statistics, weighted_noise
from eggroll.plan import Plan, is_float
from eggroll.population.placement import constrain_all
from eggroll.state import Metrics, State, trainable_of
from eggroll.values import fixed_point


class Outcome(NamedTuple):
    """What metrics are computed from.

    Attributes:
      generation: the generation that was evaluated.
      values: the scores, as they came; None where only a gradient was given.
      updated: whether any pair was decided.
      squares: sum over all parameters of the square of their change.
    """

    generation: Int32[Array, ""]
    values: Array | None
    updated: Bool[Array, ""]
    squares: Int32[Array, ""]


def check_settings(es: Any) -> None:
    """Raises ValueError where a strategy with integer noise asks for what only floats can do."""
    if callable(es.sigma):
        raise ValueError(
            "sigma is a schedule: for int8 parameters a fixed power of two such as 2**-4 is right"
        )
    fixed_point.shift_of(float(es.sigma))
    if es.shaping != shaping.pair_sign():
        raise ValueError(
            f"shaping={es.shaping!r}: int8 parameters take eggroll.shaping.pair_sign(), whose weights "
            "are integers"
        )
    if es.agreement:
        raise ValueError(
            "agreement=True: there is no float estimate of int8 parameters; False is right"
        )


def check_plan(plan: Plan, integer_noise: bool) -> None:
    """Raises ValueError where the noise is not for the type of the parameters."""
    for leaf in plan.leaves:
        if integer_noise and is_float(leaf):
            raise ValueError(
                f"parameter {leaf.path!r} is {leaf.dtype} in an integer model; int8 in [-127, 127] is "
                "right (or, to train the floats, noise that is not of eggroll.integer)"
            )
        if not integer_noise and leaf.trainable and leaf.integer:
            raise ValueError(
                f"parameter {leaf.path!r} is int8 and wants integer noise; "
                "eggroll.integer.strategy(...) is right"
            )


def pair_signs(values: Array) -> Int8[Array, "pairs"]:
    """Which member of each pair did better: 1 the first, -1 the second, 0 neither.

    Several tasks vote. Scores are compared and not subtracted, so they may be any integers; of float
    scores those that are not finite drop their pair.
    """
    table = values if values.ndim == 2 else values[:, None]
    first, second = table[0::2], table[1::2]
    ahead = (first > second).astype(jnp.int32) - (first < second).astype(jnp.int32)
    if jnp.issubdtype(table.dtype, jnp.floating):
        ahead = jnp.where(jnp.isfinite(first) & jnp.isfinite(second), ahead, 0)
    return jnp.sign(ahead.sum(1, dtype=jnp.int32)).astype(jnp.int8)


def gradient(
    es: Any, plan: Plan, state: State, signs: Int8[Array, "pairs"], draws: Any
) -> list[Array | None]:
    """``-Z`` of every leaf, int32: the direction for a minimiser."""
    total = weighted_noise(es, plan, state, signs, draws)
    return estimator.gradient(plan, total, es.sigma, jnp.int32(es.population))


def finish(es: Any, state: State, values: Array, draws: Any) -> tuple[State, Outcome]:
    """From the values of a population to the next state."""
    plan = es.plan_of(state.params)
    signs = pair_signs(values)
    grads = gradient(es, plan, state, signs, draws)
    decided = jnp.sum(signs != 0, dtype=jnp.int32)
    new, squares = apply(es, plan, state, grads, decided > 0, decided)
    return new, Outcome(state.generation, values, decided > 0, squares)


def apply(
    es: Any, plan: Plan, state: State, grads: list[Array | None], moved: Array, pairs: Any
) -> tuple[State, Int32[Array, ""]]:
    """Steps the optimizer, unless nothing ``moved``; the generation always advances.

    The optimizer also gets ``pairs``, how many pairs were decided, which the spread of ``Z`` goes by.
    """
    tree: Any = jax.tree.structure(state.params)
    old = trainable_of(plan, state.params, state.master)
    optimizer = optax.with_extra_args_support(es.optimizer)
    updates, inner = optimizer.update(
        jax.tree.unflatten(tree, grads), state.optimizer, old, pairs=pairs
    )
    for leaf, update in zip(plan.leaves, tree.flatten_up_to(updates), strict=True):
        if update is not None and update.dtype != jnp.int8:
            raise ValueError(
                f"the optimizer moves the int8 parameter {leaf.path!r} by {update.dtype}; one that ends "
                "with eggroll.integer.threshold(...) is right"
            )
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(moved, a, b), new, old)
    new, inner = keep(optax.apply_updates(old, updates), old), keep(inner, state.optimizer)
    # Changes are by one unit, so the sum is at most the number of parameters.
    changes = jax.tree.map(
        lambda a, b: jnp.sum(jnp.square(a.astype(jnp.int32) - b), dtype=jnp.int32), new, old
    )
    squares = sum(jax.tree.leaves(changes), jnp.int32(0))
    return constrain_all(advance(plan, state, new, inner), es.specs, es.mesh), squares


def report(es: Any, outcome: Outcome) -> Metrics:
    """The metrics of an update, in floats."""
    nan, zero = jnp.float32(jnp.nan), jnp.int32(0)
    told: tuple[Any, ...] = (nan, nan, nan, nan, zero, zero)
    if outcome.values is not None:
        table = outcome.values if outcome.values.ndim == 2 else outcome.values[:, None]
        told = tuple(statistics(table.astype(jnp.float32)))
    mean, best, worst, std, invalid, identical = told
    norm = jnp.sqrt(outcome.squares.astype(jnp.float32))
    return Metrics(
        outcome.generation, mean, best, worst, std, invalid, identical, outcome.updated, norm, nan,
        jnp.float32(es.sigma),
    )  # fmt: skip
