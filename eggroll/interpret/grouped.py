"""Grouped products, ``lax.ragged_dot``: rows of data that are sorted by group, a matrix a group.

The product with ``W + s A B^T`` is the grouped product with ``W`` and a thin product in which each row
meets the factors of its own group. JAX cannot vmap a grouped product over all of its operands
(0.10.2), so that the members' rows are merged into one product here (:func:`product`).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.extend import core
from jax.typing import ArrayLike, DTypeLike

from eggroll.interpret.context import Context
from eggroll.interpret.equations import type_of
from eggroll.interpret.products import in_one_type
from eggroll.interpret.registry import UNHANDLED, Rounding, rule
from eggroll.interpret.structure import Result
from eggroll.values.dtypes import accumulator
from eggroll.values.lowrank import LowRank, Upcast, Value


@rule(
    "ragged_dot_general",
    keeps="a matrix for each group, with data of two axes sorted by group",
    takes=(LowRank, jax.Array),
    rounding=Rounding.SUMS,
)
def ragged_dot_general(
    ctx: Context, eqn: core.JaxprEqn, lhs: Value, rhs: Value, sizes: ArrayLike
) -> Result:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contracted, batch = numbers.dot_dimension_numbers
    rows_in_groups = list(numbers.lhs_ragged_dimensions) == [0]
    axes = tuple(map(tuple, contracted))
    if (
        not rows_in_groups
        or list(numbers.rhs_group_dimensions) != [0]
        or axes not in (((1,), (1,)), ((1,), (2,)))
        or any(map(len, batch))
        or (len(lhs.shape), len(rhs.shape)) != (2, 3)
        or eqn.params["group_offset"] is not None
        or jnp.ndim(sizes) != 1
    ):
        return UNHANDLED
    dtype, precision = type_of(eqn.outvars[0]).dtype, eqn.params["precision"]
    acc = accumulator(dtype)
    labels = ("group", "in", "out") if axes[1] == (1,) else ("group", "out", "in")
    # Rows of data give way: the matrices stay low rank.
    lhs = ctx.upcast(lhs, eqn)
    if not isinstance(rhs, LowRank):
        x, w = (v.value if isinstance(v, Upcast) else jnp.asarray(v) for v in (lhs, rhs))
        if Upcast in (type(lhs), type(rhs)):
            x, w = x.astype(acc), w.astype(acc)
        return product(x, oriented(w, labels), jnp.asarray(sizes), acc, precision).astype(dtype)

    value, x = in_one_type(ctx, eqn, rhs, lhs)
    inner, outer = labels.index("in"), labels.index("out")
    if any(gain.shape[inner] > 1 and gain.shape[outer] > 1 for gain in value.gains):
        return UNHANDLED
    for axis, use in ((0, "batched"), (inner, "contracted"), (outer, "free")):
        ctx.record(use, value, axis)
    group, inside = group_of_rows(jnp.asarray(sizes), x.shape[0])
    for gain in value.gains:
        if gain.shape[inner] > 1:
            own = oriented(of_group(gain, group, 0), labels)[:, :, 0]
            x = (x.astype(acc) * own).astype(x.dtype)
    y = product(x, oriented(value.w, labels), jnp.asarray(sizes), acc, precision)
    # Each row with the factors of its group: the axis of the groups becomes that of the rows.
    of_rows = value.replace(factors=tuple(of_group(f, group, 1) for f in value.factors))
    row_labels = ("row", *labels[1:])
    noise = value.arithmetic.perturbation(
        x, ("row", "in"), of_rows, row_labels, ("row", "out"), acc, precision
    )
    y = y + jnp.where(inside[:, None], noise, 0)
    for gain in value.gains:
        if gain.shape[inner] == 1:
            y = y * oriented(of_group(gain, group, 0), labels)[:, 0]
    return y.astype(dtype)


def oriented(w: Array, labels: Sequence[str]) -> Array:
    """A value ``[group, ...]`` with the contracted axis before the free one."""
    return w if labels[1] == "in" else jnp.swapaxes(w, 1, 2)


def of_group(x: Array, group: Array, axis: int) -> Array:
    """What rows find at their group along an axis, if the array varies along it."""
    return x if x.shape[axis] == 1 else jnp.take(x, group, axis)


def group_of_rows(sizes: Array, rows: int) -> tuple[Array, Array]:
    """The group of each row, ``[rows]``, and whether it has one; rows beyond all groups have none."""
    ends = jnp.cumsum(sizes)
    group = (jnp.arange(rows, dtype=ends.dtype)[:, None] >= ends[None]).sum(1)
    return jnp.minimum(group, sizes.shape[0] - 1), group < sizes.shape[0]


def product(
    x: Array, w: Array, sizes: Array, dtype: DTypeLike, precision: lax.PrecisionLike
) -> Array:
    """``lax.ragged_dot(x, w, sizes)`` that any of its operands may be mapped over by ``jax.vmap``.

    Args:
      x: ``[rows, in]``, sorted by group.
      w: ``[groups, in, out]``.
      sizes: how many rows each group has; the rows that are left give zeros.
      dtype: the type of sums and of the result.
      precision: as in ``jax.lax.dot_general``.
    """

    @custom_vmap
    def one(x: Array, w: Array, sizes: Array) -> Array:
        return lax.ragged_dot(x, w, sizes, precision=precision, preferred_element_type=dtype)

    @one.def_vmap
    def several(
        count: int, mapped: Sequence[bool], x: Array, w: Array, sizes: Array
    ) -> tuple[Array, bool]:
        x_mapped, w_mapped, sizes_mapped = mapped
        each = lambda array, own: array if own else jnp.broadcast_to(array, (count, *array.shape))
        if w_mapped:
            return with_own_matrices(one, each(x, x_mapped), w, each(sizes, sizes_mapped)), True
        if sizes_mapped:
            return with_own_groups(one, each(x, x_mapped), w, sizes), True
        # The members' rows of one group lie side by side where members come after rows.
        rows = x.shape[1]
        y = one(jnp.swapaxes(x, 0, 1).reshape(rows * count, -1), w, sizes * count)
        return jnp.swapaxes(y.reshape(rows, count, -1), 0, 1), True

    return one(x, w, sizes)


def with_own_groups(fn: custom_vmap, x: Array, w: Array, sizes: Array) -> Array:
    """Grouped products of members with group sizes of their own and shared matrices.

    Args:
      fn: the grouped product.
      x: ``[members, rows, in]``.
      w: ``[groups, in, out]``.
      sizes: ``[members, groups]``.
    """
    members, rows, _ = x.shape
    group, inside = jax.vmap(functools.partial(group_of_rows, rows=rows))(sizes)
    group = jnp.where(inside, group, w.shape[0])  # rows without a group come last
    order = jnp.argsort(group.reshape(-1), stable=True)
    y = fn(x.reshape(members * rows, -1)[order], w, sizes.sum(0))
    return jnp.zeros_like(y).at[order].set(y, unique_indices=True).reshape(members, rows, -1)


def with_own_matrices(fn: custom_vmap, x: Array, w: Array, sizes: Array) -> Array:
    """Grouped products of members with matrices of their own: a group for each matrix.

    Args:
      fn: the grouped product.
      x: ``[members, rows, in]``.
      w: ``[members, groups, in, out]``.
      sizes: ``[members, groups]``.
    """
    members, rows, _ = x.shape
    left = rows - sizes.sum(1)
    full = sizes.at[:, -1].add(left)  # so that the members' rows stay aligned
    y = fn(x.reshape(members * rows, -1), w.reshape(-1, *w.shape[2:]), full.reshape(-1))
    inside = jnp.arange(rows, dtype=left.dtype) < (rows - left)[:, None]
    return jnp.where(inside[..., None], y.reshape(members, rows, -1), 0)
