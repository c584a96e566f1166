"""Rules of slices and look-ups: what comes out has the parts' own slices as its parts."""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import core

from eggroll.interpret.context import Context
from eggroll.interpret.equations import bind, type_of
from eggroll.interpret.registry import UNHANDLED, Rounding, rule
from eggroll.interpret.structure import Result, on_each
from eggroll.values.lowrank import LowRank


@rule("slice", keeps="all", integers=True, rounding=Rounding.MOVES)
def slice_(ctx: Context, eqn: core.JaxprEqn, value: LowRank) -> Result:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * value.ndim
    for axis, size in enumerate(type_of(eqn.outvars[0]).shape):
        if size == 1:
            ctx.record("indexed", value, axis)

    def on_factor(f: Array) -> Array:
        ranges = zip(f.shape, starts, limits, strides, strict=True)
        picked = [(0, 1, 1) if n == 1 else given for n, *given in ranges]
        return lax.slice(f, *zip(*picked, strict=True))

    return on_each(value, lambda x: bind(eqn, x), on_factor)


@rule("split", keeps="all", integers=True, rounding=Rounding.MOVES)
def split(ctx: Context, eqn: core.JaxprEqn, value: LowRank) -> Result:
    axis = eqn.params["axis"]
    ends = [0, *itertools.accumulate(map(int, eqn.params["sizes"]))]

    def part(start: int, end: int) -> LowRank:
        op = lambda x: lax.slice_in_dim(x, start, end, axis=axis)
        return on_each(value, op, lambda f: f if f.shape[axis] == 1 else op(f))

    return [part(start, end) for start, end in itertools.pairwise(ends)]


@rule("unstack", keeps="all", integers=True, rounding=Rounding.MOVES)
def unstack(ctx: Context, eqn: core.JaxprEqn, value: LowRank) -> Result:
    axis = eqn.params["axis"]
    ctx.record("indexed", value, axis)

    def part(i: int) -> LowRank:
        op = lambda x: lax.index_in_dim(x, i, axis, keepdims=False)
        return on_each(value, op, lambda f: lax.squeeze(f, [axis]) if f.shape[axis] == 1 else op(f))

    return [part(i) for i in range(value.shape[axis])]


@rule("dynamic_slice", keeps="all", integers=True, rounding=Rounding.MOVES)
def dynamic_slice(ctx: Context, eqn: core.JaxprEqn, value: LowRank, *starts: Any) -> Result:
    sizes = eqn.params["slice_sizes"]
    for axis, size in enumerate(sizes):
        if size < value.shape[axis]:
            ctx.record("indexed", value, axis)

    def on_factor(f: Array) -> Array:
        # A start beyond an axis of size 1 is clamped to it.
        f_sizes = [min(n, m) for n, m in zip(sizes, f.shape, strict=True)]
        return lax.dynamic_slice(f, starts, f_sizes)

    return on_each(value, lambda x: bind(eqn, x, *starts), on_factor)


@rule(
    "gather",
    keeps="rows, columns, entries, windows; not filling along axes without noise",
    integers=True,
    rounding=Rounding.MOVES,
)
def gather(ctx: Context, eqn: core.JaxprEqn, value: LowRank, indices: Any) -> Result:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    indexed = tuple(int(a) for a in numbers.start_index_map)
    together = tuple(int(a) for a in numbers.operand_batching_dims)
    mode = eqn.params["mode"]
    unseen = [a for a in indexed if not any(value.varies(k, a) for k in range(len(value.factors)))]
    if mode == lax.GatherScatterMode.FILL_OR_DROP and any(value.shape[a] > 1 for a in unseen):
        return UNHANDLED  # no factor would know that the index is out of bounds
    if mode == lax.GatherScatterMode.FILL_OR_DROP and value.gains:
        return UNHANDLED  # what stands there out of bounds is not to be multiplied
    dropped = (*numbers.collapsed_slice_dims, *together)
    offset_axes = [a for a in range(value.ndim) if a not in dropped]
    for axis in (*indexed, *together):
        if sizes[axis] < value.shape[axis]:
            ctx.record("indexed", value, axis)

    def on_factor(f: Array) -> Array:
        # An axis that the factor does not vary along needs no index: all its entries are the same.
        kept = [j for j, axis in enumerate(indexed) if f.shape[axis] == value.shape[axis]]
        f_sizes = [min(size, n) for size, n in zip(sizes, f.shape, strict=True)]
        if not kept and not together:
            shape = [1] * len(type_of(eqn.outvars[0]).shape)
            for axis, out in zip(offset_axes, numbers.offset_dims, strict=True):
                shape[out] = f_sizes[axis]
            return lax.slice(f, [0] * f.ndim, f_sizes).reshape(shape)
        full = [value.shape[a] if a in together else n for a, n in enumerate(f.shape)]
        return lax.gather(
            jnp.broadcast_to(f, full),
            indices[..., np.array(kept, int)],
            numbers._replace(start_index_map=tuple(indexed[j] for j in kept)),
            f_sizes,
            mode=mode,
            fill_value=0,  # out of bounds: what the array itself gives, unperturbed
        )

    # Rows of an embedding are data from here on; W[i] on a stack is still a matrix.
    varying = [k for k in range(len(value.factors)) if any(value.varies(k, a) for a in offset_axes)]
    looked_up = value.activation or len(varying) <= 1
    return on_each(value, lambda x: bind(eqn, x, indices), on_factor, activation=looked_up)
