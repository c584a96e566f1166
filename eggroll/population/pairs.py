"""Maps a function over the population: pairs, chunks, devices.

The unit is a pair of members, since both members share one draw of noise. ``vmap`` maps the pairs
of a chunk, and chunks run one after another to bound memory. The axis "population" of a mesh
divides the pairs among devices. Chunks and devices change the results of a pair by rounding alone,
and under a reproducible :class:`~eggroll.population.schedule.Schedule` not at all.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, PyTree

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


def sum_pairs(
    fn: Callable[[Array, PyTree, PyTree], PyTree],
    pairs: int,
    data: PyTree,
    weights: PyTree,
    schedule: Schedule = FAST,
    mesh: Mesh | None = None,
    exact: bool = False,
    always: Bool[Array, ""] | bool = True,
) -> PyTree:
    """The sum of ``fn`` over all pairs, a chunk at a time.

    Args:
      fn: ``fn(pairs [n], data [n, ...], weights [n, ...])`` returns sums over these pairs, to which a
        pair whose weights are 0 adds nothing.
      pairs: number of pairs.
      data: a tree with the data of each pair, leaves ``[pairs, ...]``.
      weights: a tree with the weights of each pair, leaves ``[pairs, ...]``.
      schedule: determines the chunks. A reproducible schedule sums fixed parts of the population one
        by one, and adds their sums in order.
      mesh: divides pairs over its axis "population".
      exact: whether sums have the same bits in any order.
      always: a true value, as for :func:`~eggroll.population.schedule.isolated`.

    Example:
      >>> fn = lambda pairs, data, weights: (data * weights).sum()
      >>> chunks = Schedule.fast(chunk=4)
      >>> sum_pairs(fn, 3, jnp.array([1, 10, 100]), jnp.array([1, 2, 3]), chunks).tolist()
      321
    """
    at_once = schedule.pairs_at_once(pairs, mesh)
    in_order = schedule.is_reproducible and not exact
    part = schedule.part(pairs) if in_order else share(pairs, mesh)

    def of_chunk(chunk: tuple[Array, Array, PyTree, PyTree]) -> PyTree:
        ids, counts, data, weights = chunk
        along = lambda x: counts.reshape(-1, *(1,) * (x.ndim - 1))
        weights = jax.tree.map(lambda x: jnp.where(along(x), x, 0), weights)
        return schedule.isolate(fn, jnp.asarray(always), ids, data, weights)

    def of_part(given: tuple[Array, Array, PyTree, PyTree]) -> PyTree:
        n = given[0].shape[0]
        ids, valid, data, weights = by_chunk(given, at_once)
        fresh = jnp.arange(valid.size) < n
        chunks = ids, valid & fresh.reshape(valid.shape), data, weights
        first, rest = jax.tree.map(lambda x: x[0], chunks), jax.tree.map(lambda x: x[1:], chunks)
        total = of_chunk(first)
        if ids.shape[0] == 1:
            return total
        add = lambda total, chunk: (jax.tree.map(jnp.add, total, of_chunk(chunk)), None)
        return lax.scan(add, total, rest)[0]

    def on_device(ids: Array, valid: Array, given: tuple[PyTree, PyTree]) -> PyTree:
        everything = ids, valid, *given
        if not in_order:
            total = of_part(everything)
            return total if devices(mesh) == 1 else lax.psum(total, AXIS)
        sums = lax.map(of_part, by_chunk(everything, part))
        sums = sums if devices(mesh) == 1 else lax.all_gather(sums, AXIS, tiled=True)
        parts = -(-pairs // part)
        ordered = lambda x: functools.reduce(jnp.add, [x[i] for i in range(parts)])
        return jax.tree.map(ordered, sums)

    block = part if in_order else 1
    return split_pairs(on_device, pairs, (data, weights), mesh, jax.P(), block)


def map_pairs(
    fn: Callable[[Array, PyTree], PyTree],
    pairs: int,
    data: PyTree,
    schedule: Schedule = FAST,
    mesh: Mesh | None = None,
    always: Bool[Array, ""] | bool = True,
    some: Int[Array, "some"] | None = None,
) -> PyTree:
    """Maps ``fn`` over all pairs, or over some, a chunk at a time.

    Args:
      fn: ``fn(pairs [n], data [n, ...])`` returns a tree of leaves ``[n, 2, ...]``, the two members
        of each pair.
      pairs: number of pairs.
      data: a tree with the data of each pair that is mapped, leaves ``[pairs, ...]`` or ``[some, ...]``.
      schedule: determines the chunks, by the number of all pairs.
      mesh: divides pairs over its axis "population".
      always: a true value, as for :func:`~eggroll.population.schedule.isolated`.
      some: numbers of the pairs to map over; all by default.

    Returns:
      The same tree with leaves ``[2 * pairs, ...]``: members 2p and 2p + 1 are pair p. For some
      pairs, the leaves are ``[2 * some, ...]``, in the order of the pairs.

    Example:
      >>> fn = lambda pairs, data: jnp.stack([pairs, -pairs], 1) * data[:, None]
      >>> map_pairs(fn, 3, jnp.array([1, 10, 100]), Schedule.fast(chunk=2)).tolist()
      [0, 0, 10, -10, 200, -200]
      >>> map_pairs(fn, 3, jnp.array([5]), some=jnp.array([2])).tolist()
      [10, -10]
    """
    at_once = schedule.pairs_at_once(pairs, mesh)
    count = pairs if some is None else some.shape[0]
    if not schedule.is_reproducible:
        at_once = min(at_once, share(count, mesh))

    def of_chunk(chunk: tuple[Array, PyTree]) -> PyTree:
        return schedule.isolate(fn, jnp.asarray(always), *chunk)

    def on_device(ids: Array, valid: Array, given: tuple[Array | None, PyTree]) -> PyTree:
        numbers, data = given
        ids, own = ids if numbers is None else numbers, ids.shape[0]
        if at_once == own:
            return of_chunk((ids, data))
        out = lax.map(of_chunk, by_chunk((ids, data), at_once))
        joined = lambda x: x.reshape(x.shape[0] * at_once, *x.shape[2:])[:own]
        return jax.tree.map(joined, out)

    block = at_once if schedule.is_reproducible else 1
    out = split_pairs(on_device, count, (some, data), mesh, jax.P(AXIS), block)
    return _by_member(out, count)


def map_and_sum(
    fn: Callable[[Array, PyTree, PyTree], tuple[PyTree, PyTree]],
    pairs: int,
    data: PyTree,
    weights: PyTree,
    mesh: Mesh | None = None,
) -> tuple[PyTree, PyTree]:
    """:func:`map_pairs` and :func:`sum_pairs` of one function, over all pairs of a device at a time.

    Args:
      fn: ``fn(pairs [n], data [n, ...], weights [n, ...])`` returns leaves ``[n, 2, ...]``, which do not
        depend on the weights, and sums over these pairs.
      pairs: number of pairs.
      data: a tree with the data of each pair, leaves ``[pairs, ...]``.
      weights: a tree with the weights of each pair, leaves ``[pairs, ...]``.
      mesh: divides pairs over its axis "population".

    Example:
      >>> fn = lambda pairs, data, weights: (jnp.stack([data, -data], 1), (data * weights).sum())
      >>> out, total = map_and_sum(fn, 3, jnp.array([1, 10, 100]), jnp.array([1, 2, 3]))
      >>> out.tolist(), total.tolist()
      ([1, -1, 10, -10, 100, -100], 321)
    """

    def on_device(ids: Array, valid: Array, given: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        data, weights = given
        along = lambda x: valid.reshape(-1, *(1,) * (x.ndim - 1))
        out, total = fn(ids, data, jax.tree.map(lambda x: jnp.where(along(x), x, 0), weights))
        return out, total if devices(mesh) == 1 else lax.psum(total, AXIS)

    out, total = split_pairs(on_device, pairs, (data, weights), mesh, (jax.P(AXIS), jax.P()))
    return _by_member(out, pairs), total


def _by_member(out: PyTree, pairs: int) -> PyTree:
    """Leaves ``[2 * pairs, ...]`` of leaves ``[pairs or more, 2, ...]``."""
    return jax.tree.map(lambda x: x[:pairs].reshape(2 * pairs, *x.shape[2:]), out)
