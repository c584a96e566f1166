"""Arithmetic for every dtype: float32 at least, norms without overflow, complex entries as pairs.

A complex array of n entries counts as a real one of 2n, with the inner product Re(conj(a) b). Its
entries have a modulus and a direction z / |z|, where real ones have an absolute value and a sign.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Inexact, PyTree


def compute_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype that sums and products are taken in: float32 in place of anything narrower.

    Example:
      >>> compute_dtype(jnp.bfloat16), compute_dtype(jnp.complex64)
      (dtype('float32'), dtype('complex64'))
    """
    dtype = jnp.dtype(dtype)
    is_wide = jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 32
    return dtype if is_wide else jnp.dtype(jnp.float32)


def common_dtype(a: DTypeLike, b: DTypeLike) -> jnp.dtype:
    """The dtype of what is computed from two arrays: theirs if it is one, else at least float32.

    Example:
      >>> common_dtype(jnp.bfloat16, jnp.bfloat16), common_dtype(jnp.bfloat16, jnp.float16)
      (dtype(bfloat16), dtype('float32'))
    """
    a, b = jnp.dtype(a), jnp.dtype(b)
    return a if a == b else jnp.promote_types(compute_dtype(a), compute_dtype(b))


def real_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of a modulus.

    Example:
      >>> real_dtype(jnp.complex64), real_dtype(jnp.float16)
      (dtype('float32'), dtype('float16'))
    """
    return jnp.finfo(dtype).dtype


def wide(x: ArrayLike) -> Array:
    """An array, a NumPy array or a Python number as an array of :func:`compute_dtype`."""
    x = jnp.asarray(x)
    return x.astype(compute_dtype(x.dtype))


def zeros_like(tree: PyTree, dtype: DTypeLike | None = None) -> PyTree:
    """Zeros of the shapes and shardings of a tree, and of its dtypes unless one is given.

    Zeros for a Python number have a dtype of their own (not a weak one), which updates can keep.
    """
    return jax.tree.map(
        lambda x: jnp.zeros_like(x, jnp.result_type(x) if dtype is None else dtype), tree
    )


def real_product(a: Inexact[Array, "..."], b: Inexact[Array, "..."]) -> Float[Array, "..."]:
    """Re(conj(a) b), entry by entry; the sum is the inner product of real and imaginary parts."""
    if not (jnp.iscomplexobj(a) or jnp.iscomplexobj(b)):
        return a * b
    return a.real * b.real + a.imag * b.imag


def scaled(
    z: Inexact[Array, "*shape"], axes: tuple[int, ...] | None = None
) -> tuple[Inexact[Array, "*shape"], Float[Array, "..."]]:
    """``z / scale`` and the scale, the largest absolute value of a real or imaginary part.

    Powers of the scaled array and their sums do not overflow, and what underflows does not count.
    The scale of zeros is 1. One entry that is not finite leaves none finite.

    Args:
      z: the array.
      axes: axes that have a scale in common, and the size 1 in it; None: one scalar for all.
    """
    top = jnp.max(_largest_part(z), axis=axes, keepdims=axes is not None, initial=0)
    scale = jnp.where(top > 0, top, 1)
    return divided(z, scale), scale


def _largest_part(z: Inexact[Array, "*shape"]) -> Float[Array, "*shape"]:
    if not jnp.iscomplexobj(z):
        return jnp.abs(z)
    return jnp.maximum(jnp.abs(z.real), jnp.abs(z.imag))


def divided(z: Inexact[Array, "..."], by: Float[Array, "..."]) -> Inexact[Array, "..."]:
    """z over real numbers; complex division would square them."""
    return jax.lax.complex(z.real / by, z.imag / by) if jnp.iscomplexobj(z) else z / by


def euclidean(z: Inexact[Array, "..."]) -> Float[Array, ""]:
    """The Euclidean norm of all entries; it overflows only where its value does."""
    z, scale = scaled(z)
    return scale * jnp.sqrt(jnp.sum(real_product(z, z)))


def sign(z: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
    """z / |z|, and 0 at 0; of real entries the sign."""
    if not jnp.iscomplexobj(z):
        return jnp.sign(z)
    # First by the larger part, so that the modulus neither overflows nor underflows.
    top = _largest_part(z)
    z = divided(z, jnp.where(top > 0, top, 1))
    return divided(z, jnp.where(top > 0, jnp.abs(z), 1))


def opposes(a: Inexact[Array, "..."], b: Inexact[Array, "..."]) -> Bool[Array, "..."]:
    """Whether entries do not point to the same side: the product of real ones is not positive.

    False where an entry is not a number, so that a selection by it keeps those.
    """
    return real_product(sign(a), sign(b)) <= 0
