"""RWKV-7 "Goose" as plain functions of a tree of parameters: a language model whose state does not grow.

Every head of every layer keeps a matrix S that maps keys to values. A token decays it per key channel,
takes out what it holds for one direction, and writes a value for a key (arXiv 2503.14456):
``S = S (diag(w) + a b^T) + v k^T``, and reads ``S r``. Token by token that is :func:`step`; over whole
texts everything else is a product of matrices, and the recurrence is one in chunks.

Parameters have the names of the published checkpoints, with two differences: matrices are
``[inputs, outputs]``, applied as ``x @ w``, and those of all layers are stacked, so that one compiled
layer runs as a scan. Layer 0 uses none of its v0, v1 and v2: its values are what later layers mix in.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int, Key

from eggroll.plan import Planner
from experiments.models import plans
from experiments.models.quantised import linear, look_up
from experiments.models.rwkv7_recurrence import recurrence_chunked, recurrence_scan

Params = dict[str, Any]

# A channel of a state keeps at least exp(-exp(-1/2)) = 0.545 of itself at every token.
FASTEST = math.exp(-0.5)
# That of the published models at every width of their heads.
GROUP_NORM_EPS = 64e-5

ATTENTION = ("receptance", "key", "value", "output", "w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2")
MATRICES = (*(f"blocks/att/{name}" for name in ATTENTION), "blocks/ffn/key", "blocks/ffn/value")
LARGE = (
    *(f"blocks/att/{name}" for name in ("receptance", "key", "value", "output")),
    *("blocks/ffn/key", "blocks/ffn/value"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RWKV7Config:
    """The shape of a model; where a width is 0, the published models' rule is taken.

    Attributes:
        vocab_size: tokens that there are; 65536 with the World tokenizer.
        hidden_size: width of the residual stream.
        num_hidden_layers: blocks of time mixing and channel mixing.
        head_dim: width of a head; its state is head_dim x head_dim.
        intermediate_size: width inside of channel mixing; 4 hidden_size.
        decay_low_rank_dim: rank of what decides the decay (w1, w2).
        a_low_rank_dim: rank of what decides the in-context learning rate (a1, a2).
        v_low_rank_dim: rank of what decides how much of layer 0's values is mixed in (v1, v2).
        gate_low_rank_dim: rank of the output's gate (g1, g2).

    Raises:
        ValueError: for sizes that do not fit each other.

    Example:
        >>> config = RWKV7Config(vocab_size=65536, hidden_size=768, num_hidden_layers=12)
        >>> config.heads, config.intermediate_size, config.decay_low_rank_dim, config.gate_low_rank_dim
        (12, 3072, 64, 128)
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    head_dim: int = 64
    intermediate_size: int = 0
    decay_low_rank_dim: int = 0
    a_low_rank_dim: int = 0
    v_low_rank_dim: int = 0
    gate_low_rank_dim: int = 0

    def __post_init__(self) -> None:
        hidden = self.hidden_size
        in_32s = lambda x: max(32, 32 * round(x / 32))
        chosen = {"intermediate_size": 4 * hidden}
        if hidden > 0:
            chosen["decay_low_rank_dim"] = chosen["a_low_rank_dim"] = in_32s(1.8 * hidden**0.5)
            chosen["v_low_rank_dim"] = in_32s(1.3 * hidden**0.5)
            chosen["gate_low_rank_dim"] = in_32s(0.6 * hidden**0.8)
        for name, value in chosen.items():
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")
        if hidden % self.head_dim:
            raise ValueError(f"hidden_size {hidden} is no multiple of head_dim {self.head_dim}")

    @property
    def context(self) -> None:
        """Texts may have any length."""

    @property
    def heads(self) -> int:
        """Heads of a layer."""
        return self.hidden_size // self.head_dim


class State(NamedTuple):
    """All that a sequence leaves behind.

    Attributes:
        att_x: [layers, hidden], the last input of each layer's time mixing.
        kv: [layers, heads, values, keys], the matrix of each head; float32.
        ffn_x: [layers, hidden], the last input of each layer's channel mixing.
    """

    att_x: Float[Array, "layers hidden"]
    kv: Float[Array, "layers heads width width"]
    ffn_x: Float[Array, "layers hidden"]


