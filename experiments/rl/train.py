"""`eggroll rl`: from settings to a trained policy, its curve and a sentence about it."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from experiments.rl import evolution, ppo
from experiments.rl.config import GYMNASIUM, Config
from experiments.rl.environments import Task, make_task
from experiments.rl.policy import Policy, make_policy
from experiments.rl.rollout import run_episode
from experiments.run.devices import ONE, Layout, layout_of
from experiments.run.folder import open_run_folder, write_json
from experiments.run.loop import Job, Outcome, run
from experiments.run.metrics import Row
from experiments.run.optimizers import Rates
from experiments.run.plots import learning_curve
from experiments.run.seeds import average, each, many
from experiments.run.stopwatch import Stopwatch
from experiments.run.together import Pieces, run_together

# How a result is put into words, and what returns are counted in.
SKILLS = {"CartPole-v1": "to balance the pole"}
MEASURES = {"CartPole-v1": "the mean policy holds it for {score:.1f} of 500 steps"}
UNITS = {"CartPole-v1": "steps"}
PLAIN_MEASURE = "the return of the mean policy is {score:.1f}"


class Result(NamedTuple):
    """What a run came to; figures of the seeds are averaged.

    Attributes:
        solved: whether the held-out return reached the target; None without a target.
        held_out_return: mean return of the final mean policy over the held-out episodes.
        held_out_return_before: the same before training.
        by_seed: the held-out return of every seed; None where there is one.
        generations: updates made.
        environment_steps: steps taken in training, by the whole population.
        sentence: the result in words.
        timing: seconds of every phase.
    """

    solved: bool | None
    held_out_return: float
    held_out_return_before: float
    by_seed: list[float] | None
    generations: int
    environment_steps: int
    sentence: str
    timing: dict[str, float]


def job(config: Config) -> Job:
    """The run as the loop takes it.

    Raises:
        UsageError: for an environment or optimizer that does not exist.
    """
    common: Any = dict(
        reached=lambda row: reached(config, row),
        tell=tell,
        measured=("held_out_return",),
        totals=("environment_steps",),
    )
    layout = layout_of(config, config.population, why_alone(config))
    if config.env.startswith(GYMNASIUM):
        from experiments.rl.outside import Outside

        outside = Outside(config)
        return Job(outside.start, outside.generation, outside.measure, **common)
    task, policy = parts(config)
    seeds = config.seed + jnp.arange(config.seeds)
    every = many(config.seeds)
    begin, generation, held_out = (every(f) for f in pieces(config, task, policy, layout=layout))
    return Job(
        start=layout.jit(lambda: begin(seeds if config.seeds > 1 else seeds[0])),
        generation=layout.jit(generation, donate_argnums=0),
        measure=layout.jit(lambda carry: held_out(carry, seeds if config.seeds > 1 else seeds[0])),
        sharding=layout.everywhere,
        **common,
    )


def why_alone(config: Config) -> str | None:
    """Why a run has one device, if it has."""
    if config.env.startswith(GYMNASIUM):
        return f"--env {config.env} is stepped by this process"
    if config.algorithm != "eggroll":
        return f"--algorithm {config.algorithm} has no population to divide"
    return f"--seeds {config.seeds} are one program" if config.seeds > 1 else None


def pieces(
    config: Config,
    task: Task,
    policy: Policy,
    rates: Rates | None = None,
    layout: Layout = ONE,
) -> Pieces:
    """What a run with one seed is made of; evolution strategies take other rates than the settings'."""
    if config.algorithm == "ppo":
        begin: Any = lambda seed: ppo.start(config, policy, task, seed)
        generation = ppo.make_generation(config, policy, task)
    else:
        begin = lambda seed: evolution.start(config, policy, task, seed, rates)
        generation = evolution.make_generation(config, policy, task, rates, layout)
    return Pieces(begin, generation, make_measure(config, policy, task))


def parts(config: Config) -> tuple[Task, Policy]:
    """The environment and the policy that the settings describe."""
    task = make_task(config.env)
    policy = make_policy(
        task.observations, task.actions,
        config.width, config.depth, config.activation, config.normalise,
    )  # fmt: skip
    return task, policy


def make_measure(config: Config, policy: Policy, task: Task) -> Callable[..., dict[str, Array]]:
    """(carry, seed) -> the mean return of the mean policy over held-out episodes."""

    def measure(carry: Any, seed: Array) -> dict[str, Array]:
        _, _, key = evolution.keys(seed)
        returns = play(config, policy, task, carry, jax.random.split(key, config.held_out_episodes))
        return {"held_out_return": returns.mean()}

    return measure


def play(
    config: Config, policy: Policy, task: Task, carry: Any, keys: Array
) -> Float[Array, "episodes"]:
    """Returns of the mean policy, an episode a key."""
    return jax.vmap(
        lambda key: (
            run_episode(
                task, policy, mean(carry), carry.statistics, key, config.deterministic
            ).score
        )
    )(keys)


def mean(carry: Any) -> PyTree:
    """The parameters of the mean policy, from the state of either algorithm."""
    return carry.es.params if isinstance(carry, evolution.Carry) else carry.params


