"""Maps a function over the population: pairs, chunks, devices.

The unit is a pair of members, since both members share one draw of noise. ``vmap`` maps the pairs
of a chunk, and chunks run one after another to bound memory. The axis "population" of a mesh
divides the pairs among devices. Chunks and devices change the results of a pair by rounding alone,
and under a reproducible :class:`~eggroll.population.schedule.Schedule` not at all.
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
    """Reshapes leaves ``[n, ...]`` to ``[chunks, at_once, ...]``; first entries pad the last chunk.

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
    """Calls ``fn(ids [share], valid [share], data [share, ...])`` on each device, over its pairs.

    The padding after the last pair repeats the first pairs, with ``valid`` False.

    Args:
      fn: the function.
      pairs: number of pairs.
      data: a tree with the data of each pair, leaves ``[pairs, ...]``, or padded by this function.
      mesh: divides pairs over its axis "population".
      out_specs: sharding of the outputs over that axis, as for ``jax.shard_map``.
      block: number of pairs that stay together on a device.
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
    # check_vma would refuse loops of models that start from constants and then vary over devices.
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
    """Maps ``fn`` over all pairs, a chunk at a time.

    Args:
      fn: ``fn(pairs [n], data [n, ...])`` returns a tree of leaves ``[n, 2, ...]``, the two members
        of each pair.
      pairs: number of pairs.
      data: a tree with the data of each pair, leaves ``[pairs, ...]``.
      schedule: determines the chunks.
      mesh: divides pairs over its axis "population".
      always: a true value, as for :func:`~eggroll.population.schedule.isolated`.

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
