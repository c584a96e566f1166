"""EGG: a recurrent language model of bytes in int8 (arXiv 2511.16652), as plain functions.

Everything is int8 in [-127, 127] or int32, and 16 stands for 1. A block is ``x += GRU(LN x)``,
``x += W2 (W1 LN x)``; saturation is the only non-linearity. No operation has a float in it, and every edge
is decided here: divisions round downwards, sums saturate at +-127, a vector of zeros is normalised to
zeros, -128 is never used.

`exact_bits` alone is in floats: the softmax loss of the same logits, to report beside the integer one.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int8, Int32, Integer, Key

from eggroll import Dense, Matrix
from eggroll.integer import floor_divide, saturate
from eggroll.plan import Planner, by_shape

Params = dict[str, Any]

BYTES = 256


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a model.

    Attributes:
        layers: blocks.
        width: of the residual stream and of the hidden state; at most 4096, so that int32 holds a
            product with the widest fan-in, 4 * width.
    """

    layers: int
    width: int

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}")
        if not 1 <= self.width <= 4096:
            raise ValueError(f"width must be from 1 to 4096, got {self.width}")

    @property
    def parameters(self) -> int:
        """How many parameters the model has, a byte each."""
        return 513 * self.width + self.layers * (4 * self.width + 12 * self.width**2)


CONFIGS = {
    "tiny": Config(layers=1, width=32),
    "2L-64D": Config(layers=2, width=64),
    "4L-128D": Config(layers=4, width=128),
    "6L-256D": Config(layers=6, width=256),  # the paper's
    "12L-512D": Config(layers=12, width=512),
}


