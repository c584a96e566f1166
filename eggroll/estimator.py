"""Weights and noise to a gradient estimate, without a perturbation ever being built.

The estimate for a minimiser is ``-(1/N) sum_i w_i E_i / sigma`` (arXiv 2511.16652, section 4, in the
plain scale of an ES gradient). Members of a pair have opposite noise, so with ``d_p = w_2p - w_2p+1``
it is ``-(1/N) sum_p d_p A_p B_p^T / (sqrt(r) sigma)``: one matrix product over (pair, rank).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Int, Num, UInt32

from eggroll.noise import Noise
from eggroll.perturbation import Draw, Sigma, draw_pairs
from eggroll.plan import Leaf, Matrix, Plan
from eggroll.population.pairs import by_chunk, part_of, split_pairs, stored
from eggroll.population.placement import AXIS, constrain, devices, member_axis
from eggroll.values import fixed_point

# Noise of this many bytes is contracted at a time. It fixes the order of summation, so it depends
# on nothing but the plan: kept and redrawn factors then give the same bits.
CHUNK_BYTES = 64 * 2**20


def pairs_at_once(plan: Plan, pairs: int) -> int:
    most = CHUNK_BYTES // max(1, plan.noise_bytes)
    if plan.integer:
        most = min(most, fixed_point.pairs_in_int32(plan.largest_rank))
    return max(1, min(pairs, most))


def weighted_noise(
    plan: Plan,
    noise: Noise,
    seed: UInt32[Array, "2"],
    epoch: Int[Array, ""],
    weights: Num[Array, "pairs"],
    kept: list[Draw] | None = None,
    mesh: Mesh | None = None,
    everywhere: bool = False,
    fixed: bool = False,
) -> list[Array | None]:
    """``sum_p d_p E_p sqrt(rank)`` for every trainable leaf, in float32 (float64 for float64).

    Of an integer plan ``sum_p d_p A_p B_p`` in int32, exact and the same in any order.

    Args:
      plan: the treatment of every leaf.
      noise: the source of samples.
      seed: the run's seed.
      epoch: generation // noise_reuse.
      weights: the difference of the two members' weights, of every pair; of an integer plan int8 in
        {-1, 0, 1}.
      kept: the draws of all pairs, leaves ``[pairs, ...]``, where they were kept; else redrawn.
      mesh: each device sums its own pairs, then the sums are added up.
      everywhere: each device sums all pairs instead, and nothing is sent.
      fixed: sums of floats are the same bits whatever the number of devices: those of fixed parts of
        the population are gathered, and added up in order. Nothing that was kept is used.

    Returns:
      For each leaf an array of its shape, or None for a frozen one.
    """
    pairs = weights.shape[0]
    limbs = plan.integer and pairs > fixed_point.pairs_in_int32(plan.largest_rank)
    local = everywhere or devices(mesh) == 1
    of_pairs = functools.partial(_sum_of_pairs, plan, noise, limbs)

    def on_device(ids: Array, valid: Array, data: Any) -> list[Any]:
        d, kept = data
        total = of_pairs(seed, epoch, ids, jnp.where(valid, d, 0), kept)
        return total if local else list(map(_add_up, plan.leaves, total))

    def in_parts(ids: Array, valid: Array, d: Array) -> list[Any]:
        of_part = lambda part: stored(of_pairs, epoch >= 0, seed, epoch, *part, None)
        sums = lax.map(of_part, by_chunk((ids, jnp.where(valid, d, 0)), part_of(pairs)))
        sums = sums if local else lax.all_gather(sums, AXIS, tiled=True)
        in_order = lambda x: functools.reduce(jnp.add, [x[i] for i in range(parts)])
        return jax.tree.map(in_order, sums)

    if fixed and not plan.integer:
        parts = -(-pairs // part_of(pairs))
        total = split_pairs(in_parts, pairs, weights, mesh, jax.P(), part_of(pairs), everywhere)
    else:
        specs = [jax.P() if local else _spec_of_sum(leaf) for leaf in plan.leaves]
        total = split_pairs(on_device, pairs, (weights, kept), mesh, specs, 1, everywhere)
    if limbs:
        total = [None if x is None else fixed_point.from_limbs(*x) for x in total]
    return [follow(leaf, x, mesh) for leaf, x in zip(plan.leaves, total, strict=True)]


def follow(leaf: Leaf, x: Array | None, mesh: Mesh | None = None) -> Array | None:
    """Something of a leaf's shape, laid out on the mesh as the leaf is."""
    return None if x is None else constrain(x, leaf.spec, mesh)


