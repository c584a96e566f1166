"""Whole generations compiled for TPU pods, on a machine without one: memory, work, exchange, a bound on time.

    python -m benchmarks.pod --cases integer rl 1b --topologies v5e:16x16

It needs ``pip install "jax[tpu]"`` in an environment of its own, and no TPU. Nothing is run: every figure is
read from the compiled program of one chip, and times are those that published rates of chips allow. Loops
count as often as they run, which XLA's own cost analysis leaves out: the column ``x XLA`` is operations
with every loop's body counted once, over what XLA says, and 1 where the two count alike.

The first table is what is held on a chip (GB: state, data and code; temporaries; share of its memory), and
what it does: operations of the matrix units and element-wise ones, elements looked up by gathers, bytes of
main memory, bytes sent. The second is seconds of a generation: by what could bound them, by the roofline
(which nothing can beat), by the cycles that the compiler expects (it expects none for gathers, so these can
take longer), and efficiency by either: members a second and chip over that of the fewest chips.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from benchmarks.chips import CHIPS, Chip, Times, times
from benchmarks.hlo import Module
from benchmarks.pod_cases import CASES, Case
from benchmarks.work import Counts, count
from eggroll.population.placement import AXIS
from experiments.run.devices import MODEL

# No TPU is looked for, and libtpu asks no server what it runs on.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    # Several processes may compile at once; on a machine with a TPU one has it to itself.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

PODS = ["v5e:16x16", "v5p:8x8x8", "v6e:16x16"]
# One chip up to 256 or 512 of them.
SCALING = {
    "v5e": ["v5e:1x1", "v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16"],
    "v5p": [f"v5p:{s}" for s in ("1x1x1", "2x2x1", "2x2x4", "4x4x4", "4x8x8", "8x8x8")],
    "v6e": ["v6e:1x1", "v6e:2x2", "v6e:4x4", "v6e:8x8", "v6e:16x16"],
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One compiled program, of one chip.

    Attributes:
      case: its name in CASES.
      topology: the chips, as "v5e:16x16".
      devices: how many.
      sharing: how many of them share the weights.
      population: members.
      chunk: members at a time on a group of chips that share the weights.
      held: bytes of arguments, outputs and code.
      temporaries: bytes beside them.
      counts: work.
      times: seconds by what could bound them.
      against_xla: operations with loops counted once, over XLA's.
      loops: operations over those with loops counted once.
      compile_seconds: on the machine that compiled.
      note: why there is no program, if there is none.
    """

    case: str
    topology: str
    devices: int
    sharing: int
    population: int
    chunk: int
    held: float = 0.0
    temporaries: float = 0.0
    counts: Counts | None = None
    times: Times | None = None
    against_xla: float = 0.0
    loops: float = 0.0
    compile_seconds: float = 0.0
    note: str = ""

    @property
    def chip(self) -> Chip:
        return CHIPS[self.topology.split(":")[0]]

    @property
    def fits(self) -> bool:
        return not self.note and self.held + self.temporaries <= self.chip.memory

    @property
    def memory(self) -> float:
        """Share of a chip's memory that is needed."""
        return (self.held + self.temporaries) / self.chip.memory


def prepare() -> None:
    """Sets this process up to compile for chips that are elsewhere; before JAX's first computation."""
    os.environ.update(ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")


def mesh_of(topology: str, sharing: int | None) -> Mesh:
    """Chips that nobody has here, in groups that share the weights; without such an axis for None."""
    # A single chip is part of a host of four, unless a host of one is asked for.
    single = set(topology.split(":")[1]) <= set("1x")
    extra = {"chips_per_host_bounds": (1, 1, 1)} if single else {}
    devices = topologies.get_topology_desc(topology, "tpu", **extra).devices
    if sharing is None:
        return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))
    shape, names = (len(devices) // sharing, sharing), (AXIS, MODEL)
    return Mesh(np.array(devices).reshape(shape), names, axis_types=(AxisType.Auto,) * 2)


def compile_case(name: str, topology: str, save: Path | None = None) -> Row:
    """Compiles one case for one topology.

    Args:
      name: in CASES.
      topology: as "v5e:16x16".
      save: a folder for the text of the compiled program.
    """
    case, kind = CASES[name], topology.split(":")[0]
    sharing = case.sharing.get(kind)
    mesh = mesh_of(topology, sharing)
    empty = Row(name, topology, mesh.size, sharing or 1, case.population, case.chunk)
    start = time.perf_counter()
    lowered = case.lower(mesh)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # XLA refuses what does not fit.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return dataclasses.replace(empty, note=" ".join(str(error).split())[:300])
    seconds, text = time.perf_counter() - start, compiled.as_text()
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
        (save / f"{name}-{topology.replace(':', '-')}.hlo.txt").write_text(text)
    return dataclasses.replace(empty, **read(compiled, text, case, mesh.size, CHIPS[kind]),
                               compile_seconds=seconds)  # fmt: skip


def read(compiled: Any, text: str, case: Case, devices: int, chip: Chip) -> dict[str, Any]:
    """What a compiled program tells."""
    memory = compiled.memory_analysis()
    module = Module(text, devices)
    once, counts = count(module, loops=False), count(module, case.trips)
    if counts.unknown and case.trips == 1:
        raise RuntimeError(
            f"{counts.unknown} loops do not tell how often they run, and would count as one trip"
        )
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "held": float(held + memory.generated_code_size_in_bytes),
        "temporaries": float(memory.temp_size_in_bytes),
        "counts": counts,
        "times": times(counts, chip, devices),
        "against_xla": once.operations / compiled.cost_analysis()["flops"],
        "loops": counts.operations / once.operations,
    }


