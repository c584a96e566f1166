"""A decoder of the Llama, Qwen2 and Qwen3 family as plain functions of a tree of parameters.

Names of settings and parameters are those of Hugging Face's Llama, with two differences: matrices are
``[inputs, outputs]``, applied as ``x @ w``, and those of all layers are stacked, so that one compiled
layer runs as a scan over the leading axis. Qwen2 adds biases to queries, keys and values (``qkv_bias``),
Qwen3 an RMSNorm of every head of queries and keys (``qk_norm``).

`apply` reads whole texts; `prefill` and `decode` write, one token at a time, with the keys and values of
earlier tokens in a `Cache`. Parameters enter products, look-ups, sums and norms alone, so that evolution
strategies perturb them at low rank (`plan`) without building one member's matrices.

Touvron et al., "LLaMA", arXiv 2302.13971; Grattafiori et al., "Llama 3", arXiv 2407.21783; Qwen2: arXiv
2407.10671; Qwen3: arXiv 2505.09388. `decoder_parts` has the papers of the parts of a layer.
"""

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from eggroll.plan import Planner
from experiments.models import plans
from experiments.models.decoder_parts import (
    Before,
    RopeScaling,
    attend,
    attend_causally,
    mlp,
    rms_norm,
    rotate,
)
from experiments.models.quantised import linear, look_up, transposed

