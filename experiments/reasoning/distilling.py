"""Distillation as a fitness: members are scored by how near their predictions are to those of teachers.

For each question the teachers' distributions are mixed, with more weight for those that predict its worked
solution better: weights are a softmax of minus the teachers' losses on that question over a temperature. A
member's score is minus the Kullback-Leibler divergence of its own distribution from the mixture, in nats a
token. No gradient passes through student or teachers, so a student may hold its matrices in int8.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from experiments.models.tokens import AnyTokenizer
from experiments.reasoning.config import Config
from experiments.reasoning.language_model import LanguageModel
from experiments.reasoning.start import Start, start
from experiments.run.errors import UsageError
from experiments.run.fields import changed

# A text that tokenizers must read alike to be taken for the same.
SAMPLE = "What is 12+30? The answer is 42.\n\n\tNaïve: 1,000.5 €"


class Mixture(NamedTuple):
    """What teachers predict after each token but the last.

    Attributes:
        probabilities: of every token after each one, the teachers' mixed by the weights.
        weights: of the teachers, for each question; they sum to 1.
    """

    probabilities: Float[Array, "tasks predicted vocab"]
    weights: Float[Array, "tasks teachers"]


class Teachers:
    """The models that a student learns from, with their parameters on the first device.

    Args:
        config: the settings of the student, which name the teachers.
        student: that learns.

    Raises:
        UsageError: for a teacher that cannot be read, or reads other tokens than the student.
    """

    def __init__(self, config: Config, student: Start) -> None:
        self._models, self._params = list[LanguageModel](), list[PyTree]()
        for name in config.teachers:
            base = teacher(config, name)
            ours, theirs = student.model.vocab_size, base.model.vocab_size
            if ours != theirs or not same_tokens(student.tokenizer, base.tokenizer):
                raise UsageError(
                    f"--teachers {name}: must have the tokenizer of the student, of {ours} tokens, and has "
                    f"another, of {theirs}"
                )
            self._models.append(base.model)
            self._params.append(jax.tree.map(jnp.asarray, base.params(jnp.int32(config.seed))))
        self._mix = jax.jit(functools.partial(mixture, self._models, config.teacher_temperature))

    def mixture(
        self, tokens: Int[Array, "tasks length"], mask: Bool[Array, "tasks length"]
    ) -> Mixture:
        """What they predict of worked solutions (:func:`mixture`)."""
        return self._mix(self._params, tokens, mask)


def teacher(config: Config, name: str) -> Start:
    """A teacher by its name: a run folder of `eggroll reasoning`, or what `--model` takes."""
    plain = changed(config, quantised=False, chat=False, system=None, chat_settings="{}")
    if (Path(name) / "checkpoints").is_dir():
        return start(changed(plain, start=Path(name), dtype="auto"))
    return start(changed(plain, start=None, model=name))


def same_tokens(one: AnyTokenizer, other: AnyTokenizer) -> bool:
    """Whether two tokenizers read a text alike and end texts with the same tokens."""
    return one.encode(SAMPLE) == other.encode(SAMPLE) and set(one.eos) == set(other.eos)


def mixture(
    models: Sequence[LanguageModel],
    temperature: float,
    params: Sequence[PyTree],
    tokens: Int[Array, "tasks length"],
    mask: Bool[Array, "tasks length"],
) -> Mixture:
    """The teachers' distributions, mixed for each question by how well they predict its solution.

    Args:
        models: the teachers.
        temperature: of the weights: near 0 the best teacher of a question alone counts, and with a large
            one all alike.
        params: of each.
        tokens: of each example, prompt and solution.
        mask: of solutions.

    Example:
        >>> sure = jnp.log(jnp.array([0.1, 0.9])) * jnp.ones((3, 1))
        >>> flat = jnp.zeros((3, 2))
        >>> models = [LanguageModel(2, *[None] * 6)._replace(apply=lambda p, tokens: p)] * 2
        >>> tokens, mask = jnp.array([[0, 1, 1]]), jnp.array([[False, True, True]])
        >>> found = mixture(models, 1.0, [sure, flat], tokens, mask)
        >>> [f"{x:.3f}" for x in (*found.weights[0], *found.probabilities[0, 0])]
        ['0.643', '0.357', '0.243', '0.757']
    """
    every = jnp.stack(
        [_predicted(model, p, tokens) for model, p in zip(models, params, strict=True)]
    )
    chosen = jnp.take_along_axis(every, tokens[None, :, 1:, None], -1)[..., 0]
    weights = jax.nn.softmax(_mean(chosen, mask[:, 1:]).T / temperature)
    return Mixture(jnp.einsum("nk,kntv->ntv", weights, jnp.exp(every)), weights)


def teacher_score(
    model: LanguageModel,
    params: PyTree,
    key: Key[Array, ""] | None,
    tokens: Int[Array, "tasks length"],
    mask: Bool[Array, "tasks length"],
    mixed: Mixture,
) -> Float[Array, "tasks"]:
    """Minus the divergence of a member's predictions from the teachers', a token; at most 0.

    Args:
        model: bound by ``functools.partial(teacher_score, model)``, which is a fitness for an
            `EvolutionStrategy`.
        params: of a member.
        key: not looked at.
        tokens: of each example.
        mask: of solutions.
        mixed: what the teachers predict.

    Example:
        >>> model = LanguageModel(2, *[None] * 6)._replace(apply=lambda p, tokens: p)
        >>> tokens, mask = jnp.array([[0, 1]]), jnp.array([[False, True]])
        >>> like = Mixture(jnp.array([[[0.25, 0.75]]]), jnp.ones((1, 1)))
        >>> params = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]]))
        >>> abs(float(teacher_score(model, params, None, tokens, mask, like)[0])) < 1e-6
        True
    """
    own = _predicted(model, params, tokens)
    aims = mixed.probabilities
    each = (jnp.where(aims > 0, aims * (own - jnp.log(jnp.where(aims > 0, aims, 1))), 0)).sum(-1)
    return _mean(each, mask[:, 1:])


def _predicted(
    model: LanguageModel, params: PyTree, tokens: Int[Array, "tasks length"]
) -> Float[Array, "tasks predicted vocab"]:
    """Log-probabilities of what comes after each token but the last; float32 at least."""
    logits = jax.vmap(lambda one: model.apply(params, one)[:-1])(tokens)
    return jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))


def _mean(
    each: Float[Array, "*models tasks predicted"], mask: Bool[Array, "tasks predicted"]
) -> Float[Array, "*models tasks"]:
    return jnp.where(mask, each, 0).sum(-1) / jnp.maximum(mask.sum(-1), 1)
