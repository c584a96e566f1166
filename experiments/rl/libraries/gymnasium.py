"""Environments of Gymnasium, which are not JAX: worker processes step them."""

from collections.abc import Mapping
from typing import Any

import gymnasium

from experiments.run.errors import UsageError


def names() -> list[str]:
    """The names in Gymnasium's registry that stand in no name space."""
    return sorted(name for name in gymnasium.registry if "/" not in name)


def make(name: str, settings: Mapping[str, Any]) -> gymnasium.Env:
    """The environment called `name`.

    Raises:
        UsageError: where Gymnasium cannot make it.
    """
    try:
        return gymnasium.make(name, **settings)
    except (gymnasium.error.Error, TypeError) as error:
        raise UsageError(f"Gymnasium cannot make {name!r}: {error}") from error


def adapt(found: Any) -> gymnasium.Env | None:
    """An environment as it is."""
    return found if isinstance(found, gymnasium.Env) else None
