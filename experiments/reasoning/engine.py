"""Writes answers: of one model, or of every member of a population to all prompts, in batches.

Answers are written in segments. A program reads the prompts and another writes one segment, with the
caches of all sequences handed from call to call in place; between segments the host asks whether all
sequences have ended. A loop on the device that each sequence leaves in its own time would have to copy
every cache at every token.

A prompt is read at a length that depends on its own alone (`buckets`), and what is drawn for it on the key,
its number and the token's. So neither the order of prompts nor how many are written at once changes a
text, as far as products of another size, which may be summed in another order, decide no near tie.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from eggroll import EvolutionStrategy, State
from eggroll.population.placement import constrain
from eggroll.population.schedule import EXACT
from experiments.reasoning.language_model import LanguageModel

# Stands where there is no token; nothing reads it.
PAD = 0
SMALLEST_BUCKET = 16

Ends = int | Sequence[int]


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
                raise ValueError(f"{name} is {getattr(self, name)}: {right} is right")


class Prompts(NamedTuple):
    """Prompts of any lengths.

    Attributes:
        tokens: int32 [prompts, slots], padded behind their ends.
        lengths: int32 [prompts].
    """

    tokens: np.ndarray
    lengths: np.ndarray


class Completions(NamedTuple):
    """What was written, on the host; leading axes [population, prompts] or [prompts, samples].

    Attributes:
        tokens: int32 [..., new], padded with 0 behind the end.
        lengths: int32 [...], tokens up to the end-of-text token, which counts.
        ended: bool [...], whether there was one; else the answer was cut.
        log_probs: float32 [..., new], of the chosen tokens under softmax(logits / temperature): the
            policy that sampled, before top_k and top_p, as a learner finds them again from whole texts
            (greedy ones at temperature 1). 0 behind the end.
        entropy: float32 [...], of that policy, mean over tokens.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    ended: np.ndarray
    log_probs: np.ndarray
    entropy: np.ndarray


class Part(NamedTuple):
    """Answers to some of the prompts, [population, which, ...].

    Attributes:
        which: int [which], numbers of the prompts.
        completions: to them.
    """

    which: np.ndarray
    completions: Completions


def pack(prompts: Sequence[Sequence[int]], slots: int | None = None) -> Prompts:
    """Prompts of token numbers as arrays.

    Args:
        prompts: at least one token each.
        slots: width of the array; that of the longest prompt by default.

    Raises:
        ValueError: for no prompts, an empty one, or one that is longer than slots.

    Example:
        >>> pack([[5, 6, 7], [8]])
        Prompts(tokens=array([[5, 6, 7], [8, 0, 0]], dtype=int32), lengths=array([3, 1], dtype=int32))
    """
    if not prompts:
        raise ValueError("there are no prompts; at least one is right")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    slots = int(lengths.max()) if slots is None else slots
    tokens = np.full((len(prompts), slots), PAD, np.int32)
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= slots:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens; 1 to {slots} is right")
        tokens[i, : len(prompt)] = prompt
    return Prompts(tokens, lengths)


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


def generate(
    model: LanguageModel,
    params: PyTree,
    prompts: Prompts,
    key: Key[Array, ""],
    sampling: Sampling,
    eos: Ends,
    samples: int = 1,
    chunk: int | None = None,
    segment: int = 32,
) -> Completions:
    """Answers of one model.

    Args:
        model: what its functions are.
        params: of the model.
        prompts: of :func:`pack`.
        key: decides what is drawn.
        sampling: how.
        eos: the token that ends a text, or several; with none of them all answers are cut.
        samples: answers to each prompt.
        chunk: sequences that are written at once; all of them by default.
        segment: tokens between two looks at whether all have ended, at most.

    Returns:
        Completions [prompts, samples, ...].

    Raises:
        ValueError: for tokens that the model does not have, lengths that do not fit, and numbers below 1.

    Example:
        >>> from experiments.models.transformer import TransformerConfig
        >>> from experiments.reasoning.language_model import language_model
        >>> model = language_model(TransformerConfig(vocab_size=7, hidden_size=8, intermediate_size=12,
        ...     num_hidden_layers=2, num_attention_heads=2))
        >>> params, rule = model.init(jax.random.key(0)), Sampling(max_new_tokens=5, temperature=1.0)
        >>> generate(model, params, pack([[1, 2], [3]]), jax.random.key(1), rule, 6, 4).tokens.shape
        (2, 4, 5)
    """
    _check_positive(samples=samples)
    several = Prompts(*(np.repeat(x, samples, axis=0) for x in prompts))
    writer = _Writer(model, None, sampling, _ends(eos), segment)
    completions = _joined(list(writer.parts(params, key, several, chunk)), axis=0)
    return Completions(*(x.reshape(-1, samples, *x.shape[1:]) for x in completions))