def init(key: Key[Array, ""], config: RWKV7Config) -> Params:
    """Parameters to train from, after the published code's: float32.

    Decays and token shifts are spread over channels and layers; what a block adds is zero at first.

    Args:
        key: decides the matrices.
        config: says their shapes.

    Example:
        >>> config = RWKV7Config(vocab_size=7, hidden_size=16, num_hidden_layers=3, head_dim=8)
        >>> params = init(jax.random.key(0), config)
        >>> params["emb"].shape, params["blocks"]["att"]["w1"].shape
        ((7, 16), (3, 16, 32))
    """
    hidden, depth, inner = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    keys = iter(jax.random.split(key, 10))
    layer = jnp.arange(depth)[:, None]
    deep, shallow = layer / max(depth - 1, 1), 1 - layer / depth
    channel = jnp.arange(hidden) / hidden
    along = jnp.arange(hidden) / max(hidden - 1, 1)
    norm = lambda *shape: {"weight": jnp.ones(shape), "bias": jnp.zeros(shape)}
    everywhere = lambda value: jnp.full((depth, hidden), value)

    def uniform(limit: float, *shape: int) -> Array:
        return jax.random.uniform(next(keys), shape, minval=-limit, maxval=limit)

    # The published code's are orthogonal. Entries of the same variance do without the QR of many
    # matrices in one program, in which OpenBLAS can come to wait for itself on few cores.
    def normal(gain: float, *shape: int) -> Array:
        return gain / max(shape[-2:]) ** 0.5 * jax.random.normal(next(keys), shape)

    # The lower a channel and its layer, the more it takes of the token before.
    shifts = {"x_r": 0.2, "x_w": 0.9, "x_k": 0.9, "x_v": 0.9, "x_a": 0.9, "x_g": 0.2}
    added = {"x_k": 0.4, "x_v": 0.6}
    ranks = {
        "w": config.decay_low_rank_dim,
        "a": config.a_low_rank_dim,
        "v": config.v_low_rank_dim,
        "g": config.gate_low_rank_dim,
    }
    att: Params = {
        **{
            name: 1 - channel ** (power * shallow) - added.get(name, 0.0) * deep
            for name, power in shifts.items()
        },
        "w0": -6.5 + 5 * along ** (0.85 + deep**0.5),
        "a0": everywhere(0.0),
        "v0": everywhere(1.0),
        **{f"{name}1": jnp.zeros((depth, hidden, rank)) for name, rank in ranks.items()},
        **{f"{name}2": normal(0.1, depth, rank, hidden) for name, rank in ranks.items()},
        "k_k": everywhere(0.85),
        "k_a": everywhere(1.0),
        "r_k": jnp.zeros((depth, config.heads, config.head_dim)),
        "receptance": uniform(0.5 / hidden**0.5, depth, hidden, hidden),
        "key": uniform(0.05 / hidden**0.5, depth, hidden, hidden),
        "value": uniform(0.5 / hidden**0.5, depth, hidden, hidden),
        "output": jnp.zeros((depth, hidden, hidden)),
        "ln_x": {
            "weight": jnp.broadcast_to(((layer + 1) / depth) ** 0.7, (depth, hidden)),
            "bias": everywhere(0.0),
        },
    }
    for name in ("v0", "v1", "v2"):
        att[name] = att[name].at[0].set(0)
    ffn = {
        "x_k": 1 - channel ** (shallow**4),
        "key": uniform(0.5 / hidden**0.5, depth, hidden, inner),
        "value": jnp.zeros((depth, inner, hidden)),
    }
    return {
        "emb": uniform(1e-4, config.vocab_size, hidden),
        "ln0": norm(hidden),
        "blocks": {"ln1": norm(depth, hidden), "ln2": norm(depth, hidden), "att": att, "ffn": ffn},
        "ln_out": norm(hidden),
        "head": normal(
            0.5 * max(1.0, config.vocab_size / hidden) ** 0.5, hidden, config.vocab_size
        ),
    }


