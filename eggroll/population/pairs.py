"""Maps a function over the population: pairs, chunks, devices.

The unit is a pair of members, since both share one draw of noise. Pairs are mapped by ``vmap`` in
chunks that bound memory, one chunk after the other, and the axis "population" of a mesh divides them
among devices. Neither changes what a pair computes, except for rounding under a fast
:class:`~eggroll.population.schedule.Schedule`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, PyTree

from eggroll.population.placement import AXIS, devices
from eggroll.population.schedule import FAST, Schedule, share


def by_chunk(tree: PyTree, at_once: int) -> PyTree:
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


def split_pairs(
    fn: Callable[..., PyTree],
    pairs: int,
    data: PyTree,
    mesh: Mesh | None,
    out_specs: PyTree,
    block: int = 1,
    everywhere: bool = False,
) -> PyTree:
    """Calls ``fn(ids [share], valid [share], data [share, ...])`` once a device, over its pairs.

    Ids past the last pair repeat the first ones and have ``valid`` False.

    Args:
      fn: the function.
      pairs: how many pairs there are.
      data: tree of what each pair gets, leaves ``[pairs, ...]``, or padded as this function pads.
      mesh: divides pairs over its axis "population".
      out_specs: layout of the outputs over that axis, as ``jax.shard_map`` takes it.
      block: pairs that stay together on a device.
      everywhere: whether every device gets all pairs.
    """
    total = share(pairs, None if everywhere else mesh, block)
    total *= 1 if everywhere else devices(mesh)
    ids = jnp.arange(total, dtype=jnp.int32)
    valid = ids < pairs
    ids = ids % pairs
    data = jax.tree.map(lambda x: x if x.shape[0] == total else x[ids], data)
    if mesh is None:
        return fn(ids, valid, data)
    spec = jax.P() if everywhere else jax.P(AXIS)
    # check_vma off: loops of models start from constants, which it would not let vary over devices.
    return jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=(spec, spec, spec),
        out_specs=out_specs,
        axis_names={AXIS},
        check_vma=False,
    )(ids, valid, data)


def map_pairs(
    fn: Callable[[Array, PyTree], PyTree],
    pairs: int,
    data: PyTree,
    schedule: Schedule = FAST,
    mesh: Mesh | None = None,
    always: Bool[Array, ""] | bool = True,
) -> PyTree:
    """``fn`` of all pairs, a chunk of them at a time.

    Args:
      fn: ``fn(pairs [n], data [n, ...])`` gives a tree of leaves ``[n, 2, ...]``, the two members
        of each pair.
      pairs: how many pairs there are.
      data: tree of what each pair gets, leaves ``[pairs, ...]``.
      schedule: how pairs are cut into chunks.
      mesh: divides pairs over its axis "population".
      always: as :func:`~eggroll.population.schedule.isolated` takes it, for a reproducible schedule.

    Returns:
      The same tree with leaves ``[2 * pairs, ...]``: members 2p and 2p + 1 are pair p.

    Example:
      >>> fn = lambda pairs, data: jnp.stack([pairs, -pairs], 1) * data[:, None]
      >>> map_pairs(fn, 3, jnp.array([1, 10, 100]), Schedule.fast(chunk=2)).tolist()
      [0, 0, 10, -10, 200, -200]
    """
    at_once = schedule.pairs_at_once(pairs, mesh)

    def of_chunk(chunk: tuple[Array, PyTree]) -> PyTree:
        return schedule.isolate(fn, jnp.asarray(always), *chunk)

    def on_device(ids: Array, valid: Array, data: PyTree) -> PyTree:
        share = ids.shape[0]
        if at_once == share:
            return of_chunk((ids, data))
        out = lax.map(of_chunk, by_chunk((ids, data), at_once))
        joined = lambda x: x.reshape(x.shape[0] * at_once, *x.shape[2:])[:share]
        return jax.tree.map(joined, out)

    block = at_once if schedule.is_reproducible else 1
    out = split_pairs(on_device, pairs, data, mesh, jax.P(AXIS), block)
    return jax.tree.map(lambda x: x[:pairs].reshape(2 * pairs, *x.shape[2:]), out)
