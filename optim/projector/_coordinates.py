"""Splits by coordinates: random columns, rows or entries of a matrix."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Int, PyTree, UInt

from optim.projector._interface import Projector, Split, count, each_matrix


def least(
    bits: UInt[Array, "sets size"], number: int
) -> tuple[Int[Array, "sets number"], Bool[Array, "sets size"]]:
    """Draws a random subset of each row: the places of its least random bits.

    Every subset of the size is as likely as any other.

    Returns:
      The places of the subset, ascending; and for every place whether it is in the subset.

    Example:
      >>> least(jnp.array([[7, 1, 9, 1, 3]], jnp.uint32), 2)[0]
      Array([[1, 3]], dtype=int32)
    """
    iota = jax.lax.broadcasted_iota(jnp.int32, bits.shape, 1)
    # Among equal bits the first ones count.
    last, at = (x[:, number - 1 : number] for x in jax.lax.sort((bits, iota), num_keys=1))
    among = (bits < last) | (bits == last) & (iota <= at)
    return jnp.sort(jnp.where(among, iota, bits.shape[1]))[:, :number], among


class Lines(NamedTuple):
    """Random lines of a matrix.

    Attributes:
      kept: the numbers of the lines that are kept, ascending, so that memory is read in its order.
      place: for every line that is kept its place among them; for the others the place of the kept
        line before it, or 0.
      is_kept: for every line whether it is kept.
    """

    kept: Int[Array, "*layers kept"]
    place: Int[Array, "*layers lines"]
    is_kept: Bool[Array, "*layers lines"]


def draw(key: Array, lines: Sequence[Lines]) -> list[Lines]:
    """Draws new lines; every set of them is as likely as any other.

    Matrices with equally many lines are drawn together, since sorts take long to compile.
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
    """Takes rows or columns of a matrix; every index must be in it.

    XLA's CPU compiler gathers columns one after the other, each across all of memory. Taken as
    entries of the flat matrix, they are read in the order in which they are written, and in one
    loop with what is done to them. A matrix that is spread over devices cannot be flat, hence one
    CPU only.
    """
    alone = jax.default_backend() == "cpu" and jax.device_count() == 1
    if axis == 0 or not alone or x.size >= 2**31:
        at = (slice(None), index) if axis == 1 else index
        return x.at[at].get(mode="promise_in_bounds")
    start = jax.lax.iota(jnp.int32, x.shape[0]) * x.shape[1]
    # This changes nothing, since no row begins below 0. It is a second reader of the matrix, so
    # that XLA keeps the matrix in memory and does not compute each entry anew wherever it is read.
    start = jnp.maximum(start, jnp.minimum(jnp.real(x[0, 0]).astype(jnp.int32), 0))
    # Unsigned, so that no index counts from the end.
    at = start.astype(jnp.uint32)[:, None] + index.astype(jnp.uint32)
    return x.reshape(-1).at[at].get(mode="promise_in_bounds")


def _lines(axis: int) -> Projector:
    """Random lines along an axis of the matrix."""

    def init(shape: tuple[int, ...], dtype: DTypeLike, density: float) -> Lines:
        every = jnp.arange(shape[axis], dtype=jnp.int32)
        number = count(shape[axis], density)
        return Lines(every[:number], jnp.minimum(every, max(number - 1, 0)), every < number)

    def refresh(key: Array, turn: Array, grads: PyTree, projection: PyTree) -> PyTree:
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
        # A gather by the inverse and no scatter, so that XLA fuses it with what is done to the
        # result.
        full = _take(compact, lines.place, axis)
        return jnp.where(jnp.expand_dims(lines.is_kept, 1 - axis), full, 0)

    return each_matrix(Split(init, down, up))._replace(refresh=refresh)


def columns() -> Projector:
    """Random columns, ``int(density * columns)`` of every matrix (at least one).

    Columns are those of the array, which in JAX are the outputs of a layer. PyTorch keeps the
    transpose and calls them rows.

    State: 5 bytes a column and 4 for each that is kept.
    """
    return _lines(1)


def rows() -> Projector:
    """Random rows, ``int(density * rows)`` of every matrix (at least one).

    Rows are those of the array, which in JAX are the inputs of a layer. PyTorch keeps the transpose
    and calls them columns: these are the columns of FRUGAL's authors. A row lies in one piece in
    memory: on a CPU, for a Llama model of 60M parameters, a step of FRUGAL takes 0.87 of the time of
    AdamW with rows and 1.01 with columns (``benchmarks/optim.py``).

    State: 5 bytes a row and 4 for each that is kept.
    """
    return _lines(0)


def randk() -> Projector:
    """Random entries, ``int(density * entries)`` of every matrix.

    State: 4 bytes for each entry that is kept.

    This is slow: entries are gathered and scattered one by one, and a draw sorts all of them.
    """

    def init(shape: tuple[int, ...], dtype: DTypeLike, density: float) -> Array:
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
