"""Figures of several training seeds, which are lists in rows. Imports nothing heavy."""

import math
from typing import Any

import numpy as np


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
