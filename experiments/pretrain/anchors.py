"""What a text costs without any model to train: n-gram entropies and compressors, in bits per byte.

Their orders and their smoothing are fixed, so that a reader can see from them what a model has learned:
below the unigram entropy it knows more than how often each byte comes, below the bigram entropy more
than what follows each byte.
"""

import gzip
import lzma
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

# Bytes that n-grams are counted in at most: the first of the text to train on.
COUNTED = 2**26
_BYTES = 256


class Anchors(NamedTuple):
    """Bits per byte of a held-out text.

    Attributes:
        unigram: by how often each byte came in the text to train on.
        bigram: by what followed each byte there.
        trigram: by what followed each two bytes there.
        gzip: of the held-out text alone, compressed by gzip at its strongest.
        xz: the same by xz.
    """

    unigram: float
    bigram: float
    trigram: float
    gzip: float
    xz: float


def anchors(train: UInt8[np.ndarray, "train"], held_out: UInt8[np.ndarray, "held_out"]) -> Anchors:
    """The anchors of a held-out text, all over its bytes but the first.

    Args:
        train: text that n-grams are counted in (of a longer one than 64 MiB, the first 64 MiB).
        held_out: text that they are measured on, at least two bytes.

    Example:
        >>> text = np.frombuffer(b"to be or not to be, that is the question: " * 50, np.uint8)
        >>> found = anchors(text[:1050], text[1050:])
        >>> found.unigram > found.bigram > found.trigram
        True
    """
    costs = [bits.mean() for bits in ngram_bits(train[:COUNTED], held_out)]
    text = held_out[1:].tobytes()
    packed = gzip.compress(text, 9, mtime=0), lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    return Anchors(*map(float, costs), *(8 * len(one) / len(text) for one in packed))


def ngram_bits(
    train: UInt8[np.ndarray, "train"], held_out: UInt8[np.ndarray, "held_out"]
) -> list[Float[np.ndarray, "predicted"]]:
    """Bits of every byte of a text but its first, by unigrams, bigrams and trigrams of another text.

    Unigrams are smoothed by adding one to the count of each of the 256 bytes. Longer ones are interpolated
    with the next shorter ones by Witten and Bell's rule (method C of "The zero-frequency problem", IEEE
    Transactions on Information Theory 37, 1991), which has no number to tune:
    ``p(b | context) = (count(context b) + d p(b | shorter context)) / (count(context) + d)``, d the number of
    different bytes that followed the context. The second byte of `held_out` has one byte before it, and its
    trigram is the bigram.
    """
    targets, before = held_out[1:].astype(np.int64), held_out[:-1].astype(np.int64)
    counts = np.bincount(train, minlength=_BYTES)
    p = (counts[targets] + 1) / (len(train) + _BYTES)
    probabilities = [p]
    context = before
    for order in (2, 3):
        if order == 3:
            context = before[1:] + _BYTES * before[:-1]
            targets, p = targets[1:], p[1:]
        table = _ngrams(train, order).reshape(-1, _BYTES)
        total, different = table.sum(1)[context], (table > 0).sum(1)[context]
        seen = total > 0
        mixed = (table[context, targets] + different * p) / np.where(seen, total + different, 1)
        p = np.where(seen, mixed, p)
        probabilities.append(p)
    bigram, trigram = probabilities[1:]
    probabilities[2] = np.concatenate([bigram[:1], trigram])
    return [-np.log2(p) for p in probabilities]


def _ngrams(text: UInt8[np.ndarray, "text"], order: int) -> Int[np.ndarray, "ngrams"]:
    """How often each n-gram comes, by the number that its bytes make."""
    codes = np.zeros(max(len(text) - order + 1, 0), np.int64)
    for i in range(order):
        codes = codes * _BYTES + text[i : i + len(codes)]
    return np.bincount(codes, minlength=_BYTES**order)
