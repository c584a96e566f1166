"""Rules that make one value of several: concatenation, stacks, padding.

The parts keep their ranks: the factors of the whole are the parts' factors side by side, along the
joined axis where each part has noise of its own there, and along the rank otherwise.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import core
from jax.typing import DTypeLike

from eggroll.interpret.context import Context
from eggroll.interpret.equations import bind
from eggroll.interpret.registry import UNHANDLED, Rounding, rule
from eggroll.interpret.structure import dims, on_each
from eggroll.values.lowrank import LowRank, Upcast, Value


@rule(
    "concatenate",
    keeps="all of one arithmetic, without gains",
    integers=True,
    rounding=Rounding.EXACT,
)
def concatenate(ctx: Context, eqn: core.JaxprEqn, *values: Value) -> Any:
    return join(values, int(eqn.params["dimension"]))


@rule("stack", keeps="all of one arithmetic, without gains", integers=True, rounding=Rounding.EXACT)
def stack(ctx: Context, eqn: core.JaxprEqn, *values: Value) -> Any:
    axis = eqn.params["axis"]
    op = lambda x: jnp.expand_dims(x, axis)
    return join([on_each(v, op, op) if isinstance(v, LowRank) else op(v) for v in values], axis)


def join(values: Sequence[Value], axis: int) -> Any:
    if any(isinstance(v, Upcast) or (isinstance(v, LowRank) and v.gains) for v in values):
        return UNHANDLED

    def besides_axis(v: LowRank) -> Any:
        return [dims(f)[:axis] + dims(f)[axis + 1 :] for f in v.factors]

    parts = matched([v for v in values if isinstance(v, LowRank)], besides_axis)
    if parts is None or len({v.arithmetic for v in parts}) > 1:
        return UNHANDLED
    w = jnp.concatenate([v.w if isinstance(v, LowRank) else v for v in values], axis)
    own_noise = all(dims(f)[axis] == v.shape[axis] for v in parts for f in v.factors)
    if own_noise and len(parts) == len(values) and len({v.rank for v in parts}) == 1:
        # A stack of matrices: every part has noise of its own along this axis.
        return combined(parts, w, axis + 1)

    # Otherwise each part keeps ranks of its own that are zero outside it.
    along = [k for k in range(len(parts[0].factors)) if any(v.varies(k, axis) for v in parts)]
    offset, rest, padded = 0, iter(parts), []
    for v in values:
        after = w.shape[axis] - offset - v.shape[axis]
        if isinstance(v, LowRank):
            padded.append(pad_noise(next(rest), along or [0], axis, (offset, after, 0)))
        offset += v.shape[axis]
    return combined(padded, w, 0)


def matched(values: Sequence[LowRank], form: Callable[[LowRank], Any]) -> list[LowRank] | None:
    """The values with their factors in an order that makes their forms equal, if there is one."""
    out = []
    for value in values:
        for order in itertools.permutations(range(len(value.factors))):
            factors = tuple(value.factors[k] for k in order)
            tags = tuple(value.tags[k] for k in order) if value.tags else ()
            turned = value.replace(factors=factors, tags=tags)
            if form(turned) == form(values[0]):
                out.append(turned)
                break
        else:
            return None
    return out


def aligned(values: Sequence[LowRank]) -> list[LowRank] | None:
    """The values with factors that vary along the same axes, factor by factor.

    Factors are put in the order, and broadcast to the sizes, that make the sum of sizes least.

    Returns:
      None where a factor would become as large as the whole.
    """
    count = max(len(v.factors) for v in values)
    parts = [padded(v, count) for v in values]
    target = [dims(f) for f in parts[0].factors]
    ordered = [parts[0]]
    for v in parts[1:]:
        orders = list(itertools.permutations(range(count)))
        together = [
            [np.broadcast_shapes(t, dims(v.factors[k])) for t, k in zip(target, order, strict=True)]
            for order in orders
        ]
        sizes = [sum(map(math.prod, shapes)) for shapes in together]
        best = sizes.index(min(sizes))
        order, target = orders[best], together[best]
        tags = tuple(v.tags[k] for k in order) if v.tags else ()
        ordered.append(v.replace(factors=tuple(v.factors[k] for k in order), tags=tags))
    for k, shape in enumerate(target):
        before = max(v.factors[k][0].size for v in ordered)
        if before < math.prod(shape) >= values[0].w.size:
            return None
    return [
        v.replace(
            factors=tuple(
                jnp.broadcast_to(f, (f.shape[0], *shape))
                for f, shape in zip(v.factors, target, strict=True)
            )
        )
        for v in ordered
    ]


def padded(value: LowRank, count: int) -> LowRank:
    """The value with factors of ones until there are ``count``."""
    missing = count - len(value.factors)
    one = jnp.ones((1,) * (value.ndim + 1), value.factors[0].dtype)
    tags = (*value.tags, *(frozenset(),) * missing) if value.tags else ()
    return value.replace(factors=(*value.factors, *(one,) * missing), tags=tags)


def combined(parts: Sequence[LowRank], w: Array, axis: int) -> LowRank:
    """The value ``w`` with the factors of several put together along ``axis`` (0 is the rank's)."""
    dtype = jnp.result_type(*(f.dtype for v in parts for f in v.factors))
    whole = [full_rank(v, dtype) for v in parts]
    folded, scales = zip(*(v.arithmetic.fold_scale(v) for v in whole), strict=True)
    return LowRank(
        w,
        tuple(jnp.concatenate(factors, axis) for factors in zip(*folded, strict=True)),
        scales[0],
        tuple(dict.fromkeys(path for v in parts for path in v.paths)),
        all(v.activation for v in parts),
        tags=tuple(frozenset().union(*tags) for tags in zip(*(v.tags for v in parts), strict=True)),
        arithmetic=parts[0].arithmetic,
    )


def full_rank(value: LowRank, dtype: DTypeLike) -> LowRank:
    """The value with factors of one type that all have a slice for each rank."""
    rank = value.rank
    factors = [f.astype(dtype) for f in value.factors]
    full = [f if f.shape[0] == rank else jnp.broadcast_to(f, (rank, *dims(f))) for f in factors]
    return value.replace(factors=tuple(full))


def pad_noise(value: LowRank, along: list[int], axis: int, config: Sequence[Any]) -> LowRank:
    """Pads the factors ``along`` with zeros on an axis; they vary along it from then on."""
    factors = list(value.factors)
    for k in along:
        size, widths = list(factors[k].shape), [(0, 0, 0)] * factors[k].ndim
        size[axis + 1], widths[axis + 1] = value.shape[axis], tuple(config)
        zero = jnp.zeros((), factors[k].dtype)
        factors[k] = lax.pad(jnp.broadcast_to(factors[k], size), zero, widths)
    return value.replace(factors=tuple(factors))


@rule("pad", keeps="all without gains", integers=True, rounding=Rounding.EXACT)
def pad(ctx: Context, eqn: core.JaxprEqn, value: LowRank, padding: Any) -> Any:
    if value.gains:
        return UNHANDLED
    w = bind(eqn, value.w, padding)
    for axis, config in enumerate(eqn.params["padding_config"]):
        if tuple(config) != (0, 0, 0):
            along = [k for k in range(len(value.factors)) if value.varies(k, axis)]
            value = pad_noise(value, along or [0], axis, config)
    return value.replace(w=w)
