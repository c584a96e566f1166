"""How arrays lie on a mesh: members over its axis "population", weights over its other axes.

A weight may be sharded over any axis. What belongs to it (its noise, its gradient, the state of its
optimizer) then lies as it does: :func:`specs_of` reads that from a state's arrays outside of any trace,
and programs keep it by :func:`constrain`. In a trace the arrays do not tell, and it is left to the
compiler, which spreads the shardings of a program's inputs over all that is computed from them.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "population"

# A spec for every leaf of a state, None where it is not known.
Specs = tuple[PartitionSpec | None, ...]


def check_mesh(mesh: Any) -> None:
    """Raises ValueError for a mesh that members cannot be divided over."""
    if mesh is None:
        return
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh={mesh!r}: a jax.sharding.Mesh or None is right")
    if AXIS not in mesh.axis_names:
        raise ValueError(
            f"mesh has the axes {mesh.axis_names}; one of them must be called {AXIS!r}"
        )
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            f"mesh has the axis types {mesh.axis_types}; make it with "
            "jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * number of axes)"
        )


def tracing() -> bool:
    """Whether a program is being traced right now, whatever its arguments."""
    return isinstance(jax.device_put(np.float32(0)), jax.core.Tracer)


def devices(mesh: Mesh | None) -> int:
    """How many devices, or groups of devices that share a model, members are divided over."""
    return 1 if mesh is None else mesh.shape[AXIS]


def spread(tree: Any, mesh: Mesh | None) -> Any:
    """The tree with arrays that lie elsewhere copied to all devices of the mesh.

    A program's outputs lie there, so that a state that starts there too compiles no second program.
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
    """How the leaves are sharded over the mesh; None where none of them is, or none is known."""
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
    """The array, laid out by the spec; inside a ``shard_map`` over members, by its other axes."""
    here: Any = jax.sharding.get_abstract_mesh()
    if AXIS in here.manual_axes:
        mesh, spec = here, spec and jax.P(*(_without_members(part) for part in spec))
    if spec is None or mesh is None:
        return x
    return lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def constrain_all(tree: Any, specs: Specs | None, mesh: Mesh | None = None) -> Any:
    """The tree with every leaf laid out by its spec."""
    if specs is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(
        structure, [constrain(x, spec, mesh) for x, spec in zip(leaves, specs, strict=True)]
    )


def replicated(fn: Callable[..., Any], mesh: Mesh | None, *args: Any) -> Any:
    """``fn(*args)`` on every device by itself, with nothing shared out among them."""
    if mesh is None:
        return fn(*args)
    return jax.shard_map(fn, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)(*args)


def member_axis(spec: PartitionSpec | None) -> int | None:
    """Which axis of an array is sharded over members, and over nothing else; None if none is."""
    return next((axis for axis, part in enumerate(spec or ()) if part in (AXIS, (AXIS,))), None)


def split_over(spec: PartitionSpec | None, mesh: Mesh | None) -> int:
    """Into how many pieces the spec cuts an array on the devices that share a model."""
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
