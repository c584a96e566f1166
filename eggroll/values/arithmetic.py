"""How a perturbed value computes with its noise: in floats, in fixed point, or on int8 weights.

A :class:`~eggroll.values.lowrank.LowRank` names its arithmetic. Rules of the interpreter move and
multiply parts of values and ask the arithmetic for what depends on the numbers themselves: the sum
of weights and noise, the noise of a product, a change of sign or of type.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from eggroll.values import fixed_point
from eggroll.values.contraction import Labelled, align, chain, terms
from eggroll.values.dtypes import accumulator, is_integer

if TYPE_CHECKING:
    from eggroll.values.lowrank import LowRank


class ValueArithmetic(abc.ABC):
    """What a low-rank value needs of its numbers. Implementations are hashable: they are static.

    Attributes:
      linear: whether the value is exactly ``W + scale * sum_r A_r B_r``, so that sums, multiples and
        products of values may be formed from those of their parts. Where it is False, only the
        rules that are declared for integers apply.
      as_integers: whether an operation on the parameter's own integer type is defined.
    """

    linear: ClassVar[bool] = True
    as_integers: ClassVar[bool] = True

    @abc.abstractmethod
    def build(self, value: "LowRank") -> Array:
        """The perturbed array ``[*shape]``; float32 where weights are narrower than the noise."""

    @abc.abstractmethod
    def perturbation(
        self,
        x: Array,
        x_labels: Sequence[str],
        value: "LowRank",
        labels: Sequence[str],
        out_labels: Sequence[str],
        dtype: DTypeLike,
        precision: lax.PrecisionLike = None,
    ) -> Array:
        """``scale * sum_r einsum(x, prod_k factors[k][r])``, shaped to broadcast to the output.

        Args:
          x: the other operand of a product, one label an axis.
          x_labels: labels of the axes of ``x``.
          value: the perturbed operand; only its factors and its scale are used.
          labels: labels of the axes of ``value``.
          out_labels: labels of the axes of the output; the others are summed over.
          dtype: the type of sums and of the result.
          precision: as in ``jax.lax.dot_general``.

        Returns:
          Array with one axis for each of ``out_labels``, of full size or 1.
        """

    def fits(
        self,
        x: Array,
        x_labels: Sequence[str],
        value: "LowRank",
        labels: Sequence[str],
        out_labels: Sequence[str],
    ) -> bool:
        """Whether :meth:`perturbation` of these operands cannot overflow."""
        return True

    def negate(self, value: "LowRank") -> "LowRank":
        return value.replace(w=-value.w, scale=-value.scale)

    def fold_scale(self, value: "LowRank") -> tuple[tuple[Array, ...], Array]:
        """Factors that contain the scale, and the scale that is left."""
        first, *others = value.factors
        folded = first * value.scale.astype(first.dtype)
        return (folded, *others), jnp.ones_like(value.scale)

    def cast(
        self, value: "LowRank", dtype: DTypeLike, cast: Callable[[Array], Array]
    ) -> "LowRank | None":
        """The value in another type, or None where it has to be built for that.

        Args:
          value: the value.
          dtype: its new type.
          cast: takes the unperturbed array to that type.
        """
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        # Gains keep their type: they multiply what comes out, which is rounded with the result.
        factors = tuple(factor.astype(dtype) for factor in value.factors)
        return value.replace(w=cast(value.w), factors=factors, arithmetic=FLOATS)


@dataclasses.dataclass(frozen=True)
class Floats(ValueArithmetic):
    """Float weights and float noise."""

    def build(self, value: "LowRank") -> Array:
        dtype = accumulator(value.factors[0].dtype)
        noise = jnp.ones((), dtype)
        for factor in value.factors:
            noise = noise * factor.astype(dtype)
        out = value.w.astype(dtype) + value.scale.astype(dtype) * noise.sum(0)
        for gain in value.gains:
            out = out * gain.astype(dtype)
        return out

    def perturbation(
        self,
        x: Array,
        x_labels: Sequence[str],
        value: "LowRank",
        labels: Sequence[str],
        out_labels: Sequence[str],
        dtype: DTypeLike,
        precision: lax.PrecisionLike = None,
    ) -> Array:
        scale = value.scale.astype(dtype)
        parts = thin_products(x, x_labels, value, labels, out_labels, dtype, precision)
        return functools.reduce(jnp.add, [outer(t * scale) for t, outer in parts])


@dataclasses.dataclass(frozen=True)
class Quantised(Floats):
    """int8 weights and float noise, in units of the weights' steps.

    The integer operations of such a value are not defined: it has to be cast to a float type first.
    """

    as_integers: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class FixedPoint(ValueArithmetic):
    """int8 weights and int8 noise: ``W + sign * (sum_r A_r B_r >> shift)``.

    The scale of the value is the sign of the member in its pair and nothing else. A sign that comes
    of an operation goes into a factor, so that the two members stay mirror images of each other.
    """

    shift: int

    linear: ClassVar[bool] = False

    def build(self, value: "LowRank") -> Array:
        return fixed_point.built(value.w, value.factors, value.scale, self.shift)

    def perturbation(
        self,
        x: Array,
        x_labels: Sequence[str],
        value: "LowRank",
        labels: Sequence[str],
        out_labels: Sequence[str],
        dtype: DTypeLike,
        precision: lax.PrecisionLike = None,
    ) -> Array:
        parts = thin_products(x, x_labels, value, labels, out_labels, dtype, precision)
        if self._form(x, x_labels, value, out_labels) == "whole":
            noise = functools.reduce(jnp.add, [outer(t) for t, outer in parts]) >> self.shift
        else:
            highs, lows = [], []
            for t, outer in parts:
                highs.append(outer(t >> self.shift))
                lows.append(outer(t & ((1 << self.shift) - 1)))
            noise = functools.reduce(jnp.add, highs)
            noise = noise + (functools.reduce(jnp.add, lows) >> self.shift)
        # Shifted first, which rounds downwards, then signed: members of a pair are exact mirrors.
        return value.scale.astype(dtype) * noise

    def fits(
        self,
        x: Array,
        x_labels: Sequence[str],
        value: "LowRank",
        labels: Sequence[str],
        out_labels: Sequence[str],
    ) -> bool:
        form = self._form(x, x_labels, value, out_labels)
        contracted = [axis for axis, label in enumerate(labels) if label not in out_labels]
        count = len(value.factors)
        along = [k for k in range(count) if any(value.varies(k, axis) for axis in contracted)]
        # The bound of the split form is that of a second product that sums over the rank alone.
        return form == "whole" or (form == "split" and len(along) <= 1)

    def _form(
        self, x: Array, x_labels: Sequence[str], value: "LowRank", out_labels: Sequence[str]
    ) -> fixed_point.Form | None:
        sizes = zip(x_labels, x.shape, strict=True)
        fan_in = 1
        for label, n in sizes:
            fan_in *= n if label not in out_labels else 1
        return fixed_point.fits(fan_in, x.dtype, value.rank, self.shift)

    def negate(self, value: "LowRank") -> "LowRank":
        first, *others = value.factors
        return value.replace(w=-value.w, factors=(-first, *others))

    def fold_scale(self, value: "LowRank") -> tuple[tuple[Array, ...], Array]:
        return value.factors, value.scale

    def cast(
        self, value: "LowRank", dtype: DTypeLike, cast: Callable[[Array], Array]
    ) -> "LowRank | None":
        # The factors stay as narrow as they are. In a narrower type numbers might wrap around.
        wider = is_integer(dtype) and jnp.iinfo(dtype).min <= jnp.iinfo(value.dtype).min
        return value.replace(w=cast(value.w)) if wider else None


FLOATS = Floats()
QUANTISED = Quantised()


def thin_products(
    x: Array,
    x_labels: Sequence[str],
    value: "LowRank",
    labels: Sequence[str],
    out_labels: Sequence[str],
    dtype: DTypeLike,
    precision: lax.PrecisionLike,
) -> Iterator[tuple[Array, Callable[[Array], Array]]]:
    """The product with each rank in two steps, as thin as the rank in between.

    Yields:
      The product with all factors but the last, and the function that multiplies it by the last and
      aligns it with ``out_labels``.
    """
    out = set(out_labels)

    def times_last(x: Array, kept: tuple[str, ...], last: Labelled) -> Array:
        return align(chain((x, kept), [last], out, out_labels, dtype, precision), out_labels)

    for factors in terms(value.factors, labels):
        # The factor over the contracted axes first: what is left is as thin as the rank.
        *before, last = sorted(factors, key=lambda f: -len(set(f[1]) & set(x_labels) - out))
        t, kept = chain(
            (x, tuple(x_labels)), before, out.union(last[1]), out_labels, dtype, precision
        )
        yield t, functools.partial(times_last, kept=kept, last=last)
