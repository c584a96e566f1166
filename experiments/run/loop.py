"""The loop that every driver runs its generations in, and how it resumes.

The order of a generation g, from the state before it:

1. every `evaluate_every` generations the state is measured (held-out); a reached target ends the run;
2. the generation is run: state g becomes state g + 1;
3. row g is appended to metrics.jsonl;
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
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.run import agreement, hosts
from experiments.run.checkpoints import Checkpoints
from experiments.run.errors import Interrupted, RunError
from experiments.run.loggers import loggers
from experiments.run.metrics import MetricsFile, Row, expect_names, plain
from experiments.run.progress import Progress, rates
from experiments.run.settings import RunSettings
from experiments.run.stopping import stop_requests
from experiments.run.stopwatch import Stopwatch

# So many generations in a row without a usable score say that something is broken.
HOPELESS = 10
# What totals are called where it is told how many of them a second took.
RATES = {"environment_steps": "steps", "generated_tokens": "written tokens", "bytes_read": "bytes"}


class Job(NamedTuple):
    """What a driver hands to the loop.

    Attributes:
        start: the state before generation 0; arrays only, a function of the settings alone.
        generation: state -> (next state, row). The row's values are numbers, or lists with one number
            for each of several seeds; the loop adds `generation` and, beside what the job puts into it,
            `timing`.
        measure: state -> held-out figures of it, for the row and the result.
        reached: whether measured figures end the run early.
        tell: the newest row in a few words, for the progress bar.
        measured: the names of what `measure` gives; None in the rows between.
        totals: names of row values that are summed over the generations of the run.
        sharding: how the state lies on several devices, a tree of which its own begins; None for one.
    """

    start: Callable[[], Any]
    generation: Callable[[Any], tuple[Any, Mapping[str, Any]]]
    measure: Callable[[Any], Mapping[str, Any]]
    reached: Callable[[Row], bool]
    tell: Callable[[Row], str]
    measured: tuple[str, ...]
    totals: tuple[str, ...] = ()
    sharding: Any = None


class Outcome(NamedTuple):
    """What a finished run came to.

    Attributes:
        state: the last one.
        generations: done, in all processes that worked on the run.
        before: what `measure` gave before training.
        after: what it gave for the last state.
        rows: all metric rows.
    """

    state: Any
    generations: int
    before: Row
    after: Row
    rows: list[Row]


class Record:
    """What a run has on disk, and where it stands: one order of things for one run and for many at once.

    Args:
        job: what is run.
        settings: of the run.
        folder: what `open_run_folder` gave: the run folder, or of other processes than the first their own.
        watch: whose seconds the rows carry.

    Attributes:
        state: the one to go on from.
        generation: how many are done.
        after: what was measured when the run ended; None before.
    """

    def __init__(self, job: Job, settings: RunSettings, folder: Path, watch: Stopwatch) -> None:
        self.job, self.settings, self.watch = job, settings, watch
        self.after: Row | None = None
        self._latest: Row = {}  # the last measured values, for the progress bar
        self._useless = 0
        with contextlib.ExitStack() as stack:
            # Those are of all processes in common.
            path = settings.run_dir / "checkpoints"
            self._checkpoints = stack.enter_context(Checkpoints(path))
            found = self._checkpoints.restore(job.start, place=job.sharding)
            self.generation, self.state, self._totals = found or (0, job.start(), {})
            self._saved = self._begun = self.generation
            if found:
                hosts.say(f"Continuing {settings.run_dir} at generation {self.generation}.")
            path = folder / "metrics.jsonl"
            self._metrics = stack.enter_context(MetricsFile(path, self.generation))
            expect_names(path, self._metrics.rows, job.measured)
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

    def over(self, measured: Mapping[str, Any] | None) -> bool:
        """Takes what was measured of the state, if it was; says whether the run ends here."""
        self._measured: Row | None = None if measured is None else plain(measured)
        if self._measured is not None:
            self._latest = self._measured
        if self.generation >= self.settings.limit or (
            self.settings.generations is None
            and self._measured
            and agreement.agreed(self.job.reached(self._measured))
        ):
            self.after = self._measured
        return self.after is not None

    def add(self, found: Mapping[str, Any], began: float, **timing: Any) -> None:
        """Appends the row of a generation that is done."""
        row = {"generation": self.generation, **plain(found)}
        for name in self.job.totals:
            row[name] = self._totals[name] = _add(self._totals.get(name, 0), row[name])
        counts = {RATES.get(name, name): plain(found[name]) for name in self.job.totals}
        self._rates = rates(counts, time.perf_counter() - began)
        row.update(self._measured or dict.fromkeys(self.job.measured))
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
        return ", ".join([self.job.tell({**self._row, **self._latest}), *self._rates])

    @property
    def save_due(self) -> bool:
        """Whether the last checkpoint is too long ago."""
        return time.monotonic() - self._last_save >= self.settings.checkpoint_seconds

    def save(self, state: Any) -> None:
        """The rows are synced, then the state is saved, unless nothing happened since it last was."""
        if self.generation > self._saved:
            self._metrics.sync()
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
        return Outcome(state, self.generation, before, self.after, rows)

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._stack.__exit__(kind, error, trace)


def run(job: Job, settings: RunSettings, folder: Path, watch: Stopwatch) -> Outcome:
    """Run the generations of a job, from wherever the run folder says that it stands.

    Raises:
        Interrupted: after SIGTERM, SIGHUP or Ctrl-C, with everything saved.
        RunError: where a file cannot be written, the last checkpoint too, or where no generation gives a
            usable score.
    """
    with stop_requests(begun=False) as stop, Record(job, settings, folder, watch) as record:
        state = record.state
        del record.state  # its memory is the next generation's
        watch.finish("start")
        with Progress(settings.limit, shown=hosts.first()) as progress:
            progress.update(record.generation, "compiling")
            while True:
                began = time.perf_counter()
                if record.over(jax.device_get(job.measure(state)) if record.due else None):
                    break
                if stop.at(record.generation):
                    break
                state, row = job.generation(state)
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
        return record.outcome(state)


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
