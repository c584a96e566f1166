"""Values that are thin once they are summed, and are built if they are used otherwise.

The square of ``W + s A B^T`` is no low-rank value, but its sums are thin: over the rows i,

    sum_i (W + s A B^T)_ij^2 = W2_j + 2 s sum_r (A_r^T W)_j B_rj + s^2 sum_rq (A_r . A_q) B_rj B_qj

where ``W2``, the sum of squares of ``W``, is shared by all members. :func:`sum_of_product` is this
expansion for one or two values, any axes, and gains. :class:`Deferred` is what is summed.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from eggroll.values.contraction import RANK, Labelled, labelled
from eggroll.values.dtypes import accumulator
from eggroll.values.lowrank import Lazy, LowRank

Term = tuple[LowRank, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Deferred(Lazy):
    """A sum of element-wise products of perturbed values, and a reshape of it, not carried out.

    Attributes:
      terms: products of one or two values, all of one shape and type and of linear arithmetic.
      shape: the shape that the entries are read in, in row-major order.
      plain: an array that is added, of the shape of the values; None for none.
    """

    terms: tuple[Term, ...]
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    plain: Any = None

    @property
    def base(self) -> tuple[int, ...]:
        """The shape of the values."""
        return self.terms[0][0].shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        return self.terms[0][0].dtype

    @property
    def reshaped(self) -> bool:
        return self.shape != self.base

    def negate(self) -> "Deferred":
        terms = tuple((first.arithmetic.negate(first), *rest) for first, *rest in self.terms)
        plain = None if self.plain is None else -self.plain
        return dataclasses.replace(self, terms=terms, plain=plain)

    def spread(self, shape: tuple[int, ...]) -> "Deferred | None":
        """The value broadcast along axes of size 1; None where a reshape would come before that."""
        if self.shape == shape:
            return self
        if self.reshaped or self.ndim != len(shape):
            return None
        terms = tuple(tuple(v.spread(shape) for v in term) for term in self.terms)
        return Deferred(terms, shape, self.plain)

    def sum(self, axes: Sequence[int], precision: lax.PrecisionLike = None) -> Array | None:
        """The sum over axes with nothing built.

        Args:
          axes: of the value as it is shaped.
          precision: of the contractions, as in ``jax.lax.dot_general``.

        Returns:
          None where a reshape has merged what is summed over with what is not.
        """
        over: list[int] = []
        for old, new in common_groups(self.base, self.shape):
            summed = [axis in axes for axis in new if self.shape[axis] > 1]
            if any(summed) and not all(summed):
                return None
            over += old if any(summed) else ()
        parts = [sum_of_product(term, over, precision) for term in self.terms]
        total = functools.reduce(jnp.add, parts)
        if self.plain is not None:
            plain = jnp.broadcast_to(self.plain, self.base).astype(total.dtype)
            total = total + plain.sum(tuple(over))
        return total.reshape([n for axis, n in enumerate(self.shape) if axis not in axes])


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


def as_term(value: Deferred) -> LowRank | None:
    """The one perturbed value that a deferred one holds, be it reshaped; None if it is more."""
    one = len(value.terms) == 1 and len(value.terms[0]) == 1 and value.plain is None
    return value.terms[0][0] if one else None


def sum_of_product(
    values: Sequence[LowRank], axes: Sequence[int], precision: lax.PrecisionLike = None
) -> Array:
    """The sum over ``axes`` of the element-wise product of one or two values, none of them built.

    Args:
      values: of one shape and of linear arithmetic.
      axes: what is summed over.
      precision: of the contractions, as in ``jax.lax.dot_general``.

    Returns:
      Array of the other axes, in the type in which sums of the values are formed.

    Example:
      >>> factors = (jnp.ones((1, 2, 1)), jnp.ones((1, 1, 3)))
      >>> w = LowRank(jnp.ones((2, 3)), factors, jnp.float32(0.5))
      >>> sum_of_product([w, w], [0]).tolist()
      [4.5, 4.5, 4.5]
    """
    shape = values[0].shape
    labels = tuple(f"a{i}" for i in range(len(shape)))
    sizes = dict(zip(labels, shape, strict=True))
    out = tuple(label for i, label in enumerate(labels) if i not in axes)
    dtype = functools.reduce(
        jnp.promote_types, (accumulator(x.dtype) for v in values for x in (v.w, *v.factors))
    )
    gains = [labelled(gain.astype(dtype), labels) for v in values for gain in v.gains]
    inner = [gain for gain in gains if not set(gain[1]) <= set(out)]
    outer = [gain for gain in gains if set(gain[1]) <= set(out)]

    @functools.cache
    def term(noisy: tuple[bool, ...]) -> Array:
        """The sum of the product of the weights of some values with the noise of the others."""
        operands: list[Labelled] = []
        scale = jnp.ones((), dtype)
        weights = [v.w.astype(dtype) for v, n in zip(values, noisy, strict=True) if not n]
        if weights:
            # The weights first: their product is shared by all members.
            operands.append((functools.reduce(jnp.multiply, weights), labels))
        for i, (v, n) in enumerate(zip(values, noisy, strict=True)):
            if n:
                scale = scale * v.scale.astype(dtype)
                ranked = (f"{RANK}{i}", *labels)
                operands += [labelled(f.astype(dtype), ranked) for f in v.factors]
        return contracted(with_gains(operands, inner), out, precision, sizes) * scale

    total = jnp.zeros((), dtype)
    for noisy in itertools.product((False, True), repeat=len(values)):
        same = len(values) == 2 and values[0] is values[1]
        total = total + term(tuple(sorted(noisy)) if same else noisy)
    total = jnp.broadcast_to(total, [sizes[label] for label in out])
    for gain, kept in outer:
        total = total * gain.reshape([sizes[v] if v in kept else 1 for v in out])
    return total


def with_gains(operands: list[Labelled], gains: Sequence[Labelled]) -> list[Labelled]:
    """The operands and the gains, each gain multiplied into the smallest operand with its labels.

    Operands that only the weights have are left alone: a gain of a member's own would give each
    member weights of its own.
    """
    weights, *thin = operands
    thin = thin if len(operands) > 1 else []
    for gain, kept in gains:
        fitting = [i for i, (_, labels) in enumerate(thin) if set(kept) <= set(labels)]
        if not fitting:
            thin.append((gain, kept))
            continue
        i = min(fitting, key=lambda i: thin[i][0].size)
        x, labels = thin[i]
        shape = [n if label in kept else 1 for label, n in zip(labels, x.shape, strict=True)]
        thin[i] = (x * gain.reshape(shape), labels)
    return [weights, *thin]


def contracted(
    operands: Sequence[Labelled],
    out: Sequence[str],
    precision: lax.PrecisionLike,
    sizes: dict[str, int],
) -> Array:
    """The product of labelled arrays summed over all labels but ``out``, in the cheapest order.

    Returns:
      Array with an axis for each label of ``out``, of size 1 where no operand varies along it.
    """
    present = list(dict.fromkeys(label for _, labels in operands for label in labels))
    number = {label: i for i, label in enumerate(present)}
    kept = [label for label in out if label in number]
    arguments = [
        part for x, labels in operands for part in (x, [number[label] for label in labels])
    ]
    y = jnp.einsum(
        *arguments, [number[label] for label in kept], optimize="optimal", precision=precision
    )
    # Summed axes along which nothing varies.
    repeats = math.prod(n for label, n in sizes.items() if label not in (*out, *present))
    y = y * repeats if repeats != 1 else y
    return y.reshape([sizes[label] if label in number else 1 for label in out])
