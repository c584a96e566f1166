"""Rules of reductions of perturbed values."""

import jax.numpy as jnp
from jax.extend import core

from eggroll.interpret.context import Context
from eggroll.interpret.equations import bind
from eggroll.interpret.registry import UNHANDLED, Rounding, rule
from eggroll.interpret.structure import Result
from eggroll.values.lowrank import LowRank


@rule(
    "reduce_sum",
    keeps="sums over axes along which at most one factor varies",
    rounding=Rounding.SUMS,
)
def reduce_sum(ctx: Context, eqn: core.JaxprEqn, value: LowRank) -> Result:
    if value.gains:
        return UNHANDLED
    axes = [int(a) for a in eqn.params["axes"]]
    factors, scale = list(value.factors), value.scale
    for axis in axes:
        along = [k for k in range(len(factors)) if value.varies(k, axis)]
        if len(along) > 1:
            return UNHANDLED
        if along:
            factors[along[0]] = factors[along[0]].sum(axis + 1, keepdims=True)
        else:
            scale = scale * value.shape[axis]
    squeezed = tuple(jnp.squeeze(f, [a + 1 for a in axes]) for f in factors)
    return value.replace(w=bind(eqn, value.w), factors=squeezed, scale=scale)
