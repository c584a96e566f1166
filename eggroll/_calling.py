"""The calling convention of a fitness: ``fn(params, key, [member,] *args)``."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

# A fitness, or any other function that is mapped over a population.
Function = Callable[..., Any]


def call(fn: Function, params: PyTree, key: PyTree, member: PyTree, args: tuple) -> PyTree:
    """Calls the function for one member.

    Args:
      fn: ``fn(params, key, *args)``, or ``fn(params, key, member, *args)`` if members have data.
      params: the parameters of the member.
      key: the random key of the member.
      member: the data of the member, or None if members have no data.
      args: the trees that all members receive.

    Example:
      >>> call(lambda params, key, x: params * x, 3, None, None, (5,))
      15
      >>> call(lambda params, key, member, x: params * x + member, 3, None, 1, (5,))
      16
    """
    own = () if member is None else (member,)
    return fn(params, key, *own, *args)


def one_of(members: PyTree) -> PyTree:
    """Shapes and dtypes of one member's data, from leaves with a leading axis [population]."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), members)
