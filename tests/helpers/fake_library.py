"""A library of environments with types of its own, as experiments.rl.libraries takes it."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from experiments.rl.environments import Discrete, Environment


class Falling:
    """What the library makes: no Environment."""

    length = 5


class Adapted(Environment):
    actions = Discrete(2)

    def __init__(self, inner: Falling) -> None:
        self.time_limit = inner.length

    def reset(self, key: Any) -> Any:
        return jnp.float32(10), jnp.float32(10)

    def step(self, key: Any, state: Any, action: Any) -> Any:
        return state - action, state - action, state, state <= 0


def names() -> list[str]:
    return ["falling"]


def make(name: str, settings: Mapping[str, Any]) -> Falling:
    return Falling()


def adapt(found: Any) -> Adapted | None:
    return Adapted(found) if isinstance(found, Falling) else None
