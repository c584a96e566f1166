"""What a reward gives: numbers, checked and summed by weight; None leaves a completion out.

A reward is ``reward(completions, answers, **columns) -> list[float | None]``. Columns are what else is
known of the questions, a list each, as long as the completions. It may be given any part of a batch, and
of an empty one makes an empty list.

One rule holds for the values of every reward. A number counts: of Python, NumPy, JAX or another library,
bool, and an array without axes that holds one. None is no score, and so is a number that is not finite or
does not fit a float32, in which scores are kept. Anything else is an error.
"""

import decimal
import math
import numbers
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

from experiments.run.errors import RunError, UsageError

Reward = Callable[..., Any]

# The largest float32: scores are kept in this type.
LARGEST = (2 - 2**-23) * 2.0**127
# Kinds of NumPy's types that are dates and spans of time, which it counts among the whole numbers.
TIMES = ("m", "M")


class RewardError(RunError):
    """A reward function has failed, or given what is no list of numbers."""


class Scores(NamedTuple):
    """What a reward makes of completions.

    Attributes:
        rewards: a number each; None for one that cannot be told.
        parts: the same for each reward that these are summed from, by its name.
    """

    rewards: list[float | None]
    parts: dict[str, list[float | None]]


@dataclass(frozen=True)
class Weighted:
    """The sum of several rewards; see :func:`weighted`."""

    parts: dict[str, tuple[Reward, float]]

    def __call__(
        self, completions: list[str], answers: list[str], **columns: Any
    ) -> list[float | None]:
        return call(self, completions, answers, columns).rewards


def weighted(parts: dict[str, tuple[Reward, float]]) -> Weighted:
    """Several rewards as one: the sum of weight times reward; None where any of them is None.

    Args:
        parts: function and weight, by the name under which each is reported.

    Raises:
        UsageError: where there is none, or a weight is no finite number.

    Example:
        >>> length = lambda completions, answers: [len(text) for text in completions]
        >>> same = lambda completions, answers: list(map(str.__eq__, completions, answers))
        >>> weighted({"same": (same, 1.0), "length": (length, -0.1)})(["4", "five"], ["4", "4"])
        [0.9, -0.4]
    """
    if not parts:
        raise UsageError("no reward is given: name one at least")
    for name, (_, weight) in parts.items():
        if not math.isfinite(weight):
            raise UsageError(f"the weight of the reward {name!r} is {weight}: choose a number")
    return Weighted(parts)


def call(
    reward: Reward, completions: list[str], answers: list[str], columns: dict[str, list[Any]]
) -> Scores:
    """Rewards, checked by the rule that stands at the top of this module.

    Args:
        reward: gives a list, a tuple or an array with one axis, ``[completions]``.
        completions: what was written.
        answers: the right ones, as many.
        columns: what else the reward takes, as many of each.

    Raises:
        RewardError: where a function raises, gives a wrong number of values, or one that is no number; in
            one sentence with the reward, the value, and an example of what it was given.

    Example:
        >>> def length(completions, answers):
        ...     return [len(text) for text in completions]
        >>> call(length, ["so 4", "5"], ["4", "4"], {})
        Scores(rewards=[4.0, 1.0], parts={'length': [4.0, 1.0]})
        >>> call(lambda completions, answers: [True, float("inf")], ["a", "b"], ["", ""], {}).rewards
        [1.0, None]
    """
    if not isinstance(reward, Weighted):
        name = names(reward)[0]
        rewards = _checked(name, reward, completions, answers, columns)
        return Scores(rewards, {name: rewards})
    parts = {
        name: _checked(name, function, completions, answers, columns)
        for name, (function, _) in reward.parts.items()
    }
    weights = [weight for _, weight in reward.parts.values()]
    return Scores([_sum(row, weights) for row in zip(*parts.values(), strict=True)], parts)


def names(reward: Reward) -> list[str]:
    """The names of the parts of a reward; its own where it has none."""
    if isinstance(reward, Weighted):
        return list(reward.parts)
    return [getattr(reward, "__name__", type(reward).__name__).rstrip("_")]


def _sum(row: Sequence[float | None], weights: list[float]) -> float | None:
    known = [value for value in row if value is not None]
    if len(known) < len(row):
        return None
    return _finite(sum(weight * value for weight, value in zip(weights, known, strict=True)))


def _checked(
    name: str,
    function: Reward,
    completions: list[str],
    answers: list[str],
    columns: dict[str, list[Any]],
) -> list[float | None]:
    example = (
        f"the first of {len(completions)} completions was {completions[0][-100:]!r}, "
        f"the right answer {answers[0][:100]!r}"
        if completions
        else "there was no completion, whose rewards are []"
    )
    try:
        found = function(completions, answers, **columns)
    # Too little memory says nothing about the function; the pool counts it.
    except (MemoryError, RewardError):
        raise
    except Exception as error:
        raise RewardError(
            f"the reward {name!r} raised {type(error).__name__}: {error}; {example}"
        ) from error
    if not _is_list(found):
        raise RewardError(
            f"the reward {name!r} must give a list of {len(completions)} values, got {shown(found)}; "
            f"{example}"
        )
    if len(found) != len(completions):
        raise RewardError(
            f"the reward {name!r} gave {len(found)} values for {len(completions)} completions; {example}"
        )
    scores = []
    for value in found:
        try:
            scores.append(_number(value))
        except TypeError as error:
            raise RewardError(
                f"the reward {name!r} must give numbers or None, got {shown(value)}; {example}"
            ) from error
    return scores


def _is_list(found: object) -> bool:
    """Whether values stand in an order: a list, a tuple, an array with axes, and the like."""
    if isinstance(found, str | bytes | bytearray | memoryview | Mapping | Set):
        return False
    if getattr(found, "shape", None) == ():
        return False
    return hasattr(found, "__len__") and hasattr(found, "__iter__")


def _number(value: object) -> float | None:
    """A value as a score, by the rule of this module; TypeError for what is no number."""
    if value is None:
        return None
    if getattr(value, "shape", None) == ():  # a scalar of NumPy or JAX, or an array without axes
        if getattr(value, "mask", False):
            return None
        if getattr(getattr(value, "dtype", None), "kind", None) in TIMES:
            raise TypeError
        value = _item(value)
    if not isinstance(value, numbers.Real | decimal.Decimal):
        raise TypeError
    try:
        return _finite(float(value))
    # OverflowError: more than a float holds. ValueError: a Decimal that signals that it is no number.
    except (OverflowError, ValueError):
        return None


def _item(array: Any) -> object:
    """The only entry of an array; the array itself where it does not give one."""
    try:
        return array.item()
    # What looks like an array may be of any library; keys of JAX, for one, have no entry.
    except Exception:
        return array


def _finite(value: float) -> float | None:
    return value if abs(value) <= LARGEST else None


def shown(value: object) -> str:
    """A value in a message: its type, and the beginning of how it prints.

    Example:
        >>> shown({0: 1.0}), shown("x" * 200)[-8:]
        ('{0: 1.0} (dict)', '... (str)')
    """
    try:
        text = " ".join(repr(value).split())
    # An object of anybody's making may fail here, and whole numbers of more than 4,300 digits do.
    except Exception:
        return f"a value of the type {type(value).__name__}"
    return f"{text if len(text) <= 100 else text[:97] + '...'} ({type(value).__name__})"
