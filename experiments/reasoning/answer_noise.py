"""Learning from rewards with noise of its own for every answer: on weights, or on what comes out of layers.

Usually a member answers all questions of a generation, and its noise is told by the sum of what it came to.
Here it answers one, so that a generation tries as many noises as it has answers. Prompts are read once,
without noise, up to their last token; an answer is written from there under the noise of its member.

Node noise goes on: the members of a pair see ``y_t + sigma e_t`` and ``y_t - sigma e_t`` at every product of
every token that they write, and the difference of their rewards tells about these outputs alone: of a
matrix, ``x_t (outer) (r+ - r-) e_t / (2 sigma)``, where x_t is the mean of the two members' inputs. Answers
are read once more under the same noise to sum that up.
"""

import abc
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree

import eggroll
from eggroll import Rows
from eggroll.population.schedule import EXACT
from experiments.reasoning import diagnostics
from experiments.reasoning.engine import Share, Text, Written, groups_of, unseen, write
from experiments.reasoning.evolution import (
    Answers,
    Evolution,
    Population,
    objective,
    row_of_answers,
)
from experiments.reasoning.language_model import LanguageModel
from experiments.reasoning.questions import repeated
from experiments.reasoning.sampling import Sampling
from experiments.reasoning.sequences import (
    PAD,
    Completions,
    Prompts,
    check_tokens,
    completions_of,
    padded_length,
    shared_length,
    tokens_read,
)
from experiments.reasoning.tasks import Question
from experiments.run.errors import UsageError
from experiments.run.history import SCORES

# Answers are read again up to a multiple of this: few programs, and few tokens behind the longest.
STEP = 4
# Stands for a token that is chosen.
CHOSEN = -1


class Read(NamedTuple):
    """Prompts that were read without noise up to their last token.

    Attributes:
        caches: leaves ``[prompts, ...]``.
        last: the last token of each; int32 ``[prompts]``.
        prefix: the cache of what all prompts begin with, or None.
    """

    caches: PyTree
    last: Any
    prefix: PyTree


class Own(NamedTuple):
    """What a member has of its own.

    Attributes:
        prompt: the number of its prompt; int32 ``[]``.
        given: the tokens of its answer, `CHOSEN` for those to be written; int32 ``[steps]``.
    """

    prompt: Any
    given: Any


@dataclasses.dataclass(frozen=True)
class Writes:
    """Writes or reads the answer of a member, as a function of its parameters.

    Attributes:
        model: what its functions are.
        sampling: how tokens are chosen.
    """

    model: LanguageModel
    sampling: Sampling

    def __call__(
        self, params: PyTree, key: Key[Array, ""], own: Own, read: Read, eos: Int[Array, "ends"]
    ) -> Written:
        def token(text: Text, at: tuple[Array, Array]) -> tuple[Text, Written]:
            t, given = at
            logits, cache = self.model.decode(params, text.cache, text.token, t, read.prefix)
            key_of_token = jax.random.fold_in(key, t)
            text, written = write(logits, cache, text.ended, key_of_token, self.sampling, eos)
            return text._replace(token=jnp.where(given == CHOSEN, text.token, given)), written

        mine = lambda whole: lax.dynamic_index_in_dim(whole, own.prompt, keepdims=False)
        start = Text(jax.tree.map(mine, read.caches), mine(read.last), jnp.bool_(False))
        steps = jnp.arange(own.given.shape[0], dtype=jnp.int32)
        return lax.scan(token, start, (steps, own.given))[1]


