"""Unmodified models of every library give what members built densely give, and nothing is built."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from support import normal

import eggroll
from eggroll import Dense, Matrix

X = np.random.default_rng(0).normal(size=(3, 6, 8))  # [batch, time, features]
IMAGE = np.random.default_rng(1).normal(size=(2, 6, 6, 4))
TOKENS = np.random.default_rng(2).integers(0, 11, (3, 6))


def linen(module, x, rngs=(), **apply):
    """(params, fn) of a Flax linen module; other collections are constants."""
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = jax.jit(module.init)(keys, x)
    fixed = {name: v for name, v in variables.items() if name != "params"}

    def fn(params, key):
        keys = {name: key for name in rngs}
        return module.apply({"params": params, **fixed}, x, rngs=keys, **apply)

    return variables["params"], fn


def nnx_model(make, call, kinds=nnx.Param):
    graph, params, rest = nnx.split(nnx.jit(make)(nnx.Rngs(0)), kinds, ...)

    def fn(params, key):
        # Rebuilt, so that a model may change its statistics and keys inside the trace.
        return call(nnx.merge(graph, params, jax.tree.map(jnp.asarray, rest)), key)

    return params, fn


def equinox(make, call):
    module = eqx.filter_jit(make)(key=jax.random.key(0))
    params, static = eqx.partition(module, eqx.is_inexact_array)
    return params, lambda params, key: call(eqx.combine(params, static), key)


class Block(nn.Module):
    """A transformer block in the form that nn.scan takes."""

    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(h, h)
        h = nn.Dense(16)(nn.RMSNorm()(x))
        return x + nn.Dense(8)(nn.gelu(h)), None


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8)
        return embed.attend(nn.tanh(nn.Dense(8)(embed(tokens))))


class Stack(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        axes = {"params": 0}
        layers = nn.scan(block, variable_axes=axes, split_rngs={"params": True}, length=3)
        return layers()(x, None)[0]


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(x)


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(nn.Dropout(0.5, deterministic=False)(nn.Dense(16)(x)))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3))(x))
        return nn.GroupNorm(num_groups=2)(x)


LINEN = {
    "Dense": (lambda: nn.Dense(7), X),
    "DenseGeneral": (lambda: nn.DenseGeneral((2, 5), axis=(-2, -1)), X),
    "Conv": (lambda: nn.Conv(6, (3, 3), strides=(2, 1)), IMAGE),
    "Conv1D": (lambda: nn.Conv(8, (3,), padding="CAUSAL", kernel_dilation=2), X),
    "Conv, grouped": (lambda: nn.Conv(8, (3, 3), feature_group_count=2), IMAGE),
    "Conv, depthwise": (lambda: nn.Conv(8, (3, 3), feature_group_count=4), IMAGE),
    "ConvTranspose": (lambda: nn.ConvTranspose(6, (3, 3), strides=(2, 2)), IMAGE),
    "Embed and attend": (Tied, TOKENS),
    "attention": (lambda: Attention(), X),
    "scanned stack": (Stack, X),
    "rematerialised stack": (lambda: Stack(remat=True), X),
    "LSTM": (lambda: nn.RNN(nn.OptimizedLSTMCell(8, param_dtype=jnp.float64)), X),
    "GRU": (lambda: nn.RNN(nn.GRUCell(8, param_dtype=jnp.float64), reverse=True), X),
    "BatchNorm and GroupNorm": (Normed, IMAGE),
}


class Lora(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.LoRALinear(8, 16, lora_rank=3, rngs=rngs)
        self.out = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.linear(x)))


class Small(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.linear = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, use_running_average=True, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)

    def __call__(self, tokens, key):
        x = self.norm(self.linear(self.embed(tokens)))
        x = nnx.Dropout(0.3, deterministic=False)(x, rngs=nnx.Rngs(key))
        return self.attention(x)


class Training(nnx.Module):
    """Batch statistics, keys of its own and a recurrence: all of them change while it runs."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.rnn = nnx.RNN(nnx.GRUCell(8, 6, rngs=rngs))

    def __call__(self, x):
        return self.rnn(self.dropout(self.norm(x)))


@jax.custom_vjp
def swish(x):
    return x * jax.nn.sigmoid(x)


swish.defvjp(lambda x: (swish(x), x), lambda x, g: (g * jax.nn.sigmoid(x),))


