"""Run folders, read back."""

from pathlib import Path
from typing import Any

import jax

from experiments.run.drivers import read_run


def leaves_of(path: Path) -> list[Any]:
    """The arrays of a run's newest state."""
    with read_run(path) as run:
        return jax.tree.leaves(run.state)
