"""Learning from rewards by evolution strategies: every member answers all questions of a generation."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, PyTree

import eggroll
from eggroll.population.placement import tracing
from experiments.models import parallel
from experiments.reasoning import diagnostics, scores, sft
from experiments.reasoning.config import Config
from experiments.reasoning.engine import stream
from experiments.reasoning.examiner import Examiner, repeated, sampling_of
from experiments.reasoning.start import Start
from experiments.reasoning.tasks import Question
from experiments.run.devices import ONE, Layout
from experiments.run.optimizers import decayed, make_optimizer
from experiments.run.sizes import sizes

FITNESS = {"likelihood": sft.cross_entropy_score, "match": sft.exact_match_score}


class Evolution:
    """EGGROLL, or with rank "full" dense ES.

    Args:
        config: the settings.
        begin: the model.
        layout: the devices.
    """

    def __init__(self, config: Config, begin: Start, layout: Layout = ONE) -> None:
        self._config, self._begin, self._layout = config, begin, layout
        rate = decayed(config.learning_rate, config.learning_rate_decay)
        optimizer = make_optimizer(config.optimizer, rate)
        if config.anchor:
            optimizer = optax.chain(optimizer, anchored(config.learning_rate * config.anchor))
        shapes = jax.eval_shape(begin.params, jnp.int32(0))
        planned = begin.model.plan(shapes, config.rank)
        optimizer = in_noise_units(optimizer, {leaf.path: leaf.sigma for leaf in planned.leaves})
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
            mesh=layout.mesh,
            deterministic=layout.same_bits,
        )
        # How the state lies on several devices.
        self.lies = None
        if layout.mesh is not None:
            self.lies = parallel.shardings(jax.eval_shape(self.start, jnp.int32(0)), layout.mesh)
        self._update = layout.jit(
            self._updated,
            (self.lies, layout.everywhere, layout.everywhere),
            static_argnums=0,
            donate_argnums=1,
        )

    def start(self, seed: Array) -> Any:
        """The state before generation 0."""
        params = self._on_devices(self._begin.params(seed))
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

        return jax.tree.map(put, whole, parallel.shardings(whole, self._layout.mesh))

    def generation(
        self, state: Any, generation: int, questions: Sequence[Question], examiner: Examiner
    ) -> tuple[Any, dict[str, Any]]:
        """Scores of every member, and an update."""
        told = self._rewarded if self._config.fitness == "reward" else self._likely
        values, row = told(state, questions, examiner)
        state, metrics, changed = self._update(self.es.placed(state), state, values)
        row |= {
            "fitness_mean": metrics.fitness_mean,
            "fitness_std": metrics.fitness_std,
            "update_norm": metrics.update_norm,
            "updated": metrics.updated,
        }
        return state, row | changed

    def _updated(
        self, es: eggroll.EvolutionStrategy, state: Any, values: Array
    ) -> tuple[Any, Any, dict[str, Array]]:
        new, metrics = es.update(state, values)
        changed = diagnostics.changed_weights(state.params, new.params, self._config.narrow_type)
        return new, metrics, changed | sizes(es, state)

    @functools.cached_property
    def _score(self) -> Any:
        """Scores of all members on worked solutions."""
        score = functools.partial(FITNESS[self._config.fitness], self._begin.model)
        return self._layout.jit(
            lambda es, state, tokens, mask: es.evaluate(state, score, tokens, mask),
            static_argnums=0,
        )

    def _likely(
        self, state: Any, questions: Sequence[Question], examiner: Examiner
    ) -> tuple[Array, dict[str, Any]]:
        """Scores of worked solutions, with no answer written."""
        values = self._score(self.es.placed(state), state, *examiner.solutions(questions))
        return values, {"generated_tokens": 0}

    def _rewarded(
        self, state: Any, questions: Sequence[Question], examiner: Examiner
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Rewards of what every member answers."""
        config = self._config
        asked = repeated(questions, config.samples)
        parts, texts, handles, owns = [], [], [], []
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
            owns += own
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
        flat = [text for some in texts for text in some]
        tables = [m.rewards.ravel() for m in marks]
        right = [one.answer for one in owns]
        row |= diagnostics.of_rewards(np.concatenate(tables), flat, right)
        row["late_rewards"] = float(np.mean([one.late for one in marks]))
        row["generated_tokens"] = int(lengths.sum())
        return objective(rewards, config), row

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


def in_noise_units(
    optimizer: optax.GradientTransformation, sigmas: Mapping[str, float]
) -> optax.GradientTransformation:
    """The optimizer on parameters in units of their own noise: one learning rate is right for all of them
    then, also for a matrix in int8, whose noise is many of its steps, and for its small scales.

    Args:
        optimizer: any.
        sigmas: by path, the factor on the strategy's sigma.

    Example:
        >>> rule = in_noise_units(optax.sgd(1.0), {"w": 10.0})
        >>> rule.update({"w": jnp.array(0.2)}, rule.init({"w": jnp.array(0.0)}))[0]["w"].item()
        -20.0
    """
    if all(sigma in (0.0, 1.0) for sigma in sigmas.values()):
        return optimizer
    inner = optax.with_extra_args_support(optimizer)

    def times(tree: PyTree, power: int) -> PyTree:
        def one(keys: Any, x: Array) -> Array:
            return x * sigmas[jax.tree_util.keystr(keys, simple=True, separator="/")] ** power

        return None if tree is None else jax.tree_util.tree_map_with_path(one, tree)

    def init(params: PyTree) -> Any:
        return inner.init(times(params, -1))

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        updates, state = inner.update(times(updates, 1), state, times(params, -1), **extra)
        return times(updates, 1), state

    return optax.GradientTransformationExtraArgs(init, update)


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
