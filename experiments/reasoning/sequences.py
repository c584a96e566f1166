"""Prompts and completions as arrays on the host: packed, put in buckets, cut to length, joined."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

# Stands where there is no token; nothing reads it.
PAD = 0
# Prompts are read at lengths in steps of so many tokens, or of an eighth of a power of two.
STEP = 16
# What prompts share is taken in steps of so many, so that it is the same for most sets of questions.
SHARED_STEP = 8

Ends = int | Sequence[int]


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
    """Answers of some members to some of the prompts, [members, which, ...]; of one model, [which, ...].

    Attributes:
        members: int [members], their numbers; those of pairs stand side by side. None for one model.
        which: int [which], numbers of the prompts.
        completions: to them.
    """

    members: np.ndarray | None
    which: np.ndarray
    completions: Completions

    def place(self, whole: np.ndarray, own: np.ndarray) -> None:
        """Writes entries of this part into an array of all members and prompts.

        Example:
            >>> whole = np.zeros((4, 3))
            >>> part = Part(np.array([2, 3]), np.array([1]), None)
            >>> part.place(whole, np.array([[5.0], [6.0]]))
            >>> whole[:, 1].tolist()
            [0.0, 0.0, 5.0, 6.0]
        """
        where = (self.which,) if self.members is None else np.ix_(self.members, self.which)
        whole[where] = own


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
        raise ValueError("prompts must have at least one, got none")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    slots = int(lengths.max()) if slots is None else slots
    tokens = np.full((len(prompts), slots), PAD, np.int32)
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= slots:
            raise ValueError(f"prompt {i} must have 1 to {slots} tokens, got {len(prompt)}")
        tokens[i, : len(prompt)] = prompt
    return Prompts(tokens, lengths)


def buckets(
    lengths: Int[np.ndarray, "prompts"], chunk: int | None = None
) -> list[tuple[int, np.ndarray]]:
    """Prompts that are read together: (padded length, numbers of the prompts).

    Padded lengths are in steps (:func:`padded_length`), so that there are few programs to compile.

    Args:
        lengths: of the prompts.
        chunk: at most so many at once.

    Example:
        >>> buckets(np.array([3, 40, 16, 5]), chunk=2)
        [(16, array([0, 2])), (16, array([3])), (48, array([1]))]
    """
    padded = np.array([padded_length(int(n)) for n in lengths])
    found = []
    for slots in np.unique(padded):
        which = np.flatnonzero(padded == slots)
        size = len(which) if chunk is None else chunk
        found += [(int(slots), which[i : i + size]) for i in range(0, len(which), size)]
    return found


def padded_length(length: int) -> int:
    """How long a prompt is read: in steps of 16 up to 128, of an eighth of the length beyond.

    Example:
        >>> [padded_length(n) for n in (1, 17, 47, 128, 129, 600)]
        [16, 32, 48, 128, 160, 640]
    """
    step = max(STEP, power_of_two(length) // 8)
    return -(-length // step) * step


def shared_length(prompts: Prompts) -> int:
    """Tokens that all prompts begin with, in steps of 8, where at least one is left of each.

    One prompt, however often it is asked, shares nothing: every other prompt would be a program of its own.

    Example:
        >>> prompt = list(range(40))
        >>> shared_length(pack([prompt, prompt[:33] + [7]])), shared_length(pack([prompt, prompt]))
        (32, 0)
    """
    if (prompts.tokens == prompts.tokens[0]).all() and (
        prompts.lengths == prompts.lengths[0]
    ).all():
        return 0
    shortest = int(prompts.lengths.min()) - 1
    first = prompts.tokens[:, :shortest]
    same = (first == first[0]).all(axis=0)
    count = shortest if same.all() else int(same.argmin())
    return count // SHARED_STEP * SHARED_STEP


def tokens_read(prompts: Prompts, samples: int = 1) -> int:
    """Tokens that one model reads of prompts: what they share, once, and the rest of each for every sample.

    Example:
        >>> tokens_read(pack([[*range(16), 5, 6], [*range(16), 7]]))
        19
    """
    shared = shared_length(prompts)
    return shared + samples * int((prompts.lengths - shared).sum())


# Tokens between two looks at whether all answers have ended, at most.
SEGMENT = 32


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


def completions_of(
    tokens: np.ndarray,
    log_probs: np.ndarray,
    entropy: np.ndarray,
    prompts: int,
    new: int,
    eos: Sequence[int],
) -> Completions:
    """What was written for the first prompts, cut, or padded, to `new` tokens.

    Args:
        tokens: [..., prompts, written], as the other two.
        log_probs: of each token.
        entropy: of the policy at each token.
        prompts: those that count; more may have been written.
        new: tokens of a completion, at most.
        eos: the tokens that end a text.
    """

    def fit(x: np.ndarray) -> np.ndarray:
        short = max(0, new - x.shape[-1])
        return np.pad(x[..., :prompts, :new], [(0, 0)] * (x.ndim - 1) + [(0, short)])

    tokens, log_probs, entropy = map(fit, (tokens, log_probs, entropy))
    is_end = np.isin(tokens, eos)
    ended = np.asarray(is_end.any(-1))
    lengths = np.where(ended, is_end.argmax(-1) + 1, new).astype(np.int32)
    mean = (entropy.sum(-1) / lengths).astype(np.float32)
    return Completions(tokens, lengths, ended, log_probs, mean)


def joined(parts: Iterable[Part], *shape: int) -> Completions:
    """The answers of all parts in their places.

    Args:
        parts: of every member and prompt one.
        *shape: of members, if there are several, and prompts.
    """
    first, *rest = parts
    empty = lambda x: np.zeros((*shape, *x.shape[len(shape) :]), x.dtype)
    whole = jax.tree.map(empty, first.completions)
    for part in (first, *rest):
        jax.tree.map(part.place, whole, part.completions)
    return whole


def as_ends(eos: Ends) -> tuple[int, ...]:
    """The tokens that end a text, given as one or as several."""
    return tuple(eos) if isinstance(eos, Sequence) else (eos,)


def power_of_two(n: int) -> int:
    """The smallest that is not less than n."""
    return 1 << (n - 1).bit_length()


def check_tokens(prompts: Prompts, vocab: int, eos: Sequence[int]) -> None:
    """Raises ValueError for tokens that a model does not have, and lengths that do not fit."""
    slots = prompts.tokens.shape[1]
    for i, length in enumerate(prompts.lengths):
        if not 1 <= length <= slots:
            raise ValueError(f"prompt {i} must have 1 to {slots} tokens, got {length}")
        tokens = prompts.tokens[i, :length]
        wrong = tokens[(tokens < 0) | (tokens >= vocab)]
        if wrong.size:
            raise ValueError(f"tokens of prompt {i} must be from 0 to {vocab - 1}, got {wrong[0]}")
    for token in eos:
        if not 0 <= token < vocab:
            raise ValueError(f"eos must be from 0 to {vocab - 1}, got {token}")
