"""Sums of low-rank noise: the factors of several terms side by side along the rank."""

import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from eggroll.values.lowrank import LowRank

# The factors ``[rank, *axes]`` of one term, which contain its scale if the arithmetic is linear.
Noise = tuple[Array, ...]


def noise_of(value: LowRank) -> Noise:
    """The factors of a value, with its scale in them where the arithmetic allows it."""
    factors, _ = value.arithmetic.fold_scale(value)
    return tuple(jnp.broadcast_to(f, (value.rank, *f.shape[1:])) for f in factors)


def value_of(w: Array, noises: Sequence[Noise], values: Sequence[LowRank]) -> LowRank | None:
    """The value ``w`` plus the sum of several terms of noise.

    Args:
      w: the unperturbed array.
      noises: the terms.
      values: for each term the value that it comes from; all of one arithmetic and without gains.

    Returns:
      None where the factors of the sum would be no smaller than the array.
    """
    count = max(map(len, noises))
    padded = [noise + ones_like(noise, count - len(noise)) for noise in noises]
    orders = [aligned(padded[0], noise) for noise in padded]
    parts = [[noise[k] for k in order] for noise, order in zip(padded, orders, strict=True)]
    factors = tuple(side_by_side(column) for column in zip(*parts, strict=True))
    tags = [
        [(*v.tags, *[frozenset[tuple[str, int]]()] * count)[k] for k in order]
        for v, order in zip(values, orders, strict=True)
        if v.tags
    ]
    if not tags and w.ndim and max(f[0].size for f in factors) >= w.size > 1:
        thick = [max(f[0].size for f in noise) >= w.size for noise in noises]
        if not all(thick):
            return None
    return LowRank(
        w,
        factors,
        values[0].arithmetic.fold_scale(values[0])[1],
        tuple(dict.fromkeys(path for v in values for path in v.paths)),
        all(v.activation for v in values),
        tags=tuple(frozenset().union(*own) for own in zip(*tags, strict=True)),
        arithmetic=values[0].arithmetic,
    )


def ones_like(noise: Noise, count: int) -> Noise:
    """Factors that vary along no axis, ``[rank, 1, ...]``."""
    first = noise[0]
    return (jnp.ones((first.shape[0], *[1] * (first.ndim - 1)), first.dtype),) * count


def aligned(to: Noise, noise: Noise) -> tuple[int, ...]:
    """The order of the factors of ``noise`` that enlarges those of ``to`` the least."""

    def size(order: tuple[int, ...]) -> int:
        pairs = zip(to, order, strict=True)
        shapes = [jnp.broadcast_shapes(f.shape[1:], noise[k].shape[1:]) for f, k in pairs]
        return sum(map(math.prod, shapes))

    return min(itertools.permutations(range(len(noise))), key=size)


def side_by_side(factors: Sequence[Array]) -> Array:
    """Factors in one array ``[sum of ranks, *axes]``, each broadcast to the axes of all."""
    axes = jnp.broadcast_shapes(*(f.shape[1:] for f in factors))
    return jnp.concatenate([jnp.broadcast_to(f, (f.shape[0], *axes)) for f in factors])