def plain_params(**shapes):
    return {
        name: jnp.asarray(normal(shape, name, np.float32) / 2) for name, shape in shapes.items()
    }


def mixture():
    """Experts in one array, chosen by a learned gate."""
    params = plain_params(gate=(8, 4), experts=(4, 8, 8))

    def fn(params, key):
        x = jnp.asarray(X).reshape(-1, 8)
        gates = jax.nn.softmax(x @ params["gate"])
        return jnp.einsum("bd,edf,be->bf", x, params["experts"], gates)

    return params, fn


def gradient_inside():
    """One step of gradient descent on the data, inside the fitness."""
    params = plain_params(w=(8, 8), v=(8, 5))

    def loss(inputs, params):
        return jnp.sum(jnp.tanh(inputs @ params["w"]) @ params["v"])

    def fn(params, key):
        x = jnp.asarray(X)
        x = x - 0.1 * jax.grad(loss)(x, params)
        return jnp.tanh(x @ params["w"]) @ params["v"]

    return params, fn


def in_a_carry():
    params = plain_params(w=(8, 8))

    def fn(params, key):
        def body(_, carry):
            params, x = carry
            return params, swish(x @ params["w"])

        return lax.fori_loop(0, 3, body, (params, jnp.asarray(X)))[1]

    return params, fn


def branches_and_loops():
    params = plain_params(a=(8, 8), b=(8, 8))

    def fn(params, key):
        x = jnp.asarray(X)
        x = lax.cond(x.sum() > 0, lambda x: x @ params["a"], lambda x: x @ params["b"].T, x)
        step = lambda c: (c[0] + 1, jnp.tanh(c[1] @ params["b"]))
        return lax.while_loop(lambda c: c[0] < 2, step, (0, x))[1]

    return params, fn


def sharded_inside():
    params = plain_params(w=(8, 8))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def fn(params, key):
        f = jax.shard_map(
            lambda x, w: lax.psum(jnp.tanh(x @ w), "data"),
            mesh=mesh,
            in_specs=(jax.P("data"), jax.P()),
            out_specs=jax.P(),
        )
        return f(jnp.asarray(X).reshape(-1, 8)[:6], params["w"])

    return params, fn


def random_actions():
    params = plain_params(w=(8, 8))
    return params, lambda params, key: jax.random.categorical(key, jnp.asarray(X) @ params["w"])


OTHERS = {
    "linen Dropout": lambda: linen(Dropped(), X, rngs=("dropout",)),
    "NNX LoRA": lambda: nnx_model(
        Lora, lambda m, key: m(jnp.asarray(X)), nnx.Any(nnx.Param, nnx.LoRAParam)
    ),
    "NNX": lambda: nnx_model(Small, lambda m, key: m(jnp.asarray(TOKENS), key)),
    "Equinox MLP": lambda: equinox(
        functools.partial(eqx.nn.MLP, 8, 5, 16, 2),
        lambda m, key: jax.vmap(m)(jnp.asarray(X[0])),
    ),
    "Equinox Conv": lambda: equinox(
        functools.partial(eqx.nn.Conv2d, 4, 6, 3),
        lambda m, key: jax.vmap(m)(jnp.asarray(IMAGE).transpose(0, 3, 1, 2)),
    ),
    "Equinox attention": lambda: equinox(
        functools.partial(eqx.nn.MultiheadAttention, 2, 8),
        lambda m, key: jax.vmap(lambda x: m(x, x, x))(jnp.asarray(X)),
    ),
    "mixture of experts": mixture,
    "gradient inside": gradient_inside,
    "in a loop's carry": in_a_carry,
    "branches and loops": branches_and_loops,
    "shard_map inside": sharded_inside,
    "random actions": random_actions,
}


def check_against_built(params, fn, tolerance, **settings):
    """es.map's outputs are those of the same function on members built densely."""

    def with_key(params, key):
        return fn(params, key), jax.random.key_data(key)

    es = eggroll.EvolutionStrategy(
        optimizer=optax.sgd(0.1), population=4, sigma=0.3, on_dense="error", **settings
    )

    @jax.jit  # one program compiles faster than four
    def outputs(state):
        found, keys = es.map(state, with_key)
        keys = jax.vmap(jax.random.wrap_key_data)(keys)
        return found, jax.vmap(fn)(es.ask(state, range(4)), keys), fn(state.params, keys[0])

    found, expected, mean = outputs(es.init(params, 0))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance),
        found,
        expected,
    )
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a[0] - b).max()), found, mean)
    assert max(jax.tree.leaves(moved)) > 1e-3  # the noise did reach the output
    return es.plan_of(params)


