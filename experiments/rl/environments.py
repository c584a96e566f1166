"""gymnax environments as a policy sees them: flat observations, actions of one of two kinds."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gymnax import make as make_gymnax
from gymnax import registered_envs
from gymnax.environments import spaces
from gymnax.environments.environment import Environment, EnvParams
from jaxtyping import Array, Float

from experiments.rl.names import unknown
from experiments.run.errors import UsageError


class Discrete(NamedTuple):
    """One of `n` actions."""

    n: int


class Continuous(NamedTuple):
    """A vector between two bounds.

    Attributes:
        low: lower bounds, float32 [actions].
        high: upper bounds, float32 [actions].
    """

    low: np.ndarray
    high: np.ndarray


class Task(NamedTuple):
    """An environment together with what a policy needs to know.

    Attributes:
        env: the gymnax environment.
        env_params: its parameters, the time limit among them.
        observations: length of an observation after `encode`.
        encode: an observation as a float32 vector.
        actions: what the environment takes.
    """

    env: Environment
    env_params: EnvParams
    observations: int
    encode: Callable[[Array], Float[Array, "observations"]]
    actions: Discrete | Continuous


def names() -> list[str]:
    """What `--env` takes: the environments of gymnax, then those of Gymnasium.

    Example:
        >>> found = names()
        >>> "CartPole-v1" in found and "gymnasium:CartPole-v1" in found
        True
    """
    import gymnasium

    outside = (f"gymnasium:{name}" for name in gymnasium.registry if "/" not in name)
    return [*sorted(registered_envs), *sorted(outside)]


def make_task(name: str) -> Task:
    """The gymnax environment called `name`, with its default parameters.

    Raises:
        UsageError: if gymnax does not know `name`, or cannot set it up.

    Example:
        >>> make_task("CartPole-v1").actions
        Discrete(n=2)
        >>> make_task("FrozenLake-misc").observations
        16
    """
    if name not in registered_envs:
        raise unknown(name, tuple(registered_envs))
    try:
        env, env_params = make_gymnax(name)
    except OSError as error:  # some environments download their data
        raise UsageError(f"gymnax could not set up {name}: {error}") from error
    size, encode = encoder(name, env, env_params)
    return Task(env, env_params, size, encode, actions_of(name, env, env_params))


def encoder(
    name: str, env: Environment, env_params: EnvParams
) -> tuple[int, Callable[[Array], Float[Array, "observations"]]]:
    """The length of an observation as a vector, and the function that makes it one."""
    observation, _ = jax.eval_shape(env.reset, jax.random.key(0), env_params)
    space = env.observation_space(env_params)
    if isinstance(space, spaces.Discrete):
        n = space.n
        return n, lambda x: jax.nn.one_hot(x, n, dtype=jnp.float32)
    return observation.size, lambda x: x.astype(jnp.float32).reshape(-1)


def actions_of(name: str, env: Environment, env_params: EnvParams) -> Discrete | Continuous:
    """What the environment takes."""
    space = env.action_space(env_params)
    if isinstance(space, spaces.Discrete):
        return Discrete(int(space.n))
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise UsageError(
            f"{name} takes actions of {space}; a number or a vector of numbers is right"
        )
    low, high = (
        np.broadcast_to(np.asarray(x, np.float32), space.shape) for x in (space.low, space.high)
    )
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise UsageError(f"{name} takes actions from {low} to {high}; finite bounds are right")
    return Continuous(low, high)
