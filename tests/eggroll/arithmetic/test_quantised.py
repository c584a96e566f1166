"""int8 parameters beside float ones: perturbed by floats in their own steps, trained as float32 copies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll import Dense, EvolutionStrategy, Frozen, Matrix
from eggroll.arithmetic import FLOATS
from eggroll.plan import by_shape

SCALE = 0.02


def make_params():
    whole = jax.random.randint(jax.random.key(0), (3, 6, 5), -100, 101).astype(jnp.int8)
    return {"layers": whole, "head": whole[0], "bias": jnp.linspace(-1, 1, 5)}


def fitness(params, key, x):
    """A scan over int8 layers, and a head that is used as it is and transposed."""
    layer = lambda x, w: (jnp.tanh(SCALE * x @ w.astype(x.dtype) @ jnp.eye(5, 6)), None)
    x = jax.lax.scan(layer, x, params["layers"])[0]
    y = SCALE * x @ params["head"].astype(x.dtype) + params["bias"]
    return (y @ params["head"].astype(x.dtype).T).sum()


def make(layers=None, head=None, **changes):
    layers, head = (
        layers or Matrix(rows=1, columns=2, batch=0, sigma=40.0),
        head or Dense(sigma=40.0),
    )
    settings = dict(optimizer=optax.sgd(1.0), population=8, sigma=0.1, on_dense="error")
    plan = by_shape({"layers": layers, "head": head})
    return EvolutionStrategy(**settings | {"plan": plan} | changes)


@pytest.mark.parametrize("head", [Dense(sigma=40.0), Matrix(rows=0, columns=1, sigma=40.0)])
def test_members_are_those_built_densely(head):
    es, params, x = make(head=head), make_params(), jnp.linspace(-1, 1, 6)
    state = es.init(params, 0)
    values = es.evaluate(state, fitness, x)
    assert np.ptp(values) > 0.1
    for i in range(8):
        member = es.member(state, i)
        assert member["layers"].dtype == member["head"].dtype == jnp.float32
        assert float(jnp.abs(member["layers"] - params["layers"]).max()) > 1
        np.testing.assert_allclose(values[i], fitness(member, None, x), rtol=1e-4)


def test_the_mean_is_the_rounded_copy_and_small_updates_add_up():
    es, params = make(), make_params()
    state = es.init(params, 0)
    assert state.master.keys() == {"layers", "head"}
    # A fifth of a step an update: the int8 matrix follows after the third.
    push = {"layers": jnp.full((3, 6, 5), -0.2), "head": jnp.zeros((6, 5)), "bias": jnp.zeros(5)}
    for i in range(5):
        moved = state.params["layers"].astype(int) - params["layers"]
        assert (moved == (0 if i < 3 else 1)).all()
        state, _ = es.apply_gradient(state, push)
    assert state.params["layers"].dtype == jnp.int8
    np.testing.assert_allclose(state.master["layers"], params["layers"] + 1.0, atol=1e-4)


def test_rests_in_a_byte_are_float_copies_to_a_508th_of_a_step():
    """Float32 copies and int8 rests under the same random updates, some of them far below a step."""
    copies, rests = make(), make(master_weights="int8")
    params, chance = make_params(), np.random.default_rng(0)
    a, b = copies.init(params, 0), rests.init(params, 0)
    assert {leaf.dtype for leaf in b.master.values()} == {jnp.dtype("int8")}
    for i in range(1, 21):
        size = 10.0 ** chance.uniform(-2, 1)
        draw = lambda x, size=size: jnp.asarray(size * chance.normal(size=x.shape), jnp.float32)
        push = jax.tree.map(draw, params)
        a, _ = copies.apply_gradient(a, push)
        b, _ = rests.apply_gradient(b, push)
        for name in b.master:
            whole = b.params[name] + b.master[name] / 254
            inside = np.abs(a.master[name]) < 126  # the ends of the range cut otherwise
            error = np.abs(whole - a.master[name])[inside].max()
            assert 0 < error <= i / 508 + 1e-4
            assert (np.abs(b.params[name] - whole) <= 0.5 + 1e-6).all()
        np.testing.assert_allclose(a.params["bias"], b.params["bias"])
    assert any((a.params[name] != params[name]).any() for name in b.master)


def test_a_step_with_rests_is_that_with_copies():
    x = jnp.linspace(-1, 1, 6)
    found = []
    for how in (True, "int8"):
        es = make(master_weights=how, optimizer=optax.sgd(20.0))
        state, _ = es.step(es.init(make_params(), 0), fitness, x)
        found.append(state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *found)
    assert (found[0]["layers"] != make_params()["layers"]).any()


def test_rests_are_a_byte_a_weight():
    sizes = [
        sum(
            leaf.nbytes
            for leaf in jax.tree.leaves((state.params["layers"], state.master["layers"]))
        )
        for state in (make(master_weights=how).init(make_params(), 0) for how in (True, "int8"))
    ]
    assert sizes == [5 * 90, 2 * 90]


def test_copies_stay_in_the_range_of_int8():
    es = make()
    state = es.init(make_params(), 0)
    push = jax.tree.map(lambda x: jnp.full(x.shape, -1000.0), make_params())
    state, _ = es.apply_gradient(state, push)
    assert (state.params["layers"] == 127).all() and (state.master["layers"] == 127).all()


def test_the_gradient_is_that_of_the_same_numbers_in_floats():
    es, params, x = make(), make_params(), jnp.linspace(-1, 1, 6)
    floats = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    values = es.evaluate(es.init(params, 0), fitness, x)
    state = es.init(floats, 0)
    np.testing.assert_allclose(values, es.evaluate(state, fitness, x), rtol=1e-5)
    ours, right = es.gradient(es.init(params, 0), values), es.gradient(state, values)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, right)


def test_training_moves_int8_matrices_towards_the_target():
    target = make_params()["head"].astype(jnp.float32) + 20.0
    error = lambda params, key: -jnp.square(params["head"].astype(jnp.float32) - target).mean()
    es = make(optimizer=optax.adam(0.5), population=64)
    state = es.init(make_params(), 0)
    step = jax.jit(lambda state: es.step(state, error)[0])
    before = float(error(state.params, None))
    for _ in range(100):
        state = step(state)
    assert float(error(state.params, None)) > before / 20


def test_without_an_override_they_pass_through():
    params = make_params()
    plan = by_shape()(params, 1)
    assert plan["layers"].treatment == Frozen() and plan["layers"].reason == "int8: passes through"
    assert plan.arithmetic == FLOATS


def test_what_would_round_the_noise_is_refused():
    params, x = make_params(), jnp.ones(6)
    with pytest.raises(
        ValueError,
        match="master_weights=False: must be True or 'int8', since the int8 parameter 'head'",
    ):
        make(master_weights=False).init(params, 0)
    es = make()
    state = es.init(params, 0)
    whole = lambda params, key: (params["layers"].astype(jnp.int32)).sum()
    with pytest.raises(ValueError, match="int8 parameter 'layers' has noise of floats and enters"):
        es.evaluate(state, whole)
    added = lambda params, key: (params["head"] + jnp.int8(1)).astype(jnp.float32).sum()
    with pytest.raises(ValueError, match="has noise of floats and enters 'add' in int8"):
        es.evaluate(state, added)
    dot = lambda params, key: jax.lax.dot(x.astype(jnp.int8), params["layers"][0]).sum()
    with pytest.raises(ValueError, match="'layers' has noise of floats and enters 'dot_general'"):
        es.evaluate(state, dot)
    with pytest.raises(ValueError, match="enters 'output' in int8"):
        es.map(state, lambda params, key: params["layers"])


@pytest.mark.parametrize(
    "read",
    [
        lambda w: jnp.broadcast_to(w[None], (2, 6, 5)).astype(jnp.int32).sum(),
        lambda w: jnp.broadcast_to(w[None], (2, 6, 5)).sum(),
        lambda w: (jnp.ones((2, 6, 5), jnp.int8) + w).astype(jnp.float32).sum(),
        lambda w: jnp.broadcast_to(w[None], (2, 6, 5)),
    ],
    ids=["cast", "sum", "add", "output"],
)
def test_a_broadcast_hides_no_rounding(read):
    es = make()
    state = es.init(make_params(), 0)
    with pytest.raises(ValueError, match="has noise of floats and enters .* in int8"):
        es.map(state, lambda params, key: read(params["head"]))
    cast = lambda params, key: jnp.broadcast_to(params["head"][None], (2, 6, 5)).astype(jnp.float32)
    built = [es.member(state, i)["head"] for i in range(8)]
    np.testing.assert_allclose(es.map(state, cast)[:, 1], built, rtol=1e-6)


def test_whole_numbers_beside_narrow_floats_stay_as_they_are():
    es = EvolutionStrategy(optimizer=optax.sgd(1.0), population=4, sigma=0.1)
    state = es.init({"b": jnp.ones(3, jnp.bfloat16)}, 0)

    def fitness(params, key):
        b, tokens = jax.lax.optimization_barrier((params["b"], jnp.arange(3)))
        return jnp.where(tokens < 2, b, 0).astype(jnp.float32).sum()

    built = [es.member(state, i)["b"][:2].sum() for i in range(4)]
    np.testing.assert_allclose(es.evaluate(state, fitness), built, rtol=1e-2)


def test_a_wide_pattern_is_not_for_them():
    plan = by_shape({"*": Dense(sigma=0.5)})(make_params(), 1)
    assert plan["layers"].treatment == Frozen() and plan["bias"].treatment == Dense(sigma=0.5)


def test_128_below_zero_is_refused():
    params = make_params()
    with pytest.raises(ValueError, match="'head': 1 of 30 entries are -128: must be -127 to 127"):
        make().init({**params, "head": params["head"].at[0, 0].set(-128)}, 0)


@pytest.mark.parametrize("devices", [2, 4])
def test_devices_change_no_bit_of_a_deterministic_run(devices):
    def trained(mesh):
        es, x = make(deterministic=True, mesh=mesh, chunk=4), jnp.linspace(-1, 1, 6)
        state = es.init(make_params(), 0)
        for _ in range(2):
            state, _ = es.step(state, fitness, x)
        return jax.device_get(state)

    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((devices,), ("population",), auto, devices=jax.devices()[:devices])
    state, alone = trained(mesh), trained(None)
    jax.tree.map(np.testing.assert_array_equal, state, alone)
    assert np.abs(alone.master["layers"] - make_params()["layers"]).max() > 0.5


def test_eggroll_names_them_in_its_table():
    assert "low rank, rows 1, columns 2, batch 0, sigma x40" in make().describe(make_params())
    assert eggroll.Matrix is Matrix
