"""The state of a run, and the metrics of an update."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from eggroll.plan.leaf import Plan


class State(NamedTuple):
    """Everything that a run carries from one generation to the next. All leaves are arrays.

    Attributes:
      params: the mean of the population, in the dtypes given to ``init``.
      master: float32 copies of the trained leaves with a narrower dtype, by path.
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


def trainable_of(plan: Plan, params: PyTree, master: dict[str, Array]) -> PyTree:
    """The tree that the optimizer sees: None for frozen leaves, float32 copies where they exist."""
    leaves, tree = jax.tree.flatten(params)
    seen = [
        master.get(leaf.path, w) if leaf.trainable else None
        for leaf, w in zip(plan.leaves, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, seen)
