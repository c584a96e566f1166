"""Integer arithmetic of perturbed int8 parameters: shifts, rounding, bounds against overflow.

The fixed point is that of arXiv 2511.16652 (integer pretraining): 16 stands for 1, parameters and
factors are int8 in [-127, 127], and sigma is ``2^-s``. Factors of rank r have standard deviation
``16 r^(-1/4)``, so that ``sum_r A_r B_r`` has standard deviation ``16 * 16`` for every rank; a shift
by ``4 + s`` turns that into a perturbation of ``16 sigma``.
"""

import math
from collections.abc import Sequence
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Int32, Integer

from eggroll.values.dtypes import is_integer as is_integer

# Parameters, factors and saturated results are in [-LARGEST, LARGEST]; -128 is never used.
LARGEST = 127
# 2^FRACTION stands for 1.
FRACTION = 4
INT32_MAX = 2**31 - 1

# How the noise of a product is summed in int32 (:func:`fits`).
Form = Literal["whole", "split"]
Tree = TypeVar("Tree")


def shift_of(sigma: float) -> int:
    """The right shift of a product of two factors that gives noise of this sigma.

    Raises:
      ValueError: ``sigma`` is not a power of two from 2**-12 to 16.

    Example:
      >>> shift_of(2**-4), shift_of(16.0)
      (8, 0)
    """
    mantissa, exponent = math.frexp(sigma) if math.isfinite(sigma) and sigma > 0 else (0.0, 0)
    shift = FRACTION - (exponent - 1)
    # A shift by more than 16 leaves nothing of a product of two factors.
    if mantissa != 0.5 or not 0 <= shift <= 16:
        raise ValueError(
            f"sigma={sigma!r}: for int8 parameters it must be a power of two from 2**-12 to 16, such as "
            "2**-4"
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
    # |x| + half stays below 2^31 because all sums of products here have |x| <= 2^30.
    size = (jnp.abs(x) + (1 << (shift - 1))) >> shift
    return jnp.where(x < 0, -size, size)


def floor_divide(x: Int32[Array, "*shape"], by: int) -> Int32[Array, "*shape"]:
    """``floor(x / by)`` for a positive constant; a shift where the constant is a power of two.

    Example:
      >>> floor_divide(jnp.array([-353, -352, -1, 351, 352]), 352).tolist()
      [-2, -1, -1, 0, 1]
    """
    if by & (by - 1) == 0:
        return x >> (by.bit_length() - 1)
    # lax.div truncates towards zero. Subtracting by - 1 from x first could overflow.
    return jnp.where(x < 0, -1 - lax.div(-1 - x, jnp.int32(by)), lax.div(x, jnp.int32(by)))


def isqrt(x: Int32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """``floor(sqrt(x))`` for ``0 <= x < 2^31``, one bit after the other.

    Example:
      >>> isqrt(jnp.array([0, 1, 3, 4, 2147395599, 2147395600, 2147483647])).tolist()
      [0, 1, 1, 2, 46339, 46340, 46340]
    """

    # The root has at most 16 bits; a bit is kept where the square stays at or below x. Squares up
    # to (2^16 - 1)^2 need the range of uint32.
    def bit(k: Array, root: Array) -> Array:
        tried = root | (jnp.uint32(1) << (15 - k).astype(jnp.uint32))
        return jnp.where(tried * tried <= x.astype(jnp.uint32), tried, root)

    return lax.fori_loop(0, 16, bit, jnp.zeros(x.shape, jnp.uint32)).astype(jnp.int32)


# ---------------------------------------------------------------- perturbations


def built(w: Array, factors: Sequence[Array], sign: Array, shift: int) -> Array:
    """``w + sign * round(sum_r prod_k factors[k][r] / 2^shift)``, saturated, in the type of ``w``.

    Two factors in [-127, 127] give at most ``rank * 127^2``, which is below 2^30 up to rank 66,000.
    """
    noise = jnp.ones((), jnp.int32)
    for factor in factors:
        noise = noise * factor.astype(jnp.int32)
    noise = shift_round(noise.sum(0), shift)
    return saturate(w.astype(jnp.int32) + sign * noise).astype(w.dtype)


def fits(fan_in: int, dtype: DTypeLike, rank: int, shift: int) -> Form | None:
    """How ``((x A) B) >> shift``, summed over the rank before the shift, is computed in int32.

    Let t = x A. Then ``|t| <= fan_in * max|x| * 127``, and the sum of ``t B`` is at most
    ``rank * 127`` times that. Where this bound is below 2^31 (for int8 data up to
    ``fan_in * rank = 1040``) the sum is formed directly: "whole". Otherwise t is split into
    ``t = 2^shift high + low`` with ``0 <= low < 2^shift``, and exactly

        sum(t B) >> shift  ==  sum(high B) + (sum(low B) >> shift)

    Here ``|sum(low B)| < 2^shift * rank * 127``, and the total is the perturbation itself, which has
    to fit beside the product with the matrix. Data of 32 bits have no bound of their own, but A and
    B are bounded as the matrix is: t fits where the model's own product fits for any matrix.

    Returns:
      None where neither form is sure to fit.

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
    # Beside the product with the matrix itself; 1 is for rounding downwards.
    if narrow and largest + (largest * rank * LARGEST >> shift) + 1 > INT32_MAX:
        return None
    return "split"


# ---------------------------------------------------------------- sums over the population

# A sum over pairs of ``F A B`` with |F| <= 1 reaches ``pairs * rank * 127^2``, so int32 holds it for
# up to 133,144 pairs (at rank 1) for any noise. Beyond that, chunks of fewer pairs are summed in
# int32, and the sums of chunks as two limbs: high = x >> 16 and low = x & 0xffff. The limbs fit for
# up to 32,767 chunks and devices, and integer sums do not depend on the order.
LIMB = 16
Limbs = tuple[Array, Array]


def pairs_in_int32(rank: int) -> int:
    """The number of pairs that a sum in int32 holds for any noise.

    Example:
      >>> pairs_in_int32(1)
      133144
    """
    return INT32_MAX // (rank * LARGEST**2)


def to_limbs(x: Tree) -> Tree:
    """A tree of int32 arrays with (high, low) limbs in place of each array."""
    return jax.tree.map(lambda v: (v >> LIMB, v & 0xFFFF), x)


def from_limbs(high: Int32[Array, "*shape"], low: Int32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """The number that two limbs stand for, saturated at ``+-(2^31 - 1)``.

    Example:
      >>> from_limbs(jnp.array([1, -2, 40000, -40000]), jnp.array([65537, 5, 0, 0])).tolist()
      [131073, -131067, 2147483647, -2147483647]
    """
    high, low = high + (low >> LIMB), low & 0xFFFF
    # The range is symmetric so that the result can be negated. Numbers with high = -2^15 are
    # saturated too; no update distinguishes them.
    inside = (high << LIMB) | low
    return jnp.where(high >= 2**15, INT32_MAX, jnp.where(high <= -(2**15), -INT32_MAX, inside))
