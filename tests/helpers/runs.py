"""Run folders, read back."""

from pathlib import Path
from typing import Any

import jax

from experiments.run.commands import read_run
from experiments.run.trainer import Carry


def state_of(path: Path) -> Carry:
    """A run's newest state."""
    with read_run(path) as run:
        return run.state


def leaves_of(path: Path) -> list[Any]:
    """The arrays of a run's newest state."""
    return jax.tree.leaves(state_of(path))