class AnswerNoise(Population, abc.ABC):
    """Learning where every answer has noise of its own.

    The strategy has a member for each answer of a generation: pair p of the strategy answers question
    ``p % asked``. Tables are those of `Evolution`, ``[population, asked]``.
    """

    def generation(
        self, state: eggroll.State, generation: int, share: Share = unseen
    ) -> tuple[eggroll.State, dict[str, Any]]:
        """Answers of every member, their rewards, and an update by both."""
        questions = self._questions.of_generation(generation)
        found, read = self._answered(state, questions, share)
        row = row_of_answers(found) | {"prompt_tokens": found.tokens_read}
        state, told = self._learned(state, found, read, self._values(found))
        return state, told | _fitness(found.rewards) | row

    @abc.abstractmethod
    def _learned(
        self, state: eggroll.State, found: Answers, read: Read, values: Float[np.ndarray, "answers"]
    ) -> tuple[eggroll.State, dict[str, Any]]:
        """An update by the scores of all answers, and its figures; the state is donated."""

    @functools.cached_property
    def _writes(self) -> Writes:
        return Writes(self._base.model, self._questions.sampling())

    def _prompts(self, asked: int) -> Int[np.ndarray, "answers"]:
        """The number of the prompt of every member of the strategy."""
        return (np.arange(self.es.population) // 2 % asked).astype(np.int32)

    def answers(
        self, state: eggroll.State, questions: Sequence[Question], share: Share = unseen
    ) -> Answers:
        return self._answered(state, questions, share)[0]

    def _answered(
        self, state: eggroll.State, questions: Sequence[Question], share: Share
    ) -> tuple[Answers, Read]:
        """What every member answers with its rewards, and the prompts as they were read."""
        asked = repeated(questions, self._config.samples)
        prompts = self._questions.prompts(asked)
        if (prompts.lengths < 2).any():
            short = asked[int(prompts.lengths.argmin())].prompt
            raise UsageError(
                f"--perturb {self._config.perturb}: the prompt {short!r} must have at least 2 tokens, got 1, "
                "since noise begins at the last"
            )
        ends, sampling = self._questions.ends, self._questions.sampling()
        check_tokens(prompts, self._base.model.vocab_size, ends)
        read = read_prompts(
            self._base.model, state.params, prompts, sampling.max_new_tokens, self.es.deterministic
        )
        steps, parts = sampling.max_new_tokens, list[Written]()
        own = Own(self._prompts(len(asked)), np.full((self.es.population, steps), CHOSEN, np.int32))
        es, eos = self.es.placed(state), np.array(ends, np.int32)
        for pairs, members in groups_of(es):
            share(int(members[0]), es.population, "answers")
            mine = jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:])[pairs], own)  # noqa: B023
            mine = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), mine)
            written = jax.device_get(self._map(es, state, self._writes, pairs, mine, read, eos))
            parts.append(jax.tree.map(lambda x: x[: len(members)], written))  # noqa: B023
        share(es.population, es.population, "answers")
        written = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        token, log_prob, entropy = (x[:, None] for x in written)
        one = completions_of(token, log_prob, entropy, 1, steps, ends)
        completions = Completions(*(_table(x[:, 0], len(asked)) for x in one))
        texts = self._questions.texts(completions)
        rows = len(completions.lengths)
        handle = self._examiner.submit(texts, [*asked] * rows)
        found = self._examiner.rewards(handle, completions.lengths.shape)
        answers = Answers(
            asked=asked,
            texts=np.array(texts, object).reshape(completions.lengths.shape),
            completions=completions,
            rewards=found.rewards,
            parts=found.parts,
            late=found.late,
            # Every prompt is read once.
            tokens_read=tokens_read(prompts),
        )
        return answers, read

    def _values(self, found: Answers) -> Float[np.ndarray, "answers"]:
        """The score of every answer, compared on each question by itself; NaN where it is not known."""
        scores = objective(found.rewards, self._config)
        known = np.isfinite(scores)
        shaped = eggroll.shaping.per_task()(
            jnp.asarray(np.where(known, scores, 0)), jnp.asarray(known), None
        )
        values = np.where(known, np.asarray(shaped), np.nan)
        return _flat(np.repeat(values, self._config.samples, axis=1))

    @functools.cached_property
    def _map(self) -> Any:
        def mapped(
            es: eggroll.EvolutionStrategy,
            state: eggroll.State,
            fn: Writes,
            pairs: Array,
            own: Own,
            *args: Any,
        ) -> Written:
            return es.map(state, fn, *args, members=own, pairs=pairs)

        return self._layout.jit(mapped, static_argnums=(0, 2))


class WeightNoise(AnswerNoise):
    """Noise on weights."""

    def _learned(
        self, state: eggroll.State, found: Answers, read: Read, values: Float[np.ndarray, "answers"]
    ) -> tuple[eggroll.State, dict[str, Any]]:
        scores = values.astype(np.float32)
        state, told = self.update(state, scores)
        return state, told | {SCORES: scores}


