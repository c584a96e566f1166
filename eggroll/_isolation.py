"""Compiles a part of a program in isolation: without fusing it with the code around it."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, PyTree

Out = TypeVar("Out", bound=PyTree)


def isolated(fn: Callable[..., Out], always: Bool[Array, ""], *args: PyTree) -> Out:
    """``fn(*args)``, compiled in isolation, with its result materialised.

    XLA may fuse operations with the surrounding code. It then repeats them for each use, or rounds
    differently than in another program. An optimization barrier prevents this on accelerators, but
    the CPU compiler removes barriers before it fuses. On CPU this is a ``lax.cond`` with a
    predicate that is always true, since XLA compiles a branch on its own.

    Args:
      fn: the function.
      always: a true value that the compiler cannot fold to a constant; bool ``[]``.
      *args: trees of arrays.
    """
    # Jitted, so that it is traced once for both platforms. Callers do not vmap over this function
    # for the same reason: batching a branch traces it several times.
    make = jax.jit(fn)

    def never(*args: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(make, *args))

    def in_branch(*args: PyTree) -> PyTree:
        return lax.cond(always, make, never, *args)

    def behind_barrier(*args: PyTree) -> PyTree:
        return lax.optimization_barrier(make(*lax.optimization_barrier(args)))

    return lax.platform_dependent(*args, cpu=in_branch, default=behind_barrier)
