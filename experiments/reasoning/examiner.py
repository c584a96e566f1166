"""Has answers rewarded, by processes that begin with the first of them."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from experiments.reasoning import config
from experiments.reasoning.pool import Handle, RewardPool
from experiments.reasoning.questions import Questions
from experiments.reasoning.reward_values import Reward
from experiments.reasoning.rewards import named
from experiments.reasoning.tasks import Question, columns
from experiments.run import agreement


class Rewards(NamedTuple):
    """Rewards of completions, of their shape; NaN for what cannot be told.

    Attributes:
        rewards: what is to be maximised.
        parts: the same for each reward that these are summed from, by its name.
        late: share of those that this process asked for and gave up for their time.
    """

    rewards: Float[np.ndarray, "*shape"]
    parts: dict[str, Float[np.ndarray, "*shape"]]
    late: float


class Examiner:
    """A reward, and the processes that compute it; they end with :meth:`close`.

    Args:
        settings: of rewards.
        questions: of the task, whose own reward counts where the settings name none.
    """

    def __init__(self, settings: config.Rewards, questions: Questions) -> None:
        self._settings, self._questions = settings, questions

    @functools.cached_property
    def reward(self) -> Reward:
        """The task's own reward, or those that the settings name.

        Raises:
            UsageError: for a reward that there is not, or a weight that is no number.
        """
        text = self._settings.reward
        return self._questions.task.reward if text is None else named(text)

    @functools.cached_property
    def _pool(self) -> RewardPool:
        own = self._settings
        return RewardPool(
            own.reward_workers, own.reward_seconds, self.reward, memory_gib=own.reward_memory_gib
        )

    def open(self) -> None:
        """Begins the processes, which import what they need while the model is compiled."""
        assert self._pool is not None

    def close(self) -> None:
        """Ends the processes, if any were begun."""
        if "_pool" in vars(self):
            self._pool.close()
            del self._pool

    def submit(self, texts: Sequence[str], questions: Sequence[Question]) -> Handle:
        """Begins to compute rewards of texts; `questions` are those of the texts, one for each.

        Of several processes each computes a part: a reward that one of them gave up for its time could be
        told by another, and no two may go on from different rewards.
        """
        own = agreement.own_part(len(texts))
        texts, questions = texts[own], questions[own]
        answers = [question.answer for question in questions]
        return self._pool.submit(texts, answers, **columns(questions))

    def rewards(self, handle: Handle, shape: tuple[int, ...]) -> Rewards:
        """The rewards that were begun, waited for, those of other processes too."""
        batch, count = handle.result(), math.prod(shape)

        def table(values: Sequence[float | None]) -> np.ndarray:
            # None becomes NaN.
            return agreement.from_parts(np.array(values, np.float32), count).reshape(shape)

        parts = {name: table(values) for name, values in batch.parts.items()}
        late = batch.failures.get("timeout", 0) / max(len(batch.rewards), 1)
        return Rewards(table(batch.rewards), parts, late)
