"""What a run carries from generation to generation, and the metrics of an update."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from eggroll.plan.leaf import Plan


class State(NamedTuple):
    """All that a run carries from generation to generation: arrays only, no random state.

    Attributes:
      params: the mean, in the types that it was given in.
      master: float32 copies of the leaves of a narrower type, by path.
      optimizer: the state of the optax optimizer.
      generation: int32 scalar, generations done.
      seed: two words that all randomness comes from.
    """

    params: PyTree
    master: dict[str, Array]
    optimizer: PyTree
    generation: Int[Array, ""]
    seed: UInt32[Array, "2"]


class Metrics(NamedTuple):
    """What one update says of itself: scalars, or None for what was not measured.

    Attributes:
      generation: the generation that was evaluated.
      fitness_mean: mean over the members with a finite score; None where no scores were given.
      fitness_best: the best of them.
      fitness_worst: the worst of them.
      fitness_std: their standard deviation.
      invalid: members with a score that is not finite (their pairs are dropped).
      identical_pairs: valid pairs whose two members scored the same: they say nothing.
      updated: False where no pair said anything: parameters and optimizer state stay as they were.
      update_norm: Euclidean norm of the change of the parameters.
      agreement: cosine between the estimates of two halves of the population; None unless asked for.
        With cosine c, the whole's cosine to the true gradient is about sqrt(2 c / (1 + c)).
      sigma: the standard deviation of the noise.
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
    """The tree that the optimizer sees: None where nothing is trained, float32 copies where kept."""
    leaves, tree = jax.tree.flatten(params)
    seen = [
        master.get(leaf.path, w) if leaf.trainable else None
        for leaf, w in zip(plan.leaves, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, seen)
