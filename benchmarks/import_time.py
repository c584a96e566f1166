"""What ``import eggroll`` costs beside ``import jax``.

    python -m benchmarks.import_time --rounds 10

Every import runs in a process of its own. Rounds are interleaved (every module once a round), and a
module's cost is the median over rounds of (its process's time) - (that of ``import jax`` in the same
round). Bytecode is compiled in a first round that does not count, into a folder that goes away: an
installer may have left it out, and the environment may forbid to write it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BASELINE = "jax"
MODULES = ("eggroll", "experiments.run.cli")
TARGET = 0.4


def seconds(module: str, bytecode: str) -> float:
    """How long a process takes that imports ``module`` and ends; compiled files lie in ``bytecode``."""
    settings = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode}
    settings.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True, env=settings)
    return time.perf_counter() - start


def measure(rounds: int) -> list[dict[str, str | float]]:
    """One row a module: the median time of its process, and of what it takes beyond the baseline's."""
    times: dict[str, list[float]] = {module: [] for module in (BASELINE, *MODULES)}
    with tempfile.TemporaryDirectory() as bytecode:
        for index in range(rounds + 1):
            for module, own in times.items():
                took = seconds(module, bytecode)
                if index:  # the first round compiles
                    own.append(took)
    return [
        {
            "module": module,
            "seconds": statistics.median(own),
            "beyond": statistics.median(
                t - base for t, base in zip(own, times[BASELINE], strict=True)
            ),
        }
        for module, own in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="The time that an import takes.")
    parser.add_argument("--rounds", type=int, default=10, help="interleaved rounds")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")

    table = measure(args.rounds)
    print(
        f"{args.rounds} rounds, Python {sys.version.split()[0]}; target: eggroll at most +{TARGET} s"
    )
    print(f"{'import':<20} {'seconds':>8} {'beyond ' + BASELINE:>12}")
    for row in table:
        print(f"{row['module']:<20} {row['seconds']:>8.2f} {row['beyond']:>+12.2f}")
    if args.json:
        args.json.write_text(json.dumps({"rounds": args.rounds, "rows": table}, indent=1))


if __name__ == "__main__":
    main()
