"""Means and deviations of scores over a task, a group of members or all scores, without overflow.

Sums over the members of a group are a fixed tree over sorted members and not a scatter-add: a GPU
does not guarantee the order of additions in a scatter-add.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int, Integer, Shaped

# Reduces cells with jnp.add or jnp.maximum over each set of cells (a task, a group or all). The
# result broadcasts against the cells.
Reduce = Callable[[Any, Float[Array, "population tasks"]], Float[Array, "_ _"]]

# Scores are divided by this constant before moments are taken. The difference of the largest floats
# overflows, and their reciprocals are denormal (XLA may multiply by a reciprocal to divide).
SHRINK = 8


def moments(scores: Array, valid: Array, reduce: Reduce) -> tuple[Array, Array]:
    """Deviations from the mean of each set, and its standard deviation, both over ``SHRINK``.

    The lowest score is subtracted first, which is exact under a large common offset. The result is
    scaled by a power of two near the range: squares neither overflow nor underflow, and integers
    stay exact.
    """
    scores = scores / SHRINK
    high = reduce(jnp.maximum, jnp.where(valid, scores, -jnp.inf))
    low = -reduce(jnp.maximum, jnp.where(valid, -scores, -jnp.inf))
    spread = high - low  # -inf where nothing is valid
    precision = jnp.finfo(scores.dtype)
    rounding = 2 * precision.eps * jnp.maximum(jnp.abs(low), jnp.abs(high))
    # The second bound excludes denormal deviations, which XLA flushes to zero.
    has_spread = spread > jnp.maximum(rounding, precision.tiny / precision.eps)
    used = valid & has_spread
    _, exponent = jnp.frexp(jnp.where(has_spread, spread, 1))
    unit = jnp.ldexp(jnp.ones_like(spread), exponent - 1)
    count = jnp.maximum(reduce(jnp.add, valid.astype(scores.dtype)), 1)
    deviation = jnp.where(used, (scores - low) / unit, 0)
    # The second pass removes the rounding error of the first mean.
    for _ in range(2):
        deviation = jnp.where(used, deviation - reduce(jnp.add, deviation) / count, 0)
    std = jnp.sqrt(reduce(jnp.add, deviation**2) / count)
    return deviation * unit, std * unit


def divide(shrunk: Array, std: Array, eps: float) -> Array:
    """``shrunk / sqrt(std^2 + eps)`` for results of :func:`moments`; 0 if ``std`` is 0."""
    divisor = jnp.hypot(std, math.sqrt(eps) / SHRINK)
    return jnp.where(std > 0, shrunk / jnp.where(std > 0, divisor, 1), 0)


def over(by: str, groups: Array | None) -> Reduce:
    """The reduction over the sets that ``by`` names: "population", "batch", "task" or "group"."""
    if by in ("population", "batch"):
        return over_batch
    return over_task if by == "task" or groups is None else over_groups(groups)


def over_task(op: Any, x: Array) -> Array:
    """Reduces over the members of each task."""
    return op.reduce(x, axis=0, keepdims=True)


def over_batch(op: Any, x: Array) -> Array:
    """Reduces over all cells."""
    return op.reduce(x, axis=(0, 1), keepdims=True)


def over_groups(groups: Integer[Array, "population"]) -> Reduce:
    """The reduction over the members of each group, within a task; ids are any integers."""
    order = jnp.argsort(groups)
    first, end = run_bounds(differs_from_previous(groups[order]))

    def reduce(op: Any, x: Array) -> Array:
        folded = _fold_runs(x[order], first, op=op)[end - 1]
        return jnp.zeros_like(x).at[order].set(folded, unique_indices=True)

    return reduce


# Jitted, since an eager loop would be compiled again at every call.
@functools.partial(jax.jit, static_argnames="op")
def _fold_runs(x: Float[Array, "n tasks"], first: Int[Array, "n"], *, op: Any) -> Array:
    """For each row, the reduction of the rows from ``first`` of its run up to this row."""
    size = first.size
    index = jnp.arange(size)

    # After step k, a row holds the reduction of the last 2^(k+1) rows of its run up to this row, or
    # of all if there are fewer. This takes log2(size) steps, always with the same tree of
    # additions.
    def step(k: Array, folded: Array) -> Array:
        shift = 1 << k
        inside = (index - shift >= first)[:, None]
        return jnp.where(inside, op(jnp.roll(folded, shift, axis=0), folded), folded)

    return lax.fori_loop(0, (size - 1).bit_length(), step, x)


def differs_from_previous(x: Shaped[Array, "n"]) -> Bool[Array, "n"]:
    """Whether each element differs from the one before; True for the first element."""
    return (x != jnp.roll(x, 1)).at[0].set(True)


def run_bounds(starts: Bool[Array, "n"]) -> tuple[Int[Array, "n"], Int[Array, "n"]]:
    """The start of each position's run, and the start of the next; position 0 is a start."""
    index = jnp.arange(starts.size)
    first = lax.cummax(jnp.where(starts, index, 0))
    last = lax.cummin(jnp.where(jnp.roll(starts, -1), index, starts.size - 1), reverse=True)
    return first, last + 1
