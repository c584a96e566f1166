"""Products and sums of arrays whose axes have labels, computed so that factors stay thin.

An axis is named by a string. A factor ``[rank, *axes]`` has size 1 along the axes it does not vary
along; those are dropped here, and put back by :func:`align` where an array meets the output.
"""

from collections.abc import Iterable, Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from eggroll.values.dtypes import is_integer

# Up to this rank a perturbation is a sum of outer products, which XLA fuses into the addition to
# the main product; above it, a matrix product over the rank. On CPU, rank 4 took 1.0 ms unrolled
# and 2.3 ms as one [m, 4] product for each member.
MAX_UNROLLED_RANK = 8

# The label of a factor's rank axis, where ranks are contracted together.
RANK = "rank"

# An array and the labels of its axes.
Labelled = tuple[Array, tuple[str, ...]]


def terms(factors: Sequence[Array], labels: Sequence[str]) -> list[list[Labelled]]:
    """The factors ``[rank, *axes]`` of each rank, or of all ranks at once above MAX_UNROLLED_RANK.

    Where ranks stay together, the factors have the label ``RANK``.
    """
    rank = max(factor.shape[0] for factor in factors)
    if rank <= MAX_UNROLLED_RANK:
        shared = [factor.shape[0] == 1 for factor in factors]
        return [
            [
                labelled(factor[0 if one else r], labels)
                for factor, one in zip(factors, shared, strict=True)
            ]
            for r in range(rank)
        ]
    return [[labelled(factor, (RANK, *labels)) for factor in factors]]


def labelled(factor: Array, labels: Sequence[str]) -> Labelled:
    """Drops the axes that a factor does not vary along."""
    kept = [i for i in range(len(labels)) if factor.shape[i] > 1]
    return factor.reshape([factor.shape[i] for i in kept]), tuple(labels[i] for i in kept)


def chain(
    t: Labelled,
    factors: Sequence[Labelled],
    keep: set[str],
    order: Sequence[str],
    dtype: DTypeLike,
    precision: lax.PrecisionLike = None,
) -> Labelled:
    """Multiplies by the factors in turn and sums over each label after its last use.

    Args:
      t: the array to start from.
      factors: what it is multiplied by, in this order.
      keep: labels that are not summed over.
      order: the order of the labels of the result.
      dtype: the type of sums and of the result.
      precision: as in ``jax.lax.dot_general``.
    """
    for i, factor in enumerate(factors):
        needed = keep.union(*(labels for _, labels in factors[i + 1 :]))
        t = contract(t, factor, needed, order, dtype, precision)
    return t


def contract(
    t: Labelled,
    factor: Labelled,
    needed: set[str],
    order: Sequence[str],
    dtype: DTypeLike,
    precision: lax.PrecisionLike = None,
) -> Labelled:
    """Multiplies two labelled arrays and sums over the labels that are not ``needed``."""
    (x, xl), (f, fl) = t, factor
    present = dict.fromkeys((*xl, *fl))
    kept = [v for v in dict.fromkeys((*order, *present)) if v in present and v in needed]
    if present.keys() <= needed:
        # An outer product: an element-wise multiplication fuses with the addition that follows.
        return align((x.astype(dtype), xl), kept) * align((f.astype(dtype), fl), kept), tuple(kept)
    if is_integer(dtype):
        # A thin product of integers: a sum fuses and is vectorised, and CPUs have no fast batched
        # dot of int8 and none of int32.
        labels = [*kept, *(v for v in present if v not in needed)]
        # 128 * 127 is an int16, half of the bytes where products are stored before they are summed.
        narrow = jnp.int16 if x.dtype == f.dtype == jnp.int8 else dtype
        y = align((x.astype(narrow), xl), labels) * align((f.astype(narrow), fl), labels)
        return y.sum(range(len(kept), len(labels)), dtype=dtype), tuple(kept)
    number = {label: i for i, label in enumerate(present)}
    numbers = [[number[label] for label in labels] for labels in (xl, fl, kept)]
    y = jnp.einsum(
        x, numbers[0], f, numbers[1], numbers[2], precision=precision, preferred_element_type=dtype
    )
    return y, tuple(kept)


def align(t: Labelled, labels: Iterable[str]) -> Array:
    """Transposes a labelled array to the order of ``labels``, with size 1 for those it lacks."""
    x, xl = t
    labels = list(labels)
    x = jnp.transpose(x, [xl.index(label) for label in labels if label in xl])
    return jnp.expand_dims(x, [i for i, label in enumerate(labels) if label not in xl])
