"""What each of JAX's primitives does to a :class:`~eggroll.lowrank.LowRank` value.

A rule takes ``(context, equation, *values)`` and returns the equation's output, or ``UNHANDLED``
where the perturbed array has to be built after all. Rules never look at the shape alone: they ask
along which axes each factor varies, so that one rule serves matrices, kernels with several row or
column axes, stacks and batches alike.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from eggroll import compat
from eggroll.lowrank import (
    LowRank,
    Spread,
    Value,
    accumulator,
    align,
    contract,
    is_special,
    perturbation,
)

UNHANDLED = object()
Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}

# Kernels with more positions than this are convolved thinly (rank output channels); below it, the
# perturbation is a sum of shifted products, since a convolution with a kernel of each member's own
# becomes a grouped one, which is slow on CPU.
MAX_SHIFTS = 64


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    def register(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, fn))
        return fn

    return register


def bind(eqn: Any, *values: Any, **params: Any) -> Any:
    """Applies the equation's primitive to other operands, or with other parameters."""
    return compat.bind(eqn, values, params)


def materialize(value: Value) -> Array:
    """Carries out a broadcast that was put off."""
    return jnp.broadcast_to(value.value, value.shape) if isinstance(value, Spread) else value


def on_each(value: LowRank, on_w: Callable, on_factor: Callable, **changes: Any) -> LowRank:
    """Applies an operation to the array and, along their rank, to the factors."""
    factors = tuple(jax.vmap(on_factor)(factor) for factor in value.factors)
    return value.replace(w=on_w(value.w), factors=factors, **changes)


def dims(factor: Array) -> tuple[int, ...]:
    return factor.shape[1:]


# ---------------------------------------------------------------- same operation on every part


@rule("copy", "copy_p", "stop_gradient", "transpose", "reduce_precision", "real")
def same_on_all(ctx: Any, eqn: Any, value: LowRank) -> Any:
    return on_each(value, lambda x: bind(eqn, x), lambda x: bind(eqn, x))


@rule("convert_element_type")
def convert_element_type(ctx: Any, eqn: Any, value: LowRank) -> Any:
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return UNHANDLED
    return on_each(value, lambda x: bind(eqn, x), lambda x: x.astype(dtype))


@rule("neg")
def neg(ctx: Any, eqn: Any, value: LowRank) -> Any:
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
def broadcast_in_dim(ctx: Any, eqn: Any, value: LowRank, *dynamic: Array) -> Any:
    shape, where = eqn.params["shape"], eqn.params["broadcast_dimensions"]

    def on_factor(f: Array) -> Array:
        target = [1] * len(shape)
        for axis, out in enumerate(where):
            target[out] = f.shape[axis]
        return lax.broadcast_in_dim(f, target, where)

    return on_each(value, lambda x: bind(eqn, x, *dynamic), on_factor)


@rule("squeeze")
def squeeze(ctx: Any, eqn: Any, value: LowRank) -> Any:
    op = lambda x: lax.squeeze(x, eqn.params["dimensions"])  # noqa: E731
    return on_each(value, op, op)


@rule("reshape")
def reshape(ctx: Any, eqn: Any, value: LowRank, *dynamic: Array) -> Any:
    if eqn.params.get("dimensions") is not None or value.w.size == 0:
        return UNHANDLED
    new = eqn.params["new_sizes"]
    groups = common_groups(value.shape, new)
    if ctx.recorder is not None:
        value = merge_factors(value, [old for old, _ in groups])

    targets = []
    for factor in value.factors:
        target = [1] * len(new)
        for old, fresh in groups:
            varying = [a for a in old if value.shape[a] > 1]
            full = [dims(factor)[a] > 1 for a in varying]
            if any(full) and not all(full):
                return UNHANDLED  # rows and columns, or layers and rows, run together
            if any(full):
                for a in fresh:
                    target[a] = new[a]
        targets.append(target)
    factors = tuple(f.reshape(f.shape[0], *t) for f, t in zip(value.factors, targets, strict=True))
    return value.replace(w=bind(eqn, value.w, *dynamic), factors=factors)


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


