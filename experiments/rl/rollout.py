"""One episode of a gymnax environment as a function of a policy's parameters and a key.

An evolution strategy scores a member by whole episodes, so the environment's own ``step``, which
starts a new episode by itself, is passed over: ``step_env`` is looped until the first end. Under
``vmap`` the loop runs until the last member is done, and members that are done stay as they are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from experiments.rl.environments import Task
from experiments.rl.policy import Policy
from experiments.rl.statistics import Statistics, Sums, add, no_sums


class Episode(NamedTuple):
    """What one episode came to.

    Attributes:
        score: sum of the rewards up to and including the last step.
        steps: number of steps taken.
        seen: sums over the observations that were acted upon; None unless asked for.
    """

    score: Float[Array, ""]
    steps: Int[Array, ""]
    seen: Sums | None


def run_episode(
    task: Task,
    policy: Policy,
    params: PyTree,
    statistics: Statistics,
    key: Key[Array, ""],
    deterministic: bool = True,
    watch: bool = False,
) -> Episode:
    """Plays one episode from reset until it terminates or reaches the time limit.

    Args:
        task: the environment.
        policy: chooses an action for every observation.
        params: the policy's parameters.
        statistics: of the observations before this generation.
        key: decides the start, the environment's chance and the sampled actions.
        deterministic: take the most likely action; otherwise sample it.
        watch: also sum up the observations.
    """
    reset_key, episode_key = jax.random.split(key)
    observation, state = task.env.reset(reset_key, task.env_params)

    def step(carry: tuple) -> tuple:
        observation, state, episode, _ = carry
        policy_key, env_key = jax.random.split(jax.random.fold_in(episode_key, episode.steps))
        encoded = task.encode(observation)
        action = policy.act(params, statistics, encoded, None if deterministic else policy_key)
        observation, state, reward, terminated, _ = task.env.step_env(
            env_key, state, action, task.env_params
        )
        seen = None if episode.seen is None else add(episode.seen, statistics, encoded)
        episode = Episode(episode.score + reward, episode.steps + 1, seen)
        over = terminated | task.env.is_truncated(state, task.env_params)
        return observation, state, episode, over

    start = Episode(jnp.float32(0), jnp.int32(0), no_sums(task.observations) if watch else None)
    carry = (observation, state, start, jnp.array(False))
    return jax.lax.while_loop(lambda carry: ~carry[-1], step, carry)[2]
