"""The parts of a run of `eggroll rl`."""

from collections.abc import Mapping
from typing import Any

from experiments.rl.config import Config
from experiments.rl.environments import Environment, make_environment
from experiments.rl.episodes import environment_of, policy_of
from experiments.rl.policy import Policy


def parts(config: Config) -> tuple[Environment[Any], Policy]:
    """The JAX environment and the policy that settings describe."""
    environment = environment_of(config)
    assert isinstance(environment, Environment)
    return environment, policy_of(config, environment)


def make_jax_environment(name: str, settings: Mapping[str, Any] | None = None) -> Environment[Any]:
    """An environment that is no outside one."""
    found = make_environment(name, settings)
    assert isinstance(found, Environment)
    return found