# ---------------------------------------------------------------- slices and look-ups


@rule("rev")
def rev(ctx: Any, eqn: Any, value: LowRank) -> Any:
    op = lambda x: lax.rev(x, eqn.params["dimensions"])  # noqa: E731
    return on_each(value, op, op)


@rule("slice")
def slice_(ctx: Any, eqn: Any, value: LowRank) -> Any:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * value.ndim
    if any(limit <= start for start, limit in zip(starts, limits, strict=True)):
        return UNHANDLED

    def on_factor(f: Array) -> Array:
        one = [n == 1 for n in f.shape]
        pick = lambda given, alone: [alone if o else g for o, g in zip(one, given, strict=True)]  # noqa: E731
        return lax.slice(f, pick(starts, 0), pick(limits, 1), pick(strides, 1))

    return on_each(value, lambda x: bind(eqn, x), on_factor)


@rule("split")
def split(ctx: Any, eqn: Any, value: LowRank) -> Any:
    axis, sizes = eqn.params["axis"], [int(n) for n in eqn.params["sizes"]]
    ends = list(itertools.accumulate(sizes))

    def part(start: int, end: int) -> LowRank:
        def op(x: Array) -> Array:
            return x if x.shape[axis] == 1 else lax.slice_in_dim(x, start, end, axis=axis)

        return on_each(value, op, op)

    return [part(end - size, end) for size, end in zip(sizes, ends, strict=True)]


@rule("dynamic_slice")
def dynamic_slice(ctx: Any, eqn: Any, value: Value, *starts: Array) -> Any:
    if not isinstance(value, LowRank):
        return UNHANDLED
    sizes = eqn.params["slice_sizes"]
    for axis, size in enumerate(sizes):
        if size < value.shape[axis]:
            ctx.record("indexed", value, axis)

    def on_factor(f: Array) -> Array:
        at = [jnp.zeros_like(s) if n == 1 else s for s, n in zip(starts, f.shape, strict=True)]
        return lax.dynamic_slice(f, at, [min(n, m) for n, m in zip(sizes, f.shape, strict=True)])

    return on_each(value, lambda x: bind(eqn, x, *starts), on_factor)


@rule("gather")
def gather(ctx: Any, eqn: Any, value: Value, indices: Value) -> Any:
    if not isinstance(value, LowRank):
        return UNHANDLED
    indices = materialize(indices)
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    indexed, collapsed = numbers.start_index_map, numbers.collapsed_slice_dims
    together = numbers.operand_batching_dims
    offset_axes = [a for a in range(value.ndim) if a not in collapsed and a not in together]
    out_ndim = indices.ndim - 1 + len(offset_axes)
    for axis in (*indexed, *together):
        if sizes[axis] < value.shape[axis]:
            ctx.record("indexed", value, axis)

    def on_factor(f: Array) -> Array:
        f = jnp.broadcast_to(
            f, [value.shape[a] if a in together else n for a, n in enumerate(f.shape)]
        )
        alone = [min(size, n) for size, n in zip(sizes, f.shape, strict=True)]
        kept = [j for j, axis in enumerate(indexed) if f.shape[axis] > 1]
        if not kept and not together:
            f = lax.slice(f, [0] * f.ndim, alone)
            shape = [1] * out_ndim
            for axis, out in zip(offset_axes, numbers.offset_dims, strict=True):
                shape[out] = f.shape[axis]
            return f.reshape(shape)
        return lax.gather(
            f,
            indices[..., jnp.array(kept, int)],
            numbers._replace(start_index_map=tuple(indexed[j] for j in kept)),
            alone,
            mode=eqn.params["mode"],
            fill_value=0,  # out of bounds: what the array itself gives, unperturbed
        )

    # Rows of an embedding are data from here on; W[i] on a stack is still a matrix.
    varying = {
        k for k in range(len(value.factors)) if any(value.varies(k, axis) for axis in offset_axes)
    }
    looked_up = value.activation or len(varying) <= 1
    return on_each(value, lambda x: bind(eqn, x, indices), on_factor, activation=looked_up)


