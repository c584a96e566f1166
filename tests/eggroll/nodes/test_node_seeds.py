"""Generations with node noise under a vmap, such as one over seeds, are the generations alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll


def fitness(params, key, x):  # type: ignore[no-untyped-def]
    def step(h, row):  # type: ignore[no-untyped-def]
        h = jnp.tanh(row @ params["in"] + h @ params["loop"] + params["bias"])
        return h, -jnp.sum((h @ params["out"]) ** 2)

    return jax.lax.scan(step, jnp.zeros(4), x)[1]


@pytest.mark.parametrize("chunk", [None, 4])
def test_vmap_around_generations(chunk: int | None) -> None:
    es = eggroll.EvolutionStrategy(
        optimizer=optax.sgd(0.1), population=8, sigma=0.1, perturb="nodes", chunk=chunk
    )
    x = jax.random.normal(jax.random.key(1), (5, 3))
    shapes = {"in": (3, 4), "loop": (4, 4), "bias": (4,), "out": (4, 2)}

    def start(key):  # type: ignore[no-untyped-def]
        keys = jax.random.split(key, 4)
        params = {
            n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)
        }
        return es.init(params, key)

    keys = jax.random.split(jax.random.key(0), 3)
    alone = [es.step(start(key), fitness, x)[0].params for key in keys]
    together = jax.vmap(lambda key: es.step(start(key), fitness, x)[0].params)(keys)
    for i, params in enumerate(alone):
        for name, value in params.items():
            np.testing.assert_allclose(together[name][i], value, rtol=1e-4, atol=1e-5)


def test_vmap_around_generations_that_share_their_parameters() -> None:
    """Data alone are mapped: their sums stay apart."""
    es = eggroll.EvolutionStrategy(
        optimizer=optax.sgd(0.1), population=8, sigma=0.1, perturb="nodes", chunk=4
    )
    shapes = {"in": (3, 4), "loop": (4, 4), "bias": (4,), "out": (4, 2)}
    state = es.init({n: jnp.ones(s) / 3 for n, s in shapes.items()}, 0)
    data = jax.random.normal(jax.random.key(1), (3, 5, 3))
    alone = [es.step(state, fitness, x)[0].params for x in data]
    together = jax.vmap(lambda x: es.step(state, fitness, x)[0].params)(data)
    for i, params in enumerate(alone):
        for name, value in params.items():
            np.testing.assert_allclose(together[name][i], value, rtol=1e-4, atol=1e-5)
