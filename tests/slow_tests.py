"""Writes tests/slow.txt anew: measures all tests but those that are marked as slow themselves.

python tests/slow_tests.py, on a machine with nothing beside it; about ten minutes on two cores.
"""

import collections
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIST = ROOT / "tests" / "slow.txt"
SECONDS = 1.2


def measured() -> dict[str, float]:
    """Seconds of every test, all its cases together."""
    with tempfile.TemporaryDirectory() as cache:
        command = (
            f"{sys.executable} -m pytest -n 2 -q --durations=0 --durations-min=0.05 -m".split()
        )
        done = subprocess.run(
            [*command, "not soak and not slow"],
            cwd=ROOT,
            env={"EGGROLL_TEST_CACHE": cache, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        )
    found: dict[str, float] = collections.defaultdict(float)
    for line in done.stdout.splitlines():
        if row := re.match(r"\s*([\d.]+)s (?:call|setup|teardown)\s+(\S.*)$", line):
            found[row[2].strip().split("[")[0]] += float(row[1])
    return found


def main() -> None:
    head = [line for line in LIST.read_text().splitlines() if line.startswith("#")]
    LIST.write_text("\n".join(head) + "\n")  # nothing is left out of the measurement
    slow = sorted(name for name, seconds in measured().items() if seconds > SECONDS)
    LIST.write_text("\n".join([*head, *slow]) + "\n")


if __name__ == "__main__":
    main()
