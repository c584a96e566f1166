"""The sharding of arrays on a mesh: members over the axis "population", weights over other axes.

A weight may be sharded over any axis. Its noise, its gradient and its optimizer state then have the
same sharding. :func:`specs_of` reads it from the arrays of a state outside of any trace, and
programs preserve it with :func:`constrain`. Traced arrays have no known sharding; there the
compiler propagates the shardings of the inputs.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "population"

# The spec of every leaf of a state; None where it is unknown.
Specs = tuple[PartitionSpec | None, ...]


def check_mesh(mesh: Any) -> None:
    """Checks that a mesh can divide members.

    Raises:
      ValueError: it is not a mesh, has no axis "population", or has an axis type other than Auto.
    """
    if mesh is None:
        return
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh={mesh!r}: must be a jax.sharding.Mesh or None")
    if AXIS not in mesh.axis_names:
        raise ValueError(f"mesh: expected an axis named {AXIS!r}, got the axes {mesh.axis_names}")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            f"mesh: expected Auto axis types, got {mesh.axis_types}; make the mesh with "
            "jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * number of axes)"
        )


def tracing() -> bool:
    """Whether JAX is tracing a program now, even if no argument is traced."""
    return isinstance(jax.device_put(np.float32(0)), jax.core.Tracer)


def devices(mesh: Mesh | None) -> int:
    """The number of devices, or groups of devices with one model, that members are divided over."""
    return 1 if mesh is None else mesh.shape[AXIS]


def spread(tree: Any, mesh: Mesh | None) -> Any:
    """Copies the arrays of a tree to all devices of the mesh, unless they are there.

    The outputs of a program are on all devices. A state that starts there as well compiles no
    second program.
    """
    if mesh is None:
        return tree
    devices = set(mesh.devices.flat)

    def place(x: Any) -> Any:
        if isinstance(x, jax.core.Tracer) or x.sharding.device_set == devices:
            return x
        return jax.device_put(x, NamedSharding(mesh, jax.P()))

    return jax.tree.map(place, tree)


def specs_of(tree: Any, mesh: Mesh | None) -> Specs | None:
    """The specs of the leaves on the mesh; None if no leaf is known to be sharded."""
    if mesh is None:
        return None

    def spec(x: Any) -> PartitionSpec | None:
        sharding = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
        if not isinstance(sharding, NamedSharding) or sharding.mesh != mesh:
            return None
        return sharding.spec

    specs = tuple(map(spec, jax.tree.leaves(tree)))
    return specs if any(map(_shards, specs)) else None


def constrain(x: Array, spec: PartitionSpec | None, mesh: Mesh | None = None) -> Array:
    """The array with the sharding of a spec.

    Inside a ``shard_map`` over members, only the other axes of the spec apply.
    """
    here: Any = jax.sharding.get_abstract_mesh()
    if AXIS in here.manual_axes:
        mesh, spec = here, spec and jax.P(*(_without_members(part) for part in spec))
    if spec is None or mesh is None:
        return x
    return lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def constrain_all(tree: Any, specs: Specs | None, mesh: Mesh | None = None) -> Any:
    """The tree with the sharding of ``specs``, one spec a leaf."""
    if specs is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(
        structure, [constrain(x, spec, mesh) for x, spec in zip(leaves, specs, strict=True)]
    )


def replicated(fn: Callable[..., Any], mesh: Mesh | None, *args: Any) -> Any:
    """Computes ``fn(*args)`` redundantly on every device, without communication."""
    if mesh is None:
        return fn(*args)
    return jax.shard_map(fn, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)(*args)


def member_axis(spec: PartitionSpec | None) -> int | None:
    """The axis of an array that is sharded over members and nothing else; None if there is none."""
    return next((axis for axis, part in enumerate(spec or ()) if part in (AXIS, (AXIS,))), None)


def split_over(spec: PartitionSpec | None, mesh: Mesh | None) -> int:
    """The number of shards of an array within a group of devices with one model."""
    pieces = 1
    for part in spec or ():
        for name in part if isinstance(part, tuple) else (part,):
            pieces *= 1 if name in (None, AXIS) or mesh is None else mesh.shape[name]
    return pieces


def _shards(spec: PartitionSpec | None) -> bool:
    return any(part is not None for part in spec or ())


def _without_members(part: Any) -> Any:
    if isinstance(part, tuple):
        return tuple(name for name in part if name != AXIS) or None
    return None if part == AXIS else part
