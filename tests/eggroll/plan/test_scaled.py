"""Sigma relative to the size of parameters: factors, their floor, members, estimates, bad input."""

import functools

import chex
import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eggroll
from eggroll import Dense, EvolutionStrategy, Frozen, Matrix, Nodes, integer
from eggroll.plan import by_shape, infer, relative, rms_of, scaled

STACK = Matrix(rows=1, columns=2, batch=0)
SIZES = np.array([0.1, 1.0, 5.0])[:, None, None]


def make_params(dtype=np.float32):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape)
    params = {
        "layers": SIZES * normal(3, 8, 8),
        "out": 0.3 * normal(8, 4),
        "gain": np.ones(8),
        "bias": np.zeros(4),
    }
    return {name: value.astype(dtype) for name, value in params.items()}


def fitness(params, key, x):
    layer = lambda x, w: (jnp.tanh(x @ w), None)
    hidden = jax.lax.scan(layer, x, params["layers"])[0] * params["gain"]
    return -jnp.mean(jnp.square(hidden @ params["out"] + params["bias"]), axis=1)


X = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
PLANNERS = {
    "by_shape": by_shape({"layers": STACK}),
    "infer": infer(fitness, make_params(), X),
}


def make(plan, **changes):
    base = dict(optimizer=optax.adam(1e-2), population=24, sigma=0.1, on_dense="error")
    return EvolutionStrategy(**{**base, **changes}, plan=plan)


# ---------------------------------------------------------------- factors


@pytest.mark.parametrize("planner", PLANNERS.values(), ids=PLANNERS)
def test_factors_are_the_rms_a_layer_of_a_stack_each(planner):
    params = make_params()
    rms = rms_of(planner, params)
    assert set(rms) == set(params)
    for name, axes in (("layers", (1, 2)), ("out", None), ("gain", None)):
        wide = params[name].astype(np.float64)
        expected = np.sqrt(np.mean(wide * wide, axis=axes, keepdims=axes is not None))
        np.testing.assert_allclose(rms[name], expected, rtol=5e-4)
    assert rms["layers"].shape == (3, 1, 1) and isinstance(rms["out"], float)
    # A parameter of zeros has the median of the others.
    whole = np.sqrt(np.mean(params["layers"].astype(np.float64) ** 2))
    np.testing.assert_allclose(rms["bias"], np.median([whole, rms["out"], 1.0]), rtol=5e-4)


def test_a_layer_of_zeros_has_the_median_of_whole_parameters_and_a_floor_raises_all():
    params = make_params()
    params["layers"][1] = 0
    wholes = [
        np.sqrt(np.mean(params[name].astype(np.float64) ** 2)) for name in params if name != "bias"
    ]
    rms = rms_of(PLANNERS["by_shape"], params)
    np.testing.assert_allclose(rms["layers"][1], np.median(wholes), rtol=5e-4)
    rms = rms_of(PLANNERS["by_shape"], params, floor=0.25)
    assert rms["bias"] == rms["layers"][0, 0, 0] == rms["layers"][1, 0, 0] == 0.25
    assert rms["layers"][2, 0, 0] > 4 and 0.25 < rms["out"] < 0.4


def test_frozen_and_empty_parameters_have_no_factor():
    params = {**make_params(), "nothing": np.zeros((0, 4), np.float32), "count": np.arange(3)}
    planner = by_shape({"layers": STACK, "gain": Frozen()})
    assert set(rms_of(planner, params)) == {"layers", "out", "bias"}
    with pytest.raises(ValueError, match=r"'nothing': must have a factor"):
        relative(planner, params)(params, 1)


