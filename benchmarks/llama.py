"""The shapes of the Llama models that GaLore's and FRUGAL's experiments train, 60M to 7B."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

VOCABULARY = 32000


class Size(NamedTuple):
    """Width of the residual stream and of the MLP, and how many layers there are."""

    width: int
    hidden: int
    layers: int


SIZES = {
    "60M": Size(512, 1376, 8),
    "130M": Size(768, 2048, 12),
    "350M": Size(1024, 2736, 24),
    "1B": Size(2048, 5461, 24),
    "7B": Size(4096, 11008, 32),
}


def shapes(name: str) -> Any:
    """The tree of the parameters, with embeddings and output head of their own; nothing is allocated."""
    width, hidden, layers = SIZES[name]
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    square, wide, tall = leaf(width, width), leaf(width, hidden), leaf(hidden, width)
    layer = {
        "attention": dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj"], square),
        "mlp": {"gate_proj": wide, "up_proj": wide, "down_proj": tall},
        "input_norm": leaf(width),
        "post_attention_norm": leaf(width),
    }
    return {
        "embed_tokens": leaf(VOCABULARY, width),
        "layers": [layer] * layers,
        "norm": leaf(width),
        "lm_head": leaf(width, VOCABULARY),
    }
