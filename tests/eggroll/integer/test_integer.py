"""int8 parameters through the strategy: operations, noise, the update, the proof that no float is used."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import eggroll
from eggroll import Dense, EvolutionStrategy, Frozen, Matrix, estimator, integer
from eggroll.integer.noise import quantiles
from eggroll.interpret.interpreter import Context, interpret
from eggroll.perturbation import draw_pairs
from eggroll.values import fixed_point
from eggroll.values.arithmetic import FixedPoint
from eggroll.values.lowrank import LowRank

SHIFT = 8


def int8(shape, name="x", largest=127):
    seed = sum(map(ord, name)) + 1000 * math.prod(shape)
    return np.random.default_rng(seed).integers(-largest, largest, shape, np.int8, endpoint=True)


def low_rank(shape, rank=2, columns=(-1,), batch=(), path="w", largest=60):
    ndim = len(shape)
    columns, batch = ({a % ndim for a in axes} for axes in (columns, batch))
    rows = set(range(ndim)) - columns - batch
    factors = tuple(
        jnp.asarray(int8([rank, *(1 if a in gone else n for a, n in enumerate(shape))], path + name, largest))
        for name, gone in (("a", columns), ("b", rows))
    )  # fmt: skip
    w = jnp.asarray(int8(shape, path))
    return LowRank(w, factors, jnp.int32(1), (path,), arithmetic=FixedPoint(SHIFT))


def dot(x, w):
    """In int32 whatever the operands: the same function serves for a matrix of products of factors."""
    wide = w.dtype == jnp.int32
    x = x.astype(jnp.int32) if wide else x
    return jnp.matmul(x, w, preferred_element_type=jnp.int32)


def scanned(x, w):
    return lax.scan(lambda c, w: (c, dot(x, w)), 0, w)[1]


def until(x, w):
    """A loop that carries the matrix along."""
    body = lambda c: (c[0] + 1, c[1], c[2] + dot(x, c[1]))
    return lax.while_loop(lambda c: c[0] < 1, body, (0, w, jnp.zeros((3, 5), jnp.int32)))[2]


X = int8((3, 6))
# Bilinear functions of data and a perturbed array: the perturbation is the function of the products of
# factors, shifted.
BILINEAR = {
    "matrix": (dot, X, low_rank((6, 5))),
    "vector": (lambda x, w: dot(x[0], w), X, low_rank((6, 5))),
    "left": (lambda x, w: dot(w, x.T), X, low_rank((5, 6))),
    "transposed": (lambda x, w: dot(x, w.T), X, low_rank((5, 6))),
    "rank 1": (dot, X, low_rank((6, 5), rank=1)),
    "rank 11": (dot, X, low_rank((6, 5), rank=11, largest=30)),
    "jit": (jax.jit(dot), X, low_rank((6, 5))),
    "wide": (lambda x, w: dot(x.astype(jnp.int32), w.astype(jnp.int32)), X, low_rank((6, 5))),
    "uint8 data": (lambda x, w: dot(x.astype(jnp.uint8), w.astype(jnp.int32)), X, low_rank((6, 5))),
    "scan": (scanned, X, low_rank((4, 6, 5), batch=(0,))),
    "scan, one noise": (scanned, X, low_rank((4, 6, 5))),
    "vmap": (lambda x, w: jax.vmap(dot, (None, 0))(x, w), X, low_rank((4, 6, 5), batch=(0,))),
    "one layer": (lambda x, w: dot(x, w[2]), X, low_rank((4, 6, 5), batch=(0,))),
    "heads": (lambda x, w: dot(x, w.reshape(6, 6)), X, low_rank((6, 3, 2), columns=(1, 2))),
    "einsum": (
        lambda x, w: jnp.einsum(
            "ti,ihd->htd", x.astype(w.dtype), w, preferred_element_type=jnp.int32
        ),
        X,
        low_rank((6, 3, 2), columns=(1, 2)),
    ),
    "slice": (lambda x, w: dot(x, w[1:7, ::2]), X, low_rank((8, 5))),
    "split": (lambda x, w: dot(x, jnp.split(w, 2, 1)[1]), X, low_rank((6, 4))),
    "joined": (lambda x, w: dot(x, jnp.concatenate([w, w], 1)), X, low_rank((6, 5))),
    "stacked": (lambda x, w: jax.vmap(dot, (None, 0))(x, jnp.stack([w, w])), X, low_rank((6, 5))),
    "padded": (lambda x, w: dot(x, jnp.pad(w, ((1, 0), (0, 2)))), X, low_rank((5, 5))),
    "while": (until, X, low_rank((6, 5))),
    "cond": (lambda x, w: lax.cond(x[0, 0] > 0, lambda: dot(x, w), lambda: dot(2 * x, w)), X // 2, low_rank((6, 5))),
}  # fmt: skip


@pytest.mark.parametrize("case", BILINEAR)
def test_products_are_those_of_the_matrix_and_of_the_factors_shifted(case):
    fn, x, value = BILINEAR[case]
    products = jnp.ones((), jnp.int32)
    for factor in value.factors:
        products = products * factor.astype(jnp.int32)

    def of_member(sign):
        got = interpret(fn, Context("error"))(x, value.replace(scale=sign))
        return got, fn(x, value.w), fn(x, products.sum(0, dtype=jnp.int32)) >> SHIFT

    signs = jnp.array([1, -1])
    got, main, noise = jax.jit(jax.vmap(of_member))(signs)
    assert got.dtype == jnp.int32 and np.abs(noise).max() > 3
    for member, sign in enumerate((1, -1)):
        np.testing.assert_array_equal(got[member], main[member] + sign * noise[member])


def test_a_negated_matrix_stays_a_mirror():
    value = low_rank((6, 5))
    fn = interpret(lambda x, w: dot(x, -w), Context("error"))
    plus, minus = (fn(X, value.replace(scale=jnp.int32(s))) for s in (1, -1))
    main = -dot(X, value.w)
    np.testing.assert_array_equal(plus - main, main - minus)
    exact = dot(X, (value.factors[0].astype(jnp.int32) * value.factors[1]).sum(0, dtype=jnp.int32))
    np.testing.assert_array_equal(plus - main, -exact >> SHIFT)


def test_an_int8_product_wraps_around_as_it_does_unperturbed():
    value = low_rank((6, 5))
    got = interpret(lambda x, w: x @ w, Context("error"))(X, value)
    wide = interpret(dot, Context("error"))(X, value)
    assert got.dtype == jnp.int8
    np.testing.assert_array_equal(got, wide.astype(jnp.int8))


@pytest.mark.parametrize(
    "look_up",
    [
        lambda w, t: w[t],
        lambda w, t: jax.vmap(lambda i: w[i])(t),
        lambda w, t: jnp.take(w, t, axis=0),
        lambda w, t: jnp.stack([lax.dynamic_slice_in_dim(w, i, 1)[0] for i in t]),
        lambda w, t: w.T[:, t].T,
    ],
)
def test_rows_that_are_looked_up_are_rounded_to_the_nearest(look_up):
    value, tokens = low_rank((9, 5), largest=100), jnp.array([8, 0, 3, 3])
    table = [
        [
            sum(int(a) * int(b) for a, b in zip(value.factors[0][:, i, 0], value.factors[1][:, 0, j], strict=True))
            for j in range(5)
        ]
        for i in range(9)
    ]  # fmt: skip
    rounded = np.array(
        [[int(math.copysign((abs(e) + 128) // 256, e)) for e in row] for row in table]
    )
    for sign in (1, -1):
        expected = np.clip(np.asarray(value.w, int) + sign * rounded, -127, 127)[tokens]
        fn = lambda w, t: look_up(w, t) + jnp.int8(0)
        got = interpret(fn, Context("error"))(value.replace(scale=jnp.int32(sign)), tokens)
        assert got.dtype == jnp.int8
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("fan_in", [1040, 1041, 5000, 80_000])
def test_the_largest_numbers_do_not_overflow(fan_in):
    full = lambda *shape: jnp.full(shape, 127, jnp.int8)
    factors = (full(1, fan_in, 1), jnp.array([127, -127], jnp.int8).reshape(1, 1, 2))
    value = LowRank(full(fan_in, 2), factors, jnp.int32(1), ("w",), arithmetic=FixedPoint(SHIFT))
    assert (fixed_point.fits(fan_in, jnp.int8, 1, SHIFT) == "split") == (fan_in > 1040)
    for u in (-128, 127):
        x = jnp.full(fan_in, u, jnp.int8)
        for sign in (1, -1):
            got = interpret(dot, Context("error"))(x, value.replace(scale=jnp.int32(sign)))
            noise = [fan_in * u * 127 * b >> SHIFT for b in (127, -127)]
            assert got.tolist() == [fan_in * u * 127 + sign * n for n in noise]


def test_products_too_long_for_int32_are_an_error():
    value = LowRank(
        jnp.zeros((140_000, 2), jnp.int8),
        (jnp.zeros((1, 140_000, 1), jnp.int8), jnp.zeros((1, 1, 2), jnp.int8)),
        jnp.int32(1), ("w",), arithmetic=FixedPoint(SHIFT),
    )  # fmt: skip
    with pytest.raises(eggroll.DenseBuildError, match="'w'.*'dot_general'"):
        interpret(dot, Context("error"))(jnp.zeros(140_000, jnp.int8), value)


NO_RULE = {
    "mul": lambda w, x: dot(x, w * jnp.int8(2)),
    "add": lambda w, x: dot(x, w + jnp.int8(1)),
    "reduce_sum": lambda w, x: w.sum(dtype=jnp.int32),
    "convert_element_type": lambda w, x: x.astype(jnp.float32) @ w.astype(jnp.float32),
    "clamp": lambda w, x: dot(x, lax.clamp(jnp.int8(-9), w, jnp.int8(9))),
    "dot_general": lambda w, x: dot(w.T, w),
    "shift_right_arithmetic": lambda w, x: dot(x, w >> 1),
    "output": lambda w, x: w,
}


@pytest.mark.parametrize("primitive", NO_RULE)
def test_a_missing_rule_is_an_error_that_names_parameter_and_operation(primitive):
    es = make(population=2, on_dense="ignore")
    state = es.init({"layer": {"w": jnp.zeros((6, 5), jnp.int8)}}, 0)
    fn = lambda params, key, x: NO_RULE[primitive](params["layer"]["w"], x)
    with pytest.raises(eggroll.DenseBuildError, match=f"'layer/w'.*'{primitive}' has no rule"):
        es.map(state, fn, X)


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize("rank", [1, 2, 4, 64])
def test_the_noise_is_rounded_normal_and_its_products_have_one_spread(rank):
    std = 16 * rank**-0.25
    table = quantiles(rank).astype(int)
    edges = (np.arange(-127, 128) + 0.5) / std
    law = np.diff([0.0, *(0.5 * (1 + math.erf(e / 2**0.5)) for e in edges)])
    counts = np.bincount(table + 127, minlength=255)
    np.testing.assert_allclose(counts, 2**16 * law, atol=1.01)
    assert (table == -table[::-1]).all()
    moment = lambda k: np.mean(table.astype(float) ** k)
    assert moment(2) == pytest.approx(std**2 + 1 / 12, rel=2e-3)
    assert moment(4) / moment(2) ** 2 == pytest.approx(3, abs=0.02)
    # sum_r A_r B_r has the variance of 16 * 16 for every rank, to the rounding of the factors.
    assert rank * moment(2) ** 2 == pytest.approx(256**2, rel=0.012)


def test_a_rank_moves_as_much_as_another():
    fraction = {}
    for rank in (1, 2, 4):
        es = make(rank=rank, population=2)
        state = es.init({"w": jnp.zeros((300, 200), jnp.int8)}, 3)
        fraction[rank] = float(np.std(es.member(state, 0)["w"]))
    # sigma = 2^-4 of 16 is one unit; rounding adds 1/12 to the variance.
    assert all(abs(std - 1.04) < 0.06 for std in fraction.values()), fraction


def test_a_sample_depends_on_its_key_and_place_alone():
    words = jnp.array([5, 6], jnp.uint32)
    sample = integer.normal().sample
    whole = sample(words, (1, 6, 7), jnp.int8).ravel()
    for size in (1, 41):
        assert (sample(words, (1, size), jnp.int8)[0] == whole[:size]).all()
    assert not (sample(words + 1, (1, 42), jnp.int8)[0] == whole).all()
    x = np.asarray(sample(words, (1, 2, 10**5), jnp.int8)[0], float)
    assert abs(np.corrcoef(x)[0, 1]) < 0.01
    assert abs(np.corrcoef(x[0, ::2], x[0, 1::2])[0, 1]) < 0.02
    with pytest.raises(ValueError, match="expected int8, got float32"):
        sample(words, (1, 2), jnp.float32)


# ---------------------------------------------------------------- a strategy for a small model


def make(**changes):
    settings = dict(population=32, optimizer=integer.threshold(0.3))
    return integer.strategy(**{**settings, **changes})


PARAMS = {
    "embed": jnp.asarray(int8((11, 12), "e")),
    "layers": jnp.asarray(int8((2, 12, 12), "l")),
    "bias": jnp.asarray(int8((12,), "b")),
    "steps": jnp.int32(3),
}
TOKENS = jnp.array([3, 1, 4, 1, 5, 9, 2, 6], jnp.uint8)
PLAN = eggroll.plan.by_shape({"layers": Matrix(1, 2, batch=0)})


def hidden(params, tokens):
    """A small model in plain jnp that knows nothing of evolution strategies."""

    def layer(x, w):
        y = lax.dot(x, w, preferred_element_type=jnp.int32) >> 6
        return jnp.clip(x + y + params["bias"], -127, 127).astype(jnp.int8), None

    x = params["embed"][tokens]
    return lax.scan(layer, x, params["layers"])[0]


def fitness(params, key, tokens):
    x = hidden(params, tokens[:-1])
    logits = lax.dot(x, params["embed"].T, preferred_element_type=jnp.int32)
    right = jnp.take_along_axis(logits, tokens[1:, None].astype(jnp.int32), 1)[:, 0]
    return jnp.sum((right - logits.max(1)) >> 4)


def mesh(devices):
    return jax.make_mesh(
        (devices,), ("population",), axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:devices],
    )  # fmt: skip


RULES = {
    "threshold": integer.threshold(integer.inverse_decay()),
    "feedback": optax.chain(integer.momentum(), integer.error_feedback(integer.threshold(0.2))),
}


def with_state(params, key, member, tokens):
    """The same with something that each member carries from generation to generation."""
    state, offset = member
    tokens = jnp.roll(tokens, offset)
    return fitness(params, key, tokens), state // 2 + hidden(params, tokens)[0] // 2


@functools.cache
def trained(**changes):
    """Parameters, optimizer state and what the members carry after three generations."""
    changes = {k: mesh(v) if k == "mesh" else v for k, v in changes.items()}
    es = make(plan=PLAN, optimizer=RULES["feedback"], **changes)
    state, carried = es.init(PARAMS, 0), jnp.zeros((32, 12), jnp.int8)
    for _ in range(3):
        members = (carried, jnp.arange(32) // 8)
        values, carried = es.evaluate(state, with_state, TOKENS, members=members)
        state, _ = es.update(state, values)
    return state, carried, values


@pytest.mark.parametrize(
    "changes",
    [
        dict(chunk=12),
        dict(mesh=2, chunk=4),
        *(pytest.param(dict(mesh=n), marks=pytest.mark.soak) for n in (1, 4, 8)),
    ],
    ids=str,
)
def test_chunks_and_devices_change_no_bit(changes):
    expected, got = trained(), trained(**changes)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), got, expected))
    assert not (got[0].params["layers"] == PARAMS["layers"]).all()
    assert np.abs(got[1]).max() > 60


def test_halves_and_thirds_of_a_generation_are_the_whole():
    es = make(plan=PLAN, optimizer=RULES["feedback"])
    state = es.init(PARAMS, 0)
    whole, metrics = es.step(state, fitness, TOKENS)
    values = es.evaluate(state, fitness, TOKENS)
    assert values.dtype == jnp.int32
    halves, told = es.update(state, [int(v) for v in values])
    pairs = int((values[0::2] != values[1::2]).sum())
    thirds, _ = es.apply_gradient(state, es.gradient(state, values), pairs)
    for other in (halves, thirds):
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), other, whole))
    assert told == metrics
    v = np.asarray(values, float)
    assert metrics.fitness_mean == pytest.approx(v.mean())
    assert metrics.fitness_std == pytest.approx(v.std(), rel=1e-5)
    assert metrics.identical_pairs == 16 - pairs
    moved = sum(
        int((a != b).sum())
        for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(state.params), strict=True)
    )
    assert metrics.update_norm == pytest.approx(moved**0.5)


def test_no_float_in_a_generation():
    for rule in RULES.values():
        es = make(plan=PLAN, optimizer=rule, chunk=8, mesh=mesh(2))
        state = es.init(PARAMS, 0)

        def generation(state, tokens, es=es):
            values = es.evaluate(state, fitness, tokens)
            return es.update(state, values)[0]

        assert integer.float_operations(generation, state, TOKENS) == []
        step = lambda state, tokens, es=es: es.step(state, fitness, tokens)[0]
        assert integer.float_operations(step, state, TOKENS) == []
    run = lambda state, tokens: es.optimize(state, fitness, 2, tokens)
    assert integer.float_operations(run, state, TOKENS) == []
    # The metrics are floats, and a fitness in floats is found out wherever it hides.
    assert integer.float_operations(lambda s: es.update(s, jnp.arange(32))[1], state)
    as_float = lambda params, key, tokens: fitness(params, key, tokens) * 0.5
    found = integer.float_operations(lambda s: es.step(s, as_float, TOKENS)[0], state)
    assert any(line.startswith("mul: float32[") for line in found)


def test_pairs_are_exact_mirrors():
    es = make(plan=PLAN, rank=2)
    state = es.init(PARAMS, 0)
    product = lambda p, key, x: lax.dot(x, p["embed"], preferred_element_type=jnp.int32)
    x = jnp.asarray(int8((3, 11)))
    out = np.asarray(es.map(state, product, x))
    main = np.asarray(product(PARAMS, None, x))
    np.testing.assert_array_equal(out[0::2] - main, main - out[1::2])
    assert np.abs(out - main).max() > 10


@pytest.mark.parametrize("rank", [1, 3])
def test_members_agree_with_perturbed_products_within_the_bound(rank):
    es = make(plan=PLAN, rank=rank)
    # Small enough that nothing saturates when it is built.
    params = {**PARAMS, "embed": PARAMS["embed"] // 2}
    state = es.init(params, 0)
    x = jnp.asarray(int8((4, 11)))
    product = lambda p, key, x: lax.dot(x, p["embed"], preferred_element_type=jnp.int32)
    lazy = np.asarray(es.map(state, product, x))
    dense = jax.vmap(lambda p: product(p, None, x))(es.ask(state, range(32)))
    # Each entry of the built matrix is off by up to 1/2, and the product is rounded down once.
    bound = np.abs(np.asarray(x, int)).sum(1)[None, :, None] / 2 + 1
    assert (np.abs(lazy - np.asarray(dense)) <= bound).all()
    assert np.abs(lazy - np.asarray(dense)).max() > 0
    # Looked-up rows and vectors are the same numbers.
    rows = lambda p, key: (p["embed"][jnp.array([2, 9])] + jnp.int8(0), p["bias"] + jnp.int8(0))
    embed, bias = es.map(state, rows)
    members = es.ask(state, range(32))
    np.testing.assert_array_equal(embed, members["embed"][:, jnp.array([2, 9])])
    np.testing.assert_array_equal(bias, members["bias"])


def test_it_learns():
    es = make(population=128, plan=PLAN, optimizer=integer.threshold(0.05))
    state = es.init(PARAMS, 0)
    before = int(fitness(PARAMS, None, TOKENS))
    state = es.optimize(state, fitness, 200, TOKENS)
    assert int(fitness(es.params(state), None, TOKENS)) > before / 4
    assert min(int(x.min()) for x in jax.tree.leaves(state.params)) >= -127
    assert state.params["steps"] == 3


# ---------------------------------------------------------------- the estimate


@pytest.mark.parametrize("rank", [1, 2])
def test_the_estimate_is_the_sum_over_decided_pairs(rank):
    es = make(plan=PLAN, rank=rank)
    state = es.init(PARAMS, 0)
    values = np.random.default_rng(0).integers(0, 4, 32)
    z = es.gradient(state, jnp.asarray(values))
    signs = np.sign(values[0::2] - values[1::2])
    assert set(signs) == {-1, 0, 1}
    plan = es.plan_of(PARAMS)
    draws = draw_pairs(plan, es.noise, state.seed, jnp.int32(0), jnp.arange(16))
    named = {
        leaf.path: [np.asarray(x, np.int64) for x in d]
        for leaf, d in zip(plan.leaves, draws, strict=True)
    }
    for path in ("embed", "layers", "bias"):
        a, b = named[path]
        products = (a * b).sum(1)
        expected = -np.tensordot(signs, products, 1)
        assert z[path].dtype == jnp.int32
        np.testing.assert_array_equal(z[path], expected)
    assert z["steps"] is None


def test_sums_beyond_int32_are_taken_in_limbs(monkeypatch):
    plan = PLAN(PARAMS, 1)
    signs = jnp.asarray(np.random.default_rng(1).integers(-1, 2, 20, np.int8))

    def sums(**how):
        words, epoch = jnp.array([1, 2], jnp.uint32), jnp.int32(0)
        run = lambda d: estimator.weighted_noise(plan, integer.normal(), words, epoch, d, **how)
        return jax.jit(run)(signs)

    expected = sums()
    monkeypatch.setattr(fixed_point, "pairs_in_int32", lambda rank: 3)
    assert estimator.pairs_at_once(plan, 20) == 3
    for how in ({}, {"mesh": mesh(2)}):
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), sums(**how), expected))


def test_tasks_vote_and_what_is_not_finite_is_dropped():
    from eggroll.arithmetic.integers import pair_signs as signs_of

    def pair_signs(values):
        return signs_of(values if values.ndim == 2 else values[:, None])

    assert pair_signs(jnp.array([3, 1, 2, 2, 0, 5])).tolist() == [1, 0, -1]
    extremes = jnp.array([2**31 - 1, -(2**31), -(2**31), 2**31 - 1], jnp.int32)
    assert pair_signs(extremes).tolist() == [1, -1]
    votes = jnp.array([[1, 1, 1], [0, 0, 9], [1, 2, 5], [1, 3, 4]])
    assert pair_signs(votes).tolist() == [1, 0]
    scores = jnp.array([jnp.inf, 1.0, jnp.nan, 0.0, 1.0, 0.5])
    assert pair_signs(scores).tolist() == [0, 0, 1]


def test_ties_leave_everything_as_it_was():
    es = make(optimizer=RULES["feedback"])
    state = es.init(PARAMS, 0)
    new, metrics = es.update(state, jnp.zeros(32, jnp.int32))
    assert not metrics.updated and metrics.identical_pairs == 16 and new.generation == 1
    same = jax.tree.map(lambda a, b: bool((a == b).all()), (new.params, new.optimizer), (state.params, state.optimizer))  # fmt: skip
    assert jax.tree.all(same)


# ---------------------------------------------------------------- bad input


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="sigma=0.05: .*power of two"):
        dataclasses.replace(make(), sigma=0.05)
    with pytest.raises(ValueError, match="sigma=.*fixed power of two"):
        dataclasses.replace(make(), sigma=lambda t: 0.5)
    with pytest.raises(ValueError, match="shaping=zscore.*pair_sign"):
        make(shaping=eggroll.shaping.zscore())
    with pytest.raises(ValueError, match="agreement=True"):
        make(agreement=True)
    with pytest.raises(ValueError, match="sigma=32.0: .*power of two"):
        make(shift=-5)
    with pytest.raises(ValueError, match="noise=.*must be a Noise such as"):
        make(noise=integer.normal)


def test_wrong_parameters_are_named():
    es = make()
    with pytest.raises(ValueError, match="'b' is float32 in an integer model: must be int8"):
        es.init({"a": jnp.zeros((9, 9), jnp.int8), "b": jnp.zeros(3)}, 0)
    with pytest.raises(ValueError, match="'a': 2 of 3 entries are -128: must be -127 to 127"):
        es.init({"a": jnp.array([-128, 0, -128], jnp.int8)}, 0)
    with pytest.raises(ValueError, match="params: expected at least one float or int8 array"):
        es.init({"a": jnp.zeros(3, jnp.int32)}, 0)
    plain = EvolutionStrategy(population=2, sigma=0.1, optimizer=optax.sgd(0.1))
    with pytest.raises(
        ValueError, match="'a' is int8: must be trained with integer noise, by eggroll.integer"
    ):
        plain.init({"a": jnp.zeros((9, 9), jnp.int8)}, 0)
    # Beside floats, int8 passes through as it always did.
    assert (
        plain.init({"a": jnp.zeros(3, jnp.int8), "b": jnp.zeros(3)}, 0).params["a"].dtype
        == jnp.int8
    )


def test_an_optimizer_of_floats_is_refused():
    es = make(optimizer=optax.sgd(0.1))
    state = es.init({"a": jnp.zeros((9, 9), jnp.int8)}, 0)
    with pytest.raises(
        ValueError, match="expected int8 updates of parameter 'a', got float32.*threshold"
    ):
        es.update(state, jnp.arange(32))


def test_plans_of_integers():
    params = {**PARAMS, "frozen": jnp.zeros((20, 20), jnp.int8)}
    es = make(plan=eggroll.plan.by_shape({"frozen": Frozen(), "layers": Dense()}))
    plan = es.plan_of(params)
    assert plan["layers"].noise_shapes() == ((1, 2, 12, 12),) * 2
    assert plan["steps"].noise_shapes() == plan["frozen"].noise_shapes() == ()
    state = es.init(params, 0)
    state, _ = es.step(state, fitness, TOKENS)
    assert (state.params["frozen"] == 0).all()
    inferred = eggroll.plan.infer(fitness, PARAMS, TOKENS)(PARAMS, 1)
    assert inferred["layers"].treatment == Matrix(1, 2, batch=0, rank=1)
    assert {inferred["embed"].treatment.rows, inferred["embed"].treatment.columns} == {(0,), (1,)}
    assert "BUILT" not in make(plan=PLAN).describe(PARAMS, fitness, TOKENS)
    halved = make(plan=eggroll.plan.by_shape({"embed": Matrix(0, 1, sigma=0.3)}))
    with pytest.raises(ValueError, match="power of two"):
        halved.evaluate(halved.init(PARAMS, 0), fitness, TOKENS)


def test_rank_full_is_dense_noise():
    es = make(rank="full", population=4)
    state = es.init({"w": jnp.zeros((60, 50), jnp.int8)}, 0)
    fn = lambda p, key, x: lax.dot(x, p["w"], preferred_element_type=jnp.int32)
    x = jnp.asarray(int8((2, 60)))
    expected = jax.vmap(lambda p: fn(p, None, x))(es.ask(state, range(4)))
    np.testing.assert_array_equal(es.map(state, fn, x), expected)
    assert np.linalg.matrix_rank(np.asarray(es.member(state, 0)["w"], float)) > 40