@settings(deadline=None, max_examples=40)
@given(
    arrays.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 300)),
                  elements=st.floats(-1e6, 1e6, width=32)),
    st.floats(1e-3, 1e3),
)  # fmt: skip
def test_factors_are_pure_and_scale_with_the_parameters(w, c):
    planner = by_shape({"w": Dense()})
    rms = rms_of(planner, {"w": w}, floor=1e-12)["w"]
    again = rms_of(planner, {"w": jnp.asarray(w[::-1, ::-1])}, floor=1e-12)["w"]
    assert rms == again  # whatever the order of the sum
    expected = np.sqrt(np.mean(np.square(w.astype(np.float64))))
    np.testing.assert_allclose(rms, max(expected, 1e-12), rtol=5.1e-4)
    wide = rms_of(planner, {"w": w.astype(np.float64) * c}, floor=1e-12)["w"]
    np.testing.assert_allclose(wide, max(c * expected, 1e-12), rtol=5.1e-4)


def test_a_large_parameter_is_measured_in_blocks_and_bfloat16_in_float64():
    w = np.full((1025, 1100), 3.0, jnp.bfloat16)
    w[0, 0] = 3000.0
    rms = rms_of(by_shape(), {"w": w})["w"]
    wide = w.astype(np.float64)
    np.testing.assert_allclose(rms, np.sqrt(np.mean(wide * wide)), rtol=5e-4)


def test_slices_of_axes_that_do_not_come_first():
    rng = np.random.default_rng(3)
    size = np.array([0.5, 2.0, 4.0])[None, :, None]
    w = (size * rng.normal(size=(8, 3, 6))).astype(np.float32)
    planner = by_shape({"w": Matrix(rows=0, columns=2, batch=1)})
    expected = np.sqrt(np.mean(w.astype(np.float64) ** 2, axis=(0, 2), keepdims=True))
    np.testing.assert_allclose(rms_of(planner, {"w": w})["w"], expected, rtol=5e-4)


# ---------------------------------------------------------------- plans


def test_factors_multiply_sigmas_of_overrides_and_patterns_and_nested_factors():
    params = make_params()
    planner = by_shape({"layers": STACK, "out": Dense(sigma=3.0)})
    plan = scaled(scaled(planner, {"*": 2.0, "o*": 0.5, "bias": 7.0}), {"*": 1.0, "gain": 10.0})(
        params, 1
    )
    assert {leaf.path: leaf.sigma for leaf in plan.leaves} == {
        "bias": 7.0, "gain": 20.0, "layers": 2.0, "out": 1.5,
    }  # fmt: skip
    many = scaled(scaled(planner, {"*": 1.0, "layers": SIZES}), {"*": 1.0, "layers": 2 * SIZES})(
        params, 1
    )
    np.testing.assert_allclose(many["layers"].scale, 2 * SIZES**2, rtol=1e-12)
    np.testing.assert_allclose(np.mean(many["layers"].slices.array ** 2), 1, rtol=1e-12)
    assert many["out"].scale == 3.0


def test_plans_of_shapes_are_plans_of_values_and_plans_are_equal():
    params = make_params()
    planner = relative(PLANNERS["infer"], params)
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params))
    assert (
        planner(shapes, 1) == planner(params, 1) == relative(PLANNERS["infer"], params)(params, 1)
    )


def test_describe_tells_the_factors():
    params = make_params()
    text = make(relative(PLANNERS["by_shape"], params)).describe(params)
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert "sigma x0.09" in lines["layers"] and " to x4.9" in lines["layers"]
    assert "sigma x0.3" in lines["out"] and "sigma" not in lines["gain"]


# ---------------------------------------------------------------- members and estimates


@pytest.mark.parametrize("rank", [1, 3, "full"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_member_moves_by_sigma_times_the_rms(rank, dtype):
    """Every noise is that of the plain plan, times the factor of its slice."""
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), make_params())
    planner = PLANNERS["by_shape"]
    factors = rms_of(planner, params)
    plain, es = (make(plan, rank=rank) for plan in (planner, scaled(planner, factors)))
    mean = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    own, other = (
        jax.tree.map(
            lambda x, m: np.asarray(x, np.float64) - m, s.member(s.init(params, 0), 5), mean
        )
        for s in (es, plain)
    )
    for name in params:
        tolerance = dict(rtol=1e-2 if dtype == jnp.bfloat16 else 1e-4, atol=1e-5)
        np.testing.assert_allclose(own[name], factors[name] * other[name], **tolerance)


