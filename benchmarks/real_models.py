"""EGGROLL, its variants, GRPO and supervised learning on SmolLM2-135M, at equal seconds: one table.

    make smollm2
    python -m benchmarks.real_models --seconds 900 --seeds 3 --out runs/real-models

Every method gets the same seconds of generations, on the preset smollm2-sums: two generations are run first;
the second, in which nothing is compiled, is timed, and the run is continued for as many as fit. The table is
measured afterwards, on questions that were not trained on:

* accuracy of greedy answers on the held-out and fresh questions together, with a band of 95% (Wilson);
* the same on sums of larger numbers than any that was trained on;
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

PRESET = "smollm2-sums"
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
# Generations whose seconds are no guide: programs are compiled there.
COMPILING = 1
SAMPLES = 16
TEXT = Path(__file__).resolve().parent.parent / "docs" / "node-noise.md"


class Figures(NamedTuple):
    """What a model can do.

    Attributes:
        right: whether each held-out and fresh question was answered right.
        beyond: the same for sums of larger numbers.
        passed: pass@k by k, the mean over some questions.
        bits: a byte of an English text.
    """

    right: np.ndarray
    beyond: np.ndarray
    passed: dict[int, float]
    bits: float


def train(words: Sequence[str], folder: Path, seconds: float) -> float:
    """Trains for about so many seconds of generations; returns the largest memory of a process in GiB."""
    command = [sys.executable, "-m", "experiments.run.cli", "reasoning", "--preset", PRESET, *words]
    command += ["--run-dir", str(folder)]
    note = folder / "benchmark.json"
    if note.exists():
        return json.loads(note.read_text())["memory_gib"]
    run([*command, "--generations", str(COMPILING + 1)])
    rows = read_metrics(folder / "metrics.jsonl")
    each = min(row["timing"]["seconds"] for row in rows[COMPILING:])
    count = max(COMPILING + 1, round(seconds / each))
    memory = run([*command, "--generations", str(count)])
    note.write_text(json.dumps({"memory_gib": memory, "generations": count}) + "\n")
    return memory


def run(command: Sequence[str]) -> float:
    """Runs a command to its end; returns the largest memory of its process in GiB.

    Raises:
        subprocess.CalledProcessError: where it fails.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return usage.ru_maxrss / 2**20


def figures(trainer: Reasoning, params: PyTree, seed: int = 0) -> Figures:
    """What a model can do, by the questions of a run."""
    asked = [*trainer.questions.measured, *trainer.questions.fresh]
    larger = dict(trainer.config.task_arguments(), least=21, most=30)
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
    p.add_argument("--model", default="smollm2", help="as --model of eggroll reasoning")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    p.add_argument("--seconds", type=float, default=900.0, help="of generations, for each run")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--more", nargs="*", default=[], help="other settings of all runs, without --")
    p.add_argument("--out", type=Path, default=Path("runs/real-models"))
    args = p.parse_args(argv)
    if args.seconds <= 0 or args.seeds < 1:
        p.error("--seconds must be above 0 and --seeds at least 1")
    more = [word for pair in args.more for word in (f"--{pair}".split("=", 1))]
    powers = ", ".join(str(2**i) for i in range(SAMPLES.bit_length()))
    head = ["", "right", "95%", "larger numbers", f"pass@{powers}", "bits a byte"]
    head += ["generations", "million tokens", "GiB"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|", flush=True)
    base = None
    for name in args.methods:
        found, memory, counts, tokens = [], 0.0, [], []
        for seed in range(args.seeds):
            folder = args.out / name.replace(" ", "-").replace(",", "") / str(seed)
            words = ["--model", args.model, "--seed", str(seed), *METHODS[name], *more]
            memory = max(memory, train(words, folder, args.seconds))
            result = json.loads((folder / "result.json").read_text())
            with read_run(folder, on_host=True) as run:
                trainer = run.trainer
                assert isinstance(trainer, Reasoning)
                if base is None:
                    base = figures(trainer, trainer.base.params(jnp.int32(seed)))
                    print(line("as it is", [base], dict.fromkeys(head[6:], "")), flush=True)
                found.append(figures(trainer, run.state.learner.params))
                counts.append(int(run.state.generation))
            tokens.append((result["prompt_tokens"] + result["generated_tokens"]) / 1e6)
        told = {
            "generations": ", ".join(map(str, counts)),
            "tokens": f"{np.mean(tokens):.2f}",
            "memory": f"{memory:.1f}",
        }
        print(line(name, found, told), flush=True)


if __name__ == "__main__":
    main()