def _sum_of_pairs(
    plan: Plan,
    noise: Noise,
    limbs: bool,
    seed: UInt32[Array, "2"],
    epoch: Int[Array, ""],
    ids: Int[Array, "share"],
    d: Num[Array, "share"],
    kept: list[Draw] | None,
) -> list[Any]:
    """The sum over these pairs, a chunk of them at a time; in limbs where int32 would not hold it."""
    at_once = pairs_at_once(plan, ids.shape[0])
    count = -(-ids.shape[0] // at_once)
    # What fills up the last chunk weighs nothing.
    d = jnp.pad(d, (0, count * at_once - d.shape[0]))

    def add(total: list[Any], chunk: Any) -> tuple[list[Any], None]:
        ids, d, draws = chunk
        if draws is None:
            draws = draw_pairs(plan, noise, seed, epoch, ids)
        sums: list[Any] = [
            follow(leaf, contract(leaf, x, d)) for leaf, x in zip(plan.leaves, draws, strict=True)
        ]
        sums = fixed_point.to_limbs(sums) if limbs else sums
        return jax.tree.map(jnp.add, total, sums), None

    zero: list[Any] = [
        follow(leaf, jnp.zeros(leaf.shape, leaf.sums)) if leaf.trainable else None
        for leaf in plan.leaves
    ]
    zero = fixed_point.to_limbs(zero) if limbs else zero
    chunks = by_chunk((ids, d, kept), at_once)
    if count == 1:
        return add(zero, jax.tree.map(lambda x: x[0], chunks))[0]
    return lax.scan(add, zero, chunks)[0]


def _add_up(leaf: Leaf, total: Any) -> Any:
    """The sum over devices; of a leaf that is itself sharded over them, each keeps its own shard."""
    axis = member_axis(leaf.spec)
    if axis is None:
        return lax.psum(total, AXIS)
    return lax.psum_scatter(total, AXIS, scatter_dimension=axis, tiled=True)


def _spec_of_sum(leaf: Leaf) -> PartitionSpec:
    axis = member_axis(leaf.spec)
    return jax.P() if axis is None else jax.P(*(None,) * axis, AXIS)


def contract(leaf: Leaf, drawn: Draw, d: Num[Array, "pairs"]) -> Array | None:
    """The weighted sum of one leaf's noise over a chunk of pairs, ``[*shape]``."""
    if not drawn:
        return None
    sums = leaf.sums
    # A product of int8 is summed in int32 as it stands: in int32 it would be several times as slow.
    dtype = leaf.dtype if leaf.integer else sums
    d = d.astype(dtype)
    if not isinstance(leaf.treatment, Matrix):
        if leaf.integer:
            a, b = (x[:, 0].astype(sums) for x in drawn)
            return (a * b * d.reshape(-1, *(1,) * (a.ndim - 1))).sum(0, dtype=sums)
        return jnp.tensordot(d, drawn[0].astype(dtype), 1)
    a, b = (x.astype(dtype) for x in drawn)  # [pairs, rank, *axes]
    # Onto B, not A: XLA transposes A for the product, and would work the weights out again at each
    # of its entries, where here it does so once a pair.
    b = b * d.reshape(-1, *(1,) * (b.ndim - 1))
    t = leaf.treatment
    axes = range(len(leaf.shape))
    in_a = [x for x in axes if x not in t.columns]
    in_b = [x for x in axes if x not in t.rows]
    a = a.reshape(*a.shape[:2], *(leaf.shape[x] for x in in_a))
    b = b.reshape(*b.shape[:2], *(leaf.shape[x] for x in in_b))
    n = len(leaf.shape)
    return jnp.einsum(
        a, [n, n + 1, *in_a], b, [n, n + 1, *in_b], list(axes), preferred_element_type=sums
    )


def gradient(
    plan: Plan,
    sums: list[Array | None],
    sigma: Sigma,
    members: Int[Array, ""],
) -> list[Array | None]:
    """The sums of :func:`weighted_noise` as a gradient for a minimiser, ``-(1/N) ... / sigma``.

    Of integers just their negative: what is divided by is the optimizer's to know.
    """

    def of(leaf: Leaf, total: Array | None) -> Array | None:
        if total is None:
            return None
        if leaf.integer:
            return -total
        factor = 1 / (leaf.root_rank * leaf.sigma * sigma * jnp.maximum(members, 1))
        return -total * factor.astype(total.dtype)

    return [of(leaf, total) for leaf, total in zip(plan.leaves, sums, strict=True)]
