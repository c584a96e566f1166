"""The strategy: one generation in every form, its contract on bad scores, and what it promises."""

import operator
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll import EvolutionStrategy, Frozen, Matrix
from eggroll.generation import all_draws
from eggroll.inputs import begin


def make(**changes):
    settings = dict(optimizer=optax.adam(1e-2), population=32, sigma=0.1, on_dense="error")
    return EvolutionStrategy(**{**settings, **changes})


def make_params(key=0, dtype=jnp.float32):
    k1, k2 = jax.random.split(jax.random.key(key))
    params = {
        "first": {"kernel": jax.random.normal(k1, (6, 8)) / 3, "bias": jnp.zeros(8)},
        "second": {"kernel": jax.random.normal(k2, (8, 5)) / 3, "bias": jnp.zeros(5)},
    }
    return jax.tree.map(lambda x: x.astype(dtype), params)


X = jax.random.normal(jax.random.key(7), (12, 6))
Y = jnp.sin(X @ jax.random.normal(jax.random.key(8), (6, 5)))


def predict(params, x):
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden @ params["second"]["kernel"] + params["second"]["bias"]


def fitness(params, key, x, y):
    return -jnp.mean((predict(params, x) - y) ** 2)


def per_task(params, key, x, y):
    return -jnp.mean((predict(params, x) - y) ** 2, axis=1)


def mesh(devices, model=1):
    return jax.make_mesh(
        (devices, model),
        ("population", "model"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[: devices * model],
    )


# ---------------------------------------------------------------- the same as members built densely


@pytest.mark.parametrize(
    ("rank", "function"), [(1, fitness), (1, per_task), (3, per_task), ("full", per_task)]
)
def test_values_are_those_of_members_built_densely(rank, function):
    es = make(rank=rank)
    state = es.init(make_params(), 0)
    members = es.ask(state, range(32))
    expected = jax.jit(jax.vmap(lambda p: function(p, None, X, Y)))(members)
    np.testing.assert_allclose(es.evaluate(state, function, X, Y), expected, rtol=2e-6, atol=2e-6)
    for i in (0, 1, 31):
        one = jax.tree.map(operator.itemgetter(i), members)
        chex.assert_trees_all_close(es.member(state, i), one, atol=1e-6)


def test_members_of_a_pair_mirror_each_other_about_the_mean():
    es = make()
    state = es.init(make_params(), 0)
    plus, minus = es.member(state, 4), es.member(state, 5)
    middle = jax.tree.map(lambda a, b: (a + b) / 2, plus, minus)
    chex.assert_trees_all_close(middle, es.params(state), atol=1e-7)
    assert not np.allclose(plus["first"]["kernel"], es.params(state)["first"]["kernel"])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rank": 4, "shaping": None},
        {
            "plan": eggroll.plan.by_shape(
                {"first/kernel": Matrix(rows=1, columns=0, rank=2, sigma=3.0)}
            )
        },
        {
            "plan": eggroll.plan.by_shape({"first/*": eggroll.Dense(sigma=0.5)}),
            "shaping": eggroll.shaping.centered_rank(),
        },
    ],
)
def test_gradient_is_the_weighted_sum_of_the_members_noise(settings):
    es = make(**settings)
    params = make_params()
    state = es.init(params, 3)
    weights = values = jax.random.normal(jax.random.key(4), (32,))
    if es.shaping is not None:
        weights = es.shaping(values[:, None], jnp.ones((32, 1), bool), None)[:, 0]
    plan = es.plan(params, es.rank)
    members = es.ask(state, range(32))

    def expected(leaf, drawn, mean):
        sigma = 0.1 * leaf.treatment.sigma
        noise = (np.asarray(drawn, np.float64) - np.asarray(mean, np.float64)) / sigma
        return -np.tensordot(np.asarray(weights, np.float64), noise, 1) / 32 / sigma

    leaves = zip(plan.leaves, jax.tree.leaves(members), jax.tree.leaves(params), strict=True)
    want = jax.tree.unflatten(jax.tree.structure(params), [expected(*leaf) for leaf in leaves])
    chex.assert_trees_all_close(es.gradient(state, values), want, rtol=1e-3, atol=2e-4)


