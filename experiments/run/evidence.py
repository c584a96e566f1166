"""A run as `eggroll doctor RUN` reads it: its settings, the figures of its rows, and findings about them."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from experiments.run.fields import flag, flat
from experiments.run.metrics import Row

Rows = Float[np.ndarray, "rows"]


class Finding(NamedTuple):
    """One reason why a run did not learn.

    Attributes:
        name: the cause in two or three words.
        sentence: what was seen, in figures, and what to try.
        flag: the setting to change, as on the command line.
        now: its value in this run.
        better: the value to try.
    """

    name: str
    sentence: str
    flag: str
    now: object
    better: object


# Settings of these groups are those of another algorithm.
OTHERS = ("ppo", "grpo", "nodes")


class Run:
    """A run as its causes read it.

    Args:
        driver: the driver's name.
        config: settings by name; those in groups as "group.name", or as mappings.
        rows: metric rows; a figure of several seeds counts by its mean.
        final: the held-out figures after the last row, where they are known.
    """

    def __init__(
        self,
        driver: str,
        config: Mapping[str, object],
        rows: Sequence[Row],
        final: Mapping[str, object] | None = None,
    ) -> None:
        self.driver, self.rows = driver, rows
        self.final = dict(final or {})
        self._config = dict(flat(config))

    def key(self, name: str) -> str:
        """The full name of a setting, with the group that it is in, if any."""
        if name in self._config:
            return name
        found = [
            key
            for key in self._config
            if key.endswith("." + name) and key.partition(".")[0] not in OTHERS
        ]
        return found[0] if found else name

    def setting(self, name: str) -> object:
        """The value of a setting, None where there is none."""
        return self._config.get(self.key(name))

    def number(self, name: str) -> float:
        """The value of a setting, NaN where it is no number."""
        return number(self.setting(name))

    def figure(self, name: str) -> Rows:
        """A figure of every row, NaN where it is not known."""
        return np.array([mean(row.get(name)) for row in self.rows], float)

    def typical(self, name: str) -> float:
        """The median of a figure over the rows where it is known; NaN where it never is."""
        return median(self.figure(name))

    @property
    def evolves(self) -> bool:
        """Whether a population is what learns."""
        return self.setting("algorithm") in (None, "eggroll")

    @property
    def pairs(self) -> float:
        """Pairs of members."""
        return self.number("population") / 2

    @property
    def noises(self) -> float:
        """Noises of a member in a generation: one, or one for every answer."""
        if self.driver != "reasoning" or self.setting("perturb") not in ("answers", "nodes"):
            return 1.0
        return self.number("prompts") * self.number("samples")

    @property
    def on_nodes(self) -> bool:
        """Whether noise is on the outputs of layers."""
        return self.setting("perturb") in ("nodes", "mixed")

    @property
    def noise(self) -> float:
        """The size of the noise against what it is added to, in the first generation.

        The norm of a member's noise over that of the weights; sigma where all noise is on nodes, whose
        values are of size 1.
        """
        if self.on_nodes and not self.typical("noise_norm") > 0:
            return self.number("sigma")
        return ratio(known(self.figure("noise_norm"))[:1], known(self.figure("weight_norm"))[:1])

    @property
    def steps(self) -> Rows:
        """The norm of every update over that of the weights at the start; updates of nothing left out."""
        weights = known(self.figure("weight_norm"))[:1]
        moves = self.figure("update_norm")[self.figure("updated") != 0]
        return known(moves) / weights if weights.size and weights[0] > 0 else np.array([])

    @property
    def span(self) -> str:
        """The generations that were seen, in words."""
        last = len(self.rows) - 1
        return f"generations 0 to {last}" if last else "generation 0"

    def finding(self, name: str, seen: str, setting: str, better: object) -> Finding:
        """A finding about a setting, with its flag and value in the sentence."""
        now, word = self.setting(setting), flag(self.key(setting))
        advice = f"try {word} {shown(better)} instead of {shown(now)}"
        return Finding(name, f"{seen}; {advice}.", word, now, better)


def number(value: object) -> float:
    """A number, or NaN for whatever else."""
    return float(value) if isinstance(value, int | float) else math.nan


def mean(value: object) -> float:
    """A figure of a row: the mean of several seeds' known ones, NaN where none is known."""
    values = known(
        np.array([number(one) for one in value] if isinstance(value, list) else [number(value)])
    )
    return float(values.mean()) if values.size else math.nan


def known(values: np.ndarray) -> np.ndarray:
    """Those that are finite."""
    return values[np.isfinite(values)]


def median(values: np.ndarray) -> float:
    """Of the known ones; NaN where there are none."""
    found = known(values)
    return float(np.median(found)) if found.size else math.nan


def best(values: np.ndarray) -> float:
    """The largest known one; NaN where there is none."""
    found = known(values)
    return float(found.max()) if found.size else math.nan


def over(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``a / b``, NaN where b is 0."""
    return np.divide(a, b, out=np.full(len(a), math.nan), where=b != 0)


def ratio(a: np.ndarray, b: np.ndarray) -> float:
    """Of two arrays with one number each, or none; NaN where there is no ratio."""
    return float(a[0] / b[0]) if a.size and b.size and b[0] > 0 else math.nan


def times(value: float, factor: int) -> int | None:
    """A whole number to try; None where the value is not known."""
    return int(value * factor) if math.isfinite(value) else None


def round_to(value: float, digits: int = 2) -> float:
    """A number to try: of so many digits.

    Example:
        >>> round_to(0.073456), round_to(1234.5)
        (0.073, 1200.0)
    """
    return float(f"{value:.{digits}g}")


def shown(value: object) -> str:
    """A value as it is typed."""
    return f"{value:g}" if isinstance(value, float) else str(value)
