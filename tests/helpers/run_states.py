"""What a run left behind."""

from pathlib import Path

from experiments.run.drivers import read_run
from experiments.run.trainer import Carry


def state_of(folder: Path) -> Carry:
    """The newest state of a run."""
    with read_run(folder) as found:
        return found.state
