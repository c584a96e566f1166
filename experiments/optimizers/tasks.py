"""The two things that optimizers are compared on: a language model of bytes, and digits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from experiments.models import normalised, transformer
from experiments.optimizers.config import Config
from experiments.run import text
from experiments.run.errors import UsageError
from experiments.supervised import data as digits_data

# Sequences or images that are measured at once, so that the memory does not grow with what is held out.
AT_ONCE = 8


class Task(NamedTuple):
    """What is trained, on what.

    Attributes:
        init: key -> parameters.
        batch: (key, generation) -> a batch: a function of both.
        loss: (parameters, a batch) -> its mean cross-entropy in nats.
        measure: (parameters, fresh) -> held-out figures; where a target is set, of one half of
            the held-out data, or of the other if fresh.
        measured: their names.
        stacked: parameters -> which of their leaves are stacks of matrices, one a layer.
    """

    init: Callable[[Key[Array, ""]], PyTree]
    batch: Callable[[Key[Array, ""], Int[Array, ""]], Any]
    loss: Callable[[PyTree, Any], Float[Array, ""]]
    measure: Callable[[PyTree, bool], dict[str, Array]]
    measured: tuple[str, ...]
    stacked: Callable[[PyTree], PyTree]


def make_task(config: Config) -> Task:
    """The task that the settings name.

    Raises:
        UsageError: for data that is not there, or not enough.
    """
    return text_task(config) if config.task == "text" else digits_task(config)


def text_task(config: Config) -> Task:
    """The next byte of text, by a decoder; the loss is in nats a byte."""
    train, held_out = text.split(
        text.documents(config.data), config.held_out, at_least=config.length + 1
    )
    joined = [np.frombuffer(b"\n\n".join(documents), np.uint8) for documents in (train, held_out)]
    seen, unseen = (
        jnp.asarray(joined[0]),
        windows(joined[1], config.length, config.held_out_sequences),
    )
    shape = transformer.TransformerConfig(
        vocab_size=256,
        hidden_size=config.width,
        intermediate_size=config.inner,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
    )

    def batch(key: Key[Array, ""], generation: Int[Array, ""]) -> Array:
        """Stretches of the training text that begin anywhere."""
        key = jax.random.fold_in(key, generation)
        begin = jax.random.randint(key, (config.batch,), 0, len(seen) - config.length)
        return seen[begin[:, None] + jnp.arange(config.length + 1)]

    def losses(params: PyTree, tokens: UInt8[Array, "batch length"]) -> Float[Array, "batch rest"]:
        tokens = tokens.astype(jnp.int32)
        logits = transformer.apply(params, tokens[:, :-1], shape, unroll=config.depth)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])

    def measure(params: PyTree, fresh: bool) -> dict[str, Array]:
        of = half(unseen, config, fresh)
        found = jax.lax.map(lambda one: losses(params, one[None])[0], of, batch_size=AT_ONCE)
        return {"held_out_loss": found.mean()}

    return Task(
        init=lambda key: transformer.init(key, shape),
        batch=batch,
        loss=lambda params, tokens: losses(params, tokens).mean(),
        measure=measure,
        measured=("held_out_loss",),
        stacked=lambda params: jax.tree.map(lambda x: x.ndim == 3, params),
    )


def half(data: Array, config: Config, fresh: bool) -> Array:
    """Every other row, the first ones or if fresh the second ones; all rows where no target is set."""
    return data if config.target is None else data[int(fresh) :: 2]


def windows(
    text: UInt8[np.ndarray, "bytes"], length: int, most: int
) -> UInt8[Array, "windows reach"]:
    """Stretches of a text, evenly spread over it, of `length` bytes and the one after them; at most so many,
    and so that no byte is predicted twice."""
    count = (len(text) - 1) // length
    chosen = np.linspace(0, count - 1, min(count, most)).round().astype(int)
    return jnp.asarray(text[chosen[:, None] * length + np.arange(length + 1)])


def digits_task(config: Config) -> Task:
    """Images of digits, by a perceptron whose weights have no scale.

    Raises:
        UsageError: for a batch of more images than there are.
    """
    data = digits_data.load(None)
    x, y = jnp.asarray(data.x), jnp.asarray(data.y)
    held_out = jnp.asarray(data.held_out_x), jnp.asarray(data.held_out_y)
    if config.batch > len(y):
        raise UsageError(f"--batch {config.batch}: there are {len(y)} images to train on")

    def batch(key: Key[Array, ""], generation: Int[Array, ""]) -> tuple[Array, Array]:
        key = jax.random.fold_in(key, generation)
        rows = jax.random.choice(key, len(y), (config.batch,), replace=False)
        return x[rows], y[rows]

    def loss(params: PyTree, images: tuple[Array, Array]) -> Float[Array, ""]:
        logits = normalised.apply(params, images[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, images[1]).mean()

    def measure(params: PyTree, fresh: bool) -> dict[str, Array]:
        of_x, of_y = (half(one, config, fresh) for one in held_out)
        return {
            "held_out_loss": loss(params, (of_x, of_y)),
            "held_out_accuracy": (normalised.apply(params, of_x).argmax(-1) == of_y).mean(),
            "weight_norm": normalised.norms(params),
        }

    return Task(
        init=lambda key: normalised.init(key, x.shape[1], config.width, config.depth, data.classes),
        batch=batch,
        loss=loss,
        measure=measure,
        measured=("held_out_loss", "held_out_accuracy", "weight_norm"),
        stacked=lambda params: jax.tree.map(lambda x: False, params),
    )
