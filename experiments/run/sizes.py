"""Sizes of weights and of their noise, for the rows of a run: what `eggroll doctor RUN` measures steps by."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

import eggroll
from eggroll.inputs import sigma_of
from eggroll.state import trainable_of
from eggroll.values.fixed_point import FRACTION


def sizes(es: eggroll.EvolutionStrategy, state: eggroll.State) -> dict[str, Array]:
    """The sizes of the generation that a state is about to run.

    Args:
        es: the strategy.
        state: its state.

    Returns:
        ``weights``: how many numbers are trained. ``weight_norm``: their Euclidean norm. ``noise_norm``: the
        norm that is expected of the noise of a member; 0 where all noise is on nodes.

    Example:
        >>> es = eggroll.EvolutionStrategy(optimizer=optax.sgd(1.0), population=2, sigma=0.5)
        >>> state = es.init({"w": jnp.array([3.0, 4.0, 0.0, 0.0])}, 0)
        >>> {name: float(x) for name, x in sizes(es, state).items()}
        {'weights': 4.0, 'weight_norm': 5.0, 'noise_norm': 1.0}
    """
    plan = es.plan_of(state.params)
    trained = [leaf for leaf in plan.leaves if leaf.trainable]
    count = sum(int(np.prod(leaf.shape)) for leaf in trained)
    noisy = sum(
        leaf.sigma**2 * float(np.prod(leaf.shape)) for leaf in trained if leaf.noise_shapes()
    )
    # In the fixed point of integer models 16 stands for 1.
    unit = float(1 << FRACTION) if es.arithmetic.exact_sums else 1.0

    def norms(
        tree: PyTree, generation: Int[Array, ""]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        wide = jax.tree.map(lambda w: w.astype(jnp.float32), tree)
        noise = jnp.float32(unit * noisy**0.5) * sigma_of(es, generation)
        return optax.tree.norm(wide), noise

    tree = trainable_of(plan, state.params, state.master)
    # In isolation, as all that has the same bits on any number of devices.
    weight_norm, noise_norm = es.schedule.isolate(
        norms, state.generation >= 0, tree, state.generation
    )
    counted = jnp.float32(count) if count >= 2**31 else jnp.int32(count)
    return {"weights": counted, "weight_norm": weight_norm, "noise_norm": noise_norm}
