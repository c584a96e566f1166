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
        plan.subspaces(plan.by_shape(overrides=LAYERS), 4),
    ],
    ids=["by shape", "relative", "subspaces"],
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


def test_the_scale_has_the_factor_of_the_leaf_and_of_subspaces():
    layers = {"w": Matrix(rows=0, columns=1, sigma=3.0)}
    es = strategy(plan=plan.subspaces(plan.by_shape(layers), 4))
    state = es.init({"w": PARAMS["w"]}, 0)
    found = [float(es.factors(state, i)["w"].scale) for i in (0, 1)]
    np.testing.assert_allclose(found, np.array([1, -1]) * 0.1 * 3 * np.sqrt(4 / 2), rtol=1e-6)


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
    quantised = strategy(plan=plan.by_shape({"w": Matrix(rows=0, columns=1, sigma=40.0)}))
    beside = {"w": jnp.ones((8, 12), jnp.int8), "s": jnp.ones((8, 12))}
    with pytest.raises(ValueError, match="'w' is int8, and its noise is in units of its quantisa"):
        quantised.factors(quantised.init(beside, 0), 0)
    nodes = strategy(perturb="nodes", shaping=None)
    with pytest.raises(ValueError, match="has node noise"):
        nodes.factors(nodes.init({"w": jnp.zeros((8, 8))}, 0), 0)