class OutputNoise(AnswerNoise):
    """Node noise."""

    def _learned(
        self, state: eggroll.State, found: Answers, read: Read, values: Float[np.ndarray, "answers"]
    ) -> tuple[eggroll.State, dict[str, Any]]:
        tokens, lengths = found.completions.tokens, found.completions.lengths
        used = min(tokens.shape[-1], -(-int(lengths.max()) // STEP) * STEP)
        own = Own(self._prompts(len(found.asked)), _flat(tokens)[:, :used])
        es = dataclasses.replace(self.es, rows=Rows(used, pick=0))
        scores = rows_of(values, _flat(lengths), used)
        given = (self._writes, read, np.array(self._questions.ends, np.int32))
        return self._update_by(es.placed(state), state, scores, own, *given)

    @functools.cached_property
    def _update_by(self) -> Any:
        def updated(
            es: eggroll.EvolutionStrategy,
            state: eggroll.State,
            values: Array,
            own: Own,
            fn: Writes,
            *args: Any,
        ) -> tuple[eggroll.State, dict[str, Any]]:
            new, metrics = es.update(state, values, fn, *args, members=own)
            return new, self._told(es, state, new, metrics)

        where = (self.sharding, self._layout.everywhere)
        return self._layout.jit(updated, where, static_argnums=(0, 4), donate_argnums=1)


# The learner of each `--perturb`.
LEARNERS: Mapping[str, type[Evolution] | type[WeightNoise] | type[OutputNoise]] = {
    "weights": Evolution,
    "answers": WeightNoise,
    "nodes": OutputNoise,
}


def read_prompts(
    model: LanguageModel, params: PyTree, prompts: Prompts, room: int, exact: bool = False
) -> Read:
    """Reads prompts up to their last token.

    Args:
        model: what its functions are.
        params: of the model.
        prompts: of `sequences.pack`, each of at least two tokens.
        room: tokens that are read afterwards: the last of the prompt, and all but the last of an answer.
        exact: gives the same bits on any number of devices.

    Raises:
        ValueError: for a prompt of one token.
    """
    if (prompts.lengths < 2).any():
        raise ValueError(
            f"prompt {int(prompts.lengths.argmin())} must have at least 2 tokens, got 1: noise begins at "
            "the last"
        )
    begun = Prompts(prompts.tokens, prompts.lengths - 1)
    shared = shared_length(begun)
    rest = begun.lengths - shared
    slots = padded_length(int(rest.max()))
    tokens = np.full((len(rest), slots), PAD, np.int32)
    width = min(slots, prompts.tokens.shape[1] - shared)
    tokens[:, :width] = prompts.tokens[:, shared : shared + width]
    last = np.take_along_axis(prompts.tokens, begun.lengths[:, None], 1)[:, 0]
    read_prefix, read_rest = _EXACT_READS if exact else _READS
    prefix = read_prefix(model, params, prompts.tokens[0, :shared]) if shared else None
    return Read(read_rest(model, params, tokens, rest, slots + room, prefix), last, prefix)


def _prefix(model: LanguageModel, params: PyTree, tokens: Array) -> PyTree:
    return model.prefill(params, tokens, tokens.size, tokens.size, None)[1]


def _caches(
    model: LanguageModel, params: PyTree, tokens: Array, lengths: Array, slots: int, prefix: PyTree
) -> PyTree:
    read = lambda tokens, length: model.prefill(params, tokens, length, slots, prefix)[1]
    return jax.vmap(read)(tokens, lengths)


_READS = jax.jit(_prefix, static_argnums=0), jax.jit(_caches, static_argnums=(0, 4))
_EXACT_READS = (
    jax.jit(_prefix, static_argnums=0, compiler_options=EXACT),
    jax.jit(_caches, static_argnums=(0, 4), compiler_options=EXACT),
)


def rows_of(
    values: Float[np.ndarray, "answers"], lengths: Int[np.ndarray, "answers"], steps: int
) -> Float[np.ndarray, "answers steps"]:
    """Scores of answers as scores of tokens: that of a pair is told at the end of its longer answer, so that
    no token behind both gets any of it.

    They are multiplied by the number of rows, over which a strategy takes the mean.

    Example:
        >>> print(rows_of(np.array([1.0, -1.0]), np.array([1, 2]), 3))
        [[ 0.  3.  0.]
         [ 0. -3.  0.]]
    """
    ends = np.repeat(lengths.reshape(-1, 2).max(1), 2) - 1
    return np.where(np.arange(steps) == ends[:, None], values[:, None] * steps, 0).astype(
        np.float32
    )


def _fitness(rewards: Float[np.ndarray, "population asked"]) -> dict[str, float]:
    """The figures of members that an update of weight noise has, from the mean rewards of each."""
    means = np.array([diagnostics.known_mean(own) for own in rewards])
    known = means[np.isfinite(means)]
    if not known.size:
        return {}
    figures = {"mean": known.mean(), "best": known.max(), "worst": known.min(), "std": known.std()}
    return {f"fitness_{name}": float(x) for name, x in figures.items()}


def _table(x: np.ndarray, asked: int) -> np.ndarray:
    """What the members of the strategy have, ``[answers, ...]``, as a table ``[population, asked, ...]``, in
    which the members of a pair are neighbours.

    Example:
        >>> print(_table(np.array([0, 1, 10, 11, 2, 3, 12, 13]), 2))
        [[ 0 10]
         [ 1 11]
         [ 2 12]
         [ 3 13]]
    """
    pairs = x.reshape(-1, asked, 2, *x.shape[1:])
    return np.moveaxis(pairs, 2, 1).reshape(-1, asked, *pairs.shape[3:])


def _flat(table: np.ndarray) -> np.ndarray:
    """The inverse of `_table`."""
    pairs = table.reshape(-1, 2, *table.shape[1:])
    return np.moveaxis(pairs, 1, 2).reshape(-1, *table.shape[2:])