def test_bfloat16_factors_are_summed_in_float32():
    es = make(population=2048, rank=2, shaping=None)
    params = {"w": jnp.zeros((8, 6), jnp.bfloat16)}
    state = es.init(params, 0)
    values = np.random.default_rng(0).normal(size=2048).astype(np.float32)
    draws = jax.jit(lambda s: all_draws(begin(es, s)))(state)
    a, b = (np.asarray(x, np.float64) for x in draws[0])  # [pairs, rank, 8, 1], [pairs, rank, 1, 6]
    d = (values[0::2] - values[1::2]).astype(np.float64)
    want = -np.einsum("p,prij,prkl->il", d, a, b) / (2048 * 0.1 * 2**0.5)
    grads = es.gradient(state, values)["w"]
    assert draws[0][0].dtype == jnp.bfloat16 and grads.dtype == jnp.float32
    np.testing.assert_allclose(grads, want, rtol=1e-5, atol=1e-6)


def test_step_is_evaluate_then_update_is_gradient_then_apply():
    es = make()
    state = es.init(make_params(), 0)
    whole, whole_metrics = es.step(state, fitness, X, Y)
    values = es.evaluate(state, fitness, X, Y)
    half, half_metrics = es.update(state, values)
    third, third_metrics = es.apply_gradient(state, es.gradient(state, values))
    chex.assert_trees_all_close(whole, half, atol=1e-6)
    chex.assert_trees_all_close(half, third, atol=1e-6)
    chex.assert_trees_all_close(whole_metrics, half_metrics, rtol=1e-5)
    np.testing.assert_allclose(third_metrics.update_norm, half_metrics.update_norm, rtol=1e-5)
    assert int(third.generation) == 1 and int(third_metrics.generation) == 0
    told, _ = es.tell(state, list(np.asarray(values)))
    chex.assert_trees_all_equal(told, half)


# ---------------------------------------------------------------- what must change nothing


def test_numbers_of_pairs_that_there_are_not_are_named():
    es = make(population=8)
    state = es.init(make_params(), 0)
    for pairs, told in (
        ([4], "pair 4: must be from 0 to 3 in a population of 8"),
        ([], "pairs is empty: must have at least one number"),
    ):
        with pytest.raises(ValueError, match=told):
            es.map(state, lambda params, key: jnp.zeros(()), pairs=pairs)


def test_chunks_change_nothing():
    outcomes = []
    for chunk in (None, 10):
        es = make(chunk=chunk)
        outcomes.append(es.step(es.init(make_params(), 0), fitness, X, Y))
    for other in outcomes[1:]:
        chex.assert_trees_all_close(outcomes[0], other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("shape", "population"), [((8, 1), 36), ((4, 2), 32)])
def test_devices_change_nothing_but_rounding(shape, population):
    one = make(population=population)
    many = make(population=population, mesh=mesh(*shape), chunk=4)
    expected = one.init(make_params(), 0)
    found = many.init(make_params(), 0)
    traces = []

    def on_many(*args):
        traces.append(args)
        return per_task(*args)

    for _ in range(3):
        expected, metrics = one.step(expected, per_task, X, Y)
        found, found_metrics = many.step(found, on_many, X, Y)
    chex.assert_trees_all_close(expected, jax.device_get(found), atol=2e-5)
    np.testing.assert_allclose(metrics.fitness_mean, found_metrics.fitness_mean, rtol=1e-5)
    assert len(traces) == 1  # a state on one device would have compiled a program of its own


def test_values_and_gradients_on_devices():
    """The halves of a step, members with inputs of their own, from a state on one device."""
    one, many = make(), make(mesh=mesh(4), chunk=2)
    state = one.init(make_params(), 0)
    own = jax.random.normal(jax.random.key(9), (32, 12, 6))

    def on_own_data(params, key, x, y):
        return per_task(params, key, x, y)

    values = one.evaluate(state, on_own_data, Y, members=own)
    found = many.evaluate(state, on_own_data, Y, members=own)
    np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(
        one.gradient(state, values), jax.device_get(many.gradient(state, values)), atol=1e-5
    )


def test_kept_and_redrawn_noise_give_the_same_bits():
    kept, redrawn = make(), make(factor_memory=0)
    state = kept.init(make_params(), 0)
    values = kept.evaluate(state, fitness, X, Y)
    a, _ = kept.step(state, fitness, X, Y)
    b, _ = redrawn.step(state, fitness, X, Y)
    chex.assert_trees_all_close(a, b, atol=1e-6)
    chex.assert_trees_all_equal(redrawn.update(state, values)[0], kept.update(state, values)[0])


