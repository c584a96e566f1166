"""Environments as users write them, each made by a function: right ones and wrong ones."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gymnax import make as make_gymnax

from experiments.rl.environments import Continuous, Discrete, Environment


class PointMass(Environment):
    """A point that is pushed towards the middle."""

    actions = Continuous([-1, -1], [1, 1])

    def __init__(self, limit: int = 20) -> None:
        self.time_limit = limit

    def reset(self, key: Any) -> Any:
        state = jax.random.uniform(key, (2,), minval=-1, maxval=1), jnp.zeros(2)
        return jnp.concatenate(state), state

    def step(self, key: Any, state: Any, action: Any) -> Any:
        velocity = 0.8 * state[1] + 0.2 * action
        position = state[0] + 0.3 * velocity
        reward = -jnp.abs(position).sum()
        return jnp.concatenate([position, velocity]), (position, velocity), reward, False

    def draw(self, state: Any) -> np.ndarray:
        picture = np.zeros((40, 60, 3), np.uint8)
        x, y = (np.clip(state[0], -1, 1) * 15 + 20).astype(int)
        picture[y, x] = 255
        return picture


def point(limit: int = 20) -> PointMass:
    return PointMass(limit)


def cartpole_of_gymnax() -> Any:
    env, params = make_gymnax("CartPole-v1")
    return env, params.replace(max_steps_in_episode=9)


# ---------------------------------------------------------------- wrong ones


def a_dictionary() -> Any:
    return {}


def fails() -> Any:
    raise RuntimeError("no data")


def with_changes(**changes: Any) -> PointMass:
    found = PointMass()
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def without_limit() -> Any:
    return with_changes(time_limit=None)


def other_actions() -> Any:
    return with_changes(actions=3)


def three_values() -> Any:
    return with_changes(step=lambda key, state, action: (jnp.zeros(4), state, 0.0))


def another_state() -> Any:
    return with_changes(
        step=lambda key, state, action: (jnp.zeros(4), (state[0], jnp.zeros(3)), 0.0, False)
    )


def reward_of_two() -> Any:
    return with_changes(step=lambda key, state, action: (jnp.zeros(4), state, jnp.zeros(2), False))


def step_fails() -> Any:
    return with_changes(
        actions=Discrete(2), step=lambda key, state, action: (state @ state, state, 0.0, False)
    )


def branches() -> Any:
    """Its step asks for the value of a tracer."""

    def step(key: Any, state: Any, action: Any) -> Any:
        reward = 1.0 if action[0] > 0 else 0.0
        return jnp.zeros(4), state, reward, False

    return with_changes(step=step)


def without_actions() -> Any:
    return with_changes(actions=Discrete(0))


def half_an_action() -> Any:
    return with_changes(actions=Discrete(2.5))  # type: ignore[arg-type]


def sees_nothing() -> Any:
    nothing = jnp.zeros(0)
    return with_changes(
        reset=lambda key: (nothing, nothing),
        step=lambda key, state, action: (nothing, state, 0.0, False),
    )


def of_no_gymnax() -> Any:
    return make_gymnax("CartPole-v1")[0], {"max_steps_in_episode": 9}


class Short(PointMass):
    """Its episodes have three steps, far fewer than its limit."""

    def __init__(self) -> None:
        self.time_limit = 5000

    def reset(self, key: Any) -> Any:
        return jnp.zeros(4), jnp.int32(0)

    def step(self, key: Any, state: Any, action: Any) -> Any:
        return jnp.zeros(4), state + 1, jnp.float32(1), state >= 2

    def draw(self, state: Any) -> np.ndarray:
        return np.full((4, 4, 3), state, np.uint8)


def draw_fails() -> Any:
    return with_changes(draw=lambda state: 1 // 0)


def pictures_grow() -> Any:
    return with_changes(draw=lambda state: np.zeros((4 + state[1].any(), 4, 3), np.uint8))


def no_pixels() -> Any:
    return with_changes(draw=lambda state: np.zeros((0, 4, 3), np.uint8))


def float_picture() -> Any:
    return with_changes(draw=lambda state: np.zeros((4, 4, 3)))


def of_positions(render_mode: str | None = None, /) -> PointMass:
    return PointMass()


without_signature = dict  # as for some of what is written in C
