"""The division of members and sums into chunks and parts: fast, or reproducible."""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

from jax.sharding import Mesh
from jaxtyping import Array, Bool, PyTree

from eggroll import _compat as compat
from eggroll._isolation import isolated as isolated
from eggroll.population.placement import devices

# Compiler options for reproducible programs. XLA may omit roundings to bfloat16, depending on the
# number of devices.
EXACT = {"xla_allow_excess_precision": False, **compat.ONE_EMITTER}

Out = TypeVar("Out", bound=PyTree)

# The number of fixed parts of the population in a reproducible schedule. More parts would keep more
# devices busy, and take more memory for the sums of the parts.
PARTS = 8


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The division of the pairs of a population into chunks and parts.

    Compilers sum in an order that depends on shapes and on the surrounding code. A reproducible
    schedule gives the same bits on any number of devices: its parts do not depend on the devices,
    each part is compiled in isolation, and their sums are added in order.

    Attributes:
      chunk: number of members that a device evaluates at a time; None for all of its members.
      parts: number of fixed parts of the population; None if the division follows the devices.

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
        """Chunks as large as the devices and ``chunk`` allow."""
        return cls(chunk)

    @classmethod
    def reproducible(cls, chunk: int | None = None) -> "Schedule":
        """Parts that do not depend on the devices, each compiled in isolation."""
        return cls(chunk, PARTS)

    @property
    def is_reproducible(self) -> bool:
        """Whether results have the same bits on any number of devices."""
        return self.parts is not None

    def pairs_at_once(self, pairs: int, mesh: Mesh | None) -> int:
        """The number of pairs that a device evaluates at a time."""
        most = self.part(pairs) if self.is_reproducible else share(pairs, mesh)
        return most if self.chunk is None else min(max(1, self.chunk // 2), most)

    def part(self, pairs: int) -> int:
        """The number of pairs in each part of a reproducible schedule."""
        assert self.parts is not None
        return -(-pairs // self.parts)

    def isolate(self, fn: Callable[..., Out], always: Bool[Array, ""], *args: PyTree) -> Out:
        """``fn(*args)``; a reproducible schedule compiles it with :func:`isolated`."""
        return isolated(fn, always, *args) if self.is_reproducible else fn(*args)


FAST = Schedule.fast()


def share(pairs: int, mesh: Mesh | None, block: int = 1) -> int:
    """The number of pairs of each device, in whole blocks, padding included.

    Example:
      >>> share(pairs=10, mesh=None, block=4)
      12
    """
    return block * -(-pairs // (block * devices(mesh)))
