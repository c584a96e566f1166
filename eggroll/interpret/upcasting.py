"""Equations on narrow parameters that are held in float32 (:class:`~eggroll.values.Upcast`).

Dense noise is never rounded into a bfloat16 weight: it stays in float32 until the operation that
brings parameters and data together is done.
"""

import jax.numpy as jnp
from jax import Array
from jax.extend import core
from jax.typing import DTypeLike

from eggroll.interpret.context import Context
from eggroll.interpret.equations import results, type_of
from eggroll.interpret.registry import Entry, Rounding, entry, without_rule
from eggroll.values.dtypes import is_narrow
from eggroll.values.lowrank import Upcast, Value, materialize, narrow

without_rule(
    "abs", "clamp", "cos", "erf", "exp", "exp2", "expm1", "log", "log1p",
    "logistic", "max", "min", "rsqrt", "sign", "sin", "sqrt", "tanh",
    rounding=Rounding.ELEMENTWISE,
)  # fmt: skip
without_rule(
    "cumsum", "eq", "ge", "gt", "le", "lt", "ne", "reduce_max", "reduce_min",
    rounding=Rounding.SUMS,
)  # fmt: skip


def apply(known: Entry, eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    """An equation on arrays, some of which may be held in float32."""
    values = [materialize(v) for v in values]
    if any(isinstance(v, Upcast) for v in values):
        return in_float32(known, eqn, values)
    return results(eqn, values)


def as_data(ctx: Context, eqn: core.JaxprEqn, *values: Value) -> list[Value]:
    """An equation whose operands are built without a report: the result is data.

    Where a parameter meets an array of a member's own of the same size, every member has such an
    array already.
    """
    built = [ctx.upcast(v, eqn, advice="") for v in values]
    return apply(entry(eqn.primitive.name), eqn, built)


def held(array: Array, dtype: DTypeLike) -> Value:
    """A result in the type in which sums are formed, as a value of the equation's own type."""
    return Upcast(array, jnp.dtype(dtype)) if is_narrow(dtype) else array.astype(dtype)


def in_float32(known: Entry, eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    """An equation on narrow parameters held in float32."""
    dtypes = [type_of(var).dtype for var in eqn.outvars]
    if known.primitive == "convert_element_type":
        array = values[0].value
        return [Upcast(array, dtypes[0]) if is_narrow(dtypes[0]) else array.astype(dtypes[0])]
    if known.rounding is None:
        return results(eqn, [narrow(v) for v in values])
    # What depends on parameters alone stays in float32 until it meets data: 1 + gain, for one.
    constant = all(isinstance(v, Upcast) or jnp.ndim(v) == 0 for v in values)
    params = (
        {"preferred_element_type": jnp.float32} if "preferred_element_type" in eqn.params else {}
    )
    outs = results(eqn, [widened(v) for v in values], **params)
    exact = known.rounding in (Rounding.MOVES, Rounding.EXACT)
    if exact or (known.rounding is Rounding.ELEMENTWISE and constant):
        return [
            Upcast(out, dtype) if out.dtype != dtype else out
            for out, dtype in zip(outs, dtypes, strict=True)
        ]
    return [out.astype(dtype) for out, dtype in zip(outs, dtypes, strict=True)]


def widened(value: Value) -> Value:
    """The numbers of a value in float32, if they are in a narrower float type."""
    if isinstance(value, Upcast):
        return value.value
    array = jnp.asarray(value)
    return array.astype(jnp.float32) if is_narrow(array.dtype) else array
