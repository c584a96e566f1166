"""Every transform of optim in every place where optax's own would stand."""

import inspect
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType
from transforms import STATIC, TRANSFORMS

import eggroll

each = pytest.mark.parametrize("name", list(TRANSFORMS))
F32 = jnp.float32
PARAMS = {
    "kernel": jnp.full((4, 3), 2.0, F32),
    "stack": {"bias": jnp.array([1.0, -3.0, 2.0], F32)},
    "scale": jnp.array(1.5, F32),
}


def make(name: str, **changes: Any) -> optax.GradientTransformation:
    factory, settings = TRANSFORMS[name]
    return factory(**{**settings, **changes})


def loss(params: Any) -> Any:
    return sum(jnp.sum((x - 1) ** 2) for x in jax.tree.leaves(params))


def train(solver: optax.GradientTransformation, params: Any = PARAMS, steps: int = 60) -> Any:
    @jax.jit
    def run(params: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            updates, state = solver.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), loss(params)

        return jax.lax.scan(step, (params, solver.init(params)), length=steps)[0]

    return run(params)


@each
def test_it_goes_down_also_in_a_chain(name: str) -> None:
    params, _ = train(make(name))
    assert loss(params) < 0.995 * loss(PARAMS)
    clipped, _ = train(optax.chain(optax.clip_by_global_norm(1.0), make(name)))
    assert loss(clipped) < loss(PARAMS)


@each
def test_masked_and_partitioned(name: str) -> None:
    mask = {"kernel": True, "stack": False, "scale": True}
    params, _ = train(optax.masked(make(name), mask), steps=2)
    # What is masked gets the gradients themselves, twice; the rest is trained as if it were alone.
    np.testing.assert_allclose(params["stack"]["bias"] - 1, 9 * (PARAMS["stack"]["bias"] - 1))
    alone, _ = train(make(name), {k: PARAMS[k] for k in ("kernel", "scale")}, steps=2)
    assert any((alone[k] != PARAMS[k]).any() for k in alone)
    for k in alone:
        np.testing.assert_allclose(params[k], alone[k], rtol=1e-6)
    labels = {"kernel": "ours", "stack": "sgd", "scale": "frozen"}
    parts = {"ours": make(name), "sgd": optax.sgd(0.1), "frozen": optax.set_to_zero()}
    params, _ = train(optax.partition(parts, labels), steps=10)
    assert params["scale"] == PARAMS["scale"]
    assert (params["kernel"] != PARAMS["kernel"]).all()
    np.testing.assert_allclose(params["stack"]["bias"], 1, atol=0.5)


@each
def test_wrappers_of_optax(name: str) -> None:
    accumulated, _ = train(optax.MultiSteps(make(name), 3), steps=12)
    direct, _ = train(make(name), steps=4)
    # The gradient is not the same at each of the three steps only if the parameters move between them.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), accumulated, direct)
    guarded = optax.apply_if_finite(make(name), 2)
    state = guarded.init(PARAMS)
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), PARAMS)
    guard = jax.jit(guarded.update)
    updates, state = guard(bad, state, PARAMS)
    assert all((u == 0).all() for u in jax.tree.leaves(updates))
    updates, _ = guard(PARAMS, state, PARAMS)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
    assert any((u != 0).any() for u in jax.tree.leaves(updates))
    free = optax.contrib.schedule_free(make(name), learning_rate=1e-2, b1=0.9)
    params, _ = train(free, steps=5)
    assert loss(params) < loss(PARAMS)


@each
def test_lookahead_and_flatten(name: str) -> None:
    ahead = optax.lookahead(make(name), sync_period=2, slow_step_size=0.5)
    start = optax.LookaheadParams.init_synced(PARAMS)

    @jax.jit
    def two_steps(params: Any, solver: optax.GradientTransformation, fast: Any) -> Any:
        state = solver.init(params)
        for _ in range(2):
            updates, state = solver.update(jax.grad(loss)(fast(params)), state, params)
            params = optax.apply_updates(params, updates)
        return params

    run = lambda solver, params, fast=lambda x: x: jax.jit(
        lambda x: two_steps.__wrapped__(x, solver, fast)
    )(params)
    found, plain = run(ahead, start, lambda x: x.fast), run(make(name), PARAMS)
    # At the second step both are set half of the way from the start to where the steps have led.
    half = jax.tree.map(lambda a, b: (a + b) / 2, PARAMS, plain)
    for tree in found:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), tree, half)
    # A single vector is the same to a transform as its flat form.
    vector = jnp.array([3.0, -2.0, 0.5])
    flat, direct = run(optax.flatten(make(name)), vector), run(make(name), vector)
    np.testing.assert_allclose(flat, direct, rtol=1e-6)
    assert (flat != vector).all()


@each
def test_hyperparameters_are_injected(name: str) -> None:
    """Every rate, as a schedule: each is an array at the update then."""
    factory, settings = TRANSFORMS[name]
    defaults = {k: p.default for k, p in inspect.signature(factory).parameters.items()}
    rates = {k: v for k, v in (defaults | settings).items() if type(v) is float and k not in STATIC}
    assert "learning_rate" in rates
    static = tuple(defaults.keys() - rates.keys())
    schedules = {k: optax.constant_schedule(v) for k, v in rates.items()}
    injected = optax.inject_hyperparams(factory, static_args=static)(**{**settings, **schedules})
    (a, state), (b, _) = train(injected, steps=5), train(make(name), steps=5)
    assert state.hyperparams.keys() == rates.keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), a, b)
    scheduled = make(name, learning_rate=optax.linear_schedule(0.0, 0.0, 1))
    still, _ = train(scheduled, steps=3)
    chex.assert_trees_all_equal(still, PARAMS)


