"""What the measurements share: the grid of cases, interleaved timing, the table, the JSON file.

Everything is timed in rounds: each round calls every row of a case once, and a row's result is the
median over rounds of (its time) / (the time of plain inference in the same round), with quartiles.
Whatever slows the machine down for a while then slows both sides of a ratio.
"""

import argparse
import dataclasses
import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.models import MODELS

PLAIN = "plain inference"
MIB = 2**20
# A row faster than this is called several times a round, since timers and threads are not exact.
SHORTEST = 0.01


@dataclasses.dataclass(frozen=True)
class Case:
    """One point of the grid."""

    model: str
    dim: int
    population: int
    observations: int
    rank: int

    def __str__(self) -> str:
        return (
            f"{self.model} D={self.dim} N={self.population} B={self.observations} rank={self.rank}"
        )


@dataclasses.dataclass(frozen=True)
class Call:
    """One row of a case: what to call, and the bytes that it needs beside its inputs and outputs."""

    run: Callable[[], Any]
    temporaries: int | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured row.

    Attributes:
      case: where.
      name: what.
      seconds: median time of one call.
      times_plain: lower quartile, median and upper quartile, over rounds, of time / time of plain
        inference; None for a row that was skipped, as all numbers are.
      cpu_times_plain: median of the same ratio in CPU time of this process over all its threads. It
        hardly notices other processes, nor how well the work is spread over cores.
      temporaries: bytes that XLA allots beside inputs and outputs.
      note: why a row was skipped.
    """

    case: Case
    name: str
    seconds: float | None = None
    times_plain: tuple[float, float, float] | None = None
    cpu_times_plain: float | None = None
    temporaries: int | None = None
    note: str = ""


# ---------------------------------------------------------------- command line


def parser(description: str) -> argparse.ArgumentParser:
    """The flags that every script has."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    p.add_argument("--dims", nargs="+", type=int, default=[256, 1024], help="widths D")
    p.add_argument("--population", nargs="+", type=int, default=[512, 1024, 4096], help="members N")
    p.add_argument("--observations", nargs="+", type=int, default=[1, 16], help="of a member, B")
    p.add_argument("--rank", nargs="+", type=int, default=[1, 4])
    p.add_argument("--chunk", type=int, help="members at a time (low rank only); all by default")
    p.add_argument("--rounds", type=int, default=15, help="interleaved rounds")
    p.add_argument(
        "--tries",
        type=int,
        default=1,
        help="on a busy machine: rounds made for each one kept; those least disturbed are kept",
    )
    p.add_argument("--quick", action="store_true", help="the first of each list, 5 rounds")
    p.add_argument(
        "--memory", type=float, default=4096, help="MiB of temporaries above which a row is skipped"
    )
    p.add_argument("--json", type=Path, help="also write the table to this file")
    return p


