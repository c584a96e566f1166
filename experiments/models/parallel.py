"""Tensor parallelism (arXiv 1909.08053): how devices that share a model divide its weights and caches.

What reads the residual stream is cut by its outputs, what writes to it by its inputs, so that a block sends
two sums. Vectors, and what the devices do not divide, are whole on each. Weights are laid out so; the
compiler then divides caches by heads, as is said here of them, and everything between.
"""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from experiments.run.devices import MODEL

BY_OUTPUT = (
    *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head", "embed_tokens"),
    *("receptance", "att/key", "att/value", "ffn/key", "head", "emb"),
)
BY_INPUT = ("o_proj", "down_proj", "output", "ffn/value")
# Their scales, where they are in int8, are those of rows.
TABLES = ("embed_tokens", "emb")
# Of caches: which axis, from the end.
CACHES = {"keys": 2, "values": 2, "kv": 3, "att_x": 1, "ffn_x": 1}


def spec_of(path: str, ndim: int) -> PartitionSpec:
    """Where a weight of a transformer or an RWKV-7 lies, or what belongs to it: a copy, a moment, a cache.

    Args:
        path: that ends with the weight's own.
        ndim: axes of the array, layers included.

    Example:
        >>> spec_of("layers/down_proj", 3), spec_of("mu/blocks/att/key", 3), spec_of("norm", 1)
        (P(None, 'model', None), P(None, None, 'model'), P())
        >>> spec_of("layers/q_proj/scale", 2), spec_of("layers/o_proj/int8", 3)
        (P(None, 'model'), P(None, 'model', None))
    """
    stem, _, last = path.rpartition("/")
    if last in CACHES:
        return _cut(ndim, CACHES[last])
    weight = stem if last in ("int8", "scale") else path
    ends = lambda names: any(weight == n or weight.endswith("/" + n) for n in names)
    if last == "scale":
        return _cut(ndim, 1) if ends(BY_OUTPUT) and not ends(TABLES) else jax.P()
    if ndim < 2:
        return jax.P()
    if ends(BY_OUTPUT):
        return _cut(ndim, 1)
    return _cut(ndim, 2) if ends(BY_INPUT) else jax.P()


def _cut(ndim: int, from_end: int) -> PartitionSpec:
    return jax.P(*(None,) * (ndim - from_end), MODEL, *(None,) * (from_end - 1))


def shardings(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Where every array of a tree lies, or would lie: of parameters, of a state that holds their like.

    Args:
        tree: of arrays or their shapes.
        mesh: devices that share weights are those along its axis "model", if it has one; None for one
            device.

    Returns:
        NamedShardings, or None without a mesh.

    Example:
        >>> mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> params = {"o_proj": jax.numpy.ones((8, 4)), "up_proj": jax.numpy.ones((8, 7))}
        >>> {name: where.spec for name, where in shardings(params, mesh).items()}
        {'o_proj': P('model', None), 'up_proj': P()}
    """
    if mesh is None:
        return None
    sharing = mesh.shape.get(MODEL, 1)

    def place(keys: Any, x: Any) -> NamedSharding:
        spec = spec_of(jax.tree_util.keystr(keys, simple=True, separator="/"), len(x.shape))
        cut = spec.index(MODEL) if MODEL in spec else None
        whole = sharing == 1 or cut is None or x.shape[cut] % sharing
        return NamedSharding(mesh, jax.P() if whole else spec)

    return jax.tree_util.tree_map_with_path(place, tree)
