"""What a transform asks of its caller."""

from typing import Any

# Not among optax's public names, though its own transforms raise it.
from optax._src.base import NO_PARAMS_MSG


def need_params(params: Any) -> Any:
    """The parameters; a ValueError with optax's own message where the caller passed none."""
    if params is None:
        raise ValueError(NO_PARAMS_MSG)
    return params