def parse(p: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The parsed flags, checked."""
    args = p.parse_args(argv)
    if any(n < 2 or n % 2 for n in args.population):
        p.error(f"--population {args.population}: even numbers of at least 2 are right")
    if args.chunk is not None and (args.chunk < 2 or args.chunk % 2):
        p.error(f"--chunk {args.chunk}: must be an even number of at least 2")
    for name in ("rounds", "tries"):
        if getattr(args, name) < 1:
            p.error(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.quick:
        args.rounds = min(args.rounds, 5)
        for name in ("dims", "population", "observations", "rank"):
            setattr(args, name, getattr(args, name)[:1])
    return args


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """The whole grid for the MLP; for the larger models every rank at the first of the other sizes."""
    sizes = (args.dims, args.population, args.observations)
    for model in args.models:
        grid = sizes if model == "mlp" else [size[:1] for size in sizes]
        for dim, population, observations, rank in itertools.product(*grid, args.rank):
            yield Case(model, dim, population, observations, rank)


# ---------------------------------------------------------------- timing


def temporaries(jitted: Any, *args: Any) -> int | None:
    """Bytes of temporaries of a jitted function; None where the backend does not tell."""
    analysis = jitted.lower(*args).compile().memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def measure(
    case: Case, calls: dict[str, Call], rounds: int, tries: int = 1, base: str = PLAIN
) -> tuple[list[Row], float | None]:
    """Times every call in interleaved rounds.

    Args:
      case: what is measured.
      calls: by row name.
      rounds: how many are kept.
      tries: how many are made for each one kept: those in which the threads of this process had
        to wait least for a CPU that others were using.
      base: the row that the others are divided by, in place of plain inference.

    Returns:
      The rows, and that waiting time over the rounds kept as a share of their length (None where
      the system does not tell; above 1 where several threads waited).
    """
    repeats = {}
    for name, call in calls.items():
        jax.block_until_ready(call.run())  # compiles
        repeats[name] = max(1, int(SHORTEST / max(once(call.run, 1)[0], 1e-6)))
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    waits: list[float] = []
    names = list(calls)
    for i in range(rounds * tries):
        before, start = _waited(), time.perf_counter()
        # Each round starts with another row, so that none always follows the same one.
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds, cpu_seconds = once(calls[name].run, repeats[name])
            wall[name].append(seconds)
            cpu[name].append(cpu_seconds)
        waits.append((_waited() - before) / (time.perf_counter() - start))

    keep = np.argsort(waits, kind="stable")[:rounds]
    wait = float(np.mean(np.array(waits)[keep]))
    rows = []
    for name, call in calls.items():
        kept = np.array(wall[name])[keep]
        ratios = kept / np.array(wall[base])[keep]
        cpu_ratios = np.array(cpu[name])[keep] / np.maximum(np.array(cpu[base])[keep], 1e-9)
        low, median, high = (float(q) for q in np.quantile(ratios, [0.25, 0.5, 0.75]))
        rows.append(
            Row(
                case,
                name,
                seconds=float(np.median(kept)),
                times_plain=(low, median, high),
                cpu_times_plain=float(np.median(cpu_ratios)),
                temporaries=call.temporaries,
            )
        )
    return rows, None if np.isnan(wait) else wait


def once(run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Seconds and CPU seconds of one call, a mean over ``repeats``."""
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        jax.block_until_ready(run())
    return (time.perf_counter() - start) / repeats, (time.process_time() - cpu_start) / repeats


def _waited() -> float:
    """Seconds that threads of this process were ready to run but had no CPU; NaN if not told."""
    nanoseconds = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            nanoseconds += int(task.read_text().split()[1])
        except OSError:  # the thread has ended
            continue
    return nanoseconds / 1e9 if nanoseconds else float("nan")


# ---------------------------------------------------------------- what is printed and written


def machine() -> dict[str, Any]:
    """CPU model, cores, the device and JAX's version."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    device = jax.devices()[0]
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "device": device.device_kind,
        "jax": jax.__version__,
    }


HEAD = f"{'row':<40} {'ms':>9} {'x plain':>8} {'quartiles':>13} {'speed':>6} {'CPU':>6} {'temp MiB':>9}"


def print_machine() -> None:
    m = machine()
    print(f"{m['cpu']}, {m['cores']} cores, device {m['device']}, JAX {m['jax']}")
    print(
        "x plain: time over that of plain inference, median of rounds and quartiles; speed: its "
        "inverse;\nCPU: the same ratio in CPU time of all threads; temp: beside inputs and outputs"
    )


def print_case(case: Case, rows: Sequence[Row], wait: float | None) -> None:
    waited = "" if wait is None else f"   (waiting for a CPU: {wait:.0%} of the time)"
    print(f"\n{case}{waited}\n{HEAD}\n{'-' * len(HEAD)}")
    for row in rows:
        if row.seconds is None or row.times_plain is None:
            print(f"{row.name:<40} {row.note}")
            continue
        low, median, high = row.times_plain
        temp = "" if row.temporaries is None else f"{row.temporaries / MIB:.1f}"
        print(
            f"{row.name:<40} {1e3 * row.seconds:>9.2f} {median:>8.2f} {f'{low:.2f}-{high:.2f}':>13} "
            f"{1 / median:>6.0%} {row.cpu_times_plain:>6.2f} {temp:>9}",
            flush=True,
        )


def too_large(case: Case, name: str, needed: int | None, limit_mib: float) -> Row | None:
    """A skipped row where ``needed`` bytes are above the limit."""
    if needed is None or needed <= limit_mib * MIB:
        return None
    note = f"skipped: needs {needed / MIB:.0f} MiB of temporaries, --memory is {limit_mib:.0f}"
    return Row(case, name, temporaries=needed, note=note)


def run(
    args: argparse.Namespace,
    calls_of: Callable[[Case, argparse.Namespace], tuple[dict[str, Call], list[Row]]],
) -> list[Row]:
    """Measures every case of the grid, prints its table, and writes the JSON file.

    Args:
      args: from :func:`parse`.
      calls_of: gives a case's calls, and rows for what is skipped.
    """
    print_machine()
    all_rows, waits = [], {}
    for case in cases(args):
        calls, skipped = calls_of(case, args)
        measured, waits[str(case)] = measure(case, calls, args.rounds, args.tries)
        print_case(case, [*measured, *skipped], waits[str(case)])
        all_rows += [*measured, *skipped]
    if args.json:
        table = [{**dataclasses.asdict(r.case), **_without_case(r)} for r in all_rows]
        document = {
            "machine": machine(),
            "rounds": args.rounds,
            "tries": args.tries,
            "chunk": args.chunk,
            "waited": waits,
            "rows": table,
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return all_rows


def _without_case(row: Row) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(row).items() if k != "case"}
