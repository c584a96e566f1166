"""Splits by coordinates: random columns, rows or entries of a matrix."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt

from optim.projector._interface import Projector, Split, count, each_matrix


def least(
    bits: UInt[Array, "sets size"], number: int
) -> tuple[Int[Array, "sets number"], Bool[Array, "sets size"]]:
    """Where the least of each row of random bits are: a random subset, every one as likely as any other.

    Returns:
      Their places, rising; and for every place whether it is one.

    Example:
      >>> least(jnp.array([[7, 1, 9, 1, 3]], jnp.uint32), 2)[0]
      Array([[1, 3]], dtype=int32)
    """
    iota = jax.lax.broadcasted_iota(jnp.int32, bits.shape, 1)
    # Of equal bits the first count.
    last, at = (x[:, number - 1 : number] for x in jax.lax.sort((bits, iota), num_keys=1))
    among = (bits < last) | (bits == last) & (iota <= at)
    return jnp.sort(jnp.where(among, iota, bits.shape[1]))[:, :number], among


class Lines(NamedTuple):
    """Random lines of a matrix.

    Attributes:
      kept: the numbers of those kept, rising: memory is then read in its order.
      place: for every line its place among those kept; for the others that of the one kept before it, or 0.
      is_kept: whether it is one.
    """

    kept: Int[Array, "*layers kept"]
    place: Int[Array, "*layers lines"]
    is_kept: Bool[Array, "*layers lines"]


def draw(key: Array, lines: Sequence[Lines]) -> list[Lines]:
    """New lines, every set of them as likely as any other.

    Those of matrices with equally many lines are drawn together: sorts take long to compile.
    """
    found: list[Any] = [None] * len(lines)
    sizes = [x.place.shape[-1] for x in lines]
    for size in sorted(set(sizes)):
        members = [i for i, other in enumerate(sizes) if other == size]
        layers = [math.prod(lines[i].place.shape[:-1]) for i in members]
        number = lines[members[0]].kept.shape[-1]
        if number in (0, size):
            for i in members:
                found[i] = lines[i]
            continue
        bits = jax.random.bits(jax.random.fold_in(key, size), (sum(layers), size))
        kept, is_kept = least(bits, number)
        place = jnp.maximum(jnp.cumsum(is_kept, axis=1, dtype=jnp.int32) - 1, 0)
        start = 0
        for i, more in zip(members, layers, strict=True):
            new = Lines(*(x[start : start + more] for x in (kept, place, is_kept)))
            found[i] = jax.tree.map(lambda a, old: a.reshape(old.shape), new, lines[i])
            start += more
    return found


def _take(x: Array, index: Array, axis: int) -> Array:
    """Rows or columns of a matrix, all of them in it.

    XLA's CPU compiler gathers columns one after the other, each across all of memory: as entries of the flat
    matrix they are read in the order that they are written in, and in one loop with what is done to them.
    That is for one CPU alone, since matrices that are spread over devices cannot be flat.
    """
    alone = jax.default_backend() == "cpu" and jax.device_count() == 1
    if axis == 0 or not alone or x.size >= 2**31:
        at = (slice(None), index) if axis == 1 else index
        return x.at[at].get(mode="promise_in_bounds")
    start = jax.lax.iota(jnp.int32, x.shape[0]) * x.shape[1]
    # No row begins below 0: this changes none, but is a second reader of the matrix, which XLA therefore
    # keeps in memory. For a single one it would work each entry out anew wherever it is read.
    start = jnp.maximum(start, jnp.minimum(x[0, 0].astype(jnp.int32), 0))
    # Unsigned, so that no index is taken to count from the end.
    at = start.astype(jnp.uint32)[:, None] + index.astype(jnp.uint32)
    return x.reshape(-1).at[at].get(mode="promise_in_bounds")


def _lines(axis: int) -> Projector:
    """Random lines along an axis of the matrix."""

    def init(shape: tuple[int, ...], dtype: Any, density: float) -> Lines:
        every = jnp.arange(shape[axis], dtype=jnp.int32)
        number = count(shape[axis], density)
        return Lines(every[:number], jnp.minimum(every, max(number - 1, 0)), every < number)

    def refresh(key: Array, turn: Array, grads: Any, projection: Any) -> Any:
        leaves, structure = jax.tree.flatten(projection, is_leaf=lambda x: isinstance(x, Lines))
        drawn = draw(jax.random.fold_in(key, turn), leaves)
        return jax.tree.unflatten(structure, drawn)

    def down(grad: Array, lines: Lines) -> tuple[Array, Array]:
        if lines.kept.size == 0:
            return jax.lax.slice_in_dim(grad, 0, 0, axis=axis), grad
        is_kept = jnp.expand_dims(lines.is_kept, 1 - axis)
        return _take(grad, lines.kept, axis), jnp.where(is_kept, 0, grad)

    def up(compact: Array, lines: Lines, shape: tuple[int, ...]) -> Array:
        if lines.kept.size == 0:
            return jnp.zeros(shape, compact.dtype)
        # Read by its inverse and not scattered, so that it is one loop with what is done to the result.
        full = _take(compact, lines.place, axis)
        return jnp.where(jnp.expand_dims(lines.is_kept, 1 - axis), full, 0)

    return each_matrix(Split(init, down, up))._replace(refresh=refresh)


def columns() -> Projector:
    """Random columns, ``int(density * columns)`` of every matrix (at least one).

    Columns are those of the array, which in JAX has (rows, columns) = (inputs, outputs): PyTorch keeps the
    transpose and calls them rows.

    State: 5 bytes a column and 4 for each that is kept.
    """
    return _lines(1)


def rows() -> Projector:
    """Random rows, as :func:`optim.projector.columns`; faster, since each lies in one piece in memory."""
    return _lines(0)


def randk() -> Projector:
    """Random entries, ``int(density * entries)`` of every matrix.

    State: 4 bytes for each that is kept. Slow: entries are gathered and scattered one by one, and drawing
    them sorts all.
    """

    def init(shape: tuple[int, ...], dtype: Any, density: float) -> Array:
        return jnp.arange(count(math.prod(shape), density), dtype=jnp.int32)

    def refresh(key: Array, grad: Array, kept: Array) -> Array:
        if kept.size in (0, grad.size):
            return kept
        return least(jax.random.bits(key, (1, grad.size)), kept.size)[0][0]

    def down(grad: Array, kept: Array) -> tuple[Array, Array]:
        flat = grad.reshape(-1)
        compact = flat.at[kept].get(mode="promise_in_bounds", unique_indices=True)
        rest = flat.at[kept].set(0, unique_indices=True, indices_are_sorted=True)
        return compact, rest.reshape(grad.shape)

    def up(compact: Array, kept: Array, shape: tuple[int, ...]) -> Array:
        flat = jnp.zeros(math.prod(shape), compact.dtype)
        return (
            flat.at[kept].set(compact, unique_indices=True, indices_are_sorted=True).reshape(shape)
        )

    return each_matrix(Split(init, down, up, refresh))
