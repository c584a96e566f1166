"""Maps a function over the population: pairs, chunks, devices.

The unit is a pair of members, since both share one draw of noise. Pairs are mapped by ``vmap`` in
chunks that bound memory, the chunks one after the other, and the axis "population" of a mesh
divides them among devices. Neither changes what a pair computes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding

AXIS = "population"


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


def devices(mesh: Mesh | None) -> int:
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


def layout(pairs: int, chunk: int | None, mesh: Mesh | None) -> tuple[int, int]:
    """How many pairs each device gets, padding included, and how many it takes at a time.

    Example:
      >>> layout(pairs=10, chunk=8, mesh=None)
      (12, 4)
    """
    share = -(-pairs // devices(mesh))
    at_once = share if chunk is None else min(share, max(1, chunk // 2))
    return -(-share // at_once) * at_once, at_once


def split_pairs(
    fn: Callable[..., Any], pairs: int, data: Any, share: int, mesh: Mesh | None, out_specs: Any
) -> Any:
    """Calls ``fn(ids [share], valid [share], data [share, ...])`` once a device, over its pairs.

    Ids past the last pair repeat the first ones and have ``valid`` False.
    """
    total = share * devices(mesh)
    ids = jnp.arange(total, dtype=jnp.int32)
    valid = ids < pairs
    ids = ids % pairs
    if total != pairs:
        data = jax.tree.map(lambda x: x[ids], data)
    if mesh is None:
        return fn(ids, valid, data)
    spec = jax.P(AXIS)
    # check_vma off: a model's loops start from constants, which it would not let vary over devices.
    return jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=(spec, spec, spec),
        out_specs=out_specs,
        axis_names={AXIS},
        check_vma=False,
    )(ids, valid, data)


def map_pairs(
    fn: Callable[[Any, Any], Any], pairs: int, data: Any, chunk: int | None, mesh: Mesh | None
) -> Any:
    """``fn`` of all pairs, a chunk of them at a time.

    Args:
      fn: ``fn(pairs [n], data [n, ...])`` gives a tree of leaves ``[n, 2, ...]``, the two members
        of each pair.
      pairs: how many.
      data: tree of what each pair gets, leaves ``[pairs, ...]``.
      chunk: members at a time on a device; None for all at once.
      mesh: divides pairs over its axis "population".

    Returns:
      The same tree with leaves ``[2 * pairs, ...]``: members 2p and 2p + 1 are pair p.

    Example:
      >>> fn = lambda pairs, data: jnp.stack([pairs, -pairs], 1) * data[:, None]
      >>> map_pairs(fn, 3, jnp.array([1, 10, 100]), 2, None).tolist()
      [0, 0, 10, -10, 200, -200]
    """
    share, at_once = layout(pairs, chunk, mesh)

    def on_device(ids: Any, valid: Any, data: Any) -> Any:
        if at_once == share:
            return fn(ids, data)
        by_chunk = lambda x: x.reshape(share // at_once, at_once, *x.shape[1:])
        chunks = jax.tree.map(by_chunk, (ids, data))
        out = lax.map(lambda each: fn(*each), chunks)
        return jax.tree.map(lambda x: x.reshape(share, *x.shape[2:]), out)

    out = split_pairs(on_device, pairs, data, share, mesh, jax.P(AXIS))
    return jax.tree.map(lambda x: x[:pairs].reshape(2 * pairs, *x.shape[2:]), out)
