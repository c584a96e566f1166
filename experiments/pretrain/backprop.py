"""Backpropagation through the bytes of an update: the baseline."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree, UInt8

from experiments.pretrain.config import Config
from experiments.pretrain.models import Model
from experiments.run.learners import Backprop, optimizer_of
from experiments.run.trainer import Carry


class ByBackprop:
    """Truncated backpropagation through time: hidden states are carried, gradients end with the update.

    Args:
        config: the settings.
        model: what is trained.
    """

    def __init__(self, config: Config, model: Model) -> None:
        self._config, self._model = config, model
        clip = optax.clip_by_global_norm(config.gradient_norm)
        self._learner = Backprop(optax.chain(clip, optimizer_of(config.optimizer)))

    sharding = None

    def start(self, seed: Array) -> Carry:
        """The state before generation 0."""
        params = self._model.init(jax.random.key(seed))
        hidden = repeat(self._model.state, self._config.streams)
        return Carry(self._learner.start(params), hidden, jnp.int32(0), seed)

    def generation(
        self, carry: Carry, tokens: UInt8[Array, "streams tokens"]
    ) -> tuple[Carry, dict[str, Array]]:
        """One update by the mean loss of all streams."""

        def loss(params: PyTree) -> tuple[Float[Array, ""], Any]:
            hidden, sums = jax.vmap(self._model.loss, (None, 0, 0))(params, carry.own, tokens)
            return sums.mean() / (self._model.unit * self._config.tokens), hidden

        learner, bits, hidden, grads = self._learner.step(carry.learner, loss)
        row = {"train_bits_per_byte": bits, "gradient_norm": optax.tree.norm(grads)}
        return Carry(learner, hidden, carry.generation + 1, carry.seed), row


def repeat(tree: PyTree, times: int) -> PyTree:
    """Every leaf so many times, along a new leading axis."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (times, *x.shape)), tree)
