"""The rules that make one value of several: concatenation, stacks, padding, sums.

The parts keep the ranks that they have: the factors of the whole are theirs side by side, along the axis
that is joined where each part has noise of its own there, and along the rank otherwise.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from eggroll.interpret.rules import UNHANDLED, bind, dims, on_each, rule
from eggroll.values.lowrank import LowRank, Value, Wide, is_special


@rule("concatenate")
def concatenate(ctx: Any, eqn: Any, *values: Value) -> Any:
    return join(values, int(eqn.params["dimension"]))


@rule("stack")
def stack(ctx: Any, eqn: Any, *values: Value) -> Any:
    axis = eqn.params["axis"]
    op = lambda x: jnp.expand_dims(x, axis)
    return join([on_each(v, op, op) if isinstance(v, LowRank) else op(v) for v in values], axis)


def join(values: Sequence[Value], axis: int) -> Any:
    if any(isinstance(v, Wide) or (isinstance(v, LowRank) and v.gains) for v in values):
        return UNHANDLED

    def besides_axis(v: LowRank) -> Any:
        return [dims(f)[:axis] + dims(f)[axis + 1 :] for f in v.factors]

    parts = matched([v for v in values if isinstance(v, LowRank)], besides_axis)
    if parts is None or len({v.shift for v in parts}) > 1:
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


def combined(parts: Sequence[LowRank], w: Array, axis: int) -> LowRank:
    """The value ``w`` with the factors of several put together along ``axis`` (0 is the rank's)."""
    integer = parts[0].integer  # then all have one scale, the member's sign
    folded = []
    for v in parts:  # their scales may differ: each goes into the first factor
        first, *others = v.factors
        folded.append((first if integer else first * v.scale.astype(first.dtype), *others))
    return LowRank(
        w,
        tuple(jnp.concatenate(factors, axis) for factors in zip(*folded, strict=True)),
        parts[0].scale if integer else jnp.ones_like(parts[0].scale),
        tuple(dict.fromkeys(path for v in parts for path in v.paths)),
        all(v.activation for v in parts),
        tags=tuple(frozenset().union(*tags) for tags in zip(*(v.tags for v in parts), strict=True)),
        shift=parts[0].shift,
    )


def pad_noise(value: LowRank, along: list[int], axis: int, config: Sequence[Any]) -> LowRank:
    """Pads the factors ``along`` with zeros on an axis; they vary along it from then on."""
    factors = list(value.factors)
    for k in along:
        size, widths = list(factors[k].shape), [(0, 0, 0)] * factors[k].ndim
        size[axis + 1], widths[axis + 1] = value.shape[axis], tuple(config)
        zero = jnp.zeros((), factors[k].dtype)
        factors[k] = lax.pad(jnp.broadcast_to(factors[k], size), zero, widths)
    return value.replace(factors=tuple(factors))


@rule("pad")
def pad(ctx: Any, eqn: Any, value: LowRank, padding: Any) -> Any:
    if value.gains:
        return UNHANDLED
    w = bind(eqn, value.w, padding)
    for axis, config in enumerate(eqn.params["padding_config"]):
        if tuple(config) != (0, 0, 0):
            along = [k for k in range(len(value.factors)) if value.varies(k, axis)]
            value = pad_noise(value, along or [0], axis, config)
    return value.replace(w=w)


@rule("add", "sub", "add_any")
def add(ctx: Any, eqn: Any, left: Value, right: Value) -> Any:
    """The sum of two perturbed matrices has the ranks of both; an array is added to the array."""
    values = [v for v in (left, right) if isinstance(v, LowRank)]
    others = [v for v in (left, right) if not isinstance(v, LowRank)]
    if any(map(is_special, others)) or any(v.activation or v.gains for v in values):
        return UNHANDLED
    if eqn.invars[0].aval.shape != eqn.invars[1].aval.shape:
        return UNHANDLED
    w = bind(eqn, *(v.w if isinstance(v, LowRank) else v for v in (left, right)))
    if eqn.primitive.name == "sub" and isinstance(right, LowRank):
        values[-1] = right.replace(scale=-right.scale)
    if len(values) == 1:
        return values[0].replace(w=w)
    parts = matched(values, lambda v: [dims(f) for f in v.factors])
    return UNHANDLED if parts is None else combined(parts, w, 0)
