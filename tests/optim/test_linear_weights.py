"""Which leaves are linear weights, on every model of the experiments and on trees of other libraries."""

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import optim
from experiments.models import (
    egg,
    gru,
    normalised,
    quantised,
    rwkv7,
    transformer,
    transformer_family,
)
from experiments.models.mlp import MLP
from optim._dimensions import leaves_of
from optim._linear_weights import is_unknown


def split(params: Any) -> set[str]:
    """The paths of the leaves that are linear weights."""
    leaves, flags = leaves_of(params), jax.tree.leaves(optim.linear_weights(params))
    return {leaf.names.path for leaf, flag in zip(leaves, flags, strict=True) if flag}


def unknown(params: Any) -> set[str]:
    return {leaf.names.path for leaf in leaves_of(params) if is_unknown(leaf)}


def matrices(params: Any, *others: str) -> set[str]:
    """The paths of stacked leaves of three axes below layers or blocks, but for the others."""
    found = {leaf.names.path for leaf in leaves_of(params) if len(leaf.shape) == 3}
    return {path for path in found if path.startswith(("layers", "blocks"))} - set(others)


def init(make: Any, config: Any) -> Any:
    return jax.eval_shape(lambda: make(jax.random.key(0), config))


def test_rwkv7() -> None:
    config = rwkv7.RWKV7Config(vocab_size=50, hidden_size=128, num_hidden_layers=3)
    params = init(rwkv7.init, config)
    # The bonus is a vector in the form (heads, head size).
    assert split(params) == matrices(params, "blocks/att/r_k")
    assert {"blocks/att/output", "blocks/ffn/key", "blocks/att/w1"} < split(params)
    assert not unknown(params)
    # Adam's state is 8 bytes a parameter; what is split has a quarter of that, and indices.
    large = sum(x.size for x in jax.tree.leaves(params))
    flags = jax.tree.leaves(optim.linear_weights(params))
    part = sum(x.size for x, f in zip(jax.tree.leaves(params), flags, strict=True) if f)
    found = optim.state_bytes(optim.frugal(1e-3), params).total
    assert found == pytest.approx(8 * (large - part) + 2 * part, rel=0.03)


def test_transformer() -> None:
    config = transformer.TransformerConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, qkv_bias=True, qk_norm=True,
    )  # fmt: skip
    params = init(transformer.init, config)
    assert split(params) == matrices(params)
    assert len(split(params)) == 7
    # In int8 the matrices and their scales are leaves of their own.
    small = jax.eval_shape(transformer_family.FAMILY.quantise, params)
    assert split(small) == {f"{path}/int8" for path in split(params)}
    assert quantised.is_quantised(small["layers"]["q_proj"])


@pytest.mark.parametrize(
    ("make", "config"),
    [(egg.init, egg.Config(2, 16)), (gru.init, gru.GRUConfig(layers=2, width=16))],
    ids=["egg", "gru"],
)
def test_recurrent_models(make: Any, config: Any) -> None:
    params = init(make, config)
    assert split(params) == matrices(params)
    assert len(split(params)) == 6


def test_mlps() -> None:
    params = jax.eval_shape(MLP(4).init, jax.random.key(0), jnp.ones((1, 5)))
    assert split(params) == {f"params/Dense_{i}/kernel" for i in range(4)}
    params = normalised.init(jax.random.key(0), 4, 8, 2, 3)
    assert split(params) == {"layer_0/kernel", "layer_1/kernel"}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        y = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return x + nn.Dense(8)(nn.relu(nn.Dense(16)(y))), None


class Linen(nn.Module):
    is_scanned: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Embed(11, 8)(x) + self.param("pos_emb", nn.initializers.normal(), (1, 3, 8))
        if self.is_scanned:
            rngs = {"split_rngs": {"params": True}}
            x, _ = nn.scan(Block, {"params": 0}, length=3, **rngs)(name="layers")(x, None)
        else:
            x, _ = Block(name="layers_0")(x)
        return nn.Dense(11, name="output")(x)


@pytest.mark.parametrize("is_scanned", [True, False])
def test_flax_linen(is_scanned: bool) -> None:
    params = jax.eval_shape(Linen(is_scanned).init, jax.random.key(0), jnp.ones((1, 3), int))
    prefix = "params/layers" if is_scanned else "params/layers_0"
    attention = f"{prefix}/MultiHeadDotProductAttention_0"
    assert split(params) == {
        *(f"{attention}/{name}/kernel" for name in ("query", "key", "value", "out")),
        *(f"{prefix}/Dense_{i}/kernel" for i in (0, 1)),
    }
    assert not unknown(params)
    # Attention has an axis of heads: behind the rows inward, before the columns outward.
    solver = optim.scale_by_frugal(0.5, optim.projector.columns())
    compact = jax.eval_shape(solver.init, params).part.mu["params"]
    block = compact[prefix.removeprefix("params/")]["MultiHeadDotProductAttention_0"]
    stack = (3,) if is_scanned else ()
    assert block["query"]["kernel"].shape == block["out"]["kernel"].shape == (*stack, 8, 4)


