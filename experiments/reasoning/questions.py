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
        """The first that fit, as many as are measured on; read one by one, since a sequence may make its
        questions on demand."""
        fitting = filter(self._fits, questions)
        found = list(itertools.islice(fitting, self._config.held_out_questions))
        # Where none fits, this says so.
        return found if found or not len(questions) else self.fitting(questions)

    def _fits(self, question: Question) -> bool:
        most = self._config.max_prompt_tokens
        return most is None or len(self._tokens(question.prompt)) <= most

    def fitting(self, questions: Sequence[Question]) -> Sequence[Question]:
        """Those of some questions whose prompts are not too long for `max_prompt_tokens`.

        Raises:
            UsageError: where there is none.
        """
        if self._config.max_prompt_tokens is None:
            return questions
        if found := [one for one in questions if self._fits(one)]:
            return found
        shortest = min(len(self._tokens(one.prompt)) for one in questions)
        raise UsageError(
            f"--max-prompt-tokens must be at least {shortest}, the shortest prompt of --task "
            f"{self._config.task}, got {self._config.max_prompt_tokens}"
        )

    @functools.cached_property
    def trained(self) -> Sequence[Question]:
        """The questions that are trained on: those with a worked solution, where one is learned from."""
        everything = self.fitting(self.task.train)
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
        """The tokens of a question.

        Raises:
            UsageError: where there are none, or more than the model was made for.
        """
        found = self._tokens(question.prompt)
        if not found:
            raise UsageError(
                f"the prompt {question.prompt!r} has no tokens: give the task another template"
            )
        self.check_length(question.prompt, len(found), self.sampling().max_new_tokens)
        return found

    def check_length(self, text: str, tokens: int, new: int) -> None:
        """Raises UsageError for a prompt that with what follows is longer than the model was made for.

        Args:
            text: of the prompt, for the message.
            tokens: that it has.
            new: tokens of the answer, at most.
        """
        context = self._base.model.context
        if context is None or tokens + new <= context:
            return
        fits = (
            f"--max-prompt-tokens {context - new} leaves such questions out"
            if context > new
            else f"--max-new-tokens must be less than {context}"
        )
        raise UsageError(
            f"the prompt {' '.join(text.split())[:40]!r}... has {tokens} tokens, which with {new} to be "
            f"written are more than the {context} that the model was made for: {fits}"
        )

    def _tokens(self, text: str) -> list[int]:
        return self._base.tokenizer.encode(self.as_asked(text))

    def as_asked(self, text: str) -> str:
        """A prompt as the model reads it: in its chat template, where the settings say so."""
        config = self._config
        if not config.chat:
            return text
        # One with a chat template, as `start` has checked.
        tokenizer: Any = self._base.tokenizer
        system = [] if config.system is None else [{"role": "system", "content": config.system}]
        return tokenizer.chat(
            [*system, {"role": "user", "content": text}], **config.chat_arguments()
        )

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer: those of the model, and those that have a text to stop at in them."""
        tokenizer, stop = self._base.tokenizer, self._config.writing.stop
        if not stop:
            return tokenizer.eos
        everything = range(tokenizer.vocab_size)
        found = [i for i in everything if any(text in tokenizer.decode([i]) for text in stop)]
        return tuple(dict.fromkeys((*tokenizer.eos, *found)))

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
        for one, (prompt, trace) in zip(questions, examples, strict=True):
            self.check_length(one.prompt, len(prompt), len(trace) + 1)
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
        """What was written, one after another, without the end token and up to a text to stop at."""
        tokens = completions.tokens.reshape(-1, completions.tokens.shape[-1])
        stop, found = self._config.writing.stop, []
        for row, n in zip(tokens, completions.lengths.ravel(), strict=True):
            last = n - int(row[n - 1] in self._base.tokenizer.eos)
            text = self._base.tokenizer.decode(row[:last].tolist())
            found.append(text[: min((text.find(one) for one in stop if one in text), default=None)])
        return found


def repeated(items: Sequence[Item], times: int) -> list[Item]:
    """Each of the items so many times, one after another.

    Example:
        >>> repeated("ab", 2)
        ['a', 'a', 'b', 'b']
    """
    return [item for item in items for _ in range(times)]
