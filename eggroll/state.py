"""The state of a run, and the metrics of an update."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8, PyTree, UInt32

from eggroll.plan.leaf import Plan


class State(NamedTuple):
    """Everything that a run carries from one generation to the next. All leaves are arrays.

    Attributes:
      params: the mean of the population, in the dtypes given to ``init``.
      master: float32 copies of the trained leaves with a narrower dtype, by path; or of an int8 leaf what
        rounding left of it, in int8 (:func:`rest_of`).
      optimizer: the state of the optax optimizer.
      generation: number of generations done; int32 ``[]``.
      seed: the two words that all randomness is derived from; uint32 ``[2]``.
    """

    params: PyTree
    master: dict[str, Array]
    optimizer: PyTree
    generation: Int[Array, ""]
    seed: UInt32[Array, "2"]


class Metrics(NamedTuple):
    """The metrics of one update: scalar arrays, or None for a quantity that was not measured.

    Attributes:
      generation: the generation that was evaluated.
      fitness_mean: mean score of the members with a finite score; None if no scores were given.
      fitness_best: the largest of these scores.
      fitness_worst: the smallest of these scores.
      fitness_std: the standard deviation of these scores (ddof 0).
      invalid: number of members with a score that is not finite; their pairs are dropped.
      identical_pairs: number of valid pairs whose two members scored the same; they contribute
        zero.
      updated: False if no pair contributed; parameters and optimizer state are then unchanged.
      update_norm: Euclidean norm of the change of the parameters.
      agreement: cosine between the estimates of two halves of the population; None unless
        requested. With cosine c, the cosine of the whole estimate to the true gradient is about
        sqrt(2 c / (1 + c)).
      sigma: standard deviation of the noise.
    """

    generation: Int[Array, ""]
    fitness_mean: Float[Array, ""] | None
    fitness_best: Float[Array, ""] | None
    fitness_worst: Float[Array, ""] | None
    fitness_std: Float[Array, ""] | None
    invalid: Int[Array, ""]
    identical_pairs: Int[Array, ""]
    updated: Bool[Array, ""]
    update_norm: Float[Array, ""]
    agreement: Float[Array, ""] | None
    sigma: Float[Array, ""]


# An int8 rest is in such parts of a step: half a step is 127 of them.
PARTS = 254


def rest_of(value: Float[Array, "*shape"], stored: Int8[Array, "*shape"]) -> Int8[Array, "*shape"]:
    """What is missing from an int8 array to the value that it is the rounded form of, in 254ths of a step.

    The accumulated error of arXiv 2602.03120, in a byte instead of a float.

    Example:
      >>> print(rest_of(jnp.array([3.25, -1.5]), jnp.array([3, -2], jnp.int8)))
      [ 64 127]
    """
    return jnp.clip(jnp.round((value - stored) * PARTS), -127, 127).astype(jnp.int8)


def _whole(stored: Array, master: Array) -> Array:
    """The value that the optimizer sees of a leaf with a copy or a rest."""
    if master.dtype != jnp.int8:
        return master
    return stored.astype(jnp.float32) + master.astype(jnp.float32) / PARTS


def trainable_of(plan: Plan, params: PyTree, master: dict[str, Array]) -> PyTree:
    """The tree that the optimizer sees: None for frozen leaves; where there are copies or rests, float32."""
    leaves, tree = jax.tree.flatten(params)
    seen = [
        (_whole(w, master[leaf.path]) if leaf.path in master else w) if leaf.trainable else None
        for leaf, w in zip(plan.leaves, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, seen)
