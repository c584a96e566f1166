"""EGGROLL, dense ES, GRPO and SFT from one warm start: a table, and a picture over time.

    python -m benchmarks.arms --seeds 3

Every arm is one run of `eggroll reasoning` a seed, in a folder of its own; where an earlier call left it
unfinished it is continued. Compared are held-out accuracies at equal seconds from the start of a process
(nothing else should run beside), at equally many written tokens, and at the end of each.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.run.metrics import read_metrics
from experiments.run.report import Settings, report

ARMS = {"EGGROLL": "eggroll", "dense ES": "dense-es", "GRPO": "grpo", "SFT": "sft"}
Curve = list[tuple[float, int, float]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("runs/arms"))
    options = parser.parse_args(argv)
    warm = options.out / "warm-start"
    run("warm-start", warm, [])
    curves: dict[str, list[Curve]] = {}
    folders, names = [], []
    for name in options.arms:
        for seed in range(options.seeds):
            folder = options.out / f"{ARMS[name]}-{seed}"
            run(ARMS[name], folder, ["--start", str(warm), "--seed", str(seed)])
            curves.setdefault(name, []).append(curve(folder))
            folders.append(folder)
            names.append(name)
    print("\n".join(table(curves)))
    settings = Settings(runs=tuple(folders), names=tuple(names), out=options.out, x="seconds")
    report(settings)


def run(preset: str, folder: Path, flags: list[str]) -> None:
    """One run, unless its result is there already."""
    if (folder / "result.json").exists():
        return
    command = [sys.executable, "-m", "experiments.run.cli", "reasoning", "--preset", preset]
    done = subprocess.run(
        [*command, "--run-dir", str(folder), *flags], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{preset}: {done.stderr.strip()}")


def curve(folder: Path) -> Curve:
    """(seconds, tokens written, held-out accuracy) wherever it was measured."""
    rows = read_metrics(folder / "metrics.jsonl")
    result = json.loads((folder / "result.json").read_text())
    # What a row measured is of the state before it.
    written = [0, *(r["generated_tokens"] for r in rows)]
    points = [
        (r["timing"]["since_start"], tokens, r["held_out_accuracy"])
        for r, tokens in zip(rows, written, strict=False)
        if r["held_out_accuracy"] is not None
    ]
    seconds = sum(result["timing"].values())
    return [*points, (seconds, result["generated_tokens"], result["held_out_accuracy"])]


def table(curves: dict[str, list[Curve]]) -> list[str]:
    """Means over seeds, and each seed's own at the end."""
    seconds = min(one[-1][0] for several in curves.values() for one in several)
    written = [one[-1][1] for several in curves.values() for one in several if one[-1][1]]
    tokens = min(written, default=0)
    lines = [
        f"| | before | after {seconds:.0f} s | after {tokens:,} tokens | at the end | seconds | tokens |",
        "|---" * 7 + "|",
    ]
    for name, several in curves.items():
        before = np.mean([one[0][2] for one in several])
        timed = np.mean([at(one, 0, seconds) for one in several])
        told = (
            f"{np.mean([at(one, 1, tokens) for one in several]):.1%}" if several[0][-1][1] else "-"
        )
        ends = [one[-1][2] for one in several]
        each = ", ".join(f"{x:.1%}" for x in ends)
        lines.append(
            f"| {name} | {before:.1%} | {timed:.1%} | {told} | **{np.mean(ends):.1%}** ({each}) "
            f"| {np.mean([one[-1][0] for one in several]):.0f} "
            f"| {np.mean([one[-1][1] for one in several]):,.0f} |"
        )
    return lines


def at(curve: Curve, axis: int, limit: Any) -> float:
    """The last accuracy that was measured within a limit of seconds (axis 0) or tokens (axis 1)."""
    return [point[2] for point in curve if point[axis] <= limit][-1]


if __name__ == "__main__":
    main()
