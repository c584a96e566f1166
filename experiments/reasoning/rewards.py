"""Rewards by name: from completions and right answers to numbers.

:mod:`experiments.reasoning.reward_values` says what a reward is, and which values count. What a model wrote
is never run as a program.
"""

import functools
import importlib
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.reasoning.answers import LIMIT, NUMBER, extract, number, plain, tagged
from experiments.reasoning.arithmetic import ExpressionError, evaluate, numbers_used
from experiments.reasoning.reward_values import Reward, Weighted, weighted
from experiments.reasoning.reward_values import RewardError as RewardError
from experiments.reasoning.reward_values import Scores as Scores
from experiments.reasoning.reward_values import call as call
from experiments.run import own_code
from experiments.run.errors import UsageError, suggestion
from experiments.run.fields import MOST_NUMBER

# Numbers of a list, which commas part from each other and not their thousands.
NUMBERS = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?", re.ASCII)


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
        return plain(found) == plain(answer) if goal is None else number(found) == goal

    return [float(right(*pair)) for pair in zip(completions, answers, strict=True)]


def number_(completions: list[str], answers: list[str], **_: Any) -> list[float]:
    """1 where the last number of the completion is that of the answer, in whatever sentence it stands.

    Example:
        >>> number_(["3 + 4 = 7.", "It is 8", "none"], ["7", "7", "7"])
        [1.0, 0.0, 0.0]
    """
    pairs = zip(completions, answers, strict=True)
    return [float(number(said[-LIMIT:]) == number(right) is not None) for said, right in pairs]


def numbers(completions: list[str], answers: list[str], **_: Any) -> list[float]:
    """The share of an answer's numbers that are in their places, among as many at the end of a completion.

    Example:
        >>> numbers(["The order is 3, 5, 9.", "5, 3, 9", "9"], ["3, 5, 9"] * 3)
        [1.0, 0.3333333333333333, 0.0]
    """

    def share(said: str, answer: str) -> float:
        right = list(map(number, NUMBERS.findall(answer)))
        found = list(map(number, NUMBERS.findall(said[-LIMIT:])))[-len(right) :]
        same = [a == b is not None for a, b in zip(found, right, strict=False)]
        return sum(same) / len(right) if len(found) == len(right) > 0 else 0.0

    return [share(*pair) for pair in zip(completions, answers, strict=True)]


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
    "exact": exact, "number": number_, "numbers": numbers, "countdown": countdown, "math": math_, "gym": gym,
    "format": format_,
}  # fmt: skip


# ---------------------------------------------------------------- by name


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
    weights = check(text, where)
    return weighted({name: (load(name, where), weight) for name, weight in weights.items()})


def check(text: str, where: str = "--reward") -> dict[str, float]:
    """The weights of rewards by their names, without importing a user's own.

    Args:
        text: as in :func:`named`.
        where: as in :func:`named`.

    Raises:
        UsageError: for a reward that is not there, is there twice, or has a weight that is no number.

    Example:
        >>> check("exact,format=0.5")
        {'exact': 1.0, 'format': 0.5}
    """
    weights: dict[str, float] = {}
    for name, weight in _terms(text):
        if own_code.is_own(name):
            own_code.check(name, f"{where} {name}")
        elif name not in REWARDS:
            raise _unknown(name)
        if name in weights:
            raise UsageError(f"{where} {text}: {name} is there twice")
        try:
            weights[name] = float(weight or 1)
        except ValueError as error:
            raise UsageError(
                f"{where} {text}: a weight must be a number, as in {name}=0.5, got {weight!r}"
            ) from error
        if not abs(weights[name]) <= MOST_NUMBER:
            raise UsageError(
                f"{where} {text}: a weight must be a number, as in {name}=0.5, got {weight!r}"
            )
    return weights


def load(name: str, where: str = "--reward") -> Reward:
    """A reward by its name, or the user's own as "module:function" or "folder/file.py:function".

    Args:
        name: of the reward.
        where: this name is from, for messages.

    Raises:
        UsageError: where there is no such reward, module, file or function, or it cannot be imported.

    Example:
        >>> load("exact") is exact
        True
        >>> load("exactly")
        Traceback (most recent call last):
        ...
        experiments.run.errors.UsageError: there is no reward 'exactly'; choose one of exact, number,
        numbers, countdown, math, gym, format, or name your own as module:function or file.py:function; did
        you mean 'exact'?
    """
    if name in REWARDS:
        return REWARDS[name]
    if own_code.is_own(name):
        return own_code.load(name, f"{where} {name}")
    raise _unknown(name)


def _unknown(name: str) -> UsageError:
    return UsageError(
        f"there is no reward {name!r}; choose one of {', '.join(REWARDS)}, or name your own "
        f"as module:function or file.py:function{suggestion(name, REWARDS)}"
    )


def files(text: str) -> list[Path]:
    """The files of a user's own code among rewards as :func:`named` takes them, once they are loaded.

    Example:
        >>> files("exact,my_rewards.py:score=2")
        [PosixPath('my_rewards.py')]
    """
    found = [own_code.file_of(name) for name, _ in _terms(text) if own_code.is_own(name)]
    return [path for path in found if path is not None]


def _terms(text: str) -> list[tuple[str, str]]:
    """Names and weights of a text."""
    terms = [term.strip().partition("=") for term in text.split(",")]
    return [(name, weight) for name, _, weight in terms]