def answer(
    model: LanguageModel,
    es: EvolutionStrategy,
    state: State,
    prompts: Prompts,
    sampling: Sampling,
    eos: Ends,
    chunk: int | None = None,
    segment: int = 32,
) -> Completions:
    """Answers of every member of the coming generation to all prompts.

    Args:
        model: what its functions are.
        es: perturbs the parameters, by `es.map`.
        state: of es, with the model's parameters.
        prompts: of :func:`pack`.
        sampling: how; the two members of a pair draw with the same keys (unless `es.shared_keys` is off).
        eos: as in :func:`generate`.
        chunk: prompts whose answers are written at once; all of them by default.
        segment: as in :func:`generate`. The noise is drawn anew for each.

    Returns:
        Completions [population, prompts, ...].

    Raises:
        ValueError: as in :func:`generate`.

    Example:
        >>> import optax
        >>> from experiments.models.transformer import TransformerConfig
        >>> from experiments.reasoning.language_model import language_model
        >>> model = language_model(TransformerConfig(vocab_size=7, hidden_size=8, intermediate_size=12,
        ...     num_hidden_layers=2, num_attention_heads=2))
        >>> es = EvolutionStrategy(optimizer=optax.sgd(1.0), population=4, sigma=0.1, plan=model.plan)
        >>> state = es.init(model.init(jax.random.key(0)), jax.random.key(1))
        >>> answer(model, es, state, pack([[1, 2], [3]]), Sampling(max_new_tokens=5), eos=6).tokens.shape
        (4, 2, 5)
    """
    return _joined(list(stream(model, es, state, prompts, sampling, eos, chunk, segment)), axis=1)


def stream(
    model: LanguageModel,
    es: EvolutionStrategy,
    state: State,
    prompts: Prompts,
    sampling: Sampling,
    eos: Ends,
    chunk: int | None = None,
    segment: int = 32,
) -> Iterator[Part]:
    """:func:`answer` a chunk of prompts at a time, so that rewards of one are computed beside the next.

    Yields:
        Answers to at most `chunk` prompts. Each prompt comes once, not in order.
    """
    writer = _Writer(model, es.placed(state), sampling, _ends(eos), segment)
    yield from writer.parts(state, None, prompts, chunk)


def buckets(
    lengths: Int[np.ndarray, "prompts"], chunk: int | None = None
) -> list[tuple[int, np.ndarray]]:
    """Prompts that are read together: (padded length, numbers of the prompts).

    Padded lengths are powers of two from 16 on, so that there are few programs to compile.

    Args:
        lengths: of the prompts.
        chunk: at most so many at once.

    Example:
        >>> buckets(np.array([3, 40, 16, 5]), chunk=2)
        [(16, array([0, 2])), (16, array([3])), (64, array([1]))]
    """
    padded = np.array([padded_length(int(n)) for n in lengths])
    found = []
    for slots in np.unique(padded):
        which = np.flatnonzero(padded == slots)
        size = len(which) if chunk is None else chunk
        found += [(int(slots), which[i : i + size]) for i in range(0, len(which), size)]
    return found


def padded_length(length: int) -> int:
    """How long a prompt is read."""
    return _power_of_two(max(SMALLEST_BUCKET, length))


