"""Writes answers: of one model, or of every member of a population to all prompts, in batches.

Members write some pairs at a time (`EvolutionStrategy(chunk=...)`), so that a population of any size needs
the memory of so many. What all prompts begin with, such as a system text, is read once a member.

Answers are written in segments. A program reads the prompts and another writes one segment, with the
caches of all sequences handed from call to call in place; between segments the host asks whether all
sequences have ended. A loop on the device that each sequence leaves in its own time would have to copy
every cache at every token.

The draw for a token depends on the key and on the numbers of its prompt and token. A prompt is read at a
length that depends on its own and on what all prompts share. Hence a text does not depend on how many prompts
are written at once, nor on which are written first, unless a near tie is decided by rounding (products of
another size may be summed in another order).
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from eggroll import EvolutionStrategy, State
from eggroll.population.placement import constrain, devices
from eggroll.population.schedule import EXACT
from experiments.reasoning.language_model import LanguageModel
from experiments.reasoning.sampling import Sampling, choose
from experiments.reasoning.sequences import (
    PAD,
    SEGMENT,
    Completions,
    Ends,
    Part,
    Prompts,
    as_ends,
    buckets,
    check_tokens,
    completions_of,
    joined,
    power_of_two,
    segments,
    shared_length,
)

# Told while answers are written: how much is done, of how much, and of what.
Share = Callable[[int, int, str], None]


def unseen(done: int, total: int, what: str) -> None:
    """A share that nobody is told."""


def generate(
    model: LanguageModel,
    params: PyTree,
    prompts: Prompts,
    key: Key[Array, ""],
    sampling: Sampling,
    eos: Ends,
    samples: int = 1,
    chunk: int | None = None,
    segment: int = SEGMENT,
    share: Share = unseen,
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
        share: told after every segment how many tokens of each answer are done, chunk after chunk.

    Returns:
        Completions [prompts, samples, ...].

    Raises:
        ValueError: for tokens that the model does not have, lengths that do not fit, and numbers below 1.

    Example:
        >>> from experiments.models.transformer import TransformerConfig
        >>> from experiments.reasoning.language_model import language_model
        >>> model = language_model(TransformerConfig(vocab_size=7, hidden_size=8, intermediate_size=12,
        ...     num_hidden_layers=2, num_attention_heads=2))
        >>> from experiments.reasoning.sequences import pack
        >>> params, rule = model.init(jax.random.key(0)), Sampling(max_new_tokens=5, temperature=1.0)
        >>> generate(model, params, pack([[1, 2], [3]]), jax.random.key(1), rule, 6, 4).tokens.shape
        (2, 4, 5)
    """
    _check_positive(samples=samples)
    several = Prompts(*(np.repeat(x, samples, axis=0) for x in prompts))
    writer = _Writer(model, None, sampling, as_ends(eos), segment, share)
    completions = joined(writer.parts(params, key, several, chunk), len(several.lengths))
    return Completions(*(x.reshape(-1, samples, *x.shape[1:]) for x in completions))


