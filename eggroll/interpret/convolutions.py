"""The rule of convolutions with a perturbed kernel."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core
from jax.typing import DTypeLike

from eggroll.interpret.context import Context
from eggroll.interpret.equations import bind, type_of
from eggroll.interpret.products import in_one_type
from eggroll.interpret.registry import UNHANDLED, Rounding, Unhandled, rule
from eggroll.interpret.structure import Result, dims
from eggroll.values.contraction import Labelled, align, chain, terms
from eggroll.values.dtypes import accumulator
from eggroll.values.lowrank import LowRank, Value

# Kernels with more positions than this are convolved thinly (rank output channels); below it, the
# perturbation is a sum of shifted products, since a convolution with a kernel of each member's own
# becomes a grouped one, which is slow on CPU.
MAX_SHIFTS = 64


@rule(
    "conv_general_dilated",
    keeps="kernels, without batch groups",
    rounding=Rounding.SUMS,
)
def conv_general_dilated(ctx: Context, eqn: core.JaxprEqn, lhs: Value, rhs: Value) -> Result:
    params = eqn.params
    if not isinstance(rhs, LowRank) or params["batch_group_count"] != 1:
        return UNHANDLED
    numbers = params["dimension_numbers"]
    out_axis, *inner_axes = numbers.rhs_spec
    if any(gain.size > gain.shape[out_axis] for gain in rhs.gains):
        return Unhandled("multiply the channels of the input instead of those of the kernel")
    rhs, lhs = in_one_type(ctx, eqn, rhs, lhs)
    ctx.record("free", rhs, out_axis)
    for axis in inner_axes:
        ctx.record("contracted", rhs, axis)

    dtype = type_of(eqn.outvars[0]).dtype
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
    eqn: core.JaxprEqn, lhs: Array, rhs: LowRank, out_sizes: Sequence[int], acc: DTypeLike
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


def windows(
    eqn: core.JaxprEqn, lhs: Array, out_sizes: Sequence[int]
) -> Callable[[Sequence[int]], Array]:
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
    eqn: core.JaxprEqn, lhs: Array, rhs: LowRank, out_sizes: Sequence[int], acc: DTypeLike
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


def thin_convolution(
    eqn: core.JaxprEqn, lhs: Array, rows: Array, columns: Array, acc: DTypeLike
) -> Array:
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