# ---------------------------------------------------------------- joining


@rule("concatenate")
def concatenate(ctx: Any, eqn: Any, *values: Value) -> Any:
    return join(values, eqn.params["dimension"])


@rule("stack")
def stack(ctx: Any, eqn: Any, *values: Value) -> Any:
    axis = eqn.params["axis"]
    op = lambda x: jnp.expand_dims(x, axis)  # noqa: E731
    return join([on_each(v, op, op) if isinstance(v, LowRank) else op(materialize(v)) for v in values], axis)


def join(values: Sequence[Value], axis: int) -> Any:
    if not all(isinstance(v, LowRank) or not is_special(v) or isinstance(v, Spread) for v in values):
        return UNHANDLED
    values = [materialize(v) for v in values]
    w = jnp.concatenate([v.w if isinstance(v, LowRank) else v for v in values], axis)
    parts = [v for v in values if isinstance(v, LowRank)]
    first = parts[0]

    def full(v: LowRank) -> bool:
        return all(dims(f)[axis] == v.shape[axis] for f in v.factors)

    if len(parts) == len(values) and all(map(full, parts)) and same_form(parts, besides=axis):
        # Every part has noise of its own along this axis: a stack of matrices, of the same rank.
        folded = [fold_scale(v).factors for v in parts]
        factors = tuple(jnp.concatenate(fs, axis + 1) for fs in zip(*folded, strict=True))
        return combined(parts, w, factors)

    # Otherwise each part keeps ranks of its own that are zero outside it.
    total, offset, padded = w.shape[axis], 0, []
    for v in values:
        size = (v.w if isinstance(v, LowRank) else v).shape[axis]
        if isinstance(v, LowRank):
            v = fold_scale(v)
            along = [k for k in range(len(v.factors)) if dims(v.factors[k])[axis] == size] or [0]
            factors = list(v.factors)
            for k in along:
                f = factors[k]
                f = jnp.broadcast_to(f, (*f.shape[: axis + 1], size, *f.shape[axis + 2 :]))
                widths = [(0, 0)] * f.ndim
                widths[axis + 1] = (offset, total - offset - size)
                factors[k] = jnp.pad(f, widths)
            padded.append(v.replace(factors=tuple(factors)))
        offset += size
    if not same_form(padded):
        return UNHANDLED
    factors = tuple(jnp.concatenate(fs) for fs in zip(*(v.factors for v in padded), strict=True))
    return combined([first, *parts[1:]], w, factors)


def same_form(values: Sequence[LowRank], besides: int | None = None) -> bool:
    """Whether corresponding factors have equal axes (and, given an axis apart, equal rank)."""

    def form(v: LowRank) -> Any:
        if besides is None:
            return [dims(f) for f in v.factors]
        return [f.shape[: besides + 1] + f.shape[besides + 2 :] for f in v.factors]

    return all(form(v) == form(values[0]) for v in values)


def fold_scale(value: LowRank) -> LowRank:
    """Moves the scale into the first factor, where values of different scale are joined."""
    first, *rest = value.factors
    first = first * value.scale.astype(first.dtype)
    return value.replace(factors=(first, *rest), scale=jnp.ones_like(value.scale))


def combined(parts: Sequence[LowRank], w: Array, factors: tuple[Array, ...]) -> LowRank:
    paths = tuple(dict.fromkeys(path for v in parts for path in v.paths))
    tags = tuple(frozenset().union(*ts) for ts in zip(*(v.tags for v in parts), strict=True))
    activation = all(v.activation for v in parts)
    scale = jnp.ones_like(parts[0].scale)
    return LowRank(w, factors, scale, paths, activation, tags)


