"""Values that stand for a perturbed array without ever building it.

:class:`LowRank` is a parameter ``W + scale * sum_r A_r B_r`` (arXiv 2511.16652, section 4) in a
form that every structural operation of JAX can act on: each factor has the axes of ``W``, of size 1
where it does not vary, so that the factors of a matrix ``[m, n]`` are ``[rank, m, 1]`` and
``[rank, 1, n]`` and the perturbation is their broadcast product. A transposition, reshape, slice or
gather of the parameter is then the same operation on each factor, and an axis along which both
factors vary is a batch axis with noise of its own (the layers of a scanned stack).

:class:`Upcast` is a parameter of a narrow type with dense noise, held in float32 so that the noise
is not rounded away into a bfloat16 weight. :class:`LateBroadcast` is a broadcast that has not been
carried out, so that a matrix can be multiplied by a row or a column without being built.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from eggroll.values.arithmetic import FLOATS, QUANTISED, ValueArithmetic
from eggroll.values.dtypes import accumulator as accumulator
from eggroll.values.dtypes import is_integer
from eggroll.values.dtypes import is_narrow as is_narrow

# An array; in trees of the same structure a shape or a sharding takes its place.
Part = Any


class Lazy:
    """What stands for an array without being one."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(Lazy):
    """A perturbed array ``(w + scale * sum_r prod_k factors[k][r]) * prod gains``, not built.

    Attributes:
      w: the unperturbed array, ``[*shape]``, the same for every member of the population.
      factors: arrays ``[rank, *axes]``; each of ``axes`` is the size of that axis of ``w``, or 1.
      scale: scalar; sign times sigma over the square root of the rank.
      paths: the parameters that this value was made from, for messages.
      activation: True where the value is data that was looked up (rows of an embedding), so that
        building it is no cost worth a warning.
      gains: arrays with the axes of ``w``, of size 1 where they do not vary. They are kept apart
        because a gain of a member's own would give each member a ``w`` of its own.
      shared: for each gain whether it is the same for every member.
      tags: for each factor the (path, axis) of parameters that it belongs to; plan inference only.
      arithmetic: how weights and noise are computed with.

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
    arithmetic: ValueArithmetic = dataclasses.field(default=FLOATS, metadata={"static": True})
    shared: tuple[bool, ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    @property
    def ndim(self) -> int:
        return self.w.ndim

    @property
    def dtype(self) -> jnp.dtype:
        return self.w.dtype

    @property
    def rank(self) -> int:
        return max(factor.shape[0] for factor in self.factors)

    def varies(self, k: int, axis: int) -> bool:
        """Whether factor ``k`` varies along ``axis``."""
        return self.factors[k].shape[axis + 1] > 1

    def along(self, axis: int) -> list[int]:
        """The factors that vary along ``axis``."""
        return [k for k in range(len(self.factors)) if self.varies(k, axis)]

    def holder(self, array: Array) -> int | None:
        """The first factor that varies along all axes that an array with the value's axes does."""
        axes = [a for a, n in enumerate(array.shape) if n > 1]
        for k in range(len(self.factors)):
            if all(self.varies(k, a) for a in axes):
                return k
        return None

    def with_gain(self, gain: Array, shared: bool) -> "LowRank":
        """The value times an array with its axes, of size 1 where the array does not vary."""
        return self.replace(gains=(*self.gains, gain), shared=(*self.shared, shared))

    def masked(self, w: Array, mask: Array) -> "LowRank":
        """The value with another ``w``, and with noise that is multiplied by an array.

        Args:
          w: the weights, already multiplied.
          mask: array with the axes of the value, the same for every member. It becomes part of the
            factor that varies along its axes, and otherwise a factor that all ranks share.
        """
        k = self.holder(mask)
        mask = mask.astype(self.factors[0].dtype)
        if k is None:
            tags = (*self.tags, frozenset()) if self.tags else ()
            return self.replace(w=w, factors=(*self.factors, mask[None]), tags=tags)
        factors = [f * mask if i == k else f for i, f in enumerate(self.factors)]
        return self.replace(w=w, factors=tuple(factors))

    def absorb_gains(self) -> "LowRank | None":
        """The value with its gains multiplied in; None where a gain is a member's own."""
        if not all(self.shared):
            return None
        value = self.replace(gains=(), shared=())
        for gain in self.gains:
            value = value.masked(value.w * gain.astype(value.w.dtype), gain)
        return value

    def spread(self, shape: tuple[int, ...]) -> "LowRank":
        """The value broadcast along axes of size 1; a scalar to any shape."""
        if self.shape == shape:
            return self
        w = jnp.broadcast_to(self.w, shape)
        if self.ndim == len(shape):
            return self.replace(w=w)
        ones = (1,) * len(shape)
        factors = tuple(f.reshape(-1, *ones) for f in self.factors)
        return self.replace(w=w, factors=factors, gains=tuple(g.reshape(ones) for g in self.gains))

    @property
    def thin(self) -> bool:
        """Whether the built array is no larger than a factor of one rank."""
        # By shapes: a slice would add equations to the program.
        return self.w.size <= max(math.prod(factor.shape[1:]) for factor in self.factors)

    def replace(self, **changes: Any) -> "LowRank":
        return dataclasses.replace(self, **changes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Upcast(Lazy):
    """A perturbed array held in float32 that stands for one of the narrower ``dtype``.

    Attributes:
      value: float32 array ``[*shape]``.
      dtype: bfloat16, float16 or another narrow float type, or int8.
    """

    value: Part
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def ndim(self) -> int:
        return self.value.ndim

    @property
    def arithmetic(self) -> ValueArithmetic:
        return QUANTISED if is_integer(self.dtype) else FLOATS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LateBroadcast(Lazy):
    """``value`` broadcast to ``shape``, not carried out; it has size 1 along the new axes."""

    value: Part
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        return self.value.dtype


Value = Any  # an array, a Python number from a literal, or a Lazy value


def is_lazy(value: Value) -> bool:
    """Whether a value is anything but an array."""
    return isinstance(value, Lazy)


def arithmetic_of(value: Value) -> ValueArithmetic | None:
    """The arithmetic of a perturbed value; None for an array."""
    if isinstance(value, LateBroadcast):
        return arithmetic_of(value.value)
    return value.arithmetic if isinstance(value, LowRank | Upcast) else None


def broadcast_late(x: ArrayLike | Upcast, shape: tuple[int, ...], where: tuple[int, ...]) -> Value:
    """``lax.broadcast_in_dim`` that is carried out where its result is used."""
    thin = [1] * len(shape)
    for axis, out in enumerate(where):
        thin[out] = jnp.shape(x)[axis]
    if isinstance(x, Upcast):
        return LateBroadcast(Upcast(x.value.reshape(thin), x.dtype), shape)
    return LateBroadcast(jnp.reshape(x, thin), shape)


def materialize(value: Value) -> Value:
    """Carries out a broadcast that was put off; other values come back as they are."""
    if not isinstance(value, LateBroadcast):
        return value
    if isinstance(value.value, Upcast):
        return Upcast(jnp.broadcast_to(value.value.value, value.shape), value.dtype)
    return jnp.broadcast_to(value.value, value.shape)


def narrow(value: Value) -> Value:
    """An Upcast value as the array of the type that it stands for."""
    return value.value.astype(value.dtype) if isinstance(value, Upcast) else value


def build(value: LowRank) -> Array:
    """The perturbed array ``[*shape]``; float32 where weights are narrower than the noise."""
    return value.arithmetic.build(value)
