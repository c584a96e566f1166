"""Which devices a run's population is divided over, and how its arrays lie on them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding

from eggroll.population import placement
from eggroll.population.schedule import EXACT
from experiments.run import hosts
from experiments.run.errors import UsageError
from experiments.run.settings import Cluster

# The axis of a mesh along which devices share weights.
MODEL = "model"


class Layout(NamedTuple):
    """Where things lie.

    Attributes:
        mesh: of all devices, members along "population", and along "model" those that share weights, where
            there are such; None for one device.
        everywhere: of what every device has; None without a mesh.
        members: of what has a leading axis [population]; None without a mesh.
        same_bits: whether the number of devices may change no bit.
    """

    mesh: Mesh | None = None
    everywhere: NamedSharding | None = None
    members: NamedSharding | None = None
    same_bits: bool = False

    @property
    def devices(self) -> int:
        """How many there are."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def groups(self) -> int:
        """How many devices, or groups of them that share weights, members are divided over."""
        return placement.devices(self.mesh)

    def jit(self, fn: Callable[..., Any], out: Any = None, **options: Any) -> Callable[..., Any]:
        """`jax.jit`, with outputs that lie as `out` says, everywhere by default."""
        if self.mesh is not None:
            options["out_shardings"] = self.everywhere if out is None else out
        if self.same_bits:
            options["compiler_options"] = EXACT
        return jax.jit(fn, **options)

    def gather(self, tree: Any) -> Any:
        """Inside a program: members' arrays as a whole on every device, so that sums over members are
        taken in one order."""
        if self.everywhere is None:
            return tree
        return lax.with_sharding_constraint(tree, self.everywhere)


ONE = Layout()


def layout_of(
    cluster: Cluster, population: int = 0, alone: str | None = None, sharing: int = 1
) -> Layout:
    """The devices that the settings name.

    By default these are all GPUs or TPUs that there are. Of CPU devices, which share the same cores, it is
    one, unless there are several processes: those always use all they have.

    Args:
        cluster: the settings.
        population: members.
        alone: why there can be one device only, if so.
        sharing: how many devices share each weight.

    Raises:
        UsageError: where there are not as many.
    """
    there = jax.devices()
    if alone is not None:
        asked = {
            "--same-bits": cluster.same_bits,
            f"--tensor-parallel {sharing}": sharing > 1,
            "several processes": hosts.several(),
            f"--devices {cluster.devices}": (cluster.devices or 1) > 1,
        }
        for what, given in asked.items():
            if given:
                raise UsageError(f"{what}: must be left out, since {alone}")
        return ONE
    if hosts.several():
        wanted = len(there)
        if cluster.devices not in (None, wanted):
            raise UsageError(
                f"--devices {cluster.devices}: the {jax.process_count()} processes have {wanted}, and use "
                "all of them; leave this out"
            )
    else:
        wanted = cluster.devices or (1 if jax.default_backend() == "cpu" else len(there))
    if wanted > len(there):
        raise UsageError(f"--devices {wanted}: there are {len(there)}; choose at most as many")
    if wanted % sharing:
        other = "another number of processes" if hosts.several() else "other --devices"
        raise UsageError(
            f"--tensor-parallel {sharing}: it does not divide the {wanted} device{'s' * (wanted > 1)} of the "
            f"run; choose a divisor, or {other}"
        )
    if wanted == 1:
        return Layout(same_bits=cluster.same_bits)
    axes = {placement.AXIS: wanted // sharing, **({MODEL: sharing} if sharing > 1 else {})}
    mesh = jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(axes),
        devices=there[:wanted],
    )
    everywhere, members = (NamedSharding(mesh, spec) for spec in (jax.P(), jax.P("population")))
    return Layout(
        mesh,
        everywhere,
        everywhere if population % (wanted // sharing) else members,
        cluster.same_bits,
    )
