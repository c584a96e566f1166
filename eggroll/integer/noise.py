"""Integer normal noise: int8 factors from a counter hash and a table."""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Int8, UInt32

from eggroll.noise import Noise, bits_at
from eggroll.values.fixed_point import LARGEST


def normal() -> Noise:
    """Integer normal noise: int8 factors ``[rank, ...]`` of ``round(16 rank^(-1/4) N(0, 1))``.

    The sum over the rank of products of two factors then has the same spread for every rank. A
    counter hash gives 16 bits a sample, and a table of 64 KiB maps them to the law. Every
    probability is exact to 2^-17; the largest value is 69. Sample ``i`` of an array depends on its
    key and ``i`` alone.

    Raises (from ``sample``):
      ValueError: the dtype is not int8.

    Example:
      >>> x = normal().sample(jnp.array([1, 2], jnp.uint32), (1, 1000, 1000), jnp.int8)
      >>> y = normal().sample(jnp.array([1, 2], jnp.uint32), (16, 1000, 100), jnp.int8)
      >>> print(f"{x.std():.1f} {y.std():.1f} {x.max()}")
      16.0 8.0 69
    """
    return Noise("integer normal", _normal, integer=True)


def quantiles(rank: int) -> Int8[np.ndarray, "65536"]:
    """``round(16 rank^(-1/4) Phi^-1((u + 1/2) / 2^16))`` for every u from 0 to 2^16 - 1.

    The table is computed from the boundaries of the rounding, without an inverse of Phi.
    """
    std = 16 * rank**-0.25
    # u rounds to at least v if (u + 1/2) / 2^16 is above Phi((v - 1/2) / std).
    edges = [(1 + math.erf((v - 0.5) / (std * 2**0.5))) / 2 for v in range(1, LARGEST + 1)]
    upper = np.searchsorted(edges, (np.arange(2**15, 2**16) + 0.5) / 2**16)
    return np.concatenate([-upper[::-1], upper]).astype(np.int8)


def _normal(words: UInt32[Array, "2"], shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    if dtype != jnp.int8:
        raise ValueError(f"integer noise: expected int8, got {jnp.dtype(dtype).name}")
    size = math.prod(shape)
    bits = bits_at(words[0], words[1], lax.iota(jnp.uint32, (size + 1) // 2))
    halves = lax.bitcast_convert_type(bits, jnp.uint16).reshape(-1)[:size]
    table = jnp.asarray(quantiles(shape[0]))
    return table.at[halves].get(mode="promise_in_bounds").reshape(shape)
