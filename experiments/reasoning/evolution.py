"""Learning from rewards by evolution strategies: every member answers all questions of a generation."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import eggroll
from experiments.reasoning import diagnostics, scores
from experiments.reasoning.config import Config
from experiments.reasoning.engine import stream
from experiments.reasoning.examiner import Examiner, repeated, sampling_of
from experiments.reasoning.start import Start
from experiments.reasoning.tasks import Question
from experiments.run.optimizers import decayed, make_optimizer


class Evolution:
    """EGGROLL, or with rank "full" dense ES.

    Args:
        config: the settings.
        begin: the model.
    """

    def __init__(self, config: Config, begin: Start) -> None:
        self._config, self._begin = config, begin
        rate = decayed(config.learning_rate, config.learning_rate_decay)
        optimizer = make_optimizer(config.optimizer, rate)
        if config.anchor:
            optimizer = optax.chain(optimizer, anchored(config.learning_rate * config.anchor))
        self.es = eggroll.EvolutionStrategy(
            optimizer=optimizer,
            population=config.population,
            sigma=config.sigma,
            rank=config.rank,
            plan=begin.model.plan,
            # Questions differ in how hard they are: members are compared on each by itself.
            shaping=eggroll.shaping.per_task(),
            noise_reuse=config.noise_reuse,
            chunk=config.chunk,
            on_dense="error",
        )
        self._update = jax.jit(self.es.update, donate_argnums=0)

    def start(self, seed: Array) -> Any:
        """The state before generation 0."""
        return self.es.init(self._begin.params(seed), jax.random.fold_in(jax.random.key(seed), 1))

    def generation(
        self, state: Any, generation: int, questions: Sequence[Question], examiner: Examiner
    ) -> tuple[Any, dict[str, Any]]:
        """Answers, rewards, an update."""
        config = self._config
        asked = repeated(questions, config.samples)
        parts, texts, handles = [], [], []
        for part in stream(
            self._begin.model,
            self.es,
            state,
            examiner.prompts(asked),
            sampling_of(config),
            self._begin.tokenizer.eos,
            chunk=config.prompt_chunk and config.prompt_chunk * config.samples,
        ):
            # Processes compute these rewards while the next questions are answered.
            own = [asked[i] for i in part.which] * config.population
            texts.append(examiner.texts(part.completions))
            handles.append(examiner.hand_in(texts[-1], own))
            parts.append(part)
        shapes = [(config.population, len(part.which)) for part in parts]
        marks = [examiner.marks(*one) for one in zip(handles, shapes, strict=True)]
        order = np.argsort(np.concatenate([part.which for part in parts]))
        together = lambda tables: np.concatenate(list(tables), axis=1)[:, order]
        rewards = together(m.rewards for m in marks)
        by_name = {name: together(m.parts[name] for m in marks) for name in marks[0].parts}
        lengths = together(part.completions.lengths for part in parts)

        values = jnp.asarray(objective(rewards, config))
        state, metrics = self._update(state, values)
        row = diagnostics.summary(
            rewards,
            together(
                np.array(t, object).reshape(s) for t, s in zip(texts, shapes, strict=True)
            ).tolist(),
            by_name if len(by_name) > 1 else None,
            lengths,
            together(part.completions.ended for part in parts),
            together(part.completions.entropy for part in parts),
        )
        row |= {
            "fitness_mean": metrics.fitness_mean,
            "fitness_std": metrics.fitness_std,
            "update_norm": metrics.update_norm,
            "updated": metrics.updated,
            "generated_tokens": int(lengths.sum()),
        }
        return state, row

    def params(self, state: Any) -> PyTree:
        """The trained parameters."""
        return state.params


def objective(rewards: np.ndarray, config: Config) -> np.ndarray:
    """Scores [population, prompts] of rewards [population, prompts samples].

    Example:
        >>> from experiments.reasoning.config import PRESETS
        >>> import dataclasses
        >>> config = dataclasses.replace(PRESETS["tiny"], samples=2, objective="best")
        >>> print(objective(np.array([[0.0, 1.0, 0.0, 0.0]]), config))
        [[1. 0.]]
    """
    several = rewards.reshape(len(rewards), -1, config.samples)
    if config.objective == "best":
        return np.asarray(scores.max_at_k(several, config.samples))
    return several.mean(-1)


class AnchorState(NamedTuple):
    """The parameters that training began with."""

    anchor: PyTree


def anchored(rate: float) -> optax.GradientTransformation:
    """Decay towards the parameters at the start instead of 0 (arXiv 2605.30148), against forgetting.

    Args:
        rate: share of the way back, an update.

    Example:
        >>> rule = anchored(0.5)
        >>> state = rule.init(jnp.array(1.0))
        >>> rule.update(jnp.array(0.0), state, jnp.array(3.0))[0].item()
        -1.0
    """

    def init(params: PyTree) -> AnchorState:
        return AnchorState(jax.tree.map(functools.partial(jnp.array, copy=True), params))

    def update(updates: PyTree, state: AnchorState, params: PyTree = None) -> tuple[PyTree, Any]:
        pull = lambda u, p, a: u - rate * (p - a)
        return jax.tree.map(pull, updates, params, state.anchor), state

    return optax.GradientTransformation(init, update)
