"""`eggroll rl`: from settings to a trained policy, its curve and a sentence about it."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from experiments.rl import evolution, ppo
from experiments.rl.config import Config
from experiments.rl.environments import Environment, OutsideEnvironment, make_jax_environment
from experiments.rl.episodes import environment_of, mean, play, policy_of
from experiments.rl.episodes import evaluate as evaluate  # a part of every driver
from experiments.rl.libraries import own, parse_settings
from experiments.rl.policy import Policy
from experiments.run import hosts
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
    environment = environment_of(config)
    layout = layout_of(config, config.population, why_alone(config, environment))
    if isinstance(environment, OutsideEnvironment):
        from experiments.rl.outside import Outside

        outside = Outside(config, environment)
        return Job(outside.start, outside.generation, outside.measure, **common)
    policy = policy_of(config, environment)
    seeds = config.seed + jnp.arange(config.seeds)
    every = many(config.seeds)
    begin, generation, held_out = (
        every(f) for f in pieces(config, environment, policy, layout=layout)
    )
    return Job(
        start=layout.jit(lambda: begin(seeds if config.seeds > 1 else seeds[0])),
        generation=layout.jit(generation, donate_argnums=0),
        measure=layout.jit(lambda carry: held_out(carry, seeds if config.seeds > 1 else seeds[0])),
        sharding=layout.everywhere,
        **common,
    )


def why_alone(config: Config, environment: Environment[Any] | OutsideEnvironment) -> str | None:
    """Why a run has one device, if it has."""
    if isinstance(environment, OutsideEnvironment):
        return f"--env {config.env} is stepped by this process"
    if config.algorithm != "eggroll":
        return f"--algorithm {config.algorithm} has no population to divide"
    return f"--seeds {config.seeds} are one program" if config.seeds > 1 else None


def pieces(
    config: Config,
    task: Environment[Any],
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


def parts(config: Config) -> tuple[Environment[Any], Policy]:
    """The JAX environment and the policy that the settings describe."""
    environment = make_jax_environment(config.env, parse_settings(config.env_settings))
    return environment, policy_of(config, environment)


def make_measure(
    config: Config, policy: Policy, task: Environment[Any]
) -> Callable[..., dict[str, Array]]:
    """(carry, seed) -> the mean return of the mean policy over held-out episodes."""

    def measure(carry: Any, seed: Array) -> dict[str, Array]:
        _, _, key = evolution.keys(seed)
        returns = play(config, policy, task, carry, jax.random.split(key, config.held_out_episodes))
        return {"held_out_return": returns.mean()}

    return measure


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
            ("return", "fitness_mean" if "fitness_mean" in row else "episode_return"),
            ("held out", "held_out_return"),
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
    config = with_digest(config)
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
    configs = [with_digest(config) for config in configs]
    task, policy = parts(configs[0])
    # The runs are mapped, not their members divided.
    alone = configs[0].on_one_device()
    one = lambda config, rates: pieces(config, task, policy, rates)
    return run_together("rl", configs, job(alone), one, finish, watch)


def with_digest(config: Config) -> Config:
    """The settings with the digest of the file that `env` names, if any: a run goes on with that content."""
    return replace(config, env_digest=own.digest(config.env))


def render(config: Config, state: Any, path: Path, seed: int = 0) -> str:
    """Writes an episode of the mean policy as a GIF; gives a sentence about it.

    Raises:
        NotDrawn: where the environment cannot be drawn.
    """
    from experiments.rl.render import render

    return render(config, state, path, seed)


def finish(config: Config, folder: Path, outcome: Outcome, watch: Stopwatch) -> Result:
    """Writes what was learned into the folder."""
    lesson = put_in_words(config, each(outcome.after["held_out_return"]))
    draw(config, folder, outcome, lesson)
    watch.finish("results")
    result = summarise(config, outcome, lesson, watch)
    write_json(folder / "result.json", result._asdict())
    if config.render and hosts.first():
        draw_episode(config, folder, outcome.state)
    return result


def draw_episode(config: Config, folder: Path, state: Any) -> None:
    """An episode of the final policy as episode.gif, or on stderr why there is none."""
    from experiments.rl.render import FILE, NotDrawn

    try:
        render(config, state, folder / FILE)
    except NotDrawn as why:
        print(f"No {FILE}: {why}", file=sys.stderr)


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
    name = config.env.removeprefix("gymnasium:")
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
