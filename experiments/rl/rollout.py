"""Episodes of a gymnax environment as a function of a policy's parameters and keys.

An evolution strategy scores a member by whole episodes, so the environment's own ``step``, which
starts a new episode by itself, is passed over: ``step_env`` is looped until the first end. Under
``vmap`` the loop runs until the last member is done, and members that are done stay as they are.
A member's episodes follow one another in the one loop: side by side, all would wait for the longest
of them, and episodes of one member differ much more in their length than whole members do.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from experiments.rl.environments import Task
from experiments.rl.policy import Policy
from experiments.rl.statistics import Statistics, Sums, add, no_sums


class Episode(NamedTuple):
    """What an episode came to, or several together.

    Attributes:
        score: sum of the rewards up to and including the last step.
        steps: number of steps taken.
        seen: sums over the observations that were acted upon; None unless asked for.
    """

    score: Float[Array, ""]
    steps: Int[Array, ""]
    seen: Sums | None


class _Lane(NamedTuple):
    """Where the loop stands: the episode it is in, and what all of them came to so far."""

    number: Int[Array, ""]
    step: Int[Array, ""]
    observation: Array
    state: Any
    total: Episode


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
    return run_episodes(task, policy, params, statistics, key[None], deterministic, watch)


def run_episodes(
    task: Task,
    policy: Policy,
    params: PyTree,
    statistics: Statistics,
    keys: Key[Array, "episodes"],
    deterministic: bool = True,
    watch: bool = False,
) -> Episode:
    """The sums over several episodes, one a key, each as :func:`run_episode` plays it.

    Args:
        task: the environment.
        policy: chooses an action for every observation.
        params: the policy's parameters.
        statistics: of the observations before this generation.
        keys: of the episodes.
        deterministic: take the most likely action; otherwise sample it.
        watch: also sum up the observations.
    """
    episodes = len(keys)

    def reset(number: Int[Array, ""]) -> tuple[Array, Any]:
        return task.env.reset(jax.random.split(keys[number])[0], task.env_params)

    def step(lane: _Lane) -> _Lane:
        episode_key = jax.random.split(keys[lane.number])[1]
        policy_key, env_key = jax.random.split(jax.random.fold_in(episode_key, lane.step))
        encoded = task.encode(lane.observation)
        action = policy.act(params, statistics, encoded, None if deterministic else policy_key)
        observation, state, reward, terminated, _ = task.env.step_env(
            env_key, lane.state, action, task.env_params
        )
        score, steps, seen = lane.total
        seen = None if seen is None else add(seen, statistics, encoded)
        over = terminated | task.env.is_truncated(state, task.env_params)
        number = lane.number + over
        if episodes > 1:
            first = reset(jnp.minimum(number, episodes - 1))
            observation, state = jax.tree.map(
                lambda new, old: jnp.where(over, new, old), first, (observation, state)
            )
        return _Lane(
            number, jnp.where(over, 0, lane.step + 1), observation, state,
            Episode(score + reward, steps + 1, seen),
        )  # fmt: skip

    none = jnp.int32(0)
    total = Episode(jnp.float32(0), none, no_sums(task.observations) if watch else None)
    start = _Lane(none, none, *reset(none), total)
    return jax.lax.while_loop(lambda lane: lane.number < episodes, step, start).total