Params = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The shape of a decoder; names and defaults are those of Hugging Face's LlamaConfig.

    Attributes:
        vocab_size: tokens that there are.
        hidden_size: width of the residual stream.
        intermediate_size: width inside of an MLP.
        num_hidden_layers: blocks of attention and MLP.
        num_attention_heads: heads of the queries.
        num_key_value_heads: heads of keys and values, each for as many of the queries' as fit; as many
            as there are by default.
        head_dim: width of a head, an even number; hidden_size / num_attention_heads by default.
        qkv_bias: queries, keys and values have biases (Qwen2).
        qk_norm: every head of queries and keys is normalised before it turns (Qwen3).
        rope_theta: base of the wavelengths of rotary positions.
        rope_scaling: how they were stretched, if they were.
        rms_norm_eps: added to the mean square.
        tie_word_embeddings: the head is the transposed embedding.
        initializer_range: standard deviation of all matrices at the start.
        max_position_embeddings: tokens of the longest text that the model was made for; None for any.

    Raises:
        ValueError: for sizes that do not fit each other.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        heads = self.num_attention_heads
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {heads}: "
                "choose one, or name head_dim"
            )
        if self.width % 2:
            raise ValueError(f"heads are {self.width} wide: rotary positions need an even head_dim")
        if heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads {heads} is no multiple of num_key_value_heads {self.kv_heads}"
            )

    @property
    def context(self) -> int | None:
        """Tokens of the longest text, if there is one."""
        return self.max_position_embeddings

    @property
    def width(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "length"],
    meta_fields=["prompt_slots"],
)
@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens of one sequence; a tree, to be mapped over many.

    What a text shares with others is in a cache of its own, the `prefix`.

    Attributes:
        keys: ``[layers, slots, kv_heads, width]``; the prompt, right-padded, then what was generated.
        values: of the same shape.
        length: int32 ``[]``, the prompt's tokens without the padding.
        prompt_slots: slots of the padded prompt; a number of the program, not an array.
    """

    # No shapes here: where trees are mapped, something else than arrays stands in their place.
    keys: Any
    values: Any
    length: Any
    prompt_slots: int


def init(key: Key[Array, ""], config: TransformerConfig) -> Params:
    """Parameters as Hugging Face begins with them: normal matrices, norms 1, biases 0; float32.

    Args:
        key: decides the matrices.
        config: says their shapes.

    Example:
        >>> config = TransformerConfig(vocab_size=7, hidden_size=8, intermediate_size=12,
        ...                            num_hidden_layers=3, num_attention_heads=2)
        >>> params = init(jax.random.key(0), config)
        >>> params["embed_tokens"].shape, params["layers"]["up_proj"].shape
        ((7, 8), (3, 8, 12))
    """
    hidden, inner, depth = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    queries, keys = config.num_attention_heads * config.width, config.kv_heads * config.width
    shapes = {
        "q_proj": (depth, hidden, queries),
        "k_proj": (depth, hidden, keys),
        "v_proj": (depth, hidden, keys),
        "o_proj": (depth, queries, hidden),
        "gate_proj": (depth, hidden, inner),
        "up_proj": (depth, hidden, inner),
        "down_proj": (depth, inner, hidden),
        "embed_tokens": (config.vocab_size, hidden),
        "lm_head": (hidden, config.vocab_size),
    }
    drawn = {
        name: config.initializer_range * jax.random.normal(one, shape)
        for one, (name, shape) in zip(
            jax.random.split(key, len(shapes)), shapes.items(), strict=True
        )
    }
    params = {"embed_tokens": drawn.pop("embed_tokens"), "norm": jnp.ones(hidden)}
    head = drawn.pop("lm_head")
    if not config.tie_word_embeddings:
        params["lm_head"] = head
    vectors = {
        name: jnp.ones((depth, hidden)) for name in ("input_layernorm", "post_attention_layernorm")
    }
    if config.qkv_bias:
        sizes = {"q_bias": queries, "k_bias": keys, "v_bias": keys}
        vectors |= {name: jnp.zeros((depth, size)) for name, size in sizes.items()}
    if config.qk_norm:
        vectors |= {name: jnp.ones((depth, config.width)) for name in ("q_norm", "k_norm")}
    return {**params, "layers": {**drawn, **vectors}}


def apply(
    params: Params,
    tokens: Int[Array, "*batch length"],
    config: TransformerConfig,
    at: Int[Array, "kept"] | None = None,
    remat: bool = False,
    unroll: int = 1,
) -> Float[Array, "*batch kept vocab"]:
    """Logits of the token after each of the tokens, or after those at some places.

    Args:
        params: of :func:`init`, in any float dtype; norms, positions and attention weights are float32
            inside.
        tokens: numbers below vocab_size.
        config: of the parameters.
        at: places whose logits are wanted; all by default.
        remat: a backward pass computes what is inside a layer again instead of holding it, with memory for
            what goes from layer to layer alone.
        unroll: layers to a step of the scan; all of a few take less time and longer to compile.

    Returns:
        Logits in the dtype of the parameters.

    Example:
        >>> import optax
        >>> config = TransformerConfig(vocab_size=7, hidden_size=8, intermediate_size=12,
        ...                            num_hidden_layers=2, num_attention_heads=2)
        >>> params = init(jax.random.key(0), config)
        >>> tokens = jnp.arange(8)[None] % 7                    # what comes after each is clear
        >>> @jax.value_and_grad
        ... def loss(params):
        ...     logits = apply(params, tokens[:, :-1], config)
        ...     return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
        >>> adam = optax.adam(0.01)
        >>> @jax.jit
        ... def step(params, state):
        ...     value, grads = loss(params)
        ...     updates, state = adam.update(grads, state)
        ...     return optax.apply_updates(params, updates), state, value
        >>> state, losses = adam.init(params), []
        >>> for _ in range(50):
        ...     params, state, value = step(params, state)
        ...     losses.append(float(value))
        >>> losses[0] > 1.9, losses[-1] < 0.1
        (True, True)
    """
    x, _ = _read(params, tokens, config, unroll=unroll, remat=remat)
    return _logits(params, x if at is None else x[..., at, :], config)


def features(
    params: Params, tokens: Int[Array, "*batch length"], config: TransformerConfig
) -> Float[Array, "*batch length hidden"]:
    """What the head of :func:`apply` receives: the logits of an untied model are ``x @ lm_head``."""
    x, _ = _read(params, tokens, config)
    return rms_norm(x, params["norm"], config.rms_norm_eps)


def prefill(
    params: Params,
    tokens: Int[Array, "prompt_slots"],
    length: Int[Array, ""] | int,
    config: TransformerConfig,
    slots: int,
    prefix: Cache | None = None,
) -> tuple[Float[Array, "vocab"], Cache]:
    """Reads a prompt; `decode` goes on from there.

    Args:
        params: of :func:`init`.
        tokens: the prompt, padded behind its end with whatever tokens.
        length: its tokens without the padding, at least 1.
        config: of the parameters.
        slots: room in the cache: those of the padded prompt, and one for each token to be decoded.
        prefix: the cache of a text without padding that the prompt goes on from, and the sequences of a
            batch may share; `decode` needs it too.

    Returns:
        Logits of the first token after the prompt, and the cache.

    Raises:
        ValueError: for fewer slots than the padded prompt has.

    Example:
        Two prompts of different lengths, and four more tokens of each.

        >>> config = TransformerConfig(vocab_size=7, hidden_size=8, intermediate_size=12,
        ...                            num_hidden_layers=2, num_attention_heads=2)
        >>> params = init(jax.random.key(0), config)
        >>> def write(prompt, length):
        ...     logits, cache = prefill(params, prompt, length, config, slots=3 + 4)
        ...     def one(carry, t):
        ...         logits, cache = carry
        ...         token = logits.argmax()
        ...         return decode(params, cache, token, t, config), token
        ...     return jax.lax.scan(one, (logits, cache), jnp.arange(4))[1]
        >>> jax.vmap(write)(jnp.array([[1, 2, 3], [4, 0, 0]]), jnp.array([3, 1])).shape
        (2, 4)
    """
    prompt_slots = tokens.shape[0]
    if slots < prompt_slots:
        raise ValueError(f"slots={slots} is less than the {prompt_slots} of the padded prompt")
    x, kept = _read(params, tokens, config, keep=True, prefix=prefix)
    # What is behind the end of the prompt is never seen by it, and `decode` looks past it.
    keys, values = (jnp.pad(y, [(0, 0), (0, slots - prompt_slots), (0, 0), (0, 0)]) for y in kept)
    length = jnp.asarray(length, jnp.int32)
    last = lax.dynamic_slice_in_dim(x, length - 1, 1)
    return _logits(params, last, config)[0], Cache(keys, values, length, prompt_slots)


def decode(
    params: Params,
    cache: Cache,
    token: Int[Array, ""],
    t: Int[Array, ""] | int,
    config: TransformerConfig,
    prefix: Cache | None = None,
) -> tuple[Float[Array, "vocab"], Cache]:
    """Reads the t-th token after the prompt.

    Args:
        params: of :func:`init`.
        cache: of :func:`prefill`, or of the token before.
        token: the token that was chosen.
        t: 0 for the first after the prompt, and so on, below slots - prompt_slots. Under a vmap over
            sequences it is one number for all of them, whatever their lengths: they write to one slot
            then, which is cheap, where a slot of each one's own is not.
        config: of the parameters.
        prefix: that of :func:`prefill`.

    Returns:
        Logits of the token after it, and the cache with its keys and values.
    """
    slot = cache.prompt_slots + jnp.asarray(t, jnp.int32)
    at = jnp.arange(cache.keys.shape[1])
    visible = (at < cache.length) | ((at >= cache.prompt_slots) & (at <= slot))
    position = (_places_before(prefix) + cache.length + t)[None]

    def block(
        carry: tuple[Array, Array, Array], scanned: tuple[Array, Params]
    ) -> tuple[tuple[Array, Array, Array], None]:
        # The cache is carried, not scanned over: one slot is written in place, and under a vmap no
        # axes are moved.
        (x, keys, values), (i, layer) = carry, scanned
        q, k, v = _project(layer, x, position, config)
        keys = lax.dynamic_update_slice(keys, k[None], (i, slot, 0, 0))
        values = lax.dynamic_update_slice(values, v[None], (i, slot, 0, 0))
        here = lambda whole: lax.dynamic_index_in_dim(whole, i, keepdims=False)
        seen = attend(q, here(keys), here(values), visible[None], _before(prefix, i))
        return (_finish(layer, x, seen, config), keys, values), None

    layers = jnp.arange(config.num_hidden_layers), params["layers"]
    carry = (_embed(params, token[None]), cache.keys, cache.values)
    (x, keys, values), _ = lax.scan(block, carry, layers)
    return _logits(params, x, config)[0], Cache(keys, values, cache.length, cache.prompt_slots)


def output_axis(path: str) -> int | None:
    """The axis that :mod:`quantised` takes the scales of a matrix over: that of a token's row, or inputs."""
    if path == "embed_tokens":
        return -1
    return -2 if path.endswith("_proj") or path == "lm_head" else None


