"""What each of JAX's primitives does to a :class:`~eggroll.values.lowrank.LowRank` value.

A rule takes ``(context, equation, *values)`` and returns the equation's output, or ``UNHANDLED``
where the perturbed array has to be built after all. Rules never look at the shape alone: they ask
along which axes each factor varies, so that one rule serves matrices, kernels with several row or
column axes, stacks and batches alike. Rules that join values are in :mod:`eggroll.interpret.joins`, products
are in :mod:`eggroll.interpret.products`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import core

from eggroll import _compat as compat
from eggroll.values.fixed_point import is_integer
from eggroll.values.lowrank import (
    LowRank,
    Spread,
    Value,
    Wide,
)

UNHANDLED = object()
Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}

# Of perturbed integers these are not what they are of the numbers: a scaled weight is not a shifted
# product any more, and sums of int8 wrap around.
NOT_OF_INTEGERS = frozenset(
    {"mul", "div", "add", "sub", "add_any", "reduce_sum", "reduce_precision"}
)

# The rules of these take broadcasts that have not been carried out.
TAKE_SPREAD = frozenset({"mul", "div", "add", "sub", "add_any"})


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    def register(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, fn))
        return fn

    return register


def bind(eqn: Any, *values: Any, **params: Any) -> Any:
    """Applies the equation's primitive to other operands, or with other parameters."""
    return compat.bind(eqn, values, params)


