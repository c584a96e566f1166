"""The data that devices send each other for an update: sums of noise, or scores alone.

The noise of a pair is a function of the seed, so every device can draw the noise of any pair.
"update": each device sums the noise of its own members, and the sums are added over devices. The
number of bytes sent depends on the parameters and not on the population. "fitness": devices send
scores alone, and each device sums the noise of all members, at d times the arithmetic on d devices.
The link decides which of them is faster; :func:`costs` estimates both.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax.sharding import Mesh

from eggroll.plan.leaf import Leaf, Plan
from eggroll.population.placement import devices, member_axis, split_over

# Vector instructions for one sample of eggroll.noise.counter.
SAMPLE_FLOPS = 30


@dataclasses.dataclass(frozen=True)
class Auto:
    """Chooses the exchange that takes less time according to :func:`costs`. Made by :func:`auto`.

    Attributes:
      bandwidth: bytes a second that a device sends.
      flops: arithmetic operations a second of a device.
    """

    bandwidth: float
    flops: float


def auto(bandwidth: float = 12.5e9, flops: float = 1e13) -> Auto:
    """For ``EvolutionStrategy(exchange=...)``: chooses the faster exchange by :func:`costs`.

    Args:
      bandwidth: bytes a second that a device sends. The default is a network of 100 Gbit/s.
      flops: arithmetic operations a second that a device reaches in sums of noise. The default
        describes no particular device: measure ``es.update``, or check whether a third or three
        times the value changes the choice.

    Raises:
      ValueError: a rate is not a positive, finite number.

    Example:
      >>> auto(bandwidth=25e9, flops=4e13)
      Auto(bandwidth=25000000000.0, flops=40000000000000.0)
    """
    for name, value in (("bandwidth", bandwidth), ("flops", flops)):
        if not (isinstance(value, int | float) and value > 0 and math.isfinite(value)):
            raise ValueError(f"auto: {name}={value!r}: must be a positive number (a second)")
    return Auto(bandwidth, flops)


@dataclasses.dataclass(frozen=True)
class Costs:
    """The costs of both exchanges, for one device and one update.

    Attributes:
      devices: number of groups of devices that members are divided over.
      update_bytes: bytes sent by "update", the scores included.
      fitness_bytes: bytes sent by "fitness".
      update_flops: operations of "update".
      fitness_flops: operations of "fitness".
      rates: the rates of the link and the device.
    """

    devices: int
    update_bytes: float
    fitness_bytes: float
    update_flops: float
    fitness_flops: float
    rates: Auto

    @property
    def update_seconds(self) -> float:
        """Time of "update", in seconds."""
        return self.update_bytes / self.rates.bandwidth + self.update_flops / self.rates.flops

    @property
    def fitness_seconds(self) -> float:
        """Time of "fitness", in seconds."""
        return self.fitness_bytes / self.rates.bandwidth + self.fitness_flops / self.rates.flops

    @property
    def choice(self) -> str:
        """The faster exchange, ``"update"`` or ``"fitness"``."""
        return "fitness" if self.fitness_seconds < self.update_seconds else "update"

    def __str__(self) -> str:
        rows = (
            ("update", self.update_bytes, self.update_flops, self.update_seconds),
            ("fitness", self.fitness_bytes, self.fitness_flops, self.fitness_seconds),
        )
        lines = [f"{'exchange':<9} {'bytes sent':>11} {'operations':>11} {'seconds':>10}"]
        lines += [f"{name:<9} {b:>11.3g} {f:>11.3g} {s:>10.3g}" for name, b, f, s in rows]
        return "\n".join(
            [
                *lines,
                f"a device and update, on {self.devices} at {self.rates.bandwidth:.3g} bytes/s and "
                f"{self.rates.flops:.3g} operations/s: {self.choice!r} is faster",
            ]
        )


def costs(
    plan: Plan,
    population: int,
    mesh: Mesh | None,
    tasks: int = 1,
    rates: Auto | None = None,
) -> Costs:
    """Estimates what each exchange sends and computes.

    A sum of B bytes over d devices counts as a ring all-reduce: each device sends
    ``2 (d - 1) / d B``. Each device sends ``(d - 1) / d`` of the bytes of all scores. A pair costs
    2 operations an entry and rank, and 30 a sample of noise; both exchanges draw the noise again.

    Args:
      plan: the treatment of every leaf, and its sharding on the mesh where that is known.
      population: number of members.
      mesh: the mesh that members are divided over.
      tasks: number of scores of a member.
      rates: the rates of the link and the device, from :func:`auto`.
    """
    d = devices(mesh)
    share = -(-population // (2 * d))
    shard = [(leaf, split_over(leaf.spec, mesh)) for leaf in plan.leaves if leaf.trainable]
    # If a leaf is sharded over members, each device keeps its shard: a reduce-scatter sends half of
    # the bytes of an all-reduce.
    sums = sum(
        (2 if member_axis(leaf.spec) is None else 1)
        * math.prod(leaf.shape)
        * jnp.dtype(leaf.sum_type).itemsize
        / pieces
        for leaf, pieces in shard
    )
    a_pair = sum(_flops_of_pair(leaf) / pieces for leaf, pieces in shard)
    scores = (d - 1) / d * population * tasks * 4
    return Costs(
        devices=d,
        update_bytes=scores + (d - 1) / d * sums,
        fitness_bytes=scores,
        update_flops=share * a_pair,
        fitness_flops=population // 2 * a_pair,
        rates=auto() if rates is None else rates,
    )


def _flops_of_pair(leaf: Leaf) -> float:
    samples = sum(math.prod(shape) for shape in leaf.noise_shapes())
    return 2.0 * leaf.rank * math.prod(leaf.shape) + SAMPLE_FLOPS * samples
