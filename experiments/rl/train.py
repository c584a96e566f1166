"""One training run: an evolution strategy teaches a Flax policy a gymnax environment."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

import eggroll
from experiments.models.mlp import MLP
from experiments.rl.config import Config
from experiments.rl.rollout import Task, make_policy, make_task, run_episode
from experiments.run import folder as run_folder
from experiments.run.metrics import MetricsFile, Stopwatch, read_metrics
from experiments.run.plots import learning_curve
from experiments.run.progress import Progress

# How a result is put into words, and what returns are counted in.
SKILLS = {"CartPole-v1": "to balance the pole"}
MEASURES = {"CartPole-v1": "the mean policy holds it for {score:.1f} of {max_steps} steps"}
UNITS = {"CartPole-v1": "steps"}


class Programs(NamedTuple):
    """The functions of a run that are compiled, each once.

    Attributes:
        start: seed -> (state, held-out keys).
        generation: state -> (state, metrics, environment steps taken).
        held_out: (params, held-out keys) -> mean return.
    """

    start: Callable[..., tuple[eggroll.State, Key[Array, "episodes"]]]
    generation: Callable[[eggroll.State], tuple[eggroll.State, eggroll.Metrics, Int[Array, ""]]]
    held_out: Callable[..., Float[Array, ""]]


class Result(NamedTuple):
    """What a run came to.

    Attributes:
        solved: whether the held-out return reached the target; None without a target.
        held_out_return: mean return of the final mean policy over the held-out episodes.
        held_out_return_before: the same before training.
        generations: updates made.
        environment_steps: steps taken in training, by the whole population.
        sentence: the result in words.
        timing: seconds of every phase.
    """

    solved: bool | None
    held_out_return: float
    held_out_return_before: float
    generations: int
    environment_steps: int
    sentence: str
    timing: dict[str, float]


def make_programs(config: Config, task: Task) -> Programs:
    """The functions of a run, not yet compiled."""
    model = MLP(task.actions, config.width, config.depth, config.activation)
    policy = make_policy(model, config.deterministic)
    es = eggroll.EvolutionStrategy(
        optimizer=optax.adam(config.learning_rate),
        population=config.population,
        sigma=config.sigma,
        rank=config.rank,
        on_dense="error",
    )

    def start(seed: Int[Array, ""]) -> tuple[eggroll.State, Key[Array, "episodes"]]:
        init_key, search_key, held_out_key = jax.random.split(jax.random.key(seed), 3)
        params = model.init(init_key, jnp.zeros(task.observations))["params"]
        return es.init(params, search_key), jax.random.split(held_out_key, config.held_out_episodes)

    def fitness(params: PyTree, key: Key[Array, ""]) -> tuple[Float[Array, ""], Int[Array, ""]]:
        episode = run_episode(task, policy, params, key)
        return episode.score, episode.steps

    # In halves, because `es.step` gives back no episode lengths.
    def generation(state: eggroll.State) -> tuple[eggroll.State, eggroll.Metrics, Int[Array, ""]]:
        scores, steps = es.evaluate(state, fitness)
        return *es.update(state, scores), steps.sum()

    def held_out(params: PyTree, keys: Key[Array, "episodes"]) -> Float[Array, ""]:
        return jax.vmap(lambda key: run_episode(task, policy, params, key).score)(keys).mean()

    return Programs(start, generation, held_out)


def train(config: Config, started: float | None = None) -> Result:
    """Train as `config` says and fill its run folder.

    Args:
        config: the settings.
        started: `time.perf_counter()` at the start of the process, to count the imports in.

    Raises:
        UsageError: for settings that cannot be right, or a run folder that cannot be used.
    """
    watch = Stopwatch(time.perf_counter() if started is None else started)
    watch.finish("imports")

    # ---------------------------------------------------------------- task and run folder
    config.check()
    task = make_task(config.env)
    folder = run_folder.open_run_folder(config.run_dir, config.overwrite)
    run_folder.write_config(folder, config)
    run_folder.write_json(folder / "versions.json", run_folder.versions())
    watch.finish("setup")

    # ---------------------------------------------------------------- compilation
    programs = make_programs(config, task)
    state, held_out_keys = jax.jit(programs.start)(config.seed)
    generation = jax.jit(programs.generation, donate_argnums=0).lower(state).compile()
    held_out = jax.jit(programs.held_out).lower(state.params, held_out_keys).compile()
    watch.finish("compilation")

    # ---------------------------------------------------------------- generations
    held_out_returns: dict[int, float] = {}  # by the number of updates before
    environment_steps = 0
    with MetricsFile(folder / "metrics.jsonl") as metrics_file, Progress(config.limit) as progress:
        for updates in range(config.limit):
            before = time.perf_counter()
            if updates % config.evaluate_every == 0:
                score = held_out_returns[updates] = float(held_out(state.params, held_out_keys))
                if config.early_target is not None and score >= config.early_target:
                    break
            state, metrics, steps = jax.block_until_ready(generation(state))
            environment_steps += int(steps)
            row = jax.device_get(metrics)._asdict()
            row["held_out_return"] = held_out_returns.get(updates)
            row["environment_steps"] = environment_steps
            row["timing"] = {"seconds": time.perf_counter() - before, "since_start": watch.total()}
            metrics_file.write(row)
            progress.update(updates + 1, f"return {metrics.fitness_mean:.1f}, held out {score:.1f}")
    generations = int(state.generation)
    if generations not in held_out_returns:
        held_out_returns[generations] = float(held_out(state.params, held_out_keys))
    watch.finish("training")

    # ---------------------------------------------------------------- what was learned
    score = held_out_returns[generations]
    lesson = put_in_words(config, task, score)
    run_folder.save_params(folder / "params.npz", state.params)
    learning_curve(
        folder / "curve.png",
        read_metrics(folder / "metrics.jsonl"),
        title=lesson,
        measure=f"return of a {config.env} episode ({UNITS.get(config.env, 'sum of rewards')})",
        final=(generations, score),
        target=config.target,
    )
    watch.finish("results")
    result = Result(
        solved=None if config.target is None else score >= config.target,
        held_out_return=score,
        held_out_return_before=held_out_returns[0],
        generations=generations,
        environment_steps=environment_steps,
        sentence=f"{lesson} ({config.held_out_episodes} held-out episodes), after {generations} "
        f"generation{'s' * (generations != 1)} and {environment_steps:,} environment steps, "
        f"{watch.total():.1f} s from start.",
        timing=watch.phases,
    )
    run_folder.write_json(folder / "result.json", result._asdict())
    return result


def put_in_words(config: Config, task: Task, score: float) -> str:
    """The outcome as the beginning of a sentence, plain about a target that was missed."""
    skill = SKILLS.get(config.env, config.env)
    measure = MEASURES.get(config.env, "the return of the mean policy is {score:.1f}")
    if config.target is None:
        verdict = f"Trained on {config.env}"
    elif score >= config.target:
        verdict = f"Learned {skill}"
    else:
        verdict = f"Not yet learned {skill} (target {config.target:g})"
    # Cut, not rounded: 499.97 is not 500.
    shown = math.floor(score * 10) / 10
    return f"{verdict}: {measure.format(score=shown, max_steps=task.max_steps)}"