def test_a_member_does_not_depend_on_the_population_or_on_other_leaves():
    small, large = make(population=8), make(population=64)
    params = make_params()
    more = {"another": jnp.ones((5, 5)), **params}
    state = small.init(params, 0)
    chex.assert_trees_all_equal(small.member(state, 5), large.member(state, 5))
    extended = large.member(large.init(more, 0), 5)
    extended.pop("another")
    chex.assert_trees_all_equal(small.member(state, 5), extended)


def test_noise_reuse_keeps_the_noise_for_as_many_generations():
    es = make(noise_reuse=2)
    state = es.init(make_params(), 0)

    def noise(generation):
        at = state._replace(generation=jnp.int32(generation))
        return es.member(at, 0)["first"]["kernel"]

    assert np.array_equal(noise(0), noise(1))
    assert not np.array_equal(noise(1), noise(2))
    assert not np.array_equal(
        noise(0), make().member(make().init(make_params(), 1), 0)["first"]["kernel"]
    )


def test_deprecated_methods_still_answer_and_say_what_to_use():
    es = make(noise_reuse=2, sigma=optax.linear_schedule(0.1, 0.0, 10))
    state = es.init(make_params(), 0)._replace(generation=jnp.int32(5))
    with pytest.warns(DeprecationWarning, match="use state.generation // es.noise_reuse"):
        assert int(es.epoch(state)) == 2
    with pytest.warns(DeprecationWarning, match="use metrics.sigma"):
        assert float(es.sigma_of(state)) == pytest.approx(0.05)


def test_keys_are_shared_in_a_pair_and_fresh_every_generation():
    def draws(params, key):
        return jax.random.uniform(key)

    es = make(noise_reuse=5)
    state = es.init(make_params(), 0)
    first = np.asarray(es.map(state, draws))
    assert np.array_equal(first[0::2], first[1::2])
    assert len(np.unique(first)) == 16
    later = np.asarray(es.map(state._replace(generation=jnp.int32(1)), draws))
    assert not np.intersect1d(first, later).size
    apart = np.asarray(make(shared_keys=False).map(state, draws))
    assert len(np.unique(apart)) == 32


# ---------------------------------------------------------------- inputs and outputs of members


def test_members_get_their_own_inputs_and_give_their_own_outputs():
    es = make(population=8, chunk=4)
    state = es.init(make_params(), 0)
    own = {"x": jax.random.normal(jax.random.key(1), (8, 6)), "i": jnp.arange(8)}

    def fn(params, key, member, scale):
        return {"y": predict(params, member["x"]) * scale, "i": member["i"]}

    out = es.map(state, fn, 2.0, members=own)
    dense = jax.jit(jax.vmap(lambda p, x: predict(p, x) * 2.0))
    expected = dense(es.ask(state, range(8)), own["x"])
    np.testing.assert_allclose(out["y"], expected, rtol=1e-5, atol=1e-6)
    assert out["i"].tolist() == list(range(8))


def test_aux_comes_back_with_a_leading_population():
    def with_aux(params, key, x, y):
        return fitness(params, key, x, y), {"prediction": predict(params, x)}

    es = make()
    state = es.init(make_params(), 0)
    values, aux = es.evaluate(state, with_aux, X, Y)
    assert aux["prediction"].shape == (32, 12, 5)
    np.testing.assert_array_equal(values, es.evaluate(state, fitness, X, Y))
    chex.assert_trees_all_close(
        es.step(state, with_aux, X, Y), es.step(state, fitness, X, Y), atol=1e-6
    )


def test_groups_reach_the_shaping():
    es = make(population=8, shaping=eggroll.shaping.center(by="group"))
    state = es.init(make_params(), 0)
    values = jnp.array([1.0, 0, 5, 7, 1, 2, 9, 4])
    groups = jnp.array([0, 0, 1, 1, 0, 0, 1, 1])
    plain = es.gradient(state, values, groups=groups)
    # A constant added to a group is taken out by the centring.
    shifted = es.gradient(state, values + 100.0 * groups, groups=groups)
    chex.assert_trees_all_close(plain, shifted, atol=1e-3)


