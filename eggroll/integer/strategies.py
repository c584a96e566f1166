"""An evolution strategy for int8 parameters."""

from typing import Any

import optax

from eggroll import shaping
from eggroll.integer.noise import normal
from eggroll.strategy import EvolutionStrategy


def strategy(
    *,
    population: int,
    optimizer: optax.GradientTransformation,
    shift: int = 4,
    rank: int | str = 1,
    **settings: Any,
) -> EvolutionStrategy:
    """An :class:`EvolutionStrategy` for int8 parameters.

    Args:
      population: number of members; even.
      optimizer: :func:`threshold`, or a chain that ends with it.
      shift: sigma is ``2^-shift``, in units of 1 (the integer 16); from -4 to 12.
      rank: rank of the noise of matrices.
      **settings: other fields of an EvolutionStrategy: ``chunk``, ``mesh``, ``plan``, ...

    Returns:
      ``EvolutionStrategy(noise=normal(), shaping=pair_sign(), sigma=2**-shift, ...)``.

    Raises:
      ValueError: a setting is wrong.

    Example:
      The strategy learns the subset of 16 inputs whose sums match the targets.

      >>> import jax
      >>> import jax.numpy as jnp
      >>> from eggroll.integer import threshold
      >>> def fitness(params, key, x, y):
      ...     sums = jax.lax.dot(x, params["w"], preferred_element_type=jnp.int32) >> 4
      ...     return -jnp.abs(sums - y).sum()
      >>> x = jax.random.randint(jax.random.key(0), (32, 16), -64, 65, jnp.int8)
      >>> y = x[:, :8].astype(jnp.int32) @ jnp.ones((8, 4), jnp.int32)
      >>> es = strategy(population=64, optimizer=threshold(0.3))
      >>> state = es.init({"w": jnp.zeros((16, 4), jnp.int8)}, jax.random.key(1))
      >>> start = fitness(es.params(state), None, x, y)
      >>> state = es.optimize(state, fitness, 100, x, y)
      >>> bool(fitness(es.params(state), None, x, y) > start / 5)
      True
    """
    settings = {"noise": normal(), "shaping": shaping.pair_sign(), **settings}
    return EvolutionStrategy(
        population=population, optimizer=optimizer, sigma=2.0**-shift, rank=rank, **settings
    )
