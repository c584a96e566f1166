"""Equations on narrow parameters that are held in float32 (:class:`~eggroll.values.lowrank.Wide`).

Dense noise is never rounded into a bfloat16 weight: it stays in float32 until the operation that brings
parameters and data together is done.
"""

from typing import Any

import jax.numpy as jnp

from eggroll.interpret.rules import results
from eggroll.values.lowrank import Value, Wide, is_narrow, narrow

# These move numbers and do not round them: of Wide operands they give Wide results.
MOVES = frozenset(
    "concatenate copy copy_p dynamic_slice dynamic_update_slice gather name neg "
    "optimization_barrier pad pcast pvary reshape reshard rev select_n sharding_constraint slice "
    "split squeeze stack stop_gradient tile transpose unstack".split()
)
# These are computed in float32 and rounded once, at the end.
ELEMENTWISE = frozenset(
    "abs add add_any clamp cos div erf exp exp2 expm1 integer_pow log log1p logistic max min mul "
    "pow rsqrt sign sin sqrt square sub tanh".split()
)
SUMS = frozenset(
    "conv_general_dilated cumsum dot_general eq ge gt le lt ne reduce_max reduce_min "
    "reduce_sum".split()
)


def in_float32(eqn: Any, values: list[Value]) -> list[Value]:
    """An equation on narrow parameters held in float32."""
    name = eqn.primitive.name
    dtypes = [var.aval.dtype for var in eqn.outvars]
    if name == "convert_element_type":
        array = values[0].value
        return [Wide(array, dtypes[0]) if is_narrow(dtypes[0]) else array.astype(dtypes[0])]
    if name not in MOVES | ELEMENTWISE | SUMS:
        return results(eqn, [narrow(v) for v in values])
    # What depends on parameters alone stays in float32 until it meets data: 1 + gain, for one.
    constant = all(isinstance(v, Wide) or jnp.ndim(v) == 0 for v in values)
    params = (
        {"preferred_element_type": jnp.float32} if "preferred_element_type" in eqn.params else {}
    )
    outs = results(eqn, [widened(v) for v in values], **params)
    if name in MOVES or (name in ELEMENTWISE and constant):
        return [
            Wide(out, dtype) if out.dtype != dtype else out
            for out, dtype in zip(outs, dtypes, strict=True)
        ]
    return [out.astype(dtype) for out, dtype in zip(outs, dtypes, strict=True)]


def widened(value: Value) -> Value:
    """The numbers of a value in float32, if they are in a narrower float type."""
    if isinstance(value, Wide):
        return value.value
    array = jnp.asarray(value)
    return array.astype(jnp.float32) if is_narrow(array.dtype) else array
