"""Several devices: what they compute, what they hold, what they send each other, and to which bits."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

import eggroll
from eggroll import EvolutionStrategy, integer
from eggroll import _programs as programs
from eggroll.plan import by_shape, relative, subspaces

P = jax.P
D = 64


def mesh(devices, model=1):
    return jax.make_mesh(
        (devices, model), ("population", "model"), axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[: devices * model],
    )  # fmt: skip


def make(**changes):
    settings = dict(optimizer=optax.adam(1e-2), population=32, sigma=0.1, on_dense="error")
    return EvolutionStrategy(**{**settings, **changes})


def make_params(dim=D, dtype=np.float32):
    rng = np.random.default_rng(0)
    normal = lambda *shape: (rng.normal(size=shape) / 8).astype(dtype)
    return {"up": normal(dim, dim), "down": normal(dim, dim), "bias": np.zeros(dim, dtype)}


SPECS = {"up": P(None, "model"), "down": P("model", None), "bias": P("model")}
X = np.random.default_rng(1).normal(size=(4, D)).astype(np.float32)


def fitness(params, key, x):
    hidden = jnp.tanh(x @ params["up"] + params["bias"])
    return -jnp.mean((hidden @ params["down"] - x) ** 2, axis=1)


def put(params, mesh, specs=SPECS):
    return {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in params.items()}


# ---------------------------------------------------------------- what a compiled program tells

ARRAY = re.compile(r"\b(?:f64|f32|bf16|s32|u32|s8|u8|pred)\[([0-9,]*)\]")
COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def sizes(text):
    """Numbers of entries of the arrays that a piece of a program names."""
    return [math.prod(map(int, dims.split(","))) if dims else 1 for dims in ARRAY.findall(text)]


def collectives(compiled):
    """For each array that devices send each other, how, and how many entries of it."""
    found = COLLECTIVE.findall(compiled.as_text())
    return [(kind, size) for arrays, kind in found for size in sizes(arrays)]


def compiled(program, es, state, *args):
    return getattr(programs, program).lower(es.placed(state), state, *args).compile()


def step_of(es, state, x):
    return compiled("step", es, state, fitness, (x,), None, None)


# ---------------------------------------------------------------- what is computed where


def test_work_a_device_falls_with_the_devices():
    flops = {}
    for d in (1, 2, 8):
        es = make(population=256, mesh=mesh(d))
        state = es.init(make_params(), 0)
        values = jnp.arange(256.0)
        flops[d] = [
            compiled("evaluate", es, state, fitness, (X,), None).cost_analysis()["flops"],
            compiled("gradient", es, state, values, None).cost_analysis()["flops"],
        ]
    for d in (2, 8):
        np.testing.assert_allclose(np.array(flops[1]) / flops[d], d, rtol=0.06)


def test_a_step_sends_one_sum_of_the_size_of_the_parameters_and_scores():
    for population in (32, 36):  # 36: not every device has as many members
        es = make(population=population, mesh=mesh(8))
        params = make_params()
        sent = collectives(step_of(es, es.init(params, 0), X))
        large = [(kind, size) for kind, size in sent if size > population * 4]
        assert {kind for kind, _ in large} == {"all-reduce"}
        small = D <= population * 4  # the bias
        assert sum(size for _, size in large) == sum(x.size for x in params.values()) - D * small


@pytest.mark.parametrize("program", ["step", "update"])
def test_where_scores_alone_are_sent_nothing_else_is(program):
    es = make(mesh=mesh(4), exchange="fitness")
    state = es.init(make_params(), 0)
    args = (jnp.zeros((32, 4)), None) if program == "update" else (fitness, (X,), None, None)
    sent = collectives(compiled(program, es, state, *args))
    assert max((size for _, size in sent), default=0) <= 32 * 4
    assert sent or program == "update"


def test_either_exchange_gives_the_same_parameters():
    found = []
    for exchange in ("update", "fitness"):
        es = make(population=36, mesh=mesh(8), exchange=exchange)
        state = es.init(make_params(), 0)
        for _ in range(2):
            state, _ = es.step(state, fitness, X)
        found.append(jax.device_get(state.params))
    chex.assert_trees_all_close(*found, atol=2e-5)


def test_the_quicker_exchange_is_found():
    params = make_params(512)
    fast, slow = eggroll.exchange.auto(1e12, 1e9), eggroll.exchange.auto(1e3, 1e13)
    for rates, expected in ((fast, "update"), (slow, "fitness")):
        es = make(mesh=mesh(8), exchange=rates)
        assert es.exchanged(es.plan_of(params)) == expected
    es = make(mesh=mesh(8), exchange="auto")
    costs = es.exchange_costs(params, tasks=3)
    # Two matrices and a vector in float32 around a ring, and three scores of each of 32 members.
    assert costs.fitness_bytes == 7 / 8 * 32 * 3 * 4
    assert costs.update_bytes - costs.fitness_bytes == 2 * 7 / 8 * 4 * (2 * 512**2 + 512)
    assert costs.fitness_flops == 8 * costs.update_flops
    assert es.exchanged(es.plan_of(params)) == costs.choice
    assert f"{costs.choice!r} is faster" in str(costs) and "on 8 at 1.25e+10" in str(costs)
    sharded = make(mesh=mesh(4, 2)).exchange_costs(put(params, mesh(4, 2)))
    whole = make(mesh=mesh(4, 2)).exchange_costs(params)
    assert sharded.update_flops == whole.update_flops / 2
    # A weight that is sharded over members is summed up whole by each, and each keeps its shard.
    apart = {"up": P("population", None), "down": P(), "bias": P()}
    scattered = make(mesh=mesh(4)).exchange_costs(put(params, mesh(4), apart))
    every = make(mesh=mesh(4)).exchange_costs(params)
    assert scattered.update_flops == every.update_flops
    assert every.update_bytes - scattered.update_bytes == 3 / 4 * 4 * 512**2
    with pytest.raises(ValueError, match="exchange='auto': must be 'update' or 'fitness'"):
        make(exchange="auto", deterministic=True)
    assert make(mesh=mesh(1), exchange=slow).exchange_costs(params).update_bytes == 0
    with pytest.raises(ValueError, match="auto: bandwidth=0.0: must be a positive number"):
        eggroll.exchange.auto(bandwidth=0.0)
    with pytest.raises(ValueError, match="exchange='all'.*'update', 'fitness', 'auto'"):
        make(exchange="all")


# ---------------------------------------------------------------- weights in shards


def laid_out_alike(tree, like):
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ((4, 2), {}),
        pytest.param((2, 4), dict(population=36, chunk=8, rank=3), marks=pytest.mark.soak),
        ((2, 2), dict(rank="full", exchange="fitness")),
        pytest.param((1, 4), dict(factor_memory=0, agreement=True), marks=pytest.mark.soak),
        ((2, 2), dict(deterministic=True)),
        ((2, 2), dict(plan=subspaces(by_shape(), 4), rank=3)),
        pytest.param(
            (2, 2), dict(plan=subspaces(by_shape(), 4), rank="full"), marks=pytest.mark.soak
        ),
        ((4, 2), dict(plan=relative(by_shape(), make_params(dtype=np.float64)))),
    ],
    # Without addresses of functions, which differ between processes of tests.
    ids=lambda given: re.sub("<function (.*?) at .*?>", r"\1", str(given)),
)
def test_sharded_weights_stay_so_and_results_are_the_same(shape, changes):
    with jax.enable_x64(True):
        params, x = make_params(dtype=np.float64), X.astype(np.float64)
        one, many = make(**changes), make(mesh=mesh(*shape), **changes)
        expected, state = one.init(params, 0), many.init(put(params, many.mesh), 0)
        begin, traces = state, []

        def on_many(*args):
            traces.append(args)
            return fitness(*args)

        for _ in range(3):
            expected, metrics = one.step(expected, fitness, x)
            state, found = many.step(state, on_many, x)
        laid_out_alike(state, begin)
        laid_out_alike(many.gradient(state, np.arange(many.population)), begin.params)
        assert len(traces) == 1  # and so the second step compiled no second program
        chex.assert_trees_all_close(jax.device_get(state), expected, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(found.update_norm, metrics.update_norm, rtol=1e-5)
        values = many.evaluate(state, fitness, x)
        np.testing.assert_allclose(values, one.evaluate(expected, fitness, x), rtol=1e-9)


def test_master_copies_lie_as_their_weights_do():
    es = make(mesh=mesh(2, 2))
    params = put({k: v.astype(jnp.bfloat16) for k, v in make_params().items()}, es.mesh)
    state, _ = es.step(es.init(params, 0), fitness, X.astype(jnp.bfloat16))
    laid_out_alike(state.params, params)
    laid_out_alike(state.master, {k: params[k] for k in state.master})
    assert set(state.master) == set(params)


@pytest.mark.parametrize("rank", [pytest.param(1, marks=pytest.mark.soak), 3, "full"])
def test_no_device_holds_a_sharded_weight_or_its_noise_as_a_whole(rank):
    """Nor anything else of its size, in any part of the program; in a trace of the user's own, too."""
    dim, memory = 256, {}
    x = np.ones((2, dim), np.float32)
    for model in (1, 4):
        es = make(population=4, mesh=mesh(2, model), rank=rank)
        state = es.init(put(make_params(dim), es.mesh), 0)
        own = [step_of(es, state, x)]
        if model == 4:
            outer = jax.jit(lambda state, x, es=es: es.step(state, fitness, x))
            own.append(outer.lower(state, x).compile())
        for program in own:
            largest = max(sizes(program.as_text()))
            # Two members' weights, where noise is dense and they are built: two shards of a quarter.
            assert largest >= dim * dim if model == 1 else largest <= dim * dim / 2
            used = program.memory_analysis()
            memory[model] = used.argument_size_in_bytes + used.temp_size_in_bytes
    assert memory[4] < memory[1] / 3


