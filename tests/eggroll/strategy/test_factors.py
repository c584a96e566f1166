"""The factors of a member's noise give the member."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eggroll import EvolutionStrategy, Matrix, plan

PARAMS = {
    "stack": jnp.linspace(-1, 1, 3 * 32 * 16).reshape(3, 32, 16),
    "w": jnp.linspace(0, 2, 24 * 40).reshape(24, 40).astype(jnp.bfloat16),
}
LAYERS = {"stack": Matrix(rows=1, columns=2, batch=0)}


def strategy(**settings):
    how = dict(optimizer=optax.sgd(0.1), population=8, sigma=0.1, rank=2, noise_reuse=2)
    return EvolutionStrategy(**how | settings)


@pytest.mark.parametrize(
    "planner",
    [
        plan.by_shape(overrides=LAYERS),
        plan.relative(plan.by_shape(overrides=LAYERS), PARAMS),
    ],
    ids=["by shape", "relative"],
)
def test_the_mean_and_the_factors_are_the_member(planner):
    es = strategy(plan=planner)
    state = es.init(PARAMS, 3)
    for generation in range(3):
        for i in (0, 1, 7):
            member, factors = es.member(state, i), es.factors(state, i)
            assert factors.keys() == PARAMS.keys()
            for path, (a, b, scale) in factors.items():
                wide = lambda x: np.asarray(x, np.float32)
                noise = scale * (wide(a) * wide(b)).sum(0)
                np.testing.assert_allclose(
                    member[path], wide(state.params[path]) + noise, atol=2e-6
                )
        state, _ = es.update(state, np.arange(8.0) * (generation + 1))


def test_an_index_may_be_traced():
    es = strategy()
    state = es.init({"w": PARAMS["stack"][0]}, 0)
    several = jax.vmap(lambda i: es.factors(state, i))(jnp.arange(4))
    np.testing.assert_array_equal(several["w"].a[2], es.factors(state, 2)["w"].a)
    assert several["w"].scale.tolist()[:2] == [several["w"].scale[0], -several["w"].scale[0]]


def test_noise_without_factors_is_refused():
    es = strategy()
    state = es.init({"w": PARAMS["stack"][0], "b": jnp.zeros(7)}, 0)
    with pytest.raises(ValueError, match="'b' has dense noise, which has no factors"):
        es.factors(state, 0)
    with pytest.raises(ValueError, match="must be"):
        es.factors(state, 8)
    nodes = strategy(perturb="nodes", shaping=None)
    with pytest.raises(ValueError, match="has node noise"):
        nodes.factors(nodes.init({"w": jnp.zeros((8, 8))}, 0), 0)
