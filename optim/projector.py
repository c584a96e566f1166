"""How a gradient is split: a small part for the full optimizer, the rest for one without state.

A :class:`Projector` works on a tree of matrices (or stacks of matrices, each of which has a split of its
own). Its state is its own too: indices or bases, arrays alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from optim.matrices import paths


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


class _Split(NamedTuple):
    """The same for one matrix, without a turn: init takes a shape and a dtype, up the shape."""

    init: Callable[[tuple[int, int], Any, float], Any]
    refresh: Callable[[Array, Array, Any], Any]
    down: Callable[[Array, Any], tuple[Array, Array]]
    up: Callable[[Array, Any, tuple[int, int]], Array]


def each_matrix(split: _Split) -> Projector:
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
        leaves, structure = jax.tree.flatten(grads)
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
        leaves, structure = jax.tree.flatten(grads)
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


def _draw(key: Array, size: int, number: int) -> Int[Array, " number"]:
    """That many of the first ``size`` numbers in rising order, every such set as likely as any other."""
    return jnp.sort(jax.random.permutation(key, size)[:number]).astype(jnp.int32)


def _lines(axis: int) -> Projector:
    """Random lines along an axis of the matrix."""
    at = (lambda i: (slice(None), i)) if axis == 1 else (lambda i: (i, slice(None)))

    def init(shape: tuple[int, int], dtype: Any, density: float) -> Array:
        return jnp.arange(count(shape[axis], density), dtype=jnp.int32)

    def refresh(key: Array, grad: Array, kept: Array) -> Array:
        return _draw(key, grad.shape[axis], kept.size)

    def places(kept: Array, size: int) -> tuple[Array, Array]:
        """For every line: whether it is kept, and its place among those kept (any, where it is not)."""
        none = kept.size
        place = jnp.full(size, none, jnp.int32).at[kept].set(jnp.arange(none, dtype=jnp.int32))
        return jnp.expand_dims(place < none, 1 - axis), jnp.minimum(place, none - 1)

    def down(grad: Array, kept: Array) -> tuple[Array, Array]:
        if kept.size == 0:
            return grad[at(slice(0, 0))], grad
        if kept.size == grad.shape[axis]:
            return grad, jnp.zeros_like(grad)
        is_kept, _ = places(kept, grad.shape[axis])
        compact = grad.at[at(kept)].get(mode="promise_in_bounds", unique_indices=True)
        return compact, jnp.where(is_kept, 0, grad)

    def up(compact: Array, kept: Array, shape: tuple[int, int]) -> Array:
        if kept.size == 0:
            return jnp.zeros(shape, compact.dtype)
        if kept.size == shape[axis]:
            return compact
        is_kept, place = places(kept, shape[axis])
        # Read by its inverse and not scattered, so that it is one loop with what is done to the result.
        full = compact.at[at(place)].get(mode="promise_in_bounds")
        return jnp.where(is_kept, full, 0)

    return each_matrix(_Split(init, refresh, down, up))


def columns() -> Projector:
    """Random columns, ``int(density * columns)`` of every matrix (at least one).

    Columns are those of the array, (rows, columns) = (inputs, outputs) in JAX: PyTorch, which keeps the
    transpose, calls them rows.

    State: 4 bytes for each column kept.
    """
    return _lines(1)


def rows() -> Projector:
    """Random rows, as :func:`optim.projector.columns`; what is kept lies together in memory."""
    return _lines(0)
