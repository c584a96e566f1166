"""Rewards: plain functions from completions and right answers to numbers; None leaves one out.

A reward is ``reward(completions, answers, **columns) -> list[float | None]``. Columns are what else is
known of the questions, a list each, as long as the completions. It may be given any part of a batch, and
of an empty one makes an empty list. What a model wrote is never run as a program.

One rule holds for the values of every reward. A number counts: of Python, NumPy, JAX or another library,
bool, and an array without axes that holds one. None is no score, and so is a number that is not finite or
does not fit a float32, in which scores are kept. Anything else is an error.
"""

import decimal
import functools
import importlib
import importlib.util
import json
import logging
import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from experiments.reasoning.arithmetic import ExpressionError, evaluate, numbers_used
from experiments.run.errors import RunError, UsageError, suggestion

Reward = Callable[..., Any]

# Characters at the end of a completion in which an answer is looked for.
LIMIT = 20_000
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


@dataclass(frozen=True)
class Loaded:
    """A user's function, sent to other processes as the name that it is loaded by."""

    name: str

    def __call__(self, completions: list[str], answers: list[str], **columns: Any) -> Any:
        return _resolve(self.name)(completions, answers, **columns)


def weighted(parts: dict[str, tuple[Reward, float]]) -> Weighted:
    """Several rewards as one: the sum of weight times reward; None where any of them is None.

    Args:
        parts: function and weight, by the name under which each is reported.

    Raises:
        UsageError: where there is none, or a weight is no finite number.

    Example:
        >>> reward = weighted({"right": (exact, 1.0), "form": (format_, 0.5)})
        >>> reward(["<answer>4</answer>", "4", "five"], ["4", "4", "4"])
        [1.5, 1.0, 0.0]
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
        >>> call(exact, ["so 4", "5"], ["4", "4"], {})
        Scores(rewards=[1.0, 0.0], parts={'exact': [1.0, 0.0]})
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
    if isinstance(reward, Loaded):
        return [reward.name.rpartition(":")[2]]
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
        else "there was no completion, for which [] is right"
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
            f"the reward {name!r} gave {shown(found)}, where a list of {len(completions)} values is right; "
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
                f"the reward {name!r} gave {shown(value)}, where a number or None is right; {example}"
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


# ---------------------------------------------------------------- finding the answer


def tagged(text: str) -> str | None:
    """What stands in the last ``<answer>...</answer>``, or else in the last ``\\boxed{...}``.

    Takes time in proportion to the length, of which no more than 20,000 characters count.

    Example:
        >>> tagged(r"<answer>3</answer> no: <answer> 4 </answer>"), tagged(r"\\boxed{\\frac{1}{2}}")
        ('4', '\\\\frac{1}{2}')
        >>> tagged("4") is None
        True
    """
    text = text[-LIMIT:]
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if start < 0:
        return _boxed(text)
    inside = text[start + len("<answer>") : end].strip()
    boxed = _boxed(inside)
    return inside if boxed is None else boxed


def _boxed(text: str) -> str | None:
    mark = "\\boxed{"
    start = text.rfind(mark)
    if start < 0:
        return None
    depth, start = 1, start + len(mark)
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start:i].strip()
    return None


def extract(text: str, lines: int = 1) -> str:
    """The answer in a completion: what is tagged, or follows the last ``####``, or its last lines.

    Args:
        text: the completion.
        lines: of an answer that is not tagged.

    Example:
        >>> extract("3 + 4 is 7\\n#### 7"), extract("3+4=7\\n7\\n")
        ('7', '7')
    """
    found = tagged(text)
    if found is not None:
        return found
    _, mark, rest = text[-LIMIT:].rpartition("####")
    rows = [row.strip() for row in rest.split("\n") if row.strip()]
    return "\n".join(rows[:lines] if mark else rows[-lines:])


def number(text: str) -> Fraction | None:
    """The last number in a text, of at most 100 characters; commas may part its thousands.

    Example:
        >>> number("about $1,250.50 a year"), number("5-3"), number("none") is None
        (Fraction(2501, 2), Fraction(3, 1), True)
    """
    found = re.findall(r"(?<![\w.])-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)", text, re.ASCII)
    if not found or len(found[-1]) > 100:
        return None
    return Fraction(found[-1].replace(",", ""))


# ---------------------------------------------------------------- rewards


def exact(completions: list[str], answers: list[str], **_: Any) -> list[float]:
    """1 where the answer is the right one: the same number, or the same words in any case.

    Where the right answer is a number, the last one of the completion's answer counts.

    Example:
        >>> exact(["It is\\n18.0 dollars.", "  the  Moon.", "19"], ["18", "the moon", "18"])
        [1.0, 1.0, 0.0]
    """

    def right(completion: str, answer: str) -> bool:
        found = extract(completion, answer.count("\n") + 1)
        goal = number(answer) if NUMBER.fullmatch(answer.strip()) else None
        return _plain(found) == _plain(answer) if goal is None else number(found) == goal

    return [float(right(*pair)) for pair in zip(completions, answers, strict=True)]


NUMBER = re.compile(r"[$]?-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)%?", re.ASCII)


def _plain(text: str) -> str:
    return " ".join(text.split()).strip(" .").casefold()


def countdown(
    completions: list[str], answers: list[str], *, numbers: list[Any], target: list[Any], **_: Any
) -> list[float]:
    """1 for any expression that uses each of the numbers once and makes the target, else 0.

    Args:
        completions: each ends with an expression, to which "= 24" may be added.
        answers: not looked at.
        numbers: those of each question.
        target: of each question.

    Example:
        >>> countdown(["4*5+1", "21", "<answer>1 + 5 * 4 = 21</answer>"], [""] * 3,
        ...           numbers=[[1, 4, 5]] * 3, target=[21] * 3)
        [1.0, 0.0, 1.0]
    """

    def right(completion: str, given: list[int], goal: int) -> bool:
        expression = extract(completion).split("=")[0]
        try:
            used = numbers_used(expression)
            return sorted(used) == sorted(given) and evaluate(expression) == goal
        except ExpressionError:
            return False

    return [float(right(*row)) for row in zip(completions, numbers, target, strict=True)]


def math_(completions: list[str], answers: list[str], **_: Any) -> list[float]:
    """1 where Math-Verify holds the answer for equal to the right one, in LaTeX or plain.

    Its own time limits are off: they are set by a signal, which works in no thread but the main one, and
    elsewhere everything would count as wrong. A pool with a time limit has to run this.
    """
    from math_verify import parse, verify

    # That the limits are off is no news, and would be written once a worker.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def right(completion: str, answer: str) -> bool:
        found = tagged(completion)
        said = completion[-LIMIT // 10 :] if found is None else f"\\boxed{{{found}}}"
        gold = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
        return verify(gold, parse(said, parsing_timeout=None), timeout_seconds=None)

    return [float(right(*pair)) for pair in zip(completions, answers, strict=True)]


def gym(
    completions: list[str],
    answers: list[str],
    *,
    entry: list[Any],
    settings: list[str],
    **_: Any,
) -> list[float]:
    """What the verifier of a task of reasoning-gym gives, from 0 to 1.

    Args:
        completions: each with an answer that :func:`extract` finds.
        answers: say of how many lines an answer is.
        entry: the question as reasoning-gym made it.
        settings: of its data set, and its "name", as JSON.
    """
    importlib.import_module("reasoning_gym")  # before the first question's time begins
    return [
        _verifier(setting)(extract(completion, answer.count("\n") + 1), one)
        for completion, answer, one, setting in zip(
            completions, answers, entry, settings, strict=True
        )
    ]


@functools.lru_cache
def _verifier(settings: str) -> Callable[[str, Any], float]:
    import reasoning_gym

    return reasoning_gym.create_dataset(**json.loads(settings), size=1, seed=0).score_answer


def format_(completions: list[str], answers: list[str], **_: Any) -> list[float]:
    """1 where an answer is given in ``<answer>...</answer>`` or ``\\boxed{...}``, right or wrong.

    Example:
        >>> format_(["<answer>4</answer>", "<answer>4", "<answer> </answer>"], ["4"] * 3)
        [1.0, 0.0, 0.0]
    """
    return [float(bool(tagged(completion))) for completion in completions]


REWARDS: dict[str, Reward] = {
    "exact": exact, "countdown": countdown, "math": math_, "gym": gym, "format": format_
}  # fmt: skip


# ---------------------------------------------------------------- a user's own


def named(text: str, where: str = "--reward") -> Weighted:
    """Rewards with weights, as they are typed: "exact", "countdown=1,format=0.1", "my_rewards.py:score=2".

    Args:
        text: names, each with "=" and a weight where it is not 1.
        where: this text is from, for messages.

    Raises:
        UsageError: for a reward that there is not, or a weight that is no number.

    Example:
        >>> named("exact,format=0.5")(["<answer>4</answer>", "4"], ["4", "4"])
        [1.5, 1.0]
    """
    parts = {}
    for term in text.split(","):
        name, _, weight = term.strip().partition("=")
        try:
            parts[name] = load(name), float(weight or 1)
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(
                f"{where} {text}: {weight!r} is no weight; name=0.5 is right"
            ) from error
    return weighted(parts)


def load(name: str) -> Reward:
    """A reward by its name, or the user's own as "module:function" or "folder/file.py:function".

    Raises:
        UsageError: where there is no such reward, module, file or function, or it cannot be imported.

    Example:
        >>> load("exact") is exact
        True
        >>> load("exactly")
        Traceback (most recent call last):
        ...
        experiments.run.errors.UsageError: there is no reward 'exactly'; choose one of exact, countdown,
        math, gym, format, or name your own as module:function or file.py:function; did you mean 'exact'?
    """
    if name in REWARDS:
        return REWARDS[name]
    place, _, function = name.rpartition(":")
    if place.endswith(".py"):
        name = f"{Path(place).resolve()}:{function}"
    _resolve(name)
    return Loaded(name)


@functools.lru_cache
def _resolve(name: str) -> Callable[..., Any]:
    place, _, function = name.rpartition(":")
    if not place or not function.isidentifier():
        raise UsageError(
            f"there is no reward {name!r}; choose one of {', '.join(REWARDS)}, or name your own "
            f"as module:function or file.py:function{suggestion(name, REWARDS)}"
        )
    try:
        module = _file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    # A user's module may raise anything at all.
    except Exception as error:
        raise UsageError(
            f"the reward {name!r}: {place} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    found = getattr(module, function, None)
    if not callable(found):
        near = suggestion(function, [key for key, x in vars(module).items() if callable(x)])
        raise UsageError(f"the reward {name!r}: {place} has no function {function!r}{near}")
    return found


def _file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
