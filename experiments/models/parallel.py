"""Tensor parallelism (arXiv 1909.08053): how devices that share a model divide its weights and caches.

What reads the residual stream is cut by its outputs, what writes to it by its inputs, so that a block sends
two sums. Vectors, and what the devices do not divide, are whole on each. Weights are laid out so; the
compiler then divides caches by heads, as is said here of them, and everything between. Which weights read and
which write is for a model's family to say (`ShardingRules`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from experiments.run.devices import MODEL


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ShardingRules:
    """Which axes of a family's weights and caches the devices divide; the rest is whole on each.

    Weights have the names that their paths end with, so that what belongs to a weight, such as a moment of
    an optimizer, lies as the weight does.

    Attributes:
        by_output: matrices ``[..., inputs, outputs]`` that are divided by their last axis.
        by_input: matrices that are divided by the axis before.
        tables: those of ``by_output`` whose int8 form has a scale for each row, which stays whole.
        caches: the last names of the paths of caches, each with its axis that is divided, counted from the
            end: 1 is the last.
    """

    by_output: tuple[str, ...] = ()
    by_input: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    caches: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def spec_of(self, path: str, ndim: int) -> PartitionSpec:
        """Where a weight lies, or what belongs to it: a copy, a moment, a cache.

        Args:
            path: that ends with the weight's own.
            ndim: axes of the array, layers included.

        Example:
            >>> rules = ShardingRules(by_output=("q_proj", "att/key"), by_input=("o_proj", "down_proj"))
            >>> rules.spec_of("layers/down_proj", 3), rules.spec_of("mu/blocks/att/key", 3)
            (P(None, 'model', None), P(None, None, 'model'))
            >>> rules.spec_of("layers/q_proj/scale", 2), rules.spec_of("layers/o_proj/int8", 3)
            (P(None, 'model'), P(None, 'model', None))
            >>> rules.spec_of("norm", 1)
            P()
        """
        stem, _, last = path.rpartition("/")
        if last in self.caches:
            return _cut(ndim, self.caches[last])
        weight = stem if last in ("int8", "scale") else path
        ends = lambda names: any(weight == n or weight.endswith("/" + n) for n in names)
        if last == "scale":
            return _cut(ndim, 1) if ends(self.by_output) and not ends(self.tables) else jax.P()
        if ndim < 2:
            return jax.P()
        if ends(self.by_output):
            return _cut(ndim, 1)
        return _cut(ndim, 2) if ends(self.by_input) else jax.P()


# Every device has all of it.
WHOLE = ShardingRules()


def _cut(ndim: int, from_end: int) -> PartitionSpec:
    return jax.P(*(None,) * (ndim - from_end), MODEL, *(None,) * (from_end - 1))


def shardings(tree: PyTree, mesh: Mesh | None, rules: ShardingRules) -> PyTree:
    """Where every array of a tree lies, or would lie: of parameters, of a state that holds their like.

    Args:
        tree: of arrays or their shapes.
        mesh: devices that share weights are those along its axis "model", if it has one; None for one
            device.
        rules: of the model's family.

    Returns:
        NamedShardings, or None without a mesh.

    Example:
        >>> mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> params = {"o_proj": jax.numpy.ones((8, 4)), "up_proj": jax.numpy.ones((8, 7))}
        >>> rules = ShardingRules(by_input=("o_proj",), by_output=("up_proj",))
        >>> {name: where.spec for name, where in shardings(params, mesh, rules).items()}
        {'o_proj': P('model', None), 'up_proj': P()}
    """
    if mesh is None:
        return None
    sharing = mesh.shape.get(MODEL, 1)

    def place(keys: Any, x: Any) -> NamedSharding:
        spec = rules.spec_of(jax.tree_util.keystr(keys, simple=True, separator="/"), len(x.shape))
        cut = spec.index(MODEL) if MODEL in spec else None
        whole = sharing == 1 or cut is None or x.shape[cut] % sharing
        return NamedSharding(mesh, jax.P() if whole else spec)

    return jax.tree_util.tree_map_with_path(place, tree)