# ---------------------------------------------------------------- the tables

WORK = (
    "case", "chips", "share weights", "held GB", "temp GB", "memory", "matmul", "element-wise",
    "gathered", "HBM bytes", "sent", "loops", "x XLA",
)  # fmt: skip
TIME = (
    "case",
    "chips",
    "matmul",
    "element-wise",
    "memory",
    "exchange",
    "roofline s",
    "scheduled s",
    "efficiency",
)


def work_cells(row: Row) -> list[str]:
    """What a chip holds and does."""
    cells = [row.case, f"{row.devices} {row.topology}", str(row.sharing)]
    if row.counts is None:
        return [*cells, row.note]
    c = row.counts
    return [
        *cells, f"{row.held / 1e9:.2f}", f"{row.temporaries / 1e9:.2f}",
        f"{row.memory:.0%}{'' if row.fits else ' TOO MUCH'}", f"{sum(c.matmul.values()):.2e}",
        f"{c.vector:.2e}", f"{c.gathered:.2e}", f"{c.bytes:.2e}", f"{sum(c.sent.values()):.2e}",
        f"{row.loops:.0f}", f"{row.against_xla:.2f}",
    ]  # fmt: skip


def time_cells(row: Row, first: Row) -> list[str]:
    """How long that takes; efficiency against the row with the fewest chips."""
    t, before = row.times, first.times
    assert t is not None and before is not None
    scale = first.devices / row.devices * row.population / first.population
    return [
        row.case, f"{row.devices} {row.topology}",
        *(f"{x:.2g}" for x in (t.matmul, t.vector, t.memory, t.exchange)),
        f"{t.roofline:.3g}", f"{t.expected:.3g}",
        f"{scale * before.roofline / t.roofline:.0%} / {scale * before.expected / t.expected:.0%}",
    ]  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, as the documentation has it; short rows are filled up."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        lines.append("| " + " | ".join([*row, *[""] * (len(head) - len(row))]) + " |")
    return "\n".join(lines)


def tables(rows: Sequence[Row]) -> str:
    """Memory and work, then seconds."""
    timed = [row for row in rows if row.times is not None]
    fewest = lambda row: min(
        (r for r in timed if (r.case, r.chip) == (row.case, row.chip)), key=lambda r: r.devices
    )
    seconds = [time_cells(row, fewest(row)) for row in timed]
    return f"{table(WORK, list(map(work_cells, rows)))}\n\n{table(TIME, seconds)}"


def exchanges(rows: Sequence[Row]) -> str:
    """Markdown: which collectives, in groups of how many chips, about how many bytes."""
    found = []
    for row in rows:
        for kind, payload in row.counts.payload.most_common() if row.counts else []:
            assert row.counts is not None
            found.append([
                row.case, f"{row.devices} {row.topology}", kind.kind, str(kind.group),
                f"{row.counts.calls[kind]:.0f}", f"{payload:.2e}", f"{row.counts.sent[kind]:.2e}",
            ])  # fmt: skip
    head = ("case", "chips", "collective", "group", "times", "bytes of a chip", "sent")
    return table(head, found)


def as_json(row: Row) -> dict[str, Any]:
    """The row with its counts, for a file."""
    document = {k: v for k, v in vars(row).items() if k not in ("counts", "times")}
    if row.counts is not None and row.times is not None:
        c = row.counts
        document["times"] = dataclasses.asdict(row.times) | {"roofline": row.times.roofline}
        document |= {"matmul": dict(c.matmul), "vector": c.vector, "bytes": c.bytes}
        document |= {"gathered": c.gathered, "cycles": c.cycles, "unknown_loops": c.unknown}
        document["collectives"] = [
            {"kind": k.kind, "group": k.group, "calls": c.calls[k], "payload": p, "sent": c.sent[k]}
            for k, p in c.payload.items()
        ]
    return document


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the command line; gives the rows that it printed."""
    p = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    p.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    p.add_argument("--topologies", nargs="+", default=PODS, help="as v5e:16x16")
    p.add_argument(
        "--scaling", choices=list(SCALING), help="from the fewest chips to a pod, instead"
    )
    p.add_argument("--json", type=Path, help="also write the rows to this file")
    p.add_argument("--hlo", type=Path, help="also write the compiled programs to this folder")
    args = p.parse_args(argv)
    chosen = SCALING[args.scaling] if args.scaling else args.topologies
    for topology in chosen:
        if topology.split(":")[0] not in CHIPS:
            p.error(
                f"--topologies {topology}: {', '.join(PODS)} and others of these chips are right"
            )
    print("Predicted from compiled programs; nothing was run.\n", flush=True)
    rows: list[Row] = []
    for name in args.cases:
        for topology in chosen:
            kind, shape = topology.split(":")
            if math.prod(map(int, shape.split("x"))) < CASES[name].sharing.get(kind, 1):
                continue  # too few chips for one copy of the weights
            rows.append(compile_case(name, topology, args.hlo))
            print(f"{name} {topology}: compiled in {rows[-1].compile_seconds:.0f} s",
                  file=sys.stderr, flush=True)  # fmt: skip
            if args.json:
                args.json.write_text(json.dumps([as_json(row) for row in rows], indent=1) + "\n")
    for name in args.cases:
        case = CASES[name]
        print(f"{name}: {case.title}; {case.population} members, {case.chunk} at a time")
    print(f"\n{tables(rows)}\n\n{exchanges(rows)}")
    return rows


if __name__ == "__main__":
    prepare()
    main()
