"""Leaves as matrices, which of them are linear weights, and trees cut in two by that."""

import math
import re
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import Array

from optim._trees import broadcast, resolved

# Parts of a path's names that mark what the paper leaves to the full optimizer; and whole names that do.
MARKS = ("embed", "norm", "logit", "vocab", "classifier", "bias", "scale")
NAMES = ("head", "lm_head", "output_head", "wte", "wpe", "ln", "ln_f", "score", "gain")


class View(NamedTuple):
    """How a leaf is a matrix or a stack of matrices.

    Attributes:
      shape: of the leaf.
      order: its axes: those that number the stack, then the rows', then the columns'.
      matrix: the shape as a matrix, with one axis before it where there is a stack; that of the leaf where
        it is no matrix.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    matrix: tuple[int, ...]

    def to(self, leaf: Array) -> Array:
        """The leaf as matrices."""
        return leaf.transpose(self.order).reshape(self.matrix)

    def back(self, matrix: Array) -> Array:
        """Matrices as the leaf that they came from."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return matrix.reshape([self.shape[i] for i in self.order]).transpose(inverse)


def view(shape: tuple[int, ...], spec: Any = None, path: str = "") -> View:
    """The view of one leaf.

    Args:
      shape: of the leaf.
      spec: ``optax.contrib.MuonDimensionNumbers``, or anything with its two attributes: the axes that are
        rows (reduction) and columns (output); the others number a stack. None: the last axis is the columns,
        all before it are the rows.
      path: of the leaf, for the message.

    Raises:
      ValueError: an axis is not there, or named twice.

    Example:
      >>> from optax.contrib import MuonDimensionNumbers
      >>> view((12, 64, 4, 16), MuonDimensionNumbers(1, (2, 3))).matrix
      (12, 64, 64)
      >>> view((3, 3, 8, 16)).matrix
      (72, 16)
    """
    axes = tuple(range(len(shape)))
    if spec is None:
        matrix = (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else shape
        return View(shape, axes, matrix)
    named = []
    for group in (spec.reduction_axis, spec.output_axis):
        group = (group,) if isinstance(group, int) else tuple(group)
        if any(not -len(shape) <= i < len(shape) for i in group):
            raise ValueError(f"{path}: {spec} names an axis that the shape {shape} does not have")
        named.append(tuple(i % len(shape) for i in group))
    rows, columns = named
    if len({*rows, *columns}) < len(rows) + len(columns):
        raise ValueError(f"{path}: {spec} names an axis twice; rows and columns share none")
    stack = tuple(i for i in axes if i not in rows + columns)
    sizes = [math.prod(shape[i] for i in group) for group in (stack, rows, columns)]
    return View(shape, stack + rows + columns, tuple(sizes if stack else sizes[1:]))


def paths(tree: Any) -> list[str]:
    """The paths of the leaves, in their order.

    Example:
      >>> paths({"layers": [{"kernel": 1.0}, {"kernel": 2.0}]})
      ['layers/0/kernel', 'layers/1/kernel']
    """
    found, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found]


def specs(params: Any, dimension_numbers: Any = None) -> list[Any]:
    """The dimension numbers of every leaf, in their order: a spec or None.

    Args:
      params: the tree.
      dimension_numbers: a spec as in :func:`optim.matrices.view` for all leaves of two or more axes, a tree
        (a prefix of the parameters') of specs and Nones, or a function of the parameters that gives one.
    """
    dimension_numbers = resolved(dimension_numbers, params)
    found: list[Any] = []
    jax.tree.map(
        lambda spec, sub: found.extend(spec if x.ndim > 1 else None for x in jax.tree.leaves(sub)),
        dimension_numbers,
        params,
        is_leaf=lambda x: x is None or hasattr(x, "reduction_axis"),
    )
    return found


def views(params: Any, dimension_numbers: Any = None) -> list[View]:
    """The view of every leaf, in their order; arguments as in :func:`optim.matrices.specs`."""
    leaves = zip(
        jax.tree.leaves(params), specs(params, dimension_numbers), paths(params), strict=True
    )
    return [view(x.shape, spec, path) for x, spec, path in leaves]


