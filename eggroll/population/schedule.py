"""In which pieces members are computed and sums are formed: as is quickest, or reproducibly."""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, PyTree

from eggroll import _compat as compat
from eggroll.population.placement import devices

# Options of the compiler for reproducible programs. XLA may leave out roundings to bfloat16, and does
# so depending on the number of devices.
EXACT = {"xla_allow_excess_precision": False, **compat.ONE_EMITTER}

Out = TypeVar("Out", bound=PyTree)

# Parts of the population that a reproducible schedule fixes, whatever the number of devices. More
# would serve more devices, and take more memory where the sums of the parts are added up.
PARTS = 8


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the pairs of a population are cut into pieces.

    Compilers sum in an order that depends on shapes and on the code around a sum. A reproducible
    schedule gives the same bits on any number of devices: its pieces do not depend on the devices, each
    is compiled in isolation, and their sums are added up in order.

    Attributes:
      chunk: members evaluated at a time on a device; None for all of its share.
      parts: into how many fixed parts the population is cut; None where pieces follow the devices.

    Example:
      >>> Schedule.fast(chunk=4).pairs_at_once(pairs=10, mesh=None)
      2
      >>> Schedule.reproducible().pairs_at_once(pairs=32, mesh=None)
      4
    """

    chunk: int | None = None
    parts: int | None = None

    @classmethod
    def fast(cls, chunk: int | None = None) -> "Schedule":
        """Pieces as large as the devices and ``chunk`` allow."""
        return cls(chunk)

    @classmethod
    def reproducible(cls, chunk: int | None = None) -> "Schedule":
        """Pieces that do not depend on the devices, each compiled in isolation."""
        return cls(chunk, PARTS)

    @property
    def is_reproducible(self) -> bool:
        """Whether results are the same bits on any number of devices."""
        return self.parts is not None

    def pairs_at_once(self, pairs: int, mesh: Mesh | None) -> int:
        """How many pairs a device evaluates at a time."""
        most = self.part(pairs) if self.is_reproducible else share(pairs, mesh)
        return most if self.chunk is None else min(max(1, self.chunk // 2), most)

    def part(self, pairs: int) -> int:
        """How many pairs are in each fixed part of a reproducible schedule."""
        assert self.parts is not None
        return -(-pairs // self.parts)

    def isolate(self, fn: Callable[..., Out], always: Bool[Array, ""], *args: PyTree) -> Out:
        """``fn(*args)``; a reproducible schedule compiles it in isolation, as :func:`isolated` does."""
        return isolated(fn, always, *args) if self.is_reproducible else fn(*args)


FAST = Schedule.fast()


def share(pairs: int, mesh: Mesh | None, block: int = 1) -> int:
    """How many pairs each device gets, padding included: whole blocks.

    Example:
      >>> share(pairs=10, mesh=None, block=4)
      12
    """
    return block * -(-pairs // (block * devices(mesh)))


def isolated(fn: Callable[..., Out], always: Bool[Array, ""], *args: PyTree) -> Out:
    """``fn(*args)``, compiled in isolation and stored.

    XLA may fuse arithmetic with the code around it: repeat it for each of its uses, or round
    otherwise than elsewhere. An optimization barrier prevents that, but the CPU compiler removes
    barriers before it fuses. On CPU this is a ``lax.cond`` with a predicate that is always true, since
    XLA compiles a branch on its own.

    Args:
      fn: what to compute.
      always: a true value that the compiler cannot know.
      *args: trees of arrays.
    """
    # Jitted so that it is traced once for both platforms. Not under a vmap over pairs for the same
    # reason: batching a branch traces it several times over.
    make = jax.jit(fn)

    def never(*args: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(make, *args))

    def in_branch(*args: PyTree) -> PyTree:
        return lax.cond(always, make, never, *args)

    def behind_barrier(*args: PyTree) -> PyTree:
        return lax.optimization_barrier(make(*lax.optimization_barrier(args)))

    return lax.platform_dependent(*args, cpu=in_branch, default=behind_barrier)
