"""Maps a function over the population: pairs, chunks, devices.

The unit is a pair of members, since both share one draw of noise. Pairs are mapped by ``vmap`` in
chunks that bound memory, the chunks one after the other, and the axis "population" of a mesh
divides them among devices. Neither changes what a pair computes, but for rounding: compilers sum
in an order that depends on shapes and on what stands around. Where no bit may change, chunks are fixed
whatever the number of devices, and each is computed by itself (:func:`stored`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh
from jaxtyping import Bool

from eggroll.population.placement import AXIS, devices

# What a deterministic strategy cuts the population into, whatever the number of devices. More would
# serve more devices, and take more memory where the parts' sums are added up.
PARTS = 8


def share_of(pairs: int, mesh: Mesh | None, block: int = 1) -> int:
    """How many pairs each device gets, padding included: whole blocks.

    Example:
      >>> share_of(pairs=10, mesh=None, block=4)
      12
    """
    return block * -(-pairs // (block * devices(mesh)))


def part_of(pairs: int) -> int:
    """How many pairs are in each of the parts that do not depend on the number of devices."""
    return -(-pairs // PARTS)


def by_chunk(tree: Any, at_once: int) -> Any:
    """Leaves ``[n, ...]`` as ``[chunks, at_once, ...]``; the first entries fill up the last chunk.

    Example:
      >>> by_chunk(jnp.arange(5), 2).tolist()
      [[0, 1], [2, 3], [4, 0]]
    """

    def cut(x: Array) -> Array:
        chunks = -(-x.shape[0] // at_once)
        if chunks * at_once != x.shape[0]:
            x = x[jnp.arange(chunks * at_once) % x.shape[0]]
        return x.reshape(chunks, at_once, *x.shape[1:])

    return jax.tree.map(cut, tree)


def stored(fn: Callable[..., Any], always: Bool[Array, ""], *args: Any) -> Any:
    """``fn(*args)``, computed by itself and stored.

    XLA may fuse arithmetic with what stands around it: repeat it for each of its uses, or round
    otherwise than elsewhere. A barrier prevents that, but the CPU compiler removes barriers before it
    fuses. What a branch computes it always computes by itself, hence a branch there, always taken.

    Args:
      fn: what to compute.
      always: true, in a way that the compiler cannot know.
      *args: trees of arrays.
    """
    # Jitted so that it is traced once for both platforms. Not under a vmap over pairs for the same
    # reason: batching a branch traces it again, several times over.
    make = jax.jit(fn)

    def never(*args: Any) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(make, *args))

    def in_branch(*args: Any) -> Any:
        return lax.cond(always, make, never, *args)

    def behind_barrier(*args: Any) -> Any:
        return lax.optimization_barrier(make(*lax.optimization_barrier(args)))

    return lax.platform_dependent(*args, cpu=in_branch, default=behind_barrier)


def split_pairs(
    fn: Callable[..., Any],
    pairs: int,
    data: Any,
    mesh: Mesh | None,
    out_specs: Any,
    block: int = 1,
    everywhere: bool = False,
) -> Any:
    """Calls ``fn(ids [share], valid [share], data [share, ...])`` once a device, over its pairs.

    Ids past the last pair repeat the first ones and have ``valid`` False.

    Args:
      fn: what to call.
      pairs: how many.
      data: tree of what each pair gets, leaves ``[pairs, ...]``, or padded as this function pads.
      mesh: divides pairs over its axis "population".
      out_specs: how the outputs lie over that axis, as ``jax.shard_map`` wants it.
      block: pairs that stay together on a device.
      everywhere: every device gets all pairs.
    """
    total = share_of(pairs, None if everywhere else mesh, block)
    total *= 1 if everywhere else devices(mesh)
    ids = jnp.arange(total, dtype=jnp.int32)
    valid = ids < pairs
    ids = ids % pairs
    data = jax.tree.map(lambda x: x if x.shape[0] == total else x[ids], data)
    if mesh is None:
        return fn(ids, valid, data)
    spec = jax.P() if everywhere else jax.P(AXIS)
    # check_vma off: a model's loops start from constants, which it would not let vary over devices.
    return jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=(spec, spec, spec),
        out_specs=out_specs,
        axis_names={AXIS},
        check_vma=False,
    )(ids, valid, data)


def map_pairs(
    fn: Callable[[Any, Any], Any],
    pairs: int,
    data: Any,
    chunk: int | None,
    mesh: Mesh | None,
    always: Bool[Array, ""] | None = None,
) -> Any:
    """``fn`` of all pairs, a chunk of them at a time.

    Args:
      fn: ``fn(pairs [n], data [n, ...])`` gives a tree of leaves ``[n, 2, ...]``, the two members
        of each pair.
      pairs: how many.
      data: tree of what each pair gets, leaves ``[pairs, ...]``.
      chunk: members at a time on a device; None for all at once.
      mesh: divides pairs over its axis "population".
      always: as :func:`stored` wants it, for chunks that are the same whatever the number of devices,
        each computed by itself; then None stands for a part of the population.

    Returns:
      The same tree with leaves ``[2 * pairs, ...]``: members 2p and 2p + 1 are pair p.

    Example:
      >>> fn = lambda pairs, data: jnp.stack([pairs, -pairs], 1) * data[:, None]
      >>> map_pairs(fn, 3, jnp.array([1, 10, 100]), 2, None).tolist()
      [0, 0, 10, -10, 200, -200]
    """
    fixed = always is not None
    most = part_of(pairs) if fixed else share_of(pairs, mesh)
    at_once = most if chunk is None else max(1, chunk // 2)
    at_once = min(at_once, most)

    def of_chunk(chunk: Any) -> Any:
        return fn(*chunk) if always is None else stored(fn, always, *chunk)

    def on_device(ids: Any, valid: Any, data: Any) -> Any:
        share = ids.shape[0]
        if at_once == share:
            return of_chunk((ids, data))
        out = lax.map(of_chunk, by_chunk((ids, data), at_once))
        joined = lambda x: x.reshape(x.shape[0] * at_once, *x.shape[2:])[:share]
        return jax.tree.map(joined, out)

    block = at_once if fixed else 1
    out = split_pairs(on_device, pairs, data, mesh, jax.P(AXIS), block)
    return jax.tree.map(lambda x: x[:pairs].reshape(2 * pairs, *x.shape[2:]), out)