def linear_weights(params: Any, dimension_numbers: Any = None) -> Any:
    """Which leaves are weights of linear layers, by their axes and names: a tree of booleans.

    A leaf is one if it has two axes, or dimension numbers of its own, and nothing in its path says that it
    is an embedding, a norm, a bias or an output head: no name in it contains one of ``MARKS`` and none is one
    of ``NAMES`` (numbers at the end of names left out). FRUGAL's authors list the names of what is split
    instead (attention, MLP); the parts of a transformer that this gives are the same.

    Args: as in :func:`optim.matrices.specs`.

    Example:
      >>> import jax.numpy as jnp
      >>> w = jnp.zeros((4, 4))
      >>> linear_weights({"wte": w, "block_0": {"attn": w, "bias": w[0]}, "ln_1": w[0], "lm_head": w})
      {'block_0': {'attn': True, 'bias': False}, 'lm_head': False, 'ln_1': False, 'wte': False}
    """

    def is_one(x: Any, spec: Any, path: str) -> bool:
        names = [re.sub(r"_?\d+$", "", name) for name in path.lower().split("/")]
        named = any(name in NAMES or any(mark in name for mark in MARKS) for name in names)
        return (x.ndim == 2 or spec is not None) and not named

    leaves, structure = jax.tree.flatten(params)
    found = zip(leaves, specs(params, dimension_numbers), paths(params), strict=True)
    return jax.tree.unflatten(structure, [is_one(*leaf) for leaf in found])


class Cut(NamedTuple):
    """A tree of parameters in two: what is split, and what is left whole.

    Attributes:
      structure: of the tree.
      views: for every leaf how it is a matrix, or None where it is left whole.
    """

    structure: Any
    views: list[View | None]

    def split(self, tree: Any) -> Any:
        """The leaves that are split, as matrices; masked nodes in place of the others.

        Those that are sharded explicitly are gathered: lines, entries and blocks go across shards.
        """

        def gathered(x: Array) -> Array:
            is_spread = any(axis is not None for axis in jax.typeof(x).sharding.spec)
            return jax.sharding.reshard(x, jax.P()) if is_spread else x

        leaves = zip(self.views, self.structure.flatten_up_to(tree), strict=True)
        return self.structure.unflatten(
            [optax.MaskedNode() if v is None else v.to(gathered(x)) for v, x in leaves]
        )

    def whole(self, tree: Any) -> Any:
        """The leaves that are not; masked nodes in place of those that are."""
        leaves = zip(self.views, self.structure.flatten_up_to(tree), strict=True)
        return self.structure.unflatten([x if v is None else optax.MaskedNode() for v, x in leaves])

    def join(self, split: Any, whole: Any, like: Any) -> Any:
        """The tree again, sharded as ``like``."""

        def back(v: View, matrix: Array, x: Array) -> Array:
            sharding, leaf = jax.typeof(x).sharding, v.back(matrix)
            return (
                leaf
                if jax.typeof(leaf).sharding == sharding
                else jax.sharding.reshard(leaf, sharding)
            )

        sides = (self.structure.flatten_up_to(side) for side in (split, whole, like))
        leaves = zip(self.views, *sides, strict=True)
        return self.structure.unflatten(
            [b if v is None else back(v, a, x) for v, a, b, x in leaves]
        )


def cut(params: Any, which: Any = None, dimension_numbers: Any = None) -> Cut:
    """How a tree is cut.

    Args:
      params: the tree.
      which: a tree of booleans (a prefix of the parameters'), or a function of the parameters that gives
        one: what is split; :func:`optim.matrices.linear_weights` by default.
      dimension_numbers: as in :func:`optim.matrices.specs`.
    """
    if which is None:
        which = linear_weights(params, dimension_numbers)
    flags = jax.tree.leaves(broadcast(which, params, False))
    found = zip(flags, views(params, dimension_numbers), strict=True)
    return Cut(jax.tree.structure(params), [v if flag else None for flag, v in found])
