"""An environment as a user of Gymnasium writes it. It imports no JAX, so that worker processes start fast."""

import sys
from typing import Any

import gymnasium
import numpy as np


class Line(gymnasium.Env):
    """A walk on a line that should stay near 0."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.x = 0.0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.x = float(self.np_random.uniform(-1, 1))
        return np.array([self.x], np.float32), {}

    def step(self, action: int) -> Any:
        self.x += 0.2 if action == 1 else -0.2
        return np.array([self.x], np.float32), -abs(self.x), False, False, {}

    def render(self) -> Any:
        picture = np.zeros((20, 50, 3), np.uint8)
        picture[:, int(np.clip(25 + 10 * self.x, 0, 49))] = 255
        return picture


def line(render_mode: str | None = None) -> gymnasium.Env:
    return gymnasium.wrappers.TimeLimit(Line(render_mode), 15)


def endless() -> gymnasium.Env:
    return Line()


# ---------------------------------------------------------------- wrong ones


def with_changes(render_mode: str | None = None, **changes: Any) -> gymnasium.Env:
    """The same with other attributes of the class."""
    return gymnasium.wrappers.TimeLimit(type("Changed", (Line,), changes)(render_mode), 15)


class Bare(gymnasium.Env):
    """It has no spaces."""


def without_spaces() -> gymnasium.Env:
    return gymnasium.wrappers.TimeLimit(Bare(), 15)


def fails(*args: Any, **settings: Any) -> Any:
    raise KeyError("no data")


def space_fails() -> gymnasium.Env:
    return with_changes(observation_space=property(fails))


def empty() -> gymnasium.Env:
    return with_changes(observation_space=gymnasium.spaces.Box(-1, 1, (0,)))


def equal_bounds() -> gymnasium.Env:
    return with_changes(action_space=gymnasium.spaces.Box(1, 1, (2,)))


def matrix_of_actions() -> gymnasium.Env:
    return with_changes(action_space=gymnasium.spaces.Box(-1, 1, (2, 2)))


def close_fails() -> gymnasium.Env:
    return with_changes(close=fails)


def reset_fails(render_mode: str | None = None) -> gymnasium.Env:
    return with_changes(render_mode, reset=fails)


def step_fails(render_mode: str | None = None) -> gymnasium.Env:
    return with_changes(render_mode, step=fails)


def render_fails(render_mode: str | None = None) -> gymnasium.Env:
    return with_changes(render_mode, render=fails)


def ends_the_process(render_mode: str | None = None) -> gymnasium.Env:
    return with_changes(render_mode, step=lambda self, action: sys.exit(3))


def closes_badly_after_a_film(render_mode: str | None = None) -> gymnasium.Env:
    return with_changes(render_mode, **({} if render_mode is None else {"close": fails}))


def fails_to_be_made_for_a_film(render_mode: str | None = None) -> gymnasium.Env:
    return with_changes() if render_mode is None else fails()
