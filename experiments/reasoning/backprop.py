"""Learning by backpropagation: GRPO from rewards of its own answers, SFT from worked solutions."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from experiments.reasoning import diagnostics, grpo, sft
from experiments.reasoning.config import Config
from experiments.reasoning.engine import Completions, Prompts, generate
from experiments.reasoning.examiner import Examiner, repeated, sampling_of
from experiments.reasoning.start import Start
from experiments.reasoning.tasks import Question
from experiments.run.optimizers import decayed


class Backprop:
    """What GRPO and SFT share: parameters and the state of an optimizer.

    Args:
        config: the settings.
        begin: the model.
    """

    def __init__(self, config: Config, begin: Start) -> None:
        self._config, self._begin = config, begin
        self._optimizer = sft.optimizer_of(
            config.optimizer,
            decayed(config.learning_rate, config.learning_rate_decay),
            config.gradient_norm,
        )

    def _compiled(self, update: Any) -> Any:
        """An update that also tells how many narrow weights changed, in the memory of what it is given."""

        def told(params: PyTree, state: Any, *data: Any) -> tuple[PyTree, Any, dict[str, Any]]:
            new, state, row = update(params, state, *data)
            narrow = self._config.narrow_type
            return new, state, row | diagnostics.changed_weights(params, new, narrow)

        return jax.jit(told, donate_argnums=(0, 1))

    def start(self, seed: Array) -> Any:
        """The state before generation 0."""
        # Copies, as an EvolutionStrategy makes them: updates reuse the memory of what they are given, and
        # the reference of the KL divergence, or a later run, wants these parameters as they were.
        params = jax.tree.map(lambda x: jnp.array(x, copy=True), self._begin.params(seed))
        return params, self._optimizer.init(params)

    def params(self, state: Any) -> PyTree:
        """The trained parameters."""
        return state[0]


class Supervised(Backprop):
    """The likelihood of worked solutions is raised."""

    def __init__(self, config: Config, begin: Start) -> None:
        super().__init__(config, begin)
        self._update = self._compiled(sft.make_update(begin.model, self._optimizer))

    def generation(
        self, state: Any, generation: int, questions: Sequence[Question], examiner: Examiner
    ) -> tuple[Any, dict[str, Any]]:
        """One update by the solutions of the questions."""
        params, inner, row = self._update(*state, *examiner.solutions(questions))
        return (params, inner), {**row, "generated_tokens": 0}


class GroupPolicy(Backprop):
    """GRPO: answers become likelier that have more reward than others to the same question."""

    def __init__(self, config: Config, begin: Start) -> None:
        super().__init__(config, begin)
        own = config.grpo
        constant = own.advantages == "dr_grpo"
        self._settings = grpo.GRPO(
            advantage=own.advantages,
            clip_low=own.clip_low,
            clip_high=own.clip_high,
            beta=own.kl,
            aggregation="constant" if constant else "sequence",
            length=config.max_new_tokens if constant else None,
            temperature=config.temperature,
            epochs=own.epochs,
            micro_batch=own.micro_batch,
        )
        self._update = self._compiled(
            grpo.make_update(begin.model, self._optimizer, self._settings)
        )
        self._reference = None
        if own.kl:
            self._reference = jax.tree.map(jnp.asarray, begin.params(jnp.int32(config.seed)))

    def generation(
        self, state: Any, generation: int, questions: Sequence[Question], examiner: Examiner
    ) -> tuple[Any, dict[str, Any]]:
        """Answers, rewards, an update."""
        config, model, group = self._config, self._begin.model, self._config.grpo.group
        prompts = examiner.prompts(questions)
        key = jax.random.fold_in(jax.random.key(config.seed), generation)
        written = generate(
            model,
            state[0],
            prompts,
            key,
            sampling_of(config),
            self._begin.tokenizer.eos,
            samples=group,
        )
        texts = examiner.texts(written)
        handle = examiner.hand_in(texts, repeated(questions, group))
        marks = examiner.marks(handle, (len(questions), group))
        rollouts = grpo.prepare(
            model,
            state[0],
            *joined(prompts, written),
            marks.rewards,
            self._settings,
            self._reference,
        )
        params, inner, told = self._update(*state, rollouts)
        parts = {name: table.T for name, table in marks.parts.items()}
        row = diagnostics.summary(
            marks.rewards.T,
            None,
            parts if len(parts) > 1 else None,
            written.lengths.T,
            written.ended.T,
            written.entropy.T,
        )
        answers = [one.answer for one in repeated(questions, group)]
        row |= diagnostics.of_rewards(marks.rewards, texts, answers)
        row["late_rewards"] = marks.late
        tokens = int(written.lengths.sum())
        return (params, inner), {**told, **row, "generated_tokens": tokens}


def joined(prompts: Prompts, written: Completions) -> sft.Packed:
    """Prompts and their completions as texts to learn from, all samples of a prompt side by side.

    Example:
        >>> import numpy as np
        >>> prompts = Prompts(np.array([[5, 6], [7, 0]]), np.array([2, 1]))
        >>> one = np.array([[[1, 2]], [[3, 0]]])
        >>> written = Completions(one, np.array([[2], [1]]), *[np.zeros((2, 1))] * 3)
        >>> tokens, mask = joined(prompts, written)
        >>> print(tokens[:, :4], mask.sum(1))
        [[5 6 1 2]
         [7 3 0 0]] [2 1]
    """
    tokens = written.tokens.reshape(-1, written.tokens.shape[-1])
    lengths, samples = written.lengths.ravel(), written.lengths.shape[1]
    examples = [
        (
            prompts.tokens[i // samples, : prompts.lengths[i // samples]].tolist(),
            tokens[i, : lengths[i]].tolist(),
        )
        for i in range(len(tokens))
    ]
    return sft.pack(examples, sft.room(int(prompts.lengths.max()) + tokens.shape[-1]))
