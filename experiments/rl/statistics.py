"""Mean and variance of the observations of a run, merged batch by batch."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Statistics(NamedTuple):
    """Running moments of observations.

    Attributes:
        seen: how many.
        mean: their mean.
        squares: sum of their squared deviations from it.
    """

    seen: Float[Array, ""]
    mean: Float[Array, "observations"]
    squares: Float[Array, "observations"]


class Sums(NamedTuple):
    """What a batch of observations adds; deviations are from the mean before it.

    Attributes:
        seen: how many.
        first: sum of the deviations.
        second: sum of the squared deviations.
    """

    seen: Float[Array, "*batch"]
    first: Float[Array, "*batch observations"]
    second: Float[Array, "*batch observations"]


def nothing_seen(observations: int) -> Statistics:
    zeros = jnp.zeros(observations, jnp.float32)
    return Statistics(jnp.float32(0), zeros, zeros)


def no_sums(observations: int) -> Sums:
    return Sums(*nothing_seen(observations))


def add(sums: Sums, statistics: Statistics, observation: Float[Array, "observations"]) -> Sums:
    """The sums with one observation more."""
    deviation = observation - statistics.mean
    return Sums(sums.seen + 1, sums.first + deviation, sums.second + deviation**2)


def merge(statistics: Statistics, sums: Sums) -> Statistics:
    """The statistics with a batch more (Chan, Golub and LeVeque, 1979).

    Args:
        statistics: those that the deviations in `sums` were taken from.
        sums: of the batch; leading axes are summed over.

    Example:
        >>> x = jnp.array([[1.0, 5.0], [3.0, 5.0]])
        >>> start = nothing_seen(2)
        >>> sums = add(add(no_sums(2), start, x[0]), start, x[1])
        >>> merge(start, sums).mean.tolist()
        [2.0, 5.0]
    """
    n, first, second = sums.seen.sum(), _total(sums.first), _total(sums.second)
    shift = first / jnp.maximum(n, 1)  # of the batch's mean from the old one
    seen = statistics.seen + n
    share = n / jnp.maximum(seen, 1)
    within = jnp.maximum(second - n * shift**2, 0)
    between = statistics.seen * share * shift**2
    return Statistics(seen, statistics.mean + share * shift, statistics.squares + within + between)


def normalise(
    statistics: Statistics, observation: Float[Array, "*batch observations"]
) -> Float[Array, "*batch observations"]:
    """Scaled to zero mean and unit variance, cut at 10; as it is while nothing was seen."""
    variance = statistics.squares / jnp.maximum(statistics.seen, 1)
    # An entry that never moved says nothing: it becomes 0.
    scale = jnp.where(variance > 1e-8, jnp.sqrt(jnp.maximum(variance, 1e-8)), 1)
    scaled = jnp.clip((observation - statistics.mean) / scale, -10, 10)
    return jnp.where(statistics.seen > 0, scaled, observation)


def _total(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1]).sum(0)
