"""Trains the runs of one job of a sweep, in a process of its own; started again it goes on."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

from experiments.run.errors import RUN_ME_AGAIN, Interrupted, InUse, RunError, UsageError
from experiments.run.fields import changed
from experiments.run.folder import is_held
from experiments.run.stopping import StopRequest, stop_requests
from experiments.sweep.halving import at_rung, settled
from experiments.sweep.plan import Run
from experiments.sweep.records import Records

# Names the process that a worker must not outlive.
PARENT = "EGGROLL_SWEEP_PARENT"
# So long a worker waits for a run folder that another process holds, seconds.
PATIENCE = 600.0


def end_with_parent() -> bool:
    """Get SIGTERM, on which a run saves and ends, when the process that started this one ends in any way.

    Returns:
        Whether that process is there. Only Linux can do this; elsewhere a worker that is left over ends
        with its job, and its run folders stay locked until then.
    """
    parent = os.environ.get(PARENT)
    if parent is None:
        return True
    if sys.platform == "linux":
        import ctypes

        set_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None, use_errno=True).prctl(set_death_signal, signal.SIGTERM)
    return os.getppid() == int(parent)


def work(records: Records, number: int, rung: int | None, started: float) -> int:
    """Train what is left to do of a job.

    Args:
        records: of the sweep.
        number: of the job.
        rung: with successive halving, which rung to train up to.
        started: `time.perf_counter()` at the start of the process.

    Returns:
        The exit code: 0; 1 where a run failed (and is noted as such); 75 to be started again.

    Raises:
        UsageError: for a job or rung that there is not.
    """
    runs = _members(records, number, rung)
    limit = None if rung is None else records.spec.rungs[rung]
    if not end_with_parent():
        return RUN_ME_AGAIN
    # From here on a signal is never lost: also where a run is only read, or its results are written.
    with stop_requests() as stop:
        return _work(records, runs, limit, stop, started)


def _work(
    records: Records, runs: list[Run], limit: int | None, stop: StopRequest, started: float
) -> int:
    from experiments.run.compilation import keep_compiled_programs

    keep_compiled_programs()
    deadline = time.monotonic() + PATIENCE
    todo = _left(records, runs, limit)
    while todo:
        if stop.reason:
            return RUN_ME_AGAIN
        free = [run for run in todo if not is_held(run.config.run_dir)]
        try:
            ended = dict(
                zip((run.id for run in free), _train(records, free, limit, started), strict=True)
            )
        except Interrupted as stop:
            print(stop, file=sys.stderr)
            return RUN_ME_AGAIN
        todo = [run for run in todo if isinstance(ended.get(run.id, InUse()), InUse)]
        for run in free:
            error = ended[run.id]
            if not isinstance(error, Exception):
                print(f"{run.id}: {error.sentence}")
            elif not isinstance(error, InUse):
                records.note_failure(run, _last_line(error))
        if todo and time.monotonic() > deadline:
            names = ", ".join(str(run.config.run_dir) for run in todo)
            print(f"In use by another process for {PATIENCE:g} s: {names}.", file=sys.stderr)
            return RUN_ME_AGAIN
        if todo:
            time.sleep(0.2)
    if limit is not None:
        for run in runs:
            if records.failure(run) is None and not records.rung_value(run, limit)[0]:
                records.note_rung(run, limit)
    return int(any(records.failure(run) is not None for run in runs))


def _members(records: Records, number: int, rung: int | None) -> list[Run]:
    jobs, rungs = records.plan.jobs, records.spec.rungs
    if not 0 <= number < len(jobs):
        raise UsageError(f"--index {number}: the sweep has the jobs 0 to {len(jobs) - 1}")
    runs = [records.plan.runs[i] for i in jobs[number]]
    if not rungs:
        if rung is not None:
            raise UsageError(f"--rung {rung}: the sweep has no halving; leave it out")
        return runs
    if rung is None or not 0 <= rung < len(rungs):
        raise UsageError(f"--rung {rung}: the sweep has the rungs 0 to {len(rungs) - 1}")
    if not all(settled(records, below) for below in range(rung)):
        raise UsageError(f"--rung {rung}: the rungs below it are not done yet")
    going = {run.id for run in at_rung(records, rung)}
    return [run for run in runs if run.id in going]


def _left(records: Records, runs: Sequence[Run], limit: int | None) -> list[Run]:
    """Those that are neither finished nor failed."""
    return [
        run
        for run in runs
        if records.failure(run) is None
        and not (limit is not None and records.rung_value(run, limit)[0])
        and not records.finished(run, limit)
    ]


def _train(records: Records, runs: Sequence[Run], limit: int | None, started: float) -> list[Any]:
    """Results, or what stopped each run. Whatever is wrong stops these runs alone, not the sweep."""
    configs = [run.config for run in runs]
    if limit is not None:
        configs = [changed(config, generations=limit) for config in configs]
    if not configs:
        return []
    try:
        from experiments.run.train import train, train_many

        return train_many(configs, started) if configs[1:] else [train(configs[0], started)]
    except Interrupted:
        raise
    except (UsageError, RunError) as error:
        print(error, file=sys.stderr)
        return [error] * len(configs)
    except Exception as error:  # of models and of other people's libraries: any type
        traceback.print_exc()
        return [error] * len(configs)


def _last_line(error: Exception) -> str:
    if isinstance(error, UsageError | RunError):
        return str(error)
    return traceback.format_exception_only(error)[-1]
