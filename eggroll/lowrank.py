"""Values that stand for a perturbed array without ever building it.

:class:`LowRank` is a parameter ``W + scale * sum_r A_r B_r`` (arXiv 2511.16652, section 4) in a form that
every structural operation of JAX can act on: each factor has the axes of ``W``, with size 1 where
the factor does not vary, so that the factors of a matrix ``[m, n]`` are ``[rank, m, 1]`` and
``[rank, 1, n]`` and the perturbation is their broadcast product. A transposition, reshape, slice or
gather of the parameter is then the same operation on each factor, and an axis along which both
factors vary is a batch axis with noise of its own (the layers of a scanned stack).

:class:`Wide` is a low-precision parameter with dense noise, kept in float32 so that the perturbation
is never rounded away into a bfloat16 weight. :class:`Spread` is a broadcast that has not been carried
out, which lets a matrix be multiplied by a row or a column vector without building it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

# Up to this rank the perturbation is a sum of outer products that XLA fuses into the addition to the
# main product; above it, a matrix product over the rank. On CPU, rank 4 took 1.0 ms unrolled where
# one [m, 4] product a member took 2.3 ms.
MAX_UNROLLED_RANK = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A perturbed array ``w + scale * sum_r prod_k factors[k][r]`` that is not built.

    Attributes:
      w: the unperturbed array, ``[*shape]``, the same for every member of the population.
      factors: arrays ``[rank, *axes]``; each of ``axes`` is the size of ``w``'s axis or 1.
      scale: scalar; sign times sigma over the square root of the rank.
      paths: the parameters that this value was made from, for messages.
      activation: True where the value is data that was looked up (rows of an embedding), so that
        building it is no cost worth a warning.
      tags: for each factor the axes of the parameter that it belongs to; used by plan inference only.

    Example:
      >>> import jax.numpy as jnp
      >>> w = LowRank(jnp.zeros((2, 3)), (jnp.ones((1, 2, 1)), jnp.ones((1, 1, 3))), jnp.float32(0.5))
      >>> build(w).tolist()
      [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    """

    w: Array
    factors: tuple[Array, ...]
    scale: Array
    paths: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    activation: bool = dataclasses.field(default=False, metadata={"static": True})
    tags: tuple[frozenset[int], ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    @property
    def ndim(self) -> int:
        return self.w.ndim

    @property
    def dtype(self) -> Any:
        return self.w.dtype

    @property
    def rank(self) -> int:
        return self.factors[0].shape[0]

    def varies(self, k: int, axis: int) -> bool:
        """Whether factor ``k`` varies along ``axis``."""
        return self.factors[k].shape[axis + 1] > 1

    def replace(self, **changes: Any) -> "LowRank":
        return dataclasses.replace(self, **changes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Wide:
    """A perturbed array held in float32 that stands for one of the narrower ``dtype``."""

    value: Array
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spread:
    """``value`` broadcast to ``shape``, not carried out; ``value`` has size 1 along the new axes."""

    value: Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> Any:
        return self.value.dtype


Special = LowRank | Wide | Spread
Value = Any  # an array, or one of Special


def is_special(value: Value) -> bool:
    return isinstance(value, LowRank | Wide | Spread)


def is_narrow(dtype: DTypeLike) -> bool:
    """Whether float32 is wider than this float type (bfloat16, float16, float8)."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def accumulator(dtype: DTypeLike) -> DTypeLike:
    """The type in which sums of ``dtype`` are formed."""
    return jnp.float32 if is_narrow(dtype) else dtype


def build(value: LowRank) -> Array:
    """The perturbed array itself, ``[*shape]``; float32 where ``w`` is narrower than that."""
    dtype = accumulator(value.dtype)
    noise = jnp.ones((), dtype)
    for factor in value.factors:
        noise = noise * factor.astype(dtype)
    return value.w.astype(dtype) + value.scale.astype(dtype) * noise.sum(0)


def perturbation(
    x: Array,
    x_labels: Sequence[str],
    value: LowRank,
    labels: Sequence[str],
    out_labels: Sequence[str],
    dtype: DTypeLike,
    precision: Any = None,
) -> Array:
    """``scale * sum_r einsum(x, prod_k factors[k][r])``, shaped to broadcast against the output.

    Args:
      x: the other operand, one label an axis.
      x_labels: labels of ``x``'s axes.
      value: the perturbed operand; only its factors are used.
      labels: labels of ``value``'s axes.
      out_labels: labels of the output's axes; what is not in it is summed over.
      dtype: the type of sums and of the result.
      precision: as in ``jax.lax.dot_general``.

    Returns:
      Array with one axis for each of ``out_labels``, of full size or 1.
    """
    if value.rank <= MAX_UNROLLED_RANK:
        total = None
        for r in range(value.rank):
            factors = [_labelled(factor[r], labels) for factor in value.factors]
            term = _product(x, tuple(x_labels), factors, out_labels, dtype, precision, value.scale)
            total = term if total is None else total + term
        return total
    factors = [_labelled(factor, ("rank", *labels)) for factor in value.factors]
    return _product(x, tuple(x_labels), factors, out_labels, dtype, precision, value.scale)


_Labelled = tuple[Array, tuple[str, ...]]


def _labelled(factor: Array, labels: Sequence[str]) -> _Labelled:
    """Drops the axes along which a factor does not vary (the rank's stays)."""
    kept = [i for i, label in enumerate(labels) if factor.shape[i] > 1 or label == "rank"]
    return factor.reshape([factor.shape[i] for i in kept]), tuple(labels[i] for i in kept)


def _product(
    x: Array,
    x_labels: tuple[str, ...],
    factors: list[_Labelled],
    out_labels: Sequence[str],
    dtype: DTypeLike,
    precision: Any,
    scale: Array,
) -> Array:
    out = set(out_labels)
    # The factor over the contracted axes first: what is left is as thin as the rank.
    factors = sorted(factors, key=lambda f: -len(set(f[1]) & set(x_labels) - out))
    t: _Labelled = (x, x_labels)
    for i, factor in enumerate(factors):
        needed = out.union(*(labels for _, labels in factors[i + 1 :]))
        if i == len(factors) - 1:
            t = (t[0] * scale.astype(dtype), t[1])
        t = contract(t, factor, needed, out_labels, dtype, precision)
    return align(t, out_labels)


def contract(
    t: _Labelled,
    factor: _Labelled,
    needed: set[str],
    order: Sequence[str],
    dtype: DTypeLike,
    precision: Any = None,
) -> _Labelled:
    """Multiplies two labelled arrays and sums over the labels that are not ``needed``."""
    (x, xl), (f, fl) = t, factor
    kept = [label for label in dict.fromkeys((*order, *xl, *fl)) if label in needed and label in {*xl, *fl}]
    if all(label in needed for label in (*xl, *fl)):
        # An outer product: an element-wise multiplication fuses with the addition that follows.
        return align((x.astype(dtype), xl), kept) * align((f.astype(dtype), fl), kept), tuple(kept)
    letters = {label: chr(ord("a") + i) for i, label in enumerate(dict.fromkeys((*xl, *fl)))}
    spec = [("".join(letters[label] for label in labels)) for labels in (xl, fl, kept)]
    y = jnp.einsum(
        f"{spec[0]},{spec[1]}->{spec[2]}", x, f, precision=precision, preferred_element_type=dtype
    )
    return y, tuple(kept)


def align(t: _Labelled, labels: Sequence[str]) -> Array:
    """Transposes a labelled array to the order of ``labels``, with size 1 for those it lacks."""
    x, xl = t
    x = jnp.transpose(x, [xl.index(label) for label in labels if label in xl])
    return jnp.expand_dims(x, [i for i, label in enumerate(labels) if label not in xl])
