"""The rule of ``select_n``, which ``where`` and ``vmap`` of ``cond`` and ``switch`` are made of."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core

from eggroll import _compat as compat
from eggroll.interpret.arithmetic import repeated_along
from eggroll.interpret.context import Context, Origin
from eggroll.interpret.equations import bind, type_of
from eggroll.interpret.registry import UNHANDLED, Rounding, rule
from eggroll.interpret.structure import Result
from eggroll.interpret.terms import Noise, noise_of, value_of
from eggroll.values.lowrank import LateBroadcast, LowRank, Upcast, Value, materialize


@rule(
    "select_n",
    keeps="a choice that members share between values and arrays that they share",
    integers=True,
    late_broadcasts=True,
    rounding=Rounding.EXACT,
)
def select_n(ctx: Context, eqn: core.JaxprEqn, which: Value, *cases: Value) -> Result:
    """Noise of each case is kept where that case is chosen: the ranks of all cases, side by side."""
    first = cases[0]
    if all(case is first for case in cases):
        # Operands of a cond under vmap: select(p, w, stop_gradient(w)).
        return first
    alone = masked_value(ctx, eqn, which, cases)
    if alone is not None:
        return alone
    cases = tuple(case if isinstance(case, LowRank) else materialize(case) for case in cases)
    values = [case for case in cases if isinstance(case, LowRank)]
    if any(v.gains or v.activation or v.arithmetic != values[0].arithmetic for v in values):
        return UNHANDLED
    others = [case for case in cases if not isinstance(case, LowRank)]
    if any(isinstance(v, Upcast) or compat.is_batched(v) for v in (*others, thin(which))):
        return UNHANDLED  # the array would be each member's own
    noises = []
    for i, case in enumerate(cases):
        if isinstance(case, LowRank):
            chosen = thin(which, case.ndim) == jnp.asarray(i, thin(which).dtype)
            noise = masked(noise_of(case), chosen, case)
            if noise is None and ctx.recorder is None:
                return UNHANDLED
            noises.append(noise or noise_of(case))
    plain = [jnp.asarray(case.w if isinstance(case, LowRank) else case) for case in cases]
    w = lax.select_n(spread(which, type_of(eqn.outvars[0]).shape), *plain)
    return value_of(w, noises, values) or UNHANDLED


def masked_value(
    ctx: Context, eqn: core.JaxprEqn, which: Value, cases: Sequence[Value]
) -> LowRank | None:
    """A value where a mask holds and an array elsewhere, both shared by all members.

    The mask may vary along the axes of all factors: it is then one factor more.
    """
    lazy = [isinstance(v, LowRank) for v in cases]
    if isinstance(which, LowRank) or len(cases) != 2 or sum(lazy) != 1:
        return None
    at = lazy.index(True)
    value, origins = cases[at], ctx.origins_of(eqn)
    if not value.arithmetic.linear or any(origins[i] & Origin.OWN for i in (0, 2 - at)):
        return None
    value = value.absorb_gains()
    if value is None:
        return None
    others = [value.w if i == at else materialize(v) for i, v in enumerate(cases)]
    w = bind(eqn, materialize(which), *others)
    mask = thin(which, value.ndim).astype(bool)
    data = value.activation or repeated_along(value, mask)
    return value.masked(w, mask if at == 1 else ~mask).replace(activation=data)


def thin(which: Value, ndim: int = 0) -> Array:
    """A predicate of the size it varies in, with ``ndim`` axes of size 1 in place of none."""
    array = jnp.asarray(which.value if isinstance(which, LateBroadcast) else which)
    return array.reshape(array.shape or (1,) * ndim)


def spread(which: Value, shape: tuple[int, ...]) -> Array:
    """A predicate as ``lax.select_n`` takes it: a scalar, or of the shape of the cases."""
    array = jnp.asarray(materialize(which))
    return array if array.ndim == 0 else jnp.broadcast_to(array, shape)


def masked(noise: Noise, chosen: Array, value: LowRank) -> Noise | None:
    """The noise where ``chosen`` holds, and 0 elsewhere.

    Args:
      noise: factors of a value.
      chosen: bool with the axes of the value, of size 1 where it does not vary.
      value: the value.

    Returns:
      None where no factor varies along all axes of ``chosen`` that carry noise.
    """
    k = factor_over(value, [a for a, n in enumerate(chosen.shape) if n > 1])
    if k is None:
        return None
    factor = noise[k] * chosen[None].astype(noise[k].dtype)
    return (*noise[:k], factor, *noise[k + 1 :])


def factor_over(value: LowRank, axes: Sequence[int]) -> int | None:
    """The smallest factor that varies along all of the axes that carry noise, if there is one."""
    carrying = [a for a in axes if value.along(a)]
    fitting = [k for k in range(len(value.factors)) if all(value.varies(k, a) for a in carrying)]
    sizes = {k: value.factors[k].size for k in fitting}
    return min(fitting, key=lambda k: sizes[k]) if fitting else None
