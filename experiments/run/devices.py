"""Which devices a run's population is divided over, and how its arrays lie on them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding

from eggroll.programs import EXACT
from experiments.run import hosts
from experiments.run.errors import UsageError
from experiments.run.settings import RunSettings


class Layout(NamedTuple):
    """Where things lie.

    Attributes:
        mesh: of all devices, members along "population"; None for one device.
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

    def jit(self, fn: Callable[..., Any], out: Any = None, **options: Any) -> Callable[..., Any]:
        """`jax.jit`, with outputs that lie as `out` says, everywhere by default."""
        if self.mesh is not None:
            options["out_shardings"] = self.everywhere if out is None else out
        if self.same_bits:
            options["compiler_options"] = EXACT
        return jax.jit(fn, **options)

    def put(self, tree: Any) -> Any:
        """Arrays of one device on all of them."""
        if self.everywhere is None:
            return tree
        return jax.device_put(tree, self.everywhere)

    def gather(self, tree: Any) -> Any:
        """Inside a program: members' arrays as a whole on every device, so that sums over members are
        taken in one order."""
        if self.everywhere is None:
            return tree
        return lax.with_sharding_constraint(tree, self.everywhere)


ONE = Layout()


def layout_of(settings: RunSettings, population: int = 0, alone: str | None = None) -> Layout:
    """The devices that the settings name.

    By default these are all GPUs or TPUs that there are. Of CPU devices, which share the same cores, it is
    one, unless there are several processes: those always use all they have.

    Args:
        settings: of the run.
        population: members.
        alone: why there can be one device only, if so.

    Raises:
        UsageError: where there are not as many.
    """
    there = jax.devices()
    if alone is not None:
        if hosts.several() or (settings.devices or 1) > 1 or settings.same_bits:
            what = "several processes" if hosts.several() else f"--devices {settings.devices}"
            raise UsageError(
                f"{'--same-bits' if settings.same_bits else what}: {alone}, so one device is right"
            )
        return ONE
    if hosts.several():
        wanted = len(there)
        if settings.devices not in (None, wanted):
            raise UsageError(
                f"--devices {settings.devices}: the {jax.process_count()} processes have {wanted}, and use "
                "all of them; leave this out"
            )
    else:
        wanted = settings.devices or (1 if jax.default_backend() == "cpu" else len(there))
    if wanted > len(there):
        raise UsageError(f"--devices {wanted}: there are {len(there)}; choose at most as many")
    if wanted == 1:
        return Layout(same_bits=settings.same_bits)
    mesh = jax.make_mesh(
        (wanted,), ("population",), axis_types=(AxisType.Auto,), devices=there[:wanted]
    )
    everywhere, members = (NamedSharding(mesh, spec) for spec in (jax.P(), jax.P("population")))
    return Layout(
        mesh,
        everywhere,
        everywhere if population % wanted else members,
        settings.same_bits,
    )
