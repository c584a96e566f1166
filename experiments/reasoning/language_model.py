"""What the rest of this folder knows of a language model: functions of one sequence, and nothing else."""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, PyTree

from eggroll.plan import Planner
from experiments.models import rwkv7, transformer


class LanguageModel(NamedTuple):
    """A language model as functions of one sequence, to be mapped over many.

    Attributes:
        vocab_size: tokens that there are.
        init: `(key) -> params`, untrained ones.
        apply: `(params, tokens [length]) -> logits [length, vocab]`, of whole texts.
        prefill: `(params, tokens [prompt_slots], length, slots) -> (logits [vocab], cache)`: reads a prompt
            that is padded behind its end; slots is the room for it and for what will be written.
        decode: `(params, cache, token, t) -> (logits [vocab], cache)`: reads the t-th token that was written,
            t one number for all sequences.
        plan: which parameters evolution strategies train.
    """

    vocab_size: int
    init: Callable[[Array], PyTree]
    apply: Callable[[PyTree, Array], Array]
    prefill: Callable[[PyTree, Array, Any, int], tuple[Array, Any]]
    decode: Callable[[PyTree, Any, Array, Any], tuple[Array, Any]]
    plan: Planner


def of_transformer(
    config: transformer.TransformerConfig,
    train: Collection[str] = (),
    steps: Mapping[str, float] | None = None,
) -> LanguageModel:
    """A decoder of the Llama family; `train` and `steps` as in `transformer.plan`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model = of_transformer(transformer.TransformerConfig(vocab_size=7, hidden_size=8,
        ...     intermediate_size=12, num_hidden_layers=2, num_attention_heads=2))
        >>> params = model.init(jax.random.key(0))
        >>> logits, cache = model.prefill(params, jnp.array([1, 2, 0]), 2, 5)
        >>> model.decode(params, cache, logits.argmax(), 0)[0].shape
        (7,)
    """

    def prefill(params: PyTree, tokens: Array, length: Any, slots: int) -> tuple[Array, Any]:
        return transformer.prefill(params, tokens, length, config, slots)

    def decode(params: PyTree, cache: Any, token: Array, t: Any) -> tuple[Array, Any]:
        return transformer.decode(params, cache, token, t, config)

    return LanguageModel(
        config.vocab_size,
        functools.partial(transformer.init, config=config),
        functools.partial(transformer.apply, config=config),
        prefill,
        decode,
        transformer.plan(train, steps),
    )


def of_rwkv7(
    config: rwkv7.RWKV7Config,
    train: Collection[str] = (),
    steps: Mapping[str, float] | None = None,
) -> LanguageModel:
    """An RWKV-7; `train` and `steps` as in `rwkv7.plan`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model = of_rwkv7(rwkv7.RWKV7Config(vocab_size=7, hidden_size=8, head_dim=4,
        ...     num_hidden_layers=2))
        >>> model.apply(model.init(jax.random.key(0)), jnp.arange(5)).shape
        (5, 7)
    """

    def prefill(params: PyTree, tokens: Array, length: Any, slots: int) -> tuple[Array, Any]:
        return rwkv7.prefill(params, tokens, length, config, slots)

    def decode(params: PyTree, cache: Any, token: Array, t: Any) -> tuple[Array, Any]:
        return rwkv7.decode(params, cache, token, t, config)

    begin = rwkv7.initial_state(config)
    return LanguageModel(
        config.vocab_size,
        functools.partial(rwkv7.init, config=config),
        lambda params, tokens: rwkv7.sequence(params, begin, tokens, config)[0],
        prefill,
        decode,
        rwkv7.plan(train, steps),
    )
