"""Asks a model questions and has its answers rewarded."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.reasoning.config import Config
from experiments.reasoning.engine import Completions, Prompts, Sampling, pack
from experiments.reasoning.pool import Handle, RewardPool
from experiments.reasoning.rewards import Reward, named
from experiments.reasoning.sft import Packed, room
from experiments.reasoning.sft import pack as pack_examples
from experiments.reasoning.start import Start
from experiments.reasoning.tasks import Question, Task, columns
from experiments.run import agreement
from experiments.run.errors import UsageError


class Marks(NamedTuple):
    """Rewards of completions, of their shape; NaN for what cannot be told.

    Attributes:
        rewards: what is to be maximised.
        parts: the same for each reward that these are summed from.
        late: share of those that this process asked for and gave up for their time.
    """

    rewards: np.ndarray
    parts: dict[str, np.ndarray]
    late: float


class Examiner:
    """Questions of a task for one model.

    Args:
        config: the settings.
        begin: the model and its tokenizer.
        task: the questions.
        pool: computes rewards.
    """

    def __init__(self, config: Config, begin: Start, task: Task, pool: RewardPool) -> None:
        self._config, self._begin, self._task, self._pool = config, begin, task, pool
        self._asked: Sequence[Question] = task.train
        if config.algorithm == "sft" or config.fitness != "reward":
            solved = [one for one in task.train if task.trace(one) is not None]
            # Where none has one, the first is told.
            self._asked = solved or task.train

    def questions(self, generation: int) -> list[Question]:
        """Those of a generation: a part of a pass over the questions, each pass in an order of its own."""
        count, size = len(self._asked), self._config.prompts
        numbers = np.arange(generation * size, (generation + 1) * size)
        orders = {
            turn: np.random.default_rng([self._config.seed, turn]).permutation(count)
            for turn in {int(n) // count for n in numbers}
        }
        return [self._asked[int(orders[int(n) // count][int(n) % count])] for n in numbers]

    def prompt(self, question: Question) -> list[int]:
        """The tokens of a question."""
        text = asked(self._config, self._begin.tokenizer, question.prompt)
        found = self._begin.tokenizer.encode(text)
        if not found:
            raise UsageError(f"the prompt {text!r} has no tokens: give the task another template")
        return found

    def trace(self, question: Question) -> str:
        """The worked solution of a question.

        Raises:
            UsageError: where there is none.
        """
        found = self._task.trace(question)
        if found is None:
            raise UsageError(
                f"--task {self._config.task}: {question.prompt.strip()!r} has no worked solution to learn "
                "from; choose another --algorithm"
            )
        return found

    def solutions(self, questions: Sequence[Question]) -> Packed:
        """Prompts of questions with their worked solutions behind them, to learn from."""
        encode = self._begin.tokenizer.encode
        examples = [(self.prompt(one), encode(self.trace(one))) for one in questions]
        length = room(max(len(prompt) + len(trace) for prompt, trace in examples) + 1)
        return pack_examples(examples, length, end=self._begin.tokenizer.eos[0])

    def prompts(self, questions: Sequence[Question]) -> Prompts:
        """The prompts of questions."""
        return pack([self.prompt(question) for question in questions])

    def texts(self, completions: Completions) -> list[str]:
        """What was written, one after another, without the end token."""
        return texts_of(self._begin.tokenizer, completions)

    def hand_in(self, texts: Sequence[str], questions: Sequence[Question]) -> Handle:
        """Begins to compute rewards of texts; `questions` are those of the texts, one for each.

        Of several processes each computes a part: a reward that one of them gave up for its time could be
        told by another, and no two may go on from different rewards.
        """
        own = agreement.own_part(len(texts))
        texts, questions = texts[own], questions[own]
        answers = [question.answer for question in questions]
        return self._pool.submit(texts, answers, **columns(questions))

    def marks(self, handle: Handle, shape: tuple[int, ...]) -> Marks:
        """The rewards that were handed in, waited for, those of other processes too."""
        batch, count = handle.result(), math.prod(shape)

        def table(values: Sequence[float | None]) -> np.ndarray:
            # None becomes NaN.
            return agreement.from_parts(np.array(values, np.float32), count).reshape(shape)

        return Marks(
            table(batch.rewards),
            {name: table(values) for name, values in batch.parts.items()},
            batch.failures.get("timeout", 0) / max(len(batch.rewards), 1),
        )


def asked(config: Config, tokenizer: Any, text: str) -> str:
    """A prompt as the model reads it: in its chat template, where the settings say so."""
    if not config.chat:
        return text
    return tokenizer.chat([{"role": "user", "content": text}], **config.chat_arguments())


def texts_of(tokenizer: Any, completions: Completions) -> list[str]:
    """What was written, one after another, without the end tokens."""
    tokens = completions.tokens.reshape(-1, completions.tokens.shape[-1])
    lengths = (completions.lengths - completions.ended).ravel()
    return [tokenizer.decode(row[:n].tolist()) for row, n in zip(tokens, lengths, strict=True)]


def reward_of(config: Config, task: Task) -> Reward:
    """The task's own reward, or those that the settings name.

    Raises:
        UsageError: for a reward that there is not, or a weight that is no number.
    """
    return task.reward if config.reward is None else named(config.reward)


def sampling_of(config: Config, greedy: bool = False) -> Sampling:
    """How answers are written: as the settings say, or the likeliest tokens."""
    if greedy:
        return Sampling(max_new_tokens=config.max_new_tokens)
    return Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
    )


def repeated(items: Sequence[Any], times: int) -> list[Any]:
    """Each of the items so many times, one after another.

    Example:
        >>> repeated("ab", 2)
        ['a', 'a', 'b', 'b']
    """
    return [item for item in items for _ in range(times)]
