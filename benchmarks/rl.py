"""EGGROLL, dense ES and PPO on the presets of `eggroll rl`: a table, and a picture for each task.

    python -m benchmarks.rl --out runs/compared

Every cell is one run of the console command with three training seeds in one program, stopped by the
preset's number of generations alone; where an earlier call left it unfinished it is continued. Pictures are
over environment steps; times are of whole processes, so nothing else should run beside.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from experiments.rl.config import PRESETS
from experiments.run.report import Settings, report

METHODS = {"EGGROLL": [], "dense ES": ["--rank", "full"], "PPO": ["--algorithm", "ppo"]}
# Gymnasium's preset is an example of an environment outside JAX, not another task.
NAMES = [name for name in PRESETS if not name.startswith("gymnasium") and name != "own"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--presets", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/compared"))
    options = parser.parse_args()
    print("| preset | target | " + " | ".join(METHODS) + " | steps a seed, millions | seconds |")
    print("|---|---|" + "---|" * (len(METHODS) + 2), flush=True)
    for name in options.presets:
        folders = {how: options.out / name / how.replace(" ", "-") for how in METHODS}
        for how, folder in folders.items():
            run(name, METHODS[how], folder, options.seeds)
        results = [json.loads((folder / "result.json").read_text()) for folder in folders.values()]
        print(line(name, results, options.seeds), flush=True)
        runs, names = tuple(folders.values()), tuple(folders)
        report(Settings(runs=runs, names=names, out=options.out / name))


def run(name: str, how: list[str], folder: Path, seeds: int) -> None:
    """One run, unless its result is there already."""
    if (folder / "result.json").exists():
        return
    command = [sys.executable, "-m", "experiments.run.cli", "rl", "--preset", name, *how]
    command += ["--seeds", str(seeds), "--run-dir", str(folder)]
    config = PRESETS[name]
    limit = config.ppo.generations if "ppo" in how else config.max_generations
    command += ["--generations", str(limit), "--evaluate-every", "5"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def line(name: str, results: list[dict], seeds: int) -> str:
    """A row of the table: the mean over seeds, and each seed's own."""
    cells = [
        f"**{r['held_out_return']:.1f}** ({', '.join(f'{x:.0f}' for x in r['by_seed'] or [])})"
        for r in results
    ]
    steps = " / ".join(f"{r['environment_steps'] / seeds / 1e6:.1f}" for r in results)
    seconds = " / ".join(f"{sum(r['timing'].values()):.0f}" for r in results)
    return f"| {name} | {PRESETS[name].target:g} | {' | '.join(cells)} | {steps} | {seconds} |"


if __name__ == "__main__":
    main()