@rule("pad")
def pad(ctx: Any, eqn: Any, value: Value, padding: Array) -> Any:
    if not isinstance(value, LowRank):
        return UNHANDLED
    config = eqn.params["padding_config"]
    touched = [axis for axis, entry in enumerate(config) if tuple(entry) != (0, 0, 0)]
    factors = list(value.factors)
    for axis in touched:
        along = [k for k, f in enumerate(factors) if dims(f)[axis] == value.shape[axis]] or [0]
        for k in along:
            f = factors[k]
            f = jnp.broadcast_to(f, (*f.shape[: axis + 1], value.shape[axis], *f.shape[axis + 2 :]))
            widths = [(0, 0, 0)] * f.ndim
            widths[axis + 1] = config[axis]
            factors[k] = lax.pad(f, jnp.zeros((), f.dtype), widths)
    return value.replace(w=bind(eqn, value.w, padding), factors=tuple(factors))


# ---------------------------------------------------------------- arithmetic


@rule("mul", "div")
def scale_by(ctx: Any, eqn: Any, left: Value, right: Value) -> Any:
    """Multiplication by a scalar, or by a vector along the axes of one factor."""
    multiply = eqn.primitive.name == "mul"
    if isinstance(right, LowRank) and (isinstance(left, LowRank) or not multiply):
        return UNHANDLED
    value, other = (left, right) if isinstance(left, LowRank) else (right, left)
    small = other.value if isinstance(other, Spread) else other
    if is_special(small):
        return UNHANDLED
    op = jnp.multiply if multiply else jnp.divide
    small = jnp.asarray(small)
    if small.ndim == 0:
        small = small.reshape((1,) * value.ndim)
    w = op(value.w, small)
    axes = [a for a in range(value.ndim) if small.shape[a] > 1]
    if not axes:
        return value.replace(w=w, scale=op(value.scale, small.reshape(()).astype(value.scale.dtype)))
    for k, factor in enumerate(value.factors):
        if all(value.varies(k, a) for a in axes):
            scaled = op(factor, small.astype(factor.dtype))
            return value.replace(
                w=w, factors=(*value.factors[:k], scaled, *value.factors[k + 1 :])
            )
    return UNHANDLED


@rule("add", "sub", "add_any")
def add(ctx: Any, eqn: Any, left: Value, right: Value) -> Any:
    """The sum of two perturbed matrices has the ranks of both."""
    both = isinstance(left, LowRank) and isinstance(right, LowRank)
    if not both or left.shape != right.shape or left.activation or right.activation:
        return UNHANDLED
    if eqn.primitive.name == "sub":
        right = right.replace(w=-right.w, scale=-right.scale)
    for order in itertools.permutations(range(len(right.factors))):
        turned = right.replace(
            factors=tuple(right.factors[k] for k in order),
            tags=tuple(right.tags[k] for k in order) if right.tags else (),
        )
        parts = [fold_scale(left), fold_scale(turned)]
        if len(left.factors) == len(right.factors) and same_form(parts):
            factors = tuple(
                jnp.concatenate(fs) for fs in zip(*(v.factors for v in parts), strict=True)
            )
            return combined(parts, left.w + right.w, factors)
    return UNHANDLED


@rule("reduce_sum")
def reduce_sum(ctx: Any, eqn: Any, value: LowRank) -> Any:
    axes = eqn.params["axes"]
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


# ---------------------------------------------------------------- products


@rule("dot_general")
def dot_general(ctx: Any, eqn: Any, lhs: Value, rhs: Value) -> Any:
    if isinstance(lhs, LowRank) and isinstance(rhs, LowRank):
        product = product_of_two(ctx, eqn, lhs, rhs)
        if product is not UNHANDLED:
            return product
        # The one that is cheaper to build gives way.
        if lhs.w.size < rhs.w.size:
            lhs = ctx.dense(lhs, eqn)
        else:
            rhs = ctx.dense(rhs, eqn)
    value, other = (lhs, rhs) if isinstance(lhs, LowRank) else (rhs, lhs)
    other = ctx.dense(other, eqn)
    left, right, out = dot_labels(eqn, lhs, rhs)
    labels, other_labels = (left, right) if value is lhs else (right, left)
    record_dot(ctx, value, labels, other_labels, out)

    dtype = eqn.outvars[0].aval.dtype
    acc = accumulator(dtype)
    operands = (value.w, other) if value is lhs else (other, value.w)
    main = bind(eqn, *operands, preferred_element_type=acc)
    noise = perturbation(other, other_labels, value, labels, out, acc, eqn.params["precision"])
    return (main + noise).astype(dtype)


