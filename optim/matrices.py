"""The old place of :func:`optim.linear_weights`; it leaves with the next version."""

import warnings
from collections.abc import Callable

import optim


def __getattr__(name: str) -> Callable[..., object]:
    if name != "linear_weights":
        raise AttributeError(f"module 'optim.matrices' has no attribute {name!r}")
    warnings.warn(
        "optim.matrices.linear_weights is deprecated: use optim.linear_weights",
        DeprecationWarning,
        stacklevel=2,
    )
    return optim.linear_weights
