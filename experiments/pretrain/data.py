"""The text of a run: which bytes are trained on, which are held out, and what each stream reads when."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from experiments.pretrain import hub
from experiments.pretrain.config import Config, check_data
from experiments.run.errors import UsageError
from experiments.run.text import documents, split


class Text(NamedTuple):
    """Documents one after the other, each with a byte 0 before it.

    Attributes:
        train: what streams read, round and round.
        held_out: `held_out_streams * held_out_tokens` bytes and one before them, never trained on.
    """

    train: UInt8[np.ndarray, "train"]
    held_out: UInt8[np.ndarray, "held_out"]


def load(config: Config, source: hub.Hub | None = None) -> Text:
    """The text that the settings name.

    Args:
        config: its `data` is None for the help topics and sources that Python carries, a file or folder, or
            a data set of the Hugging Face hub.
        source: where such data sets come from; the hub itself by default.

    Raises:
        UsageError: where there is no such text, or it is too short.
    """
    name = config.data
    if name is not None and hub.is_data_set(name):
        train, held_out = hub.fetch(name, config.data_bytes, source)
    else:
        if name is not None:
            check_data(name)
        path = None if name is None else Path(name)
        parts = split(documents(path, sources=True), config.held_out)
        # In the order of a hash, the first bytes are a fair sample of what is held out.
        hashed = sorted(parts[1], key=lambda text: hashlib.sha256(text).digest())
        train, held_out = join(parts[0]), join(hashed)

    needed = config.held_out_streams * config.held_out_tokens + 1
    if len(held_out) < needed:
        raise UsageError(
            f"the text is too short: {len(held_out):,} bytes are held out, and "
            f"{config.held_out_streams} streams of {config.held_out_tokens} need {needed:,}; choose fewer or "
            "shorter ones, or a larger share with --held-out"
        )
    # Every stream has text of its own in an update.
    needed = config.streams * config.tokens + 1
    if len(train) < needed:
        raise UsageError(
            f"the text is too short: {len(train):,} bytes are trained on, and {config.streams} streams of "
            f"{config.tokens} need {needed:,}; name more with --data, or choose fewer or shorter streams"
        )
    return Text(train, np.array(held_out[: config.held_out_streams * config.held_out_tokens + 1]))


def join(documents: Iterable[bytes]) -> UInt8[np.ndarray, "text"]:
    """Documents as one text.

    Example:
        >>> join([b"one", b"two"]).tobytes()
        b'\\x00one\\x00two'
    """
    return np.frombuffer(b"".join(b"\0" + text for text in documents), np.uint8)


def windows(
    text: UInt8[np.ndarray, "text"], streams: int, tokens: int, cursor: int
) -> UInt8[np.ndarray, "streams read"]:
    """What every stream reads in an update, and the byte after it.

    Streams begin evenly spaced over the text, go on where they stopped, and at its end begin anew.

    Args:
        text: to read.
        streams: how many.
        tokens: that each reads in an update.
        cursor: updates before this one.

    Example:
        >>> text = join([b"abcd", b"efg"])
        >>> [row.tobytes() for row in windows(text, streams=3, tokens=2, cursor=1)]
        [b'bcd', b'\\x00ef', b'g\\x00a']
    """
    # Numbers of Python and 64 bits: texts are longer than 2^31.
    begin = np.arange(streams, dtype=np.int64) * len(text) // streams + cursor * tokens
    return text[(begin[:, None] + np.arange(tokens + 1)) % len(text)]


def pieces(text: UInt8[np.ndarray, "text"], streams: int) -> UInt8[np.ndarray, "streams read"]:
    """A text in streams, such that each of its bytes but the first is predicted once.

    Args:
        text: of a whole number of bytes a stream, and one more.
        streams: how many.

    Example:
        >>> [row.tobytes() for row in pieces(join([b"abcdef"]), 2)]
        [b'\\x00abc', b'cdef']
    """
    tokens = (len(text) - 1) // streams
    return text[tokens * np.arange(streams)[:, None] + np.arange(tokens + 1)]
