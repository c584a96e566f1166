"""How tokens are chosen: greedily, or drawn among the likeliest."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: length at which an answer is cut.
        temperature: what logits are divided by; 0 takes the likeliest token (greedy).
        top_k: draws among the k likeliest tokens; 0 among all.
        top_p: draws among the likeliest tokens whose chances before it sum to less than this (nucleus,
            arXiv 1904.09751), after top_k; 1 among all.

    Raises:
        ValueError: for a number out of range.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name, right, fits in (
            ("max_new_tokens", "at least 1", self.max_new_tokens >= 1),
            ("temperature", "0 (greedy) or a number above it", 0 <= self.temperature < math.inf),
            ("top_k", "0 (off) or a whole number above it", self.top_k >= 0),
            ("top_p", "above 0 and at most 1 (off)", 0 < self.top_p <= 1),
        ):
            if not fits:
                raise ValueError(f"{name} must be {right}, got {getattr(self, name)}")


def choose(
    logits: Float[Array, "vocab"], key: Key[Array, ""], sampling: Sampling
) -> Int[Array, ""]:
    """The next token of one sequence.

    Args:
        logits: of the model.
        key: of this token alone; not used where sampling is greedy.
        sampling: how.

    Example:
        >>> logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
        >>> rule = Sampling(max_new_tokens=1, temperature=1.0, top_p=0.7)
        >>> draws = jax.vmap(lambda key: choose(logits, key, rule))(jax.random.split(jax.random.key(0), 99))
        >>> sorted(set(draws.tolist()))
        [0, 1]
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits).astype(jnp.int32)
    scaled = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k == 0 and sampling.top_p == 1:
        return jax.random.categorical(key, scaled).astype(jnp.int32)
    values, tokens = lax.top_k(scaled, min(sampling.top_k or logits.size, logits.size))
    if sampling.top_p < 1:
        chances = jax.nn.softmax(values)
        before = jnp.cumsum(chances) - chances
        values = jnp.where(before < sampling.top_p, values, -jnp.inf)
    return tokens[jax.random.categorical(key, values)].astype(jnp.int32)
