"""Splits by blocks: whole layers or leaves, some at a time."""

import math
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from optim._trees import paths
from optim.projector._interface import Projector

Order = Literal["random", "shuffled", "ascending", "descending", "mirror"]
Unit = Literal["leaf", "layer"]


class Blocks(NamedTuple):
    """Which blocks are active.

    Attributes:
      active: the numbers of the active blocks, in their order in the compact vector.
      offset: for every block where it begins in that vector; -1 for blocks that are not in it.
    """

    active: Int[Array, " active"]
    offset: Int[Array, " blocks"]


class _Piece(NamedTuple):
    """A leaf, or one layer of a stack: its size, its block, and where it begins in the block."""

    size: int
    block: int
    start: int


class _Layout(NamedTuple):
    """The pieces of every leaf, and the sizes of the blocks that they form."""

    pieces: list[list[_Piece]]
    sizes: list[int]


def natural(name: str) -> list[Any]:
    """A key to sort names by, in which digits count as numbers.

    Example:
      >>> sorted(["layer_10", "layer_9", "head"], key=natural)
      ['head', 'layer_9', 'layer_10']
    """
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def block_names(path: str, layers: int | None, unit: Unit) -> list[str]:
    """The block of a leaf, or of each layer of a stack.

    Example:
      >>> block_names("params/layers_3/mlp/kernel", None, "layer")
      ['params/layers_3']
      >>> block_names("mlp", 2, "layer"), block_names("mlp", 2, "leaf")
      (['of 2 layers, 0', 'of 2 layers, 1'], ['mlp 0', 'mlp 1'])
    """
    if layers is not None:
        of = path if unit == "leaf" else f"of {layers} layers,"
        return [f"{of} {i}" for i in range(layers)]
    if unit == "layer":
        names = path.split("/")
        numbered = [i for i, name in enumerate(names) if re.search(r"\d$", name)]
        if numbered:
            return ["/".join(names[: numbered[0] + 1])]
    return [path]


def _layout(matrices: PyTree, unit: Unit) -> _Layout:
    leaves = jax.tree.leaves(matrices)
    names = [
        block_names(path, x.shape[0] if len(x.shape) == 3 else None, unit)
        for x, path in zip(leaves, paths(matrices), strict=True)
    ]
    numbers = {
        name: i for i, name in enumerate(sorted({n for of in names for n in of}, key=natural))
    }
    sizes = [0] * len(numbers)
    pieces: list[list[_Piece]] = []
    for x, of in zip(leaves, names, strict=True):
        pieces.append([])
        for name in of:
            block, size = numbers[name], math.prod(x.shape) // len(of)
            pieces[-1].append(_Piece(size, block, sizes[block]))
            sizes[block] += size
    return _Layout(pieces, sizes)


def _sequence(order: Order, blocks: int) -> list[int]:
    """The order in which the blocks take turns, where it is not random."""
    ascending = list(range(blocks))
    if order == "mirror":
        return [i for pair in zip(ascending, ascending[::-1], strict=True) for i in pair][:blocks]
    return ascending[::-1] if order == "descending" else ascending


