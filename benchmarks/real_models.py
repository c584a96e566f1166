"""EGGROLL, its variants, GRPO and supervised learning on SmolLM2-135M, at equal seconds: one table.

    make smollm2
    python -m benchmarks.real_models --seconds 900 --seeds 3 --out runs/real-models

Every method gets the same seconds of generations, on the preset smollm2-sums or with `--task sorting` on
smollm2-sorting. First each method runs a few generations, of which those in which nothing is compiled are
timed, one method after the other: nothing else may run beside them then. Every seed runs for as many
generations as fit by that pace, so that what runs beside it later does not matter. The table is measured
afterwards, on questions that were not trained on:

* accuracy of greedy answers on the held-out and fresh questions together, with a band of 95% (Wilson);
* the same on questions of larger numbers than any that was trained on;
* pass@k of samples at temperature 1;
* bits a byte of an English text that has nothing to do with the task, which says what was forgotten;
* the largest memory of the process that trained.

Runs that are there already are not repeated, so that a command that was stopped goes on.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from experiments.reasoning import scores, tasks
from experiments.reasoning.train import RIGHT, Reasoning
from experiments.run.commands import read_run
from experiments.run.metrics import read_metrics
from experiments.run.plots import wilson

# Settings of a preset's task for questions beyond those that are trained on.
TASKS: dict[str, dict[str, int]] = {
    "sums": {"least": 21, "most": 30},
    "sorting": {"least": 100, "most": 999, "size": 400},
}
METHODS: dict[str, list[str]] = {
    "EGGROLL": [],
    "EGGROLL by SGD": "--optimizer sgd --sigma 0.003 --learning-rate 5e-5".split(),
    "noise for answers": "--perturb answers".split(),
    "node noise": "--perturb nodes --sigma 0.02 --learning-rate 2e-4".split(),
    "EGGROLL, sigma by RMS": "--sigma-scale rms --optimizer sgd --sigma 0.03 --learning-rate 5e-3".split(),
    "EGGROLL, 4 subspaces": ["--subspaces", "4"],
    "dense ES": ["--rank", "full"],
    "GRPO": "--algorithm grpo --optimizer adamw --learning-rate 1e-5 --temperature 1".split(),
    # Worked solutions have several lines.
    "SFT": "--algorithm sft --optimizer adamw --learning-rate 1e-5 --max-new-tokens 24 --stop".split(),
}
# Generations that are timed: in the first, programs are compiled.
COMPILING, TIMED = 1, 2
SAMPLES = 16
TEXT = Path(__file__).resolve().parent.parent / "docs" / "node-noise.md"


class Figures(NamedTuple):
    """What a model can do.

    Attributes:
        right: whether each held-out and fresh question was answered right.
        beyond: the same for larger numbers.
        passed: pass@k by k, the mean over some questions.
        bits: a byte of an English text.
    """

    right: np.ndarray
    beyond: np.ndarray
    passed: dict[int, float]
    bits: float


def pace(words: Sequence[str], folder: Path) -> float:
    """Seconds of a generation in which nothing is compiled, measured once in a run that is gone on with."""
    note = folder / "pace.json"
    if note.exists():
        return float(json.loads(note.read_text())["seconds"])
    run([*words, "--run-dir", str(folder), "--generations", str(COMPILING + TIMED)])
    rows = read_metrics(folder / "metrics.jsonl")
    seconds = min(row["timing"]["seconds"] for row in rows[COMPILING:])
    note.write_text(json.dumps({"seconds": seconds}) + "\n")
    return seconds


def train(words: Sequence[str], folder: Path, generations: int) -> float:
    """Trains for so many generations; returns the largest memory of the process in GiB."""
    note = folder / "benchmark.json"
    if note.exists() and (told := json.loads(note.read_text()))["generations"] == generations:
        return float(told["memory_gib"])
    memory = run([*words, "--run-dir", str(folder), "--generations", str(generations)])
    note.write_text(json.dumps({"memory_gib": memory, "generations": generations}) + "\n")
    return memory


def run(words: Sequence[str]) -> float:
    """Runs `eggroll reasoning` to its end; returns the largest memory of its process in GiB.

    Raises:
        subprocess.CalledProcessError: where it fails.
    """
    command = [sys.executable, "-m", "experiments.run.cli", "reasoning", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return usage.ru_maxrss / 2**20


def figures(trainer: Reasoning, params: PyTree, seed: int = 0) -> Figures:
    """What a model can do, by the questions of a run."""
    asked = [*trainer.questions.measured, *trainer.questions.fresh]
    larger = trainer.config.task_arguments() | TASKS[trainer.config.task]
    others = tasks.load(trainer.config.task, **larger)
    answers = lambda questions: trainer.answers(params, questions)[2][:, 0] >= RIGHT
    drawn = trainer.answers(params, asked[:32], SAMPLES, seed)[2] >= RIGHT
    powers = [2**i for i in range(SAMPLES.bit_length())]
    passed = {k: float(np.mean(scores.pass_at_k(drawn.sum(1), SAMPLES, k))) for k in powers}
    right, beyond = answers(asked), answers([*others.held_out, *others.fresh])
    return Figures(right, beyond, passed, bits_a_byte(trainer, params))


def bits_a_byte(trainer: Reasoning, params: PyTree, length: int = 512) -> float:
    """Bits a byte of the beginning of an English text."""
    tokenizer = trainer.base.tokenizer
    tokens = jnp.array(tokenizer.encode(TEXT.read_text("utf-8"))[:length])
    logits = jax.jit(trainer.base.model.apply)(params, tokens)
    chances = jax.nn.log_softmax(logits[:-1].astype(jnp.float32))
    total = jnp.take_along_axis(chances, tokens[1:, None], 1).sum()
    read = tokenizer.decode(tokens[1:].tolist()).encode()
    return float(-total / jnp.log(2) / len(read))


def line(name: str, found: Sequence[Figures], more: Mapping[str, str]) -> str:
    """A row of the table: means over seeds; in brackets each seed's own accuracy."""
    right = np.array([one.right.mean() for one in found])
    low, high = wilson(right.mean(keepdims=True), sum(one.right.size for one in found))
    each = f" ({', '.join(f'{x:.0%}' for x in right)})" if len(found) > 1 else ""
    passed = [f"{np.mean([one.passed[k] for one in found]):.0%}" for k in found[0].passed]
    cells = [
        name,
        f"**{right.mean():.1%}**{each}",
        f"{low[0]:.0%} to {high[0]:.0%}",
        f"{np.mean([one.beyond.mean() for one in found]):.1%}",
        ", ".join(passed),
        f"{np.mean([one.bits for one in found]):.3f}",
        *more.values(),
    ]
    return "| " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    p = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    p.add_argument("--task", choices=TASKS, default="sums", help="of the preset smollm2-TASK")
    p.add_argument("--model", default="smollm2", help="as --model of eggroll reasoning")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    p.add_argument("--seconds", type=float, default=900.0, help="of generations, for each run")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--more", nargs="*", default=[], help="other settings of all runs, without --")
    p.add_argument("--out", type=Path, default=Path("runs/real-models"))
    args = p.parse_args(argv)
    if args.seconds <= 0 or args.seeds < 1:
        p.error("--seconds must be above 0 and --seeds at least 1")
    usual = ["--preset", f"smollm2-{args.task}", "--model", args.model]
    usual += [word for pair in args.more for word in (f"--{pair}".split("=", 1))]
    places = {
        name: args.out / args.task / name.replace(" ", "-").replace(",", "")
        for name in args.methods
    }
    words = {name: [*usual, *METHODS[name]] for name in args.methods}
    counts = {
        name: max(
            COMPILING + TIMED,
            round(args.seconds / pace([*words[name], "--seed", "0"], place / "0")),
        )
        for name, place in places.items()
    }
    powers = ", ".join(str(2**i) for i in range(SAMPLES.bit_length()))
    head = ["", "right", "95%", "larger numbers", f"pass@{powers}", "bits a byte"]
    head += ["generations", "seconds each", "million tokens", "GiB"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|", flush=True)
    base = None
    for name, place in places.items():
        found, memory, tokens = [], 0.0, []
        for seed in range(args.seeds):
            folder = place / str(seed)
            own = [*words[name], "--seed", str(seed)]
            memory = max(memory, train(own, folder, counts[name]))
            result = json.loads((folder / "result.json").read_text())
            with read_run(folder, on_host=True) as opened:
                trainer = opened.trainer
                assert isinstance(trainer, Reasoning)
                if base is None:
                    base = figures(trainer, trainer.base.params(jnp.int32(seed)))
                    print(line("as it is", [base], dict.fromkeys(head[6:], "")), flush=True)
                found.append(figures(trainer, opened.state.learner.params))
            tokens.append((result["prompt_tokens"] + result["generated_tokens"]) / 1e6)
        told = {
            "generations": str(counts[name]),
            "seconds": f"{pace([], place / '0'):.1f}",
            "tokens": f"{np.mean(tokens):.2f}",
            "memory": f"{memory:.1f}",
        }
        print(line(name, found, told), flush=True)


if __name__ == "__main__":
    main()
