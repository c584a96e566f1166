"""Trains a run of any driver: settings, folder, generations, result."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.run import hosts
from experiments.run.driver import Driver
from experiments.run.drivers import driver_of
from experiments.run.errors import UsageError
from experiments.run.folder import open_run_folder, write_json
from experiments.run.loop import run
from experiments.run.plots import learning_curve
from experiments.run.result import Result
from experiments.run.seeds import average, each
from experiments.run.settings import RunSettings
from experiments.run.stopwatch import Stopwatch
from experiments.run.together import run_together
from experiments.run.trainer import Films, Outcome, Trainer


def train(config: RunSettings, started: float | None = None) -> Result:
    """Trains as `config` says, or goes on where its run folder stands, and fills the folder.

    Args:
        config: the settings of any driver.
        started: `time.perf_counter()` at the start of the process, to count the imports in.

    Raises:
        UsageError: for settings that cannot be right, or a run folder that cannot be used.
        Interrupted: after SIGTERM, SIGHUP or Ctrl-C, with everything saved.
        RunError: where a file cannot be written, or what the run needs fails.
    """
    watch = Stopwatch(started)
    watch.finish("imports")
    driver = driver_of(config)
    config = config.settled()
    config.check()
    with driver.load()(config) as trainer:
        for note in trainer.notes:
            hosts.say(note)
        # What the data decided is settled now.
        config = trainer.config
        with open_run_folder(driver.name, config, trainer.files) as folder:
            trainer.prepare(folder)
            watch.finish("setup")
            outcome = run(driver, trainer, folder, watch)
            watch.finish("training")
            return finish(driver, trainer, config, folder, outcome, watch)


def train_many(
    configs: Sequence[RunSettings], started: float | None = None
) -> list[Result | Exception]:
    """Trains several runs of the same `config.together` in one program; each fills its own folder.

    A run's result is that of :func:`train` to rounding; what stops one run alone stands in its place.

    Raises:
        UsageError: for settings that cannot be right, or that do not fit into one program.
        Interrupted: after SIGTERM, SIGHUP or Ctrl-C, with everything saved.
    """
    watch = Stopwatch(started)
    watch.finish("imports")
    driver = driver_of(configs[0])

    def end(*ended: Any) -> Result:
        return finish(driver, *ended)

    return run_together(driver, configs, end, watch)


def finish(
    driver: Driver,
    trainer: Trainer[Any],
    config: RunSettings,
    folder: Path,
    outcome: Outcome,
    watch: Stopwatch,
) -> Result:
    """Writes what a run came to into its folder: a picture and result.json."""
    after = outcome.after[driver.figure.name]
    told = trainer.conclude(config, outcome)
    final = (outcome.generations, after)
    learning_curve(folder / "curve.png", outcome.rows, told.curve, told.lesson, final)
    watch.finish("results")
    seeds = len(each(after))
    count = sum(leaf.size for leaf in jax.tree.leaves(outcome.state.learner.params)) // seeds
    result = Result(
        sentence=f"{told.lesson}, {told.path}, {watch.total():.1f} s from start.",
        learned=outcome.learned,
        generations=outcome.generations,
        parameters=count,
        by_seed=after if isinstance(after, list) else None,
        timing=watch.phases,
        figures={
            **{name: mean(value) for name, value in outcome.after.items()},
            **{f"{name}_before": mean(outcome.before[name]) for name in outcome.after},
            **{name: mean(value) for name, value in outcome.fresh.items()},
            **{name: sum(each(outcome.totals.get(name, 0))) for name in trainer.totals},
            **told.results,
        },
    )
    write_json(folder / "result.json", result.to_json())
    # Of several processes none has the state by itself.
    if isinstance(trainer, Films) and trainer.draws(config) and not hosts.several():
        try:
            hosts.say(trainer.film(config, outcome.state, seed=0))
        except UsageError as why:
            hosts.say(f"No episode is drawn: {why}")
    return result


def mean(value: Any) -> float | None:
    """A figure, averaged over seeds; None where one has none."""
    return None if None in each(value) else average(value)
