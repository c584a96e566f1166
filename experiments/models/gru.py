"""A recurrent language model of bytes in float32, of the shape of EGG (arXiv 2511.16652), as plain functions.

A block is ``x += GRU(norm x); x += MLP(norm x)``, the GRU of the minimal gated kind: one gate both forgets
and updates. Entries of matrices are of order one, and a product is divided by the root of its length, as
in EGG; the logits are in bits.

"clip" gates are EGG's own, in floats: identities cut off at both ends stand for sigmoid and tanh, and there
is nothing between the two matrices of the MLP. "smooth" ones are the ordinary sigmoid, tanh and GELU, as suit
backpropagation.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

Params = dict[str, Any]
Gates = Literal["clip", "smooth"]

BYTES = 256
# EGG's integers end at 127, and 16 of them are 1.
LARGEST = 127 / 16


@dataclass(frozen=True, kw_only=True)
class GRUConfig:
    """The shape of a model.

    Attributes:
        layers: blocks.
        width: of the residual stream and the hidden states.
        gates: what stands for sigmoid and tanh.
    """

    layers: int
    width: int
    gates: Gates = "smooth"


def init(key: Key[Array, ""], config: GRUConfig) -> Params:
    """Parameters at the start: normal matrices, gains of ones, biases of zeros.

    There are ``513 width + layers (4 width + 12 width^2)`` of them, of the names and shapes of EGG's.

    Example:
        >>> params = init(jax.random.key(0), GRUConfig(layers=2, width=8))
        >>> sum(leaf.size for leaf in jax.tree.leaves(params)) == 513 * 8 + 2 * (4 * 8 + 12 * 64)
        True
    """
    layers, width = config.layers, config.width
    shapes = {
        "embed": (BYTES, width),
        "head": (width, BYTES),
        **{name: (layers, width, width) for name in ("wf", "uf", "wh", "uh")},
        "w1": (layers, width, 4 * width),
        "w2": (layers, 4 * width, width),
    }
    keys = jax.random.split(key, len(shapes))
    drawn = {
        name: jax.random.normal(one, shape)
        for one, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    ends = {name: drawn.pop(name) for name in ("embed", "head")}
    constants = {
        **{name: jnp.ones((layers, width)) for name in ("ln1", "ln2")},
        **{name: jnp.zeros((layers, width)) for name in ("bf", "bh")},
    }
    return {**ends, "ln": jnp.ones(width), "layers": {**drawn, **constants}}


def initial_state(config: GRUConfig) -> Float[Array, "layers width"]:
    """The hidden state at the beginning of a document."""
    return jnp.zeros((config.layers, config.width))


def step(
    params: Params, state: Float[Array, "layers width"], byte: Int[Array, ""], config: GRUConfig
) -> tuple[Float[Array, "layers width"], Float[Array, "256"]]:
    """One byte more: the next hidden state, and logits in bits of the byte after it.

    A byte 0 begins a document: the state before it is forgotten.
    """
    state, x = read(params, state, byte, config)
    return state, predict(params["head"], x)


def read(
    params: Params, state: Float[Array, "layers width"], byte: Int[Array, ""], config: GRUConfig
) -> tuple[Float[Array, "layers width"], Float[Array, "width"]]:
    """The first part of `step`: the next hidden state, and what the head receives."""
    state = jnp.where(byte == 0, 0, state)

    def block(x: Array, own: tuple[Params, Array]) -> tuple[Array, Array]:
        layer, s = own
        s = gated(layer, norm(x, layer["ln1"]), s, config.gates)
        x = x + s
        inner = times(norm(x, layer["ln2"]), layer["w1"])
        x = x + times(inner if config.gates == "clip" else jax.nn.gelu(inner), layer["w2"])
        return cut(x) if config.gates == "clip" else x, s

    x, state = jax.lax.scan(block, params["embed"][byte], (params["layers"], state))
    return state, norm(x, params["ln"])


def predict(
    head: Float[Array, "width 256"], x: Float[Array, "*batch width"]
) -> Float[Array, "*batch 256"]:
    """The second part of `step`: logits in bits."""
    return times(x, head)


def gated(
    layer: Params, u: Float[Array, "width"], s: Float[Array, "width"], gates: Gates
) -> Float[Array, "width"]:
    """The next hidden state of a layer."""
    f = times(u, layer["wf"]) + times(s, layer["uf"]) + layer["bf"]
    f = (cut(f) + LARGEST) / (2 * LARGEST) if gates == "clip" else jax.nn.sigmoid(f)
    h = times(u, layer["wh"]) + times(f * s, layer["uh"]) + layer["bh"]
    h = cut(h) if gates == "clip" else jnp.tanh(h)
    return s + f * (h - s)


def times(
    x: Float[Array, "*batch inputs"], w: Float[Array, "inputs outputs"]
) -> Float[Array, "*batch outputs"]:
    """A product of the size of its factors."""
    return x @ w / x.shape[-1] ** 0.5


def norm(x: Float[Array, "width"], gain: Float[Array, "width"]) -> Float[Array, "width"]:
    """x over its mean magnitude, times a gain."""
    return x / jnp.maximum(jnp.mean(jnp.abs(x)), 1e-6) * gain


def cut(x: Array) -> Array:
    """x within the range of EGG's integers."""
    return jnp.clip(x, -LARGEST, LARGEST)