def results(eqn: Any, values: Sequence[Value], **params: Any) -> list[Value]:
    """The same as a list, be it of one output."""
    out = bind(eqn, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def on_each(value: LowRank, on_w: Callable, on_factor: Callable, **changes: Any) -> LowRank:
    """Applies an operation to the array and to the factors, of each rank, and gains."""
    factors = tuple(jax.vmap(on_factor)(factor) for factor in value.factors)
    gains = tuple(on_factor(gain) for gain in value.gains)
    return value.replace(w=on_w(value.w), factors=factors, gains=gains, **changes)


def dims(factor: Array) -> tuple[int, ...]:
    return factor.shape[1:]


# ---------------------------------------------------------------- same operation on every part


@rule("copy", "copy_p", "name", "stop_gradient", "transpose", "reduce_precision")
def same_on_all(ctx: Any, eqn: Any, value: LowRank) -> Any:
    return on_each(value, lambda x: bind(eqn, x), lambda x: bind(eqn, x))


@rule("convert_element_type")
def convert_element_type(ctx: Any, eqn: Any, value: LowRank) -> Any:
    dtype = eqn.params["new_dtype"]
    if value.integer:
        # The factors stay as narrow as they are. To a narrower type numbers might wrap around.
        wider = is_integer(dtype) and jnp.iinfo(dtype).min <= jnp.iinfo(value.dtype).min
        return value.replace(w=bind(eqn, value.w)) if wider else UNHANDLED
    if not jnp.issubdtype(dtype, jnp.floating):
        return UNHANDLED
    # A gain keeps its type: like all that multiplies, it is rounded with the result.
    return on_each(value, lambda x: bind(eqn, x), lambda x: x.astype(dtype)).replace(
        gains=value.gains
    )


@rule("neg")
def neg(ctx: Any, eqn: Any, value: LowRank) -> Any:
    if value.integer:
        return value.replace(w=-value.w, factors=(-value.factors[0], *value.factors[1:]))
    return value.replace(w=-value.w, scale=-value.scale)


@rule("optimization_barrier")
def optimization_barrier(ctx: Any, eqn: Any, *values: Value) -> Any:
    return list(lax.optimization_barrier(tuple(values)))


@rule("pvary", "pcast")
def pcast(ctx: Any, eqn: Any, value: LowRank) -> Any:
    # The factors are a member's own and mostly vary over the mesh already.
    def cast(x: Array) -> Array:
        axes = eqn.params.get("axes", eqn.params.get("axis_name", ()))
        axes = (axes,) if isinstance(axes, str) else tuple(axes)
        missing = tuple(a for a in axes if a not in compat.varying_axes(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, value)


@rule("sharding_constraint", "reshard")
def sharding_constraint(ctx: Any, eqn: Any, value: LowRank) -> Any:
    # The factors are thin: their layout is left to the compiler.
    return value.replace(w=bind(eqn, value.w))


# ---------------------------------------------------------------- shapes


@rule("broadcast_in_dim")
def broadcast_in_dim(ctx: Any, eqn: Any, value: LowRank, *dynamic: Any) -> Any:
    shape, where = eqn.params["shape"], eqn.params["broadcast_dimensions"]

    def on_factor(f: Array) -> Array:
        target = [1] * len(shape)
        for axis, out in enumerate(where):
            target[out] = f.shape[axis]
        return lax.broadcast_in_dim(f, target, where)

    return on_each(value, lambda x: bind(eqn, x, *dynamic), on_factor)


@rule("squeeze")
def squeeze(ctx: Any, eqn: Any, value: LowRank) -> Any:
    op = lambda x: lax.squeeze(x, eqn.params["dimensions"])
    return on_each(value, op, op)


@rule("reshape")
def reshape(ctx: Any, eqn: Any, value: LowRank, *dynamic: Any) -> Any:
    if eqn.params.get("dimensions") is not None:
        return UNHANDLED
    new = eqn.params["new_sizes"]
    groups = common_groups(value.shape, new)
    if ctx.recorder is not None:
        value = merge_factors(value, [old for old, _ in groups])
    count = len(value.factors)
    alike = {a for a in range(value.ndim) if not any(value.varies(k, a) for k in range(count))}

    def run_together(sizes: tuple[int, ...]) -> bool:
        """Rows and columns, or layers and rows, come to stand in one axis."""
        part = lambda a: sizes[a] < value.shape[a] and a not in alike
        return any(any(sizes[a] > 1 for a in old) and any(map(part, old)) for old, _ in groups)

    def on_factor(f: Array) -> Array:
        full, target = list(f.shape), [1] * len(new)
        for old, fresh in groups:
            if any(f.shape[a] > 1 for a in old):
                for a in old:
                    full[a] = value.shape[a]
                for a in fresh:
                    target[a] = new[a]
        return jnp.broadcast_to(f, full).reshape(target)

    if any(map(run_together, [*map(dims, value.factors), *(g.shape for g in value.gains)])):
        return UNHANDLED
    return on_each(value, lambda x: bind(eqn, x, *dynamic), on_factor)


def common_groups(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The finest groups of consecutive axes of equal size in two shapes of equal size.

    Example:
      >>> common_groups((6, 4), (2, 3, 4))
      [((0,), (0, 1)), ((1,), (2,))]
    """
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        first_i, first_j = i, j
        size_old = old[i] if i < len(old) else 1
        size_new = new[j] if j < len(new) else 1
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while size_old != size_new:
            if size_old < size_new:
                size_old, i = size_old * old[i], i + 1
            else:
                size_new, j = size_new * new[j], j + 1
        groups.append((tuple(range(first_i, i)), tuple(range(first_j, j))))
    return groups


def merge_factors(value: LowRank, groups: Sequence[Sequence[int]]) -> LowRank:
    """Multiplies together the factors that share a group of axes (plan inference only).

    Inference gives every axis a factor of its own; axes that are run together become one.
    """
    factors, tags = list(value.factors), list(value.tags)
    for group in groups:
        members = [k for k, f in enumerate(factors) if any(dims(f)[a] > 1 for a in group)]
        if len(members) > 1:
            merged = math.prod(factors[k] for k in members[1:]) * factors[members[0]]
            union = frozenset().union(*(tags[k] for k in members))
            keep = [k for k in range(len(factors)) if k not in members]
            factors = [factors[k] for k in keep] + [merged]
            tags = [tags[k] for k in keep] + [union]
    return value.replace(factors=tuple(factors), tags=tuple(tags))


@rule("tile")
def tile(ctx: Any, eqn: Any, value: LowRank) -> Any:
    reps = eqn.params["reps"]

    def on_factor(f: Array) -> Array:
        return jnp.tile(f, [1 if n == 1 else r for n, r in zip(f.shape, reps, strict=True)])

    return on_each(value, lambda x: bind(eqn, x), on_factor)


# ---------------------------------------------------------------- slices and look-ups


@rule("rev")
def rev(ctx: Any, eqn: Any, value: LowRank) -> Any:
    op = lambda x: lax.rev(x, eqn.params["dimensions"])
    return on_each(value, op, op)


@rule("slice")
def slice_(ctx: Any, eqn: Any, value: LowRank) -> Any:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * value.ndim
    for axis, size in enumerate(eqn.outvars[0].aval.shape):
        if size == 1:
            ctx.record("indexed", value, axis)

    def on_factor(f: Array) -> Array:
        ranges = zip(f.shape, starts, limits, strides, strict=True)
        picked = [(0, 1, 1) if n == 1 else given for n, *given in ranges]
        return lax.slice(f, *zip(*picked, strict=True))

    return on_each(value, lambda x: bind(eqn, x), on_factor)


@rule("split")
def split(ctx: Any, eqn: Any, value: LowRank) -> Any:
    axis = eqn.params["axis"]
    ends = [0, *itertools.accumulate(map(int, eqn.params["sizes"]))]

    def part(start: int, end: int) -> LowRank:
        op = lambda x: lax.slice_in_dim(x, start, end, axis=axis)
        return on_each(value, op, lambda f: f if f.shape[axis] == 1 else op(f))

    return [part(start, end) for start, end in itertools.pairwise(ends)]


@rule("unstack")
def unstack(ctx: Any, eqn: Any, value: LowRank) -> Any:
    axis = eqn.params["axis"]
    ctx.record("indexed", value, axis)

    def part(i: int) -> LowRank:
        op = lambda x: lax.index_in_dim(x, i, axis, keepdims=False)
        return on_each(value, op, lambda f: lax.squeeze(f, [axis]) if f.shape[axis] == 1 else op(f))

    return [part(i) for i in range(value.shape[axis])]


@rule("dynamic_slice")
def dynamic_slice(ctx: Any, eqn: Any, value: LowRank, *starts: Any) -> Any:
    sizes = eqn.params["slice_sizes"]
    for axis, size in enumerate(sizes):
        if size < value.shape[axis]:
            ctx.record("indexed", value, axis)

    def on_factor(f: Array) -> Array:
        # A start beyond an axis of size 1 is clamped to it.
        f_sizes = [min(n, m) for n, m in zip(sizes, f.shape, strict=True)]
        return lax.dynamic_slice(f, starts, f_sizes)

    return on_each(value, lambda x: bind(eqn, x, *starts), on_factor)


@rule("gather")
def gather(ctx: Any, eqn: Any, value: LowRank, indices: Any) -> Any:
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
            shape = [1] * len(eqn.outvars[0].aval.shape)
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


# ---------------------------------------------------------------- arithmetic


@rule("mul", "div")
def scale_by(ctx: Any, eqn: Any, left: Value, right: Value) -> Any:
    """Multiplication by a scalar, or by a vector along the axes of one factor."""
    multiply = eqn.primitive.name == "mul"
    value, other = (left, right) if isinstance(left, LowRank) else (right, left)
    if isinstance(other, LowRank) or (value is right and not multiply):
        return UNHANDLED
    small = other.value if isinstance(other, Spread) else other
    small = jnp.asarray(small.value if isinstance(small, Wide) else small)
    axes = [a for a, n in enumerate(small.shape) if n > 1]
    if axes and not any(all(value.varies(k, a) for a in axes) for k in range(len(value.factors))):
        return UNHANDLED
    if isinstance(eqn.invars[1 if value is left else 0], core.Literal):
        op = jnp.multiply if multiply else jnp.divide
        scale = op(value.scale, small.astype(value.scale.dtype))
        return value.replace(w=op(value.w, small), scale=scale)
    gain = small.reshape(small.shape or (1,) * value.ndim)
    return value.replace(gains=(*value.gains, gain if multiply else 1 / gain))


@rule("reduce_sum")
def reduce_sum(ctx: Any, eqn: Any, value: LowRank) -> Any:
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
