"""Parts of decoders as functions of arrays: attention, rotary positions, RMSNorm, SwiGLU.

Su et al., arXiv 2104.09864 (rotary positions); Grattafiori et al., arXiv 2407.21783, and Chen et al., arXiv
2306.15595 (stretched ones); Zhang and Sennrich, arXiv 1910.07467 (RMSNorm); Shazeer, arXiv 2002.05202
(SwiGLU); Ainslie et al., arXiv 2305.13245 (grouped queries).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from experiments.models.quantised import linear

Params = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rotary positions of a model whose context was stretched; names are those of Hugging Face.

    Attributes:
        rope_type: "linear" divides all positions by factor; "llama3" does so for wavelengths above
            original_max_position_embeddings / low_freq_factor, leaves those below
            original_max_position_embeddings / high_freq_factor alone, and goes over smoothly in between.
        factor: how many times the context was stretched.
        low_freq_factor: of "llama3" alone, as are the two below.
        high_freq_factor: above low_freq_factor.
        original_max_position_embeddings: the context before it was stretched.

    Raises:
        ValueError: for another rope_type, or factors out of range.
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.rope_type not in ("linear", "llama3"):
            raise ValueError(
                f"rope_type {self.rope_type!r} is not supported; 'default', 'linear' and 'llama3' are"
            )
        if not (self.factor > 0 and 0 < self.low_freq_factor < self.high_freq_factor):
            raise ValueError(
                f"factor {self.factor}, low_freq_factor {self.low_freq_factor} and high_freq_factor "
                f"{self.high_freq_factor} of rope_scaling must be positive, the last above the second"
            )


# Queries of a text that is longer than two blocks are taken so many at a time.
BLOCK = 256


class Before(NamedTuple):
    """Keys and values of a text that all queries see; many sequences may share it.

    Attributes:
        keys: ``[before, kv_heads, width]``.
        values: of the same shape.
    """

    keys: Float[Array, "before kv_heads width"]
    values: Float[Array, "before kv_heads width"]


def attend(
    q: Float[Array, "*batch length heads width"],
    k: Float[Array, "*batch seen kv_heads width"],
    v: Float[Array, "*batch seen kv_heads width"],
    visible: Array,
    before: Before | None = None,
) -> Float[Array, "*batch length heads width"]:
    """Softmax attention; query head i takes the keys and values of head i // (heads / kv_heads).

    Args:
        q: queries.
        k: keys.
        v: values.
        visible: bool [length, seen], or with leading axes of the batch: which query sees which key.
        before: keys and values that every query sees besides.
    """
    grouped = q.reshape(*q.shape[:-2], k.shape[-2], -1, q.shape[-1])
    scores = jnp.einsum("...tkgd,...skd->...kgts", grouped, k) / q.shape[-1] ** 0.5
    scores = jnp.where(visible[..., None, None, :, :], scores.astype(jnp.float32), -jnp.inf)
    if before is None:
        weights = jax.nn.softmax(scores).astype(v.dtype)
        return jnp.einsum("...kgts,...skd->...tkgd", weights, v).reshape(q.shape)
    # Two products rather than one with joined keys: what sequences share is not copied for each.
    earlier = jnp.einsum("...tkgd,skd->...kgts", grouped, before.keys) / q.shape[-1] ** 0.5
    both = jnp.concatenate([earlier.astype(jnp.float32), scores], -1)
    weights = jax.nn.softmax(both).astype(v.dtype)
    first, rest = jnp.split(weights, [before.keys.shape[0]], -1)
    out = jnp.einsum("...kgts,skd->...tkgd", first, before.values)
    return (out + jnp.einsum("...kgts,...skd->...tkgd", rest, v)).reshape(q.shape)


def attend_causally(
    q: Float[Array, "*batch length heads width"],
    k: Float[Array, "*batch length kv_heads width"],
    v: Float[Array, "*batch length kv_heads width"],
    before: Before | None = None,
) -> Float[Array, "*batch length heads width"]:
    """:func:`attend` of a text on itself: every token sees itself, those before it, and `before`.

    The queries of a long text are taken a block at a time, also in the backward pass, so that no array has
    an entry for each pair of tokens.
    """
    length, places = q.shape[-3], jnp.arange(q.shape[-3])
    if length <= 2 * BLOCK:
        return attend(q, k, v, places[:, None] >= places, before)
    count = -(-length // BLOCK)
    padding = [(0, 0)] * (q.ndim - 3) + [(0, count * BLOCK - length), (0, 0), (0, 0)]
    padded = jnp.pad(q, padding)

    @jax.checkpoint
    def of_block(start: Int[Array, ""]) -> Float[Array, "*batch block heads width"]:
        own = jax.lax.dynamic_slice_in_dim(padded, start, BLOCK, -3)
        return attend(own, k, v, (start + jnp.arange(BLOCK))[:, None] >= places, before)

    blocks = jax.lax.map(of_block, jnp.arange(count) * BLOCK)
    joined = jnp.moveaxis(blocks, 0, -4).reshape(*q.shape[:-3], count * BLOCK, *q.shape[-2:])
    return joined[..., :length, :, :]


def mlp(layer: Params, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
    """SwiGLU."""
    gate, up = linear(x, layer["gate_proj"]), linear(x, layer["up_proj"])
    return linear(jax.nn.silu(gate) * up, layer["down_proj"])


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
    scaling: RopeScaling | None = None,
) -> Float[Array, "*#batch length heads width"]:
    """Rotary positions: entries i and i + width/2 of each head turn by position * theta^(-2i/width).

    The product of a turned query with a turned key depends on nothing but how far apart they stand.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half) / half)
    if scaling is not None:
        frequencies = _stretched(frequencies, scaling)
    angles = positions[..., None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _stretched(frequencies: Float[Array, "half"], scaling: RopeScaling) -> Float[Array, "half"]:
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    # How many waves the original context held decides how much of the frequency is kept.
    waves = scaling.original_max_position_embeddings * frequencies / (2 * jnp.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((waves - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)