@pytest.mark.parametrize(
    "run",
    [
        lambda es, state, groups: es.step(state, fitness, X, Y, groups=groups),
        lambda es, state, groups: es.optimize(state, fitness, 2, X, Y, groups=groups),
        lambda es, state, groups: es.optimize(
            state, fitness, 2, X, Y, groups=groups, callback=lambda *_: True
        ),
        lambda es, state, groups: es.update(state, jnp.arange(8.0), groups),
    ],
)
def test_groups_reach_the_shaping_by_every_way(run):
    seen = []

    def shaping(values, valid, groups):
        seen.append(groups.shape)
        return values

    es = make(population=8, shaping=shaping)
    state = es.init(make_params(), 0)
    jax.eval_shape(lambda state: run(es, state, jnp.arange(8)), state)
    assert seen == [(8,)]


# ---------------------------------------------------------------- scores that are no good


def test_a_score_that_is_not_finite_drops_its_pair_and_is_counted():
    es = make(population=8, shaping=None)
    state = es.init(make_params(), 0)
    without = es.gradient(state, [1.0, 2.0, 0.0, 0.0, 3.0, 1.0, 0.0, 5.0])
    for bad in (np.nan, np.inf, -np.inf, None):
        values = [1.0, 2.0, bad, 4.0, 3.0, 1.0, 0.0, 5.0]
        _, metrics = es.update(state, values)
        assert int(metrics.invalid) == 1
        np.testing.assert_allclose(metrics.fitness_mean, np.mean([1, 2, 4, 3, 1, 0, 5]), rtol=1e-6)
        assert (float(metrics.fitness_best), float(metrics.fitness_worst)) == (5.0, 0.0)
        # The pair's other member weighs nothing, and N counts the six valid members.
        other = es.gradient(state, [1.0, 2.0, bad, -1e6, 3.0, 1.0, 0.0, 5.0])
        found = es.gradient(state, values)
        chex.assert_trees_all_equal(found, other)
        chex.assert_trees_all_close(found, jax.tree.map(lambda g: g * 8 / 6, without), rtol=1e-5)


def assert_nothing_moved(before, after, metrics):
    assert not bool(metrics.updated) and float(metrics.update_norm) == 0
    chex.assert_trees_all_equal(after.params, before.params)
    chex.assert_trees_all_equal(after.optimizer, before.optimizer)
    assert int(after.generation) == int(before.generation) + 1


@pytest.mark.parametrize(
    "shaping", [None, eggroll.shaping.zscore(), eggroll.shaping.centered_rank()]
)
def test_nothing_valid_or_no_spread_leaves_all_but_the_generation(shaping):
    es = make(population=8, shaping=shaping)
    state, _ = es.update(es.init(make_params(), 0), np.arange(8.0))
    for values in ([None] * 8, [0.1] * 8, [np.nan] * 7 + [1.0]):
        assert_nothing_moved(state, *es.update(state, values))


def test_what_would_overflow_moves_nothing():
    es = make(population=8, shaping=None)
    state, metrics = es.update(es.init(make_params(), 0), np.arange(8.0))
    assert bool(metrics.updated)
    assert_nothing_moved(state, *es.update(state, np.array([3e38, -3e38] * 4, np.float32)))
    assert_nothing_moved(state, *es.update(state, np.array([1e30, 0.0] * 4, np.float32)))
    grads = es.gradient(state, np.arange(8.0))
    assert bool(es.apply_gradient(state, grads)[1].updated)
    grads["first"]["bias"] = grads["first"]["bias"].at[2].set(jnp.nan)
    assert_nothing_moved(state, *es.apply_gradient(state, grads))
    # A schedule that ends at zero, and scores that differ nevertheless: a weight over sigma is infinite.
    fading = make(population=8, sigma=optax.linear_schedule(0.1, 0.0, 1), shaping=None)
    assert_nothing_moved(state, *fading.update(state, np.arange(8.0)))


