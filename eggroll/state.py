"""What a run carries from generation to generation, and what an update says of itself."""

from typing import Any, NamedTuple

import jax
from jax import Array
from jaxtyping import Bool, Float, Int, UInt32

from eggroll.plan import Plan


class State(NamedTuple):
    """All that a run carries from generation to generation: arrays only, no random state.

    Attributes:
      params: the mean, in the types that it was given in.
      master: float32 copies of the leaves of a narrower type, by path.
      optimizer: the state of the optax optimizer.
      generation: int32 scalar, generations done.
      seed: two words that all randomness comes from.
    """

    params: Any
    master: dict[str, Array]
    optimizer: Any
    generation: Int[Array, ""]
    seed: UInt32[Array, "2"]


class Metrics(NamedTuple):
    """What one update says of itself; scalars.

    Attributes:
      generation: the generation that was evaluated.
      fitness_mean: mean over the members with a finite score.
      fitness_best: the best of them.
      fitness_worst: the worst of them.
      fitness_std: their standard deviation.
      invalid: members with a score that is not finite (their pairs are dropped).
      identical_pairs: valid pairs whose two members scored the same: they say nothing.
      updated: False where no pair said anything: parameters and optimizer state stay as they were.
      update_norm: Euclidean norm of the change of the parameters.
      agreement: cosine between the estimates of two halves of the population, NaN unless asked for.
        With cosine c, the whole's cosine to the true gradient is about sqrt(2 c / (1 + c)).
      sigma: the standard deviation of the noise.
    """

    generation: Int[Array, ""]
    fitness_mean: Float[Array, ""]
    fitness_best: Float[Array, ""]
    fitness_worst: Float[Array, ""]
    fitness_std: Float[Array, ""]
    invalid: Int[Array, ""]
    identical_pairs: Int[Array, ""]
    updated: Bool[Array, ""]
    update_norm: Float[Array, ""]
    agreement: Float[Array, ""]
    sigma: Float[Array, ""]


def trainable_of(plan: Plan, params: Any, master: dict[str, Array]) -> Any:
    """The tree that the optimizer sees: None where nothing is trained, master copies where kept."""
    leaves, tree = jax.tree.flatten(params)
    seen = [
        master.get(leaf.path, w) if leaf.trainable else None
        for leaf, w in zip(plan.leaves, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, seen)
