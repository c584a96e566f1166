"""What several processes of one run have to agree on, and what they gather from each other.

What a process alone knows (its clock, a file, rewards with a time limit) decides nothing until it went
through here, for all have to go through the same steps. A process alone agrees with itself.
"""

import jax
import numpy as np

from experiments.run import hosts
from experiments.run.errors import RunError, UsageError


def agreed(value: bool) -> bool:
    """What the first process thinks."""
    if not hosts.several():
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def least(value: int) -> int:
    """The smallest of the processes' whole numbers, up to 2^62."""
    if not hosts.several():
        return value
    # In two halves: arrays of JAX have 32 bits.
    halves = gathered(np.array([value >> 31, value & (2**31 - 1)], np.int32))
    return min((int(high) << 31) + int(low) for high, low in halves)


def same(value: int, what: str) -> None:
    """Raises RunError on all processes where they do not see the same number in files.

    Args:
        value: of this process; below 0 for none.
        what: it is.

    Example:
        >>> same(3, "the generation")
    """
    values = gathered(np.array(value)).tolist()
    if len(set(values)) > 1:
        told = ", ".join(f"{'none' if v < 0 else v} in process {i}" for i, v in enumerate(values))
        raise RunError(
            f"the processes of this run do not see the same files: {what} is {told}; --run-dir must "
            "lie on a file system that all hosts share"
        )


def gathered(value: np.ndarray) -> np.ndarray:
    """An array of every process, of one shape, stacked: [processes, ...]."""
    if not hosts.several():
        return value[None]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(value))


def first_of(words: str) -> str:
    """The words of the first process that has any, on all of them.

    Args:
        words: of this process, "" for none; more than 400 bytes are cut off.

    Example:
        >>> first_of("the leaf w is not what was saved")
        'the leaf w is not what was saved'
    """
    room = np.zeros(400, np.uint8)
    text = np.frombuffer(words.encode()[: room.size], np.uint8)
    room[: text.size] = text
    said = (bytes(one).rstrip(b"\0").decode(errors="ignore") for one in gathered(room))
    return next(filter(None, said), "")


def share_fate(problem: UsageError | None) -> None:
    """Raises where any process has a problem: its own on that process, on others which it was.

    Raises:
        UsageError: on all of them, so that all end alike.
    """
    failed = gathered(np.array(problem is not None))
    if problem is not None:
        raise problem
    if failed.any():
        raise UsageError(f"process {int(failed.argmax())} cannot begin the run, and says why")


def own_part(count: int) -> slice:
    """The part of so many things that this process does, of equal sizes but for the last.

    Example:
        >>> own_part(5)
        slice(0, 5, None)
    """
    if not hosts.several():
        return slice(0, count)
    size = -(-count // jax.process_count())
    begin = min(count, size * jax.process_index())
    return slice(begin, min(count, begin + size))


def from_parts(part: np.ndarray, count: int) -> np.ndarray:
    """All of so many things, from the floats that each process has of :func:`own_part`.

    Example:
        >>> from_parts(np.array([1.0, 2.0]), 2).tolist()
        [1.0, 2.0]
    """
    if not hosts.several():
        return part
    padded = np.full(-(-count // jax.process_count()), np.nan, part.dtype)
    padded[: len(part)] = part
    return gathered(padded).ravel()[:count]


def sync(name: str) -> None:
    """Returns when all processes have come here."""
    if hosts.several():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
