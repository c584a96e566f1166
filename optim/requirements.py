"""What a transform asks of its caller."""

from typing import Any

import jax

# Not among optax's public names, though its own transforms raise it.
from optax._src.base import NO_PARAMS_MSG

# A rate: a number, or an array where it is injected or traced.
Scalar = float | int | jax.Array


def need_params(params: Any) -> Any:
    """The parameters; a ValueError with optax's own message where the caller passed none."""
    if params is None:
        raise ValueError(NO_PARAMS_MSG)
    return params