@pytest.mark.parametrize("rank", [1, 3, "full"])
def test_the_estimate_is_the_plain_formula_of_the_members(rank):
    """``-(1/N) sum_i w_i E_i / s`` with ``E_i = (W_i - W) / s`` for the sigma s of every slice."""
    with jax.enable_x64(True):
        params = make_params(np.float64)
        es = make(relative(PLANNERS["by_shape"], params), rank=rank, shaping=None)
        state = es.init(params, 0)
        values = np.random.default_rng(2).normal(size=24)
        members = es.ask(state, range(24))
        plan = es.plan_of(params)

        def expected(path):
            s = 0.1 * plan[path].scale
            noise = (np.asarray(members[path]) - params[path]) / s
            return -np.tensordot(values, noise, 1) / 24 / s

        found = es.gradient(state, values)
        # Sigma is a float32 number.
        chex.assert_trees_all_close(
            found, {path: expected(path) for path in params}, rtol=1e-5, atol=1e-6
        )


def test_the_estimate_of_a_linear_function_is_its_gradient():
    params = {"layers": make_params()["layers"]}
    slopes = np.random.default_rng(5).normal(size=(3, 8, 8)).astype(np.float32)
    plan = relative(by_shape({"layers": STACK}), params)
    es = make(plan, population=2**15, shaping=None, on_dense="ignore")
    state = es.init(params, 0)
    linear = lambda p, key, g: jnp.sum(p["layers"] * g)
    for layer in range(3):
        # Of one layer: in a sum, the noise of the largest layer hides the others.
        own = slopes * (np.arange(3) == layer)[:, None, None]
        _, found = es.value_and_gradient(state, linear, own)
        g, f = slopes[layer], -np.asarray(found["layers"][layer])
        # The standard error of an entry is at most that of dense noise times sqrt(3), for rank 1.
        assert np.abs(f - g).max() < 4.5 * np.linalg.norm(g) * np.sqrt(3 / 2**14)


def test_by_one_number_nothing_changes_but_sigma():
    """The same strategy as with a sigma of that size."""
    params = make_params()
    planner = PLANNERS["by_shape"]
    one = make(scaled(planner, {"*": 0.5}), optimizer=optax.sgd(0.1))
    other = make(planner, sigma=0.05, optimizer=optax.sgd(0.1))
    states = [es.step(es.init(params, 0), fitness, X)[0] for es in (one, other)]
    chex.assert_trees_all_close(*states, rtol=1e-6, atol=1e-6)


