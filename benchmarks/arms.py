"""EGGROLL, dense ES, GRPO and SFT from one warm start: a table, and pictures over time and over tokens.

    python -m benchmarks.arms --models transformer rwkv7 --seeds 3
    python -m benchmarks.arms --models transformer --seeds 1   # a quarter of an hour on two cores

A model of 1.2 or 1.3 million weights learns sums of two numbers below 100 from 200 worked solutions, until
its accuracy on held-out sums no longer rises. From there SFT goes on with the same 200 solutions; the others
learn from rewards for the answers to all 9,014 sums to train on.

Every arm is one run of `eggroll reasoning` a seed, in a folder of its own; where an earlier call left it
unfinished it is continued. Compared are held-out accuracies at equal seconds from the start of a process
(nothing else should run beside), at equally many written tokens, and at the end of each. `--scale gpu` is
the same with more of everything.
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

Curve = list[tuple[float, int, float]]
Flags = dict[str, Any]

ARMS = {"EGGROLL": "eggroll", "dense ES": "dense-es", "GRPO": "grpo", "SFT": "sft"}

# What all runs of a scale have, what a new model has, and what the arms have by preset. They were settled on
# with single short runs from the transformer's warm start at seed 0, before any of those that are reported.
COMMON: dict[str, Flags] = {
    "laptop": {"task-settings": '{"solved": 200}', "held-out-questions": 512},
    "gpu": {"task": "countdown-easy", "task-settings": '{"solved": 1000}', "max-new-tokens": 48},
}
WARM: dict[str, Flags] = {
    "laptop": {"learning-rate": 1e-3, "evaluate-every": 20, "max-generations": 600, "patience": 4},
    "gpu": {"learning-rate": 5e-4, "evaluate-every": 50, "max-generations": 5000, "patience": 4},
}
SHAPES: dict[str, dict[str, Flags]] = {
    "laptop": {
        "transformer": {"layers": 4, "width": 160},
        "rwkv7": {"model": "rwkv7", "layers": 5, "width": 128},
    },
    "gpu": {
        "transformer": {"layers": 6, "width": 256},
        "rwkv7": {"model": "rwkv7", "layers": 6, "width": 256},
    },
}
EVOLVED: Flags = {"population": 512, "prompts": 8, "sigma": 0.01, "learning-rate": 1e-3}
TRAINED: dict[str, dict[str, Flags]] = {
    "laptop": {
        "eggroll": {**EVOLVED, "generations": 20, "evaluate-every": 4},
        "dense-es": {**EVOLVED, "generations": 7, "evaluate-every": 2},
        "grpo": {"learning-rate": 1e-4, "generations": 70, "evaluate-every": 10},
        "sft": {"learning-rate": 1e-3, "generations": 200, "evaluate-every": 40},
    },
    "gpu": {
        "eggroll": {**EVOLVED, "population": 8192, "generations": 300, "evaluate-every": 10},
        "dense-es": {**EVOLVED, "population": 8192, "generations": 300, "evaluate-every": 10},
        "grpo": {"learning-rate": 1e-4, "prompts": 128, "generations": 600, "evaluate-every": 20},
        "sft": {"learning-rate": 5e-4, "generations": 2000, "evaluate-every": 100},
    },
}

# RWKV-7 takes longer for an update on a CPU, and gets so many of those above.
SHARE = {"transformer": 1.0, "rwkv7": 0.4}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=["transformer", "rwkv7"], required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--scale", choices=list(TRAINED), default="laptop")
    parser.add_argument("--out", type=Path, default=Path("runs/arms"))
    parser.add_argument("--set", action="append", default=[], metavar="FLAG=VALUE",
                        help="a flag of all runs, such as generations=2")  # fmt: skip
    options = parser.parse_args(argv)
    own = dict(pair.split("=", 1) for pair in options.set)
    common, warm = COMMON[options.scale], WARM[options.scale]
    for model in options.models:
        shape = SHAPES[options.scale][model]
        run("warm-start", options.out / model / "warm-start", {**common, **warm, **shape, **own})
    for seed in range(options.seeds):
        for model in options.models:
            start = {"start": options.out / model / "warm-start", "seed": seed}
            for preset in (ARMS[name] for name in options.arms):
                arm = TRAINED[options.scale][preset]
                updates = {"generations": round(SHARE[model] * arm["generations"])}
                flags = {**common, **arm, **updates, **start, **own}
                run(preset, options.out / model / f"{preset}-{seed}", flags)
    for model in options.models:
        show(model, options.arms, options.seeds, options.out / model)


def run(preset: str, folder: Path, flags: Flags) -> None:
    """One run, unless its result is there already."""
    if (folder / "result.json").exists():
        return
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "experiments.run.cli", "reasoning", "--preset", preset]
    done = subprocess.run(
        [*command, "--run-dir", str(folder), *words], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{preset}: {done.stderr.strip()}")
    print(f"{folder}: {done.stdout.splitlines()[0]}", flush=True)


def show(model: str, arms: Sequence[str], seeds: int, out: Path) -> None:
    """The table of a model, and report.png over seconds in its folder."""
    names = [name for name in arms for _ in range(seeds)]
    folders = [out / f"{ARMS[name]}-{seed}" for name in arms for seed in range(seeds)]
    curves: dict[str, list[Curve]] = {}
    for name, folder in zip(names, folders, strict=True):
        curves.setdefault(name, []).append(curve(folder))
    print(f"\n{model}\n" + "\n".join(table(curves)))
    report(Settings(runs=tuple(folders), names=tuple(names), out=out, x="seconds"))


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
    # SFT writes nothing, and stays where it ended.
    writing = [one for several in curves.values() for one in several if one[-1][1]]
    seconds = min((one[-1][0] for one in writing), default=0)
    tokens = min((one[-1][1] for one in writing), default=0)
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
    """The accuracy within a limit of seconds (axis 0) or tokens (axis 1), on the line between two
    measurements."""
    return float(np.interp(limit, *zip(*((point[axis], point[2]) for point in curve), strict=True)))


if __name__ == "__main__":
    main()
