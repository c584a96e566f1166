"""A parameter that is added to a product shares its noise, where that noise reaches nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eggroll import EvolutionStrategy, credit, integer

ROWS = 32
KEYS = jax.random.split(jax.random.key(0), 6)
PARAMS = {
    "w": jax.random.normal(KEYS[0], (5, 7)) / 2,
    "b": jax.random.normal(KEYS[1], (7,)) / 10,
    "v": jax.random.normal(KEYS[2], (7, 3)) / 2,
}
X, Y = jax.random.normal(KEYS[3], (ROWS, 5)), jax.random.normal(KEYS[4], (ROWS, 3))


@jax.jit
def added(x, b):
    return x + b


# name: (hidden units, whether the bias shares the product's noise)
SUMS = {
    "product": (lambda h, b: jnp.tanh(h + b), True),
    "halved": (lambda h, b: jnp.tanh(h / 2 - b), True),
    "in a call": (lambda h, b: jnp.tanh(added(h, b)), True),
    "chosen by its sign": (lambda h, b: jnp.tanh(jnp.where(h > 0, h / 2, h * 0.5) + b), True),
    "compared elsewhere": (lambda h, b: jnp.tanh(jnp.where(h > 9, 1.0, 0.5) + h + b), False),
    "two terms of one product": (lambda h, b: jnp.tanh((h + 2 * h) + b), True),
    "relu": (lambda h, b: jax.nn.relu(h) + b, False),
    "hard tanh": (lambda h, b: jnp.clip(h, -1, 1) + b, False),
    "used before": (lambda h, b: jnp.tanh(3 * h) + (h + b), False),
    "used after": (lambda h, b: (h + b) * jnp.cos(h), False),
    "stream with a branch": (lambda h, b: (h + jnp.sin(2 * h)) + b, False),
    "used in a call": (lambda h, b: added(h, b) + jax.jit(jnp.sin)(h), False),
    "handed out of a loop": (
        lambda h, b: jax.lax.scan(lambda c, _: (c, jnp.sin(h)), 0, None, 2)[1].sum(0) + (h + b),
        False,
    ),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_bias_gets_its_gradient_wherever_the_noise_goes(name):
    hidden, shares = SUMS[name]

    def fitness(p, key, x, y):
        return -((hidden(x @ p["w"], p["b"]) @ p["v"] - y) ** 2).sum(-1)

    es = EvolutionStrategy(
        optimizer=optax.sgd(0.1),
        population=4096,
        sigma=0.02,
        perturb="nodes",
        credit=credit.own(),
        chunk=2048,
    )
    state = es.init(PARAMS, 0)
    got = es.gradient(state, es.evaluate(state, fitness, X, Y), fitness, X, Y)
    exact = jax.grad(lambda p: -fitness(p, None, X, Y).mean())(PARAMS)
    a, b = np.asarray(got["b"]), np.asarray(exact["b"])
    assert np.linalg.norm(a - b) < 0.25 * np.linalg.norm(b)
    line = next(row for row in es.describe(PARAMS, fitness, X, Y).split("\n") if row[:2] == "b ")
    assert ("shared" in line) == shares


def test_integers_share_through_saturation_and_not_through_a_relu():
    def line_of_bias(cut):
        def fitness(p, key, x):
            total = jax.lax.dot(x, p["w"], preferred_element_type=jnp.int32)
            y = jnp.clip(integer.floor_divide(total, 48), *cut).astype(jnp.int8)
            return (y.astype(jnp.int32) + p["b"]).sum(-1, dtype=jnp.int32)

        es = integer.strategy(population=4, optimizer=integer.threshold(0.1), perturb="nodes")
        params = {"w": jnp.ones((9, 4), jnp.int8), "b": jnp.ones(4, jnp.int8)}
        table = es.describe(params, fitness, jnp.ones((5, 9), jnp.int8))
        return next(row for row in table.split("\n") if row[:2] == "b ")

    assert "shared" in line_of_bias((-127, 127))
    assert "shared" not in line_of_bias((0, 127))
