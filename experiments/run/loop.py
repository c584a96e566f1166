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

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.run.checkpoints import Checkpoints
from experiments.run.errors import Interrupted, RunError
from experiments.run.loggers import loggers
from experiments.run.metrics import MetricsFile, Row, plain
from experiments.run.progress import Progress
from experiments.run.settings import RunSettings
from experiments.run.stopping import stop_requests
from experiments.run.stopwatch import Stopwatch

# So many generations in a row without a usable score say that something is broken.
HOPELESS = 10


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
    """

    start: Callable[[], Any]
    generation: Callable[[Any], tuple[Any, Mapping[str, Any]]]
    measure: Callable[[Any], Mapping[str, Any]]
    reached: Callable[[Row], bool]
    tell: Callable[[Row], str]
    measured: tuple[str, ...]
    totals: tuple[str, ...] = ()


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


def run(job: Job, settings: RunSettings, folder: Path, watch: Stopwatch) -> Outcome:
    """Run the generations of a job, from wherever the run folder says that it stands.

    Raises:
        Interrupted: after SIGTERM or Ctrl-C, with everything saved.
        RunError: where a file cannot be written, or where no generation gives a usable score.
    """
    with stop_requests() as stop, Checkpoints(folder / "checkpoints") as checkpoints:
        found = checkpoints.restore(job.start)
        begun, state, totals = found or (0, job.start(), {})
        if found:
            print(f"Continuing {folder} at generation {begun}.", file=sys.stderr)
        watch.finish("start")
        with (
            MetricsFile(folder / "metrics.jsonl", begun) as metrics,
            loggers(settings, folder, begun) as log,
            Progress(settings.limit) as progress,
        ):
            g, saved, useless, after = begun, time.monotonic(), 0, None
            progress.update(g, "compiling")
            latest: Row = {}  # the last measured values, for the progress bar

            def save() -> None:
                metrics.sync()
                checkpoints.save(g, state, totals)

            while True:
                began = time.perf_counter()
                measured = None
                if g % settings.evaluate_every == 0 or g >= settings.limit:
                    measured = latest = plain(jax.device_get(job.measure(state)))
                if g >= settings.limit or (
                    settings.generations is None and measured and job.reached(measured)
                ):
                    after = measured
                    break
                if stop.reason:
                    break
                state, found_row = job.generation(state)
                row = {"generation": g, **plain(jax.device_get(dict(found_row)))}
                for name in job.totals:
                    row[name] = totals[name] = _add(totals.get(name, 0), row[name])
                row.update(measured or dict.fromkeys(job.measured))
                now = time.perf_counter()
                times = {"seconds": now - began, "since_start": watch.total()}
                row["timing"] = {**times, **row.get("timing", {})}
                row = metrics.write(row)
                log(row)
                g += 1
                progress.update(g, job.tell({**row, **latest}))
                if time.monotonic() - saved >= settings.checkpoint_seconds:
                    save()
                    saved = time.monotonic()
                useless = useless + 1 if _nothing(row.get("fitness_mean", 0)) else 0
                if useless == HOPELESS:
                    save()
                    raise RunError(
                        f"no member had a usable score in the last {HOPELESS} generations (up to {g - 1}): "
                        "look at the fitness, or for steps that are too large"
                    )
            if g > begun:
                save()
    if after is None:
        raise Interrupted(
            f"Stopped by {stop.reason} after {g} generation{'s' * (g != 1)}; everything is saved. "
            "Run the same command again to continue."
        )
    before = {name: metrics.rows[0][name] for name in after} if metrics.rows else after
    return Outcome(state, g, before, after, metrics.rows)


def _add(total: Any, new: Any) -> Any:
    """A sum of numbers, or of lists of them."""
    if isinstance(new, list):
        return [a + b for a, b in zip(total or [0] * len(new), new, strict=True)]
    return total + new


def _nothing(value: Any) -> bool:
    return all(v is None for v in value) if isinstance(value, list) else value is None
