"""Rules of reductions: sums of perturbed values, of their multiples, products and squares."""

import math

import jax.numpy as jnp
from jax import lax
from jax.extend import core

from eggroll.interpret.context import Context
from eggroll.interpret.equations import bind, type_of
from eggroll.interpret.registry import UNHANDLED, Rounding, rule
from eggroll.interpret.structure import Result, dims
from eggroll.interpret.upcasting import held
from eggroll.values.deferred import Deferred, sum_of_product
from eggroll.values.lowrank import LowRank, Value

# Thin sums take part in norms, which a plain program forms in full precision on any device.
PRECISION = lax.Precision.HIGHEST


@rule(
    "reduce_sum",
    keeps="all, with the ranks of every index where several factors are summed over",
    takes=(LowRank, Deferred),
    rounding=Rounding.SUMS,
)
def reduce_sum(ctx: Context, eqn: core.JaxprEqn, value: Value) -> Result:
    axes = [int(a) for a in eqn.params["axes"]]
    dtype = type_of(eqn.outvars[0]).dtype
    if isinstance(value, Deferred):
        total = value.sum(axes, PRECISION)
        return UNHANDLED if total is None else held(total, dtype)
    gains = any(gain.shape[a] > 1 for gain in value.gains for a in axes)
    shared = [a for a in axes if len(value.along(a)) > 1]
    if gains or (shared and not folds(value, axes, shared)):
        return held(sum_of_product([value], axes, PRECISION), dtype)
    factors, scale = list(value.factors), value.scale
    for axis in axes:
        along = value.along(axis)
        if axis in shared:
            continue
        if along:
            factors[along[0]] = factors[along[0]].sum(axis + 1, keepdims=True)
        else:
            scale = scale * value.shape[axis]
    if shared:
        factors = [into_rank(value, f, shared) for f in factors]
    squeezed = tuple(jnp.squeeze(f, [a + 1 for a in axes]) for f in factors)
    gains_left = tuple(jnp.squeeze(gain, axes) for gain in value.gains)
    out = value.replace(w=bind(eqn, value.w), factors=squeezed, scale=scale, gains=gains_left)
    # Numbers and vectors are ordinary arrays from here on.
    return ctx.upcast(out, eqn) if out.thin else out


def folds(value: LowRank, axes: list[int], shared: list[int]) -> bool:
    """Whether the sum over axes of several factors is thin with a rank for each of their indices."""
    ranks = value.rank * math.prod(value.shape[a] for a in shared)
    size = sum(math.prod(n for a, n in enumerate(dims(f)) if a not in axes) for f in value.factors)
    return ranks * size < math.prod(n for a, n in enumerate(value.shape) if a not in axes)


def into_rank(value: LowRank, factor: jnp.ndarray, axes: list[int]) -> jnp.ndarray:
    """A factor with axes moved into its rank, of size 1 where they were."""
    full = [value.rank, *(value.shape[a] if a in axes else n for a, n in enumerate(dims(factor)))]
    moved = jnp.moveaxis(
        jnp.broadcast_to(factor, full), [a + 1 for a in axes], range(1, len(axes) + 1)
    )
    moved = moved.reshape(-1, *moved.shape[len(axes) + 1 :])
    return jnp.expand_dims(moved, [a + 1 for a in axes])
