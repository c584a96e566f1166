"""How fast answers can be written at most: as fast as the products of matrices alone allow."""

import time

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

ROUNDS = 3


def expected_tokens_per_s(params: PyTree, sequences: int) -> float:
    """Tokens a second of all sequences together, if decoding were its products with matrices and no more.

    The product with the largest matrix is timed on the first device, the others are taken to be as fast for
    their size. Look-ups, norms, attention and noise come on top, so that it is a bound from above.

    Args:
        params: of a model, or their shapes; what has two axes or more counts as matrices, a stack of
            them as several.
        sequences: that are written at a time.

    Example:
        >>> expected_tokens_per_s({"w": jax.ShapeDtypeStruct((2, 64, 64), jnp.float32)}, 32) > 0
        True
    """
    matrices = [x for x in jax.tree.leaves(params) if len(x.shape) > 1]
    largest = max(matrices, key=lambda x: x.shape[-2] * x.shape[-1])
    rows, columns = largest.shape[-2:]
    floats = jnp.float32 if largest.dtype == jnp.int8 else largest.dtype
    product = jax.jit(lambda x, w: x @ w.astype(x.dtype))
    x, w = jnp.ones((sequences, rows), floats), jnp.ones((rows, columns), largest.dtype)
    product(x, w).block_until_ready()
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        product(x, w).block_until_ready()
        times.append(time.perf_counter() - began)
    entries = sum(x.size for x in matrices)
    return sequences / (min(times) * entries / (rows * columns))
