"""Environments of gymnax, which are JAX: flat observations, actions of one of two kinds."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import environment as base
from gymnax.environments import spaces
from jaxtyping import Array, Bool, Float, Int, Key

from experiments.rl import drawings
from experiments.rl.environments import Continuous, Discrete, Environment
from experiments.rl.libraries import unknown
from experiments.run.errors import UsageError


class Gymnax(Environment[Any]):
    """An environment of gymnax with its parameters.

    Args:
        env: the environment.
        params: its parameters, the time limit among them; by default its own.

    Raises:
        UsageError: where no policy here fits its actions.
    """

    def __init__(self, env: base.Environment, params: base.EnvParams | None = None) -> None:
        self.env = env
        self.params = env.default_params if params is None else params
        self.actions = _actions(env, self.params)
        self.time_limit = int(getattr(self.params, "max_steps_in_episode", 0)) or None
        space = env.observation_space(self.params)
        self._classes = int(space.n) if isinstance(space, spaces.Discrete) else None

    def reset(self, key: Key[Array, ""]) -> tuple[Array, Any]:
        return self.env.reset(key, self.params)

    def step(
        self, key: Key[Array, ""], state: Any, action: Array
    ) -> tuple[Array, Any, Float[Array, ""], Bool[Array, ""]]:
        # `step` of gymnax starts a new episode by itself, `step_env` does not.
        observation, state, reward, over, _ = self.env.step_env(key, state, action, self.params)
        return observation, state, jnp.asarray(reward, jnp.float32), jnp.asarray(over)

    def encode(self, observation: Array) -> Float[Array, "observations"]:
        if self._classes is not None:
            return jax.nn.one_hot(observation, self._classes, dtype=jnp.float32)
        return super().encode(observation)

    def is_cut(self, state: Any, steps: Int[Array, ""]) -> Bool[Array, ""]:
        return self.env.is_truncated(state, self.params)

    def draw(self, state: Any) -> np.ndarray | None:
        name = _name(self.env)
        if name.endswith("-MinAtar"):
            seen = self.env.observe(jax.random.key(0), state, None, self.params)
            return drawings.grid(np.asarray(seen))
        return drawings.of_gymnax(name, state)


def names() -> list[str]:
    """The environments in gymnax's registry."""
    return sorted(gymnax.registered_envs)


def make(name: str, settings: Mapping[str, Any]) -> Gymnax:
    """The environment called `name`; settings are fields of its parameters, or arguments of its class.

    Raises:
        UsageError: where gymnax does not know it, or cannot set it up.

    Example:
        >>> make("CartPole-v1", {"max_steps_in_episode": 7}).time_limit
        7
    """
    if name not in gymnax.registered_envs:
        raise unknown("gymnax", name, gymnax.registered_envs)
    fields = {field.name for field in dataclasses.fields(gymnax.make(name)[1])} if settings else ()
    try:
        env, params = gymnax.make(name, **{k: v for k, v in settings.items() if k not in fields})
    # OSError: some environments download their data.
    except (OSError, TypeError) as error:
        raise UsageError(f"gymnax could not set up {name}: {error}") from error
    return Gymnax(env, params.replace(**{k: v for k, v in settings.items() if k in fields}))


def adapt(found: Any) -> Gymnax | None:
    """An environment of gymnax, alone or in a pair with its parameters."""
    if isinstance(found, base.Environment):
        return Gymnax(found)
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], base.Environment):
        return Gymnax(*found)
    return None


def _name(env: base.Environment) -> str:
    return str(env.name)


def _actions(env: base.Environment, params: base.EnvParams) -> Discrete | Continuous:
    """What the environment takes."""
    space, name = env.action_space(params), _name(env)
    if isinstance(space, spaces.Discrete):
        return Discrete(int(space.n))
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise UsageError(f"{name}: actions must be a number or a vector of numbers, got {space}")
    low, high = (
        np.broadcast_to(np.asarray(x, np.float32), space.shape) for x in (space.low, space.high)
    )
    try:
        return Continuous(low, high)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error