def test_weights_sharded_over_members_get_their_own_part_of_the_sum():
    specs = {"up": P("population", None), "down": P(None, "population"), "bias": P()}
    one, many = make(), make(mesh=mesh(4))
    begin = many.init(put(make_params(), many.mesh, specs), 0)
    expected, _ = one.step(one.init(make_params(), 0), fitness, X)
    state, _ = many.step(begin, fitness, X)
    laid_out_alike(state, begin)
    chex.assert_trees_all_close(jax.device_get(state.params), expected.params, atol=2e-5)
    update = compiled("update", many, begin, jnp.arange(32.0), None)
    sums = [(kind, size) for kind, size in collectives(update) if size > 32]
    assert sorted(sums) == [("all-reduce", D), *[("reduce-scatter", D * D // 4)] * 2]


# ---------------------------------------------------------------- the same bits


def wide_and_narrow():
    params = make_params(48)
    return {**params, "up": jnp.asarray(params["up"], jnp.bfloat16)}


def mixed(params, key, x, y):
    hidden = jax.nn.gelu(x.astype(jnp.bfloat16) @ params["up"]).astype(jnp.float32)
    return -jnp.mean((jnp.tanh(hidden + params["bias"]) @ params["down"] - y) ** 2, axis=1)


@functools.cache
def trained(devices, generations=3, **changes):
    """The state after some generations; by zero devices, without a mesh."""
    settings = dict(
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
        sigma=optax.linear_schedule(0.1, 0.01, 20),
    )
    es = make(**settings, deterministic=True, mesh=mesh(devices) if devices else None, **changes)
    state = es.init(wide_and_narrow(), 0)
    x = jnp.asarray(X[:, :48])
    for _ in range(generations):
        state, metrics = es.step(state, mixed, x, jnp.sin(x))
    return jax.device_get((state, metrics.fitness_mean, metrics.update_norm))


@pytest.mark.parametrize(
    "changes", [dict(population=36, chunk=36), dict(population=50, chunk=8)], ids=str
)
@pytest.mark.parametrize(
    "devices", [1, 4, *(pytest.param(n, marks=pytest.mark.soak) for n in (2, 8))]
)
def test_deterministic_is_the_same_bits_on_any_number_of_devices(devices, changes):
    chex.assert_trees_all_equal(trained(devices, **changes), trained(0, **changes))


def outputs(params, key, own, x):
    return jnp.tanh(x @ params["up"]) + own, jax.random.uniform(key)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("devices", [0, 3])
def test_some_pairs_are_those_of_all(devices, deterministic):
    """Whatever is run beside them; padding, order, and a pair that comes twice included."""
    es = make(
        population=14,
        chunk=4,
        deterministic=deterministic,
        mesh=mesh(devices) if devices else None,
    )
    state, x = es.init(wide_and_narrow(), 0), jnp.asarray(X[:, :48])
    own = jnp.arange(14.0)
    whole = jax.device_get(es.map(state, outputs, x, members=own))
    for pairs in ([0, 1, 2, 3], [6, 2, 2], [5]):
        members = np.array([m for pair in pairs for m in (2 * pair, 2 * pair + 1)])
        some = jax.device_get(es.map(state, outputs, x, members=own[members], pairs=pairs))
        wanted = jax.tree.map(lambda leaf: leaf[members], whole)  # noqa: B023
        if deterministic:
            chex.assert_trees_all_equal(some, wanted)
        else:
            chex.assert_trees_all_close(some, wanted, atol=1e-5)


@pytest.mark.parametrize("devices", [3, 8])
def test_deterministic_whatever_is_exchanged(devices):
    expected = trained(0, population=50, chunk=8)
    other = trained(devices, population=50, chunk=8, exchange="fitness")
    chex.assert_trees_all_equal(other, expected)


def test_a_deterministic_step_is_its_halves_to_the_bit():
    es = make(population=36, deterministic=True, mesh=mesh(4))
    state = es.init(make_params(), 0)
    whole, _ = es.step(state, fitness, X)
    values = es.evaluate(state, fitness, X)
    halves, _ = es.update(state, values)
    thirds, _ = es.apply_gradient(state, es.gradient(state, values))
    many = es.optimize(state, fitness, 1, X)
    for other in (halves, thirds, many):
        chex.assert_trees_all_equal(jax.device_get(other), jax.device_get(whole))


def test_deterministic_is_the_same_update_but_for_rounding():
    states = []
    for deterministic in (False, True):
        es = make(population=36, deterministic=deterministic, mesh=mesh(8))
        states.append(jax.device_get(es.step(es.init(make_params(), 0), fitness, X)[0]))
    chex.assert_trees_all_close(*states, rtol=1e-4, atol=2e-5)


# ---------------------------------------------------------------- int8


def int_params():
    rng = np.random.default_rng(3)
    draw = lambda *shape: rng.integers(-40, 41, shape).astype(np.int8)
    return {"up": draw(D, D), "down": draw(D, D), "bias": draw(D)}


def int_fitness(params, key, x):
    product = lambda x, w: jax.lax.dot(x, w, preferred_element_type=jnp.int32) >> 7
    hidden = jnp.clip(product(x, params["up"]) + params["bias"], -127, 127).astype(jnp.int8)
    return -jnp.sum(jnp.abs(product(hidden, params["down"]) - x), axis=1)


@functools.cache
def trained_integers(shape=None, sharded=False, **changes):
    es = integer.strategy(
        population=36, optimizer=optax.chain(integer.momentum(), integer.threshold(0.3)),
        mesh=mesh(*shape) if shape else None, **changes,
    )  # fmt: skip
    state = es.init(put(int_params(), es.mesh) if sharded else int_params(), 0)
    begin = state
    x = jnp.asarray(np.clip(X * 40, -127, 127).astype(np.int8))
    for _ in range(3):
        state, _ = es.step(state, int_fitness, x)
    if sharded:
        laid_out_alike(state, begin)
    return jax.device_get(state)


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ((1, 1), {}),
        ((2, 1), {}),
        ((4, 1), dict(exchange="fitness")),
        ((8, 1), dict(deterministic=True)),
        ((8, 1), dict(chunk=4)),
        ((4, 2), dict(sharded=True)),
        ((2, 4), dict(sharded=True, rank=2)),
    ],
    ids=str,
)
def test_integers_are_the_same_bits_on_any_mesh(shape, changes):
    same = {k: v for k, v in changes.items() if k == "rank"}
    expected = trained_integers(**same)
    chex.assert_trees_all_equal(trained_integers(shape, **changes), expected)
    moved = [
        (a != b).mean()
        for a, b in zip(expected.params.values(), int_params().values(), strict=True)
    ]
    assert min(moved) > 0.1