def _capacity(sizes: Sequence[int], order: Order, number: int) -> int:
    """Entries of the compact vector: those of the largest set of blocks that is ever active.

    A long vector is rounded up to a multiple of 1024, so that it can be spread evenly over devices.
    """
    room = _largest(sizes, order, number)
    return room if room < 2**16 else -(-room // 1024) * 1024


def _largest(sizes: Sequence[int], order: Order, number: int) -> int:
    if order in ("random", "shuffled"):
        return sum(sorted(sizes)[len(sizes) - number :])
    ordered = [sizes[i] for i in _sequence(order, len(sizes))]
    turns = len(sizes) // math.gcd(number, len(sizes)) if number else 0
    starts = [t * number for t in range(turns)]
    return max(
        (sum(ordered[(s + j) % len(sizes)] for j in range(number)) for s in starts), default=0
    )


def _chosen(order: Order, key: Array, turn: Array, blocks: int, number: int) -> Array:
    """The blocks that are active in this turn."""
    at = jnp.arange(number, dtype=jnp.int32)
    sequence = jnp.asarray(_sequence(order, blocks), jnp.int32)
    if order == "random":
        return jax.random.permutation(jax.random.fold_in(key, turn), sequence)[:number]
    # Taken modulo first, so that no number of turns is too large.
    if order == "shuffled":
        turns = -(-blocks // number)
        sequence = jax.random.permutation(jax.random.fold_in(key, turn // turns), sequence)
        return sequence[(turn % turns * number + at) % blocks]
    return sequence[(turn % blocks * number + at) % blocks]


def _placed(chosen: Array, sizes: list[int]) -> Blocks:
    """These blocks, one after the other."""
    lengths = jnp.asarray(sizes, jnp.int32)[chosen]
    none = jnp.full(len(sizes), -1, jnp.int32)
    ends = jnp.cumsum(lengths, dtype=jnp.int32)
    return Blocks(chosen, none.at[chosen].set(ends - lengths))


def active_entries(matrices: PyTree, blocks: Blocks, unit: Unit) -> PyTree:
    """Which entries of the matrices are in an active block: a tree of booleans of their shapes."""
    layout = _layout(matrices, unit)
    structure: Any = jax.tree.structure(matrices)
    found: list[Bool[Array, ...]] = []
    for x, pieces in zip(jax.tree.leaves(matrices), layout.pieces, strict=True):
        flags = blocks.offset[jnp.array([p.block for p in pieces])] >= 0
        is_stack = len(x.shape) == 3
        found.append(jnp.broadcast_to(flags[:, None, None] if is_stack else flags[0], x.shape))
    return structure.unflatten(found)


def blockwise(
    order: Order = "random", unit: Unit = "layer", active: int | None = None
) -> Projector:
    """Whole blocks: the full optimizer works on some layers at a time, the other one on the rest.

    The active blocks lie one after the other in one vector, which is all that the full optimizer
    sees: it must work entry by entry, as Adam, Lion and SGD do. The vector has room for the largest
    set of blocks that is ever active; where all blocks have one size, none of it is wasted. Use
    this projector with ``on_refresh="reset"``: with ``"keep"`` a block would inherit the moments of
    another.

    Args:
      order: ``"random"``: drawn anew at each refresh (FRUGAL); ``"shuffled"``: all blocks in a
        random order, then all in another one (BAdam); ``"ascending"``, ``"descending"``: all blocks
        by the numbers in their names; ``"mirror"``: first, last, second, last but one, and so on.
      unit: ``"leaf"``: every leaf is a block. ``"layer"``: leaves form a block where their paths
        agree up to the first name that ends in a number (``layers_3``, ``layers/3``); a leaf without
        such a name is a block of its own. The layers of a stack (leaves whose dimension numbers leave
        an axis) are as many blocks, each of one leaf or of all such leaves.
      active: how many blocks are active at a time; by default ``round(density * blocks)``, at least
        one.

    State: 4 bytes a block, and 4 for each block that is active.
    """
    if order not in ("random", "shuffled", "ascending", "descending", "mirror"):
        raise ValueError(
            f"order must be random, shuffled, ascending, descending or mirror, got {order!r}"
        )
    if unit not in ("leaf", "layer"):
        raise ValueError(f"unit must be leaf or layer, got {unit!r}")
    if active is not None and (not isinstance(active, int) or active < 1):
        raise ValueError(
            f"active must be an int of at least 1, or None for the density, got {active!r}"
        )

    def number_of(blocks: int, density: float) -> int:
        number = max(round(density * blocks), 1 if density > 0 else 0) if active is None else active
        return min(number, blocks)

    def init(matrices: PyTree, density: float) -> Blocks:
        sizes = _layout(matrices, unit).sizes
        number = number_of(len(sizes), density)
        room = _capacity(sizes, order, number)
        if room >= 2**31:
            raise ValueError(f"the active blocks must have fewer than 2**31 entries, got {room}")
        return _placed(jnp.asarray(_sequence(order, len(sizes))[:number], jnp.int32), sizes)

    def refresh(key: Array, turn: Array, grads: PyTree, blocks: Blocks) -> Blocks:
        sizes, number = _layout(grads, unit).sizes, blocks.active.size
        return _placed(_chosen(order, key, turn, len(sizes), number), sizes) if number else blocks

    def down(grads: PyTree, blocks: Blocks) -> tuple[Array, PyTree]:
        layout = _layout(grads, unit)
        leaves = jax.tree.leaves(grads)
        structure: Any = jax.tree.structure(grads)
        room = _capacity(layout.sizes, order, blocks.active.size)
        # Pieces that are not active are written behind the active ones, one over the other: a
        # condition would copy the vector.
        largest = max((p.size for of in layout.pieces for p in of), default=0)
        pool = jnp.zeros(room + largest, jnp.result_type(*leaves) if leaves else jnp.float32)
        rest = []
        for g, pieces in zip(leaves, layout.pieces, strict=True):
            parts = g.reshape(len(pieces), -1)
            offsets = blocks.offset[jnp.array([p.block for p in pieces])]
            for i, p in enumerate(pieces):
                where = jnp.where(offsets[i] < 0, room, offsets[i] + p.start)
                pool = jax.lax.dynamic_update_slice(pool, parts[i].astype(pool.dtype), (where,))
            rest.append(jnp.where((offsets < 0)[:, None], parts, 0).reshape(g.shape))
        return pool[:room], structure.unflatten(rest)

    def up(compact: Array, blocks: Blocks, grads: PyTree) -> PyTree:
        layout = _layout(grads, unit)
        leaves = jax.tree.leaves(grads)
        structure: Any = jax.tree.structure(grads)
        found = []
        for g, pieces in zip(leaves, layout.pieces, strict=True):
            parts = []
            for p in pieces:
                offset = blocks.offset[p.block]
                if compact.size == 0:
                    parts.append(jnp.zeros(p.size, compact.dtype))
                    continue
                here = jax.lax.dynamic_slice(compact, (offset + p.start,), (p.size,))
                parts.append(jnp.where(offset < 0, 0, here))
            whole = parts[0] if len(parts) == 1 else jnp.stack(parts)
            found.append(whole.reshape(g.shape))
        return structure.unflatten(found)

    return Projector(init, refresh, down, up)
