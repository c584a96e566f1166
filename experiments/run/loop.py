"""The loop that every driver runs its generations in, and how it resumes.

The order of a generation g, from the state before it:

1. every `evaluate_every` generations the state is measured (held-out); a target that is reached, and
   confirmed on data that decided nothing before, ends the run; so does the end of its patience;
2. the generation is run: state g becomes state g + 1;
3. row g is appended to metrics.jsonl, and to history.jsonl where the trainer keeps one;
4. now and then, and at the end, the rows are synced and then state g + 1 is saved as checkpoint g + 1.

So a checkpoint g has all rows before g on disk. The order of resuming:

1. the folder is locked, and its config.json compared with the settings;
2. the newest checkpoint that can be read gives the state; without any it is made from the seed;
3. rows from its generation on are cut off, with a line that was only half written;
4. the loop goes on at its generation.

Everything random is a function of the settings and the generation, and a checkpoint holds whatever
else decides the future, so that a run killed anywhere and continued gives the bits of an unbroken one.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.run import agreement, hosts
from experiments.run.checkpoints import Checkpoints
from experiments.run.driver import Column, Driver
from experiments.run.errors import Interrupted, RunError
from experiments.run.history import FIGURES, NAME, SCORES, HistoryFile
from experiments.run.loggers import loggers
from experiments.run.metrics import MetricsFile, Row, expect_names, plain
from experiments.run.progress import Progress, speeds
from experiments.run.samples import Samples
from experiments.run.seeds import average, each
from experiments.run.settings import RunSettings
from experiments.run.stopping import stop_requests
from experiments.run.stopwatch import Stopwatch
from experiments.run.trainer import Carry, Outcome, Trainer

# So many generations in a row without a usable score say that something is broken.
HOPELESS = 10
# What totals are called where it is told how many of them came in a second.
SPEEDS = {
    "environment_steps": "steps",
    "generated_tokens": "written tokens",
    "prompt_tokens": "prompt tokens",
    "bytes_read": "bytes",
}


class Record:
    """What a run has on disk, and where it stands: one order of things for one run and for many at once.

    Args:
        driver: whose run it is.
        trainer: what is run; of many at once, the first.
        settings: of the run.
        start: gives the state before generation 0.
        folder: what `open_run_folder` gave: the run folder, or of other processes than the first their own.
        watch: whose seconds the rows carry.

    Attributes:
        state: the one to go on from.
        generation: how many are done.
        after: what was measured when the run ended; None before.
    """

    def __init__(
        self,
        driver: Driver,
        trainer: Trainer[Any],
        settings: RunSettings,
        start: Callable[[], Carry],
        folder: Path,
        watch: Stopwatch,
    ) -> None:
        self.driver, self.trainer, self.settings, self.watch = driver, trainer, settings, watch
        self.after: Row | None = None
        self._fresh: Row = {}
        self._latest: Row = {}  # the last measured values, for the progress bar
        self._useless = 0
        with contextlib.ExitStack() as stack:
            # Those are of all processes in common.
            path = settings.run_dir / "checkpoints"
            self._checkpoints = stack.enter_context(Checkpoints(path))
            found = self._checkpoints.restore(start, place=trainer.sharding)
            self.state: Carry
            self._totals: Row
            self.generation, self.state, self._totals = found or (0, start(), {})
            self._saved = self._begun = self.generation
            if found:
                hosts.say(f"Continuing {settings.run_dir} at generation {self.generation}.")
            path = folder / "metrics.jsonl"
            self._metrics = stack.enter_context(MetricsFile(path, self.generation))
            expect_names(path, self._metrics.rows, trainer.measured)
            self._history: HistoryFile | None = None
            if trainer.keeps_history:
                self._history = stack.enter_context(HistoryFile(folder / NAME, self.generation))
            self._log = stack.enter_context(loggers(settings, folder, self.generation))
            self._stack = stack.pop_all()
        self._last_save = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the state has to be measured before anything else."""
        return (
            self.generation % self.settings.evaluate_every == 0
            or self.generation >= self.settings.limit
        )

    def over(
        self, measured: Mapping[str, Any] | None, confirm: Callable[[], Mapping[str, Any]]
    ) -> bool:
        """Takes what was measured of the state, if it was; says whether the run ends here.

        Args:
            measured: held-out figures.
            confirm: gives the driver's figure of data that decided nothing before.
        """
        self._measured: Row | None = None if measured is None else plain(measured)
        if self._measured is not None:
            self._latest = self._measured
        last = self.generation >= self.settings.limit
        early = self.settings.generations is None and self._measured is not None
        value = (self._measured or {}).get(self.driver.figure.name)
        stale = early and agreement.agreed(self._no_longer_better(value))
        if last or stale or (early and agreement.agreed(self._meets(value))):
            self._fresh = plain(confirm())
            # A figure that is looked at often reaches a target by luck: fresh data decide.
            fresh = self._fresh[self.driver.figure.fresh]
            if last or stale or agreement.agreed(self._meets(fresh)):
                self.after = self._measured
        return self.after is not None

    def _meets(self, value: Any) -> bool:
        return self.driver.figure.meets(each(value), self.settings.target)

    def _no_longer_better(self, value: Any) -> bool:
        """Whether the last `patience` measurements, this one included, are no better than those before."""
        patience, figure = self.settings.patience, self.driver.figure
        if patience is None:
            return False
        sign = 1 if figure.better == "larger" else -1
        every = self.settings.evaluate_every
        rows = [
            row
            for row in self._metrics.rows
            if row["generation"] % every == 0 or row[figure.name] is not None
        ]
        values = [row[figure.name] for row in rows] + [value]
        # What was measured and is null is not finite: no better than any.
        found = [-math.inf if math.isnan(x := average(one)) else sign * x for one in values]
        before, recent = found[:-patience], found[-patience:]
        return bool(before) and max(recent) <= max(before)

    def add(self, found: Mapping[str, Any], began: float, **timing: Any) -> None:
        """Appends the row of a generation that is done."""
        if self._history is not None:
            found = dict(found)
            scores, figures = found.pop(SCORES), {name: found[name] for name in FIGURES}
            self._history.write(self.generation, scores, figures)
        row = {"generation": self.generation, **plain(found)}
        for name in self.trainer.totals:
            row[name] = self._totals[name] = _add(self._totals.get(name, 0), row[name])
        counts = {SPEEDS.get(name, name): plain(found[name]) for name in self.trainer.totals}
        self._speeds = speeds(counts, time.perf_counter() - began)
        row.update(self._measured or dict.fromkeys(self.trainer.measured))
        times = {"seconds": time.perf_counter() - began, "since_start": self.watch.total()}
        row["timing"] = {**times, **timing, **row.get("timing", {})}
        row = self._metrics.write(row)
        self._log(row)
        self.generation += 1
        self._row = row
        self._useless = self._useless + 1 if _nothing(row.get("fitness_mean", 0)) else 0

    @property
    def told(self) -> str:
        """The newest row in a few words, the most important first."""
        words = in_words(self.driver.columns, {**self._row, **self._latest})
        return ", ".join(filter(None, [words, *self._speeds]))

    @property
    def save_due(self) -> bool:
        """Whether the last checkpoint is too long ago."""
        return time.monotonic() - self._last_save >= self.settings.checkpoint_seconds

    def save(self, state: Any) -> None:
        """The rows are synced, then the state is saved, unless nothing happened since it last was."""
        if self.generation > self._saved:
            self._metrics.sync()
            if self._history is not None:
                self._history.sync()
            self._checkpoints.save(self.generation, state, self._totals)
            self._saved, self._last_save = self.generation, time.monotonic()

    def wait(self) -> None:
        """Returns when all that was saved is on disk.

        Raises:
            RunError: where it could not be written.
        """
        self._checkpoints.wait()

    @property
    def hopeless(self) -> RunError | None:
        """Why there is no sense in going on, if there is none."""
        if self._useless < HOPELESS:
            return None
        return RunError(
            f"no member had a usable score in the last {HOPELESS} generations (up to {self.generation - 1}): "
            "look at the fitness, or for steps that are too large"
        )

    def outcome(self, state: Any) -> Outcome:
        """What the run came to, once it is over."""
        assert self.after is not None
        rows = self._metrics.rows
        before = {name: rows[0][name] for name in self.after} if rows else self.after
        fresh = self._fresh
        learned = None
        if self.settings.target is not None:
            learned = self._meets(fresh[self.driver.figure.fresh])
        return Outcome(state, self.generation, before, self.after, fresh, learned, rows)

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._stack.__exit__(kind, error, trace)