def test_flax_nnx() -> None:
    rngs = nnx.Rngs(0)

    class Model(nnx.Module):
        def __init__(self) -> None:
            self.table = nnx.Embed(11, 8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.convolution = nnx.Conv(8, 8, (3,), rngs=rngs)
            self.up = nnx.Linear(8, 16, rngs=rngs)
            self.lm_head = nnx.Linear(16, 11, rngs=rngs)

    params = nnx.state(Model(), nnx.Param)
    names = ("attention/query", "attention/key", "attention/value", "attention/out", "up")
    assert split(params) == {f"{name}/kernel/value" for name in names}
    assert unknown(params) == {"convolution/kernel/value"}


def test_equinox() -> None:
    """Names alone would not tell a table or a norm of two axes; the classes of its modules do."""
    key = jax.random.key(0)

    class Model(eqx.Module):
        tok: eqx.nn.Embedding
        first: eqx.nn.LayerNorm
        attention: eqx.nn.MultiheadAttention
        block: eqx.nn.Sequential
        cell: eqx.nn.GRUCell
        mlp: eqx.nn.MLP
        lm_head: eqx.nn.Linear

    convolutions = [eqx.nn.Conv1d(4, 4, 4, key=key), eqx.nn.Conv2d(4, 4, 4, key=key)]
    model = Model(
        eqx.nn.Embedding(11, 8, key=key), eqx.nn.LayerNorm((3, 8)),
        eqx.nn.MultiheadAttention(2, 8, key=key), eqx.nn.Sequential(convolutions),
        eqx.nn.GRUCell(8, 8, key=key), eqx.nn.MLP(8, 4, 8, 1, key=key), eqx.nn.Linear(4, 11, key=key),
    )  # fmt: skip
    params = eqx.filter(model, eqx.is_array)
    projections = ("query_proj", "key_proj", "value_proj", "output_proj")
    assert split(params) == {
        *(f"attention/{name}/weight" for name in projections),
        "cell/weight_ih", "cell/weight_hh", "mlp/layers/0/weight", "mlp/layers/1/weight",
    }  # fmt: skip
    assert unknown(params) == {"block/layers/0/weight", "block/layers/1/weight"}


def test_haiku() -> None:
    w, b = jnp.ones((8, 8)), jnp.ones(8)
    params = {
        "embed": {"embeddings": w},
        "linear": {"w": w, "b": b},
        "transformer/~/layer_norm_1": {"scale": b, "offset": b},
        "transformer/h0_attn/query": {"w": w, "b": b},
        "transformer/lm_head": {"w": w},
    }
    assert split(params) == {"linear/w", "transformer/h0_attn/query/w"}


def test_ensembles_and_experts() -> None:
    """The axis of vmap over init, outside of a stack of layers, and that of experts."""
    layers = {"w": jnp.ones((5, 3, 4, 4)), "bias": jnp.ones((5, 3, 4))}
    params = {"layers": layers, "embed": jnp.ones((5, 11, 4)), "out_bias": jnp.ones((5, 4))}
    assert split(params) == {"layers/w"}
    state = jax.eval_shape(optim.scale_by_frugal(0.5).init, params)
    # Every layer of every member by itself.
    assert state.part.mu["layers"]["w"].shape == (15, 2, 4)
    assert split({"experts": {"up": jnp.ones((4, 2, 6)), "down": jnp.ones((4, 6, 2))}}) == {
        "experts/up",
        "experts/down",
    }


@pytest.mark.parametrize(
    ("path", "right"),
    [
        ("output", False), ("output/kernel", False), ("layers_0/output/kernel", True),
        ("attn/output/kernel", True), ("decoder/weight", False), ("decoder/layers_0/fc", True),
        ("policy_head/kernel", False), ("value_head", False), ("multi_head/query", True),
        ("pos_emb", False), ("position_embedding", False), ("wpe", False), ("shared/weight", False),
        ("shared", False), ("mlp/shared_expert/up", True), ("mlp/router/kernel", False),
        ("block_sparse_moe/gate/weight", False), ("gate_proj", True), ("ensemble/kernel", True),
        ("assembly", True), ("logits/kernel", False), ("classifier/dense/kernel", False),
        ("ln_f", False), ("rms_norm/weight", False), ("PreNormBlock_0/Dense_0/kernel", True),
        ("scales", True), ("bias_proj/kernel", True),
    ],
)  # fmt: skip
def test_names(path: str, right: bool) -> None:
    tree: Any = jnp.ones((4, 6))
    for name in reversed(path.split("/")):
        tree = {name: tree}
    assert jax.tree.leaves(optim.linear_weights(tree)) == [right]


def test_unknown_axes_are_told() -> None:
    params = {"conv": jnp.ones((3, 3, 2, 4)), "w": jnp.ones((4, 4)), "embed": jnp.ones((2, 3, 4))}
    with pytest.warns(UserWarning, match=r"^conv \[3, 3, 2, 4\]: left whole, since") as told:
        state = optim.frugal(0.1).init(params)
    assert len(told) == 1
    # Where they are given, or the leaf is left whole on purpose, nothing is to be told.
    spec = optim.linear_weights(params) | {"conv": True}
    optim.frugal(0.1, split=spec).init(params)
    optim.frugal(0.1, split={"conv": False, "w": True, "embed": False}).init(params)
    optim.frugal(0.1).update(params, state, params)
