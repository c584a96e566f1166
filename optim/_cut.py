"""Trees of parameters in two: what is split, as matrices, and what is left whole."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from optim._dimensions import Leaf, leaves_of
from optim._linear_weights import is_linear, is_unknown
from optim._matrices import View, view
from optim._sharding import alike, gathered
from optim._trees import Setting, broadcast


class Cut(NamedTuple):
    """How a tree of parameters is in two.

    Attributes:
      structure: of the tree.
      views: for every leaf how it is a matrix, or None where it is left whole.
    """

    structure: Any
    views: list[View | None]

    def split(self, tree: PyTree) -> PyTree:
        """The leaves that are split, as matrices; masked nodes in place of the others.

        Leaves whose types say how they are sharded are gathered: lines, entries and blocks go
        across shards.
        """
        leaves = zip(self.views, self.structure.flatten_up_to(tree), strict=True)
        return self.structure.unflatten(
            [optax.MaskedNode() if v is None else v.to(gathered(jnp.asarray(x))) for v, x in leaves]
        )

    def select(self, tree: PyTree) -> PyTree:
        """The leaves that are split, as they are; masked nodes in place of the others."""
        leaves = zip(self.views, self.structure.flatten_up_to(tree), strict=True)
        return self.structure.unflatten([optax.MaskedNode() if v is None else x for v, x in leaves])

    def whole(self, tree: PyTree) -> PyTree:
        """The leaves that are left whole; masked nodes in place of those that are split."""
        leaves = zip(self.views, self.structure.flatten_up_to(tree), strict=True)
        return self.structure.unflatten([x if v is None else optax.MaskedNode() for v, x in leaves])

    def join(self, split: PyTree, whole: PyTree, like: PyTree) -> PyTree:
        """The tree again, sharded as ``like``."""
        sides = (self.structure.flatten_up_to(side) for side in (split, whole, like))
        leaves = zip(self.views, *sides, strict=True)
        return self.structure.unflatten(
            [b if v is None else alike(v.back(a), x) for v, a, b, x in leaves]
        )


def cut(
    params: PyTree,
    which: Setting = None,
    dimension_numbers: Setting = None,
    tell: bool = False,
) -> Cut:
    """How a tree is cut. Leaves without entries are left whole.

    Args:
      params: the tree.
      which: what is split: a tree of booleans (a prefix of the parameters'), or a function of the
        parameters that returns one; :func:`optim.linear_weights` by default.
      dimension_numbers: as in :func:`optim.linear_weights`.
      tell: whether to warn of leaves that are left whole only because their axes are not known.
    """
    leaves = leaves_of(params, dimension_numbers)
    if which is None:
        flags = [is_linear(leaf) for leaf in leaves]
        if tell:
            _tell([leaf for leaf in leaves if is_unknown(leaf)])
    else:
        flags = jax.tree.leaves(broadcast(which, params, False))
    views = [
        view(leaf.shape, leaf.spec, leaf.names.path) if flag and 0 not in leaf.shape else None
        for leaf, flag in zip(leaves, flags, strict=True)
    ]
    return Cut(jax.tree.structure(params), views)


def _tell(unknown: list[Leaf]) -> None:
    if unknown:
        first = ", ".join(
            f"{leaf.names.path or 'the parameter'} {list(leaf.shape)}" for leaf in unknown[:3]
        )
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        warnings.warn(
            f"{first}{more}: left whole, since their axes of rows and columns are not known; name "
            "them in dimension_numbers to split these leaves, or pass split to leave them whole",
            stacklevel=4,
        )
