"""Node noise: the estimate against loops and closed forms, its law, what is built, what changes no bit."""

import functools
import importlib
import re

import chex
import jax
import jax.numpy as jnp
import node_loops
import node_oracle
import numpy as np
import optax
import pytest
import test_registry
from jax import lax
from jax.sharding import AxisType
from node_loops import SIGMA
from support import checked_in_float64

import eggroll
from eggroll import Dense, EvolutionStrategy, Frozen, Given, Matrix, Nodes, Rows, credit, integer
from eggroll import _programs as programs

PAIRS = 3


def make(**changes):
    settings = dict(optimizer=optax.sgd(1.0), population=2 * PAIRS, sigma=SIGMA, perturb="nodes")
    return EvolutionStrategy(**{**settings, **changes})


def gradient(es, params, fitness, *args, seed=0):
    state = es.init(params, seed)
    values = es.evaluate(state, fitness, *args)
    return values, es.gradient(state, values, fitness, *args)


def normal(*shape, name="x"):
    seed = sum(map(ord, name)) + 31 * sum(shape)
    return np.random.default_rng(seed).normal(size=shape)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


# ---------------------------------------------------------------- against loops

T, M, H, K = 5, 3, 4, 2
X, TOKENS = normal(T, M), np.array([1, 0, 2, 1, 1])
SMALL = 0.03 * X
W, V, U, B, G = (
    normal(*shape, name=name)
    for name, shape in dict(w=(M, H), v=(H, K), u=(H, H), b=(H,), g=(M,)).items()
)
TABLE = normal(6, M, name="table")


def given_noise(noise):
    """A source of noise: the arrays of each path, in the order in which the program has its sites.

    It gives both passes the same numbers only if they name their sites alike.
    """
    sites = {}

    def _draw(source, seed, epoch, pair):
        def draw(name, loops, shape, dtype):
            path = name.partition("@")[0]
            known = sites.setdefault(path, [])
            if name not in known:
                known.append(name)
            e = jnp.asarray(noise[path][known.index(name)])[pair]
            for i in loops:
                e = e[i]
            e = e.T if e.shape == shape[::-1] else e  # vmap may have the rows second
            assert e.shape == shape, (name, e.shape, shape)
            return e.astype(dtype)

        return draw

    return _draw


def agrees(patch, fitness, model, params, args, noise, rows, gamma=0.0, tolerance=1e-6):
    """Asserts that scores and gradient are those of the loops."""
    noise = {
        path: [normal(PAIRS, *shape, name=f"{path}{i}") for i, shape in enumerate(shapes)]
        for path, shapes in noise.items()
    }
    patch.setattr(eggroll.nodes, "_draw", given_noise(noise))
    es = make(rows=rows, credit=credit.causal(gamma))
    values, got = gradient(es, params, fitness, *args)
    scores, expected = node_loops.estimate(model, params, noise, PAIRS, gamma)
    np.testing.assert_allclose(values, scores, rtol=tolerance, atol=tolerance)
    assert all(np.abs(e).max() > 1e-3 for e in expected.values())
    chex.assert_trees_all_close(got, expected, rtol=tolerance, atol=tolerance)
    return got


def mlp(p, key, x):
    return jnp.sin(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]).sum(1)


def mlp_by_loops(m, p, x=X):
    def row(t):
        shared = ("b", ("times", 1.0))
        y = m.dot("w", x[t], p["w"], m.at("w", t), t, shared) + p["b"]
        return np.sin(m.dot("v", np.tanh(y), p["v"], m.at("v", t), t)).sum()

    return [row(t) for t in range(T)]


MLP = {"w": W, "b": B, "v": V}
MLP_NOISE = {"w": [(T, H)], "v": [(T, K)]}


def rnn(p, key, x):
    def step(h, x):
        h = jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])
        return h, jnp.sin(h @ p["v"]).sum()

    return lax.scan(step, jnp.zeros(H), x)[1]


