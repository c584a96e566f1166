"""Learning from rewards by evolution strategies: every member answers all questions of a generation."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Float32, PyTree

import eggroll
from eggroll.population.placement import tracing
from experiments.models import parallel
from experiments.reasoning import diagnostics, scores, sft
from experiments.reasoning.anchor import anchored, drift_of
from experiments.reasoning.config import Config
from experiments.reasoning.distilling import Teachers, teacher_score
from experiments.reasoning.engine import Share, stream, unseen
from experiments.reasoning.examiner import Examiner
from experiments.reasoning.planning import on_outputs
from experiments.reasoning.questions import Questions, repeated
from experiments.reasoning.sequences import Completions, joined, tokens_read
from experiments.reasoning.start import Start
from experiments.reasoning.tasks import Question
from experiments.run import learners
from experiments.run.devices import ONE, Layout
from experiments.run.history import SCORES
from experiments.run.learners import optimizer_of, row_of

FITNESS: Mapping[str, Callable[..., Float[Array, "tasks"]]] = {
    "likelihood": sft.cross_entropy_score,
    "match": sft.exact_match_score,
    "teachers": teacher_score,
}


def strategy(config: Config, base: Start, layout: Layout = ONE) -> eggroll.EvolutionStrategy:
    """The evolution strategy of a run: EGGROLL, or with rank "full" dense ES. Computes nothing.

    Args:
        config: the settings.
        base: the model that training begins with.
        layout: the devices.

    Raises:
        UsageError: for an optimizer that there is not.
    """
    optimizer = optimizer_of(config.optimizer)
    if config.anchor:
        rate = config.optimizer.learning_rate * config.anchor
        optimizer = optax.chain(optimizer, anchored(rate, config.anchor_norm))
    planned = base.model.plan(jax.eval_shape(base.params, jnp.int32(0)), config.evolution.rank)
    sigmas = {leaf.path: leaf.scale for leaf in planned.leaves}
    how: dict[str, Any] = dict(
        optimizer=in_noise_units(optimizer, sigmas),
        plan=base.model.plan,
        # Questions differ in how hard they are: members are compared on each by itself.
        shaping=eggroll.shaping.per_task(),
        noise_reuse=config.noise_reuse,
        master_weights="int8" if config.copies == "int8" else True,
    )
    if config.perturb != "weights":
        # A member for every answer; answers are compared on each question before they are told.
        answers = config.evolution.population * config.prompts * config.samples
        how |= dict(population=answers, shaping=None)
    if config.perturb == "nodes":
        # The tokens of an answer are its rows.
        plan, credit = on_outputs(base.model.plan), eggroll.credit.causal()
        how |= dict(perturb="nodes", plan=plan, credit=credit)
    return learners.strategy(config.evolution, config.optimizer, layout, **how)


class Answers(NamedTuple):
    """What a population answered; tables are [population, asked].

    Attributes:
        asked: the questions, each as often as it is answered.
        texts: objects, the answers.
        completions: their tokens.
        rewards: NaN for those that are not known.
        parts: the same for each reward that these are summed from, by its name.
        late: share of rewards that were given up for their time.
        tokens_read: of prompts, by a member.
    """

    asked: Sequence[Question]
    texts: np.ndarray
    completions: Completions
    rewards: np.ndarray
    parts: Mapping[str, np.ndarray]
    late: float
    tokens_read: int


class Population:
    """What evolution strategies on answers share: a strategy and its state.

    Args:
        config: the settings, with the numbers of members and questions at a time.
        base: the model that training begins with.
        questions: of the task.
        examiner: rewards answers.
        layout: the devices.

    Attributes:
        sharding: where the state lies on several devices; None for one.
    """

    def __init__(
        self,
        config: Config,
        base: Start,
        questions: Questions,
        examiner: Examiner,
        layout: Layout = ONE,
    ) -> None:
        self._config, self._base, self._layout = config, base, layout
        self._questions, self._examiner = questions, examiner
        self.es = strategy(config, base, layout)
        self.sharding = None
        if layout.mesh is not None:
            shapes = jax.eval_shape(self.start, jnp.int32(0))
            self.sharding = parallel.shardings(shapes, layout.mesh, base.model.sharding)

    def start(self, seed: Array) -> eggroll.State:
        """The state before generation 0."""
        params = self._on_devices(self._base.params(seed))
        return self.es.init(params, jax.random.fold_in(jax.random.key(seed), 1))

    def _on_devices(self, params: PyTree) -> PyTree:
        """Every device gets its own part alone, so that none need have room for the whole."""
        if tracing():
            # Only shapes are asked for.
            return jax.tree.map(jnp.asarray, params)
        if self._layout.mesh is None:
            return params
        whole = jax.device_get(params)

        # Not device_put: between processes it compares the whole on every device.
        def put(x: np.ndarray, where: NamedSharding) -> Array:
            return jax.make_array_from_callback(x.shape, where, lambda part: x[part])

        rules = self._base.model.sharding
        return jax.tree.map(put, whole, parallel.shardings(whole, self._layout.mesh, rules))

    def update(
        self, state: eggroll.State, scores: Float32[np.ndarray, "population *tasks"]
    ) -> tuple[eggroll.State, dict[str, Any]]:
        """An update by scores, and its figures; the state is donated."""
        return self._update(self.es.placed(state), state, scores)

    @functools.cached_property
    def _update(self) -> Any:
        def updated(
            es: eggroll.EvolutionStrategy, state: eggroll.State, values: Array
        ) -> tuple[eggroll.State, dict[str, Any]]:
            new, metrics = es.update(state, values)
            return new, self._told(es, state, new, metrics)

        where = (self.sharding, self._layout.everywhere)
        return self._layout.jit(updated, where, static_argnums=0, donate_argnums=1)

    def _told(
        self,
        es: eggroll.EvolutionStrategy,
        before: eggroll.State,
        after: eggroll.State,
        metrics: eggroll.Metrics,
    ) -> dict[str, Any]:
        """An update as a row, inside a program."""
        changed = diagnostics.changed_weights(before.params, after.params, self._config.narrow_type)
        return row_of(metrics, es, before) | changed | drift_of(after.optimizer)


class Evolution(Population):
    """Learning by weight noise: members answer with parameters of their own."""

    def generation(
        self, state: eggroll.State, generation: int, share: Share = unseen
    ) -> tuple[eggroll.State, dict[str, Any]]:
        """Scores of every member, and an update."""
        questions = self._questions.of_generation(generation)
        if self._config.fitness == "reward":
            values, row = self._rewards(state, questions, share)
        else:
            # Scores of worked solutions, with no answer written.
            given: tuple[Any, ...] = self._questions.solutions(questions)
            if self._config.fitness == "teachers":
                given = (*given, self._teachers.mixture(*map(jnp.asarray, given)))
            values = self._score(self.es.placed(state), state, *given)
            row = {"prompt_tokens": 0, "generated_tokens": 0}
        scores = on_host(values)
        state, told = self.update(state, scores)
        # Identical pairs are those of answers, not of scores.
        return state, told | row | {SCORES: scores}

    @functools.cached_property
    def _score(self) -> Any:
        """Scores of all members on worked solutions."""
        score = functools.partial(FITNESS[self._config.fitness], self._base.model)
        return self._layout.jit(
            lambda es, state, *given: es.evaluate(state, score, *given), static_argnums=0
        )

    @functools.cached_property
    def _teachers(self) -> Teachers:
        return Teachers(self._config, self._base)

    def _rewards(
        self, state: eggroll.State, questions: Sequence[Question], share: Share
    ) -> tuple[Float[np.ndarray, "population prompts"], dict[str, Any]]:
        """Scores of what every member answers, and a row about the answers."""
        found = self.answers(state, questions, share)
        tokens = self._config.evolution.population * found.tokens_read
        row = row_of_answers(found) | {"prompt_tokens": tokens}
        return objective(found.rewards, self._config), row

    def answers(
        self, state: eggroll.State, questions: Sequence[Question], share: Share = unseen
    ) -> Answers:
        """What every member of the coming generation answers, and its rewards."""
        config, examiner = self._config, self._examiner
        asked = repeated(questions, config.samples)
        prompts = self._questions.prompts(asked)
        members = config.evolution.population
        parts, texts, handles = [], [], []
        for part in stream(
            self._base.model,
            self.es,
            state,
            prompts,
            self._questions.sampling(),
            self._questions.ends,
            chunk=config.prompt_chunk and config.prompt_chunk * config.samples,
            share=share,
        ):
            # Processes compute these rewards while the next questions are answered.
            own = [asked[i] for i in part.which] * len(part.completions.lengths)
            texts.append(self._questions.texts(part.completions))
            handles.append(examiner.submit(texts[-1], own))
            parts.append(part)
        shapes = [part.completions.lengths.shape for part in parts]
        found = [examiner.rewards(*one) for one in zip(handles, shapes, strict=True)]

        def join(tables: Iterable[np.ndarray]) -> np.ndarray:
            tables = list(tables)
            whole = np.zeros((members, len(asked)), tables[0].dtype)
            for part, own in zip(parts, tables, strict=True):
                part.place(whole, own)
            return whole

        written = (np.array(t, object).reshape(s) for t, s in zip(texts, shapes, strict=True))
        return Answers(
            asked=asked,
            texts=join(written),
            completions=joined(parts, members, len(asked)),
            rewards=join(one.rewards for one in found),
            parts={name: join(one.parts[name] for one in found) for name in found[0].parts},
            late=float(np.mean([one.late for one in found])),
            tokens_read=tokens_read(prompts),
        )


def row_of_answers(found: Answers) -> dict[str, Any]:
    """What a row tells of answers."""
    completions = found.completions
    row: dict[str, Any] = diagnostics.summary(
        found.rewards,
        found.texts.tolist(),
        found.parts if len(found.parts) > 1 else None,
        completions.lengths,
        completions.ended,
        completions.entropy,
    )
    right = [one.answer for one in found.asked] * len(found.rewards)
    row |= diagnostics.of_rewards(found.rewards.ravel(), found.texts.ravel().tolist(), right)
    return row | {"late_rewards": found.late, "generated_tokens": int(completions.lengths.sum())}


def on_host(values: Array | np.ndarray) -> Float32[np.ndarray, "population *tasks"]:
    """Scores as an update takes them, whole in every process."""
    if isinstance(values, jax.Array) and not values.is_fully_addressable:
        values = multihost_utils.process_allgather(values, tiled=True)
    return np.asarray(values, np.float32)


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


def in_noise_units(
    optimizer: optax.GradientTransformation, sigmas: Mapping[str, float | np.ndarray]
) -> optax.GradientTransformation:
    """The optimizer on parameters in units of their own noise: one learning rate is right for all of them
    then, also for a matrix in int8, whose noise is many of its steps, and for its small scales.

    Args:
        optimizer: any.
        sigmas: by path, the factor on the strategy's sigma: a number, or an array with the axes of the
            parameter.

    Example:
        >>> rule = in_noise_units(optax.sgd(1.0), {"w": 10.0})
        >>> rule.update({"w": jnp.array(0.2)}, rule.init({"w": jnp.array(0.0)}))[0]["w"].item()
        -20.0
    """
    if all(np.isin(sigma, (0.0, 1.0)).all() for sigma in sigmas.values()):
        return optimizer
    inner = optax.with_extra_args_support(optimizer)

    def times(tree: PyTree, power: int) -> PyTree:
        def one(keys: Any, x: Array) -> Array:
            sigma = sigmas[jax.tree_util.keystr(keys, simple=True, separator="/")] ** power
            return x * (sigma if isinstance(sigma, float) else jnp.asarray(sigma, x.dtype))

        return None if tree is None else jax.tree_util.tree_map_with_path(one, tree)

    def init(params: PyTree) -> Any:
        return inner.init(times(params, -1))

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        updates, state = inner.update(times(updates, 1), state, times(params, -1), **extra)
        return times(updates, 1), state

    return optax.GradientTransformationExtraArgs(init, update)
