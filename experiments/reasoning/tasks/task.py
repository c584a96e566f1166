"""A task: questions to train on, held-out ones, fresh ones, and the reward of what is answered."""

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from experiments.reasoning.reward_values import Reward, shown
from experiments.reasoning.rewards import exact
from experiments.run.errors import UsageError

# Names of a reward's own arguments, which no column can have.
TAKEN = ("completions", "answers", "trace")
# One of so many held-out questions is fresh.
FRESH = 3


class Question(NamedTuple):
    """What a model is asked.

    Attributes:
        prompt: what it reads.
        answer: the right answer, or one of them.
        columns: what else the reward needs.
        trace: a worked solution that ends with the answer, for supervised learning; None for none.
    """

    prompt: str
    answer: str
    columns: Mapping[str, Any] = MappingProxyType({})
    trace: str | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """Questions, no text among two of the three kinds, and what rewards completions.

    Attributes:
        name: of the task.
        train: questions to train on.
        held_out: questions to measure with, all along a run.
        fresh: questions to measure with once a run is over, so that they decided nothing before. Where a
            task gives none, a third of the held-out ones is taken for them.
        reward: takes completions, answers and :func:`columns`; unless `--reward` names another.
        max_new_tokens: of a completion; unless `--max-new-tokens` says otherwise.

    Example:
        >>> questions = [Question(f"2*{i}=", str(2 * i)) for i in range(100)]
        >>> train, held_out, fresh = split(questions)
        >>> task = Task(name="doubles", train=train, held_out=held_out, fresh=fresh, max_new_tokens=8)
        >>> len(task.train), len(task.held_out), len(task.fresh)
        (92, 6, 2)
    """

    name: str
    train: Sequence[Question]
    held_out: Sequence[Question]
    fresh: Sequence[Question] = ()
    reward: Reward = exact
    max_new_tokens: int = 256


def columns(questions: Sequence[Question]) -> dict[str, list[Any]]:
    """What a reward needs of questions beside their answers, a list each.

    Example:
        >>> columns([Question("2+3=", "5", {"level": 1}), Question("4+4=", "8")])
        {'level': [1, None]}
    """
    found = dict.fromkeys(name for question in questions for name in question.columns)
    return {name: [question.columns.get(name) for question in questions] for name in found}


def split(
    questions: Iterable[Question], held_out: float = 0.1
) -> tuple[list[Question], list[Question], list[Question]]:
    """Questions to train on, held-out ones and fresh ones, by a hash of their prompts.

    The division depends on nothing but each prompt, so that it is the same in every order. A prompt that
    comes twice counts once, with its first answer; spaces make no difference.

    Args:
        questions: any.
        held_out: share of the questions that is not trained on, roughly; a third of it is fresh.

    Raises:
        UsageError: where one of the first two would be empty.
    """
    unique: dict[str, Question] = {}
    for question in questions:
        unique.setdefault(plain(question.prompt), question)
    return split_by_text(unique.items(), held_out)


def split_by_text(
    questions: Iterable[tuple[str, Question]], held_out: float, shuffled: bool = False
) -> tuple[list[Question], list[Question], list[Question]]:
    """:func:`split` by the hash of the text beside each question; those of one text stay together.

    Args:
        questions: with their texts.
        held_out: as there.
        shuffled: whether they are in an order of chance: the last third of those held out is fresh then.
    """
    if not 0 < held_out < 1:
        raise UsageError(f"held_out is {held_out}: choose a share between 0 and 1")
    train: list[Question] = []
    others: list[tuple[str, Question]] = []
    for text, question in questions:
        if _hashed(text) < held_out:
            others.append((text, question))
        else:
            train.append(question)
    if not train or not others:
        raise UsageError(
            f"of {len(train) + len(others)} questions, {len(others)} are held out: "
            "choose another share, or give more of them"
        )
    return train, *apart(others, shuffled)