def dot_labels(eqn: Any, lhs: Value, rhs: Value) -> tuple[list[str], list[str], list[str]]:
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    left = [f"l{a}" for a in range(len(lhs.shape))]
    right = [f"r{a}" for a in range(len(rhs.shape))]
    for a, b in (*zip(lc, rc, strict=True), *zip(lb, rb, strict=True)):
        right[b] = left[a]
    batch = [left[a] for a in lb]
    free_left = [left[a] for a in range(len(left)) if a not in (*lc, *lb)]
    free_right = [right[b] for b in range(len(right)) if b not in (*rc, *rb)]
    return left, right, [*batch, *free_left, *free_right]


def record_dot(
    ctx: Any, value: LowRank, labels: Sequence[str], other: Sequence[str], out: Sequence[str]
) -> None:
    for axis, label in enumerate(labels):
        role = "contracted" if label not in out else "batched" if label in other else "free"
        ctx.record(role, value, axis)


def product_of_two(ctx: Any, eqn: Any, lhs: LowRank, rhs: LowRank) -> Any:
    """``(W1 + s1 p1 q1^T)(W2 + s2 q2 p2^T)`` has rank r1 + r2: it need not be built either.

    Taken where one factor of each holds all that is contracted and the other all that is free.
    """
    left, right, out = dot_labels(eqn, lhs, rhs)
    contracted = [label for label in left if label not in out]
    if set(left) & set(right) & set(out) or lhs.activation or rhs.activation:
        return UNHANDLED
    sides = []
    for value, labels in ((lhs, left), (rhs, right)):
        inner = [k for k in range(len(value.factors)) if on(value, k, labels, contracted)]
        outer = [k for k in range(len(value.factors)) if on(value, k, labels, out)]
        if len(value.factors) != 2 or sorted(inner + outer) != [0, 1]:
            return UNHANDLED
        sides.append((value.factors[inner[0]], value.factors[outer[0]]))
    record_dot(ctx, lhs, left, right, out)
    record_dot(ctx, rhs, right, left, out)
    (q1, p1), (q2, p2) = sides
    acc = accumulator(eqn.outvars[0].aval.dtype)

    def to_out(x: Array, labels: Sequence[str]) -> Array:
        return jax.vmap(lambda v: align((v, tuple(labels)), out))(x)

    def drop(factor: Array, labels: Sequence[str], keep: Sequence[str]) -> tuple[Array, list[str]]:
        kept = [i for i, label in enumerate(labels) if label in keep]
        return factor.reshape(factor.shape[0], *(factor.shape[i + 1] for i in kept)), [labels[i] for i in kept]

    def through(factor: Array, labels: Sequence[str], w: Array, w_labels: Sequence[str]) -> Array:
        thin, thin_labels = drop(factor, labels, contracted)
        needed = {"rank", *(label for label in w_labels if label in out)}
        y, y_labels = contract(
            (thin, ("rank", *thin_labels)), (w, tuple(w_labels)), needed, ["rank", *out], acc
        )
        return to_out(y, y_labels[1:])

    first, first_labels = drop(p1, left, out)
    last, last_labels = drop(p2, right, out)
    left_1 = to_out(first, first_labels) * lhs.scale.astype(acc)
    right_1 = through(q1, left, rhs.w, right)
    left_2 = through(q2, right, lhs.w, left) * rhs.scale.astype(acc)
    right_2 = to_out(last, last_labels)
    # The cross term (q1 . q2) of the two perturbations joins the first pair.
    inner_1, inner_labels = drop(q1, left, contracted)
    inner_2, _ = drop(q2, right, contracted)
    order = [drop(q2, right, contracted)[1].index(label) + 1 for label in inner_labels]
    cross = jnp.tensordot(
        inner_1.astype(acc), inner_2.astype(acc), (list(range(1, inner_1.ndim)), order)
    ) * rhs.scale.astype(acc)
    right_1 = right_1 + jnp.tensordot(cross, right_2.astype(acc), 1)

    dtype = eqn.outvars[0].aval.dtype
    w = bind(eqn, lhs.w, rhs.w)
    factors = (
        jnp.concatenate([left_1, left_2]).astype(dtype),
        jnp.concatenate([right_1, right_2.astype(acc)]).astype(dtype),
    )
    paths = tuple(dict.fromkeys((*lhs.paths, *rhs.paths)))
    tags = (frozenset(), frozenset()) if lhs.tags else ()
    return LowRank(w, factors, jnp.ones_like(lhs.scale), paths, False, tags)