def evaluate(config: Config, state: Any, episodes: int, seed: int) -> dict[str, list[float]]:
    """Returns of new episodes of a trained policy, by seed of the training.

    Args:
        config: the run's settings.
        state: its state.
        episodes: how many.
        seed: decides the episodes; they are those of no training run.
    """
    if config.env.startswith(GYMNASIUM):
        from experiments.rl.outside import Outside

        returns = Outside(config).returns(state, episodes, seed)
        return {f"seed {config.seed}": returns.tolist()}
    task, policy = parts(config)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0x5EED), episodes)
    every = many(config.seeds)(lambda carry: play(config, policy, task, carry, keys))
    returns = np.asarray(jax.jit(every)(state)).reshape(config.seeds, episodes)
    return {f"seed {config.seed + i}": row.tolist() for i, row in enumerate(returns)}


def parameters(config: Config, state: Any) -> PyTree:
    """What `eggroll export` writes: the mean policy, and the statistics it scales with."""
    out = {"params": mean(state)}
    if config.normalise:
        out["statistics"] = state.statistics._asdict()
    return out


def reached(config: Config, row: Row) -> bool:
    """Whether every seed's held-out return is at the target."""
    return config.target is not None and min(each(row["held_out_return"])) >= config.target


def tell(row: Row) -> str:
    """A row in a few words."""
    words = [
        f"{label} {average(row[name]):.1f}"
        for label, name in (
            ("held out", "held_out_return"),
            ("return", "fitness_mean" if "fitness_mean" in row else "episode_return"),
        )
        if row[name] is not None and None not in each(row[name])
    ]
    return ", ".join(words)


def train(config: Config, started: float | None = None) -> Result:
    """Train as `config` says, or go on where its run folder stands, and fill the folder.

    Args:
        config: the settings.
        started: `time.perf_counter()` at the start of the process, to count the imports in.

    Raises:
        UsageError: for settings that cannot be right, or a run folder that cannot be used.
        Interrupted: after SIGTERM or Ctrl-C.
        RunError: where a file cannot be written.
    """
    watch = Stopwatch(started)
    watch.finish("imports")

    # ---------------------------------------------------------------- settings, task and folder
    config.check()
    task_job = job(config)
    with open_run_folder("rl", config) as folder:
        watch.finish("setup")

        # ------------------------------------------------------------ generations
        outcome = run(task_job, config, folder, watch)
        watch.finish("training")

        return finish(config, folder, outcome, watch)


def train_many(configs: Sequence[Config], started: float | None = None) -> list[Result | Exception]:
    """Several runs of the same `config.together`, in one program; each fills its own folder.

    A run's result is that of :func:`train` to rounding; what stops one run alone stands in its place.

    Raises:
        UsageError: for settings that cannot be right, or that do not fit into one program.
        Interrupted: after SIGTERM or Ctrl-C.
    """
    watch = Stopwatch(started)
    watch.finish("imports")
    task, policy = parts(configs[0])
    # The runs are mapped, not their members divided.
    alone = configs[0].on_one_device()
    one = lambda config, rates: pieces(config, task, policy, rates)
    return run_together("rl", configs, job(alone), one, finish, watch)


def finish(config: Config, folder: Path, outcome: Outcome, watch: Stopwatch) -> Result:
    """Writes what was learned into the folder."""
    lesson = put_in_words(config, each(outcome.after["held_out_return"]))
    draw(config, folder, outcome, lesson)
    watch.finish("results")
    result = summarise(config, outcome, lesson, watch)
    write_json(folder / "result.json", result._asdict())
    return result


def draw(config: Config, folder: Path, outcome: Outcome, lesson: str) -> None:
    """The learning curve of a run as curve.png."""
    learning_curve(
        folder / "curve.png",
        outcome.rows,
        title=lesson,
        measure=f"return of a {config.env} episode ({UNITS.get(config.env, 'sum of rewards')})",
        final=(outcome.generations, outcome.after["held_out_return"]),
        target=config.target,
    )


def summarise(config: Config, outcome: Outcome, lesson: str, watch: Stopwatch) -> Result:
    """The result of a run, with its sentence."""
    after = outcome.after["held_out_return"]
    steps = outcome.rows[-1]["environment_steps"] if outcome.rows else 0
    steps = sum(each(steps))
    seeds = f"mean of {config.seeds} seeds, " if config.seeds > 1 else ""
    n = outcome.generations
    return Result(
        solved=None if config.target is None else reached(config, outcome.after),
        held_out_return=average(after),
        held_out_return_before=average(outcome.before["held_out_return"]),
        by_seed=after if isinstance(after, list) else None,
        generations=n,
        environment_steps=steps,
        sentence=f"{lesson} ({seeds}{config.held_out_episodes} held-out episodes), after {n} "
        f"generation{'s' * (n != 1)} and {steps:,} environment steps, "
        f"{watch.total():.1f} s from start.",
        timing=watch.phases,
    )


def put_in_words(config: Config, scores: list[float]) -> str:
    """The outcome as the beginning of a sentence, plain about a target that was missed.

    Args:
        config: the settings.
        scores: the held-out return of every seed.
    """
    name = config.env.removeprefix(GYMNASIUM)
    skill, measure = SKILLS.get(name, name), MEASURES.get(name, PLAIN_MEASURE)
    good = sum(config.target is not None and score >= config.target for score in scores)
    if config.target is None:
        verdict = f"Trained on {name}"
    elif good == len(scores):
        verdict = f"Learned {skill}"
    elif good:
        verdict = f"{good} of {len(scores)} seeds learned {skill} (target {config.target:g})"
    else:
        verdict = f"Not yet learned {skill} (target {config.target:g})"
    # Cut, not rounded: 499.97 is not 500.
    shown = math.floor(average(scores) * 10) / 10
    return f"{verdict}: {measure.format(score=shown)}"
