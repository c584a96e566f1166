"""Which parameter gets what: by shape, from the traced fitness, and by override."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import eggroll
from eggroll import Dense, Frozen, Matrix
from eggroll.plan import by_shape, infer

PARAMS = {
    "kernel": jnp.zeros((16, 32)),
    "heads": jnp.zeros((16, 4, 8)),
    "bias": jnp.zeros(32),
    "scale": jnp.zeros(()),
    "small": jnp.zeros((2, 2)),
    "count": jnp.zeros((16, 16), jnp.int32),
}


def treatments(planner, params, rank=1):
    return {leaf.path: leaf.treatment for leaf in planner(params, rank).leaves}


# ---------------------------------------------------------------- by shape


def test_by_shape():
    assert treatments(by_shape(), PARAMS) == {
        "bias": Dense(),
        "count": Frozen(),
        "heads": Matrix(rows=(0, 1), columns=2, rank=1),
        "kernel": Matrix(rows=0, columns=1, rank=1),
        "scale": Dense(),
        "small": Dense(),
    }


@pytest.mark.parametrize("rank", [1, 2, 5, 10, 11, 100])
def test_low_rank_only_where_it_is_smaller(rank):
    treatment = treatments(by_shape(), {"w": jnp.zeros((16, 32))}, rank)["w"]
    smaller = rank * (16 + 32) < 16 * 32
    assert treatment == (Matrix(rows=0, columns=1, rank=rank) if smaller else Dense())


def test_full_rank_is_dense_everywhere():
    kinds = treatments(by_shape(), PARAMS, "full")
    assert all(isinstance(t, Dense) for path, t in kinds.items() if path != "count")


def test_overrides_the_last_match_counts():
    planner = by_shape(
        {
            "*": Frozen(),
            "k*": Matrix(rows=1, columns=0, rank=4, sigma=2.0),
            "kernel": Dense(sigma=3.0),
        }
    )
    kinds = treatments(planner, PARAMS)
    assert kinds.pop("kernel") == Dense(sigma=3.0)
    assert set(kinds.values()) == {Frozen()}


def test_axes_may_be_any_sequences():
    assert Matrix(0, [1, 2], range(3, 5)) == Matrix((0,), (1, 2), (3, 4))


def test_noise_shapes_and_bytes():
    plan = by_shape({"heads": Matrix(rows=0, columns=2, batch=1, rank=2)})(PARAMS, 1)
    assert plan["heads"].noise_shapes() == ((2, 16, 4, 1), (2, 1, 4, 8))
    assert plan["heads"].noise_bytes == 4 * 2 * 4 * (16 + 8)
    assert plan["bias"].noise_shapes() == ((32,),)
    assert plan["count"].noise_bytes == 0
    half = by_shape()({"w": jnp.zeros((16, 32), jnp.bfloat16), "b": jnp.zeros(3, jnp.bfloat16)}, 1)
    # Factors in the parameter's type, dense noise in float32.
    assert (half["w"].noise_bytes, half["b"].noise_bytes) == (2 * (16 + 32), 4 * 3)


def test_sigma_scales_show_in_a_member():
    def spread(scale):
        es = eggroll.EvolutionStrategy(
            optimizer=optax.sgd(0.1),
            population=2,
            sigma=0.1,
            plan=by_shape({"*": Dense(sigma=scale)}),
        )
        state = es.init({"w": jnp.zeros((4, 4))}, 0)
        return es.member(state, 0)["w"]

    np.testing.assert_allclose(spread(3.0), 3 * spread(1.0), rtol=1e-6)


# ---------------------------------------------------------------- inferred


def inferred(fn, params, *args, **kwargs):
    return treatments(infer(fn, params, *args, **kwargs), params)


def zeros(**shapes):
    return {name: jnp.zeros(shape) for name, shape in shapes.items()}


X = jnp.zeros((3, 16))


@pytest.mark.parametrize(
    ("shape", "fn", "expected"),
    [
        ((16, 32), lambda w, x: x @ w, Matrix(0, 1, rank=1)),
        ((32, 16), lambda w, x: x @ w.T, Matrix(1, 0, rank=1)),
        ((16, 16), lambda w, x: x @ w @ w.T, Matrix(0, 1, rank=1)),
        ((16, 4, 8), lambda w, x: jnp.einsum("bd,dhk->bhk", x, w), Matrix(0, (1, 2), rank=1)),
        ((4, 16, 16), lambda w, x: lax.scan(lambda c, m: (c @ m, 0), x, w)[0], Matrix(1, 2, 0, rank=1)),
        ((4, 16, 16), lambda w, x: x @ w[2] @ w[jnp.int32(1)], Matrix(1, 2, 0, rank=1)),
        ((4, 16, 16), lambda w, x: jnp.einsum("bd,ldf->lbf", x, w), Matrix(1, (0, 2), rank=1)),
        ((3, 16, 16), lambda w, x: jnp.einsum("bd,bdf->bf", x, w), Matrix(1, 2, 0, rank=1)),
        ((40, 16), lambda w, x: w[jnp.array([1, 5, 7])] * x, Matrix(0, 1, rank=1)),
        ((40, 16), lambda w, x: w[jnp.array([1, 5, 7])] @ w.T, Matrix(1, 0, rank=1)),
        ((3, 16), lambda w, x: w + x, Dense()),
        ((16, 16), lambda w, x: x, Dense()),
        ((16, 1), lambda w, x: x @ w, Dense()),
        ((16, 32), lambda w, x: x @ w.reshape(16, 4, 8).reshape(16, 32), Matrix(0, 1, rank=1)),
        # Both axes are contracted and free at once: the last is the columns, as by shape.
        ((256, 2), lambda w, x: x @ w.reshape(16, 32), Matrix(0, 1, rank=1)),
    ],
)  # fmt: skip
def test_inferred_roles(shape, fn, expected):
    found = inferred(lambda p, key, x: fn(p["w"], x).sum(), zeros(w=shape), X)["w"]
    assert found == expected


def test_a_plan_of_axes_that_are_run_together_is_computed_right():
    """Rows and columns come to stand in one axis: the matrix is built, with the right numbers."""
    fn = lambda p, key, x: x @ p["w"].reshape(16, 32)
    params, x = zeros(w=(256, 2)), jax.random.normal(jax.random.key(0), (3, 16))
    es = eggroll.EvolutionStrategy(
        optimizer=optax.sgd(0.1), population=4, sigma=0.1, on_dense="ignore",
        plan=infer(lambda *args: fn(*args).sum(), params, x),
    )  # fmt: skip
    state = es.init(params, 0)
    members = es.ask(state, range(4))["w"]
    assert np.linalg.matrix_rank(members[0]) == 1  # noise about zero, of rank 1
    expected = jnp.einsum("bi,nij->nbj", x, members.reshape(4, 16, 32))
    np.testing.assert_allclose(es.map(state, fn, x), expected, rtol=1e-5, atol=1e-6)


def test_inferred_through_members_keys_aux_and_abstract_parameters():
    params = {
        "w": jax.ShapeDtypeStruct((16, 32), jnp.float32),
        "unused": jax.ShapeDtypeStruct((8, 8), jnp.float32),
    }

    def fn(params, key, member, scale):
        y = (member["x"] + jax.random.normal(key, (16,))) @ params["w"] * scale
        return y.sum(), {"y": y}

    kinds = inferred(fn, params, 2.0, members={"x": jnp.zeros((6, 16))})
    assert kinds == {"w": Matrix(0, 1, rank=1), "unused": Dense()}


def test_inferred_convolution_and_depthwise():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(16, (3, 3))(x)
            return nn.Conv(16, (3, 3), feature_group_count=16)(x)

    x = jnp.zeros((1, 6, 6, 8))
    params = Model().init(jax.random.key(0), x)["params"]
    kinds = inferred(lambda p, key: Model().apply({"params": p}, x).sum(), params)
    assert kinds["Conv_0/kernel"] == Matrix((0, 1, 2), 3, rank=1)
    assert kinds["Conv_1/kernel"] == Matrix((0, 1, 2), 3, rank=1)
    assert kinds["Conv_0/bias"] == Dense()


def test_an_inferred_plan_refuses_parameters_that_it_has_not_seen():
    planner = infer(lambda p, key: p["w"].sum(), zeros(w=(4, 4)))
    with pytest.raises(ValueError, match="'v': must be a parameter of the traced fitness"):
        planner(zeros(w=(4, 4), v=(4, 4)), 1)
    with pytest.raises(ValueError, match=r"'w': expected 2 axes .* got 3 in the shape \[4, 4, 2\]"):
        planner(zeros(w=(4, 4, 2)), 1)


# ---------------------------------------------------------------- wrong input, one sentence each


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"nothing*": Dense()}, "override 'nothing[*]': must match a parameter, one of"),
        (
            {"kernel": Matrix(0, 1, rank=17)},
            "parameter 'kernel': rank=17: .* from 1 to 16, .* 16 x 32",
        ),
        ({"kernel": Matrix(0, 0)}, "'kernel': rows=.*must name each of the 2 axes"),
        ({"kernel": Matrix(0, 2)}, "'kernel': .* 2 axes of the shape \\[16, 32\\] once"),
        ({"heads": Matrix(0, 1)}, "'heads': .* each of the 3 axes"),
        ({"*": Frozen()}, "params: expected at least one float or int8 array"),
        (
            {"kernel": Matrix(0, 1, sigma=0.0)},
            "override 'kernel': sigma=0.0: must be a positive number",
        ),
        ({"bias": Dense(sigma=float("nan"))}, "override 'bias': sigma=nan"),
        ({"kernel": "dense"}, "override 'kernel'='dense': must be an eggroll.Matrix"),
        ({"kernel": Dense}, "override 'kernel'=<class"),
    ],
)
def test_wrong_overrides_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        by_shape(overrides)(PARAMS, 1)


def test_wrong_trees_are_named():
    with pytest.raises(ValueError, match=r"is .*must be an array.*eqx\.partition"):
        by_shape()(eqx.nn.MLP(4, 4, 8, 1, key=jax.random.key(0)), 1)
    with pytest.raises(ValueError, match="parameter 'a/b': must be a unique path"):
        by_shape()({"a/b": jnp.zeros(2), "a": {"b": jnp.zeros(2)}}, 1)
    with pytest.raises(KeyError, match="parameter 'x': must be one of"):
        by_shape()(PARAMS, 1)["x"]


# ---------------------------------------------------------------- the printed table


def test_describe_says_what_is_built_and_why():
    params = zeros(embed=(40, 16), kernel=(16, 32), odd=(32, 32), bias=(32,))

    def fn(params, key, x):
        h = params["embed"][jnp.array([1, 2, 3])] @ params["kernel"] + params["bias"]
        return (h @ jnp.sin(params["odd"])).sum()

    es = eggroll.EvolutionStrategy(optimizer=optax.sgd(0.1), population=4, sigma=0.1)
    lines = es.describe(params, fn, X).splitlines()
    table = {line.split()[0]: line for line in lines[2:-1]}
    assert list(table) == ["bias", "embed", "kernel", "odd"]
    assert "BUILT for every member by sin" in table["odd"]
    assert not any("BUILT" in table[path] for path in ("bias", "embed", "kernel"))
    assert "16x32 float32" in table["kernel"] and "rows 0, columns 1" in table["kernel"]
    assert f"{(16 + 32) * 4} B" in table["kernel"]
    assert lines[-1].startswith("noise a pair of members:")
    # Without a fitness the plan alone; the same lines but for what is built.
    assert "BUILT" not in es.describe(params)
