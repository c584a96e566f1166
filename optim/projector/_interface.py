"""What a projector is: how a gradient is split, matrix by matrix."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from optim._matrices import paths


class Projector(NamedTuple):
    """Four functions of trees.

    Attributes:
      init: (matrices, density) -> projection; of the matrices only shapes and dtypes count. What it gives is
        a split already.
      refresh: (key, turn, grads, projection) -> projection: the split of turn 0, 1, 2, ...; what is random in
        it is a function of key and turn.
      down: (grads, projection) -> (compact, rest): the part kept, in its small form, and what is left of the
        gradient without it, in full.
      up: (compact, projection, grads) -> matrices: the small form in full, zero where the rest is. Of the
        gradients only the shapes count.
    """

    init: Callable[[Any, float], Any]
    refresh: Callable[[Array, Array, Any, Any], Any]
    down: Callable[[Any, Any], tuple[Any, Any]]
    up: Callable[[Any, Any, Any], Any]


class Split(NamedTuple):
    """The same for one matrix, drawn by a key of its own: init takes a shape and a dtype, up the shape."""

    init: Callable[[tuple[int, ...], Any, float], Any]
    down: Callable[[Array, Any], tuple[Array, Array]]
    up: Callable[[Array, Any, tuple[int, ...]], Array]
    refresh: Callable[[Array, Array, Any], Any] = lambda key, grad, projection: projection


def each_matrix(split: Split) -> Projector:
    """A split of one matrix for every matrix of a tree, and every layer of a stack."""

    def init(matrices: Any, density: float) -> Any:
        for x, path in zip(jax.tree.leaves(matrices), paths(matrices), strict=True):
            if len(x.shape) not in (2, 3):
                raise ValueError(
                    f"{path or 'the parameter'} has the shape {x.shape}: a matrix is right; say split=False"
                )

        def of(x: Any) -> Any:
            one = split.init(x.shape[-2:], x.dtype, density)
            layers = x.shape[:-2]
            return jax.tree.map(lambda a: jnp.broadcast_to(a, layers + a.shape), one)

        return jax.tree.map(of, matrices)

    def refresh(key: Array, turn: Array, grads: Any, projection: Any) -> Any:
        leaves = jax.tree.leaves(grads)
        structure: Any = jax.tree.structure(grads)
        key = jax.random.fold_in(key, turn)
        found = []
        for i, (g, one) in enumerate(zip(leaves, structure.flatten_up_to(projection), strict=True)):
            own = jax.random.fold_in(key, i)
            if g.ndim == 2:
                found.append(split.refresh(own, g, one))
            else:
                found.append(jax.vmap(split.refresh)(jax.random.split(own, g.shape[0]), g, one))
        return structure.unflatten(found)

    def down(grads: Any, projection: Any) -> tuple[Any, Any]:
        leaves = jax.tree.leaves(grads)
        structure: Any = jax.tree.structure(grads)
        of = lambda g, p: split.down(g, p) if g.ndim == 2 else jax.vmap(split.down)(g, p)
        pairs = [of(*gp) for gp in zip(leaves, structure.flatten_up_to(projection), strict=True)]
        return tuple(structure.unflatten([pair[i] for pair in pairs]) for i in (0, 1))

    def up(compact: Any, projection: Any, grads: Any) -> Any:
        def of(g: Array, c: Array, p: Any) -> Array:
            one = lambda c, p: split.up(c, p, g.shape[-2:])
            return one(c, p) if g.ndim == 2 else jax.vmap(one)(c, p)

        return jax.tree.map(of, grads, compact, projection)

    return Projector(init, refresh, down, up)


def count(size: int, density: float) -> int:
    """How many of ``size`` lines or entries are kept: rounded down, but at least one where any is.

    Example:
      >>> count(10, 0.25), count(2, 0.25), count(10, 0.0)
      (2, 1, 0)
    """
    return max(int(size * density), 1 if density > 0 else 0)