def answer(
    model: LanguageModel,
    es: EvolutionStrategy,
    state: State,
    prompts: Prompts,
    sampling: Sampling,
    eos: Ends,
    chunk: int | None = None,
    segment: int = SEGMENT,
    share: Share = unseen,
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
        share: as in :func:`generate`.

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
        >>> from experiments.reasoning.sequences import pack
        >>> es = EvolutionStrategy(optimizer=optax.sgd(1.0), population=4, sigma=0.1, plan=model.plan)
        >>> state = es.init(model.init(jax.random.key(0)), jax.random.key(1))
        >>> answer(model, es, state, pack([[1, 2], [3]]), Sampling(max_new_tokens=5), eos=6).tokens.shape
        (4, 2, 5)
    """
    parts = stream(model, es, state, prompts, sampling, eos, chunk, segment, share)
    return joined(parts, es.population, len(prompts.lengths))


def stream(
    model: LanguageModel,
    es: EvolutionStrategy,
    state: State,
    prompts: Prompts,
    sampling: Sampling,
    eos: Ends,
    chunk: int | None = None,
    segment: int = SEGMENT,
    share: Share = unseen,
) -> Iterator[Part]:
    """:func:`answer` a part at a time, so that rewards of one are computed beside the next.

    Yields:
        Answers of as many members as the strategy's `chunk` lets a device run at a time to at most `chunk`
        prompts. Each prompt comes once for each member, not in order.
    """
    writer = _Writer(model, es.placed(state), sampling, as_ends(eos), segment, share)
    yield from writer.parts(state, None, prompts, chunk)


# ---------------------------------------------------------------- what the device runs


class Text(NamedTuple):
    """A sequence that is being written: all that it leaves between calls.

    Attributes:
        cache: of all tokens but the last.
        token: the last one, which the model has not read yet.
        ended: whether it is the end.
    """

    cache: Any
    token: Int[Array, ""]
    ended: Bool[Array, ""]


class Written(NamedTuple):
    """A token, or with an axis more those of a segment; arrays of JAX, on the host of NumPy.

    Attributes:
        token: `PAD` behind the end.
        log_prob: of the token.
        entropy: of what it was drawn from.
    """

    token: Any
    log_prob: Any
    entropy: Any


class _Own(NamedTuple):
    """What a member, or the model, has of its own."""

    prefix: Any  # the cache of what all prompts begin with, or None
    texts: Text | None  # what is being written


# Functions of a member's parameters. They are objects that are equal where what they are made of is, so
# that a program is compiled once.


@dataclasses.dataclass(frozen=True)
class _ReadPrefix:
    """Reads what all prompts begin with."""

    model: LanguageModel

    def __call__(
        self, params: PyTree, key: Key[Array, ""], own: _Own, tokens: Int[Array, "shared"]
    ) -> Any:
        return self.model.prefill(params, tokens, tokens.size, tokens.size, None)[1]


@dataclasses.dataclass(frozen=True)
class _ReadPrompts:
    """Reads prompts and writes the first token of each answer."""

    model: LanguageModel
    sampling: Sampling
    room: int

    def __call__(
        self,
        params: PyTree,
        key: Key[Array, ""],
        own: _Own,
        eos: Int[Array, "ends"],
        ids: Int[Array, "prompts"],
        tokens: Int[Array, "prompts slots"],
        lengths: Int[Array, "prompts"],
    ) -> tuple[Text, Written]:
        def one(i: Array, tokens: Array, length: Array) -> tuple[Text, Written]:
            slots = tokens.size + self.room
            logits, cache = self.model.prefill(params, tokens, length, slots, own.prefix)
            start, key_of_token = jnp.bool_(False), _key(key, i, jnp.int32(0))
            text, written = write(logits, cache, start, key_of_token, self.sampling, eos)
            return text, jax.tree.map(lambda x: x[None], written)

        return jax.vmap(one)(ids, tokens, lengths)


@dataclasses.dataclass(frozen=True)
class _WriteSegment:
    """Writes a segment of each answer."""

    model: LanguageModel
    sampling: Sampling
    steps: int

    def __call__(
        self,
        params: PyTree,
        key: Key[Array, ""],
        own: _Own,
        eos: Int[Array, "ends"],
        ids: Int[Array, "prompts"],
        first: Int[Array, ""],
    ) -> tuple[Text, Written]:
        def one(text: Text, i: Array) -> tuple[Text, Written]:
            def token(text: Text, t: Array) -> tuple[Text, Written]:
                logits, cache = self.model.decode(params, text.cache, text.token, t, own.prefix)
                key_of_token = _key(key, i, t + 1)
                return write(logits, cache, text.ended, key_of_token, self.sampling, eos)

            return lax.scan(token, text, first + jnp.arange(self.steps, dtype=jnp.int32))

        assert own.texts is not None
        return jax.vmap(one)(own.texts, ids)


def _key(key: Key[Array, ""], i: Int[Array, ""], t: Int[Array, ""]) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.fold_in(key, i), t)


def write(
    logits: Float[Array, "vocab"],
    cache: Any,
    ended: Bool[Array, ""],
    key: Key[Array, ""],
    sampling: Sampling,
    eos: Int[Array, "ends"],
) -> tuple[Text, Written]:
    """Chooses a token, unless the text has ended."""
    token = choose(logits, key, sampling)
    policy = jax.nn.log_softmax(logits.astype(jnp.float32) / (sampling.temperature or 1))
    # A token that cannot come has no part in the entropy: 0 and not 0 * -inf.
    entropy = -jnp.sum(jnp.where(policy > -jnp.inf, jnp.exp(policy) * policy, 0))
    unless = lambda x, pad: jnp.where(ended, jnp.asarray(pad, x.dtype), x)
    written = Written(unless(token, PAD), unless(policy[token], 0), unless(entropy, 0))
    return Text(cache, written.token, ended | jnp.any(token == eos)), written


@dataclasses.dataclass(frozen=True)
class _OfNothing:
    """A function of members that have nothing of their own yet."""

    fn: Any

    def __call__(self, params: PyTree, key: Key[Array, ""], *args: Any) -> Any:
        return self.fn(params, key, _Own(None, None), *args)


def _mapped(
    fn: Any, es: EvolutionStrategy | None, source: Any, who: Any, own: _Own, args: tuple
) -> Any:
    """A function of parameters: of the model's own, or of some members of a strategy's state."""
    if es is None:
        return fn(source, who, own, *args)
    if not jax.tree.leaves(own):
        return es.map(source, _OfNothing(fn), *args, pairs=who)
    return es.map(source, fn, *args, members=own, pairs=who)


def _called(
    fn: Any,
    es: EvolutionStrategy | None,
    source: Any,
    who: Any,
    texts: Text | None,
    prefix: Any,
    args: tuple,
) -> tuple[Text, Bool[Array, ""], Written]:
    """A function that writes, as :func:`_mapped`.

    Texts stay where their members are; whether all have ended, and what was written, is for every host.
    """
    texts, written = _mapped(fn, es, source, who, _Own(prefix, texts), args)
    for_hosts = lambda x: x if es is None else constrain(x, jax.P(), es.mesh)
    return texts, for_hosts(texts.ended.all()), jax.tree.map(for_hosts, written)


_FORMS: dict[str, Any] = dict(static_argnums=(0, 1), donate_argnums=(4,))
_plain_call = jax.jit(_called, **_FORMS)
_exact_call = jax.jit(_called, compiler_options=EXACT, **_FORMS)


_plain_map = jax.jit(_mapped, static_argnums=(0, 1))
_exact_map = jax.jit(_mapped, static_argnums=(0, 1), compiler_options=EXACT)


def _call(fn: Any, es: EvolutionStrategy | None, *args: Any) -> Any:
    """`_called`, or of a prefix `_mapped`, compiled; exactly where a strategy is deterministic."""
    exact = es is not None and es.deterministic
    if isinstance(fn, _ReadPrefix):
        return (_exact_map if exact else _plain_map)(fn, es, *args)
    return (_exact_call if exact else _plain_call)(fn, es, *args)


# ---------------------------------------------------------------- what the host does


def groups_of(es: EvolutionStrategy) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs that write at a time, and their members; of the last group some pairs do so once more."""
    count = es.population // 2
    found = list[tuple[np.ndarray, np.ndarray]]()
    most = es.schedule.pairs_at_once(count, es.mesh) * devices(es.mesh)
    # All groups alike, so that they are one program, and whole on every device.
    share = devices(es.mesh)
    size = -(-count // (-(-count // most) * share)) * share
    for first in range(0, count, size):
        pairs = np.arange(first, first + size, dtype=np.int32) % count
        found.append((pairs, np.arange(2 * first, 2 * min(first + size, count))))
    return found


class _Writer(NamedTuple):
    """Everything but the parameters and the prompts."""

    model: LanguageModel
    es: EvolutionStrategy | None
    sampling: Sampling
    eos: tuple[int, ...]
    segment: int
    share: Share

    def parts(self, source: Any, key: Any, prompts: Prompts, chunk: int | None) -> Iterator[Part]:
        """Answers to all prompts, some members and a chunk of a bucket at a time."""
        _check_positive(segment=self.segment, chunk=1 if chunk is None else chunk)
        check_tokens(prompts, self.model.vocab_size, self.eos)
        shared = shared_length(prompts)
        rest = Prompts(prompts.tokens[:, shared:], prompts.lengths - shared)
        begin = prompts.tokens[0, :shared]
        together = buckets(rest.lengths, chunk)
        of_model: list[tuple[None, None]] = [(None, None)]
        groups = of_model if self.es is None else groups_of(self.es)
        most = len(rest.lengths) if chunk is None else chunk
        new, count = self.sampling.max_new_tokens, len(together) * len(groups)
        for i, (pairs, members) in enumerate(groups):
            who = key if pairs is None else jax.device_put(pairs)
            prefix = self._read(source, who, begin) if shared else None
            for j, (slots, which) in enumerate(together):
                done = (i * len(together) + j) * new
                tell = lambda tokens, done=done: self.share(done + tokens, count * new, "tokens")
                # Some prompts are read once more rather than that every number of them is a program.
                rows = np.resize(which, min(most, power_of_two(len(which))))
                tokens = np.full((len(rows), slots), PAD, np.int32)
                width = min(slots, rest.tokens.shape[1])
                tokens[:, :width] = rest.tokens[rows, :width]
                ids = rows.astype(np.int32)
                written = self._write(source, who, prefix, ids, tokens, rest.lengths[rows], tell)
                tell(new)
                if members is not None:
                    written = jax.tree.map(lambda x: x[: len(members)], written)  # noqa: B023
                yield Part(members, which, completions_of(*written, len(which), new, self.eos))
            # Before the next one is read.
            del prefix

    def _read(self, source: Any, who: Any, tokens: np.ndarray) -> Any:
        """The cache of what all prompts begin with."""
        given = _Own(None, None), (jax.device_put(tokens),)
        return _call(_ReadPrefix(self.model), self.es, source, who, *given)

    def _write(
        self,
        source: Any,
        who: Any,
        prefix: Any,
        ids: np.ndarray,
        tokens: np.ndarray,
        lengths: np.ndarray,
        tell: Callable[[int], None],
    ) -> Written:
        """All tokens of some answers, until the last has ended; tells how many of each are written."""
        eos = np.array(self.eos, np.int32)
        eos, ids, tokens, lengths = jax.device_put((eos, ids, tokens, lengths))
        count, steps = segments(self.sampling.max_new_tokens, self.segment)
        read = _ReadPrompts(self.model, self.sampling, count * steps)
        write = _WriteSegment(self.model, self.sampling, steps)
        given = (eos, ids, tokens, lengths)
        texts, over, first = _call(read, self.es, source, who, None, prefix, given)
        pieces = [first]
        for i in range(count):
            if jax.device_get(over):
                break
            tell(1 + i * steps)
            t = jax.device_put(np.int32(i * steps))
            texts, over, piece = _call(write, self.es, source, who, texts, prefix, (eos, ids, t))
            pieces.append(piece)
        return jax.tree.map(lambda *x: np.concatenate(x, -1), *jax.device_get(pieces))


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