def test_a_bad_task_drops_the_pair_for_that_task_alone():
    es = make(population=4, shaping=None)
    state = es.init(make_params(), 0)
    table = np.array([[1.0, 2], [3, np.nan], [0, 1], [5, 2]])
    cleaned = table.copy()
    cleaned[0:2, 1] = 0
    chex.assert_trees_all_close(es.gradient(state, table), es.gradient(state, cleaned), rtol=1e-6)
    assert int(es.update(state, table)[1].invalid) == 1
    rows = [list(row) for row in table]
    rows[1][1] = None
    objects = np.array(rows, object)
    for same in (rows, objects):
        chex.assert_trees_all_equal(es.gradient(state, same), es.gradient(state, table))
    # None in the place of a member's scores stands for all of them.
    rows[2] = None
    table[2] = np.nan
    chex.assert_trees_all_equal(es.gradient(state, rows), es.gradient(state, table))


def test_metrics_of_identical_pairs_and_agreement():
    es = make(population=8, agreement=True)
    state = es.init(make_params(), 0)
    _, metrics = es.update(state, [1.0, 1.0, 2.0, 3.0, 4.0, 4.0, None, 0.0])
    assert int(metrics.identical_pairs) == 2
    big = make(population=4096, agreement=True, shaping=None)
    # A linear fitness of 93 numbers: theory gives the halves' cosine 1 / (1 + 2 c / P), c about 93.
    linear = lambda params, key: sum(jnp.sum(x) for x in jax.tree.leaves(params))
    _, metrics = EvolutionStrategy(
        optimizer=optax.sgd(1e-3),
        population=4096,
        sigma=0.1,
        rank="full",
        agreement=True,
        shaping=None,
    ).step(big.init(make_params(), 0), linear)
    assert 0.85 < float(metrics.agreement) < 0.97


# ---------------------------------------------------------------- optimizer, types, schedules


def test_frozen_leaves_and_integers_pass_the_optimizer_by():
    params = {**make_params(), "count": jnp.arange(3), "key": jax.random.key(5)}
    es = make(
        optimizer=optax.adamw(1e-2, weight_decay=0.5),
        plan=eggroll.plan.by_shape({"second/*": Frozen()}),
    )
    state = es.init(params, 0)
    shapes = {np.shape(x) for x in jax.tree.leaves(state.optimizer)}
    assert shapes == {(), (6, 8), (8,)}
    after, _ = es.step(state, fitness, X, Y)
    chex.assert_trees_all_equal(after.params["second"], params["second"])
    chex.assert_trees_all_equal(after.params["count"], params["count"])
    assert after.params["key"] == params["key"]
    assert not np.array_equal(after.params["first"]["kernel"], params["first"]["kernel"])
    assert es.gradient(state, np.arange(32.0))["second"] == {"kernel": None, "bias": None}


def test_parameters_may_hold_none():
    params = {"w": make_params()["first"]["kernel"], "nothing": None, "count": jnp.arange(2)}

    def score(params, key):
        return jnp.sum(X @ params["w"])

    es = make()
    state = es.init(params, 0)
    grads = es.gradient(state, es.evaluate(state, score))
    assert grads["nothing"] is None and grads["count"] is None
    chex.assert_trees_all_close(
        es.step(state, score)[0], es.apply_gradient(state, grads)[0], atol=1e-6
    )


def test_parameters_and_outputs_without_entries():
    params = {"w": jnp.ones((6, 4)), "none": jnp.zeros((0, 4))}
    es = make(population=8, chunk=2)
    state = es.init(params, 0)
    after, metrics = es.step(state, lambda p, key: jnp.sum(X @ p["w"]) + jnp.sum(p["none"]))
    assert bool(metrics.updated) and after.params["none"].shape == (0, 4)
    assert es.map(state, lambda p, key: p["none"]).shape == (8, 0, 4)


def test_sigma_follows_its_schedule():
    es = make(sigma=optax.exponential_decay(0.4, 1, 0.5))
    state = es.init(make_params(), 0)
    for expected in (0.4, 0.2, 0.1):
        far = es.member(state, 0)["first"]["bias"] - es.params(state)["first"]["bias"]
        state, metrics = es.step(state, fitness, X, Y)
        assert float(metrics.sigma) == pytest.approx(expected)
        assert 0.3 * expected < float(jnp.std(far)) < 3 * expected


