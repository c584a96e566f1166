"""A decoder of the Llama family as plain functions of a tree of parameters.

Names of settings and parameters are those of Hugging Face's Llama, with two differences: matrices are
``[inputs, outputs]``, applied as ``x @ w``, and those of all layers are stacked, so that one compiled
layer runs as a scan over the leading axis.

Touvron et al., "LLaMA", arXiv 2302.13971; rotary positions: Su et al., arXiv 2104.09864; RMSNorm: Zhang
and Sennrich, arXiv 1910.07467; SwiGLU: Shazeer, arXiv 2002.05202; grouped queries: Ainslie et al., arXiv
2305.13245.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

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
        rope_theta: base of the wavelengths of rotary positions.
        rms_norm_eps: added to the mean square.
        tie_word_embeddings: the head is the transposed embedding.
        initializer_range: standard deviation of all matrices at the start.

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
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

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
    def width(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads


def init(key: Key[Array, ""], config: TransformerConfig) -> Params:
    """Parameters as Hugging Face begins with them: normal matrices, norms of ones; float32.

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
    norms = ("input_layernorm", "post_attention_layernorm")
    return {**params, "layers": {**drawn, **{name: jnp.ones((depth, hidden)) for name in norms}}}


def apply(
    params: Params,
    tokens: Int[Array, "*batch length"],
    config: TransformerConfig,
    unroll: int = 1,
) -> Float[Array, "*batch length vocab"]:
    """Logits of the token after each of the tokens.

    Args:
        params: of :func:`init`, in any float dtype; norms, positions and attention weights are float32
            inside.
        tokens: numbers below vocab_size.
        config: of the parameters.
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
    positions = jnp.arange(tokens.shape[-1])

    def block(x: Array, layer: Params) -> tuple[Array, None]:
        x = x + attention(
            layer, rms_norm(x, layer["input_layernorm"], config.rms_norm_eps), positions, config
        )
        x = x + mlp(layer, rms_norm(x, layer["post_attention_layernorm"], config.rms_norm_eps))
        return x, None

    x, _ = jax.lax.scan(block, params["embed_tokens"][tokens], params["layers"], unroll=unroll)
    x = rms_norm(x, params["norm"], config.rms_norm_eps)
    head = params["embed_tokens"].T if config.tie_word_embeddings else params["lm_head"]
    return linear(x, head)


def attention(
    layer: Params,
    x: Float[Array, "*batch length hidden"],
    positions: Int[Array, "length"],
    config: TransformerConfig,
) -> Float[Array, "*batch length hidden"]:
    """Every token looks at itself and those before it."""
    heads = lambda name, count: linear(x, layer[name]).reshape(*x.shape[:-1], count, config.width)
    q = rotate(heads("q_proj", config.num_attention_heads), positions, config.rope_theta)
    k = rotate(heads("k_proj", config.kv_heads), positions, config.rope_theta)
    v = heads("v_proj", config.kv_heads)
    seen = attend(q, k, v, positions[:, None] >= positions)
    return linear(seen.reshape(*x.shape[:-1], -1), layer["o_proj"])


def attend(
    q: Float[Array, "*batch length heads width"],
    k: Float[Array, "*batch seen kv_heads width"],
    v: Float[Array, "*batch seen kv_heads width"],
    visible: Array,
) -> Float[Array, "*batch length heads width"]:
    """Softmax attention; query head i takes the keys and values of head i // (heads / kv_heads).

    Args:
        q: queries.
        k: keys.
        v: values.
        visible: bool [length, seen], or with leading axes of the batch: which query sees which key.
    """
    grouped = q.reshape(*q.shape[:-2], k.shape[-2], -1, q.shape[-1])
    scores = jnp.einsum("...tkgd,...skd->...kgts", grouped, k) / q.shape[-1] ** 0.5
    scores = jnp.where(visible[..., None, None, :, :], scores.astype(jnp.float32), -jnp.inf)
    weights = jax.nn.softmax(scores).astype(v.dtype)
    return jnp.einsum("...kgts,...skd->...tkgd", weights, v).reshape(q.shape)


def mlp(layer: Params, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
    """SwiGLU."""
    gate, up = linear(x, layer["gate_proj"]), linear(x, layer["up_proj"])
    return linear(jax.nn.silu(gate) * up, layer["down_proj"])


def linear(
    x: Float[Array, "*batch inputs"], w: Float[Array, "inputs outputs"]
) -> Float[Array, "*batch outputs"]:
    """``x @ w``, with all rows of x in one axis: the gradient takes less time on a CPU so, as it is a
    product of two matrices."""
    return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])


def rms_norm(
    x: Float[Array, "*batch hidden"], weight: Float[Array, "hidden"], eps: float
) -> Float[Array, "*batch hidden"]:
    """x over the root of its mean square, times a weight; the quotient is rounded to the dtype of x."""
    wide = x.astype(jnp.float32)
    scaled = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
    return weight * scaled.astype(x.dtype)


def rotate(
    x: Float[Array, "*#batch length heads width"],
    positions: Int[Array, "*#batch length"],
    theta: float,
) -> Float[Array, "*#batch length heads width"]:
    """Rotary positions: entries i and i + width/2 of each head turn by position * theta^(-2i/width).

    The product of a turned query with a turned key depends on nothing but how far apart they stand.
    """
    half = x.shape[-1] // 2
    angles = positions[..., None, None] * theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
