"""Inputs that a step keeps from the first pass of node noise for the second: when, and to the same result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType
from support import normal

from eggroll import Dense, EvolutionStrategy, Matrix, Nodes, credit, integer
from eggroll import _programs as programs
from eggroll.interpret.context import DenseBuildWarning
from eggroll.plan import by_shape

PAIRS, ROWS, WIDTH = 4, 12, 8
X = jnp.asarray(normal((ROWS, WIDTH), "x"), jnp.float32)
PARAMS = {
    name: jnp.asarray(0.3 * normal(shape, name), jnp.float32)
    for name, shape in dict(w=(WIDTH, 16), b=(16,), v=(16, 1), g=(WIDTH,)).items()
}
STACK = {
    "embed": jnp.asarray(normal((5, WIDTH), "embed"), jnp.float32),
    "layers": jnp.asarray(0.3 * normal((3, WIDTH, WIDTH), "layers"), jnp.float32),
}
TOKENS = jnp.arange(ROWS) % 5


def mlp(p, key, x):
    return -jnp.square(jnp.tanh((x * p["g"]) @ p["w"] + p["b"]) @ p["v"])[:, 0]


def layers(p, key, tokens):
    """A scan over layers of attention within which rows are an axis."""

    @jax.checkpoint
    def layer(h, w):
        mix = jax.nn.softmax(h @ h.T)
        return jnp.tanh(h + mix @ h @ w), None

    return -jnp.square(lax.scan(layer, p["embed"][tokens], p["layers"])[0]).sum(1)


def branches(p, key, x):
    y = jnp.tanh(x @ p["w"] + p["b"])
    return -lax.cond(jax.random.bernoulli(key), lambda y: y @ p["v"], lambda y: -2 * y @ p["v"], y)[
        :, 0
    ]


def random_keys(p, key, x):
    """Keys are carried by a loop, and what they draw reaches products."""

    def body(i, carry):
        key, h = carry
        key, own = jax.random.split(key)
        return key, h + 0.1 * jax.random.normal(own, h.shape)

    key, h = lax.fori_loop(0, 3, body, (key, jnp.tanh(x @ p["w"])))
    return -jnp.square(jax.random.permutation(key, h, axis=1) @ p["v"])[:, 0]


def recurrent(p, key, x):
    def step(h, r):
        h = jnp.tanh(r @ p["w"] + h)
        return h, -(h @ p["v"])[0]

    return lax.scan(step, jnp.zeros(16), x)[1]


def make(factor_memory, **changes):
    settings = dict(optimizer=optax.sgd(0.1), population=2 * PAIRS, sigma=0.1, perturb="nodes")
    return EvolutionStrategy(**{**settings, "factor_memory": factor_memory, **changes})


def two_devices():
    return jax.make_mesh((2,), ("population",), (AxisType.Auto,), devices=jax.devices()[:2])


MIXED = by_shape({"w": Matrix(rows=0, columns=1), "b": Dense(), "v": Nodes()})
PROGRAMS = {
    "mlp": (mlp, PARAMS, X, {}),
    "rows later": (mlp, PARAMS, X, dict(credit=credit.causal(0.5))),
    "one score": (
        lambda p, key, x: mlp(p, key, x).mean(),
        PARAMS,
        X,
        dict(credit=credit.episode()),
    ),
    "mixed": (mlp, PARAMS, X, dict(plan=MIXED)),
    "agreement": (mlp, PARAMS, X, dict(agreement=True)),
    "layers": (layers, STACK, TOKENS, {}),
    "branches": (branches, {k: PARAMS[k] for k in ("w", "b", "v")}, X, {}),
    "random keys": (random_keys, {k: PARAMS[k] for k in ("w", "v")}, X, {}),
    "devices": (mlp, PARAMS, X, dict(mesh=two_devices)),
    "an odd pair": (mlp, PARAMS, X, dict(mesh=two_devices, population=6)),
}


def of(name):
    """The fitness, parameters, data and settings of a case."""
    fitness, params, x, changes = PROGRAMS[name]
    made = {k: v() if k == "mesh" else v for k, v in changes.items()}
    return fitness, params, x, made


def flops(es, state, fitness, x):
    cost = programs.step.lower(es, state, fitness, (x,), None, None).compile().cost_analysis()
    return cost["flops"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_step_that_keeps_inputs_is_the_step_that_computes_them_again(name):
    fitness, params, x, changes = of(name)
    kept, again = make(2**25, **changes), make(0, **changes)
    state = kept.init(params, 3)
    (a, told), (b, expected) = (es.step(state, fitness, x) for es in (kept, again))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, a.params, b.params)
    jax.tree.map(close, told, expected)
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), a.params, params)
    assert min(jax.tree.leaves(moved)) > 1e-5
    # One forward pass of two is saved, and so much is left to do.
    assert flops(kept, state, fitness, x) < 0.9 * flops(again, state, fitness, x)


def test_scores_and_gradient_in_one_program_are_those_of_two():
    fitness = lambda p, key, x: (mlp(p, key, x), x.sum())
    es = make(2**25)
    state = es.init(PARAMS, 3)
    (scores, aux), grads = es.value_and_gradient(state, fitness, X)
    expected, expected_aux = es.evaluate(state, fitness, X)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    np.testing.assert_allclose(aux, expected_aux)
    twice = es.gradient(state, expected, fitness, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, twice)


@pytest.mark.parametrize("changes", [{}, {"agreement": True}], ids=["alone", "agreement"])
def test_scores_and_gradient_of_weight_noise(changes):
    fitness = lambda p, key, x: mlp(p, key, x).mean()
    es = make(2**25, perturb="weights", **changes)
    state = es.init(PARAMS, 3)
    scores, grads = es.value_and_gradient(state, fitness, X)
    np.testing.assert_allclose(scores, es.evaluate(state, fitness, X), rtol=1e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, grads, es.gradient(state, scores))


@pytest.mark.parametrize("factor_memory", [0, 1024, 2**25], ids=["again", "too many", "kept"])
def test_a_matrix_that_is_built_is_reported_once(factor_memory):
    plan = by_shape({"w": Matrix(rows=0, columns=1), "v": Nodes()})

    def fitness(p, key, x):
        solved = jnp.linalg.inv(p["w"] @ p["w"].T + jnp.eye(WIDTH))
        return -jnp.square(jnp.tanh(x @ solved) @ p["v"][:WIDTH])[:, 0]

    es = make(factor_memory, plan=plan)
    state = es.init({k: PARAMS[k] for k in ("w", "v")}, 3)
    with pytest.warns(DenseBuildWarning) as told:
        es.step(state, fitness, X)
    assert len({str(warning.message) for warning in told}) == len(told)


def integers(p, key, x):
    y = lax.dot(x, p["w"], preferred_element_type=jnp.int32) >> 7
    h = jnp.clip(y + p["b"], -127, 127).astype(jnp.int8)
    z = lax.dot(h, p["v"], preferred_element_type=jnp.int32)
    return -jnp.abs(z).sum(1)


def test_integers_come_to_the_same_bits():
    params = {
        name: jnp.clip(jnp.round(40 * PARAMS[name] / 0.3), -127, 127).astype(jnp.int8)
        for name in ("w", "b", "v")
    }
    x = jnp.clip(jnp.round(16 * X), -127, 127).astype(jnp.int8)
    rule = optax.chain(integer.by_rows(), integer.threshold(integer.inverse_decay()))
    settings = dict(population=2 * PAIRS, optimizer=rule, shift=1, perturb="nodes")
    kept = integer.strategy(factor_memory=2**25, **settings)
    again = integer.strategy(factor_memory=0, **settings)
    state = kept.init(params, 3)
    (a, told), (b, expected) = (es.step(state, integers, x) for es in (kept, again))
    jax.tree.map(np.testing.assert_array_equal, (a.params, told), (b.params, expected))
    assert any(
        (x != y).any() for x, y in zip(*map(jax.tree.leaves, (a.params, params)), strict=True)
    )
    assert flops(kept, state, integers, x) < flops(again, state, integers, x)


@pytest.mark.parametrize(
    ("fitness", "changes"),
    [
        (mlp, dict(factor_memory=1024)),
        (mlp, dict(chunk=4)),
        (mlp, dict(deterministic=True)),
        (recurrent, {}),
    ],
    ids=["more than the budget", "chunks", "deterministic", "rows that are steps"],
)
def test_inputs_are_computed_again_where_they_are_not_kept(fitness, changes):
    es = make(**{"factor_memory": 2**25, **changes})
    again = make(**{**changes, "factor_memory": 0})
    params = {k: PARAMS[k] for k in ("w", "v")} if fitness is recurrent else PARAMS
    state = es.init(params, 3)
    assert flops(es, state, fitness, X) == flops(again, state, fitness, X)
