"""Types of numbers: which are narrow, and in which type their sums are formed."""

import jax.numpy as jnp
from jax.typing import DTypeLike


def is_integer(dtype: DTypeLike) -> bool:
    """Whether a type holds integers.

    Example:
      >>> is_integer(jnp.int8), is_integer(jnp.float32)
      (True, False)
    """
    return jnp.issubdtype(dtype, jnp.integer)


def is_narrow(dtype: DTypeLike) -> bool:
    """Whether a float type is narrower than float32 (bfloat16, float16, float8).

    Example:
      >>> is_narrow(jnp.bfloat16), is_narrow(jnp.float32), is_narrow(jnp.int8)
      (True, False, False)
    """
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def accumulator(dtype: DTypeLike) -> DTypeLike:
    """The type in which sums of ``dtype`` are formed: int32, float32, or the type itself.

    Example:
      >>> jnp.dtype(accumulator(jnp.bfloat16)), jnp.dtype(accumulator(jnp.int8))
      (dtype('float32'), dtype('int32'))
    """
    if is_integer(dtype):
        return jnp.int32 if jnp.iinfo(dtype).bits < 32 else dtype
    return jnp.float32 if is_narrow(dtype) else dtype