def output_axis(path: str) -> int | None:
    """The axis that :mod:`quantised` takes the scales of a matrix over: that of a token's row, or inputs."""
    if path == "emb":
        return -1
    return -2 if path == "head" or path in LARGE else None


def plan(train: Collection[str] = (), steps: Mapping[str, float] | None = None) -> Planner:
    """Which parameters an `EvolutionStrategy` trains, and by which noise.

    The matrices of the layers get low-rank noise, each layer its own. The rest is frozen, as arXiv
    2511.16652 has it for language models, unless it is named.

    Args:
        train: any of "embeddings", "head", "vectors" (all that is no matrix, by dense noise).
        steps: of a quantised model, `quantised.steps(params)`.

    Raises:
        ValueError: for another name, and (when used) for a quantised model without steps.

    Example:
        >>> config = RWKV7Config(vocab_size=7, hidden_size=64, num_hidden_layers=3)
        >>> leaves = plan()(init(jax.random.key(0), config), rank=1)
        >>> leaves["blocks/att/w1"].treatment, leaves["head"].treatment
        (Matrix(rows=(1,), columns=(2,), batch=(0,), rank=1, sigma=1.0), Frozen())
    """
    return plans.by_group(_group, train, steps)


def _group(path: str) -> plans.Group:
    if path in MATRICES:
        return "matrices"
    groups: dict[str, plans.Group] = {"emb": "embeddings", "head": "head"}
    return groups.get(path, "vectors")


def initial_state(config: RWKV7Config, dtype: DTypeLike = jnp.float32) -> State:
    """The state before a text.

    Args:
        config: of the model.
        dtype: that of the parameters.
    """
    depth, heads, width = config.num_hidden_layers, config.heads, config.head_dim
    x = jnp.zeros((depth, config.hidden_size), dtype)
    return State(x, jnp.zeros((depth, heads, width, width)), x)


def step(
    params: Params, state: State, token: Int[Array, ""], config: RWKV7Config
) -> tuple[Float[Array, "vocab"], State]:
    """Reads one token; gives the logits of the next one and the new state.

    Args:
        params: of :func:`init`, in any float dtype; norms and the recurrence are float32 inside.
        state: of :func:`initial_state`, or the step before.
        token: a number below vocab_size.
        config: of the parameters.
    """
    x, state = _read(params, state, token[None], config, None, recurrence_scan)
    return _logits(params, x[0]), state


def sequence(
    params: Params,
    state: State,
    tokens: Int[Array, "length"],
    config: RWKV7Config,
    length: int | Int[Array, ""] | None = None,
) -> tuple[Float[Array, "length vocab"], State]:
    """Reads a text as a whole: the same as its steps, to rounding.

    Args:
        params: as in :func:`step`.
        state: before the first token.
        tokens: numbers below vocab_size.
        config: of the parameters.
        length: how many of the tokens are real, those after are padding; all by default.

    Returns:
        Logits of the token after each, and the state after the last real one.

    Example:
        >>> import optax
        >>> config = RWKV7Config(vocab_size=7, hidden_size=16, num_hidden_layers=2, head_dim=8)
        >>> params = init(jax.random.key(0), config)
        >>> tokens = jnp.arange(22) % 7
        >>> @jax.value_and_grad
        ... def loss(params):
        ...     logits, _ = sequence(params, initial_state(config), tokens[:-1], config)
        ...     return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:]).mean()
        >>> adam = optax.adam(0.01)
        >>> @jax.jit
        ... def update(params, state):
        ...     value, grads = loss(params)
        ...     updates, state = adam.update(grads, state)
        ...     return optax.apply_updates(params, updates), state, value
        >>> state, losses = adam.init(params), []
        >>> for _ in range(30):
        ...     params, state, value = update(params, state)
        ...     losses.append(float(value))
        >>> losses[0] > 1.9, losses[-1] < 0.2
        (True, True)
    """
    x, state = _read(params, state, tokens, config, length, recurrence_chunked)
    return _logits(params, x), state


