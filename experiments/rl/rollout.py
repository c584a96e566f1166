"""Episodes of a JAX environment as a function of a policy's parameters and keys.

An evolution strategy scores a member by whole episodes: ``step`` is looped until the first end. Under
``vmap`` the loop runs until the last member is done, and members that are done stay as they are.
A member's episodes follow one another in the one loop (`run_episodes`): side by side, all would wait for the
longest of them, and episodes of one member differ much more in their length than whole members do. Where
every member has matrices of its own, reading these takes the time, and one reading had better serve all of
its episodes (`run_abreast`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from experiments.rl.environments import Environment
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


class Lane(NamedTuple):
    """Where the loop stands: the episode it is in, and what all of them came to so far."""

    number: Int[Array, ""]
    step: Int[Array, ""]
    observation: Array
    state: Any
    total: Episode


# (encoded observation, key or None) -> action.
Act = Callable[[Array, Key[Array, ""] | None], Array]


def run_episode(
    environment: Environment[Any],
    policy: Policy,
    params: PyTree,
    statistics: Statistics,
    key: Key[Array, ""],
    deterministic: bool = True,
    watch: bool = False,
) -> Episode:
    """Plays one episode from reset until it terminates or reaches the time limit.

    Args:
        environment: the environment.
        policy: chooses an action for every observation.
        params: the policy's parameters.
        statistics: of the observations before this generation.
        key: decides the start, the environment's chance and the sampled actions.
        deterministic: take the most likely action; otherwise sample it.
        watch: also sum up the observations.
    """
    return run_episodes(environment, policy, params, statistics, key[None], deterministic, watch)


def run_episodes(
    environment: Environment[Any],
    policy: Policy,
    params: PyTree,
    statistics: Statistics,
    keys: Key[Array, "episodes"],
    deterministic: bool = True,
    watch: bool = False,
) -> Episode:
    """The sums over several episodes, one a key, each as :func:`run_episode` plays it.

    Args:
        environment: the environment.
        policy: chooses an action for every observation.
        params: the policy's parameters.
        statistics: of the observations before this generation.
        keys: of the episodes.
        deterministic: take the most likely action; otherwise sample it.
        watch: also sum up the observations.
    """
    lanes = Lanes(environment, keys, statistics, deterministic)
    act = functools.partial(policy.act, params, statistics)
    step = lambda lane: lanes.step(act, lane)
    return jax.lax.while_loop(lanes.plays, step, lanes.start(watch)).total


def run_abreast(
    environment: Environment[Any],
    policy: Policy,
    params: PyTree,
    statistics: Statistics,
    keys: Key[Array, "episodes"],
    deterministic: bool = True,
    watch: bool = False,
) -> Episode:
    """What :func:`run_episodes` gives, to rounding, with the episodes side by side."""
    one = lambda key: run_episode(
        environment, policy, params, statistics, key, deterministic, watch
    )
    return jax.tree.map(lambda x: x.sum(0), jax.vmap(one)(keys))


class Lanes(NamedTuple):
    """The episodes of a member one after the other, as a function from step to step.

    Attributes:
        environment: the environment.
        keys: of the episodes.
        statistics: of the observations before this generation.
        deterministic: whether no key is given to the policy.
    """

    environment: Environment[Any]
    keys: Key[Array, "episodes"]
    statistics: Statistics
    deterministic: bool

    def start(self, watch: bool) -> Lane:
        """The first episode before its first step."""
        none = jnp.int32(0)
        sums = no_sums(self.environment.observations) if watch else None
        return Lane(none, none, *self.reset(none), Episode(jnp.float32(0), none, sums))

    def reset(self, number: Int[Array, ""]) -> tuple[Array, Any]:
        """The first observation and state of an episode."""
        return self.environment.reset(jax.random.split(self.keys[number])[0])

    def plays(self, lane: Lane) -> Bool[Array, ""]:
        """Whether an episode is left."""
        return lane.number < len(self.keys)

    def step(self, act: Act, lane: Lane) -> Lane:
        """One step with the action ``act(encoded observation, key or None)``."""
        environment, episodes = self.environment, len(self.keys)
        episode_key = jax.random.split(self.keys[lane.number])[1]
        policy_key, env_key = jax.random.split(jax.random.fold_in(episode_key, lane.step))
        encoded = environment.encode(lane.observation)
        action = act(encoded, None if self.deterministic else policy_key)
        observation, state, reward, terminated = environment.step(env_key, lane.state, action)
        score, steps, seen = lane.total
        seen = None if seen is None else add(seen, self.statistics, encoded)
        over = terminated | environment.is_cut(state, lane.step + 1)
        number = lane.number + over
        if episodes > 1:
            first = self.reset(jnp.minimum(number, episodes - 1))
            observation, state = jax.tree.map(
                lambda new, old: jnp.where(over, new, old), first, (observation, state)
            )
        return Lane(
            number, jnp.where(over, 0, lane.step + 1), observation, state,
            Episode(score + reward, steps + 1, seen),
        )  # fmt: skip
