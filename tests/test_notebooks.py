"""Every notebook runs from its first cell to its last, on tiny settings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook, tmp_path):
    # A process of its own: a kernel's libraries warn of things that are none of ours.
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "jupyter",
            "execute",
            str(notebook),
            "--output",
            str(tmp_path / "out"),
        ],
        env={**os.environ, "EGGROLL_TINY": "1", "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