def on(value: LowRank, k: int, labels: Sequence[str], where: Sequence[str]) -> bool:
    """Whether factor ``k`` varies along axes of ``where`` and along no other."""
    varying = [label for axis, label in enumerate(labels) if value.varies(k, axis)]
    return bool(varying) and all(label in where for label in varying)


@rule("conv_general_dilated")
def conv_general_dilated(ctx: Any, eqn: Any, lhs: Value, rhs: Value) -> Any:
    params = eqn.params
    if not isinstance(rhs, LowRank) or params["batch_group_count"] != 1:
        return UNHANDLED
    lhs = ctx.dense(lhs, eqn)
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    out_axis, in_axis, *spatial_axes = numbers.rhs_spec
    for axis, role in [(out_axis, "free"), *((a, "contracted") for a in (in_axis, *spatial_axes))]:
        ctx.record(role, rhs, axis)

    dtype = eqn.outvars[0].aval.dtype
    acc = accumulator(dtype)
    main = bind(eqn, lhs, rhs.w, preferred_element_type=acc)
    positions = math.prod(rhs.shape[a] for a in spatial_axes)
    if positions <= MAX_SHIFTS or len(rhs.factors) != 2 or not rows_and_columns(rhs, out_axis):
        noise = shifted_products(eqn, lhs, rhs, main, acc)
    else:
        noise = thin_convolution(eqn, lhs, rhs, acc)
    # [batch, *spatial, groups, channels of a group] back to the layout of the output
    flat = noise.reshape(*noise.shape[:-2], noise.shape[-2] * noise.shape[-1])
    if flat.shape[-1] != rhs.shape[out_axis]:
        full = (*noise.shape[:-2], groups, rhs.shape[out_axis] // groups)
        flat = jnp.broadcast_to(noise, full).reshape(*noise.shape[:-2], rhs.shape[out_axis])
    batch, channel, *spatial = numbers.out_spec
    source = [0, flat.ndim - 1, *range(1, flat.ndim - 1)]
    order = [0] * flat.ndim
    for axis, at in zip((batch, channel, *spatial), source, strict=True):
        order[axis] = at
    return (main + jnp.transpose(flat, order)).astype(dtype)


def rows_and_columns(value: LowRank, out_axis: int) -> bool:
    """Whether one factor varies along the output channels alone and the other along the rest."""
    columns = [k for k in range(2) if value.varies(k, out_axis)]
    return len(columns) == 1 and all(
        axis == out_axis or not value.varies(columns[0], axis) for axis in range(value.ndim)
    )


def shifted_products(eqn: Any, lhs: Array, rhs: LowRank, main: Array, acc: Any) -> Array:
    """The perturbation as a sum over kernel positions of thin products with a shifted input."""
    params = eqn.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    x = jnp.transpose(lhs, numbers.lhs_spec)  # [batch, channel, *spatial]
    x = jnp.moveaxis(x, 1, -1)
    edges = [(0, 0, 0)]
    for (low, high), dilation in zip(params["padding"], params["lhs_dilation"], strict=True):
        edges.append((low, high, dilation - 1))
    x = lax.pad(x, jnp.zeros((), x.dtype), [*edges, (0, 0, 0)])
    x = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)

    out_axis, in_axis, *spatial_axes = numbers.rhs_spec
    kernel = [rhs.shape[a] for a in spatial_axes]
    out_sizes = [main.shape[a] for a in numbers.out_spec[2:]]
    space = [f"s{i}" for i in range(len(kernel))]
    x_labels = ("n", *space, "g", "i")
    out_labels = ("n", *space, "g", "o")

    def at(factor: Array, r: int, offset: Sequence[int]) -> tuple[Array, tuple[str, ...]]:
        f = jnp.transpose(factor[r], (*spatial_axes, in_axis, out_axis))
        f = f[tuple(0 if f.shape[i] == 1 else o for i, o in enumerate(offset))]
        labels = []
        if f.shape[1] > 1:
            f, labels = f.reshape(f.shape[0], groups, -1), ["g", "o"]
        else:
            f = f[:, 0]
        if f.shape[0] > 1:
            labels = ["i", *labels]
        else:
            f = f[0]
        if labels and f.ndim == len(labels) and groups == 1 and "g" in labels:
            f, labels = jnp.squeeze(f, labels.index("g")), [v for v in labels if v != "g"]
        return f, tuple(labels)

    def window(offset: Sequence[int]) -> Array:
        starts, limits, strides = [0], [x.shape[0]], [1]
        steps = zip(offset, params["rhs_dilation"], params["window_strides"], out_sizes, strict=True)
        for position, dilation, stride, size in steps:
            starts.append(position * dilation)
            limits.append(position * dilation + (size - 1) * stride + 1)
            strides.append(stride)
        tail = x.shape[-2:]
        return lax.slice(x, [*starts, 0, 0], [*limits, *tail], [*strides, 1, 1])

    moving = [f for f in rhs.factors if any(dims(f)[a] > 1 for a in spatial_axes)]
    still = [f for f in rhs.factors if all(dims(f)[a] == 1 for a in spatial_axes)]
    total = None
    for r in range(rhs.rank):
        fixed = [at(f, r, [0] * len(kernel)) for f in still]
        later = set(out_labels).union(*(labels for _, labels in fixed))
        t = None
        for offset in itertools.product(*map(range, kernel)):
            y = (window(offset), x_labels)
            here = [at(f, r, offset) for f in moving]
            for i, factor in enumerate(here):
                needed = later.union(*(labels for _, labels in here[i + 1 :]))
                y = contract(y, factor, needed, out_labels, acc, params["precision"])
            t = y if t is None else (t[0] + y[0], y[1])
        for i, factor in enumerate(fixed):
            needed = set(out_labels).union(*(labels for _, labels in fixed[i + 1 :]))
            t = contract(t, factor, needed, out_labels, acc, params["precision"])
        if "i" in t[1]:  # no factor varies along the input channels
            t = (t[0].sum(t[1].index("i")), tuple(v for v in t[1] if v != "i"))
        term = align(t, out_labels) * rhs.scale.astype(acc)
        total = term if total is None else total + term
    return total


def thin_convolution(eqn: Any, lhs: Array, rhs: LowRank, acc: Any) -> Array:
    """The perturbation of a large kernel: a convolution to one channel a rank, then the columns."""
    params = eqn.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    out_axis = numbers.rhs_spec[0]
    k = 0 if rhs.varies(0, out_axis) else 1
    columns, rows = rhs.factors[k], rhs.factors[1 - k]
    total = None
    for r in range(rhs.rank):
        kernel = jnp.repeat(rows[r].astype(lhs.dtype), groups, axis=out_axis)
        t = bind(eqn, lhs, kernel, preferred_element_type=acc)
        t = jnp.moveaxis(jnp.transpose(t, numbers.out_spec), 1, -1)[..., None]
        term = t * columns[r].reshape(groups, -1).astype(acc) * rhs.scale.astype(acc)
        total = term if total is None else total + term
    return total
