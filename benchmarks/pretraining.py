"""Language models by population, by rule of the update, by kind of noise, and beside backpropagation.

    python -m benchmarks.pretraining population      # a table, and population.png
    python -m benchmarks.pretraining rules           # threshold, error feedback, momentum
    python -m benchmarks.pretraining baselines       # presets in floats, and other optimizers
    python -m benchmarks.pretraining noises          # weights, nodes, backpropagation; noises-MODEL.png

Every line is one run of `eggroll pretrain` in a folder of its own; where an earlier call left it
unfinished it is continued. Seconds are of training, so nothing else should run beside.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.run.canvas import (
    HELD_OUT,
    POPULATION,
    finish,
    lines_at_right,
    new_figure,
    title_above,
)
from experiments.run.metrics import read_metrics

Runs = dict[str, list[str]]

# A third of laptop's bytes at 4096 members; the updates are equal, so that bytes grow with the population.
SHORT = ["--preset", "laptop", "--generations", "320"]
POPULATIONS: Runs = {
    str(n): [*SHORT, "--population", str(n)] for n in (256, 512, 1024, 2048, 4096, 8192, 16384)
}
RULES: Runs = {
    f"{rule}, {alpha}": [*SHORT, "--population", "4096", "--update", rule, "--alpha", alpha]
    for rule, alphas in {
        "threshold": ("1", "0.3"),
        "error_feedback": ("1", "0.3", "0.1"),
        "momentum": ("1", "0.3", "0.1", "0.03"),
    }.items()
    for alpha in alphas
}
PRESETS = ("laptop", "float-es", "gru-sgd", "gru-adamw", "transformer-sgd", "transformer-adamw")
RATES = {"lion": "0.003", "adamp": "0.03", "frugal": "0.03"}
BASELINES: Runs = {
    **{name: ["--preset", name] for name in PRESETS},
    **{
        f"gru-{name}": [
            "--preset",
            "gru-adamw",
            "--optimizer",
            f"optim.{name}",
            "--learning-rate",
            r,
        ]
        for name, r in RATES.items()
    },
}
# As many bytes as "laptop" reads, but for backpropagation, which needs fewer, and the transformer by nodes,
# which takes longest.
NOISES: Runs = {
    "int8, weights": ["--preset", "laptop"],
    "int8, nodes": ["--preset", "laptop-nodes"],
    "gru, weights": ["--preset", "float-es", "--model", "gru"],
    "gru, nodes": [
        *["--preset", "gru-nodes", "--max-generations", "3200"],
        *["--learning-rate", "0.1", "--learning-rate-decay", "0.9991"],
    ],
    "gru, backpropagation": ["--preset", "gru-adamw"],
    "transformer, weights": ["--preset", "float-es", "--model", "transformer"],
    "transformer, nodes": [
        *["--preset", "gru-nodes", "--model", "transformer", "--max-generations", "1600"],
        *["--population", "512", "--tokens", "64"],
        *["--learning-rate", "0.03", "--learning-rate-decay", "0.998"],
    ],
    "transformer, backpropagation": ["--preset", "transformer-adamw"],
}
# Forward passes for each byte that is read: node noise computes inputs again, and a pass backwards is two.
PASSES = {"weights": 1, "nodes": 2, "backpropagation": 3}
PARTS = {"population": POPULATIONS, "rules": RULES, "baselines": BASELINES, "noises": NOISES}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--only", nargs="+", metavar="LINE", help="some lines of the part")
    parser.add_argument("--out", type=Path, default=Path("runs/pretraining"))
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="for every run")
    options = parser.parse_args(argv)
    lines = PARTS[options.part]
    unknown = set(options.only or ()) - set(lines)
    if unknown:
        parser.error(f"--only {min(unknown)!r}: the lines of this part are {', '.join(lines)}")
    print("| run | weights | updates | bytes read | bits per byte | seconds |\n" + "|---" * 6 + "|")
    results = {}
    for name in options.only or lines:
        folder = options.out / options.part / name.replace(", ", "-")
        results[name] = run([*lines[name], *options.flags], folder)
        print(line(name, results[name]), flush=True)
    if options.part == "population":
        draw(results, options.out / "population.png")
    if options.part == "noises":
        for model in dict.fromkeys(name.partition(", ")[0] for name in results):
            of_model = {k: r for k, r in results.items() if k.startswith(f"{model}, ")}
            draw_noises(model, of_model, options.out / f"noises-{model}.png")


def run(flags: list[str], folder: Path) -> dict[str, Any]:
    """The result of one run, unless it is there already."""
    if not (folder / "result.json").exists():
        command = [sys.executable, "-m", "experiments.run.cli", "pretrain", *flags]
        done = subprocess.run([*command, "--run-dir", str(folder)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command[3:])}: {done.stderr.strip()}")
    rows = read_metrics(folder / "metrics.jsonl")
    return {**json.loads((folder / "result.json").read_text()), "rows": rows}


def line(name: str, result: dict[str, Any]) -> str:
    """A row of the table."""
    bits, seconds = result["held_out_bits_per_byte"], result["timing"]["training"]
    counts = f"{result['parameters']:,} | {result['generations']:,} | {result['tokens']:,}"
    return f"| {name} | {counts} | {bits:.3f} | {seconds:.0f} |"


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Bits per byte against the population, after all updates and after half of them."""
    figure = new_figure()
    axes = figure.add_subplot()
    sizes = [int(name) for name in results]
    half = max(r["generations"] for r in results.values()) // 2
    for label, color, values in (
        (f"after {half} updates", POPULATION, [at(r["rows"], half) for r in results.values()]),
        (
            f"after {2 * half} updates",
            HELD_OUT,
            [r["held_out_bits_per_byte"] for r in results.values()],
        ),
    ):
        axes.plot(sizes, values, marker="o", color=color, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axes.set_xlabel("members of a generation")
    axes.set_ylabel("bits per byte of held-out text")
    finish(axes)
    lines_at_right(axes, anchors_of(results, "unigram", "bigram"))
    axes.legend(frameon=False)
    title_above(figure, "Larger populations learn more in as many updates")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_noises(model: str, results: dict[str, dict[str, Any]], path: Path) -> None:
    """Bits per byte against bytes, forward passes and seconds."""
    figure = new_figure(10.5, 4.2)
    axes = figure.subplots(1, 3, sharey=True)
    colors = {"weights": POPULATION, "nodes": HELD_OUT, "backpropagation": "#54A24B"}
    for name, result in results.items():
        kind = name.partition(", ")[2]
        an_update = result["tokens"] / result["generations"]
        rows = [r for r in result["rows"] if r["held_out_bits_per_byte"] is not None][1:]
        bits = [*(r["held_out_bits_per_byte"] for r in rows), result["held_out_bits_per_byte"]]
        read = [*(r["generation"] * an_update for r in rows), result["tokens"]]
        times = [r["timing"]["since_start"] for r in result["rows"]]
        seconds = [*(r["timing"]["since_start"] for r in rows), times[-1]]
        passes = [x * PASSES[kind] for x in read]
        for a, x in zip(axes, (read, passes, seconds), strict=True):
            a.plot(x, bits, color=colors[kind], lw=1.8, label=kind)
    anchors = anchors_of(results, "unigram", "bigram", "trigram")
    axes[0].set_ylim(min(axes[0].get_ylim()[0], *anchors.values()) - 0.1, 6.0)
    for a, what in zip(axes, ("bytes read", "forward passes of a byte", "seconds"), strict=True):
        lines_at_right(a, anchors, named=a is axes[-1])
        a.set_xscale("log")
        a.set_xlabel(what)
        finish(a)
    axes[0].set_ylabel("bits per byte of held-out text")
    title_above(figure, f"{model}: what a byte, a pass and a second teach")
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def anchors_of(results: dict[str, dict[str, Any]], *names: str) -> dict[str, float]:
    """What the text costs without a model."""
    return {name: next(iter(results.values()))["anchors"][name] for name in names}


def at(rows: Sequence[dict[str, Any]], generation: int) -> float:
    """What was measured last, up to a generation."""
    measured = [r for r in rows if r["held_out_bits_per_byte"] is not None]
    return [r["held_out_bits_per_byte"] for r in measured if r["generation"] <= generation][-1]


if __name__ == "__main__":
    main()
