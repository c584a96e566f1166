"""Learning by backpropagation: GRPO from rewards of its own answers, SFT from worked solutions."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from experiments.reasoning import diagnostics, grpo, sft
from experiments.reasoning.anchor import anchored, drift_of
from experiments.reasoning.config import Config
from experiments.reasoning.engine import Share, generate, unseen
from experiments.reasoning.examiner import Examiner
from experiments.reasoning.fitting import fit_gradient
from experiments.reasoning.gradient_memory import GradientPlan
from experiments.reasoning.questions import Questions, repeated
from experiments.reasoning.sequences import Completions, Prompts, tokens_read
from experiments.reasoning.start import Start
from experiments.run.learners import Trained
from experiments.run.optimizers import decayed


class Backprop:
    """What GRPO and SFT share: parameters and the state of an optimizer.

    Args:
        config: the settings.
        base: the model that training begins with.
        questions: of the task.
        examiner: rewards answers.
    """

    sharding = None

    def __init__(
        self, config: Config, base: Start, questions: Questions, examiner: Examiner
    ) -> None:
        self._config, self._base = config, base
        self._questions, self._examiner = questions, examiner
        own, pull = config.optimizer, config.optimizer.learning_rate * config.anchor
        self._optimizer = sft.optimizer_of(
            own.name,
            decayed(own.learning_rate, own.learning_rate_decay),
            config.gradient_norm,
            anchored(pull, config.anchor_norm) if config.anchor else None,
        )

    @functools.cached_property
    def plan(self) -> GradientPlan:
        """How much memory is needed, and what fits at a time."""
        return fit_gradient(self._config, self._base, self._questions, self._optimizer)

    def _compiled(self, update: Any) -> Any:
        """An update that also tells how many narrow weights changed, in the memory of what it is given."""

        def apply(state: Trained, *data: Any) -> tuple[Trained, dict[str, Any]]:
            params, optimizer, row = update(*state, *data)
            narrow = self._config.narrow_type
            changed = diagnostics.changed_weights(state.params, params, narrow)
            return Trained(params, optimizer), row | changed | drift_of(optimizer)

        return jax.jit(apply, donate_argnums=0)

    def start(self, seed: Array) -> Trained:
        """The state before generation 0."""
        # Copies, as an EvolutionStrategy makes them: updates reuse the memory of what they are given, and
        # the reference of the KL divergence, or a later run, wants these parameters as they were.
        params = jax.tree.map(lambda x: jnp.array(x, copy=True), self._base.params(seed))
        return Trained(params, self._optimizer.init(params))


class Supervised(Backprop):
    """The likelihood of worked solutions is raised."""

    @functools.cached_property
    def _updates(self) -> Callable[[int], Any]:
        """By the tokens of the longest solution: an update, compiled once."""

        def update(longest: int) -> Any:
            backward = self.plan.backward._replace(longest=longest)
            return self._compiled(sft.make_update(self._base.model, self._optimizer, backward))

        return functools.cache(update)

    def generation(
        self, state: Trained, generation: int, share: Share = unseen
    ) -> tuple[Trained, dict[str, Any]]:
        """One update by the solutions of the questions."""
        packed = self._questions.solutions(self._questions.of_generation(generation))
        state, row = self._updates(packed.longest)(state, *packed)
        return state, {**row, "prompt_tokens": 0, "generated_tokens": 0}


class GroupPolicy(Backprop):
    """GRPO: answers become likelier that have more reward than others to the same question."""

    @functools.cached_property
    def _settings(self) -> grpo.GRPO:
        own = self._config.grpo
        constant = own.advantages == "dr_grpo"
        sampling = self._questions.sampling()
        return grpo.GRPO(
            advantage=own.advantages,
            clip_low=own.clip_low,
            clip_high=own.clip_high,
            beta=own.kl,
            aggregation="constant" if constant else "sequence",
            length=sampling.max_new_tokens if constant else None,
            temperature=sampling.temperature,
            epochs=own.epochs,
            backward=self.plan.backward,
        )

    @functools.cached_property
    def _update(self) -> Any:
        update = grpo.make_update(self._base.model, self._optimizer, self._settings)
        return self._compiled(update)

    @functools.cached_property
    def _reference(self) -> PyTree | None:
        """The parameters that are not to be left far behind."""
        if not self._config.grpo.kl:
            return None
        return jax.tree.map(jnp.asarray, self._base.params(jnp.int32(self._config.seed)))

    def generation(
        self, state: Trained, generation: int, share: Share = unseen
    ) -> tuple[Trained, dict[str, Any]]:
        """Answers, rewards, an update."""
        config, model, group = self._config, self._base.model, self._config.grpo.group
        questions = self._questions.of_generation(generation)
        prompts = self._questions.prompts(questions)
        written = generate(
            model,
            state.params,
            prompts,
            jax.random.fold_in(jax.random.key(config.seed), generation),
            self._questions.sampling(),
            self._questions.ends,
            samples=group,
            chunk=self.plan.written,
            share=share,
        )
        texts = self._questions.texts(written)
        handle = self._examiner.submit(texts, repeated(questions, group))
        found = self._examiner.rewards(handle, (len(questions), group))
        rollouts = grpo.prepare(
            model,
            state.params,
            *joined(prompts, written),
            found.rewards,
            self._settings,
            self._reference,
            once=self._settings.epochs == 1,
        )
        state, learned = self._update(state, rollouts)
        parts = {name: table.T for name, table in found.parts.items()}
        row = diagnostics.summary(
            found.rewards.T,
            None,
            parts if len(parts) > 1 else None,
            written.lengths.T,
            written.ended.T,
            written.entropy.T,
        )
        answers = [one.answer for one in repeated(questions, group)]
        row |= diagnostics.of_rewards(found.rewards, texts, answers)
        row["late_rewards"] = found.late
        tokens = {
            "prompt_tokens": tokens_read(prompts, group),
            "generated_tokens": int(written.lengths.sum()),
        }
        return state, {**learned, **row, **tokens}


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
