"""Integer arithmetic of perturbed int8 parameters: shifts, rounding, and why nothing overflows.

The fixed point is that of arXiv 2511.16652 (integer pretraining): 16 stands for 1, parameters and factors
are int8 in [-127, 127], and sigma is ``2^-s``. Factors of rank r have standard deviation
``16 r^(-1/4)``, so that ``sum_r A_r B_r`` has that of ``16 * 16`` for every rank, and a shift by ``4 + s``
makes it a perturbation of ``16 sigma``.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Int32, Integer

# Parameters, factors and what comes of saturation are in [-LARGEST, LARGEST]; -128 is never used.
LARGEST = 127
# 2^FRACTION stands for 1.
FRACTION = 4
INT32_MAX = 2**31 - 1


def is_integer(dtype: DTypeLike) -> bool:
    return jnp.issubdtype(dtype, jnp.integer)


def shift_of(sigma: float) -> int:
    """How far the product of two factors is shifted to the right for noise of this sigma.

    Raises:
      ValueError: for a sigma that is no power of two, or so large that the shift would be negative.

    Example:
      >>> shift_of(2**-4), shift_of(16.0)
      (8, 0)
    """
    mantissa, exponent = math.frexp(sigma) if math.isfinite(sigma) and sigma > 0 else (0.0, 0)
    shift = FRACTION - (exponent - 1)
    # At 16 products of two factors are shifted to nothing.
    if mantissa != 0.5 or not 0 <= shift <= 16:
        raise ValueError(
            f"sigma={sigma!r}: for int8 parameters a power of two from 2**-12 to 16, such as 2**-4, is right"
        )
    return shift


def saturate(x: Integer[Array, "*shape"]) -> Integer[Array, "*shape"]:
    """Clips to [-127, 127], in the type that came in."""
    return jnp.clip(x, -LARGEST, LARGEST)


def shift_round(x: Int32[Array, "*shape"], shift: int) -> Int32[Array, "*shape"]:
    """``x / 2^shift`` rounded to the nearest, halves away from zero: odd in ``x``.

    Example:
      >>> shift_round(jnp.array([-24, -8, -7, 7, 8, 24]), 4).tolist()
      [-2, -1, 0, 0, 1, 2]
    """
    if shift == 0:
        return x
    # |x| + half stays below 2^31 for |x| <= 2^30, which is true of all sums of products here.
    size = (jnp.abs(x) + (1 << (shift - 1))) >> shift
    return jnp.where(x < 0, -size, size)


def floor_divide(x: Int32[Array, "*shape"], by: int) -> Int32[Array, "*shape"]:
    """``floor(x / by)`` for a positive constant; a shift where it is a power of two.

    Example:
      >>> floor_divide(jnp.array([-353, -352, -1, 351, 352]), 352).tolist()
      [-2, -1, -1, 0, 1]
    """
    if by & (by - 1) == 0:
        return x >> (by.bit_length() - 1)
    # lax.div truncates towards zero. Not x - (by - 1) first, which could overflow.
    return jnp.where(x < 0, -1 - lax.div(-1 - x, jnp.int32(by)), lax.div(x, jnp.int32(by)))


def isqrt(x: Int32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """``floor(sqrt(x))`` for ``0 <= x < 2^31``, bit by bit.

    Example:
      >>> isqrt(jnp.array([0, 1, 3, 4, 2147395599, 2147395600, 2147483647])).tolist()
      [0, 1, 1, 2, 46339, 46340, 46340]
    """

    # The root has at most 16 bits; each is kept where the square stays at or below x. Squares up to
    # (2^16 - 1)^2 need the range of uint32.
    def bit(k: Array, root: Array) -> Array:
        tried = root | (jnp.uint32(1) << (15 - k).astype(jnp.uint32))
        return jnp.where(tried * tried <= x.astype(jnp.uint32), tried, root)

    return lax.fori_loop(0, 16, bit, jnp.zeros(x.shape, jnp.uint32)).astype(jnp.int32)


# ---------------------------------------------------------------- perturbations


def built(w: Array, factors: Sequence[Array], sign: Array, shift: int) -> Array:
    """``w + sign * round(sum_r prod factors[r] / 2^shift)``, saturated; the type of ``w``.

    Two factors in [-127, 127] give at most ``rank * 127^2``, which is below 2^30 up to rank 66,000.
    """
    noise = jnp.ones((), jnp.int32)
    for factor in factors:
        noise = noise * factor.astype(jnp.int32)
    noise = shift_round(noise.sum(0), shift)
    return saturate(w.astype(jnp.int32) + sign * noise).astype(w.dtype)


def fits(fan_in: int, dtype: DTypeLike, rank: int, shift: int) -> Literal["whole", "split"] | None:
    """How ``((x A) B) >> shift``, summed over the rank before the shift, is computed in int32.

    With t = x A: ``|t| <= fan_in * max|x| * 127``, and the sum of ``t B`` at most ``rank * 127`` times
    that. Where it is below 2^31 the sum is taken as it stands ("whole"): for int8 data up to
    ``fan_in * rank = 1040``. Else ("split") t is taken apart, ``t = 2^shift high + low`` with
    ``0 <= low < 2^shift``, and

        sum(t B) >> shift  ==  sum(high B) + (sum(low B) >> shift)

    exactly. ``|sum(low B)| < 2^shift * rank * 127``, and the whole is the perturbation itself, which has
    to fit beside the product with the matrix. Data of 32 bits have no bound of their own, but A and B
    have that of the matrix: t fits where the model's own product does whatever its matrix.

    Returns:
      None where neither is sure to fit.

    Example:
      >>> fits(1040, jnp.int8, 1, 8), fits(1041, jnp.int8, 1, 8), fits(140_000, jnp.int8, 1, 8)
      ('whole', 'split', None)
    """
    narrow = jnp.iinfo(dtype).bits < 32
    largest = fan_in * max(-jnp.iinfo(dtype).min, jnp.iinfo(dtype).max) * LARGEST
    if narrow and largest * rank * LARGEST <= INT32_MAX:
        return "whole"
    if (1 << shift) * rank * LARGEST > INT32_MAX:
        return None
    # With the product with the matrix itself beside it; 1 for the rounding downwards.
    if narrow and largest + (largest * rank * LARGEST >> shift) + 1 > INT32_MAX:
        return None
    return "split"


# ---------------------------------------------------------------- sums over the population

# A sum over pairs of ``F A B`` with |F| <= 1 reaches ``pairs * rank * 127^2``, so int32 holds it for
# up to 133,144 pairs (at rank 1) whatever the noise. Beyond that chunks of fewer pairs are summed in
# int32, and their sums as two limbs: high = x >> 16 and low = x & 0xffff. Up to 32,767 chunks and
# devices the limbs fit, and like all integer sums theirs do not depend on the order.
LIMB = 16
Limbs = tuple[Array, Array]


def pairs_in_int32(rank: int) -> int:
    """The number of pairs that a sum in int32 holds whatever the noise.

    Example:
      >>> pairs_in_int32(1)
      133144
    """
    return INT32_MAX // (rank * LARGEST**2)


def to_limbs(x: Any) -> Any:
    return jax.tree.map(lambda v: (v >> LIMB, v & 0xFFFF), x)


def from_limbs(high: Int32[Array, "*shape"], low: Int32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """The number of two limbs, saturated at ``+-(2^31 - 1)``.

    Example:
      >>> from_limbs(jnp.array([1, -2, 40000, -40000]), jnp.array([65537, 5, 0, 0])).tolist()
      [131073, -131067, 2147483647, -2147483647]
    """
    high, low = high + (low >> LIMB), low & 0xFFFF
    # Symmetric, so that it can be negated. Numbers with high = -2^15 are saturated too: nothing
    # that an update asks of them tells them apart.
    inside = (high << LIMB) | low
    return jnp.where(high >= 2**15, INT32_MAX, jnp.where(high <= -(2**15), -INT32_MAX, inside))
