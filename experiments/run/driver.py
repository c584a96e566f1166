"""What a driver is: one record, from which commands, files, sweeps and reports take what they need.

A driver is a folder whose light `__init__` holds its :class:`Driver`, the settings with their presets
(`config.py`), and the class that trains (`train.py`, see :mod:`experiments.run.trainer`).
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from experiments.run.settings import RunSettings

if TYPE_CHECKING:
    from experiments.run.trainer import Trainer


class Figure(NamedTuple):
    """What a driver's runs are judged by: a held-out figure, measured while training goes on.

    Attributes:
        name: in metrics.jsonl and result.json.
        fresh: the name of the same figure of data that decided nothing, in result.json.
        better: whether larger or smaller values are better.
        best: the best value that there can be; None where that is not known, and a target stands for it.
        way: the share of the way from the first value to the best one that counts as learning.
    """

    name: str
    fresh: str
    better: Literal["larger", "smaller"] = "larger"
    best: float | None = None
    way: float = 0.25

    def meets(self, values: Sequence[float | None], target: float | None) -> bool:
        """Whether all values are at the target; none is where there is no target.

        Example:
            >>> loss = Figure("held_out_loss", "fresh_loss", "smaller")
            >>> loss.meets([0.1, 0.3], 0.3), loss.meets([0.1, None], 0.3), loss.meets([0.1], None)
            (True, False, False)
        """
        if target is None:
            return False
        sign = 1 if self.better == "larger" else -1
        return all(value is not None and sign * value >= sign * target for value in values)


class Column(NamedTuple):
    """A value of the newest row that the progress bar shows.

    Attributes:
        name: in the row; "timing/..." of its times.
        words: what stands before it, or behind it if it begins with a space.
        format: of the number.
    """

    name: str
    words: str
    format: str


class Driver(NamedTuple):
    """One driver.

    Attributes:
        name: its command.
        summary: a line for the help.
        config: the class of its settings.
        presets: settings by name; the first is the default.
        figure: what its runs are judged by.
        measured: names of the other figures that are measured with it, some of them in some settings only.
        columns: what the progress bar shows, the most important first.
        results: names in result.json beside those that all drivers have.
        trainer: what makes a trainer of settings, "module:name"; imported when it is needed.
    """

    name: str
    summary: str
    config: type[RunSettings]
    presets: Mapping[str, Any]
    figure: Figure
    columns: tuple[Column, ...]
    results: tuple[str, ...]
    trainer: str
    measured: tuple[str, ...] = ()

    @property
    def result_names(self) -> tuple[str, ...]:
        """The names in result.json."""
        figure = self.figure
        measured = (figure.name, *self.measured)
        own = (*measured, *(f"{name}_before" for name in measured), figure.fresh, *self.results)
        return (*own, "learned", "by_seed", "parameters", "generations", "sentence", "timing")

    def load(self) -> "Callable[[Any], Trainer[Any]]":
        """What makes a trainer of settings."""
        module, _, name = self.trainer.partition(":")
        found: Callable[[Any], Trainer[Any]] = getattr(importlib.import_module(module), name)
        return found