def apart(
    held_out: Iterable[tuple[str, Question]], shuffled: bool = False
) -> tuple[list[Question], list[Question]]:
    """Held-out questions in two: those to measure with, and fresh ones, a third of the texts.

    These are the last ones of an order of chance, else chosen by the hash of each text. Fewer than three
    texts have none that is fresh.
    """
    pairs = list(held_out)
    order = list(dict.fromkeys(text for text, _ in pairs))
    if not shuffled:
        order.sort(key=lambda text: _hashed(f"fresh {text}"), reverse=True)
    chosen = set(order[len(order) - len(order) // FRESH :])
    measured = [question for text, question in pairs if text not in chosen]
    return measured, [question for text, question in pairs if text in chosen]


def _hashed(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def plain(text: str) -> str:
    """A text in which all that is not a character is one space."""
    return " ".join(text.split())


def checked(task: object, subject: str) -> Task:
    """A task that a user's function gave, with fresh questions.

    Args:
        task: what was given.
        subject: what messages begin with.

    Raises:
        UsageError: for the first thing in it that cannot be right.
    """
    if not isinstance(task, Task):
        raise UsageError(
            f"{subject}: must give an experiments.reasoning.tasks.Task, got {shown(task)}"
        )
    if not isinstance(task.name, str) or not task.name:
        raise UsageError(f"{subject}: the task's name must be a text, got {shown(task.name)}")
    if not callable(task.reward):
        raise UsageError(
            f"{subject}: the task's reward must be a function, got {shown(task.reward)}"
        )
    if type(task.max_new_tokens) is not int or task.max_new_tokens < 1:
        raise UsageError(
            f"{subject}: the task's max_new_tokens must be a whole number of at least 1, got "
            f"{shown(task.max_new_tokens)}"
        )
    seen: dict[str, str] = {}
    for kind in ("train", "held_out", "fresh"):
        questions = getattr(task, kind)
        if not isinstance(questions, Sequence) or isinstance(questions, str):
            raise UsageError(
                f"{subject}: the task's {kind} must be a list of Questions, got {shown(questions)}"
            )
        if kind != "fresh" and not questions:
            raise UsageError(f"{subject}: the task's {kind} must have one question at least")
        # A sequence of another kind may make its questions when they are asked for, one by one.
        looked_at = None if isinstance(questions, list | tuple) else 1
        for i, question in enumerate(itertools.islice(questions, looked_at)):
            _check_question(question, f"{subject}: question {i} of {kind}")
            before = seen.setdefault(plain(question.prompt), kind)
            if before != kind:
                raise UsageError(
                    f"{subject}: the question {question.prompt.strip()!r} is in {before} and in {kind}; "
                    "no question may be in two of them"
                )
    return with_fresh(task)


def with_fresh(task: Task) -> Task:
    """The same; where a task has no fresh questions, a third of the held-out ones is taken for them."""
    if task.fresh:
        return task
    held_out, fresh = apart((plain(one.prompt), one) for one in task.held_out)
    return replace(task, held_out=held_out, fresh=fresh)


def _check_question(question: object, subject: str) -> None:
    if not isinstance(question, Question):
        raise UsageError(f"{subject} must be a Question, got {shown(question)}")
    for name in ("prompt", "answer"):
        value = getattr(question, name)
        if not isinstance(value, str) or (name == "prompt" and not value.strip()):
            raise UsageError(f"{subject}: its {name} must be a text, got {shown(value)}")
    if not isinstance(question.columns, Mapping):
        raise UsageError(f"{subject}: its columns must be a dict, got {shown(question.columns)}")
    for name in question.columns:
        if not isinstance(name, str) or name in TAKEN:
            raise UsageError(f"{subject}: a column for the reward cannot be called {name!r}")
    if not isinstance(question.trace, str | None):
        raise UsageError(
            f"{subject}: its trace must be a text or None, got {shown(question.trace)}"
        )
