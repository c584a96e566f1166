"""Backpropagation through the bytes of an update, as a job's generation: the baseline."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree, UInt8

from experiments.pretrain.carry import Carry
from experiments.pretrain.config import Config
from experiments.pretrain.models import Model
from experiments.run.optimizers import decayed, make_optimizer


class Backprop:
    """Truncated backpropagation through time: hidden states are carried, gradients end with the update.

    Args:
        config: the settings.
        model: what is trained.
    """

    def __init__(self, config: Config, model: Model) -> None:
        self._config, self._model = config, model
        self._optimizer = optax.chain(
            optax.clip_by_global_norm(config.gradient_norm),
            make_optimizer(
                config.optimizer, decayed(config.learning_rate, config.learning_rate_decay)
            ),
        )

    def start(self, seed: Array) -> Carry:
        """The state before generation 0."""
        params = self._model.init(jax.random.key(seed))
        hidden = repeat(self._model.state, self._config.streams)
        return Carry((params, self._optimizer.init(params)), hidden, jnp.int32(0), seed)

    def generation(
        self, carry: Carry, tokens: UInt8[Array, "streams tokens"]
    ) -> tuple[Carry, dict[str, Array]]:
        """One update by the mean loss of all streams."""
        params, state = carry.training

        def loss(params: PyTree) -> tuple[Float[Array, ""], Any]:
            hidden, sums = jax.vmap(self._model.loss, (None, 0, 0))(params, carry.hidden, tokens)
            return sums.mean() / (self._model.unit * self._config.tokens), hidden

        (bits, hidden), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = self._optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        row = {"train_bits_per_byte": bits, "gradient_norm": optax.tree.norm(grads)}
        return Carry((params, state), hidden, carry.cursor + 1, carry.seed), row

    def params(self, carry: Carry) -> PyTree:
        """The trained parameters."""
        return carry.training[0]


def repeat(tree: PyTree, times: int) -> PyTree:
    """Every leaf so many times, along a new leading axis."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (times, *x.shape)), tree)