def run(driver: Driver, trainer: Trainer[Any], folder: Path, watch: Stopwatch) -> Outcome:
    """Runs the generations of a trainer, from wherever the run folder says that it stands.

    Raises:
        Interrupted: after SIGTERM, SIGHUP or Ctrl-C, with everything saved.
        RunError: where a file cannot be written, the last checkpoint too, or where no generation gives a
            usable score.
    """
    settings = trainer.config
    samples = Samples(trainer, folder / "samples.txt")
    with (
        stop_requests(begun=False) as stop,
        Record(driver, trainer, settings, trainer.start, folder, watch) as record,
    ):
        state = record.state
        del record.state  # its memory is the next generation's
        watch.finish("start")
        with Progress(settings.limit, shown=hosts.first()) as progress:
            progress.update(record.generation, "compiling")
            while True:
                began = time.perf_counter()
                measured = jax.device_get(trainer.measure(state)) if record.due else None
                if record.over(measured, functools.partial(trainer.confirm, state)):
                    break
                if stop.at(record.generation):
                    break
                samples.add(record.generation, state)
                state, row = trainer.generation(state)
                row = jax.device_get(dict(row))
                stop.begin()
                record.add(row, began)
                progress.update(record.generation, record.told)
                if agreement.agreed(record.save_due):
                    record.save(state)
                if hopeless := record.hopeless:
                    record.save(state)
                    raise hopeless
            record.save(state)
            record.wait()
        if record.after is None:
            raise interrupted(stop.reason, record.generation)
        samples.add(record.generation, state, last=True)
        return record.outcome(state)


def in_words(columns: Sequence[Column], row: Row) -> str:
    """A row in a few words, for the progress bar: the mean where several seeds have a value each."""
    found = []
    for column in columns:
        value: Any = row
        for name in column.name.split("/"):
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is None or None in each(value) or (column.name[:6] == "timing" and not value):
            continue
        number = format(average(value), column.format)
        behind = column.words.startswith(" ")
        found.append(f"{number}{column.words}" if behind else f"{column.words} {number}")
    return ", ".join(found)


def interrupted(reason: str | None, generation: int) -> Interrupted:
    """What is said of a run that was asked to stop."""
    return Interrupted(
        f"Stopped by {reason} after {generation} generation{'s' * (generation != 1)}; everything is saved. "
        "Run the same command again to continue."
    )


def _add(total: Any, new: Any) -> Any:
    """A sum of numbers, or of lists of them."""
    if isinstance(new, list):
        return [a + b for a, b in zip(total or [0] * len(new), new, strict=True)]
    return total + new


def _nothing(value: Any) -> bool:
    return all(v is None for v in value) if isinstance(value, list) else value is None
