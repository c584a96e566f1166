"""Statistics of the scores of a population."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from eggroll.arithmetic._interface import Statistics


def valid_pairs(values: Float[Array, "population tasks"]) -> Bool[Array, "pairs tasks"]:
    """Whether both members of a pair have a finite score, for each task."""
    finite = jnp.isfinite(values)
    return finite.reshape(-1, 2, values.shape[1]).all(1)


def statistics(values: Float[Array, "population tasks"]) -> Statistics:
    """Statistics over the finite scores of each member, whether or not its pair is valid."""
    finite = jnp.isfinite(values)
    paired = valid_pairs(values)
    counts = finite.sum(1).astype(values.dtype)
    score = jnp.where(finite, values, 0).sum(1) / jnp.maximum(counts, 1)
    has = counts > 0
    n = has.sum().astype(values.dtype)
    mean = jnp.where(has, score, 0).sum() / n
    std = jnp.sqrt(jnp.where(has, (score - mean) ** 2, 0).sum() / n)
    best = jnp.where(n > 0, jnp.where(has, score, -jnp.inf).max(), jnp.nan)
    worst = jnp.where(n > 0, jnp.where(has, score, jnp.inf).min(), jnp.nan)
    same = jnp.where(paired, values[0::2] == values[1::2], True).all(1) & paired.any(1)
    f32 = lambda x: x.astype(jnp.float32)
    return Statistics(
        f32(mean), f32(best), f32(worst), f32(std),
        (~finite.all(1)).sum(dtype=jnp.int32), same.sum(dtype=jnp.int32),
    )  # fmt: skip
