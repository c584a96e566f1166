"""What users' programs bring along: modes of JAX, optimizers that ask for more, ties, odd leaves and seeds."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import as_users_run_it

import eggroll
from eggroll import Dense, EvolutionStrategy, Frozen, Matrix, integer

PARAMS = {"w": jnp.linspace(-1, 1, 48).reshape(6, 8), "b": jnp.zeros(8), "s": jnp.ones(())}
X = jnp.linspace(-1, 1, 18).reshape(3, 6)


def make(**changes):
    settings = dict(optimizer=optax.adam(1e-2), population=8, sigma=0.1, on_dense="error")
    return EvolutionStrategy(**{**settings, **changes})


def fitness(params, key, x):
    return -jnp.mean((x @ params["w"] + params["b"] * params["s"] - 1) ** 2)


def per_task(params, key, x):
    return -jnp.mean((x @ params["w"] + params["b"] * params["s"] - 1) ** 2, axis=1)


def assert_nothing_moved(before, after, metrics):
    assert not bool(metrics.updated) and float(metrics.update_norm) == 0
    chex.assert_trees_all_equal(after.params, before.params)
    chex.assert_trees_all_equal(after.optimizer, before.optimizer)
    assert int(after.generation) == int(before.generation) + 1


# ---------------------------------------------------------------- modes of JAX


MODES = {
    "debug_nans": lambda: jax.debug_nans(True),
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "transfer guard": lambda: jax.transfer_guard("disallow"),
}

STRATEGIES = {
    "low rank": {},
    "dense": {"rank": "full"},
    "two halves, schedule": {"agreement": True, "sigma": optax.linear_schedule(0.1, 0.05, 10)},
    "ranks": {"shaping": eggroll.shaping.centered_rank()},
    "reproducible": {"deterministic": True},
    "keys apart": {"shared_keys": False, "noise": eggroll.noise.gaussian()},
}


@contextlib.contextmanager
def all_modes():
    with contextlib.ExitStack() as stack:
        for mode in MODES.values():
            stack.enter_context(mode())
        yield


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_method_runs_in_all_modes_at_once(strategy):
    es = make(**STRATEGIES[strategy])
    expected, _ = es.step(es.init(PARAMS, 3), fitness, X)
    with all_modes():
        state = es.init(PARAMS, 3)
        found, metrics = es.step(state, fitness, X)
        values = es.evaluate(state, fitness, X)
        es.update(state, [0.5, None, *range(6)])
        es.apply_gradient(state, es.gradient(state, values))
        es.optimize(state, fitness, 2, X)
        es.member(state, 3), es.ask(state, [1, 2])
        es.update(state, np.arange(8.0), np.arange(8) // 4)
    chex.assert_trees_all_close(found, expected, atol=1e-6)
    assert (metrics.agreement is not None) == es.agreement


@pytest.mark.parametrize("mode", MODES)
def test_a_step_runs_in_each_mode(mode):
    es = make()
    with MODES[mode]():
        _, metrics = es.step(es.init(PARAMS, 3), fitness, X)
    assert bool(metrics.updated)


def test_integers_run_in_all_modes_at_once():
    es = integer.strategy(population=8, optimizer=integer.threshold(0.5))
    params = {"w": jnp.ones((16, 12), jnp.int8)}
    dot = lambda p, key, x: jax.lax.dot(x, p["w"], preferred_element_type=jnp.int32).sum()
    x = jnp.arange(32, dtype=jnp.int8).reshape(2, 16)
    with all_modes():
        state = es.init(params, 0)
        _, metrics = es.step(state, dot, x)
        es.apply_gradient(state, es.gradient(state, list(range(8))))
    assert bool(metrics.updated)


def test_metrics_in_a_users_own_program_hold_no_nan_of_ours():
    es = make()
    state = es.init(PARAMS, 0)
    with jax.debug_nans(True):
        _, metrics = jax.jit(
            lambda s: jax.lax.scan(lambda s, _: es.step(s, fitness, X), s, length=2)
        )(state)
        _, told = jax.jit(lambda s: es.apply_gradient(s, es.gradient(s, jnp.arange(8.0))))(state)
    assert metrics.agreement is None and told.fitness_mean is None
    assert np.isfinite(jax.tree.leaves(metrics)).all()


# ---------------------------------------------------------------- ties


@pytest.mark.parametrize(
    ("shaping", "settings"),
    [
        (None, {}),
        (eggroll.shaping.zscore(), {}),
        (eggroll.shaping.centered_rank(), {}),
        (eggroll.shaping.per_task(), {}),
        (eggroll.shaping.zscore(), {"rank": "full"}),
        (eggroll.shaping.zscore(), {"deterministic": True}),
        (eggroll.shaping.zscore(), {"agreement": True}),
    ],
)
def test_pairs_that_tie_move_nothing_under_adam(shaping, settings):
    """Pairs differ from each other, members of a pair do not: low rank, dense and scalar leaves stay."""
    es = make(shaping=shaping, population=32, optimizer=optax.adam(1e-2), **settings)
    state, _ = es.step(es.init(PARAMS, 0), fitness, X)  # the moments are not zero
    by_key = lambda params, key: jax.random.normal(key) * 1e3
    assert_nothing_moved(state, *es.step(state, by_key))
    table = jnp.repeat(jax.random.normal(jax.random.key(1), (16, 3)), 2, axis=0)
    assert_nothing_moved(state, *es.update(state, table))
    assert all(not np.any(g) for g in jax.tree.leaves(es.gradient(state, table)))


def test_a_tied_pair_adds_nothing_to_those_that_differ():
    """The estimate is that of the other pairs alone, to the bit, for every kind of leaf."""
    params = {**PARAMS, "stack": jnp.ones((2, 6, 6))}
    plan = eggroll.plan.by_shape({"stack": Matrix(1, 2, batch=0), "b": Dense(sigma=2.0)})
    es = make(shaping=eggroll.shaping.zscore(), plan=plan, population=6)
    state = es.init(params, 0)
    weights = es.shaping(
        jnp.array([[5.0], [5.0], [1.0], [2.0], [7.0], [7.0]]), jnp.ones((6, 1), bool), None
    )
    alone = make(shaping=None, plan=plan, population=6)
    only = jnp.array([0.0, 0.0, weights[2, 0], weights[3, 0], 0.0, 0.0])
    chex.assert_trees_all_close(
        es.gradient(state, [5.0, 5.0, 1.0, 2.0, 7.0, 7.0]), alone.gradient(state, only), rtol=1e-6
    )


def test_members_of_different_groups_do_not_tie():
    es = make(shaping=eggroll.shaping.center("group"), population=4)
    state = es.init(PARAMS, 0)
    _, metrics = es.update(state, [1.0, 1.0, 0.0, 5.0], [0, 1, 0, 1])
    assert bool(metrics.updated)
    grads = es.gradient(state, [1.0, 1.0, 0.0, 1.0], [0, 1, 0, 1])
    assert any(np.any(g) for g in jax.tree.leaves(grads))


# ---------------------------------------------------------------- optimizers that ask for more


def test_an_optimizer_gets_minus_the_mean_fitness_as_value():
    seen = optax.GradientTransformationExtraArgs(
        lambda params: jnp.zeros(()),
        lambda updates, state, params=None, *, value, **extra: (updates, value),
    )
    for settings in ({}, {"deterministic": True}):
        es = make(optimizer=optax.chain(optax.sgd(0.1), seen), **settings)
        state = es.init(PARAMS, 0)
        new, metrics = es.step(state, per_task, X)
        assert float(new.optimizer[1]) == pytest.approx(-float(metrics.fitness_mean), rel=1e-6)
        new, _ = es.update(state, [1.0, 3.0, None, 2.0, 4.0, 0.0, 1.0, 3.0])
        assert float(new.optimizer[1]) == pytest.approx(-2.0)
        new, _ = es.apply_gradient(state, es.gradient(state, np.arange(8.0)), value=0.25)
        assert float(new.optimizer[1]) == 0.25


def test_a_rate_falls_on_a_plateau():
    optimizer = optax.chain(
        optax.sgd(1e-3),
        optax.contrib.reduce_on_plateau(patience=2, factor=0.5, accumulation_size=1),
    )
    es = make(optimizer=optimizer)
    flat = [-1.0, -2.0] * 4
    state = es.init(PARAMS, 0)
    scales = []
    for _ in range(8):
        state, _ = es.update(state, flat)
        scales.append(float(state.optimizer[1].scale))
    assert scales[0] == 1.0 and scales[-1] <= 0.25


def test_an_optimizer_that_needs_a_function_is_refused_in_a_sentence():
    es = make(optimizer=optax.lbfgs())
    state = es.init(PARAMS, 0)
    with pytest.raises(
        ValueError,
        match=r"must not require the arguments .*value_fn.*, since an evolution strategy passes value",
    ):
        es.step(state, fitness, X)
    with pytest.raises(
        ValueError, match="must not require the arguments value.*passes no extra argument"
    ):
        seen = optax.contrib.reduce_on_plateau()
        plateau = make(optimizer=seen)
        plateau.apply_gradient(plateau.init(PARAMS, 0), jax.tree.map(jnp.ones_like, PARAMS))
    without = make(optimizer=optax.lbfgs(1e-2, linesearch=None))
    assert bool(without.step(without.init(PARAMS, 0), fitness, X)[1].updated)


# ---------------------------------------------------------------- parameters, paths, seeds, states


def test_complex_parameters_are_named_unless_they_are_frozen():
    params = {"w": jnp.ones((6, 8)), "phase": jnp.ones(3, jnp.complex64)}
    with pytest.raises(
        ValueError, match="parameter 'phase' is complex64.*two float arrays.*Frozen"
    ):
        make().init(params, 0)
    with pytest.raises(ValueError, match="parameter 'phase' is complex64"):
        make(plan=eggroll.plan.by_shape({"phase": Dense()})).init(params, 0)
    es = make(plan=eggroll.plan.by_shape({"ph*": Frozen()}))
    score = lambda p, key: jnp.sum(p["w"]) * jnp.sum(p["phase"]).real
    state, metrics = es.step(es.init(params, 0), score)
    assert bool(metrics.updated) and (state.params["phase"] == 1).all()
    with pytest.raises(ValueError, match="parameter 'z' is complex64"):
        make().init({"z": jnp.ones(3, jnp.complex64), "n": jnp.ones(3, jnp.int8)}, 0)


@pytest.mark.parametrize(
    ("pattern", "frozen"),
    [
        ("blocks[0]/w", ["blocks[0]/w"]),
        ("blocks[0]/*", ["blocks[0]/w", "blocks[0]/b"]),
        ("blocks*", ["blocks[0]/w", "blocks[0]/b", "blocks[1]/w"]),
        ("layer[12]/w", ["layer1/w", "layer2/w"]),
        ("*[01]*", ["blocks[0]/w", "blocks[0]/b", "blocks[1]/w", "layer1/w"]),
    ],
)
def test_paths_with_brackets_match_as_they_are_printed(pattern, frozen):
    names = ["blocks[0]/w", "blocks[0]/b", "blocks[1]/w", "layer1/w", "layer2/w", "layer3/w"]
    es = make(plan=eggroll.plan.by_shape({pattern: Frozen()}))
    plan = es.plan_of({name: jnp.ones((4, 4)) for name in names})
    assert {leaf.path for leaf in plan.leaves if not leaf.trainable} == set(frozen)


def test_seeds_beyond_32_bits_are_different():
    seeds = [
        0,
        1,
        2**31,
        2**32 - 1,
        2**32,
        2**32 + 1,
        2**40,
        2**63,
        2**64 - 1,
        np.uint64(2**63 + 1),
    ]
    words = {tuple(np.asarray(make().init(PARAMS, seed).seed)) for seed in seeds}
    assert len(words) == len(seeds)
    for seed in (0, 7, 2**32 - 1):
        expected = make().init(PARAMS, jax.random.key(np.uint32(seed))).seed
        np.testing.assert_array_equal(make().init(PARAMS, seed).seed, expected)
    for wrong in (-1, 2**64):
        with pytest.raises(ValueError, match=f"key={wrong}: must be an integer from 0 to"):
            make().init(PARAMS, wrong)


def test_a_wrong_state_is_named():
    es = make()
    with as_users_run_it():
        for call in (
            lambda: es.step(PARAMS, fitness, X),
            lambda: es.evaluate(PARAMS, fitness, X),
            lambda: es.update(PARAMS, np.zeros(8)),
            lambda: es.params(PARAMS),
            lambda: es.member(PARAMS, 0),
            lambda: es.ask(PARAMS, [0]),
            lambda: es.optimize(PARAMS, fitness, 2, X),
        ):
            with pytest.raises(
                ValueError,
                match=r"state: expected the State that es\.init\(params, key\).*got dict",
            ):
                call()
        state = es.init(PARAMS, 0)
        with pytest.raises(ValueError, match="state: expected the State that es.init.*got tuple"):
            es.step(es.step(state, fitness, X), fitness, X)  # (state, metrics), not taken apart


@pytest.mark.parametrize("values", [[], [None], {}, "12345678", [[]] * 8, [[], []]])
def test_wrong_lists_of_scores_are_named(values):
    es = make()
    state = es.init(PARAMS, 0)
    with pytest.raises(ValueError, match="values: expected"):
        es.update(state, values)
