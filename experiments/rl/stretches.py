"""Episodes under noise on the outputs of layers, which is drawn anew for every stretch of steps.

A stretch begins with a pass through the network at its first observation. Node noise is added there, once,
and the difference to the outputs without noise is the offset of every layer for all steps of the stretch.
So noise may be held for several steps; its gradient is that of the first observation, which is exact for
stretches of one step and else takes the observations of a stretch as alike.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from experiments.rl.environments import Environment
from experiments.rl.policy import Policy
from experiments.rl.rollout import Episode, Lane, Lanes
from experiments.rl.statistics import Statistics

Offsets = dict[str, Array]


class Played(NamedTuple):
    """What the episodes of a member came to.

    Attributes:
        rewards: the sum of every stretch; 0 after the last episode.
        total: of all episodes together.
    """

    rewards: Float[Array, "stretches"]
    total: Episode


def count(time_limit: int, episodes: int, hold: int, steps: int | None) -> int:
    """Number of stretches that a member plays at most.

    Example:
        >>> count(500, 1, 4, None), count(500, 2, 1, 300)
        (125, 300)
    """
    return -(-(time_limit * episodes if steps is None else steps) // hold)


def play(
    environment: Environment[Any],
    policy: Policy,
    layers: Sequence[str],
    params: PyTree,
    plain: PyTree,
    statistics: Statistics,
    keys: Key[Array, "episodes"],
    stretches: int,
    hold: int,
    deterministic: bool = True,
    watch: bool = False,
) -> Played:
    """Plays episodes, one a key, up to so many stretches.

    Args:
        environment: the environment.
        policy: chooses an action for every observation.
        layers: names of the layers whose outputs have noise.
        params: the policy's parameters; products with those of `layers` have noise.
        plain: the same without any noise.
        statistics: of the observations before this generation.
        keys: of the episodes.
        stretches: how many at most.
        hold: steps of a stretch.
        deterministic: take the most likely action; otherwise sample it.
        watch: also sum up the observations.
    """
    lanes = Lanes(environment, keys, statistics, deterministic)
    quiet = {**params["policy"], **{name: plain["policy"][name] for name in layers}}

    def stretch(lane: Lane, _: None) -> tuple[Lane, Array]:
        first = environment.encode(lane.observation)
        offsets = _offsets(policy, layers, params, plain, statistics, first)

        def act(observation: Array, key: Key[Array, ""] | None) -> Array:
            with nn.intercept_methods(_adding(offsets)):
                return policy.act({**params, "policy": quiet}, statistics, observation, key)

        # A loop that ends with the last member's episode: what is left of the stretches costs little.
        def goes_on(state: tuple) -> Array:
            i, lane = state
            return (i < hold) & lanes.plays(lane)

        start = lane._replace(total=lane.total._replace(score=jnp.float32(0)))
        _, after = jax.lax.while_loop(
            goes_on, lambda state: (state[0] + 1, lanes.step(act, state[1])), (jnp.int32(0), start)
        )
        reward = after.total.score
        total = after.total._replace(score=lane.total.score + reward)
        return after._replace(total=total), reward

    lane, rewards = jax.lax.scan(stretch, lanes.start(watch), length=stretches)
    return Played(rewards, lane.total)


def _offsets(
    policy: Policy,
    layers: Sequence[str],
    params: PyTree,
    plain: PyTree,
    statistics: Statistics,
    observation: Array,
) -> Offsets:
    """By layer, the noise on its outputs."""
    seen: dict[str, tuple[Array, Array]] = {}

    def see(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        out = next_fun(*args, **kwargs)
        if context.module.name in layers:
            seen[context.module.name] = args[0], out
        return out

    with nn.intercept_methods(see):
        policy.act(params, statistics, observation, None)
    without = lambda name, x: x @ plain["policy"][name]["kernel"] + plain["policy"][name]["bias"]
    return {name: out - without(name, x) for name, (x, out) in seen.items()}


def _adding(offsets: Offsets) -> Callable[..., Any]:
    def add(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        out = next_fun(*args, **kwargs)
        return out + offsets[context.module.name] if context.module.name in offsets else out

    return add