def test_master_weights_keep_updates_that_bfloat16_would_lose():
    params = {"w": jnp.ones((8, 8), jnp.bfloat16)}

    def score(params, key):
        return jnp.sum(params["w"].astype(jnp.float32))

    # The gradient is 1: a hundred steps go up by .01, each by less than a twentieth of what would round
    # to the next bfloat16.
    settings = dict(
        optimizer=optax.sgd(1e-4), population=256, sigma=0.01, shaping=None, on_dense="ignore"
    )
    kept = EvolutionStrategy(**settings)
    state = kept.optimize(kept.init(params, 0), score, 100)
    assert state.params["w"].dtype == jnp.bfloat16 and state.master["w"].dtype == jnp.float32
    assert float(jnp.mean(state.master["w"])) == pytest.approx(1.01, rel=2e-3)
    assert float(jnp.mean(state.params["w"].astype(jnp.float32))) > 1.005
    lost = EvolutionStrategy(**settings, master_weights=False)
    state = lost.optimize(lost.init(params, 0), score, 100)
    assert not state.master
    np.testing.assert_array_equal(state.params["w"], params["w"])


def test_float64_parameters_stay_float64():
    with jax.enable_x64(True):
        es = make()
        wide = lambda x: jnp.asarray(np.asarray(x, float))
        state = es.init(jax.tree.map(wide, make_params()), 0)
        x, y = wide(X), wide(Y)
        members = es.ask(state, range(32))
        expected = jax.jit(jax.vmap(lambda p: fitness(p, None, x, y)))(members)
        np.testing.assert_allclose(es.evaluate(state, fitness, x, y), expected, rtol=1e-12)
        after, _ = es.step(state, fitness, x, y)
        assert after.params["first"]["kernel"].dtype == jnp.float64


# ---------------------------------------------------------------- compilation and transformations


def test_generations_do_not_recompile():
    traces = chex.assert_max_traces(lambda *a: fitness(*a), n=2)
    es = make()
    state = es.init(make_params(), 0)
    for _ in range(4):
        state, _ = es.step(state, traces, X, Y)
    other = es.init(make_params(1), 5)
    es.step(other, traces, X, Y)


def test_optimize_is_steps_whatever_their_number():
    es = make()
    state = es.init(make_params(), 0)
    expected = state
    for _ in range(3):
        expected, _ = es.step(expected, fitness, X, Y)
    chex.assert_trees_all_close(es.optimize(state, fitness, 3, X, Y), expected, atol=1e-6)
    seen = []

    def callback(state, metrics):
        seen.append(int(metrics.generation))
        return len(seen) == 2

    assert int(es.optimize(state, fitness, 0, X, Y).generation) == 0
    stopped = es.optimize(state, fitness, 10, X, Y, callback=callback)
    assert seen == [0, 1] and int(stopped.generation) == 2


def test_step_works_inside_jit_scan_and_vmap_over_seeds():
    es = make()

    @jax.jit
    def train(key):
        state = es.init(make_params(), key)
        return jax.lax.scan(lambda s, _: es.step(s, fitness, X, Y), state, length=3)

    states, metrics = jax.vmap(train)(jax.random.split(jax.random.key(0), 2))
    assert metrics.fitness_mean.shape == (2, 3)
    for i, key in enumerate(jax.random.split(jax.random.key(0), 2)):
        state = es.init(make_params(), key)
        for _ in range(3):
            state, last = es.step(state, fitness, X, Y)
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], states.params), state.params, atol=1e-5
        )
        np.testing.assert_allclose(metrics.fitness_mean[i, -1], last.fitness_mean, rtol=1e-5)


def test_state_round_trips_through_orbax(tmp_path):
    import orbax.checkpoint as ocp

    es = make()
    params = {**make_params(dtype=jnp.bfloat16), "key": jax.random.key(5), "count": jnp.arange(3)}
    state, _ = es.step(es.init(params, 0), fitness, X, Y)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            es.init(params, 1),
        )
        restored = checkpointer.restore(tmp_path / "state", abstract)
    a, _ = es.step(state, fitness, X, Y)
    b, _ = es.step(restored, fitness, X, Y)
    chex.assert_trees_all_equal(
        jax.tree.map(jax.random.key_data, a.params["key"]), jax.random.key_data(b.params["key"])
    )
    a.params.pop("key"), b.params.pop("key")
    chex.assert_trees_all_equal(a, b)