def in_float64(params):
    def wide(x):
        return jnp.asarray(np.asarray(x, float)) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(wide, params)


@pytest.mark.parametrize("name", LINEN)
def test_linen(name):
    make, x = LINEN[name]
    with jax.enable_x64(True):
        params, fn = linen(make(), x)
        params = in_float64(params)
        plan = check_against_built(params, fn, 1e-9, plan=eggroll.plan.infer(fn, params))
    assert any(isinstance(leaf.treatment, Matrix) for leaf in plan.leaves)


@pytest.mark.parametrize("name", OTHERS)
def test_other_models(name):
    with jax.enable_x64(True):
        params, fn = OTHERS[name]()
        params = in_float64(params)
        tolerance = 1e-5 if name == "NNX" else 1e-9  # its BatchNorm computes in float32
        plan = check_against_built(params, fn, tolerance, plan=eggroll.plan.infer(fn, params))
    assert any(isinstance(leaf.treatment, Matrix) for leaf in plan.leaves)


def test_nnx_models_that_change_as_they_run():
    # In float32: the statistics are kept in it, and take no float64.
    params, fn = nnx_model(Training, lambda model, key: model(jnp.asarray(X, jnp.float32)))
    check_against_built(params, fn, 1e-4, plan=eggroll.plan.infer(fn, params))


@pytest.mark.parametrize("name", ["Dense", "Conv", "scanned stack", "LSTM"])
def test_plans_by_shape_give_the_same(name):
    make, x = LINEN[name]
    with jax.enable_x64(True):
        params, fn = linen(make(), x)
        # By shape a stack of vectors is a matrix, which an addition then builds.
        plan = eggroll.plan.by_shape(
            {"*Norm*": Dense(), "*bias": Dense()} if "stack" in name else None
        )
        check_against_built(in_float64(params), fn, 1e-9, plan=plan)


def test_layers_of_a_stack_have_noise_of_their_own():
    params, fn = linen(Stack(), X.astype(np.float32))
    plan = check_against_built(params, fn, 1e-4, plan=eggroll.plan.infer(fn, params))
    kernel = plan["ScanBlock_0/Dense_0/kernel"].treatment
    assert kernel == Matrix(rows=1, columns=2, batch=0, rank=1)
    out = plan["ScanBlock_0/MultiHeadDotProductAttention_0/out/kernel"].treatment
    assert (out.rows, out.columns, out.batch) == ((1, 2), (3,), (0,))
    assert isinstance(plan["ScanBlock_0/LayerNorm_0/scale"].treatment, Dense)


def test_bfloat16_parameters_agree_to_bfloat16():
    params, fn = linen(nn.Dense(16, param_dtype=jnp.bfloat16), jnp.asarray(X, jnp.bfloat16))
    es = eggroll.EvolutionStrategy(
        optimizer=optax.sgd(0.1), population=8, sigma=0.1, on_dense="error"
    )
    state = es.init(params, 0)
    members = jax.tree.map(lambda x: x.astype(jnp.float32), es.ask(state, range(8)))
    exact = jax.vmap(
        lambda p: jnp.asarray(X, jnp.bfloat16).astype(jnp.float32) @ p["kernel"] + p["bias"]
    )(members)
    found = es.map(state, fn)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=2e-2, atol=3e-2)


def test_float32_parameters_computed_in_bfloat16():
    params, fn = linen(nn.Dense(16, dtype=jnp.bfloat16), X.astype(np.float32))
    check_against_built(params, fn, 6e-2, plan=eggroll.plan.infer(fn, params))


def test_one_body_at_two_ranks():
    with jax.enable_x64(True):
        params = in_float64(plain_params(a=(8, 8), b=(8, 8)))

        @jax.jit
        def layer(x, w):
            return jnp.tanh(x @ w)

        def fn(params, key):
            return layer(layer(jnp.asarray(X), params["a"]), params["b"])

        ranks = {"a": Matrix(rows=0, columns=1, rank=1), "b": Matrix(rows=0, columns=1, rank=3)}
        check_against_built(params, fn, 1e-9, plan=eggroll.plan.by_shape(ranks))
