"""The models that are measured: Flax modules as anyone would write them, small to large."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FEATURES, OUTPUTS = 64, 8
GRU_STEPS = 64
LAYERS, HEADS, TOKENS = 4, 4, 16


class MLP(nn.Module):
    """64-D-D-8 with relu."""

    dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch features"]) -> Float[Array, "batch outputs"]:
        for _ in range(2):
            x = nn.relu(nn.Dense(self.dim)(x))
        return nn.Dense(OUTPUTS)(x)


class GRU(nn.Module):
    """A GRU over a sequence, and a readout of its last state."""

    dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch steps features"]) -> Float[Array, "batch outputs"]:
        x = nn.RNN(nn.GRUCell(self.dim))(x)
        return nn.Dense(OUTPUTS)(x[:, -1])


class Block(nn.Module):
    """A pre-norm transformer block."""

    dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens dim"], _: None) -> tuple[Array, None]:
        x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x))
        h = nn.gelu(nn.Dense(4 * self.dim)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.dim)(h), None


class Transformer(nn.Module):
    """A scanned stack of blocks, its parameters with a leading axis of layers."""

    dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens features"]) -> Float[Array, "batch outputs"]:
        x = nn.Dense(self.dim)(x)
        stack = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )
        x, _ = stack(self.dim)(x, None)
        return nn.Dense(OUTPUTS)(x.mean(1))


# For each model its module and the shape of one observation.
MODELS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "mlp": (MLP, (FEATURES,)),
    "gru": (GRU, (GRU_STEPS, FEATURES)),
    "transformer": (Transformer, (TOKENS, FEATURES)),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model with the observations of every member.

    Attributes:
      params: the unperturbed parameters.
      observations: ``[population, observations, *shape]``.
      score: ``score(params, key, observations of a member)``, the mean of the outputs.
      plain: ``plain(params, observations)`` gives the same of the unperturbed model for all members,
        ``[population]``, in one batch of population * observations.
    """

    params: Any
    observations: Array
    score: Callable[..., Array]
    plain: Callable[..., Array]


def problem(model: str, dim: int, population: int, observations: int) -> Problem:
    """Makes a model of width ``dim`` and random observations for it."""
    make, shape = MODELS[model]
    module = make(dim)
    key, init_key = jax.random.split(jax.random.key(0))
    data = jax.random.normal(key, (population, observations, *shape), jnp.float32)
    params = module.init(init_key, data[0])

    def score(params: Any, key: Array, own: Array) -> Array:
        return module.apply(params, own).mean()

    def plain(params: Any, data: Array) -> Array:
        out = module.apply(params, data.reshape(-1, *shape))
        return out.reshape(population, -1).mean(1)

    return Problem(params, data, score, jax.jit(plain))
