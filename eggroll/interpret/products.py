"""The rules of products: ``dot_general`` and convolutions of perturbed values.

A product with ``W + s A B^T`` is the product with ``W``, which all members share, and a thin product
with each member's own factors.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from eggroll.interpret.rules import UNHANDLED, bind, dims, rule
from eggroll.values import fixed_point
from eggroll.values.lowrank import (
    Labelled,
    LowRank,
    Value,
    Wide,
    accumulator,
    align,
    chain,
    contract,
    labelled,
    perturbation,
    terms,
)

# Kernels with more positions than this are convolved thinly (rank output channels); below it, the
# perturbation is a sum of shifted products, since a convolution with a kernel of each member's own
# becomes a grouped one, which is slow on CPU.
MAX_SHIFTS = 64


@rule("dot_general")
def dot_general(ctx: Any, eqn: Any, lhs: Value, rhs: Value) -> Any:
    if isinstance(lhs, LowRank) and isinstance(rhs, LowRank):
        product = product_of_two(ctx, eqn, lhs, rhs)
        if product is not UNHANDLED:
            return product
        # Data gives way before weights, and the smaller before the larger.
        if (not lhs.activation, lhs.w.size) < (not rhs.activation, rhs.w.size):
            lhs = ctx.wide(lhs, eqn)
        else:
            rhs = ctx.wide(rhs, eqn)
    left, right, out = dot_labels(eqn, lhs, rhs)
    dtype = eqn.outvars[0].aval.dtype
    acc = accumulator(dtype)
    if isinstance(lhs, LowRank):
        value, x, labels, x_labels = lhs, rhs, left, right
    else:
        value, x, labels, x_labels = rhs, lhs, right, left
    sides = sides_of_gains(value, labels, x_labels, out)
    if sides is None:
        return UNHANDLED
    value, x = in_one_type(ctx, eqn, value, x)
    for gain in sides[0]:
        x = (x.astype(acc) * align(gain, x_labels)).astype(x.dtype)
    record_dot(ctx, value, labels, x_labels, out)
    operands = (value.w, x) if isinstance(lhs, LowRank) else (x, value.w)
    form = integer_form(value, labels, x, x_labels, out)
    if form is None:
        return UNHANDLED
    main = bind(eqn, *operands, preferred_element_type=acc)
    precision, split = eqn.params["precision"], form == "split"
    y = main + perturbation(x, x_labels, value, labels, out, acc, precision, split)
    for gain in sides[1]:
        y = y * align(gain, out)
    return y.astype(dtype)


def sides_of_gains(
    value: LowRank, labels: Sequence[str], x_labels: Sequence[str], out: Sequence[str]
) -> tuple[list[Labelled], list[Labelled]] | None:
    """The gains that go to the other operand and those that go to the output, if all do."""
    before, after = [], []
    for gain in (labelled(gain, labels) for gain in value.gains):
        if set(gain[1]) <= set(out):
            after.append(gain)
        elif set(gain[1]) <= set(x_labels):
            before.append(gain)
        else:
            return None
    return before, after


def integer_form(
    value: LowRank, labels: Sequence[str], x: Array, x_labels: Sequence[str], out: Sequence[str]
) -> str | None:
    """How the perturbation is summed without overflowing; floats always can. None if not at all."""
    if not value.integer:
        return "whole"
    sizes = zip(x_labels, x.shape, strict=True)
    fan_in = math.prod(n for label, n in sizes if label not in out)
    form = fixed_point.fits(fan_in, x.dtype, value.rank, value.shift)
    contracted = [axis for axis, label in enumerate(labels) if label not in out]
    count = len(value.factors)
    along = [k for k in range(count) if any(value.varies(k, axis) for axis in contracted)]
    # The bound of the split form is that of a second product that sums over nothing but the rank.
    return None if form == "split" and len(along) > 1 else form


def in_one_type(ctx: Any, eqn: Any, value: LowRank, x: Value) -> tuple[LowRank, Array]:
    """Where ``x`` is a narrow parameter held in float32, the other operand is taken there too."""
    x = ctx.wide(x, eqn)
    if isinstance(x, Wide):
        return value.replace(w=value.w.astype(x.value.dtype)), x.value
    return value, jnp.asarray(x)


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
    """``(W + p q^T)(V + u v^T)`` is ``W V + p (q^T (V + u v^T)) + (W u) v^T``: not built either.

    Taken where of both one factor holds all that is contracted and the other all that is free.
    """
    left, right, out = dot_labels(eqn, lhs, rhs)
    contracted = [label for label in left if label not in out]
    special = lambda v: v.activation or v.gains or v.integer
    if set(left) & set(right) & set(out) or special(lhs) or special(rhs):
        return UNHANDLED
    of_left = inner_and_outer(lhs, left, contracted)
    of_right = inner_and_outer(rhs, right, contracted)
    if of_left is None or of_right is None:
        return UNHANDLED
    (q, p), (u, v) = of_left, of_right
    record_dot(ctx, lhs, left, right, out)
    record_dot(ctx, rhs, right, left, out)
    dtype, precision = eqn.outvars[0].aval.dtype, eqn.params["precision"]
    acc = accumulator(dtype)
    order = ("thin", *out)

    def thin(factor: Array, labels: Sequence[str], scale: Array) -> Labelled:
        f, kept = labelled(factor, ("thin", *labels))
        return f.astype(acc) * scale.astype(acc), kept

    def through(t: Labelled, w: Array, labels: Sequence[str]) -> Array:
        return align(contract(t, (w, tuple(labels)), set(order), order, acc, precision), order)

    one = jnp.ones((), acc)
    t = thin(q, left, one)
    across = through(t, rhs.w, right) + perturbation(*t, rhs, right, order, acc, precision)
    pairs = (
        (align(thin(p, left, lhs.scale), order), through(thin(u, right, rhs.scale), lhs.w, left)),
        (across, align(thin(v, right, one), order)),
    )
    return LowRank(
        bind(eqn, lhs.w, rhs.w),
        tuple(jnp.concatenate(factors).astype(dtype) for factors in pairs),
        jnp.ones_like(lhs.scale),
        tuple(dict.fromkeys((*lhs.paths, *rhs.paths))),
        tags=(frozenset(), frozenset()) if lhs.tags else (),
    )


def inner_and_outer(
    value: LowRank, labels: Sequence[str], contracted: Sequence[str]
) -> tuple[Array, Array] | None:
    """The factor that varies along all contracted axes, and the one that does along none."""
    wide = {label for label, n in zip(labels, value.shape, strict=True) if n > 1}
    along = [set(labelled(f[0], labels)[1]) for f in value.factors]
    for k, other in ((0, 1), (1, 0)):
        if len(along) == 2 and along[k] == wide & {*contracted} and not along[other] & along[k]:
            return value.factors[k], value.factors[other]
    return None


@rule("conv_general_dilated")
def conv_general_dilated(ctx: Any, eqn: Any, lhs: Value, rhs: Value) -> Any:
    params = eqn.params
    if not isinstance(rhs, LowRank) or params["batch_group_count"] != 1 or rhs.integer:
        return UNHANDLED
    numbers = params["dimension_numbers"]
    out_axis, *inner_axes = numbers.rhs_spec
    if any(gain.size > gain.shape[out_axis] for gain in rhs.gains):
        return UNHANDLED
    rhs, lhs = in_one_type(ctx, eqn, rhs, lhs)
    ctx.record("free", rhs, out_axis)
    for axis in inner_axes:
        ctx.record("contracted", rhs, axis)

    dtype = eqn.outvars[0].aval.dtype
    acc = accumulator(dtype)
    y = bind(eqn, lhs, rhs.w, preferred_element_type=acc)
    if y.size == 0:
        return y.astype(dtype)
    noise = convolved_noise(eqn, lhs, rhs, [y.shape[a] for a in numbers.out_spec[2:]], acc)
    # [batch, *spatial, groups, channels of a group or 1] in the layout of the output
    groups, channels = params["feature_group_count"], rhs.shape[out_axis]
    noise = jnp.broadcast_to(noise, (*noise.shape[:-1], channels // groups))
    noise = noise.reshape(*noise.shape[:-2], channels)
    noise = jnp.moveaxis(noise, channels_last(noise.ndim), numbers.out_spec)
    y = y + rhs.scale.astype(acc) * noise
    for gain in rhs.gains:
        y = y * gain.reshape([-1 if a == numbers.out_spec[1] else 1 for a in range(y.ndim)])
    return y.astype(dtype)


def convolved_noise(
    eqn: Any, lhs: Array, rhs: LowRank, out_sizes: Sequence[int], acc: DTypeLike
) -> Array:
    """The convolution with the perturbation, without its scale.

    Returns:
      ``[batch, *spatial, groups, channels of a group]``; the last may be 1.
    """
    out_axis, _, *kernel_axes = eqn.params["dimension_numbers"].rhs_spec
    row_shape = tuple(1 if a == out_axis else n for a, n in enumerate(rhs.shape))
    column_shape = tuple(n if a == out_axis else 1 for a, n in enumerate(rhs.shape))
    factors = sorted(rhs.factors, key=lambda f: dims(f) != row_shape)
    positions = math.prod(rhs.shape[a] for a in kernel_axes)
    if positions > MAX_SHIFTS and [dims(f) for f in factors] == [row_shape, column_shape]:
        return thin_convolution(eqn, lhs, factors[0], factors[1], acc)
    return shifted_products(eqn, lhs, rhs, out_sizes, acc)


def channels_last(ndim: int) -> tuple[int, ...]:
    """Where (batch, channel, *spatial) stand in the layout ``[batch, *spatial, channel]``."""
    return (0, ndim - 1, *range(1, ndim - 1))


def windows(eqn: Any, lhs: Array, out_sizes: Sequence[int]) -> Callable[[Sequence[int]], Array]:
    """What of the input each output position meets with one position of the kernel.

    Returns:
      A function of the kernel's position; it gives ``[batch, *spatial, groups, channels]``.
    """
    params = eqn.params
    groups = params["feature_group_count"]
    x = jnp.moveaxis(lhs, params["dimension_numbers"].lhs_spec, channels_last(lhs.ndim))
    padding = zip(params["padding"], params["lhs_dilation"], strict=True)
    edges = [(low, high, dilation - 1) for (low, high), dilation in padding]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    x = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)

    def window(position: Sequence[int]) -> Array:
        steps = zip(
            position, params["rhs_dilation"], params["window_strides"], out_sizes, strict=True
        )
        return x[:, *(slice(p * d, p * d + (n - 1) * by + 1, by) for p, d, by, n in steps)]

    return window


def shifted_products(
    eqn: Any, lhs: Array, rhs: LowRank, out_sizes: Sequence[int], acc: DTypeLike
) -> Array:
    """:func:`convolved_noise` as a sum over kernel positions of products with a shifted input."""
    params = eqn.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    window = windows(eqn, lhs, out_sizes)
    out_axis, in_axis, *kernel_axes = numbers.rhs_spec
    kernel = [f"k{i}" for i in range(len(kernel_axes))]
    space = [f"s{i}" for i in range(len(kernel_axes))]
    x_labels, out_labels = ("n", *space, "g", "i"), ("n", *space, "g", "o")

    def with_groups(f: Array) -> Array:
        f = jnp.transpose(f, [0, *(a + 1 for a in (*kernel_axes, in_axis, out_axis))])
        g = groups if f.shape[-1] > 1 else 1
        return f.reshape(*f.shape[:-1], g, f.shape[-1] // g)

    def at_position(factor: Labelled, position: dict[str, int]) -> Labelled:
        f, labels = factor
        index = tuple(position.get(label, slice(None)) for label in labels)
        return f[index], tuple(label for label in labels if label not in position)

    factors = [with_groups(f) for f in rhs.factors]
    positions = [range(rhs.shape[a]) for a in kernel_axes]
    out, precision, total = set(out_labels), params["precision"], []
    for term in terms(factors, (*kernel, "i", "g", "o")):
        moving = [f for f in term if set(kernel) & set(f[1])]
        fixed = [f for f in term if not set(kernel) & set(f[1])]
        keep = out.union(*(labels for _, labels in fixed))
        shifted = []
        for offset in itertools.product(*positions):
            here = [at_position(f, dict(zip(kernel, offset, strict=True))) for f in moving]
            t = (window(offset), x_labels)
            shifted.append(chain(t, here, keep, out_labels, acc, precision))
        t = (functools.reduce(jnp.add, [y for y, _ in shifted]), shifted[0][1])
        total.append(align(chain(t, fixed, out, out_labels, acc, precision), out_labels))
    return functools.reduce(jnp.add, total)


def thin_convolution(eqn: Any, lhs: Array, rows: Array, columns: Array, acc: DTypeLike) -> Array:
    """:func:`convolved_noise` by a convolution to one channel a rank, then the columns."""
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    out_axis, rank = numbers.rhs_spec[0], rows.shape[0]
    kernel = jnp.moveaxis(jnp.squeeze(rows, out_axis + 1), 0, out_axis).astype(lhs.dtype)
    kernel = jnp.concatenate([kernel] * groups, out_axis)
    t = bind(eqn, lhs, kernel, preferred_element_type=acc)
    t = jnp.moveaxis(t, numbers.out_spec, channels_last(t.ndim))
    t = t.reshape(*t.shape[:-1], groups, rank)
    return jnp.einsum(
        "...gr,rgo->...go", t, columns.reshape(rank, groups, -1), preferred_element_type=acc
    )
