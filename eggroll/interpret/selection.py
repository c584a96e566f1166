"""The rule of ``select_n``, which ``where`` and ``vmap`` of ``cond`` and ``switch`` are made of."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core

from eggroll.interpret.context import Context, Origin
from eggroll.interpret.equations import type_of
from eggroll.interpret.joins import aligned, combined
from eggroll.interpret.registry import UNHANDLED, Rounding, Unhandled, rule
from eggroll.interpret.structure import Result
from eggroll.values.lowrank import LateBroadcast, LowRank, Upcast, Value, materialize


@rule(
    "select_n",
    keeps="of one value with itself; by what members share, between a value and an array that they "
    "share, and between values if it varies along the axes of one factor",
    integers=True,
    late_broadcasts=True,
    rounding=Rounding.EXACT,
)
def select_n(ctx: Context, eqn: core.JaxprEqn, which: Value, *cases: Value) -> Result:
    if all(case is cases[0] for case in cases):
        # Operands of a cond under vmap: select(p, w, stop_gradient(w)).
        return cases[0]
    lazy = [isinstance(case, LowRank) for case in cases]
    operands = zip((False, *lazy), ctx.origins_of(eqn), strict=True)
    if isinstance(which, LowRank) or any(o & Origin.OWN for is_lazy, o in operands if not is_lazy):
        return UNHANDLED  # the array would be each member's own
    cases = tuple(
        case.absorb_gains() if own else materialize(case)
        for own, case in zip(lazy, cases, strict=True)
    )
    values = [case for own, case in zip(lazy, cases, strict=True) if own]
    if any(isinstance(case, Upcast) or case is None for case in cases):
        return UNHANDLED
    if any(v.arithmetic != values[0].arithmetic for v in values):
        return UNHANDLED
    plain = [jnp.asarray(case.w if own else case) for own, case in zip(lazy, cases, strict=True)]
    w = lax.select_n(spread(which, type_of(eqn.outvars[0]).shape), *plain)
    small = thin(which, w.ndim)
    if len(values) == 1:
        value = values[0]
        chosen = small == jnp.asarray(lazy.index(True), small.dtype)
        if value.arithmetic.linear or factor_over(value, varying(chosen)) is not None:
            return masked(value, w, chosen)
        return UNHANDLED
    terms = []
    for i, case in enumerate(cases):
        if lazy[i]:
            chosen = small == jnp.asarray(i, small.dtype)
            if factor_over(case, varying(chosen)) is None and ctx.recorder is None:
                return UNHANDLED
            terms.append(masked(case, w, chosen))
    return summed(w, terms)


def thin(which: Value, ndim: int) -> Array:
    """A predicate with ``ndim`` axes, of size 1 where a broadcast repeats it."""
    array = jnp.asarray(which.value if isinstance(which, LateBroadcast) else which)
    return array.reshape(array.shape or (1,) * ndim)


def spread(which: Value, shape: tuple[int, ...]) -> Array:
    """A predicate as ``lax.select_n`` takes it: a scalar, or of the shape of the cases."""
    array = jnp.asarray(materialize(which))
    return array if array.ndim == 0 else jnp.broadcast_to(array, shape)


def varying(array: Array) -> list[int]:
    """The axes that an array varies along."""
    return [axis for axis, n in enumerate(array.shape) if n > 1]


def masked(value: LowRank, w: Array, chosen: Array) -> LowRank:
    """A value with the array ``w``, and with noise where ``chosen`` holds.

    Args:
      value: without gains.
      w: the array, of the value's shape.
      chosen: bool with the axes of the value, the same for every member.
    """
    repeated = any(value.shape[a] > 1 and not value.along(a) for a in varying(chosen))
    k = factor_over(value, varying(chosen))
    if k is None:
        return value.masked(w, chosen).replace(activation=value.activation)
    factors = list(value.factors)
    factors[k] = factors[k] * chosen[None].astype(factors[k].dtype)
    # What repeats a value and differs from place to place is as large as data.
    return value.replace(w=w, factors=tuple(factors), activation=value.activation or repeated)


def factor_over(value: LowRank, axes: Sequence[int]) -> int | None:
    """The smallest factor that varies along all of the axes that carry noise, if there is one."""
    carrying = [a for a in axes if value.along(a)]
    fitting = [k for k in range(len(value.factors)) if all(value.varies(k, a) for a in carrying)]
    return min(fitting, key=lambda k: value.factors[k].size) if fitting else None


def summed(w: Array, terms: Sequence[LowRank]) -> LowRank | Unhandled:
    """The array ``w`` plus the noise of several values, if their factors together stay thin."""
    parts = aligned([term.replace(w=w) for term in terms])
    return UNHANDLED if parts is None else combined(parts, w, 0)
