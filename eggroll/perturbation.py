"""The parameters of a member, lazy or built, from a plan and the noise of its pair."""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Array as AnyArray
from jaxtyping import Int, Num, PyTree, UInt32

from eggroll.arithmetic import Sigma
from eggroll.interpret.node_pass import NodePass
from eggroll.noise import Noise, Role, groups_at, stream
from eggroll.plan.leaf import Leaf, Plan
from eggroll.plan.treatments import Matrix, Nodes
from eggroll.population.placement import constrain
from eggroll.population.schedule import isolated
from eggroll.values import LowRank, Upcast, build
from eggroll.values.node import Node, root

# The noise of one pair for one leaf: the factors (A, B), dense noise (E,), or () if frozen.
Draw = tuple[Array, ...]


def draw(
    plan: Plan,
    noise: Noise,
    seed: UInt32[AnyArray, "2"],
    epoch: Int[AnyArray, ""],
    pair: Int[AnyArray, ""],
) -> list[Draw]:
    """Draws the noise of one pair: a pure function of the arguments and the paths of the leaves.

    Args:
      plan: the treatment of every leaf.
      noise: the source of samples.
      seed: the words of the run's seed.
      epoch: generation // noise_reuse.
      pair: index of the pair; may be traced.

    Returns:
      For each leaf ``(A [rank, *axes], B [rank, *axes])``, ``(E [*shape],)`` (two factors
      ``[1, *shape]`` for integers) or ``()``. The slices of a leaf have their factors on sigma in it, and
      what is outside the subspace of the pair is 0.
    """

    def of(leaf: Leaf) -> Draw:
        shapes = leaf.noise_shapes()
        roles = (Role.DENSE,) if len(shapes) == 1 else (Role.A, Role.B)
        drawn = [
            noise.sample(stream(seed, leaf.path, epoch, pair, role), shape, leaf.noise_dtype)
            for role, shape in zip(roles, shapes, strict=False)
        ]
        if leaf.slices is not None:
            assert leaf.sliced is not None
            x = drawn[leaf.sliced]
            drawn[leaf.sliced] = x * jnp.asarray(leaf.slices.array, x.dtype)
        if leaf.subspaces > 1:
            x = drawn[leaf.masked]
            inside = subspaces_of(leaf, seed, epoch) == (pair % leaf.subspaces).astype(jnp.uint32)
            drawn[leaf.masked] = jnp.where(inside, x, jnp.zeros((), x.dtype))
        return tuple(drawn)

    return [of(leaf) for leaf in plan.leaves]


def subspaces_of(
    leaf: Leaf, seed: UInt32[AnyArray, "2"], epoch: Int[AnyArray, ""]
) -> UInt32[AnyArray, "..."]:
    """The subspace of every position of a leaf: a pure function of (seed, epoch, path).

    Args:
      leaf: the parameter.
      seed: the words of the run's seed.
      epoch: generation // noise_reuse.

    Returns:
      Numbers from 0 to ``leaf.subspaces - 1``, with the axes of the leaf, of size 1 along those that
      are not divided. Each matrix of a stack has a division of its own.
    """
    axes = leaf.divided
    batch = leaf.treatment.batch if isinstance(leaf.treatment, Matrix) else ()
    words = stream(seed, leaf.path, epoch, 0, Role.SUBSPACE)
    shape = [n if axis in (*axes, *batch) else 1 for axis, n in enumerate(leaf.shape)]
    # Every matrix starts with a block of its own.
    size = math.prod(leaf.shape[axis] for axis in axes)
    stride = leaf.subspaces * -(-size // leaf.subspaces)
    index = _index(shape, batch) * jnp.uint32(stride) + _index(shape, axes)
    return groups_at(words[0], words[1], index, leaf.subspaces)


def _index(shape: list[int], axes: tuple[int, ...]) -> UInt32[AnyArray, "..."]:
    """The row-major position of every entry along some axes, ``[*shape]``."""
    index = jnp.zeros(shape, jnp.uint32)
    for k, axis in enumerate(axes):
        stride = math.prod(shape[after] for after in axes[k + 1 :])
        index += lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    return index


def draw_pairs(
    plan: Plan,
    noise: Noise,
    seed: UInt32[AnyArray, "2"],
    epoch: Int[AnyArray, ""],
    pairs: Int[AnyArray, "pairs"],
) -> list[Draw]:
    """Draws the noise of several pairs, leaves ``[pairs, ...]``, and materialises it.

    XLA would otherwise fuse the draw into the operations that use it, and repeat it for each of
    them, for both members of the pair and for each observation. (Measured: an MLP of width 256, 16
    observations a member, 64 members at a time on one CPU core takes 1.3 times plain inference
    behind a barrier and 0.9 times in a branch.)

    The noise of a sharded parameter is drawn in the same shards. Arguments as in :func:`draw`.
    """

    def make(seed: Array, epoch: Array, pairs: Array) -> list[Draw]:
        draws = jax.vmap(lambda pair: draw(plan, noise, seed, epoch, pair))(pairs)
        return [follow(leaf, drawn) for leaf, drawn in zip(plan.leaves, draws, strict=True)]

    return isolated(make, epoch >= 0, seed, epoch, pairs)


def follow(leaf: Leaf, drawn: Draw) -> Draw:
    """The noise ``[pairs, ...]`` of one leaf, with the leaf's sharding on the mesh."""
    specs = (spec and jax.P(None, *spec) for spec in leaf.noise_specs())
    return tuple(constrain(x, spec) for x, spec in zip(drawn, specs, strict=True))


def perturb(
    plan: Plan,
    params: PyTree,
    draws: list[Draw],
    sigma: Sigma,
    sign: Num[AnyArray, ""],
    nodes: NodePass | None = None,
) -> PyTree:
    """The parameters of a member; low-rank leaves are LowRank values, which are not built.

    Args:
      plan: the treatment of every leaf.
      params: the mean.
      draws: the noise of the member's pair.
      sigma: sigma in the form that the arithmetic takes.
      sign: 1 or -1, of the dtype ``sign_type`` of the arithmetic.
      nodes: the pass of the member, where parameters have node noise.
    """
    leaves, tree = jax.tree.flatten(params)

    def of(leaf: Leaf, w: Array, drawn: Draw) -> Array | LowRank | Upcast | Node:
        how = leaf.arithmetic
        if isinstance(leaf.treatment, Nodes):
            assert nodes is not None
            return nodes.region.adopt(root(w, 0, (leaf.path,), leaf.sigma))
        if not drawn:
            return w
        own = leaf.sigma * leaf.root_subspaces
        if isinstance(leaf.treatment, Matrix):
            return how.low_rank(w, drawn, sign, sigma, own, leaf.root_rank, leaf.path)
        return how.dense(w, drawn, sign, sigma, own, leaf.path)

    return jax.tree.unflatten(
        tree, [of(*each) for each in zip(plan.leaves, leaves, draws, strict=True)]
    )


def built_member(
    plan: Plan, params: PyTree, draws: list[Draw], sigma: Sigma, sign: Num[AnyArray, ""]
) -> PyTree:
    """The parameters of a member as arrays; perturbed leaves of a narrow float dtype are float32.

    Arguments as in :func:`perturb`.
    """
    lazy = perturb(plan, params, draws, sigma, sign)

    def dense(value: Array | LowRank | Upcast) -> Array:
        if isinstance(value, LowRank):
            return build(value)
        return value.value if isinstance(value, Upcast) else jnp.asarray(value)

    return jax.tree.map(dense, lazy, is_leaf=lambda v: isinstance(v, LowRank | Upcast))