def apply(
    params: Params,
    tokens: Int[Array, "length"],
    config: RWKV7Config,
    at: Int[Array, "kept"] | None = None,
    remat: bool = False,
) -> Float[Array, "kept vocab"]:
    """Logits of the token after each of a text's: :func:`sequence` from the state before a text.

    Args:
        params: as in :func:`step`.
        tokens: numbers below vocab_size.
        config: of the parameters.
        at: places whose logits are wanted; all by default.
        remat: a backward pass computes what is inside a layer again instead of holding it.
    """
    start = initial_state(config)
    x, _ = _read(params, start, tokens, config, None, recurrence_chunked, remat=remat)
    return _logits(params, x if at is None else x[at])


def prefill(
    params: Params,
    tokens: Int[Array, "prompt_slots"],
    length: int | Int[Array, ""],
    config: RWKV7Config,
    slots: int,
    prefix: State | None = None,
) -> tuple[Float[Array, "vocab"], State]:
    """Reads a prompt that is padded on its right.

    Args:
        params: as in :func:`step`.
        tokens: the prompt, then padding.
        length: tokens of the prompt, at least 1.
        config: of the parameters.
        slots: tokens that a cache is to hold in all; a state holds any number.
        prefix: the state after a text that the prompt goes on from; that of no text by default.

    Returns:
        Logits of the token after the prompt's last, and the cache for :func:`decode`: the state.
    """
    state = initial_state(config, _dtype(params)) if prefix is None else prefix
    x, state = _read(params, state, tokens, config, length, recurrence_chunked)
    return _logits(params, x[length - 1]), state


def decode(
    params: Params,
    cache: State,
    token: Int[Array, ""],
    t: int | Int[Array, ""],
    config: RWKV7Config,
    prefix: State | None = None,
) -> tuple[Float[Array, "vocab"], State]:
    """:func:`step` as a model with positions has it: t, which token after the prompt, and the prefix, which
    the state has in it, are not used."""
    return step(params, cache, token, config)


# ---------------------------------------------------------------- the parts of a layer


def _read(
    params: Params,
    state: State,
    tokens: Int[Array, "length"],
    config: RWKV7Config,
    length: int | Int[Array, ""] | None,
    recurrence: Callable[..., tuple[Array, Array]],
    remat: bool = False,
) -> tuple[Float[Array, "length hidden"], State]:
    """The last layer's outputs, and the state after the last real token."""
    last = tokens.shape[0] if length is None else length
    real = jnp.arange(tokens.shape[0]) < last

    def shift(x: Array, before: Array) -> tuple[Array, Array]:
        """The token before each one, and the last real one."""
        both = jnp.concatenate([before[None].astype(x.dtype), x])
        return both[:-1], both[last].astype(before.dtype)

    # The state is carried, not scanned over: under a vmap over sequences no axes are moved then, and one
    # layer's is written in place.
    def block(carry: tuple[Array, Array, State], own: Any) -> tuple[Any, None]:
        (x, v_first, states), (i, layer) = carry, own
        state = jax.tree.map(lambda s: lax.dynamic_index_in_dim(s, i, keepdims=False), states)
        normed = _layer_norm(x, layer["ln1"])
        before, att_x = shift(normed, state.att_x)
        q = _projections(layer["att"], normed, before, v_first, i == 0, config)
        # What neither decays, nor is taken out or written, leaves a state as it is.
        keep = lambda x: jnp.where(real[:, None, None], x.astype(jnp.float32), 0)
        k, a, b = keep(q.k), keep(-q.kk), keep(q.kk * q.a)
        y, kv = recurrence(state.kv, keep(q.r), keep(q.log_w), k, keep(q.v), a, b)
        x = x + _output(layer["att"], y, q)
        normed = _layer_norm(x, layer["ln2"])
        before, ffn_x = shift(normed, state.ffn_x)
        x = x + _channel_mix(layer["ffn"], normed, before)
        put = lambda s, new: lax.dynamic_update_index_in_dim(s, new, i, 0)
        states = jax.tree.map(put, states, State(att_x, kv, ffn_x))
        return (x, q.v_first, states), None

    x = _layer_norm(look_up(params["emb"], tokens, _dtype(params)), params["ln0"])
    layers = jnp.arange(config.num_hidden_layers)
    carry = (x, jnp.zeros_like(x), state)
    # Inside of a scan nothing is moved out of the block by common subexpressions.
    block = jax.checkpoint(block, prevent_cse=False) if remat else block
    (x, _, state), _ = lax.scan(block, carry, (layers, params["blocks"]))
    return x, state


