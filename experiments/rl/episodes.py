"""Episodes of a trained policy: those that measure it, and fresh ones that decided nothing before.

Every purpose has keys (JAX) or starts (outside environments) of its own, so that no episode serves two:
training, held-out episodes (early stopping looks at these), fresh episodes (which confirm what was learned)
and those of `eggroll eval`.
"""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from experiments.rl import evolution
from experiments.rl.config import Config
from experiments.rl.environments import Environment, OutsideEnvironment, make_environment
from experiments.rl.libraries import parse_settings
from experiments.rl.policy import Policy, make_policy
from experiments.rl.rollout import run_episode
from experiments.run.seeds import many

if TYPE_CHECKING:
    from experiments.rl.outside import Outside

# What is folded into the key of a seed, or follows the seed of a stream of NumPy (0: training, 1: held out).
FRESH, EVALUATED = 0xF2E5, 0x5EED
FRESH_STREAM, EVALUATED_STREAM = 2, 3


def environment_of(config: Config) -> Environment[Any] | OutsideEnvironment:
    """The environment that the settings describe."""
    return make_environment(config.env, parse_settings(config.env_settings))


def policy_of(config: Config, environment: Environment[Any] | OutsideEnvironment) -> Policy:
    """The policy that the settings describe."""
    return make_policy(
        environment.observations, environment.actions,
        config.width, config.depth, config.activation, config.normalise,
    )  # fmt: skip


def mean(carry: Any) -> PyTree:
    """The parameters of the mean policy, from the state of either algorithm."""
    return carry.es.params if isinstance(carry, evolution.Carry) else carry.params


def play(
    config: Config,
    policy: Policy,
    environment: Environment[Any],
    carry: Any,
    keys: Key[Array, "episodes"],
) -> Float[Array, "episodes"]:
    """Returns of the mean policy, an episode a key."""
    params, statistics = mean(carry), carry.statistics
    one = lambda key: run_episode(
        environment, policy, params, statistics, key, config.deterministic
    )
    return jax.vmap(one)(keys).score


def fresh_keys(seed: Array | int, generation: int, episodes: int) -> Key[Array, "episodes"]:
    """Keys of the fresh episodes of a JAX environment: others for every seed and generation."""
    key = jax.random.fold_in(jax.random.key(seed), FRESH)
    return jax.random.split(jax.random.fold_in(key, generation), episodes)


def fresh_starts(seed: int, generation: int, episodes: int) -> np.ndarray:
    """Seeds of the fresh episodes of an outside environment, [episodes]."""
    return np.random.SeedSequence([seed, FRESH_STREAM, generation]).generate_state(episodes) // 2


def fresh_returns(
    config: Config, carry: Any, generation: int, episodes: int, outside: "Outside | None" = None
) -> np.ndarray:
    """Returns of the mean policy in episodes that no decision of the run depends on.

    Args:
        config: the run's settings.
        carry: its state.
        generation: at which the state is, so that the episodes of a run that goes on are others.
        episodes: how many.
        outside: whose worker processes play, where the environment is an outside one; else new ones.

    Returns:
        float32 [seeds, episodes].
    """
    seeds = config.seed + np.arange(config.seeds)
    keys = lambda: jax.vmap(lambda seed: fresh_keys(seed, generation, episodes))(seeds)
    starts = fresh_starts(config.seed, generation, episodes)
    return _returns(config, carry, keys, starts, outside)


def evaluate(config: Config, state: Any, episodes: int, seed: int) -> dict[str, list[float]]:
    """Returns of new episodes of a trained policy, by seed of the training.

    Args:
        config: the run's settings.
        state: its state.
        episodes: how many.
        seed: decides the episodes; they are those of no training run.
    """

    def keys() -> Array:
        key = jax.random.fold_in(jax.random.key(seed), EVALUATED)
        return jax.numpy.stack([jax.random.split(key, episodes)] * config.seeds)

    starts = np.random.SeedSequence([seed, EVALUATED_STREAM]).generate_state(episodes) // 2
    returns = _returns(config, state, keys, starts)
    return {f"seed {config.seed + i}": row.tolist() for i, row in enumerate(returns)}


def _returns(
    config: Config, carry: Any, keys: Any, starts: np.ndarray, outside: "Outside | None" = None
) -> np.ndarray:
    """[seeds, episodes]; an episode a key [seeds, episodes], or a start [episodes]."""
    environment = environment_of(config)
    if isinstance(environment, OutsideEnvironment):
        from experiments.rl.outside import Outside

        return (outside or Outside(config, environment)).returns(carry, starts)[None]
    policy = policy_of(config, environment)
    one = lambda carry, keys: play(config, policy, environment, carry, keys)
    found = keys()
    every = jax.jit(many(config.seeds)(one))(carry, found if config.seeds > 1 else found[0])
    return np.asarray(every).reshape(config.seeds, -1)