def rnn_by_loops(m, p):
    h, scores = np.zeros(H), []
    for t in range(T):
        # The bias has the mean of two sources.
        e, half = (m.at("w", t), m.at("u", t)), ("b", ("times", 0.5))
        y = m.dot("w", X[t], p["w"], e[0], t, half) + m.dot("u", h, p["u"], e[1], t, half)
        h = np.tanh(y + p["b"])
        scores.append(np.sin(m.dot("v", h, p["v"], m.at("v", t), t)).sum())
    return scores


def attention(p, key, x):
    q, k, v = x @ p["q"], x @ p["k"], x @ p["v"]
    mask = jnp.tril(jnp.ones((len(x), len(x)), bool))
    weights = jax.nn.softmax(jnp.where(mask, q @ k.T, -1e9), axis=-1)
    return jnp.tanh((weights @ v) @ p["o"]).sum(1)


def attention_by_loops(m, p):
    q, k, v = ([m.dot(n, X[t], p[n], m.at(n, t), t) for t in range(T)] for n in "qkv")
    scores = []
    for t in range(T):
        a = np.exp([q[t] @ k[s] for s in range(t + 1)])
        mixed = sum(a[s] * v[s] for s in range(t + 1)) / a.sum()
        scores.append(np.tanh(m.dot("o", mixed, p["o"], m.at("o", t), t)).sum())
    return scores


IMAGE = normal(1, 5, 4, 2, name="image")


