"""Which axes of every leaf are rows, columns and a stack: given, or read from shapes and names.

Two things are read from a tree of parameters. A *stack* is a subtree whose leaves all have the same
first axis, as ``nn.scan``, ``jax.vmap`` over ``init`` or a model that loops by ``lax.scan`` has it:
the axis numbers layers, and the axes behind it are a layer's own. *Attention kernels* have an axis
of heads: (embedding, heads, head size) for queries, keys and values, (heads, head size, embedding)
for the output.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from optax.contrib import MuonDimensionNumbers

from optim._matrices import DimensionNumbers
from optim._names import Names, names_of
from optim._trees import Node, Setting, nodes, resolved

# Names of subtrees that hold a stack, even where no name within says that a leaf is a vector.
STACKS = frozenset({"layers", "layer", "blocks", "block", "stack", "experts", "h"})
# Modules of attention whose kernels have an axis of heads: behind the rows, or before the columns.
INWARD = frozenset(
    {"query", "key", "value", "q", "k", "v", "q_proj", "k_proj", "v_proj", "wq", "wk", "wv"}
)
OUTWARD = frozenset({"out", "output", "o", "o_proj", "out_proj", "wo"})


class Leaf(NamedTuple):
    """What is known of a leaf before its values.

    Attributes:
      names: what its path says of it.
      shape: of the array.
      spec: its dimension numbers; None where it has two axes, or where they are not known.
      is_stacked: whether leading axes number layers.
      is_matrix: whether it is a matrix, or a stack of them, with more than one row.
    """

    names: Names
    shape: tuple[int, ...]
    spec: DimensionNumbers | None
    is_stacked: bool
    is_matrix: bool


def leaves_of(params: PyTree, dimension_numbers: Setting = None) -> list[Leaf]:
    """The leaves of a tree, in their order.

    Args:
      params: the tree.
      dimension_numbers: dimension numbers for all leaves of two or more axes, a tree (a prefix of
        the parameters') of them and Nones, or a function of the parameters that returns either.
        None: they are read from shapes and names.
    """
    shapes = [jnp.shape(x) for x in jax.tree.leaves(params)]
    names = names_of(params)
    given = resolved(dimension_numbers, params)
    if given is None:
        return _inferred(nodes(params), names, shapes)
    specs: list[DimensionNumbers | None] = []
    jax.tree.map(
        lambda spec, sub: specs.extend([spec] * len(jax.tree.leaves(sub))),
        given,
        params,
        is_leaf=lambda x: x is None or isinstance(x, DimensionNumbers),
    )
    return [_given(*leaf) for leaf in zip(names, shapes, specs, strict=True)]


def _given(names: Names, shape: tuple[int, ...], spec: DimensionNumbers | None) -> Leaf:
    if spec is None or len(shape) < 2:
        return Leaf(names, shape, None, False, len(shape) == 2)
    axes = [
        (group,) if isinstance(group, int) else group
        for group in (spec.reduction_axis, spec.output_axis)
    ]
    return Leaf(names, shape, spec, sum(map(len, axes)) < len(shape), all(axes))


def _inferred(
    inner: Sequence[Node], names: Sequence[Names], shapes: Sequence[tuple[int, ...]]
) -> list[Leaf]:
    depth = [0] * len(shapes)  # how many leading axes number layers
    for node in inner:
        within = range(node.start, node.stop)
        while _is_stack(node, [(names[i], shapes[i][depth[i] :]) for i in within]):
            for i in within:
                depth[i] += 1
    folded = _folded(inner, names, [s[d:] for s, d in zip(shapes, depth, strict=True)])
    found = []
    for name, shape, d, is_folded in zip(names, shapes, depth, folded, strict=True):
        spec = _spec(name, len(shape), d)
        known = spec is not None or len(shape) == 2
        is_matrix = known and len(shape) - d > 1 and not (d and is_folded)
        found.append(Leaf(name, shape, spec, d > 0, is_matrix))
    return found


def _is_stack(node: Node, leaves: Sequence[tuple[Names, tuple[int, ...]]]) -> bool:
    """Whether the first axis of all leaves of a node numbers layers."""
    own = node.path.rpartition("/")[2].lower()
    if len({shape[:1] for _, shape in leaves}) != 1 or own in INWARD:
        return False
    if not any(len(shape) > 2 and "conv" not in name.tokens for name, shape in leaves):
        return False
    # Layers that lie side by side, in a list or under numbered names, are none.
    is_list = all(child.isdigit() for child in node.children)
    is_named = own in STACKS and not is_list
    return is_named or any(len(shape) == 2 and name.is_vector for name, shape in leaves)


def _folded(
    inner: Sequence[Node], names: Sequence[Names], shapes: Sequence[tuple[int, ...]]
) -> list[bool]:
    """Which leaves have as many entries as a vector beside them, and are no kernels.

    In a stack they are vectors in the form of a matrix, as the bonus of RWKV (heads, head size).
    """
    parent = [0] * len(shapes)
    for number, node in enumerate(inner):
        parent[node.start : node.stop] = [number] * (node.stop - node.start)
    vectors = {(p, s[0]) for p, s in zip(parent, shapes, strict=True) if len(s) == 1}
    return [
        len(shape) == 2 and (p, math.prod(shape)) in vectors and not name.is_kernel
        for name, shape, p in zip(names, shapes, parent, strict=True)
    ]


def _spec(names: Names, axes: int, depth: int) -> DimensionNumbers | None:
    own = axes - depth
    if own == 3:
        if names.owner in INWARD:
            return MuonDimensionNumbers(depth, (depth + 1, depth + 2))
        if names.owner in OUTWARD:
            return MuonDimensionNumbers((depth, depth + 1), depth + 2)
    if depth == 0 or own > 2:
        return None
    columns = (axes - 1,) if own else ()
    return MuonDimensionNumbers(tuple(range(depth, axes - 1)), columns)
