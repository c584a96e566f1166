"""Old names of arguments, which are taken for one more version."""

import warnings
from enum import Enum
from typing import TypeVar

Value = TypeVar("Value")


class Unset(Enum):
    """The value of an argument that the caller did not pass, where None means something."""

    UNSET = "unset"


UNSET = Unset.UNSET


def renamed(old: str, value: Value | Unset, new: str, current: Value) -> Value:
    """The value of an argument that has a new name: that passed by the old name, if any.

    Args:
      old: the old name.
      value: what was passed by it.
      new: the new name.
      current: what was passed by that, or its default.
    """
    if isinstance(value, Unset):
        return current
    warnings.warn(f"{old} is deprecated: use {new}", DeprecationWarning, stacklevel=3)
    return value
