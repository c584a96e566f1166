"""What learning curves are drawn over: generations, totals that rows count, or seconds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.run.errors import UsageError
from experiments.run.metrics import expect_names, seconds_of


class Axis(NamedTuple):
    """What a curve is drawn over.

    Attributes:
        name: "generation", "seconds", or a running total of the rows, such as "environment_steps".
        words: for the axis.
        each: how many of it a generation is; for "generation" alone. So rows that do not count what they
            read are drawn over bytes: ``Axis("generation", "bytes read", config.tokens_an_update)``.
    """

    name: str
    words: str
    each: float | int = 1


GENERATIONS = Axis("generation", "generations")
UPDATES = Axis("generation", "updates")
ENVIRONMENT_STEPS = Axis("environment_steps", "environment steps")
BYTES_READ = Axis("bytes_read", "bytes read")
GENERATED_TOKENS = Axis("generated_tokens", "tokens written")
SECONDS = Axis("seconds", "seconds of training")

# Totals that say what an update cost, in the order in which methods are compared by them.
TOTALS = (ENVIRONMENT_STEPS, BYTES_READ, GENERATED_TOKENS)
AXES = {axis.name: axis for axis in (GENERATIONS, *TOTALS, SECONDS)}


def positions(
    rows: Sequence[Mapping[str, Any]], axis: Axis, path: Path = Path("metrics.jsonl")
) -> np.ndarray:
    """Where the state before each row stands on the axis, and after the last one, float64 [rows + 1].

    Times are summed up row by row, so that a run that was stopped and continued counts its work alone.

    Raises:
        RunError: for a row without a time, or without the total.
        UsageError: where the rows do not count what the axis is of.

    Example:
        >>> rows = [{"generation": 0, "environment_steps": 5}, {"generation": 1, "environment_steps": 9}]
        >>> positions(rows, ENVIRONMENT_STEPS).tolist()
        [0.0, 5.0, 9.0]
        >>> positions(rows, Axis("generation", "bytes read", 100)).tolist()
        [0.0, 100.0, 200.0]
    """
    plain = [dict(row) for row in rows]
    after: list[float] = []
    if axis.name == "generation":
        after = [axis.each * (row["generation"] + 1) for row in plain]
    elif axis.name == "seconds":
        after = np.cumsum(seconds_of(path, plain)).tolist()
    elif plain and axis.name not in plain[0]:
        raise UsageError(f"{path}: these rows do not count {axis.name!r}; choose another --x")
    elif plain:
        expect_names(path, plain, [axis.name])
        after = [float(np.mean(row[axis.name])) for row in plain]
    return np.array([0.0, *after])


def usual_axis(runs: Sequence[Sequence[Mapping[str, Any]]], methods: int) -> Axis:
    """What runs are compared over.

    Args:
        runs: the rows of each.
        methods: how many groups of settings there are.

    Returns:
        The first total that all of them count and that grows in each; else seconds for several methods, and
        generations for one.

    Example:
        >>> counts = [{"generation": 0, "generated_tokens": 5}]
        >>> usual_axis([counts, counts], 2).name, usual_axis([counts, [{"generation": 0}]], 2).name
        ('generated_tokens', 'seconds')
    """
    for axis in TOTALS:
        if all(rows and _grows(rows[-1].get(axis.name)) for rows in runs):
            return axis
    return SECONDS if methods > 1 else GENERATIONS


def _grows(total: Any) -> bool:
    values = total if isinstance(total, list) else [total]
    return all(isinstance(value, int | float) and value > 0 for value in values)
