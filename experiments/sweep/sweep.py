"""`eggroll sweep FILE`: run what has not been run, or say how far it is."""

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from experiments.run.errors import RUN_ME_AGAIN, Interrupted, InUse, UsageError
from experiments.run.fields import check_ranges, count
from experiments.run.folder import full_disk_in_one_sentence, held, write_whole
from experiments.run.stopping import StopRequest, stop_requests
from experiments.sweep.arrays import write_scripts
from experiments.sweep.halving import at_rung, settled, standings
from experiments.sweep.outcome import best, write_outcome
from experiments.sweep.plan import make_plan
from experiments.sweep.processes import Task, how_it_ended, run_tasks
from experiments.sweep.records import Records
from experiments.sweep.spec import read_spec, read_yaml
from experiments.sweep.status import counted, print_status, write_status
from experiments.sweep.worker import work

SECONDS_BETWEEN_STATUS = 5.0


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """Run a driver at many settings, from a file that says what varies (docs/sweeps.md).

    The same command again skips runs that are done and continues those that are not, however the sweep was
    stopped. Runs that failed are left alone, unless --resume is given. With the executor slurm or gke,
    scripts are written, and the table of what is done.
    """

    file: Positional[Path]
    """The file of the sweep, in YAML."""
    status: bool = False
    """Only print how far each run is."""
    resume: bool = False
    """Also try again what failed, from where it stands."""
    index: int | None = count(None, least=0)
    """Train one job of the sweep in this process: a run, or several that are one program."""
    rung: int | None = count(None, least=0)
    """With --index and successive halving: the rung to train up to."""


def sweep(settings: SweepSettings, started: float) -> int:
    """Do what the command line says; the exit code.

    Raises:
        UsageError: for a file that cannot be right, or a folder that cannot be used.
        Interrupted: after SIGTERM or Ctrl-C, with everything saved.
    """
    check_ranges(settings)
    if settings.index is None and settings.rung is not None:
        raise UsageError(f"--rung {settings.rung}: it goes with --index")
    if settings.status and (settings.index is not None or settings.resume):
        raise UsageError("--status runs nothing: leave out --index and --resume")
    spec = read_spec(settings.file)
    records = Records(spec, make_plan(spec))
    if settings.status:
        print_status(records, standings(records))
        return 0
    if settings.index is not None:
        if settings.resume and 0 <= settings.index < len(records.plan.jobs):
            for number in records.plan.jobs[settings.index]:
                records.forget_failure(records.plan.runs[number])
        return work(records, settings.index, settings.rung, started)
    try:
        with full_disk_in_one_sentence(spec.out):
            spec.out.mkdir(parents=True, exist_ok=True)
        with held(spec.out):
            return _whole(settings, records)
    except InUse as error:
        raise UsageError(f"{spec.out} is in use by another sweep") from error


def _whole(settings: SweepSettings, records: Records) -> int:
    spec, copy = records.spec, records.spec.out / "sweep.yaml"
    if not (copy.exists() and settings.file.samefile(copy)):
        keep_file(settings.file, copy, spec.out)
    if settings.resume:
        for run in records.plan.runs:
            records.forget_failure(run)
    if spec.executor.kind == "processes":
        with stop_requests() as stop:
            for rung in range(len(spec.rungs)) if spec.rungs else (None,):
                _run(records, copy, rung, stop)
                if stop.reason:
                    write_status(records, standings(records))
                    raise Interrupted(
                        f"Stopped by {stop.reason}; everything is saved. Run the same command again to "
                        "continue."
                    )
                # A worker that was stopped by itself leaves its runs below the rung: they are not compared.
                if rung is not None and not settled(records, rung):
                    break
    found = standings(records)
    write_status(records, found)
    print_status(records, found)
    written = write_outcome(records)
    if spec.executor.kind != "processes" and any(
        one.state in ("queued", "running", "failed") for one in found
    ):
        print(write_scripts(records))
    if written:
        print(f"Wrote {', '.join(map(str, written))}.")
    failed = sum(one.state == "failed" for one in found)
    if failed:
        plural = "s" if failed > 1 else ""
        print(f"{failed} run{plural} failed; --resume tries again what failed.", file=sys.stderr)
        return 1
    left = sum(one.state in ("queued", "running") for one in found)
    return RUN_ME_AGAIN if left and spec.executor.kind == "processes" else 0


def keep_file(file: Path, copy: Path, out: Path) -> None:
    """The sweep's file beside its runs, for workers; with its folder in it, which goes by the file's name."""
    content = read_yaml(file)
    if "out" in content:
        shutil.copyfile(file, copy)
        return
    import yaml

    text = yaml.safe_dump({**content, "out": str(out)}, sort_keys=False)
    write_whole(copy, lambda part: part.write(text.encode()))


def _run(records: Records, file: Path, rung: int | None, stop: StopRequest) -> None:
    """All jobs that have something left to do, up to a rung."""
    spec, jobs = records.spec, records.plan.jobs
    going = {run.id for run in (records.plan.runs if rung is None else at_rung(records, rung))}
    limit = None if rung is None else spec.rungs[rung]

    def left(number: int) -> list[int]:
        runs = [records.plan.runs[i] for i in jobs[number]]
        return [
            run.number
            for run in runs
            if run.id in going
            and records.failure(run) is None
            and not (records.finished(run) if limit is None else records.rung_value(run, limit)[0])
        ]

    tasks = []
    for number in range(len(jobs)):
        if left(number):
            words = ["sweep", str(file), "--index", str(number)]
            words += [] if rung is None else ["--rung", str(rung)]
            tasks.append(Task(number, tuple(words), spec.out / "logs" / f"job-{number:04d}.log"))
    last = 0.0

    def ended(task: Task, code: int) -> None:
        for number in (
            left(task.number) if code not in (RUN_ME_AGAIN, 0) and not stop.reason else ()
        ):
            run = records.plan.runs[number]
            records.note_failure(run, f"{how_it_ended(code)}: see {task.log}")
        refresh()
        _tell(records, rung)

    def refresh() -> None:
        nonlocal last
        last = time.monotonic()
        write_status(records, standings(records))

    def wait() -> None:
        if time.monotonic() - last > SECONDS_BETWEEN_STATUS:
            refresh()

    run_tasks(tasks, spec.executor.at_once, stop, ended, wait)


def _tell(records: Records, rung: int | None) -> None:
    """One line on stderr of how far it is."""
    line = counted(standings(records))
    if rung is not None:
        line += f", rung {rung + 1} of {len(records.spec.rungs)}"
    top = best(records)
    if top:
        line += f"; best {records.spec.metric} so far {top[0].mean:.4g}"
    print(line, file=sys.stderr)
