"""What devices send each other for an update: its sum, or the scores alone.

A pair's noise is a function of the seed, so that every device can make any of it. Either each sums the
noise of its own members and the sums are added up ("update": as many numbers as there are parameters,
whatever the population), or each sums the noise of everybody and only the scores are sent ("fitness":
d times the arithmetic on d devices). Which one is quicker depends on the link: :func:`costs` says so.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax.sharding import Mesh

from eggroll.plan.leaf import Leaf, Plan
from eggroll.population.placement import devices, member_axis, split_over

# Vector instructions a sample of eggroll.noise.counter.
SAMPLE_FLOPS = 30


@dataclasses.dataclass(frozen=True)
class Auto:
    """Whichever way of :func:`costs` takes less time. Made by :func:`auto`."""

    bandwidth: float
    flops: float


def auto(bandwidth: float = 12.5e9, flops: float = 1e13) -> Auto:
    """For ``EvolutionStrategy(exchange=...)``: decides by the time that :func:`costs` counts.

    Args:
      bandwidth: bytes that a device sends a second; by default those of a network of 100 Gbit/s.
      flops: arithmetic operations of a device a second, as it reaches them in sums of noise; the default
        is that of no device in particular: measure ``es.update``, or see whether 3 times more or less
        changes the decision.

    Raises:
      ValueError: for a number that is not positive.
    """
    for name, value in (("bandwidth", bandwidth), ("flops", flops)):
        if not (isinstance(value, int | float) and value > 0 and math.isfinite(value)):
            raise ValueError(f"auto: {name}={value!r}; a positive number a second is right")
    return Auto(bandwidth, flops)


@dataclasses.dataclass(frozen=True)
class Costs:
    """What either way takes, a device and update.

    Attributes:
      devices: groups of devices that members are divided over.
      update_bytes: sent where sums are added up, the scores included.
      fitness_bytes: sent where only scores are.
      update_flops: arithmetic where each device sums the noise of its own members.
      fitness_flops: arithmetic where each sums everybody's.
      rates: the link and the device.
    """

    devices: int
    update_bytes: float
    fitness_bytes: float
    update_flops: float
    fitness_flops: float
    rates: Auto

    @property
    def update_seconds(self) -> float:
        return self.update_bytes / self.rates.bandwidth + self.update_flops / self.rates.flops

    @property
    def fitness_seconds(self) -> float:
        return self.fitness_bytes / self.rates.bandwidth + self.fitness_flops / self.rates.flops

    @property
    def choice(self) -> str:
        """``"update"`` or ``"fitness"``."""
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
                f"{self.rates.flops:.3g} operations/s: {self.choice!r} is the quicker",
            ]
        )


def costs(
    plan: Plan,
    population: int,
    mesh: Mesh | None,
    tasks: int = 1,
    rates: Auto | None = None,
) -> Costs:
    """Counts what either way sends and computes.

    A sum of B bytes over d devices is counted as a ring has it, ``2 (d - 1) / d B`` sent by each; the
    scores of all members as ``(d - 1) / d`` of theirs. Of a pair 2 operations an entry and rank are
    counted, and 30 a sample of noise, which either way draws again.

    Args:
      plan: the treatment of every leaf, and how it lies on the mesh where that is known.
      population: number of members.
      mesh: what members are divided over.
      tasks: scores of a member.
      rates: the link's and the device's, from :func:`auto`.
    """
    d = devices(mesh)
    share = -(-population // (2 * d))
    shard = [(leaf, split_over(leaf.spec, mesh)) for leaf in plan.leaves if leaf.trainable]
    # Of a leaf that is sharded over members each device keeps its shard of the sum: half of the way.
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