def test_chunks_and_devices_change_nothing_but_rounding():
    params = make_params()
    mesh = jax.make_mesh(
        (4,), ("population",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
    )
    states = []
    for changes in ({}, {"chunk": 6}, {"mesh": mesh}, {"mesh": mesh, "deterministic": True}):
        es = make(relative(PLANNERS["infer"], params), **changes)
        states.append(jax.device_get(es.optimize(es.init(params, 0), fitness, 2, X)))
    for other in states[1:]:
        chex.assert_trees_all_close(other, states[0], rtol=2e-4, atol=2e-5)


# ---------------------------------------------------------------- other noise and other numbers


def test_node_noise_takes_the_factor_and_no_slices():
    params = {"w": np.full((8, 8), 2.0, np.float32), "v": np.full((8, 8), 0.5, np.float32)}
    es = make(relative(by_shape(), params), perturb="nodes")
    plan = es.plan_of(params)
    assert (plan["w"].treatment, plan["v"].treatment) == (Nodes(2.0), Nodes(0.5))
    planner = relative(by_shape({"layers": STACK}), make_params())
    # A treatment that an override names keeps its noise.
    assert make(planner, perturb="nodes").plan_of(make_params())["layers"].treatment.rank == 1
    planner = relative(PLANNERS["infer"], make_params())
    with pytest.raises(
        ValueError, match="'layers': expected one factor on sigma with perturb='nodes'"
    ):
        make(planner, perturb="nodes").init(make_params(), 0)
    own = scaled(by_shape({"layers": Nodes()}), {"*": 1.0, "layers": SIZES})
    with pytest.raises(
        ValueError, match="'layers' has node noise: expected a factor that is a number"
    ):
        own(make_params(), 1)


def test_integers_take_powers_of_two():
    params = {"w": np.full((8, 8), 20, np.int8)}
    make_integer = functools.partial(
        integer.strategy, population=8, optimizer=integer.threshold(0.3)
    )
    one = make_integer(shift=4, plan=scaled(by_shape(), {"w": 2.0}))
    two = make_integer(shift=3)
    members = [es.member(es.init(params, 0), 3) for es in (one, two)]
    chex.assert_trees_all_equal(*members)
    for factor in (3.0, np.full((8, 1), 2.0)):
        with pytest.raises(ValueError, match="'w' is int8: factor .* must be a power of two"):
            make_integer(plan=scaled(by_shape(), {"w": factor})).init(params, 0)
    with pytest.raises(ValueError, match="'w' is int8: must be a float array"):
        rms_of(by_shape(), params)


# ---------------------------------------------------------------- wrong input, one sentence each


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"*": 1.0, "layer": 1.0}, "factor 'layer': must match a parameter, such as 'layers'"),
        ({"layers": 1.0}, "parameter 'bias': must have a factor on sigma"),
        ({"*": 0.0}, "'bias': factor 0.0: must be a positive number"),
        ({"*": float("nan")}, "factor nan: must be a positive number"),
        ({"*": 1.0, "out": -np.ones((8, 1))}, "'out': factor -1.0: must be a positive number"),
        ({"*": 1.0, "out": np.ones(8)}, r"'out': expected a factor .* of \[8, 4\] .* got the shape \[8\]"),
        ({"*": 1.0, "out": np.ones((8, 3))}, r"got the shape \[8, 3\]"),
        ({"*": 1.0, "out": np.ones((8, 4))}, r"\[8, 4\]: must not vary along both rows \(0,\) and columns"),
    ],
)  # fmt: skip
def test_wrong_factors_are_named(factors, message):
    with pytest.raises(ValueError, match=message):
        scaled(PLANNERS["by_shape"], factors)(make_params(), 1)


def test_wrong_parameters_are_named():
    planner, params = by_shape({"layers": STACK}), make_params()
    with pytest.raises(
        ValueError, match="'bias' is ShapeDtypeStruct: must be an array with values"
    ):
        relative(planner, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params)))
    with pytest.raises(ValueError, match="'bias' is .*Tracer: must be an array with values"):
        jax.jit(lambda p: relative(planner, p) and 0)(params)
    with pytest.raises(ValueError, match="'gain': must be finite to have a size"):
        relative(planner, {**params, "gain": np.full(8, np.nan, np.float32)})
    with pytest.raises(
        ValueError, match=r"an entry that is not 0, got zeros in \['w'\]; give floor="
    ):
        relative(by_shape(), {"w": np.zeros((3, 3), np.float32)})
    assert rms_of(by_shape(), {"w": np.zeros((3, 3), np.float32)}, floor=0.5) == {"w": 0.5}
    for floor in (0.0, -1, float("inf"), float("nan"), "much"):
        with pytest.raises(ValueError, match="floor=.*: must be a positive number, or None"):
            relative(planner, params, floor=floor)
    with pytest.raises(ValueError, match=r"plan=.*: must be the result of a call, relative\(\)"):
        make(eggroll.plan.relative)
