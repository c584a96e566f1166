"""Group relative policy optimization, the learning from rewards by backpropagation that ES is compared with.

Several completions of each question are sampled; those with more reward than their group become likelier.
Shao et al., DeepSeekMath, arXiv 2402.03300. Of its variants: no deviation and a constant length (Dr. GRPO,
Liu et al., arXiv 2503.20783), means over tokens and a wider upper bound (DAPO, Yu et al., arXiv
2503.14476), a bound for bad completions too (Ye et al., arXiv 1912.09729).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from experiments.reasoning import scores
from experiments.reasoning.language_model import LanguageModel
from experiments.reasoning.sft import Backward, accumulate, completion, log_probs_and_entropies
from experiments.reasoning.sft import log_probs as log_probs
from experiments.run.errors import suggestion

AGGREGATIONS = ("sequence", "token", "constant")

# Ratios end at e^20: what is beyond says no more, and would overflow.
LARGEST = 20.0


class Rollouts(NamedTuple):
    """Sampled completions, to be learned from.

    Attributes:
        tokens: int32, prompt and completion, padded behind their end.
        mask: true for the tokens of completions. A sequence without one is left out, as if it were not
            there.
        old_log_probs: float32, of each token when the completion was sampled; None where these are those of
            the parameters at hand, so that all ratios are 1.
        advantages: float32, of each completion.
        reference_log_probs: the same of a model that is not to be left far behind.
    """

    tokens: Int[Array | np.ndarray, "sequences length"]
    mask: Bool[Array | np.ndarray, "sequences length"]
    old_log_probs: Float[Array | np.ndarray, "sequences length"] | None
    advantages: Float[Array | np.ndarray, "sequences"]
    reference_log_probs: Float[Array | np.ndarray, "sequences length"] | None = None


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """What is learned from rollouts, and how.

    Attributes:
        advantage: from rewards of a group to advantages: "grpo", "dr_grpo" or "rloo".
        clip_low: how far a token's ratio of new to old probability may fall below 1 before its gradient is
            cut.
        clip_high: how far it may rise above 1.
        dual_clip: where the advantage is negative, ratios above this have no gradient either; above 1,
            None for no such bound.
        beta: weight of the divergence from the reference.
        aggregation: how tokens are averaged: "sequence" over each completion, then over these; "token" over
            all at once; "constant" sums each completion's, divided by `length`, then over these.
        length: for "constant" alone, such as the most tokens that a completion may have.
        temperature: that completions are sampled at.
        epochs: updates by the same rollouts.
        backward: how gradients are computed.

    Raises:
        ValueError: for the first of these that is out of range.

    Example:
        >>> GRPO(aggregation="tokens")
        Traceback (most recent call last):
        ...
        ValueError: aggregation must be one of sequence, token, constant, got 'tokens'; did you mean 'token'?
    """

    advantage: str = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    beta: float = 0.0
    aggregation: str = "sequence"
    length: int | None = None
    temperature: float = 1.0
    epochs: int = 1
    backward: Backward = Backward()

    def __post_init__(self) -> None:
        known = {"advantage": tuple(scores.ADVANTAGES), "aggregation": AGGREGATIONS}
        for name, names in known.items():
            value = getattr(self, name)
            if value not in names:
                near = suggestion(value, names)
                raise ValueError(f"{name} must be one of {', '.join(names)}, got {value!r}{near}")
        counts = "a whole number from 1"
        # Written so that NaN is refused too.
        for name, right, words in (
            ("clip_low", 0 < self.clip_low <= 1, "more than 0 and at most 1"),
            ("clip_high", self.clip_high > 0, "more than 0"),
            ("dual_clip", self.dual_clip is None or self.dual_clip > 1, "more than 1, or None"),
            ("beta", self.beta >= 0, "0 or more"),
            ("temperature", self.temperature > 0, "more than 0"),
            ("epochs", self.epochs >= 1, counts),
            ("length", self.length is None or self.length >= 1, counts),
        ):
            if not right:
                raise ValueError(f"{name} must be {words}, got {getattr(self, name)}")
        if (self.aggregation == "constant") != (self.length is not None):
            raise ValueError(
                f"aggregation is {self.aggregation!r} and length is {self.length}: 'constant' needs a "
                "length, and nothing else has one"
            )


def prepare(
    model: LanguageModel,
    params: PyTree,
    tokens: Int[Array | np.ndarray, "sequences length"],
    mask: Bool[Array | np.ndarray, "sequences length"],
    rewards: Any,
    config: GRPO,
    reference: PyTree | None = None,
    once: bool = False,
) -> Rollouts:
    """Rollouts from completions and their rewards.

    Args:
        model: that wrote them.
        params: with which it did.
        tokens: those of `sft.pack`, all samples of a question one after another.
        mask: of completions.
        rewards: ``[questions, samples]``. A completion whose reward is None, NaN or infinite is left out.
        config: says which advantages.
        reference: parameters of the reference, if there is one.
        once: there will be one update, of these parameters: the probabilities of what was sampled are those
            of its own forward pass then, and are not computed beforehand.

    Raises:
        ValueError: for several epochs `once`, or where there are not as many rewards as sequences.
    """
    if once and config.epochs > 1:
        raise ValueError(
            f"once must be false for {config.epochs} epochs, whose ratios differ from 1"
        )
    known = np.asarray(rewards, np.float32)
    if known.ndim != 2 or known.size != len(tokens):
        raise ValueError(
            f"rewards must have the shape [questions, samples] of the {len(tokens)} sequences, got "
            f"{list(known.shape)}"
        )
    known = np.where(np.isfinite(known), known, np.nan)
    mask = jnp.asarray(mask) & ~np.isnan(known).reshape(-1, 1)
    found = lambda params: _all_log_probs(model, params, jnp.asarray(tokens), mask, config)
    return Rollouts(
        jnp.asarray(tokens),
        mask,
        None if once else found(params),
        scores.ADVANTAGES[config.advantage](known).reshape(-1),
        None if reference is None else found(reference),
    )


def make_update(
    model: LanguageModel, optimizer: optax.GradientTransformation, config: GRPO
) -> Callable[[PyTree, Any, Rollouts], tuple[PyTree, Any, dict[str, Array]]]:
    """(params, optimizer's state, rollouts) -> (params, state, metrics), to be compiled.

    Args:
        model: whose parameters these are.
        optimizer: of `sft.optimizer_of`, or any.
        config: the settings.

    Returns:
        A function whose metrics are those of :func:`loss`, means over the epochs, with "loss" and
        "gradient_norm" (before it is bounded).

    Example:
        Of two completions of one token the better one becomes likelier.

        >>> from experiments.models.transformer import TransformerConfig
        >>> from experiments.reasoning import sft
        >>> from experiments.reasoning.language_model import language_model
        >>> model = language_model(TransformerConfig(vocab_size=7, hidden_size=8, intermediate_size=12,
        ...                                          num_hidden_layers=1, num_attention_heads=2))
        >>> params, config = model.init(jax.random.key(0)), GRPO(epochs=2)
        >>> optimizer = sft.optimizer_of("adam", 0.01)
        >>> batch = sft.pack([([2], [3]), ([2], [4])], length=2)
        >>> rollouts = prepare(model, params, *batch, [[1.0, 0.0]], config)
        >>> update = make_update(model, optimizer, config)
        >>> params, _, row = update(params, optimizer.init(params), rollouts)
        >>> change = jax.vmap(lambda one: log_probs(model, params, one))(batch.tokens)
        >>> change = (change - rollouts.old_log_probs)[:, 1]
        >>> bool(change[0] > 0 > change[1])
        True
    """

    def update(
        params: PyTree, state: Any, rollouts: Rollouts
    ) -> tuple[PyTree, Any, dict[str, Array]]:
        _check(rollouts, config)
        batch = (rollouts, *_weights(rollouts.mask, config))
        objective = lambda params, part: _sums(model, params, part, config)

        def epoch(carry: tuple[PyTree, Any], _: None) -> tuple[tuple[PyTree, Any], Any]:
            params, state = carry
            value, row, grads = accumulate(objective, params, batch, config.backward.micro_batch)
            updates, state = optimizer.update(grads, state, params)
            row |= {"loss": value, "gradient_norm": optax.tree.norm(grads)}
            return (optax.apply_updates(params, updates), state), row

        (params, state), rows = lax.scan(epoch, (params, state), length=config.epochs)
        return params, state, jax.tree.map(lambda x: x.mean(0), rows)

    return update


def loss(
    model: LanguageModel, params: PyTree, rollouts: Rollouts, config: GRPO
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The objective, to be minimised, and what is told of it.

    Returns:
        The loss, and means over tokens: "ratio" of new to old probability, "clip_fraction" of tokens whose
        gradient is cut, "entropy" in nats, with a reference "kl" from it; and how many sequences were
        "left_out".

    Raises:
        ValueError: for a beta without a reference.
    """
    _check(rollouts, config)
    return _sums(model, params, (rollouts, *_weights(rollouts.mask, config)), config)


def surrogate(
    log_ratio: Float[Array, "*batch"], advantage: Float[Array, "*batch"], config: GRPO
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"], Bool[Array, "*batch"]]:
    """``min(ratio A, clip(ratio, 1 - low, 1 + high) A)``, and for A < 0 no less than ``dual_clip A``.

    Args:
        log_ratio: of new to old probability.
        advantage: A.
        config: says the bounds.

    Returns:
        What is to be maximised, the ratio, and where the gradient is cut.

    Example:
        >>> log_ratio = jnp.log(jnp.array([1.5, 1.5, 0.5, 0.5, 5.0]))
        >>> gain, _, cut = surrogate(log_ratio, jnp.array([1.0, -1, 1, -1, -1]), GRPO(dual_clip=3.0))
        >>> print(gain, cut.astype(int))
        [ 1.2 -1.5  0.5 -0.8 -3. ] [1 0 0 1 1]
    """
    ratio = jnp.exp(jnp.minimum(log_ratio, LARGEST))
    bounded = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    gain = jnp.minimum(ratio * advantage, bounded * advantage)
    if config.dual_clip is not None:
        gain = jnp.where(advantage < 0, jnp.maximum(gain, config.dual_clip * advantage), gain)
    return gain, ratio, gain != ratio * advantage


def kl_estimate(
    log_prob: Float[Array, "*batch"], reference: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """``exp(d) - d - 1`` with d = reference - log_prob: never negative, its mean is KL(policy, reference).

    Schulman, "Approximating KL divergence" (2020), where it is k3; as a loss in arXiv 2402.03300.

    Example:
        >>> print(kl_estimate(jnp.log(jnp.array([0.5, 0.25])), jnp.log(jnp.array([0.5, 0.5]))))
        [0.         0.30685282]
    """
    d = reference - log_prob
    return jnp.exp(jnp.minimum(d, LARGEST)) - d - 1


# ---------------------------------------------------------------- sums over sequences


def _check(rollouts: Rollouts, config: GRPO) -> None:
    if config.beta and rollouts.reference_log_probs is None:
        raise ValueError(
            f"beta is {config.beta}, but the rollouts have no reference_log_probs: prepare them with a "
            "reference, or choose 0"
        )


def _weights(
    mask: Bool[Array | np.ndarray, "sequences length"], config: GRPO
) -> tuple[Float[Array, "sequences length"], Float[Array, "sequences length"]]:
    """What each token counts in the loss, and in means over tokens.

    They know of all sequences, so that sums over micro-batches are those over the whole.
    """
    mask = jnp.asarray(mask)
    counts = mask.sum(-1, keepdims=True).astype(jnp.float32)
    total, kept = jnp.maximum(counts.sum(), 1), jnp.maximum((counts > 0).sum(), 1)
    share = mask / total
    if config.aggregation == "token":
        return share, share
    divisor = jnp.maximum(counts, 1) if config.length is None else config.length
    return mask / (divisor * kept), share


def _sums(
    model: LanguageModel,
    params: PyTree,
    batch: tuple[Rollouts, Float[Array, "sequences length"], Float[Array, "sequences length"]],
    config: GRPO,
) -> tuple[Array, dict[str, Array]]:
    rollouts, weights, shares = batch
    read = functools.partial(_read, model, params, config)
    log_prob, entropy = jax.vmap(read)(*map(jnp.asarray, (rollouts.tokens, rollouts.mask)))
    # Masked before anything is made of them: no padding, whatever it is, has a gradient.
    kept = lambda x: jnp.where(rollouts.mask, x, 0)
    log_prob, known = kept(log_prob), rollouts.old_log_probs
    old = lax.stop_gradient(log_prob) if known is None else kept(known)
    advantage = jnp.broadcast_to(rollouts.advantages[:, None], log_prob.shape)
    gain, ratio, cut = surrogate(log_prob - old, kept(advantage), config)
    row = {"ratio": ratio, "clip_fraction": cut, "entropy": kept(entropy)}
    each = -gain
    if rollouts.reference_log_probs is not None:
        row["kl"] = kl_estimate(log_prob, kept(rollouts.reference_log_probs))
        each = each + config.beta * row["kl"]
    told = {name: (lax.stop_gradient(value) * shares).sum() for name, value in row.items()}
    told["left_out"] = (~rollouts.mask.any(-1)).sum().astype(jnp.float32)
    return (each * weights).sum(), told


@functools.partial(jax.jit, static_argnums=(0, 4))
def _all_log_probs(
    model: LanguageModel, params: PyTree, tokens: Array, mask: Array, config: GRPO
) -> Array:
    one = lambda given: _read(model, params, config, *given)[0]
    return lax.map(one, (tokens, mask), batch_size=config.backward.micro_batch or len(tokens))


def _read(
    model: LanguageModel, params: PyTree, config: GRPO, tokens: Array, mask: Array
) -> tuple[Array, Array]:
    """Log-probabilities and entropies of the tokens of one completion; 0 elsewhere, or of no meaning."""
    at = completion(mask, config.backward.longest)
    remat = config.backward.remat
    return log_probs_and_entropies(model, params, tokens, config.temperature, at, remat)
