"""What the rest of this folder knows of a language model: functions of one sequence, and nothing else."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, PyTree

from eggroll.plan import Planner
from experiments.models import families, parallel
from experiments.models.family import ModelConfig
from experiments.models.parallel import ShardingRules


class LanguageModel(NamedTuple):
    """A language model as functions of one sequence, to be mapped over many.

    They are those of its family (`experiments.models.family.Family`) with the configuration filled in.

    Attributes:
        vocab_size: tokens that there are.
        context: tokens of the longest text that the model was made for; None for any.
        init: `(key) -> params`, untrained ones.
        apply: `(params, tokens [length], at=None, remat=False) -> logits [kept, vocab]`, of whole texts:
            after each token, or after those at the places `at`. With remat a backward pass computes what is
            inside of layers again.
        prefill: `(params, tokens [prompt_slots], length, slots, prefix) -> (logits [vocab], cache)`: reads a
            prompt that is padded behind its end; slots is the room for it and for what will be written, and
            prefix the cache of the text before it, which sequences share, or None.
        decode: `(params, cache, token, t, prefix) -> (logits [vocab], cache)`: reads the t-th token that was
            written, t one number for all sequences.
        plan: which parameters evolution strategies train.
        sharding: how devices that share the model divide its weights and caches.
    """

    vocab_size: int
    context: int | None
    init: Callable[[Array], PyTree]
    apply: Callable[..., Array]
    prefill: Callable[[PyTree, Array, Any, int, Any], tuple[Array, Any]]
    decode: Callable[[PyTree, Any, Array, Any, Any], tuple[Array, Any]]
    plan: Planner
    sharding: ShardingRules = parallel.WHOLE


def language_model(
    config: ModelConfig,
    train: Collection[str] = (),
    steps: Mapping[str, float] | None = None,
) -> LanguageModel:
    """The functions of a model of any family.

    Args:
        config: of the model, whose type says the family.
        train: the groups of parameters that are trained beside the matrices of layers.
        steps: of a quantised model, `quantised.steps(params)`.

    Raises:
        TypeError: for a configuration of no family.
        ValueError: for a group that the family does not have.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from experiments.models.transformer import TransformerConfig
        >>> model = language_model(TransformerConfig(vocab_size=7, hidden_size=8,
        ...     intermediate_size=12, num_hidden_layers=2, num_attention_heads=2))
        >>> params = model.init(jax.random.key(0))
        >>> logits, cache = model.prefill(params, jnp.array([1, 2, 0]), 2, 5, None)
        >>> model.decode(params, cache, logits.argmax(), 0, None)[0].shape
        (7,)
    """
    family = families.of(config)

    def init(key: Array) -> PyTree:
        return family.init(key, config)

    def apply(params: PyTree, tokens: Array, at: Array | None = None, remat: bool = False) -> Array:
        return family.apply(params, tokens, config, at, remat)

    def prefill(
        params: PyTree, tokens: Array, length: Any, slots: int, prefix: Any
    ) -> tuple[Array, Any]:
        return family.prefill(params, tokens, length, config, slots, prefix)

    def decode(params: PyTree, cache: Any, token: Array, t: Any, prefix: Any) -> tuple[Array, Any]:
        return family.decode(params, cache, token, t, config, prefix)

    planner = family.plan(train, steps)
    return LanguageModel(
        config.vocab_size, config.context, init, apply, prefill, decode, planner, family.sharding
    )
