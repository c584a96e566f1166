"""Where the arrays of a state lie: spread over the devices that the parameters are spread over.

The optimizer works on a compact part of each matrix, whose axes are not those of the parameter. Its
arrays take the mesh axes of the parameter on whichever of their own axes can be divided by them.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, PyTree

from optim._shard_alike import shard_alike

AnyMesh = Mesh | AbstractMesh


def gathered(tree: PyTree) -> PyTree:
    """The same arrays, whole on every device as far as their types say where they are."""

    def whole(x: Array) -> Array:
        is_spread = any(axis is not None for axis in jax.typeof(x).sharding.spec)
        return jax.sharding.reshard(x, PartitionSpec()) if is_spread else x

    return jax.tree.map(whole, tree)


def _sharding_of(x: Any) -> NamedSharding | None:
    """How an array is sharded, by its type where it is traced."""
    is_concrete = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
    found = x.sharding if is_concrete else getattr(jax.typeof(x), "sharding", None)
    return found if isinstance(found, NamedSharding) else None


def _mesh_axes(leaves: Sequence[Any]) -> tuple[AnyMesh | None, list[str]]:
    """The mesh that some of the leaves are spread over, and the axes of it that they use."""
    mesh, names = None, []
    for sharding in filter(None, map(_sharding_of, leaves)):
        for entry in sharding.spec:
            for name in entry if isinstance(entry, tuple) else (entry,):
                if isinstance(name, str) and name not in names:
                    mesh = sharding.mesh
                    names.append(name)
    return mesh, names


def spec_for(shape: tuple[int, ...], sizes: dict[str, int]) -> PartitionSpec:
    """A spec that puts as many mesh axes as can be on axes of an array that they divide.

    Args:
      shape: of the array.
      sizes: of the mesh axes, by their names.

    Example:
      >>> tuple(spec_for((6, 16), {"data": 4})), tuple(spec_for((4, 6), {"a": 2, "b": 2}))
      ((None, 'data'), (('a', 'b'), None))
    """
    axes: list[list[str]] = [[] for _ in shape]
    left = list(shape)
    together = math.prod(sizes.values())
    groups = (
        [tuple(sizes)] if any(n and n % together == 0 for n in shape) else [(n,) for n in sizes]
    )
    for group in groups:
        size = math.prod(sizes[name] for name in group)
        able = [i for i, n in enumerate(left) if n and n % size == 0]
        if able:
            # The longest axis, so that pieces stay large.
            best = max(able, key=lambda i: left[i])
            axes[best].extend(group)
            left[best] //= size
    return PartitionSpec(*(tuple(a) if len(a) > 1 else a[0] if a else None for a in axes))


def spread(tree: PyTree, like: PyTree) -> PyTree:
    """Arrays spread over the devices that the leaves of ``like`` are spread over.

    Args:
      tree: arrays, each below a leaf of ``like``; or any tree, which then lies where any of the
        leaves do.
      like: the parameters or gradients.
    """
    structure: Any = jax.tree.structure(like)
    leaves = jax.tree.leaves(like)
    try:
        below = structure.flatten_up_to(tree)
    except ValueError:
        return _over(tree, leaves)
    return structure.unflatten([_over(x, [leaf]) for x, leaf in zip(below, leaves, strict=True)])


def _over(tree: PyTree, leaves: Sequence[Any]) -> PyTree:
    mesh, names = _mesh_axes(leaves)
    if mesh is None:
        return tree
    sizes = {name: mesh.shape[name] for name in names}

    def placed(x: Array) -> Array:
        spec = spec_for(x.shape, sizes)
        if isinstance(x, jax.core.Tracer):
            return jax.sharding.reshard(x, spec)
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(placed, tree)


def alike(x: Array, like: ArrayLike) -> Array:
    """``x`` sharded as ``like``, which has its shape.

    Where types do not say how arrays are sharded, XLA decides when it compiles. It would often
    leave the result of a gather or a product whole on every device.
    """
    wanted = jax.typeof(like).sharding
    if any(axis is not None for axis in wanted.spec):
        is_so = jax.typeof(x).sharding == wanted
        return x if is_so else jax.sharding.reshard(x, wanted)
    if not isinstance(like, jax.core.Tracer):
        if isinstance(x, jax.core.Tracer) or not isinstance(like, jax.Array):
            return x
        is_spread = isinstance(like.sharding, NamedSharding)
        return jax.device_put(x, like.sharding) if is_spread else x
    if jax.device_count() == 1 or wanted.mesh.manual_axes:
        return x
    return shard_alike(x, like)


def zeros(shapes: PyTree) -> PyTree:
    """Arrays of zeros."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