@each
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_types_shapes_and_structure_stay(name: str, dtype: Any) -> None:
    params = {**jax.tree.map(lambda x: x.astype(dtype), PARAMS), "nothing": None}
    grads = jax.tree.map(lambda x: 0.1 * x, params)
    solver = make(name)
    state = jax.eval_shape(solver.init, params)
    updates, after = jax.eval_shape(solver.update, grads, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    # As a branch of a condition, which asks for the same types on both sides.
    branch = lambda s: jax.lax.cond(
        True, lambda s: solver.update(grads, s, params)[1], lambda s: s, s
    )
    jax.eval_shape(branch, state)


@each
def test_empty_trees_and_extra_arguments(name: str) -> None:
    solver = make(name)
    updates, _ = solver.update({}, solver.init({}), {})
    assert updates == {}
    extra = optax.with_extra_args_support(solver)
    state = extra.init(PARAMS)
    told, plain = jax.jit(
        lambda state: (
            extra.update(PARAMS, state, PARAMS, value=1.0, unknown="thing")[0],
            solver.update(PARAMS, state, PARAMS)[0],
        )
    )(state)
    chex.assert_trees_all_equal(told, plain)


@each
def test_missing_parameters_get_the_message_of_optax(name: str) -> None:
    solver = make(name)
    with pytest.raises(
        ValueError, match="You are using a transformation that requires the current value"
    ):
        solver.update(PARAMS, solver.init(PARAMS))


@each
def test_nothing_is_compiled_twice(name: str) -> None:
    solver = make(name)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params: Any, state: Any) -> Any:
        updates, state = solver.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, solver.init(PARAMS)
    for _ in range(3):
        params, state = step(params, state)


@each
def test_vmap_is_one_by_one(name: str) -> None:
    solver = make(name)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x + 0.1]), PARAMS)
    states = jax.vmap(solver.init)(stacked)
    updates, _ = jax.jit(jax.vmap(solver.update))(stacked, states, stacked)
    alone = jax.jit(lambda x: solver.update(x, solver.init(x), x)[0])
    for i in range(2):
        right = alone(jax.tree.map(lambda x, i=i: x[i], stacked))
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-7),
            updates,
            right,
        )


@each
def test_map_params_reaches_every_moment_and_nothing_else(name: str) -> None:
    solver = make(name)
    state = solver.init(PARAMS)
    found = optax.tree.map_params(solver, lambda x: x + 1, state)
    moments = 0
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(state), strict=True):
        names = {getattr(key, "name", None) for key in path}
        is_moment = bool(names & {"mu", "nu", "momentum"})
        moments += is_moment
        np.testing.assert_array_equal(a, b + 1 if is_moment else b, err_msg=str(path))
    assert moments > 0


@each
def test_orbax_round_trip(name: str, tmp_path: Path) -> None:
    _, state = train(make(name), steps=2)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        again = checkpointer.restore(tmp_path / "state", shapes)
    chex.assert_trees_all_equal(again, state)
    assert jax.tree.structure(again) == jax.tree.structure(state)


@each
@pytest.mark.filterwarnings("ignore:w .*left whole")
def test_shardings_stay_on_eight_devices(name: str) -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        params = {
            "w": jax.device_put(
                jnp.ones((2, 8, 4)), jax.NamedSharding(mesh, jax.P(None, "x", None))
            ),
            "b": jax.device_put(jnp.ones(8), jax.NamedSharding(mesh, jax.P("x"))),
        }
        solver = make(name)
        state = solver.init(params)
        updates, after = jax.jit(solver.update)(params, state, params)
        assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


@each
def test_flax_and_nnx_take_it(name: str) -> None:
    model = nn.Dense(3)
    x = jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=make(name))
    before = loss(state.params)
    step = jax.jit(lambda state: state.apply_gradients(grads=jax.grad(loss)(state.params)))
    for _ in range(20):
        state = step(state)
    assert loss(state.params) < before
    linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(linear, make(name), wrt=nnx.Param)
    kernel = linear.kernel[...]

    @nnx.jit
    def update(linear: nnx.Linear, optimizer: nnx.Optimizer) -> None:
        optimizer.update(linear, nnx.grad(lambda m: jnp.sum(m(x) ** 2))(linear))

    update(linear, optimizer)
    assert (linear.kernel[...] != kernel).any()


@each
def test_evolution_strategies_take_it(name: str) -> None:
    es = eggroll.EvolutionStrategy(
        optimizer=make(name, learning_rate=0.02), population=64, sigma=0.1
    )
    state = es.init({"w": jnp.full((4, 4), 2.0), "b": jnp.zeros(4)}, 0)
    x = jax.random.normal(jax.random.key(1), (16, 4))
    fitness = lambda params, key: -jnp.mean((x @ params["w"] + params["b"] - x) ** 2)
    before = fitness(es.params(state), None)
    state = es.optimize(state, fitness, 40)
    assert fitness(es.params(state), None) > 0.8 * before