def convolution(p, key, image):
    y = lax.conv_general_dilated(
        image, p["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.tanh(y + p["b"]).sum((0, 2, 3))


def convolution_by_loops(m, p):
    scores = np.zeros(4)
    for i, j in np.ndindex(4, 2):
        patch = IMAGE[0, i : i + 2, j : j + 3]
        y = np.tensordot(patch, p["w"], 3)
        terms = [("w", ("kernel", patch)), ("b", ("times", 1.0))]
        scores[i] += np.tanh(m.add(y, terms, m.at("w", 0, i, j), i) + p["b"]).sum()
    return scores


def embedding(p, key, tokens):
    return jnp.sin(jnp.tanh(p["table"][tokens]) @ p["w"]).sum(1)


def looked_up(m, p, t, path="table"):
    row = ("slice", TOKENS[t], ("times", 1.0))
    return m.add(p[path][TOKENS[t]], [(path, row)], m.at(path, t), t)


def embedding_by_loops(m, p):
    rows = [np.tanh(looked_up(m, p, t)) for t in range(T)]
    return [np.sin(m.dot("w", h, p["w"], m.at("w", t), t)).sum() for t, h in enumerate(rows)]


def tied(p, key, tokens):
    return jnp.sin(jnp.tanh(p["table"][tokens]) @ p["table"].T).sum(1)


def tied_by_loops(m, p):
    scores = []
    for t in range(T):
        h, e = np.tanh(looked_up(m, p, t)), m.at("table", t, site=1)
        y = m.add(p["table"] @ h, [("table", ("outer.T", h))], e, t)
        scores.append(np.sin(y).sum())
    return scores


def gain(p, key, x):
    return jnp.sin((x * p["g"]) @ p["w"]).sum(1)


def gain_by_loops(m, p):
    def row(t):
        h = m.add(X[t] * p["g"], [("g", ("times", X[t]))], m.at("g", t), t)
        return np.sin(m.dot("w", h, p["w"], m.at("w", t), t)).sum()

    return [row(t) for t in range(T)]


def twice(p, key, x):
    h = jnp.tanh(x @ p["w"])
    return jnp.sin(jnp.tanh(h @ p["u"]) @ p["u"]).sum(1)


def twice_by_loops(m, p):
    def row(t):
        h = np.tanh(m.dot("w", X[t], p["w"], m.at("w", t), t))
        h = np.tanh(m.dot("u", h, p["u"], m.at("u", t), t))
        return np.sin(m.dot("u", h, p["u"], m.at("u", t, site=1), t)).sum()

    return [row(t) for t in range(T)]


STACK = normal(2, M, M, name="stack")


def layers_in_steps(p, key, x):
    """Stacked layers, scanned within each step of a scan over rows."""

    def step(h, x):
        h = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h + x, p["stack"])[0]
        return h, jnp.sin(h).sum()

    return lax.scan(step, jnp.zeros(M), x)[1]


def layers_by_loops(m, p):
    h, scores = np.zeros(M), []
    for t in range(T):
        h = h + X[t]
        for k in range(2):
            y, e = h @ p["stack"][k], m.at("stack", t, k)
            h = np.tanh(m.add(y, [("stack", ("slice", k, ("outer", h)))], e, t))
        scores.append(np.sin(h).sum())
    return scores


def branches(p, key, x):
    """Members of one pair take different branches."""
    h = x @ p["w"]

    def step(_, h):
        left = lambda h: jnp.tanh(h @ p["u"]).sum()
        right = lambda h: jnp.sin(h @ p["v"]).sum()
        return None, lax.cond(h[0] > 0, left, right, h)

    return lax.scan(step, None, h)[1]


def branches_by_loops(m, p):
    scores = []
    for t in range(T):
        h = m.dot("w", SMALL[t], p["w"], m.at("w", t), t)
        left = h[0] > 0
        fn, name = (np.tanh, "u") if left else (np.sin, "v")
        scores.append(fn(m.dot(name, h, p[name], m.at(name, t), t)).sum())
    return scores


def until(p, key, x):
    """A loop that each member leaves in its own time; it is no row, so rows are an axis."""
    h = jnp.tanh(x @ p["w"])

    def body(carry):
        h, k = carry
        return 0.7 * jnp.tanh(h @ p["u"]), k + 1

    def goes_on(carry):
        return (jnp.abs(carry[0]).max() > 0.6) & (carry[1] < 4)

    return lax.while_loop(goes_on, body, (h, 0))[0].sum(1)


def until_by_loops(m, p):
    h = np.stack([np.tanh(m.dot("w", X[t], p["w"], m.at("w", t), t)) for t in range(T)])
    k = 0
    while np.abs(h).max() > 0.6 and k < 4:
        h = np.stack([m.dot("u", h[t], p["u"], m.at("u", k, t), t) for t in range(T)])
        h, k = 0.7 * np.tanh(h), k + 1
    m.steps = k
    return h.sum(1)


def of_one_score(p, key, x):
    return mlp(p, key, x).sum()


HEADS = {n: normal(M, H, name=n) for n in "qkv"} | {"o": normal(H, K, name="o")}
SQUARE = {"w": W, "u": U}
CASES = {
    "own rows": (mlp, mlp_by_loops, MLP, X, MLP_NOISE, T),
    "rows to come": (rnn, rnn_by_loops, {**MLP, "u": U}, X,
                     {"w": [(T, H)], "u": [(T, H)], "v": [(T, K)]}, T, 0.5),
    "attention": (attention, attention_by_loops, HEADS, X,
                  {n: [(T, w.shape[1])] for n, w in HEADS.items()}, T, 1.0),
    "pixels": (convolution, convolution_by_loops,
               {"w": normal(2, 3, 2, 3, name="kernel"), "b": normal(3)}, IMAGE,
               {"w": [(1, 4, 2, 3)]}, 4),
    "embedding": (embedding, embedding_by_loops, {"table": TABLE, "w": W}, TOKENS,
                  {"table": [(T, M)], "w": [(T, H)]}, T),
    "tied table": (tied, tied_by_loops, {"table": TABLE}, TOKENS,
                   {"table": [(T, M), (T, 6)]}, T),
    "gain": (gain, gain_by_loops, {"g": G, "w": W}, X, {"g": [(T, M)], "w": [(T, H)]}, T),
    "two sites": (twice, twice_by_loops, SQUARE, X, {"w": [(T, H)], "u": [(T, H)] * 2}, T),
    "layers in steps": (layers_in_steps, layers_by_loops, {"stack": STACK}, X,
                        {"stack": [(T, 2, M)]}, T, 0.5),
    "branches": (branches, branches_by_loops, {**SQUARE, "v": V}, SMALL,
                 {"w": [(T, H)], "u": [(T, H)], "v": [(T, K)]}, T),
    "while": (until, until_by_loops, SQUARE, X, {"w": [(T, H)], "u": [(4, T, H)]}, T),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_that_of_loops_over_rows(name, float64, monkeypatch):
    fitness, model, params, x, noise, rows, *gamma = CASES[name]
    agrees(monkeypatch, fitness, model, params, (x,), noise, rows, *gamma)


def test_members_of_a_pair_take_different_branches_in_the_case_above():
    taken, steps = [], []
    noise = {"w": [normal(PAIRS, T, H, name="w0")], "u": [normal(PAIRS, 4, T, H, name="u0")]}
    for pair in range(PAIRS):
        m = [node_loops.Member(noise, pair, sign) for sign in (1, -1)]
        taken.append([[m_.dot("w", SMALL[t], W, m_.at("w", t), t)[0] > 0 for t in range(T)] for m_ in m])
        for m_ in m:
            until_by_loops(m_, SQUARE)
            steps.append(m_.steps)
    assert any(a != b for a, b in taken) and len(set(steps)) > 1, (taken, steps)


@jax.custom_vjp
def own_gradient(y):
    return jnp.tanh(y)


own_gradient.defvjp(lambda y: (own_gradient(y), None), lambda _, g: (g * 1e9,))


def mapped(p, key, x):
    def one(x):
        return jnp.sin(jnp.tanh(p["w"].T @ x + p["b"]) @ p["v"]).sum()

    return jax.vmap(one)(x)


def own_function(p, key, x):
    return jnp.sin(own_gradient(x @ p["w"] + p["b"]) @ p["v"]).sum(1)


WRAPPED = {
    "jit": jax.jit(mlp),
    "remat": jax.checkpoint(mlp),
    "custom_vjp": own_function,
    "vmap": mapped,
    "one step of a scan": lambda p, key, x: lax.scan(
        lambda c, x: (c, mlp(p, key, x)), 0, x[None]
    )[1][0],
    "constant branch": lambda p, key, x: lax.cond(
        True, lambda x: mlp(p, key, x), lambda x: x.sum(1), x
    ),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_calls_change_nothing(how, float64, monkeypatch):
    extra = (1,) if how == "one step of a scan" else ()
    noise = {"w": [(*extra, T, H)], "v": [(*extra, T, K)]}

    def model(m, p):
        if extra:
            m.noise = {k: [e[:, 0] for e in v] for k, v in m.noise.items()}
        return mlp_by_loops(m, p)

    agrees(monkeypatch, WRAPPED[how], model, MLP, (X,), noise, T)


def test_one_score_is_the_score_of_every_row(float64, monkeypatch):
    def model(m, p):
        scores = mlp_by_loops(m, p)
        m.seen = {(path, None, n): x for (path, _, n), x in m.seen.items()}
        return [sum(scores)]

    noise = {k: [normal(PAIRS, *v[0], name=k)] for k, v in MLP_NOISE.items()}
    monkeypatch.setattr(eggroll.nodes, "_draw", given_noise(noise))
    values, got = gradient(make(), MLP, of_one_score, X)
    scores, expected = node_loops.estimate(model, MLP, noise, PAIRS, 0.0)
    np.testing.assert_allclose(values, scores[:, 0], rtol=1e-6)
    chex.assert_trees_all_close(got, expected, rtol=1e-6)