def test_the_callers_parameters_survive_a_donated_state():
    es, params = make(), make_params()
    state = es.init(params, 0)
    jax.jit(lambda s: es.step(s, fitness, X, Y), donate_argnums=0)(state)
    assert np.isfinite(np.asarray(params["first"]["kernel"])).all()


def test_a_new_fitness_every_generation_warns():
    es = make(population=4)
    state = es.init(make_params(), 0)

    def total(params, key, scale=1.0):
        return scale * jnp.sum(params["first"]["bias"])

    for new in (
        lambda i: lambda params, key: total(params, key),
        lambda i: partial(total, scale=i),
    ):
        with pytest.warns(UserWarning, match="is a new object for the fourth time"):
            for i in range(4):
                es.evaluate(state, new(i))


def test_methods_and_jitted_functions_do_not_warn():
    class Task:
        def score(self, params, key):
            return jnp.sum(params["first"]["bias"])

    es, task = make(population=4), Task()
    state = es.init(make_params(), 0)
    jitted = jax.jit(fitness)
    for _ in range(5):  # task.score is a new object at every look
        es.evaluate(state, task.score)
        es.evaluate(state, jitted, X, Y)


# ---------------------------------------------------------------- it learns


@pytest.mark.parametrize("rank", [1, "full"])
def test_it_finds_the_optimum_of_a_quadratic(rank):
    target = {"w": jnp.linspace(-1, 1, 48).reshape(6, 8), "b": jnp.arange(4.0)}

    def score(params, key):
        return -sum(
            jnp.sum((p - t) ** 2)
            for p, t in zip(*map(jax.tree.leaves, (params, target)), strict=True)
        )

    es = EvolutionStrategy(
        optimizer=optax.adam(optax.cosine_decay_schedule(0.2, 150)), population=64, sigma=0.05,
        rank=rank, on_dense="ignore",
    )  # fmt: skip
    state = es.optimize(es.init(jax.tree.map(jnp.zeros_like, target), 0), score, 150)
    chex.assert_trees_all_close(es.params(state), target, atol=0.1)


def test_it_fits_a_regression_and_a_score_without_a_gradient():
    labels = jnp.argmax(Y, 1)

    def accuracy(params, key, x, labels):
        return jnp.mean(jnp.argmax(predict(params, x), 1) == labels)

    es = make(population=256, optimizer=optax.adam(0.1), sigma=0.3)
    state = es.init(make_params(), 0)
    score = jax.jit(fitness)
    before = float(score(state.params, None, X, Y))
    after = float(score(es.optimize(state, fitness, 100, X, Y).params, None, X, Y))
    assert after > before / 5 and before < -0.3
    trained = es.optimize(state, accuracy, 100, X, labels)
    assert float(jax.jit(accuracy)(trained.params, None, X, labels)) >= 0.9


