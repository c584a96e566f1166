"""`eggroll replay`: the state of any generation, from the start model, the seed and the history of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tyro.conf import Positional

from experiments.run.drivers import settings_to_read
from experiments.run.errors import RunError, UsageError
from experiments.run.fields import check_ranges, count
from experiments.run.paths import check_writable

if TYPE_CHECKING:
    from experiments.run.history import Line
    from experiments.run.trainer import Carry, Trainer

# A figure that differs by more than this (relative) is that of another update; less is rounding.
ROUNDING = 1e-3


@dataclass(frozen=True, kw_only=True)
class ReplaySettings:
    """Rebuild the model of any generation from the model that the run began with, the seed and history.jsonl,
    and write it as a folder (language models that evolve)."""

    run: Positional[Path]
    """The run folder."""
    generation: int | None = count(None, least=0)
    """Updates that are made again; by default all that the history has."""
    out: Path | None = None
    """The folder; replayed, in the run folder by default."""


class Replayed(NamedTuple):
    """A state that was rebuilt.

    Attributes:
        state: after the last update.
        furthest: the largest relative difference of a figure from the run's own; 0 where all that were
            compared are equal bit for bit.
        compared: the number of figures that were compared.
        figures: the number of figures of all updates. Those that the history has no number for are not
            compared.
    """

    state: "Carry"
    furthest: float
    compared: int
    figures: int

    def describe(self) -> str:
        """How near the updates are to the run's own, in words.

        Example:
            >>> Replayed(None, 0.0, 3, 4).describe()
            "3 of 4 figures of updates are the run's own, bit for bit; the history lacks the others"
        """
        if not self.compared and self.figures:
            return f"none of {self.figures} figures of updates was compared: the history lacks them"
        missing = self.compared < self.figures
        rest = "; the history lacks the others" * missing
        if self.furthest == 0 and not missing:
            return "every figure of every update is the run's own, bit for bit"
        which = f"{self.compared} of {self.figures} figures" if missing else "figures"
        if self.furthest == 0:
            return f"{which} of updates are the run's own, bit for bit{rest}"
        return (
            f"{which} of updates differ from the run's own by {self.furthest:.1e} at most: another machine, "
            f"number of devices or versions{rest}"
        )


def replay(settings: ReplaySettings) -> str:
    """Writes the model; says what was written and how near it is to the run's own."""
    check_ranges(settings)
    to = settings.out or settings.run / "replayed"
    check_writable(to.parent, f"--out {to}")
    lines = lines_of(settings.run, settings.generation)
    driver, config = settings_to_read(settings.run)
    with driver.load()(config) as trainer:
        found = replayed(trainer, lines)

        import jax

        said = trainer.export(jax.device_get(found.state), to)
    count = len(lines)
    return f"Made {count} update{'s' * (count != 1)} again; {found.describe()}.\n{said}"


def lines_of(run: Path, generation: int | None = None) -> "list[Line]":
    """The history of a run up to a generation.

    Args:
        run: the run folder.
        generation: how many updates are wanted; None for all.

    Raises:
        UsageError: where the folder holds no run, or its history lacks some of them.
    """
    settings_to_read(run)

    from experiments.run.history import NAME, read_history

    path = run / NAME
    if not path.is_file():
        raise UsageError(
            f"{run} has no {NAME}: runs of eggroll reasoning by evolution strategies have one"
        )
    lines = read_history(path)
    have = [line.generation for line in lines]
    wanted = (have[-1] + 1 if have else 0) if generation is None else generation
    if lacking := sorted(set(range(wanted)) - set(have)):
        last = have[-1] if have else -1
        if lacking[0] > last:
            raise UsageError(
                f"--generation {wanted}: {path} ends before, and has the updates up to generation {last + 1}"
            )
        end = next(g for g in have if g > lacking[0]) - 1
        raise UsageError(
            f"{path} has a gap: the scores of generations {lacking[0]} to {end} are missing, without which "
            "no later state can be rebuilt"
        )
    return lines[:wanted]


def replayed(trainer: "Trainer[Any]", lines: "list[Line]") -> Replayed:
    """The state after some updates, from the start.

    Raises:
        UsageError: for a trainer that cannot replay.
        RunError: where an update is another one than the run's, as with another start or other settings.
    """
    import numpy as np

    from experiments.run.history import FIGURES
    from experiments.run.trainer import Replays

    if not isinstance(trainer, Replays):
        raise UsageError(f"{trainer.config.run_dir} is a run whose updates cannot be made again")
    state, furthest, compared = trainer.start(), 0.0, 0
    for line in lines:
        state, figures = trainer.replay(state, line.scores)
        for name, right in line.figures.items():
            got = float(np.asarray(figures[name]))
            apart = 0.0 if got == right else abs(got - right) / max(abs(right), 1e-30)
            if not apart <= ROUNDING:
                raise RunError(
                    f"generation {line.generation}: {name} is {got:.6g} and was {right:.6g} in the run: the "
                    "model that it began with, its settings or its history are others now"
                )
            furthest, compared = max(furthest, apart), compared + 1
    return Replayed(state, furthest, compared, len(FIGURES) * len(lines))
