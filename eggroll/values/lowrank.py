"""Values that stand for a perturbed array without ever building it.

:class:`LowRank` is a parameter ``W + scale * sum_r A_r B_r`` (arXiv 2511.16652, section 4) in a
form that every structural operation of JAX can act on: each factor has the axes of ``W``, of size 1
where it does not vary, so that the factors of a matrix ``[m, n]`` are ``[rank, m, 1]`` and
``[rank, 1, n]`` and the perturbation is their broadcast product. A transposition, reshape, slice or
gather of the parameter is then the same operation on each factor, and an axis along which both
factors vary is a batch axis with noise of its own (the layers of a scanned stack).

:class:`Wide` is a low-precision parameter with dense noise, kept in float32 so that the noise is
never rounded away into a bfloat16 weight. :class:`Spread` is a broadcast that has not been carried
out, which lets a matrix be multiplied by a row or a column vector without building it.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from eggroll.values import fixed_point
from eggroll.values.fixed_point import is_integer

# Up to this rank the perturbation is a sum of outer products that XLA fuses into the addition to
# the main product; above it, a matrix product over the rank. On CPU, rank 4 took 1.0 ms unrolled
# where one [m, 4] product a member took 2.3 ms.
MAX_UNROLLED_RANK = 8


# An array; in trees of the same structure a shape or a sharding takes its place.
Part = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A perturbed array ``(w + scale * sum_r prod_k factors[k][r]) * prod gains``, not built.

    Attributes:
      w: the unperturbed array, ``[*shape]``, the same for every member of the population.
      factors: arrays ``[rank, *axes]``; each of ``axes`` is the size of ``w``'s axis or 1.
      scale: scalar; sign times sigma over the square root of the rank.
      paths: the parameters that this value was made from, for messages.
      activation: True where the value is data that was looked up (rows of an embedding), so that
        building it is no cost worth a warning.
      gains: arrays with the axes of ``w``, of size 1 where they do not vary. They are kept apart
        since a gain of a member's own would make ``w`` one of its own too.
      tags: for each factor the (path, axis) of parameters that it belongs to; plan inference only.
      shift: of integers: the array is ``w + scale * (sum_r prod_k factors[k][r] >> shift)``, where
        ``scale`` is the sign of the member in its pair and nothing else. Signs that come of
        operations go into a factor, so that the two members stay mirror images of each other.

    Example:
      >>> import jax.numpy as jnp
      >>> factors = (jnp.ones((1, 2, 1)), jnp.ones((1, 1, 3)))
      >>> build(LowRank(jnp.zeros((2, 3)), factors, jnp.float32(0.5))).tolist()
      [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    """

    w: Part
    factors: tuple[Part, ...]
    scale: Part
    paths: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    activation: bool = dataclasses.field(default=False, metadata={"static": True})
    gains: tuple[Part, ...] = ()
    tags: tuple[frozenset[tuple[str, int]], ...] = dataclasses.field(
        default=(), metadata={"static": True}
    )
    shift: int = dataclasses.field(default=0, metadata={"static": True})

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

    @property
    def integer(self) -> bool:
        """Whether the perturbation is one of integers, as :mod:`eggroll.integer` has it."""
        return is_integer(self.factors[0].dtype)

    def varies(self, k: int, axis: int) -> bool:
        """Whether factor ``k`` varies along ``axis``."""
        return self.factors[k].shape[axis + 1] > 1

    def replace(self, **changes: Any) -> "LowRank":
        return dataclasses.replace(self, **changes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Wide:
    """A perturbed array held in float32 that stands for one of the narrower ``dtype``, float or int8."""

    value: Part
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spread:
    """``value`` broadcast to ``shape``, not carried out; it has size 1 along the new axes."""

    value: Part
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> Any:
        return self.value.dtype


def is_quantised(value: Any) -> bool:
    """Whether this is a perturbed int8 parameter whose noise is of floats."""
    if isinstance(value, Spread):
        return is_quantised(value.value)
    if isinstance(value, LowRank):
        return is_integer(value.dtype) and not value.integer
    return isinstance(value, Wide) and is_integer(value.dtype)


Special = LowRank | Wide | Spread
Value = Any  # an array, or one of Special


def is_special(value: Value) -> bool:
    return isinstance(value, LowRank | Wide | Spread)


def materialize(value: Value) -> Value:
    """Carries out a broadcast that was put off."""
    if not isinstance(value, Spread):
        return value
    if isinstance(value.value, Wide):
        return Wide(jnp.broadcast_to(value.value.value, value.shape), value.dtype)
    return jnp.broadcast_to(value.value, value.shape)


def narrow(value: Value) -> Value:
    """A Wide value as the array of the type that it stands for."""
    return value.value.astype(value.dtype) if isinstance(value, Wide) else value


def is_narrow(dtype: DTypeLike) -> bool:
    """Whether float32 is wider than this float type (bfloat16, float16, float8)."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def accumulator(dtype: DTypeLike) -> DTypeLike:
    """The type in which sums of ``dtype`` are formed."""
    if is_integer(dtype):
        return jnp.int32 if jnp.iinfo(dtype).bits < 32 else dtype
    return jnp.float32 if is_narrow(dtype) else dtype


def build(value: LowRank) -> Array:
    """The perturbed array itself, ``[*shape]``; float32 where the noise is of narrower floats."""
    if value.integer:
        return fixed_point.built(value.w, value.factors, value.scale, value.shift)
    dtype = accumulator(value.factors[0].dtype)
    noise = jnp.ones((), dtype)
    for factor in value.factors:
        noise = noise * factor.astype(dtype)
    out = value.w.astype(dtype) + value.scale.astype(dtype) * noise.sum(0)
    for gain in value.gains:
        out = out * gain.astype(dtype)
    return out


def perturbation(
    x: Array,
    x_labels: Sequence[str],
    value: LowRank,
    labels: Sequence[str],
    out_labels: Sequence[str],
    dtype: DTypeLike,
    precision: Any = None,
    split: bool = False,
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
      split: of integers, whether to keep the sum in int32 by taking it in two parts
        (:func:`eggroll.values.fixed_point.fits`).

    Returns:
      Array with one axis for each of ``out_labels``, of full size or 1.
    """
    out = set(out_labels)
    scale, shift = value.scale.astype(dtype), value.shift
    parts, lows = [], []
    for factors in terms(value.factors, labels):
        # The factor over the contracted axes first: what is left is as thin as the rank.
        *before, last = sorted(factors, key=lambda f: -len(set(f[1]) & set(x_labels) - out))
        t = chain((x, tuple(x_labels)), before, out.union(last[1]), out_labels, dtype, precision)
        outer = lambda x, labels=t[1], last=last: align(
            chain((x, labels), [last], out, out_labels, dtype, precision), out_labels
        )
        if not value.integer:
            parts.append(outer(t[0] * scale))
        elif not split:
            parts.append(outer(t[0]))
        else:
            parts.append(outer(t[0] >> shift))
            lows.append(outer(t[0] & ((1 << shift) - 1)))
    total = functools.reduce(jnp.add, parts)
    if not value.integer:
        return total
    # Shifted first, which rounds downwards, and then signed: the members of a pair are exact mirrors.
    return scale * (total + (functools.reduce(jnp.add, lows) >> shift) if split else total >> shift)


Labelled = tuple[Array, tuple[str, ...]]


def terms(factors: Sequence[Array], labels: Sequence[str]) -> list[list[Labelled]]:
    """The factors ``[rank, *axes]`` of each rank; of many ranks at once, with a label "rank"."""
    rank = factors[0].shape[0]
    if rank <= MAX_UNROLLED_RANK:
        return [[labelled(factor[r], labels) for factor in factors] for r in range(rank)]
    return [[labelled(factor, ("rank", *labels)) for factor in factors]]


def labelled(factor: Array, labels: Sequence[str]) -> Labelled:
    """Drops the axes along which a factor does not vary (the rank's stays)."""
    kept = [i for i, label in enumerate(labels) if factor.shape[i] > 1 or label == "rank"]
    return factor.reshape([factor.shape[i] for i in kept]), tuple(labels[i] for i in kept)


def chain(
    t: Labelled,
    factors: Sequence[Labelled],
    keep: set[str],
    order: Sequence[str],
    dtype: DTypeLike,
    precision: Any = None,
) -> Labelled:
    """Multiplies by one factor after the other, summing over what is not to ``keep`` in the end."""
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
    precision: Any = None,
) -> Labelled:
    """Multiplies two labelled arrays and sums over the labels that are not ``needed``."""
    (x, xl), (f, fl) = t, factor
    present = dict.fromkeys((*xl, *fl))
    kept = [v for v in dict.fromkeys((*order, *present)) if v in present and v in needed]
    if present.keys() <= needed:
        # An outer product: an element-wise multiplication fuses with the addition that follows.
        return align((x.astype(dtype), xl), kept) * align((f.astype(dtype), fl), kept), tuple(kept)
    if is_integer(dtype):
        # A thin product: as a sum it fuses and is vectorised, where CPUs have no fast batched dot of
        # int8 and none at all of int32.
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


def align(t: Labelled, labels: Sequence[str]) -> Array:
    """Transposes a labelled array to the order of ``labels``, with size 1 for those it lacks."""
    x, xl = t
    x = jnp.transpose(x, [xl.index(label) for label in labels if label in xl])
    return jnp.expand_dims(x, [i for i, label in enumerate(labels) if label not in xl])
