"""What a projector is: how gradients are split, matrix by matrix."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, DTypeLike, PyTree

from optim._trees import paths


class Projector(NamedTuple):
    """Four functions of trees.

    Attributes:
      init: (matrices, density) -> projection. Only the shapes and dtypes of the matrices count. The
        projection is a valid split already.
      refresh: (key, turn, grads, projection) -> projection: the split of turn 0, 1, 2, ... Its
        randomness is a function of key and turn.
      down: (grads, projection) -> (compact, rest): the part kept, in its compact form, and the
        gradient without that part, in full.
      up: (compact, projection, grads) -> matrices: the compact form in full, zero where the rest
        is. Only the shapes of the gradients count.
    """

    init: Callable[[PyTree, float], PyTree]
    refresh: Callable[[Array, Array, PyTree, PyTree], PyTree]
    down: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
    up: Callable[[PyTree, PyTree, PyTree], PyTree]


class Split(NamedTuple):
    """The same for one matrix: init takes its shape and dtype, refresh a key, up the shape."""

    init: Callable[[tuple[int, ...], DTypeLike, float], Any]
    down: Callable[[Array, Any], tuple[Array, Array]]
    up: Callable[[Array, Any, tuple[int, ...]], Array]
    refresh: Callable[[Array, Array, Any], Any] = lambda key, grad, projection: projection


def each_matrix(split: Split) -> Projector:
    """Applies a split of one matrix to every matrix of a tree, and to every layer of a stack."""

    def init(matrices: PyTree, density: float) -> PyTree:
        for x, path in zip(jax.tree.leaves(matrices), paths(matrices), strict=True):
            if len(x.shape) not in (2, 3):
                raise ValueError(
                    f"{path or 'the parameter'}: expected a matrix or a stack of matrices, "
                    f"got the shape {x.shape}; leave it out of split"
                )

        def of(x: Any) -> Any:
            one = split.init(x.shape[-2:], x.dtype, density)
            layers = x.shape[:-2]
            return jax.tree.map(lambda a: jax.numpy.broadcast_to(a, layers + a.shape), one)

        return jax.tree.map(of, matrices)

    def refresh(key: Array, turn: Array, grads: PyTree, projection: PyTree) -> PyTree:
        leaves = jax.tree.leaves(grads)
        structure: Any = jax.tree.structure(grads)
        key = jax.random.fold_in(key, turn)
        found: list[Any] = []
        for i, (g, one) in enumerate(zip(leaves, structure.flatten_up_to(projection), strict=True)):
            own = jax.random.fold_in(key, i)
            if found:
                # One matrix after the other: a decomposition takes several times the memory of its
                # matrix, and XLA would start all of them at once.
                g, found[-1] = jax.lax.optimization_barrier((g, found[-1]))
            if g.ndim == 2:
                found.append(split.refresh(own, g, one))
            else:
                each = jax.random.split(own, g.shape[0]), g, one
                found.append(jax.lax.map(lambda layer: split.refresh(*layer), each))
        return structure.unflatten(found)

    def down(grads: PyTree, projection: PyTree) -> tuple[PyTree, PyTree]:
        leaves = jax.tree.leaves(grads)
        structure: Any = jax.tree.structure(grads)
        of = lambda g, p: split.down(g, p) if g.ndim == 2 else jax.vmap(split.down)(g, p)
        pairs = [of(*gp) for gp in zip(leaves, structure.flatten_up_to(projection), strict=True)]
        return tuple(structure.unflatten([pair[i] for pair in pairs]) for i in (0, 1))

    def up(compact: PyTree, projection: PyTree, grads: PyTree) -> PyTree:
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
