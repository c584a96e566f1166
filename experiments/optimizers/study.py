"""`eggroll study`: many optimizers on one task, each at the learning rate that suits it.

For every method: a run at three neighbouring rungs of a ladder of learning rates, further up or down the
ladder while the best is at an end of what was tried; then runs of further seeds at the best. All have the
same budget of updates, schedule, data and batches. A run is a run folder, and one that is finished is
never made again, so that the same command continues. At the end the updates of all are timed in turns.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from experiments.optimizers.config import Config
from experiments.optimizers.methods import (
    LADDER,
    STUDIES,
    StudyName,
    config_of,
    methods_of,
    middle,
)
from experiments.optimizers.results import Found, write_results
from experiments.run.errors import Interrupted, UsageError, suggestion
from experiments.run.fields import changed, check_ranges, count, differences, positive, to_json
from experiments.run.folder import read_config, read_result
from experiments.run.stopping import StopRequest, stop_requests


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Compare optimizers, and write a table and a picture."""

    study: Positional[StudyName]
    """A language model of bytes, digits, or a tiny language model."""
    run_dir: Path | None = None
    """Folder for all runs and the results; runs/study-STUDY by default."""
    methods: tuple[str, ...] = ()
    """What to compare; everything by default."""
    seeds: int = count(3, most=10_000)
    """Runs at the best learning rate; the first is that of the search."""
    generations: int | None = count(None)
    """Updates of every run, instead of the study's."""
    minutes: float | None = positive(None)
    """Begin no further run after so many minutes; the same command again goes on."""

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return self.run_dir or Path(f"runs/study-{self.study}")

    @property
    def base(self) -> Config:
        """What all runs have in common."""
        base = STUDIES[self.study]
        updates = self.generations or base.max_generations
        return changed(base, max_generations=updates, schedule=updates)

    def check(self) -> None:
        """Raises UsageError for the first setting that cannot be right."""
        check_ranges(self)
        known = methods_of(self.base)
        for name in self.methods:
            if name not in known:
                raise UsageError(
                    f"--methods {name}: there is no such method{suggestion(name, known)}"
                )


def study(settings: StudySettings) -> list[Path]:
    """Run what has not been run, and write the results of what has.

    Returns:
        The files written: results.json, table.md, study.png.

    Raises:
        UsageError: for settings that cannot be right.
        Interrupted: after SIGTERM or Ctrl-C, or when the minutes are over; results of the methods that are
            done are written first.
    """
    settings.check()
    base, folder = settings.base, settings.folder
    began = time.monotonic()
    found: dict[str, Found] = {}
    with stop_requests() as stop:

        def run(config: Config) -> dict[str, Any]:
            result = _finished(config)
            if result is None:
                _go_on(settings, stop, began)
                result = _train(config)
            return result

        try:
            for name in settings.methods or methods_of(base):
                found[name] = compare(name, settings, run)
            _go_on(settings, stop, began)
        except Interrupted as reason:
            if found:
                write_results(folder, base, found, {})
            raise Interrupted(
                f"{reason} {len(found)} methods are done; the same command again goes on."
            ) from reason
    configs = [config_of(base, name, one.rate, base.seed, folder) for name, one in found.items()]
    return write_results(folder, base, found, dict(zip(found, step_seconds(configs), strict=True)))


def compare(name: str, settings: StudySettings, run: Callable[[Config], dict[str, Any]]) -> Found:
    """The best learning rate of a method, and its runs there."""
    base, folder = settings.base, settings.folder
    searched = methods_of(base)[name].rate_of or name
    at = lambda name, rung, seed: config_of(base, name, LADDER[rung], seed, folder)
    tried = climb(
        lambda rung: _loss(run(at(searched, rung, base.seed))),
        middle(methods_of(base)[searched], base),
    )
    best = min(tried, key=tried.__getitem__)
    seeds = range(base.seed, base.seed + settings.seeds)
    results = [run(at(name, best, seed)) for seed in seeds]
    return Found(LADDER[best], {LADDER[rung]: tried[rung] for rung in sorted(tried)}, results)


def climb(loss: Callable[[int], float], start: int) -> dict[int, float]:
    """The losses of a rung of the ladder and its neighbours, and further on while the best is at an end.

    Example:
        >>> climb(lambda rung: abs(rung - 8.0), 6)
        {5: 3.0, 6: 2.0, 7: 1.0, 8: 0.0, 9: 1.0}
    """
    tried = {rung: loss(rung) for rung in (start - 1, start, start + 1)}
    while True:
        best = min(tried, key=tried.__getitem__)
        step = {min(tried): -1, max(tried): 1}.get(best, 0)
        if step == 0 or not 0 <= best + step < len(LADDER) or math.isinf(tried[best]):
            return tried
        tried[best + step] = loss(best + step)


def step_seconds(configs: Sequence[Config], rounds: int = 15) -> list[float]:
    """The median time of an update of each run, with its forward and backward pass, in seconds.

    Each round makes one update of each, so that whatever slows the machine down for a while slows all.
    """
    import jax

    from experiments.optimizers.train import OptimizerRun

    generations, states = [], []
    for config in configs:
        trainer = OptimizerRun(config)
        state, _ = trainer.generation(trainer.start())  # compiles
        generations.append(trainer.generation)
        states.append(jax.block_until_ready(state))
    times: list[list[float]] = [[] for _ in configs]
    for _ in range(rounds):
        for i, generation in enumerate(generations):
            began = time.perf_counter()
            states[i], _ = jax.block_until_ready(generation(states[i]))
            times[i].append(time.perf_counter() - began)
    return [statistics.median(one) for one in times]


def _loss(result: dict[str, Any]) -> float:
    """One that is not finite is worse than any."""
    loss = result["held_out_loss"]
    return math.inf if loss is None else loss


def _finished(config: Config) -> dict[str, Any] | None:
    """The result of a run that was made with these settings before.

    Raises:
        UsageError: where the folder holds a run of other settings.
    """
    result = read_result(config.run_dir)
    if result is None or result["generations"] != config.limit:
        return None
    own = {"driver": config.driver, **to_json(config)}
    other = list(differences(read_config(config.run_dir), own, Config, same_bits=False))
    if other:
        raise UsageError(
            f"{config.run_dir} holds a run of other settings ({', '.join(other)}): choose another --run-dir"
        )
    return result


def _train(config: Config) -> dict[str, Any]:
    from experiments.run.train import train

    result = train(config)
    print(f"{config.run_dir}: held-out loss {result['held_out_loss']}", file=sys.stderr)
    return result.to_json()


def _go_on(settings: StudySettings, stop: StopRequest, began: float) -> None:
    """Raises Interrupted where no further run may begin."""
    if stop.reason:
        raise Interrupted(f"Stopped by {stop.reason}.")
    if settings.minutes is not None and time.monotonic() - began > 60 * settings.minutes:
        raise Interrupted(f"Stopped after {settings.minutes:g} minutes.")
