"""Questions of a task as a model reads them, and what it wrote as text."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from experiments.reasoning.config import Config
from experiments.reasoning.sampling import Sampling
from experiments.reasoning.sequences import Completions, Prompts, pack
from experiments.reasoning.sft import Packed, room
from experiments.reasoning.sft import pack as pack_examples
from experiments.reasoning.start import Start
from experiments.reasoning.tasks import Question, Task
from experiments.run.errors import UsageError

Item = TypeVar("Item")


class Questions:
    """The questions of a task, for one model.

    Args:
        config: the settings.
        base: the model that training begins with, and its tokenizer.
        task: gives the task, once it is asked for: a run is read without its questions.
    """

    def __init__(self, config: Config, base: Start, task: Callable[[], Task]) -> None:
        self._config, self._base, self._load = config, base, task

    @functools.cached_property
    def task(self) -> Task:
        """The task."""
        return self._load()

    @property
    def measured(self) -> Sequence[Question]:
        """The held-out questions that are measured on all along a run."""
        return self._first(self.task.held_out)

    @property
    def fresh(self) -> Sequence[Question]:
        """The questions that are measured on once a run is over."""
        return self._first(self.task.fresh)

    def _first(self, questions: Sequence[Question]) -> Sequence[Question]:
        """As many as are measured on; a sequence that makes its questions may give them one by one alone."""
        return list(itertools.islice(questions, self._config.held_out_questions))

    @functools.cached_property
    def trained(self) -> Sequence[Question]:
        """The questions that are trained on: those with a worked solution, where one is learned from."""
        everything = self.task.train
        if self._config.algorithm != "sft" and self._config.fitness == "reward":
            return everything
        # Where none has one, `trace` says so of the first.
        return [one for one in everything if one.trace is not None] or everything

    def of_generation(self, generation: int) -> list[Question]:
        """Those of a generation: a part of a pass over the questions, each pass in an order of its own."""
        count, size = len(self.trained), self._config.prompts
        numbers = np.arange(generation * size, (generation + 1) * size)
        orders = {
            turn: np.random.default_rng([self._config.seed, turn]).permutation(count)
            for turn in {int(n) // count for n in numbers}
        }
        return [self.trained[int(orders[int(n) // count][int(n) % count])] for n in numbers]

    def prompt(self, question: Question) -> list[int]:
        """The tokens of a question."""
        text = as_asked(self._config, self._base, question.prompt)
        found = self._base.tokenizer.encode(text)
        if not found:
            raise UsageError(f"the prompt {text!r} has no tokens: give the task another template")
        return found

    def prompts(self, questions: Sequence[Question]) -> Prompts:
        """The prompts of questions."""
        return pack([self.prompt(question) for question in questions])

    def trace(self, question: Question) -> str:
        """The worked solution of a question.

        Raises:
            UsageError: where there is none.
        """
        if question.trace is None:
            raise UsageError(
                f"--task {self._config.task}: {question.prompt.strip()!r} has no worked solution to learn "
                "from; choose another --algorithm"
            )
        return question.trace

    def solutions(self, questions: Sequence[Question]) -> Packed:
        """Prompts of questions with their worked solutions behind them, to learn from."""
        encode = self._base.tokenizer.encode
        examples = [(self.prompt(one), encode(self.trace(one))) for one in questions]
        length = room(max(len(prompt) + len(trace) for prompt, trace in examples) + 1)
        return pack_examples(examples, length, end=self._base.tokenizer.eos[0])

    def sampling(self, greedy: bool = False) -> Sampling:
        """How answers are written: as the settings say, or the likeliest tokens."""
        writing = self._config.writing
        longest = writing.max_new_tokens or self.task.max_new_tokens
        if greedy:
            return Sampling(max_new_tokens=longest)
        return Sampling(
            max_new_tokens=longest,
            temperature=writing.temperature,
            top_k=writing.top_k,
            top_p=writing.top_p,
        )

    def texts(self, completions: Completions) -> list[str]:
        """What was written, one after another, without the end token."""
        return texts_of(self._base, completions)


def as_asked(config: Config, base: Start, text: str) -> str:
    """A prompt as the model reads it: in its chat template, where the settings say so."""
    if not config.chat:
        return text
    # One with a chat template, as `start` has checked.
    tokenizer: Any = base.tokenizer
    return tokenizer.chat([{"role": "user", "content": text}], **config.chat_arguments())


def texts_of(base: Start, completions: Completions) -> list[str]:
    """What was written, one after another, without the end tokens."""
    tokens = completions.tokens.reshape(-1, completions.tokens.shape[-1])
    lengths = (completions.lengths - completions.ended).ravel()
    decode = base.tokenizer.decode
    return [decode(row[:n].tolist()) for row, n in zip(tokens, lengths, strict=True)]


def repeated(items: Sequence[Item], times: int) -> list[Item]:
    """Each of the items so many times, one after another.

    Example:
        >>> repeated("ab", 2)
        ['a', 'a', 'b', 'b']
    """
    return [item for item in items for _ in range(times)]
