"""The gradient estimate, from weights and noise; no perturbation is built.

The estimate for a minimiser is ``-(1/N) sum_i w_i E_i / sigma`` (arXiv 2511.16652, section 4, in
the plain scale of an ES gradient). The members of a pair have opposite noise. With
``d_p = w_2p - w_2p+1`` the estimate is ``-(1/N) sum_p d_p A_p B_p^T / (sqrt(r) sigma)``: one matrix
product that contracts (pair, rank).

In subspaces the noise of a pair is ``sqrt(K) M_p E_p`` for a mask ``M_p`` that keeps one entry of K; the
estimate for an entry is then the mean over the N / K members that perturb it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array as AnyArray
from jaxtyping import Int, Num, UInt32

from eggroll.arithmetic import Sigma
from eggroll.noise import Noise
from eggroll.perturbation import Draw, draw_pairs
from eggroll.plan.leaf import Leaf, Plan
from eggroll.plan.treatments import Matrix, Nodes
from eggroll.population.pairs import by_chunk, split_pairs
from eggroll.population.placement import AXIS, constrain, devices, member_axis
from eggroll.population.schedule import FAST, Schedule, isolated
from eggroll.values import fixed_point

# The largest number of bytes of noise in one product. It fixes the order of summation, so it is a
# constant: factors that were kept and factors that are drawn again then give the same bits.
CHUNK_BYTES = 64 * 2**20

# Sums of noise: one array a leaf, None for a frozen leaf. During the summation, a sum that could
# overflow int32 is a pair of limbs.
Sums = list[Array | None]
Parts = list[Any]


def pairs_at_once(plan: Plan, pairs: int) -> int:
    """The number of pairs, at most ``pairs``, in one product."""
    most = CHUNK_BYTES // max(1, plan.noise_bytes)
    limit = plan.arithmetic.pairs_in_sum(plan.largest_rank)
    return max(1, min(pairs, most, pairs if limit is None else limit))


def weighted_noise(
    plan: Plan,
    noise: Noise,
    seed: UInt32[AnyArray, "2"],
    epoch: Int[AnyArray, ""],
    weights: Num[AnyArray, "pairs"],
    kept: list[Draw] | None = None,
    mesh: Mesh | None = None,
    everywhere: bool = False,
    schedule: Schedule = FAST,
) -> Sums:
    """``sum_p d_p E_p sqrt(rank)`` for every trained leaf, in float32 (float64 for float64 leaves).

    For an integer plan the result is ``sum_p d_p A_p B_p`` in int32: exact, and the same in any
    order.

    Args:
      plan: the treatment of every leaf.
      noise: the source of samples.
      seed: the words of the run's seed.
      epoch: generation // noise_reuse.
      weights: the difference between the weights of a pair's two members; int8 in {-1, 0, 1} for an
        integer plan.
      kept: the noise of all pairs, leaves ``[pairs, ...]``, or None to draw it again.
      mesh: each device sums the noise of its own pairs, then the sums are added over devices.
      everywhere: each device sums the noise of all pairs instead, and sends nothing.
      schedule: a reproducible schedule gathers the sums of fixed parts of the population and adds
        them in order. It ignores ``kept``.

    Returns:
      For each leaf an array of its shape, or None for a frozen leaf.
    """
    pairs = weights.shape[0]
    limit = plan.arithmetic.pairs_in_sum(plan.largest_rank)
    limbs = limit is not None and pairs > limit
    local = everywhere or devices(mesh) == 1
    of_pairs = functools.partial(_sum_of_pairs, plan, noise, limbs)

    def on_device(ids: Array, valid: Array, data: tuple[Array, list[Draw] | None]) -> Parts:
        d, kept = data
        total = of_pairs(seed, epoch, ids, jnp.where(valid, d, 0), kept)
        return total if local else list(map(_add_up, plan.leaves, total))

    def in_parts(ids: Array, valid: Array, d: Array) -> Parts:
        of_part = lambda part: isolated(of_pairs, epoch >= 0, seed, epoch, *part, None)
        sums = lax.map(of_part, by_chunk((ids, jnp.where(valid, d, 0)), schedule.part(pairs)))
        sums = sums if local else lax.all_gather(sums, AXIS, tiled=True)
        in_order = lambda x: functools.reduce(jnp.add, [x[i] for i in range(parts)])
        return jax.tree.map(in_order, sums)

    if schedule.is_reproducible and not plan.arithmetic.exact_sums:
        part = schedule.part(pairs)
        parts = -(-pairs // part)
        total = split_pairs(in_parts, pairs, weights, mesh, jax.P(), part, everywhere)
    else:
        specs = [jax.P() if local else _spec_of_sum(leaf) for leaf in plan.leaves]
        total = split_pairs(on_device, pairs, (weights, kept), mesh, specs, 1, everywhere)
    if limbs:
        total = [None if x is None else fixed_point.from_limbs(*x) for x in total]
    return [follow(leaf, x, mesh) for leaf, x in zip(plan.leaves, total, strict=True)]


def follow(leaf: Leaf, x: Array | None, mesh: Mesh | None = None) -> Array | None:
    """An array of a leaf's shape, with the leaf's sharding on the mesh."""
    return None if x is None else constrain(x, leaf.spec, mesh)


def _sum_of_pairs(
    plan: Plan,
    noise: Noise,
    limbs: bool,
    seed: UInt32[AnyArray, "2"],
    epoch: Int[AnyArray, ""],
    ids: Int[AnyArray, "share"],
    d: Num[AnyArray, "share"],
    kept: list[Draw] | None,
) -> Parts:
    """The sum over these pairs, a chunk at a time; in limbs if int32 could overflow."""
    at_once = pairs_at_once(plan, ids.shape[0])
    count = -(-ids.shape[0] // at_once)
    # The padding of the last chunk gets weight 0.
    d = jnp.pad(d, (0, count * at_once - d.shape[0]))

    def add(total: Parts, chunk: tuple[Array, Array, list[Draw] | None]) -> tuple[Parts, None]:
        ids, d, draws = chunk
        if draws is None:
            draws = draw_pairs(plan, noise, seed, epoch, ids)
        sums: Parts = [
            follow(leaf, contract(leaf, x, d)) for leaf, x in zip(plan.leaves, draws, strict=True)
        ]
        sums = fixed_point.to_limbs(sums) if limbs else sums
        return jax.tree.map(jnp.add, total, sums), None

    zero: Parts = [
        follow(leaf, jnp.zeros(leaf.shape, leaf.sum_type)) if leaf.noise_shapes() else None
        for leaf in plan.leaves
    ]
    zero = fixed_point.to_limbs(zero) if limbs else zero
    chunks = by_chunk((ids, d, kept), at_once)
    if count == 1:
        return add(zero, jax.tree.map(lambda x: x[0], chunks))[0]
    return lax.scan(add, zero, chunks)[0]


def _add_up(leaf: Leaf, total: Any) -> Any:
    """The sum over devices; if the leaf is sharded over them, each device keeps its shard."""
    axis = member_axis(leaf.spec)
    if axis is None:
        return lax.psum(total, AXIS)
    return lax.psum_scatter(total, AXIS, scatter_dimension=axis, tiled=True)


def _spec_of_sum(leaf: Leaf) -> PartitionSpec:
    axis = member_axis(leaf.spec)
    return jax.P() if axis is None else jax.P(*(None,) * axis, AXIS)


def contract(leaf: Leaf, drawn: Draw, d: Num[AnyArray, "pairs"]) -> Array | None:
    """The weighted sum of one leaf's noise over a chunk of pairs, ``[*shape]``; None if frozen."""
    if not drawn:
        return None
    dtype = leaf.arithmetic.product_type(leaf.dtype)
    d, noise = d.astype(dtype), tuple(x.astype(dtype) for x in drawn)
    if not isinstance(leaf.treatment, Matrix):
        return leaf.arithmetic.sum_dense(noise, d)
    a, b = noise  # [pairs, rank, *axes]
    # The weights multiply B and not A: XLA transposes A for the product, and would compute the
    # weights again at every entry of A instead of once a pair.
    b = b * d.reshape(-1, *(1,) * (b.ndim - 1))
    t = leaf.treatment
    axes = range(len(leaf.shape))
    in_a = [x for x in axes if x not in t.columns]
    in_b = [x for x in axes if x not in t.rows]
    a = a.reshape(*a.shape[:2], *(leaf.shape[x] for x in in_a))
    b = b.reshape(*b.shape[:2], *(leaf.shape[x] for x in in_b))
    n = len(leaf.shape)
    return jnp.einsum(
        a, [n, n + 1, *in_a], b, [n, n + 1, *in_b], list(axes),
        preferred_element_type=leaf.sum_type,
    )  # fmt: skip


def gradient(plan: Plan, sums: Sums, sigma: Sigma, members: Int[AnyArray, ""]) -> Sums:
    """The gradient for a minimiser, ``-(1/N) ... / sigma``, from :func:`weighted_noise`.

    Integer sums are only negated: the integer optimizer applies the scale.

    Args:
      plan: the treatment of every leaf.
      sums: one array a leaf, None for a frozen leaf.
      sigma: sigma in the form that the arithmetic takes.
      members: the divisor N; int32 ``[]``.
    """

    def of(leaf: Leaf, total: Array | None) -> Array | None:
        if total is None:
            return None
        # Sums of node noise contain the factor of the parameter.
        own = 1.0 if isinstance(leaf.treatment, Nodes) else leaf.sigma
        estimate = leaf.arithmetic.gradient(
            total, own, leaf.root_rank, sigma, members, leaf.root_subspaces
        )
        if leaf.slices is not None:
            # The noise of a slice has the square of its factor as its variance.
            estimate *= jnp.asarray(1 / np.square(leaf.slices.array), estimate.dtype)
        return estimate

    return [of(leaf, total) for leaf, total in zip(plan.leaves, sums, strict=True)]