def segments(max_new_tokens: int, segment: int) -> tuple[int, int]:
    """How many segments follow the first token, and the tokens of each, all alike.

    They write at most one token a segment too many, which is cut off, and are one program.

    Example:
        >>> segments(max_new_tokens=64, segment=16), segments(1, 16)
        ((4, 16), (0, 0))
    """
    rest = max_new_tokens - 1
    count = -(-rest // segment)
    return count, -(-rest // max(count, 1))


# ---------------------------------------------------------------- what the device runs


class _Text(NamedTuple):
    """A sequence that is being written: all that it leaves between calls."""

    cache: Any
    token: Int[Array, ""]  # the last one, which the model has not read yet
    ended: Bool[Array, ""]


class _Written(NamedTuple):
    """A token, or with an axis more those of a segment; arrays of JAX, on the host of NumPy."""

    token: Any
    log_prob: Any
    entropy: Any


# Two functions of a member's parameters. They are objects that are equal where what they are made of
# is, so that a program is compiled once.


@dataclasses.dataclass(frozen=True)
class _Begin:
    """Reads prompts and writes the first token of each answer."""

    model: LanguageModel
    sampling: Sampling
    room: int

    def __call__(
        self,
        params: PyTree,
        key: Key[Array, ""],
        eos: Int[Array, "ends"],
        ids: Int[Array, "prompts"],
        tokens: Int[Array, "prompts slots"],
        lengths: Int[Array, "prompts"],
    ) -> tuple[_Text, _Written]:
        def one(i: Array, tokens: Array, length: Array) -> tuple[_Text, _Written]:
            logits, cache = self.model.prefill(params, tokens, length, tokens.size + self.room)
            start, key_of_token = jnp.bool_(False), _key(key, i, jnp.int32(0))
            text, written = _write(logits, cache, start, key_of_token, self.sampling, eos)
            return text, jax.tree.map(lambda x: x[None], written)

        return jax.vmap(one)(ids, tokens, lengths)


@dataclasses.dataclass(frozen=True)
class _GoOn:
    """Writes a segment of each answer."""

    model: LanguageModel
    sampling: Sampling
    steps: int

    def __call__(
        self,
        params: PyTree,
        key: Key[Array, ""],
        texts: _Text,
        eos: Int[Array, "ends"],
        ids: Int[Array, "prompts"],
        begin: Int[Array, ""],
    ) -> tuple[_Text, _Written]:
        def one(text: _Text, i: Array) -> tuple[_Text, _Written]:
            def token(text: _Text, t: Array) -> tuple[_Text, _Written]:
                logits, cache = self.model.decode(params, text.cache, text.token, t)
                key_of_token = _key(key, i, t + 1)
                return _write(logits, cache, text.ended, key_of_token, self.sampling, eos)

            return lax.scan(token, text, begin + jnp.arange(self.steps, dtype=jnp.int32))

        return jax.vmap(one)(texts, ids)


def _key(key: Key[Array, ""], i: Int[Array, ""], t: Int[Array, ""]) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.fold_in(key, i), t)


def _write(
    logits: Float[Array, "vocab"],
    cache: Any,
    ended: Bool[Array, ""],
    key: Key[Array, ""],
    sampling: Sampling,
    eos: Int[Array, "ends"],
) -> tuple[_Text, _Written]:
    """Chooses a token, unless the text has ended."""
    token = choose(logits, key, sampling)
    policy = jax.nn.log_softmax(logits.astype(jnp.float32) / (sampling.temperature or 1))
    # A token that cannot come has no part in the entropy: 0 and not 0 * -inf.
    entropy = -jnp.sum(jnp.where(policy > -jnp.inf, jnp.exp(policy) * policy, 0))
    unless = lambda x, pad: jnp.where(ended, jnp.asarray(pad, x.dtype), x)
    written = _Written(unless(token, PAD), unless(policy[token], 0), unless(entropy, 0))
    return _Text(cache, written.token, ended | jnp.any(token == eos)), written


def _called(
    fn: Any, es: EvolutionStrategy | None, source: Any, key: Any, texts: _Text | None, args: tuple
) -> tuple[_Text, Bool[Array, ""], _Written]:
    """A function of parameters: of the model's own, or of all members of a strategy's state.

    Texts stay where their members are; whether all have ended, and what was written, is for every host.
    """
    if es is None:
        texts, written = fn(source, key, *(() if texts is None else (texts,)), *args)
        return texts, texts.ended.all(), written
    texts, written = es.map(source, fn, *args, members=texts)
    for_hosts = lambda x: constrain(x, jax.P(), es.mesh)
    return texts, for_hosts(texts.ended.all()), jax.tree.map(for_hosts, written)


_FORMS: dict[str, Any] = dict(static_argnums=(0, 1), donate_argnums=(4,))
_plain_call = jax.jit(_called, **_FORMS)
_exact_call = jax.jit(_called, compiler_options=EXACT, **_FORMS)


def _call(fn: Any, es: EvolutionStrategy | None, *args: Any) -> Any:
    """`_called`, compiled; exactly where a strategy is deterministic."""
    return (_exact_call if es is not None and es.deterministic else _plain_call)(fn, es, *args)


# ---------------------------------------------------------------- what the host does


class _Writer(NamedTuple):
    """Everything but the parameters and the prompts."""

    model: LanguageModel
    es: EvolutionStrategy | None
    sampling: Sampling
    eos: tuple[int, ...]
    segment: int

    def parts(self, source: Any, key: Any, prompts: Prompts, chunk: int | None) -> Iterator[Part]:
        """Answers to all prompts, a chunk of a bucket at a time."""
        _check_positive(segment=self.segment, chunk=1 if chunk is None else chunk)
        _check(prompts, self.model.vocab_size, self.eos)
        most = len(prompts.lengths) if chunk is None else chunk
        for slots, which in buckets(prompts.lengths, chunk):
            # Some prompts are read once more rather than that every number of them is a program.
            rows = np.resize(which, min(most, _power_of_two(len(which))))
            tokens = np.full((len(rows), slots), PAD, np.int32)
            width = min(slots, prompts.tokens.shape[1])
            tokens[:, :width] = prompts.tokens[rows, :width]
            written = self._write(source, key, rows.astype(np.int32), tokens, prompts.lengths[rows])
            new = self.sampling.max_new_tokens
            yield Part(which, _completions(written, len(which), new, self.eos))

    def _write(
        self, source: Any, key: Any, ids: np.ndarray, tokens: np.ndarray, lengths: np.ndarray
    ) -> _Written:
        """All tokens of some answers, until the last has ended."""
        eos = np.array(self.eos, np.int32)
        eos, ids, tokens, lengths = jax.device_put((eos, ids, tokens, lengths))
        count, steps = segments(self.sampling.max_new_tokens, self.segment)
        begin = _Begin(self.model, self.sampling, count * steps)
        go_on = _GoOn(self.model, self.sampling, steps)
        texts, over, first = _call(begin, self.es, source, key, None, (eos, ids, tokens, lengths))
        pieces = [first]
        for i in range(count):
            if jax.device_get(over):
                break
            t = jax.device_put(np.int32(i * steps))
            texts, over, piece = _call(go_on, self.es, source, key, texts, (eos, ids, t))
            pieces.append(piece)
        return jax.tree.map(lambda *x: np.concatenate(x, -1), *jax.device_get(pieces))


def _completions(written: _Written, prompts: int, new: int, eos: tuple[int, ...]) -> Completions:
    """Of the first prompts alone; cut, or padded, to `new` tokens."""

    def fit(x: np.ndarray) -> np.ndarray:
        short = max(0, new - x.shape[-1])
        return np.pad(x[..., :prompts, :new], [(0, 0)] * (x.ndim - 1) + [(0, short)])

    tokens, log_probs, entropy = map(fit, written)
    is_end = np.isin(tokens, eos)
    ended = np.asarray(is_end.any(-1))
    lengths = np.where(ended, is_end.argmax(-1) + 1, new).astype(np.int32)
    mean = (entropy.sum(-1) / lengths).astype(np.float32)
    return Completions(tokens, lengths, ended, log_probs, mean)


def _joined(parts: list[Part], axis: int) -> Completions:
    """The answers to all prompts, in their order."""
    order = np.argsort(np.concatenate([part.which for part in parts]))
    join = lambda *x: np.take(np.concatenate(x, axis), order, axis)
    return jax.tree.map(join, *(part.completions for part in parts))


def _ends(eos: Ends) -> tuple[int, ...]:
    return tuple(eos) if isinstance(eos, Sequence) else (eos,)


def _power_of_two(n: int) -> int:
    """The smallest that is not less than n."""
    return 1 << (n - 1).bit_length()


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} is {number}: at least 1 is right")


def _check(prompts: Prompts, vocab: int, eos: tuple[int, ...]) -> None:
    slots = prompts.tokens.shape[1]
    for i, length in enumerate(prompts.lengths):
        if not 1 <= length <= slots:
            raise ValueError(f"prompt {i} has {length} tokens; 1 to {slots} is right")
        tokens = prompts.tokens[i, :length]
        wrong = tokens[(tokens < 0) | (tokens >= vocab)]
        if wrong.size:
            raise ValueError(f"prompt {i} has the token {wrong[0]}; 0 to {vocab - 1} is right")
    for token in eos:
        if not 0 <= token < vocab:
            raise ValueError(f"eos is {token}; 0 to {vocab - 1} is right")