def init(key: Key[Array, ""], config: Config) -> Params:
    """Random parameters: matrices round(16 N(0, 1)), gains of layer norms 16, biases 0.

    Args:
        key: of `jax.random.key`.
        config: the shape.

    Example:
        >>> params = init(jax.random.key(0), CONFIGS["6L-256D"])
        >>> sum(x.size for x in jax.tree.leaves(params)), CONFIGS["6L-256D"].parameters
        (4856064, 4856064)
    """
    layers, width = config.layers, config.width
    shapes = {
        "embed": (BYTES, width),
        "head": (width, BYTES),
        "wf": (layers, width, width),
        "uf": (layers, width, width),
        "wh": (layers, width, width),
        "uh": (layers, width, width),
        "w1": (layers, width, 4 * width),
        "w2": (layers, 4 * width, width),
    }
    keys = jax.random.split(key, len(shapes))

    def matrix(key: Array, shape: tuple[int, ...]) -> Array:
        drawn = jnp.round(16 * jax.random.normal(key, shape)).astype(jnp.int32)
        return saturate(drawn).astype(jnp.int8)

    m = {name: matrix(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}
    gains, zeros = jnp.full((layers, width), 16, jnp.int8), jnp.zeros((layers, width), jnp.int8)
    names = ("wf", "uf", "wh", "uh", "w1", "w2")
    return {
        "embed": m["embed"],
        "layers": {
            "ln1": gains, "ln2": gains, "bf": zeros, "bh": zeros, **{name: m[name] for name in names}
        },
        "ln": gains[0],
        "head": m["head"],
    }  # fmt: skip


def plan() -> Planner:
    """Noise of its own for every layer of the stack, at low rank for matrices; for `EvolutionStrategy`.

    Example:
        >>> leaf = plan()(init(jax.random.key(0), CONFIGS["2L-64D"]), rank=1)["layers/w1"]
        >>> leaf.treatment
        Matrix(rows=(1,), columns=(2,), batch=(0,), rank=1, sigma=1.0)
    """
    stacked = {name: Matrix(rows=1, columns=2, batch=0) for name in ("layers/w*", "layers/u*")}
    return by_shape({"layers/*": Dense(), **stacked})


def initial_state(config: Config) -> Int8[Array, "layers width"]:
    """The hidden state before a document."""
    return jnp.zeros((config.layers, config.width), jnp.int8)


def step(
    params: Params, state: Int8[Array, "layers width"], byte: Integer[Array, ""]
) -> tuple[Int8[Array, "layers width"], Int8[Array, "256"]]:
    """Reads one byte; gives the new hidden state and the logits of the next byte, in 1/16 bit.

    Byte 0 stands before every document: the state is taken as zero when it is read.

    Args:
        params: of `init`.
        state: of `initial_state`, or the step before.
        byte: 0 to 255, any integer type.
    """
    state, x = read(params, state, byte)
    return state, predict(params["head"], x)


def read(
    params: Params, state: Int8[Array, "layers width"], byte: Integer[Array, ""]
) -> tuple[Int8[Array, "layers width"], Int8[Array, "width"]]:
    """The first part of `step`: the new hidden state, and what the head receives."""
    byte = byte.astype(jnp.int32)
    state = jnp.where(byte == 0, jnp.zeros_like(state), state)
    # Stacked layers in a scan: unrolled, XLA's CPU compiler works out the element-wise chain of one
    # layer again in each of the next ones, six times as slow.
    layers = jnp.arange(state.shape[0], dtype=jnp.int32)
    x, state = lax.scan(_block, params["embed"][byte], (layers, params["layers"], state))
    return state, _layer_norm(x, params["ln"])


def predict(head: Int8[Array, "width 256"], x: Int8[Array, "width"]) -> Int8[Array, "256"]:
    """The second part of `step`: the logits, in 1/16 bit."""
    return _product(x, head)


def sequence(
    params: Params, state: Int8[Array, "layers width"], tokens: Integer[Array, "tokens"]
) -> tuple[Int8[Array, "layers width"], Int32[Array, ""]]:
    """Reads all bytes but the last; gives the new state and the loss of predicting all but the first.

    Args:
        params: of `init`.
        state: before the first byte.
        tokens: T + 1 bytes.

    Returns:
        The state after T bytes, and the sum of `loss` over T predictions, in 1/16 bit.

    Example:
        >>> config = Config(layers=1, width=8)
        >>> params = init(jax.random.key(0), config)
        >>> text = jnp.frombuffer(b"\\0to be or not to be", jnp.uint8)
        >>> state, total = sequence(params, initial_state(config), text)
        >>> state.shape, 3 < int(total) / 16 / (len(text) - 1) < 30
        ((1, 8), True)
    """
    tokens = tokens.astype(jnp.int32)

    def one(carry: tuple[Array, Array], pair: tuple[Array, Array]) -> tuple[Any, None]:
        state, total = carry
        byte, target = pair
        state, logits = step(params, state, byte)
        return (state, total + loss(logits, target)), None

    carry = (state, jnp.zeros((), jnp.int32))
    return lax.scan(one, carry, (tokens[:-1], tokens[1:]))[0]


def loss(logits: Int8[Array, "256"], target: Integer[Array, ""]) -> Int32[Array, ""]:
    """``log2(sum 2^(y / 16)) - y[target] / 16`` of ``y = logits + 128``, in 1/16 bit, rounded down.

    Rounded down twice, as the paper's tables do: the terms to 1/16, the logarithm to 1/16 bit. It reads
    up to 0.063 bit below `exact_bits`, half of that on average.

    Example:
        >>> int(loss(jnp.zeros(256, jnp.int8), jnp.int32(7)))  # 8 bits
        128
    """
    _, total = _powers(logits)
    zeros = lax.clz(total)
    # The leading one at bit 30; how many of the powers of 2^(1/16) are reached is the fraction.
    mantissa = total << (zeros - 1)
    fraction = jnp.sum(mantissa >= jnp.asarray(_ROOTS), dtype=jnp.int32)
    logarithm = 16 * (31 - zeros) + fraction - 64
    return logarithm - (logits[target.astype(jnp.int32)].astype(jnp.int32) + 128)


def error(logits: Int8[Array, "256"], target: Integer[Array, ""]) -> Int32[Array, "256"]:
    """``127 * 2^7 (softmax - onehot(target))``, rounded: the derivative of the loss by the logits.

    The softmax is that of the powers in `loss`, to 15 bits. Int8 would not do: the shares of most bytes
    are below 1/254, and without them a model never learns to give those bytes less.

    Example:
        >>> found = error(jnp.zeros(256, jnp.int8).at[7].set(127), jnp.int32(9))
        >>> int(found[7]), int(found[9]), int(found[0])  # the softmax of entry 7 is 0.49
        (7968, -16223, 33)
    """
    powers, total = _powers(logits)
    # The total is at least 2^12. Scaled so that it has 15 bits, a power times the quotient fits 29.
    shift = 19 - lax.clz(total)
    shares = (powers << 2) >> shift
    share = lax.div(jnp.int32(127 << 22), (total << 2) >> shift)
    softmax = (shares * share + (1 << 14)) >> 15
    hit = jnp.arange(BYTES, dtype=jnp.int32) == target.astype(jnp.int32)
    return softmax - jnp.where(hit, 127 << 7, 0)


def exact_bits(
    logits: Int8[Array, "*batch 256"], target: Integer[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """The softmax cross-entropy of the same logits in floats, in bits: for reports.

    Example:
        >>> exact_bits(jnp.zeros(256, jnp.int8), jnp.int32(7)).item()
        8.0
    """
    y = logits.astype(jnp.float32) / 16
    highest = y.max(-1, keepdims=True)
    total = jnp.log2(jnp.exp2(y - highest).sum(-1)) + highest[..., 0]
    return total - jnp.take_along_axis(y, target[..., None].astype(jnp.int32), -1)[..., 0]


# ---------------------------------------------------------------- the parts of a block and of the loss


def _powers(logits: Int8[Array, "256"]) -> tuple[Int32[Array, "256"], Int32[Array, ""]]:
    """``16 * 2^(y / 16)`` of ``y = logits + 128``, each rounded down, and their sum."""
    y = logits.astype(jnp.int32) + 128
    # 16 * 2^(y/16) = 2^(k/16) * 2^(4+q) with y = 16 q + k; at most 2^20 each, 2^28 together.
    powers = jnp.asarray(_POWERS)[y & 15] >> (15 - (y >> 4))
    return powers, powers.sum(dtype=jnp.int32)


def _block(
    x: Int8[Array, "width"], layer: tuple[Int32[Array, ""], Params, Int8[Array, "width"]]
) -> tuple[Int8[Array, "width"], Int8[Array, "width"]]:
    i, p, state = layer
    # XLA's CPU compiler works the element-wise chain of the state out again in each of the five
    # places where it is used (an eighth of a perturbed forward pass), but what a branch returns it
    # always stores: hence a branch there, which is always taken.
    state = lax.platform_dependent(
        i,
        p,
        x,
        state,
        cpu=lambda i, *rest: lax.cond(i >= 0, _recur, lambda p, x, s: s, *rest),
        default=lambda i, *rest: _recur(*rest),
    )
    x = _add(x, state)
    return _add(x, _product(_product(_layer_norm(x, p["ln2"]), p["w1"]), p["w2"])), state


def _recur(p: Params, x: Int8[Array, "width"], s: Int8[Array, "width"]) -> Int8[Array, "width"]:
    return _gru(p, _layer_norm(x, p["ln1"]), s)


def _gru(p: Params, u: Int8[Array, "width"], s: Int8[Array, "width"]) -> Int8[Array, "width"]:
    """A minimal gated unit whose sigmoid and tanh are identities cut off at +-127."""
    gate = 127 + _add(_product(u, p["wf"]), _product(s, p["uf"]), p["bf"]).astype(jnp.int32)
    kept = ((gate * s) >> 8).astype(jnp.int8)
    new = _add(_product(u, p["wh"]), _product(kept, p["uh"]), p["bh"])
    # Between s and new, since 0 <= gate <= 254: never out of range.
    return (s + ((gate * (new.astype(jnp.int32) - s)) >> 8)).astype(jnp.int8)


def _product(u: Int8[Array, "n"], m: Int8[Array, "n k"]) -> Int8[Array, "k"]:
    """``u m`` over ``16 floor(sqrt(n))``, rounded down, saturated.

    int32 holds the sum for n up to 2^17; int8 goes in as it is, since its product is the fast one.
    """
    total = lax.dot(u, m, preferred_element_type=jnp.int32)
    return saturate(floor_divide(total, 16 * math.isqrt(u.shape[0]))).astype(jnp.int8)


def _add(*terms: Int8[Array, "n"]) -> Int8[Array, "n"]:
    total = sum((x.astype(jnp.int32) for x in terms[1:]), terms[0].astype(jnp.int32))
    return saturate(total).astype(jnp.int8)


def _layer_norm(u: Int8[Array, "n"], gain: Int8[Array, "n"]) -> Int8[Array, "n"]:
    """``(u gain) / mean |u|``, rounded down, saturated; zeros where the mean rounds down to 0.

    Without a division: for ``0 <= y <= 255 d`` and ``1 <= d <= 127``, ``floor(y / d)`` is
    ``(y ceil(2^22 / d)) >> 22``, and y ceil(2^22 / d) < 2^31. Adding 128 d first makes all that is not
    saturated lie there.
    """
    d = jnp.abs(u.astype(jnp.int32)).sum(dtype=jnp.int32) // u.shape[0]
    y = jnp.clip(u.astype(jnp.int32) * gain + 128 * d, d, 255 * d)
    offset = jnp.where(d == 0, 0, 128)
    return (((y * jnp.asarray(_INVERSES)[d]) >> 22) - offset).astype(jnp.int8)


# 2^(k/16 + 19), so that a shift by 15 - q gives floor(2^(4 + q + k/16)) for q up to 15.
_POWERS = np.array([math.floor(2 ** (k / 16 + 19)) for k in range(16)], np.int32)
# A number in [2^30, 2^31) has the logarithm 30 + k/16, rounded down, where it reaches k of these.
_ROOTS = np.array([math.ceil(2 ** (k / 16 + 30)) for k in range(1, 16)], np.int32)
_INVERSES = np.array([0] + [-(-(2**22) // d) for d in range(1, 128)], np.int32)
