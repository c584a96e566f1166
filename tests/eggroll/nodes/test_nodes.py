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
from support import as_users_run_it, checked_in_float64

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
        taken.append(
            [[m_.dot("w", SMALL[t], W, m_.at("w", t), t)[0] > 0 for t in range(T)] for m_ in m]
        )
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
    "one step of a scan": lambda p, key, x: lax.scan(lambda c, x: (c, mlp(p, key, x)), 0, x[None])[
        1
    ][0],
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


# ---------------------------------------------------------------- against closed forms

LARGE = 0.6  # of sigma, so that the smoothed objective differs from the objective


def hermite(fn, y):
    """The mean of ``fn(y + LARGE e)`` over a standard normal e."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    total = sum(w * fn(y + LARGE * e) for e, w in zip(nodes, weights, strict=True))
    return total / weights.sum()


def sech2(y):
    return 1 / np.cosh(y) ** 2


A = normal(K, name="readout")
TARGET = normal(T, H, name="target")


def linear(p, key, x):
    return x @ p["w"] @ jnp.arange(1.0, H + 1)


def quadratic(p, key, x, target):
    return -((x @ p["w"] + p["b"] - target) ** 2).sum(1)


def tanh_layer(p, key, x):
    return jnp.tanh(x @ p["w"]) @ jnp.arange(1.0, H + 1)


def two_layers(p, key, x):
    return jnp.tanh(x @ p["w"]) @ p["v"] @ A


def walk(p, key, x):
    """Scores of steps that earlier noise moved: s_t is a sum of products of all rows before."""
    s = lax.scan(lambda s, y: (s + y, s + y), jnp.zeros(H), x @ p["w"])[1]
    return -(s**2).sum(1)


def of_linear():
    return {"w": np.outer(X.mean(0), np.arange(1.0, H + 1))}


def of_quadratic():
    error = -2 * (X @ W + B - TARGET) / T
    return {"w": X.T @ error, "b": error.sum(0)}


def of_tanh():
    return {"w": X.T @ (hermite(sech2, X @ W) * np.arange(1.0, H + 1)) / T}


def of_two_layers():
    hidden = hermite(np.tanh, X @ W)
    back = hermite(sech2, X @ W) * (V @ A)
    return {"w": X.T @ back / T, "v": np.outer(hidden.mean(0), A)}


def of_walk():
    total = np.cumsum(X, 0)
    return {"w": -2 * total.T @ (total @ W) / T}


CLOSED = {
    "linear": (linear, {"w": W}, (X,), of_linear, 0),
    "quadratic": (quadratic, {"w": W, "b": B}, (X, TARGET), of_quadratic, 0),
    "tanh": (tanh_layer, {"w": W}, (X,), of_tanh, 0),
    "two layers": (two_layers, {"w": W, "v": V}, (X,), of_two_layers, 0),
    "earlier noise": (walk, {"w": W}, (X,), of_walk, 1),
}
SEEDS, MANY = 16, 4096


def many_estimates(fitness, params, args, gamma, seeds=SEEDS, **changes):
    """Gradient estimates of several seeds, as rows; of the ascent direction."""
    settings = dict(population=MANY, sigma=LARGE, rows=T, credit=credit.causal(gamma))
    es = make(**{**settings, **changes})
    found = [gradient(es, params, fitness, *args, seed=s)[1] for s in range(seeds)]
    return {k: -np.stack([g[k] for g in found]).reshape(seeds, -1) for k in params}


def deviations(found, expected):
    """How many standard errors the mean of rows is away, and the relative standard error."""
    error = found.std(0, ddof=1) / np.sqrt(len(found))
    away = np.abs(found.mean(0) - expected.ravel()) / error
    return away.max(), np.linalg.norm(error) / np.linalg.norm(expected)


@pytest.mark.parametrize("name", CLOSED)
def test_the_estimate_is_unbiased_for_the_smoothed_objective(name, float64):
    fitness, params, args, expected, gamma = CLOSED[name]
    found = many_estimates(fitness, params, args, gamma)
    for path, exact in expected().items():
        away, error = deviations(found[path], exact)
        assert away < 5.5 and error < 0.05, (path, away, error)
    # The smallest difference that this would show is no larger than that from the objective itself.
    if name in ("tanh", "two layers"):
        plain = jax.grad(lambda p: fitness(p, None, *args).mean())(params)
        assert deviations(found["w"], np.asarray(plain["w"]))[0] > 20


def test_own_credit_leaves_out_what_rows_do_to_later_ones(float64):
    found = many_estimates(walk, {"w": W}, (X,), 0)
    assert deviations(found["w"], of_walk()["w"])[0] > 20
    # It is the gradient with earlier rows held constant.
    own = -2 * X.T @ (np.cumsum(X, 0) @ W) / T
    assert deviations(found["w"], own)[0] < 5.5


# ---------------------------------------------------------------- its law

LAW_ROWS = 14


def predicted(model, params, x, gamma):
    """The variance of the estimate of one pair for small sigma, and the gradient.

    For the rows' scores l and a site's noise e the credit is ``c_t = sum <d (credit l)_t / d e, e>``,
    hence ``E |x_t c_t e_t|^2 = |x_t|^2 (D |g_t|^2 + 2 |g_ts|^2)``: g_t over all noise that row t's credit
    depends on, g_ts over that of the site itself, D outputs of the site.
    """
    sites = []

    def record(path, x, w, row):
        sites.append((row, float((x**2).sum()), w.shape[1]))
        return x @ w

    model(params, x, record)
    zeros = [np.zeros(d) for _, _, d in sites]

    def scores(noise):
        given = iter(noise)
        return jnp.stack(model(params, x, lambda path, x, w, row: x @ w + next(given)))

    jacobian = [np.asarray(j) for j in jax.jit(jax.jacrev(scores))(zeros)]
    rows = np.arange(LAW_ROWS)
    later = np.where(rows >= rows[:, None], gamma ** np.maximum(rows - rows[:, None], 0.0), 0.0)
    later = np.eye(LAW_ROWS) if gamma == 0 else later
    credits = [later @ j for j in jacobian]
    whole = sum((c**2).sum(1) for c in credits)
    second = sum(
        size * (d * whole[row] + 2 * (credits[k][row] ** 2).sum())
        for k, (row, size, d) in enumerate(sites)
    )
    return second / LAW_ROWS**2


def law_mlp(p, x, site):
    hidden = [jnp.tanh(site("a", r, p["a"], t)) for t, r in enumerate(x)]
    outs = [site("b", h, p["b"], t) for t, h in enumerate(hidden)]
    return [jnp.sin(y).sum() for y in outs]


def law_gru(p, x, site):
    h, scores = jnp.zeros(8), []
    for t, r in enumerate(x):
        gates = site("w", r, p["w"], t) + site("u", h, p["u"], t)
        z, n = jax.nn.sigmoid(gates[:8]), jnp.tanh(gates[8:])
        h = (1 - z) * h + z * n
        scores.append(jnp.sin(site("o", h, p["o"], t)).sum())
    return scores


def gru(p, key, x):
    def step(h, r):
        gates = r @ p["w"] + h @ p["u"]
        z, n = jax.nn.sigmoid(gates[:8]), jnp.tanh(gates[8:])
        h = (1 - z) * h + z * n
        return h, jnp.sin(h @ p["o"]).sum()

    return lax.scan(step, jnp.zeros(8), x)[1]


def law_transformer(p, x, site):
    q, k, v = ([site(n, r, p[n], t) for t, r in enumerate(x)] for n in "qkv")
    k, v, scores = jnp.stack(k), jnp.stack(v), []
    for t, r in enumerate(x):
        h = r + site("o", jax.nn.softmax(k[: t + 1] @ q[t]) @ v[: t + 1], p["o"], t)
        h = h + site("d", jnp.tanh(site("c", h, p["c"], t)), p["d"], t)
        scores.append(jnp.sin(h).sum())
    return scores


def transformer(p, key, x):
    q, k, v = x @ p["q"], x @ p["k"], x @ p["v"]
    mask = jnp.tril(jnp.ones((len(x), len(x)), bool))
    h = x + (jax.nn.softmax(jnp.where(mask, q @ k.T, -1e9)) @ v) @ p["o"]
    return jnp.sin(h + jnp.tanh(h @ p["c"]) @ p["d"]).sum(1)


def weights(**shapes):
    return {k: normal(*s, name=f"law {k}") / np.sqrt(s[0]) for k, s in shapes.items()}


LAWS = {
    "MLP": (law_mlp, lambda p, key, x: jnp.sin(jnp.tanh(x @ p["a"]) @ p["b"]).sum(1),
            weights(a=(12, 16), b=(16, 8)), 0),
    "GRU": (law_gru, gru, weights(w=(12, 16), u=(8, 16), o=(8, 6)), 0.5),
    "transformer": (law_transformer, transformer,
                    weights(q=(12, 8), k=(12, 8), v=(12, 8), o=(8, 12), c=(12, 16), d=(16, 12)), 0.5),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["MLP", *(pytest.param(name, marks=pytest.mark.soak) for name in ("GRU", "transformer"))],
)
def test_the_noise_of_the_estimate_obeys_the_law(name, float64):
    model, fitness, params, gamma = LAWS[name]
    x = normal(LAW_ROWS, 12, name="law")
    found = many_estimates(
        fitness, params, (x,), gamma, 100, population=2, sigma=1e-3, rows=LAW_ROWS
    )
    found = np.concatenate(list(found.values()), 1)
    variance = found.var(0, ddof=1).sum()
    np.testing.assert_allclose(variance, predicted(model, params, x, gamma), rtol=0.15)


def test_the_estimate_is_five_times_closer_to_the_gradient_than_that_of_weight_noise():
    """64-128-128-10 of 8,192 rows, one pair a row; weight noise at the same passes."""
    rng = np.random.default_rng(0)
    normal = lambda *s: jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), jnp.float32)
    params = {"a": normal(64, 128), "b": normal(128, 128), "c": normal(128, 10)}
    rows = 8192
    x = jnp.asarray(rng.normal(size=(rows, 64)), jnp.float32)
    y = jnp.argmax(jnp.tanh(x @ normal(64, 10) * 8), 1)

    def scores(p, key, x, y):
        logits = jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1)[:, 0]

    exact = jax.grad(lambda p: -scores(p, None, x, y).mean())(params)

    def cosine(found):
        size = optax.tree.norm(found) * optax.tree.norm(exact)
        return float(optax.tree.vdot(found, exact) / size)

    es = make(population=2, sigma=0.05, rows=rows, credit=credit.own())
    nodes = np.mean([cosine(gradient(es, params, scores, x, y, seed=s)[1]) for s in range(2)])
    # 32 pairs of 256 rows each.
    es = make(population=64, sigma=0.05, perturb="weights", shaping=None)
    own = {"x": jnp.repeat(x.reshape(32, 256, 64), 2, 0), "y": jnp.repeat(y.reshape(32, 256), 2, 0)}
    score = lambda p, key, member: scores(p, key, member["x"], member["y"]).mean()
    found = []
    for seed in range(4):
        state = es.init(params, seed)
        values = es.evaluate(state, score, members=own)
        found.append(cosine(es.gradient(state, values)))
    assert nodes > 0.25 and nodes > 5 * np.mean(found), (nodes, found)


# ---------------------------------------------------------------- the interpreter's tables of cases

# A loop that vmap has one condition of for each of its elements; a function of a parameter
# that JAX itself has no derivative of.
REFUSED = {
    "while, each row in its own time": "in a while loop under vmap: must be a loop of a fixed number",
    "while, with a key in each row": "in a while loop under vmap: must be a loop of a fixed number",
    "while, carried by each row": "in a while loop under vmap: must be a loop of a fixed number",
    "a function of a row": "which has no derivative in JAX: must have weight noise",
}
# Other tests have the same solver; the oracle unrolls it.
TOO_LONG = ("solved",)
# What these cases compute is narrower than their weights and outputs.
NARROW = {"interpreter: cast": 1e-4}


def table_cases():
    """All cases of the tables; one in nine runs in every run of the tests, the others in make soak."""
    found = []
    for module in map(importlib.import_module, test_registry.TABLES):
        for name, test in vars(module).items():
            if not name.startswith("test") or name.startswith(("test_two_narrow", "test_shard")):
                continue
            for mark in getattr(test, "pytestmark", []):
                if mark.name == "parametrize" and mark.args[0] == ("fn", "makers"):
                    file = module.__name__.removeprefix("test_")
                    found += [(f"{file}: {case.id}", *case.values) for case in mark.args[1]]
    # The oracle unrolls loops and does not divide arrays; test_nodes_sharded.py is about shard_map.
    left_out = ("shard", "pcast", *TOO_LONG)
    kept = [case for case in found if not any(word in case[0] for word in left_out)]
    return [
        pytest.param(*case, id=case[0], marks=[] if i % 9 == 0 else pytest.mark.soak)
        for i, case in enumerate(kept)
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "fn", "makers"), table_cases())
def test_the_sums_of_every_case_are_the_gradient_of_outputs_against_their_noise(name, fn, makers):
    case = name.partition(": ")[2]
    refused = REFUSED.get(case)
    with checked_in_float64():
        if refused is None:
            node_oracle.run_case(fn, makers, own=True, tolerance=NARROW.get(name))
        else:
            with pytest.raises(ValueError, match=refused):
                node_oracle.run_case(fn, makers, own=True)


# ---------------------------------------------------------------- what is built

SIZE, OTHER, CHUNK = 37, 41, 23  # primes that nothing else is


def wide_mlp(p, key, x):
    return jnp.sin(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]).sum(1)


def wide_gru(p, key, x):
    def step(h, r):
        h = jnp.tanh(r @ p["w"] + h @ p["u"] + p["b"])
        return h, jnp.sin(h @ p["v"]).sum()

    return lax.scan(step, jnp.zeros(OTHER), x)[1]


def wide_layers(p, key, x):
    def step(h, r):
        h = lax.scan(lambda h, u: (jnp.tanh(h @ u), None), h + r @ p["w"], p["stack"])[0]
        return h, jnp.sin(h @ p["v"]).sum()

    return lax.scan(step, jnp.zeros(OTHER), x)[1]


def of_shapes(**shapes):
    return {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}


BUILT = {"w": (SIZE, OTHER), "u": (OTHER, OTHER), "v": (OTHER, SIZE), "b": (OTHER,)}


@pytest.mark.parametrize(
    ("fitness", "names"), [(wide_mlp, "wvb"), (wide_gru, "wuvb"), (wide_layers, "wv")]
)
@pytest.mark.parametrize("how", [{}, dict(chunk=2 * CHUNK)], ids=["at once", "in chunks"])
def test_no_member_has_a_matrix_in_the_compiled_step(fitness, names, how):
    shapes = {k: BUILT[k] for k in names}
    if fitness is wide_layers:
        shapes["stack"] = (3, OTHER, OTHER)
    pairs = CHUNK if not how else 2 * CHUNK
    es = make(population=2 * pairs, rows=5, credit=credit.causal(0.5), **how)
    state = jax.eval_shape(lambda p: es.init(p, 0), of_shapes(**shapes))
    x = jax.ShapeDtypeStruct((5, SIZE), jnp.float32)
    text = programs.step.lower(es, state, fitness, (x,), None, None).compile().as_text()
    arrays = {
        tuple(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]\w*\[([\d,]+)\]", text)
    }
    members = [dims for dims in arrays if any(n % CHUNK == 0 for n in dims)]
    assert (SIZE, OTHER) in arrays and members
    for dims in members:
        rest = [n for n in dims if n in (SIZE, OTHER)]
        assert len(rest) < 2, dims


def test_full_rank_noise_is_seen_to_be_built():
    es = make(population=2 * CHUNK, perturb="weights", rank="full")
    state = jax.eval_shape(lambda p: es.init(p, 0), of_shapes(w=(SIZE, OTHER)))
    fitness = lambda p, key, x: (x @ p["w"]).sum()
    x = jax.ShapeDtypeStruct((5, SIZE), jnp.float32)
    text = programs.step.lower(es, state, fitness, (x,), None, None).compile().as_text()
    assert f"[{CHUNK},{SIZE},{OTHER}]" in text


# ---------------------------------------------------------------- what changes no bit


def mesh(devices):
    return jax.make_mesh(
        (devices,), ("population",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )


FLOATS = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), {**MLP, "u": U})
LAYERS = {k: FLOATS[k] for k in MLP}
ROWS = jnp.asarray(X, jnp.float32)


def start(es, params=LAYERS, fitness=mlp, x=ROWS, steps=2):
    state = es.init(params, 0)
    for _ in range(steps):
        state, metrics = es.step(state, fitness, x)
    return jax.device_get(state), metrics


def make_rows(**changes):
    settings = dict(population=16, optimizer=optax.adam(1e-2), rows=T, credit=credit.causal(0.5))
    return make(**{**settings, **changes})


@functools.cache
def trained(devices=0, **changes):
    """Of two steps of products of rows; the loops of a recurrent model take longer to compile."""
    es = make_rows(mesh=mesh(devices) if devices else None, **changes)
    return start(es)[0]


@pytest.mark.parametrize(
    "changes", [dict(chunk=4), dict(chunk=6), dict(devices=2), dict(devices=3, chunk=4)], ids=str
)
def test_chunks_and_devices_change_the_update_by_rounding_alone(changes):
    chex.assert_trees_all_close(trained(**changes), trained(), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_deterministic_is_the_same_bits_on_any_number_of_devices(devices):
    chex.assert_trees_all_equal(
        trained(devices, deterministic=True), trained(0, deterministic=True)
    )


def test_a_step_is_its_halves_and_its_thirds():
    es = make_rows(deterministic=True)
    state = es.init(LAYERS, 0)
    whole, metrics = es.step(state, mlp, ROWS)
    values = es.evaluate(state, mlp, ROWS)
    assert values.shape == (16, T)
    halves, _ = es.update(state, values, mlp, ROWS)
    thirds, _ = es.apply_gradient(state, es.gradient(state, values, mlp, ROWS))
    many = es.optimize(state, mlp, 1, ROWS)
    for other in (halves, thirds, many):
        chex.assert_trees_all_equal(jax.device_get(other.params), jax.device_get(whole.params))
    assert metrics.updated and metrics.fitness_mean == pytest.approx(float(values.mean()), rel=1e-5)


def test_a_run_that_is_resumed_is_the_run():
    es, again = make_rows(), make_rows()
    state = start(es, steps=1)[0]
    chex.assert_trees_all_equal(
        jax.device_get(again.step(state, mlp, ROWS)[0]), start(es, steps=2)[0]
    )


def test_noise_is_new_in_every_generation_unless_it_is_reused():
    x = ROWS
    for reuse, same in ((1, False), (2, True)):
        es = make_rows(noise_reuse=reuse, optimizer=optax.sgd(0.0))
        state = es.init(LAYERS, 0)
        first = es.evaluate(state, mlp, x)
        second = es.evaluate(es.step(state, mlp, x)[0], mlp, x)
        third = es.evaluate(es.step(es.step(state, mlp, x)[0], mlp, x)[0], mlp, x)
        assert bool((first == second).all()) is same and (first != third).all()


def test_noise_differs_between_rows_steps_sites_and_pairs():
    es = make_rows(population=4)
    both = lambda p, key, x: (x @ p["w"], x @ p["w"])
    zeros = {"w": jnp.zeros((M, H))}
    a, b = es.map(es.init(zeros, 0), both, ROWS)
    np.testing.assert_allclose(a[0::2], -a[1::2])
    np.testing.assert_allclose(b[0::2], -b[1::2])
    # Noise has few different values, so whole rows are compared.
    rows = {tuple(row) for x in (a, b) for row in np.reshape(x[0::2], (-1, H)).tolist()}
    assert len(rows) == 2 * 2 * T
    looped = lambda p, key, x: lax.scan(lambda c, r: (c, r @ p["w"]), 0, x)[1]
    steps = es.map(es.init(zeros, 0), looped, ROWS)
    rows = {tuple(row) for row in np.reshape(steps[0::2], (-1, H)).tolist()}
    assert len(rows) == 2 * T
    other = es.map(es.init(zeros, 1), looped, ROWS)
    assert not (steps == other).any()


def test_agreement_is_high_with_many_pairs_and_low_with_few():
    found = []
    for population in (4, 1024):
        es = make_rows(population=population, agreement=True)
        state, metrics = es.step(es.init(LAYERS, 0), mlp, ROWS)
        found.append(float(metrics.agreement))
    assert found[0] < 0.8 < found[1] < 1, found
    plain, _ = make_rows(population=population).step(es.init(LAYERS, 0), mlp, ROWS)
    chex.assert_trees_all_close(state.params, plain.params, rtol=1e-3, atol=2e-5)


# ---------------------------------------------------------------- parameters of all kinds


def test_overrides_mix_all_treatments():
    plan = eggroll.plan.by_shape(
        {"w": Nodes(), "v": Matrix(0, 1), "b": Dense(), "u": Frozen(), "g": Given()}
    )
    params = {**FLOATS, "g": jnp.ones(M)}
    scaled = lambda p, key, x: rnn(p, key, x * p["g"])
    es = make_rows(
        perturb="weights",
        shaping=None,
        population=2048,
        plan=plan,
        sigma=0.05,
        credit=credit.causal(),
    )
    values, got = gradient(es, params, scaled, ROWS)
    assert got["u"] is None and got["g"] is None
    exact = jax.grad(lambda p: -scaled(p, None, ROWS).mean())(params)
    for path in ("w", "v", "b"):
        a, b = np.ravel(got[path]), np.ravel(exact[path])
        assert a @ b > 0.9 * np.linalg.norm(a) * np.linalg.norm(b), path
        assert np.linalg.norm(a) == pytest.approx(np.linalg.norm(b), rel=0.4)
    state = es.init(params, 0)
    with pytest.raises(ValueError, match=r"'g' is eggroll.Given\(\): must get its gradient from"):
        es.step(state, scaled, ROWS)
    with pytest.raises(ValueError, match=r"'g' is eggroll.Given\(\)"):
        es.update(state, values, scaled, ROWS)
    new, _ = es.apply_gradient(state, {**got, "g": exact["g"]})
    moved = [k for k in params if (new.params[k] != params[k]).any()]
    assert sorted(moved) == ["b", "g", "v", "w"]


def test_a_factor_on_sigma_scales_the_noise_and_not_the_gradient():
    found = []
    for factor in (1.0, 0.25):
        frozen = dict.fromkeys("ubv", Frozen())
        plan = eggroll.plan.by_shape({"w": Nodes(factor), **frozen})
        es = make_rows(plan=plan, population=2048, sigma=0.05, credit=credit.causal())
        state = es.init(FLOATS, 0)
        outputs = es.map(state, lambda p, key, x: x @ p["w"], ROWS)
        found.append((np.std(outputs[0::2] - outputs[1::2]) / 2, es))
        _, got = gradient(es, FLOATS, rnn, ROWS)
        exact = jax.grad(lambda p: -rnn(p, None, ROWS).mean())(FLOATS)
        a, b = np.ravel(got["w"]), np.ravel(exact["w"])
        assert np.linalg.norm(a - b) < 0.3 * np.linalg.norm(b), factor
    assert found[0][0] == pytest.approx(0.05, rel=0.05)
    assert found[1][0] == pytest.approx(0.0125, rel=0.05)


def test_bfloat16_parameters_get_sums_in_float32():
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), FLOATS)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    x = ROWS.astype(jnp.bfloat16)
    fitness = lambda p, key, x: mlp(p, key, x).astype(jnp.float32)
    es = make_rows(population=512, credit=credit.own(), sigma=0.3)
    _, got = gradient(es, narrow, fitness, x)
    _, expected = gradient(es, wide, fitness, x.astype(jnp.float32))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.float32
        size = np.linalg.norm(b)
        assert np.linalg.norm(a - b) < 0.15 * size if size else not a.any()
    state, metrics = es.step(es.init(narrow, 0), fitness, x)
    assert metrics.updated and state.params["w"].dtype == jnp.bfloat16
    assert set(state.master) == set(narrow)


def test_ties_are_exactly_zero_and_move_nothing():
    flat = lambda p, key, x: 0 * mlp(p, key, x)
    es = make_rows(credit=credit.own())
    _, got = gradient(es, FLOATS, flat, ROWS)
    assert all(not np.any(g) for g in jax.tree.leaves(got))
    state = es.init(FLOATS, 0)
    new, metrics = es.step(state, flat, ROWS)
    assert not metrics.updated
    chex.assert_trees_all_equal(new.params, state.params)
    chex.assert_trees_all_equal(new.optimizer, state.optimizer)


def test_a_score_that_is_not_finite_drops_its_row(float64):
    """The estimate of what is left is that of scores whose row ties."""
    es = make(rows=T, credit=credit.own())
    state = es.init(MLP, 0)
    values = np.array(es.evaluate(state, mlp, X))
    broken, tied_ = values.copy(), values.copy()
    broken[2, 1], broken[5, 3] = np.nan, np.inf
    tied_[2, 1], tied_[5, 3] = values[3, 1], values[4, 3]
    got, expected = (es.gradient(state, v, mlp, X) for v in (broken, tied_))
    chex.assert_trees_all_close(got, expected, rtol=1e-12)
    whole = es.gradient(state, values, mlp, X)
    assert all(
        np.any(a != b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(whole), strict=True)
    )
    _, metrics = es.update(state, broken, mlp, X)
    assert metrics.invalid == 2 and metrics.updated


def test_members_have_data_of_their_own(float64):
    alone = lambda p, key, member: mlp(p, key, member["x"])
    es = make(rows=T, credit=credit.own(), population=2048, sigma=0.02)
    own = {"x": jnp.repeat(jnp.asarray(normal(1024, T, M, name="own")), 2, 0)}
    state = es.init(MLP, 0)
    values = es.evaluate(state, alone, members=own)
    got = es.gradient(state, values, alone, members=own)
    of_all = lambda p: -jax.vmap(lambda x: mlp(p, None, x))(own["x"]).mean()
    exact = jax.grad(of_all)(MLP)
    for path in MLP:
        a, b = np.ravel(got[path]), np.ravel(exact[path])
        assert np.linalg.norm(a - b) < 0.35 * np.linalg.norm(b), path


# ---------------------------------------------------------------- int8

# A sum of 6 products is in units of 1/256 times isqrt(6) = 2, a sample in units of 1/16: noise of 2**-2
# is 2 * 256 / 16 / 4 samples.
ADDED = 8
INT_X = jnp.asarray(np.random.default_rng(5).integers(-60, 61, (5, 6)), jnp.int8)
INT_PARAMS = {
    k: jnp.asarray(np.random.default_rng(6).integers(-40, 41, s), jnp.int8)
    for k, s in {"table": (9, 6), "w": (6, 8), "u": (8, 8), "b": (8,), "v": (8, 4)}.items()
}
INT_TOKENS = jnp.array([3, 1, 4, 1, 5], jnp.int32)


def int_rnn(p, key, tokens):
    dot = lambda x, w: lax.dot(x, w, preferred_element_type=jnp.int32)
    clip = lambda y: jnp.clip(y >> 6, -127, 127).astype(jnp.int8)

    def step(h, x):
        h = clip(dot(x, p["w"]) + dot(h, p["u"]) + (p["b"].astype(jnp.int32) << 4))
        return h, -jnp.abs(clip(dot(h, p["v"])).astype(jnp.int32) - 5).sum(dtype=jnp.int32)

    return lax.scan(step, jnp.zeros(8, jnp.int8), p["table"][tokens])[1]


@functools.cache
def make_integers(devices=0, gamma=0.5, **changes):
    settings = dict(
        population=16, perturb="nodes", rows=5, credit=credit.causal(gamma), shift=2,
        optimizer=optax.chain(integer.by_rows(), integer.threshold(0.3)),
        mesh=mesh(devices) if devices else None,
    )  # fmt: skip
    return integer.strategy(**{**settings, **changes})


@functools.cache
def trained_integers(**changes):
    return start(make_integers(**changes), INT_PARAMS, int_rnn, INT_TOKENS)[0]


@pytest.mark.parametrize(
    "changes",
    [
        dict(devices=4, chunk=2),
        *(
            pytest.param(changes, marks=pytest.mark.soak)
            for changes in (dict(devices=1), dict(devices=2), dict(devices=8), dict(chunk=6))
        ),
    ],
    ids=str,
)
def test_integers_are_the_same_bits_on_any_devices_and_in_any_chunks(changes):
    chex.assert_trees_all_equal(trained_integers(**changes), trained_integers())
    new = trained_integers().params
    assert all((new[k] != INT_PARAMS[k]).any() for k in INT_PARAMS)


def test_no_float_in_a_generation_of_integers():
    es = make_integers()
    state = es.init(INT_PARAMS, 0)
    run = lambda state, x: es.step(state, int_rnn, x)[0]
    assert integer.float_operations(run, state, INT_TOKENS) == []


def test_the_sums_of_integers_are_those_of_loops(float64, monkeypatch):
    """One product and a bias: the noise in units of the sum, credit times noise cut to int8."""
    rng = np.random.default_rng(0)
    noise = rng.integers(-60, 61, (PAIRS, 5, 8)).astype(np.int8)
    monkeypatch.setattr(eggroll.nodes, "_draw", given_noise({"w": [noise]}))
    fitness = lambda p, key, x: (
        -jnp.abs(
            (lax.dot(x, p["w"], preferred_element_type=jnp.int32) + (p["b"].astype(jnp.int32) << 4))
            >> 7
        ).sum(1, dtype=jnp.int32)
    )
    es = make_integers(population=2 * PAIRS)
    params = {k: INT_PARAMS[k] for k in "wb"}
    values, got = gradient(es, params, fitness, INT_X)
    x, w, b = (np.asarray(v, int) for v in (INT_X, params["w"], params["b"]))
    total, bias = np.zeros((6, 8), int), np.zeros(8, int)
    for pair in range(PAIRS):
        scores = []
        for sign in (1, -1):
            y = x @ w + (b << 4) + sign * noise[pair].astype(int) * ADDED
            scores.append(-np.abs(y >> 7).sum(1))
        np.testing.assert_array_equal(values[2 * pair : 2 * pair + 2], scores)
        c = scores[0] - scores[1]
        for t in reversed(range(4)):
            c[t] += np.sign(c[t + 1]) * (abs(c[t + 1]) >> 1)
        c = np.clip(c, -16, 16)
        for t in range(5):
            product = c[t] * noise[pair, t].astype(int)
            weighed = np.clip(np.sign(product) * ((abs(product) + 4) >> 3), -127, 127)
            total += np.outer(x[t], weighed)
            bias += 16 * weighed
    np.testing.assert_array_equal(got["w"], -total)
    np.testing.assert_array_equal(got["b"], -bias)


def test_integers_learn():
    es = make_integers(population=256)
    state = es.init(INT_PARAMS, 0)
    before = int_rnn(state.params, None, INT_TOKENS).sum()
    state = es.optimize(state, int_rnn, 20, INT_TOKENS)
    after = int_rnn(state.params, None, INT_TOKENS).sum()
    assert after > 0.6 * before, (before, after)


# ---------------------------------------------------------------- wrong input


def refused(match, call, *args, **how):
    with pytest.raises(ValueError, match=match) as caught:
        call(*args, **how)
    assert "\n" not in str(caught.value)


def test_wrong_settings_are_named():
    wrong_rows = "rows=.*: must be the number of scores of a member, an integer of at least 1, or"
    wrong_credit = r"credit=.*: must be eggroll.credit.own\(\), causal\(gamma\) or episode\(\)"
    with as_users_run_it():
        refused("perturb='outputs': must be 'weights' or 'nodes'", make, perturb="outputs")
        for rows in (0, 2.5, "all", Rows(0), Rows(1.5)):
            refused(wrong_rows, make, rows=rows)
        for how in (0.5, "causal", credit.causal):
            refused(wrong_credit, make, credit=how)


def test_rows_that_the_scores_do_not_have_are_named():
    for rows in (4, Rows(4)):
        es = make(rows=rows)
        refused("rows=4: must be the number of scores that the fitness returns, 5", es.step,
                es.init(MLP, 0), mlp, X)  # fmt: skip


def test_rows_that_several_axes_have_are_named_and_picked():
    square = {"w": normal(M, T, name="square")}
    looped = lambda p, key, x: lax.scan(lambda c, r: (c, jnp.tanh(x @ p["w"]).sum()), 0, x)[1]
    es = make(rows=T)
    state = es.init(square, 0)
    message = (
        r"rows=5: at a product with parameter 'w', whose outputs are \[5, 5\], a loop and axis 0 have "
        r"this length: must be one, named by eggroll.Rows\(5, pick=k\) with k from 0 to 1"
    )
    refused(message, es.step, state, looped, X)
    refused(message, make(rows=Rows(T, pick=2)).step, state, looped, X)
    found = [gradient(make(rows=Rows(T, pick=k)), square, looped, X)[1]["w"] for k in (0, 1, -1)]
    assert np.any(found[0] != found[1])
    np.testing.assert_array_equal(found[1], found[2])
    # Columns of a product come from the parameter and are no rows.
    gradient(make(rows=T), square, lambda p, key, x: jnp.tanh(x @ p["w"]).sum(1), X)


def test_scores_of_rows_that_no_product_has_are_named():
    fitness = lambda p, key, x: jnp.tanh(x.sum(0) @ p["w"]) * jnp.arange(4.0)
    es = make()
    refused(r"rows=4: must be the length of a loop or of an axis .* \['w'\] has one .*episode\(\)",
            es.step, es.init({"w": W}, 0), fitness, X)  # fmt: skip


def test_a_plan_that_names_every_parameter_has_no_node_noise():
    plan = eggroll.plan.by_shape({"w": Matrix(0, 1)})
    es = EvolutionStrategy(
        optimizer=optax.sgd(1.0), population=4, sigma=0.1, plan=plan, perturb="nodes"
    )
    with pytest.raises(ValueError, match="perturb='nodes': no parameter has node noise"):
        es.init({"w": jnp.ones((8, 8))}, 0)


def test_there_is_no_member_to_build():
    es = make()
    state = es.init(MLP, 0)
    for call in (lambda: es.member(state, 0), lambda: es.ask(state, [0, 1])):
        refused("parameter 'b' has node noise, .* no member to build: .*es.map", call)


def test_an_update_needs_the_fitness():
    es = make()
    state = es.init(MLP, 0)
    values = es.evaluate(state, mlp, X)
    for call in (es.update, es.tell, es.gradient):
        refused(r"perturb='nodes': .* need the fitness .* es.update\(state, values, fitness, \*args\)",
                call, state, values)  # fmt: skip


def test_data_that_are_constants_of_the_fitness_are_named():
    es = make()
    closed = lambda p, key: jnp.tanh(X @ p["w"]).sum(1)
    alone = lambda p, key, x: (p["w"] ** 2).sum()
    for fitness, args in ((closed, ()), (alone, (X,))):
        refused("'w' has node noise and reaches an output through no product .* arguments of the fitness",
                es.step, es.init({"w": W}, 0), fitness, *args)  # fmt: skip


def test_integers_refuse_what_they_cannot_transpose_or_decay():
    summed = lambda p, key, x: lax.dot(x, jnp.cumsum(p["w"], 0, dtype=jnp.int8),
                                       preferred_element_type=jnp.int32).sum(1, dtype=jnp.int32)  # fmt: skip
    es = make_integers(population=4)
    refused("an int8 parameter with node noise enters 'cumsum'", es.step,
            es.init({"w": INT_PARAMS["w"]}, 0), summed, INT_X)  # fmt: skip
    es = make_integers(population=4, gamma=0.3)
    refused(r"credit=causal\(0.3\): for int8 parameters gamma must be", es.step,
            es.init(INT_PARAMS, 0), int_rnn, INT_TOKENS)  # fmt: skip
