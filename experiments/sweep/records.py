"""What a sweep has on disk, and how far each run is. Everything is read from there: nothing is carried.

- sweep.yaml: the file that the sweep was last started with
- runs/ID/: a run folder like any other
- rungs/ID.json: of successive halving, the metric by generations
- failed/ID.json: why a run failed; the others go on
- logs/: what processes printed
- status.json, status.csv, best.json, best.md, importance.json, importance.png: what it comes to
"""

import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from experiments.run.errors import UsageError
from experiments.run.folder import (
    is_held,
    is_number,
    kind_of,
    read_config,
    read_object,
    read_result,
    write_json,
)
from experiments.run.metrics import Row, expect_names, read_metrics, seconds_of
from experiments.sweep.plan import Plan, Run
from experiments.sweep.spec import Spec

RESUME = "remove it and run the same command again"


class Standing(NamedTuple):
    """How far a run is.

    Attributes:
        run: which one.
        state: queued, running, done, failed, or dropped (by successive halving).
        generations: done.
        metric: the newest value; None where there is none that is finite.
        seconds: of training; of a program of several runs each has its share.
        error: why it failed.
    """

    run: Run
    state: str
    generations: int
    metric: float | None
    seconds: float
    error: str | None


class Records:
    """The files of a sweep.

    Args:
        spec: what it is.
        plan: its runs.
    """

    def __init__(self, spec: Spec, plan: Plan) -> None:
        self.spec, self.plan = spec, plan
        self._rows: dict[str, tuple[int, list[Row]]] = {}

    # ------------------------------------------------------------ results

    def finished(self, run: Run, limit: int | None = None) -> bool:
        """Whether a run has its result, after `limit` generations or as long as its settings say.

        Raises:
            UsageError: where it was trained for longer than its settings say now, and so is not to be
                compared with the others.
        """
        result = read_result(run.config.run_dir)
        if result is None:
            return False
        if result["generations"] > run.config.limit:
            raise UsageError(
                f"{run.config.run_dir} was trained for {result['generations']} generations, more than the "
                f"{run.config.limit} of this sweep: choose another out"
            )
        if result["generations"] >= (limit or run.config.limit):
            return True
        # It ended early, at its target or out of patience; unless a limit that cut it short has been raised.
        then = read_config(run.config.run_dir)
        return run.config.generations is None and all(
            then.get(name) == getattr(run.config, name)
            for name in ("generations", "max_generations", "patience")
        )

    def value(self, run: Run) -> float | None:
        """The metric of a run that has ended; None where it is not finite, or there is no result."""
        result = read_result(run.config.run_dir)
        return None if result is None else self.metric_of(result)

    def metric_of(self, result: Any) -> float | None:
        """The value that the spec names, mean over seeds of one program."""
        for name in self.spec.metric.split("."):
            if not isinstance(result, dict) or name not in result:
                raise UsageError(
                    f"{self.spec.file}: metric.name: no result has a {self.spec.metric}"
                )
            result = result[name]
        values = result if isinstance(result, list) else [result]
        if not values or not all(
            one is None or type(one) is float or is_number(one) for one in values
        ):
            raise UsageError(
                f"{self.spec.file}: metric.name: {self.spec.metric} must be a number in every result, got "
                f"{kind_of(result)}"
            )
        return _finite(result)

    # ------------------------------------------------------------ rungs

    def rung_value(self, run: Run, generations: int) -> tuple[bool, float | None]:
        """Whether a run was at the rung, and its metric there."""
        found = self._rungs(run)
        return str(generations) in found, found.get(str(generations))

    def note_rung(self, run: Run, generations: int) -> None:
        """Writes down the metric of a run at a rung, where it has just ended.

        Raises:
            UsageError: where the run has gone on beyond the rung, and did not measure there.
        """
        result = read_result(run.config.run_dir)
        if result is not None and result["generations"] == generations:
            value = self.metric_of(result)
        else:
            rows = self.rows(run)
            row = rows[generations] if len(rows) > generations else {}
            expect_names(
                run.config.run_dir / "metrics.jsonl", rows, [self.spec.metric] if row else []
            )
            if row.get(self.spec.metric) is None:
                raise UsageError(
                    f"{run.config.run_dir} has no {self.spec.metric} after {generations} generations, as "
                    "it was trained beyond them with other rungs: choose another out"
                )
            value = _finite(row[self.spec.metric])
        found = {**self._rungs(run), str(generations): value}
        self._write("rungs", run, {key: found[key] for key in sorted(found, key=int)})

    def _rungs(self, run: Run) -> dict[str, float | None]:
        path = self.spec.out / "rungs" / f"{run.id}.json"
        found = read_object(path, RESUME) or {}
        for name, value in found.items():
            if not (name.isascii() and name.isdigit() and (value is None or is_number(value))):
                raise UsageError(
                    f"{path}: {name!r} must be a number of generations with a number or null, got "
                    f"{kind_of(value)}; {RESUME}"
                )
        return found

    # ------------------------------------------------------------ failures

    def failure(self, run: Run) -> str | None:
        """Why a run failed, None where it did not."""
        path = self.spec.out / "failed" / f"{run.id}.json"
        found = read_object(path, RESUME)
        if found is None:
            return None
        if not isinstance(found.get("error"), str):
            raise UsageError(
                f"{path}: error must be a text, got {kind_of(found.get('error'))}; {RESUME}"
            )
        return found["error"]

    def note_failure(self, run: Run, error: str) -> None:
        """Writes down why a run failed: the last line of an error."""
        lines = error.strip().splitlines() or ["no reason was given"]
        self._write("failed", run, {"error": lines[-1], "number": run.number, **_settings(run)})

    def forget_failure(self, run: Run) -> None:
        """Lets a failed run be tried again."""
        (self.spec.out / "failed" / f"{run.id}.json").unlink(missing_ok=True)

    def _write(self, folder: str, run: Run, content: dict[str, Any]) -> None:
        path = self.spec.out / folder / f"{run.id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)

    # ------------------------------------------------------------ progress

    def rows(self, run: Run) -> list[Row]:
        """The metric rows of a run, read again only where the file has grown."""
        path = run.config.run_dir / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else 0
        if run.id not in self._rows or self._rows[run.id][0] != size:
            self._rows[run.id] = (size, read_metrics(path))
        return self._rows[run.id][1]

    def standing(self, run: Run) -> Standing:
        """How far a run is; whether one that waits was dropped is for :mod:`halving` to say."""
        error, metric = self.failure(run), None
        rows = self.rows(run)
        file = run.config.run_dir / "metrics.jsonl"
        if any(self.spec.metric in row for row in rows):
            expect_names(file, rows, [self.spec.metric])
        if self.finished(run, min(self.spec.rungs, default=None)):
            metric = self.value(run)
        else:
            known = [row[self.spec.metric] for row in rows if row.get(self.spec.metric) is not None]
            metric = _finite(known[-1]) if known else None
        if self.finished(run):
            state = "done"
        elif error is not None:
            state = "failed"
        else:
            state = "running" if is_held(run.config.run_dir) else "queued"
        seconds = sum(seconds_of(file, rows, alone=True))
        return Standing(
            run, state, len(rows), metric, seconds, error if state == "failed" else None
        )


def _settings(run: Run) -> dict[str, Any]:
    return {"seed": run.seed, **{name: plain(value) for name, value in run.values.items()}}


def plain(value: Any) -> Any:
    """A setting as JSON has it."""
    return str(value) if isinstance(value, Path) else value


def _finite(value: Any) -> float | None:
    """The mean of a number or a list; None where it is not finite, or there is none."""
    if value is None or (isinstance(value, list) and None in value):
        return None
    number = statistics.fmean(value) if isinstance(value, list) else float(value)
    return number if math.isfinite(number) else None
