"""Rules of element-wise arithmetic: multiples and sums of perturbed values."""

import jax.numpy as jnp
from jax.extend import core

from eggroll.interpret.context import Context
from eggroll.interpret.equations import bind, type_of
from eggroll.interpret.joins import combined, matched
from eggroll.interpret.registry import UNHANDLED, Rounding, rule
from eggroll.interpret.structure import Result, dims
from eggroll.values.lowrank import LateBroadcast, LowRank, Upcast, Value, is_lazy


@rule(
    "mul",
    "div",
    keeps="times or over a scalar, or a vector along the axes of one factor",
    late_broadcasts=True,
    rounding=Rounding.ELEMENTWISE,
)
def scale_by(ctx: Context, eqn: core.JaxprEqn, left: Value, right: Value) -> Result:
    """Multiplication by a scalar, or by a vector along the axes of one factor."""
    multiply = eqn.primitive.name == "mul"
    value, other = (left, right) if isinstance(left, LowRank) else (right, left)
    if isinstance(other, LowRank) or (value is right and not multiply):
        return UNHANDLED
    small = other.value if isinstance(other, LateBroadcast) else other
    small = jnp.asarray(small.value if isinstance(small, Upcast) else small)
    axes = [a for a, n in enumerate(small.shape) if n > 1]
    if axes and not any(all(value.varies(k, a) for a in axes) for k in range(len(value.factors))):
        return UNHANDLED
    if isinstance(eqn.invars[1 if value is left else 0], core.Literal):
        op = jnp.multiply if multiply else jnp.divide
        scale = op(value.scale, small.astype(value.scale.dtype))
        return value.replace(w=op(value.w, small), scale=scale)
    gain = small.reshape(small.shape or (1,) * value.ndim)
    return value.replace(gains=(*value.gains, gain if multiply else 1 / gain))


@rule(
    "add",
    "sub",
    "add_any",
    keeps="sums of perturbed values of one form, and of an array and a perturbed value",
    late_broadcasts=True,
    rounding=Rounding.ELEMENTWISE,
)
def add(ctx: Context, eqn: core.JaxprEqn, left: Value, right: Value) -> Result:
    """The sum of two perturbed matrices has the ranks of both; an array is added to the array."""
    values = [v for v in (left, right) if isinstance(v, LowRank)]
    others = [v for v in (left, right) if not isinstance(v, LowRank)]
    if any(map(is_lazy, others)) or any(v.activation or v.gains for v in values):
        return UNHANDLED
    if type_of(eqn.invars[0]).shape != type_of(eqn.invars[1]).shape:
        return UNHANDLED
    w = bind(eqn, *(v.w if isinstance(v, LowRank) else v for v in (left, right)))
    if eqn.primitive.name == "sub" and isinstance(right, LowRank):
        values[-1] = right.replace(scale=-right.scale)
    if len(values) == 1:
        return values[0].replace(w=w)
    parts = matched(values, lambda v: [dims(f) for f in v.factors])
    return UNHANDLED if parts is None else combined(parts, w, 0)