def plan(train: Collection[str] = (), steps: Mapping[str, float] | None = None) -> Planner:
    """Which parameters an `EvolutionStrategy` trains, and by which noise.

    The matrices of the layers get low-rank noise, each layer its own. The rest is frozen, as arXiv
    2511.16652 has it for language models, unless it is named.

    Args:
        train: any of "embeddings", "head", "vectors" (norms and biases).
        steps: of a quantised model, `quantised.steps(params)`.

    Raises:
        ValueError: for another name, and (when used) for the head of a model without one of its own, or a
            quantised model without steps.

    Example:
        >>> config = TransformerConfig(vocab_size=7, hidden_size=8, intermediate_size=12,
        ...                            num_hidden_layers=3, num_attention_heads=2)
        >>> leaves = plan(train=["vectors"])(init(jax.random.key(0), config), rank=1)
        >>> leaves["layers/up_proj"].treatment
        Matrix(rows=(1,), columns=(2,), batch=(0,), rank=1, sigma=1.0)
        >>> leaves["norm"].treatment, leaves["embed_tokens"].treatment
        (Dense(sigma=1.0), Frozen())
    """
    return plans.by_group(_group, train, steps)


def _group(path: str) -> plans.Group:
    if path.endswith("_proj"):
        return "matrices"
    groups: dict[str, plans.Group] = {"embed_tokens": "embeddings", "lm_head": "head"}
    return groups.get(path, "vectors")


