"""What chips can do, as published, and how long a count of work would take them at best."""

import dataclasses

from benchmarks.work import Collective, Counts


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates and memory of one chip.

    Published by Google Cloud's documentation, in the "System architecture" section of the page of each chip
    (cloud.google.com/tpu/docs/v5e, /v5p, /v6e), read in 2026.

    Attributes:
      memory: bytes of main memory (HBM).
      bf16: operations a second of products in bfloat16; those of float32 are at that rate too at JAX's
        default precision.
      int8: the same for int8; where no figure is published, that of bfloat16.
      bandwidth: bytes a second of main memory.
      link: bytes a second that a chip sends over all its links: half of the published bidirectional
        bandwidth.
      axes: of the torus.
      cores: tensor cores of a chip.
      multipliers: multiply-adds of a core's matrix units in a cycle: 4 units of 128 x 128. For v6e it is an
        assumption: the published 2 units of 256 x 256 would have to run at 3.5 GHz; as much as 4 of them
        is taken, which gives the clock of v5p.
    """

    name: str
    memory: float
    bf16: float
    int8: float
    bandwidth: float
    link: float
    axes: int
    cores: int
    multipliers: int

    @property
    def clock(self) -> float:
        """Cycles a second: what the published peak and the number of multipliers imply."""
        return self.bf16 / (2 * self.cores * self.multipliers)

    @property
    def vector(self) -> float:
        """Element-wise operations a second. Not published: 8 x 128 lanes with four units each, a core."""
        return self.clock * self.cores * 8 * 128 * 4


CHIPS = {
    "v5e": Chip("v5e", 16e9, 197e12, 393e12, 819e9, 200e9, 2, 1, 4 * 128**2),
    "v5p": Chip("v5p", 95e9, 459e12, 459e12, 2765e9, 600e9, 3, 2, 4 * 128**2),
    "v6e": Chip("v6e", 32e9, 918e12, 1836e12, 1600e9, 400e9, 2, 1, 4 * 256**2),
}


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one generation, by what could bound them.

    Attributes:
      matmul: products at the matrix units' peak.
      vector: element-wise operations at the vector units' peak.
      memory: bytes at the bandwidth of main memory.
      exchange: collectives at the bandwidth of the links, after everything else.
      scheduled: cycles that the compiler itself expects, without collectives; 0 where it says nothing.
    """

    matmul: float
    vector: float
    memory: float
    exchange: float
    scheduled: float

    @property
    def roofline(self) -> float:
        """Whatever takes longest, and the exchange: no program can be faster."""
        return max(self.matmul, self.vector, self.memory) + self.exchange

    @property
    def expected(self) -> float:
        """What the compiler's own schedule comes to, and the exchange; at least the roofline."""
        return max(self.scheduled + self.exchange, self.roofline)

    @property
    def bound(self) -> str:
        """What takes longest."""
        names = ("matmul", "vector", "memory", "exchange")
        return max(names, key=lambda name: getattr(self, name))


def times(counts: Counts, chip: Chip, devices: int) -> Times:
    """How long a chip takes for a count of work.

    Example:
      >>> work = Counts(bytes=819e9, vector=1e12)
      >>> t = times(work, CHIPS["v5e"], 1)
      >>> t.memory, t.bound, round(t.vector, 2)
      (1.0, 'memory', 0.16)
    """
    peak = lambda dtype: chip.int8 if dtype in ("s8", "u8") else chip.bf16
    return Times(
        matmul=sum(n / peak(dtype) for dtype, n in counts.matmul.items()),
        vector=counts.vector / chip.vector,
        memory=counts.bytes / chip.bandwidth,
        exchange=sum(n / _link(kind, chip, devices) for kind, n in counts.sent.items()),
        scheduled=counts.cycles / chip.clock,
    )


def _link(kind: Collective, chip: Chip, devices: int) -> float:
    """What a chip sends in a second: over all axes of the torus, or over one for a part of the chips."""
    everywhere = kind.group == devices and kind.kind != "collective-permute"
    return chip.link if everywhere else chip.link / chip.axes