class _Projections(NamedTuple):
    """What the recurrence of a layer gets, [length, heads, width]; the others [length, hidden]."""

    r: Array
    log_w: Array
    k: Array
    v: Array
    kk: Array  # a key of norm 1, whose value is replaced
    a: Array  # by how much, 0 to 1
    gate: Array
    v_first: Array  # layer 0's values


def _projections(
    p: Params, x: Array, before: Array, v_first: Array, is_first: Array, config: RWKV7Config
) -> _Projections:
    heads = lambda x: x.reshape(*x.shape[:-1], config.heads, config.head_dim)
    mixed = {name: x + (before - x) * p[f"x_{name}"] for name in "rwkvag"}
    r, k, v = (
        linear(mixed["r"], p["receptance"]),
        linear(mixed["k"], p["key"]),
        linear(mixed["v"], p["value"]),
    )
    w = p["w0"] + jnp.tanh(mixed["w"] @ p["w1"]) @ p["w2"]
    a = jax.nn.sigmoid(p["a0"] + mixed["a"] @ p["a1"] @ p["a2"])
    # In layer 0 the two are the same, so that nothing is mixed whatever v0, v1 and v2 are.
    v_first = jnp.where(is_first, v, v_first)
    v = v + (v_first - v) * jax.nn.sigmoid(p["v0"] + mixed["v"] @ p["v1"] @ p["v2"])
    return _Projections(
        r=heads(r),
        log_w=heads(-FASTEST * jax.nn.sigmoid(w.astype(jnp.float32))),
        k=heads(k * (1 + (a - 1) * p["k_a"])),
        v=heads(v),
        kk=_unit(heads(k * p["k_k"])),
        a=heads(a),
        gate=jax.nn.sigmoid(mixed["g"] @ p["g1"]) @ p["g2"],
        v_first=v_first,
    )


def _output(p: Params, y: Array, q: _Projections) -> Array:
    """What was read, each head normed, with this token's own value beside it."""
    y = _standardised(y, GROUP_NORM_EPS).astype(q.gate.dtype).reshape(q.gate.shape)
    y = y * p["ln_x"]["weight"] + p["ln_x"]["bias"]
    own = jnp.sum(q.r * q.k * p["r_k"], -1, keepdims=True) * q.v
    return linear((y + own.reshape(y.shape)) * q.gate, p["output"])


def _channel_mix(p: Params, x: Array, before: Array) -> Array:
    k = linear(x + (before - x) * p["x_k"], p["key"])
    return linear(jax.nn.relu(k) ** 2, p["value"])


def _dtype(params: Params) -> DTypeLike:
    return params["ln0"]["weight"].dtype


def _logits(params: Params, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
    return linear(_layer_norm(x, params["ln_out"]), params["head"])


def _layer_norm(x: Array, p: Params) -> Array:
    return _standardised(x, 1e-5) * p["weight"] + p["bias"]


def _standardised(x: Array, eps: float) -> Array:
    """Mean 0 and variance 1 over the last axis, in float32, rounded to the dtype of x."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + eps)
    return wide.astype(x.dtype)


def _unit(x: Array) -> Array:
    """x over its norm, in float32; zeros stay zeros, and so does their gradient."""
    wide = x.astype(jnp.float32)
    return wide * lax.rsqrt(jnp.maximum(jnp.sum(wide**2, -1, keepdims=True), 1e-24))
