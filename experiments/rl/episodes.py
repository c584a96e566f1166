"""Episodes of a trained policy: those that measure it, and fresh ones that decided nothing before.

Every purpose has keys (JAX) or starts (outside environments) of its own, so that no episode serves two:
training, held-out episodes (early stopping looks at these), fresh episodes (which confirm what was learned),
those of `eggroll eval`, and the film.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from experiments.rl.config import Config
from experiments.rl.environments import Environment, OutsideEnvironment, make_environment
from experiments.rl.libraries import own, parse_settings
from experiments.rl.policy import Policy, make_policy
from experiments.rl.rollout import run_episode
from experiments.run import own_code
from experiments.run.trainer import Carry

# What is folded into the key of a seed, or follows the seed of a stream of NumPy (0: training, 1: held out).
# Without it, the keys of 0, 1 and 2 are those that `split` gives (`experiments.rl.evolution.keys`).
FRESH, EVALUATED, FILM, ROUNDS, ACTIONS = 0xF2E5, 0x5EED, 0xF173, 0x9909, 0xAC75
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


def play(
    config: Config,
    policy: Policy,
    environment: Environment[Any],
    carry: Carry,
    keys: Key[Array, "episodes"],
) -> Float[Array, "episodes"]:
    """Returns of the mean policy, an episode a key."""
    params, statistics = carry.learner.params, carry.own.statistics
    one = lambda key: run_episode(
        environment, policy, params, statistics, key, config.deterministic
    )
    return jax.vmap(one)(keys).score


def files_of(config: Config) -> tuple[Path, ...]:
    """The file that an environment of one's own is in: with other content a run does not go on."""
    found = own_code.file_of(config.env) if own.in_file(config.env) else None
    return () if found is None else (found,)


def fresh_keys(seed: Array | int, generation: Array | int, episodes: int) -> Key[Array, "episodes"]:
    """Keys of the fresh episodes of a JAX environment: others for every seed and generation."""
    key = jax.random.fold_in(jax.random.key(seed), FRESH)
    return jax.random.split(jax.random.fold_in(key, generation), episodes)


def fresh_starts(seed: int, generation: int, episodes: int) -> np.ndarray:
    """Seeds of the fresh episodes of an outside environment, [episodes]."""
    return np.random.SeedSequence([seed, FRESH_STREAM, generation]).generate_state(episodes) // 2


def evaluated_keys(seed: int, episodes: int) -> Key[Array, "episodes"]:
    """Keys of the episodes of `eggroll eval` in a JAX environment."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), EVALUATED), episodes)


def evaluated_starts(seed: int, episodes: int) -> np.ndarray:
    """Seeds of the episodes of `eggroll eval` in an outside environment, [episodes]."""
    return np.random.SeedSequence([seed, EVALUATED_STREAM]).generate_state(episodes) // 2


def film_key(seed: int) -> Key[Array, ""]:
    """Key of the episode that is drawn."""
    return jax.random.fold_in(jax.random.key(seed), FILM)


def round_key(seed: Array | int, generation: Array | int) -> Key[Array, ""]:
    """Key of a generation of PPO: of the environments' chance, the sampled actions and the order of steps."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), ROUNDS), generation)


def action_keys(seed: Array | int, starts: Array | np.ndarray) -> Key[Array, "episodes"]:
    """Keys of the actions that the mean policy samples in an outside environment, one for every start.

    Args:
        seed: of the run.
        starts: seeds of the episodes, whole numbers [episodes].
    """
    key = jax.random.fold_in(jax.random.key(seed), ACTIONS)
    return jax.vmap(lambda start: jax.random.fold_in(key, start))(jnp.asarray(starts))
