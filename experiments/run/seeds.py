"""Several training seeds in one program: every array has a leading axis, every figure is a list."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def many(seeds: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function of one seed's things as one of all seeds' things, with leading axes [seeds]."""
    return jax.vmap if seeds > 1 else lambda f: f


def each(value: Any) -> list[Any]:
    """A figure of a row, by seed.

    Example:
        >>> each(1.5), each([1.5, 2.0])
        ([1.5], [1.5, 2.0])
    """
    return value if isinstance(value, list) else [value]


def average(value: Any) -> float:
    """The mean over the seeds of a figure of a row; NaN where that of one is not finite, which is None.

    Example:
        >>> average([1.0, 2.0]), average([1.0, None])
        (1.5, nan)
    """
    return float(np.mean([math.nan if one is None else one for one in each(value)]))