# ---------------------------------------------------------------- wrong input, one sentence each


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"population": 33}, "population=33.*even"),
        ({"population": 0}, "population=0"),
        ({"sigma": 0.0}, "sigma=0.0.*positive"),
        ({"sigma": float("nan")}, "sigma=nan"),
        ({"rank": 0}, "rank=0.*at least 1"),
        ({"rank": "half"}, "rank='half'.*'full'"),
        ({"chunk": 3}, "chunk=3.*even"),
        ({"noise_reuse": 0}, "noise_reuse=0"),
        ({"on_dense": "shout"}, "on_dense='shout'.*'warn'"),
        ({"optimizer": 0.1}, "optimizer=0.1.*optax"),
        ({"factor_memory": -1}, "factor_memory=-1.*bytes"),
        ({"noise": "gaussian"}, r"noise='gaussian'.*such as eggroll\.noise\.counter\(\)"),
        (
            {"shaping": eggroll.shaping.zscore},
            r"shaping=.*must be the result of a call, zscore\(\)",
        ),
        ({"plan": eggroll.plan.by_shape}, r"plan=.*must be the result of a call, by_shape\(\)"),
        ({"noise": eggroll.noise.counter}, r"noise=.*must be the result of a call, counter\(\)"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_wrong_meshes_are_named():
    auto = jax.sharding.AxisType.Auto
    with pytest.raises(ValueError, match="mesh: expected an axis named 'population', got"):
        make(mesh=jax.make_mesh((8,), ("data",), axis_types=(auto,)))
    with pytest.raises(ValueError, match="AxisType.Auto"):
        make(
            mesh=jax.make_mesh((8,), ("population",), axis_types=(jax.sharding.AxisType.Explicit,))
        )


def test_wrong_parameters_are_named():
    es = make()
    with pytest.raises(
        ValueError, match="parameter 'a/b': 2 of 3 entries are not finite: must be finite"
    ):
        es.init({"a": {"b": jnp.array([1.0, np.nan, np.inf])}}, 0)
    with pytest.raises(ValueError, match="params: expected at least one float or int8 array"):
        es.init({"n": jnp.arange(3)}, 0)
    with pytest.raises(ValueError, match="parameter 'f' is .*: must be an array"):
        es.init({"w": jnp.ones((2, 2)), "f": jax.nn.relu}, 0)
    with pytest.raises(ValueError, match="parameter 'w': rank=9: .* from 1 to 4, .* 4 x 6"):
        make(plan=eggroll.plan.by_shape({"w": Matrix(rows=0, columns=1, rank=9)})).init(
            {"w": jnp.ones((4, 6))}, 0
        )


def test_wrong_scores_and_inputs_are_named():
    es = make(population=8)
    state = es.init(make_params(), 0)
    with pytest.raises(
        ValueError, match=r"expected scores of the shape \[\] or \[tasks\], got \[12, 5\]"
    ):
        es.step(state, lambda p, k: predict(p, X))
    with pytest.raises(ValueError, match=r"scores of the shape .* got \[0\]"):
        es.evaluate(state, lambda p, k: jnp.zeros(0))
    with pytest.raises(ValueError, match="fitness: expected a score .*, got PyTreeDef"):
        es.evaluate(state, lambda p, k: {"score": fitness(p, k, X, Y)})
    with pytest.raises(ValueError, match="expected scores that are real numbers, got complex64"):
        es.evaluate(state, lambda p, k: fitness(p, k, X, Y) * 1j)
    with pytest.raises(ValueError, match=r"values: expected the shape .*population=8, got \[7\]"):
        es.update(state, np.zeros(7))
    with pytest.raises(ValueError, match=r"values: expected the shape .* got \[8, 2, 2\]"):
        es.update(state, np.zeros((8, 2, 2)))
    with pytest.raises(ValueError, match=r"lengths \[1, 2\]"):
        es.update(state, [[1.0, 2.0]] * 7 + [[1.0]])
    with pytest.raises(ValueError, match=r"values: expected the shape .* got \[\]"):
        es.update(state, None)
    with pytest.raises(ValueError, match="values: expected numbers, or None .*, got 'good'"):
        es.update(state, [1.0] * 7 + ["good"])
    with pytest.raises(ValueError, match="values: expected real numbers, got complex64"):
        es.update(state, np.ones(8, np.complex64))
    with pytest.raises(ValueError, match=r"members\['x'\]: .*population=8, got the shape \[7, 6\]"):
        es.map(state, lambda p, k, m: m, members={"x": jnp.zeros((7, 6))})
    with pytest.raises(
        ValueError, match=r"groups: expected integers of the shape \[8\], got int32 .* \[3\]"
    ):
        es.update(state, np.zeros(8), groups=jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="groups: expected integers .*, got float32"):
        es.update(state, np.zeros(8), groups=jnp.zeros(8))
    with pytest.raises(
        ValueError, match=r"shaping: expected weights of the shape \[8, 1\].* got \[8\]"
    ):
        make(population=8, shaping=lambda v, valid, groups: v[:, 0]).update(state, np.zeros(8))
    with pytest.raises(
        ValueError, match=r"sigma: expected one number from the schedule, got the shape \[2\]"
    ):
        make(population=8, sigma=lambda generation: jnp.ones(2)).update(state, np.zeros(8))
    with pytest.raises(ValueError, match="generations=-1"):
        es.optimize(state, fitness, -1, X, Y)
    with pytest.raises(ValueError, match="member 8: must be from 0 to 7 in a population of 8"):
        es.member(state, 8)
    with pytest.raises(ValueError, match="member 0.5: must be an integer from 0 to 7"):
        es.member(state, 0.5)
    with pytest.raises(ValueError, match="member -1: must be from 0 to 7"):
        es.ask(state, [0, -1])
    with pytest.raises(ValueError, match="structure"):
        es.apply_gradient(state, {"w": jnp.zeros(3)})