# ---------------------------------------------------------------- the parts of a layer


def _read(
    params: Params,
    tokens: Int[Array, "*batch length"],
    config: TransformerConfig,
    *,
    unroll: int = 1,
    remat: bool = False,
    keep: bool = False,
    prefix: Cache | None = None,
) -> tuple[Float[Array, "*batch length hidden"], Any]:
    """The residual stream after all layers; every token looks at itself and those before it.

    Args:
        params: of :func:`init`.
        tokens: of whole texts.
        config: of the parameters.
        unroll: layers to a step of the scan.
        remat: a backward pass computes what is inside a layer again.
        keep: also return keys and values, ``[layers, *batch, length, kv_heads, width]``.
        prefix: the cache of a text that the texts go on from.
    """
    positions = _places_before(prefix) + jnp.arange(tokens.shape[-1])

    def block(x: Array, scanned: tuple[Array, Params]) -> tuple[Array, Any]:
        i, layer = scanned
        q, k, v = _project(layer, x, positions, config)
        seen = attend_causally(q, k, v, _before(prefix, i))
        return _finish(layer, x, seen, config), (k, v) if keep else None

    layers = jnp.arange(config.num_hidden_layers), params["layers"]
    # Inside of a scan nothing is moved out of the block by common subexpressions.
    block = jax.checkpoint(block, prevent_cse=False) if remat else block
    return lax.scan(block, _embed(params, tokens), layers, unroll=unroll)


def _places_before(prefix: Cache | None) -> int:
    """Tokens of a prefix."""
    return 0 if prefix is None else prefix.prompt_slots


def _before(prefix: Cache | None, i: Int[Array, ""]) -> Before | None:
    """Keys and values of a prefix in layer i."""
    if prefix is None:
        return None
    # Looked up rather than scanned over: under a vmap no axes are moved.
    here = lambda whole: lax.dynamic_index_in_dim(whole, i, keepdims=False)
    return Before(here(prefix.keys), here(prefix.values))


def _embed(
    params: Params, tokens: Int[Array, "*batch length"]
) -> Float[Array, "*batch length hidden"]:
    return look_up(params["embed_tokens"], tokens, params["norm"].dtype)


def _logits(
    params: Params, x: Float[Array, "*batch hidden"], config: TransformerConfig
) -> Float[Array, "*batch vocab"]:
    x = rms_norm(x, params["norm"], config.rms_norm_eps)
    if not config.tie_word_embeddings:
        return linear(x, params["lm_head"])
    return linear(x, transposed(params["embed_tokens"]))


def _project(
    layer: Params,
    x: Float[Array, "*batch length hidden"],
    positions: Int[Array, "length"],
    config: TransformerConfig,
) -> tuple[
    Float[Array, "*batch length heads width"],
    Float[Array, "*batch length kv_heads width"],
    Float[Array, "*batch length kv_heads width"],
]:
    """Queries, keys and values of a layer, turned to their positions."""
    x = rms_norm(x, layer["input_layernorm"], config.rms_norm_eps)

    def heads(name: str, count: int) -> Array:
        y = linear(x, layer[f"{name}_proj"])
        if config.qkv_bias:
            y = y + layer[f"{name}_bias"]
        y = y.reshape(*x.shape[:-1], count, config.width)
        if name == "v":
            return y
        if config.qk_norm:
            y = rms_norm(y, layer[f"{name}_norm"], config.rms_norm_eps)
        return rotate(y, positions, config.rope_theta, config.rope_scaling)

    kv = config.kv_heads
    return heads("q", config.num_attention_heads), heads("k", kv), heads("v", kv)


def _finish(
    layer: Params,
    x: Float[Array, "*batch length hidden"],
    seen: Float[Array, "*batch length heads width"],
    config: TransformerConfig,
) -> Float[Array, "*batch length hidden"]:
    """The rest of a layer: what attention has seen, and the MLP."""
    x = x + linear(seen.reshape(*x.shape[:-1], -1), layer["o_proj"])
    return x + mlp(layer, rms_norm(x, layer["post_attention_layernorm"], config.rms_norm_eps))
