"""Why a run did not learn, from its metric rows: `eggroll doctor RUN`. Nothing here imports JAX."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.run.causes import CAUSES, FEW_ROWS
from experiments.run.drivers import FOLDERS, find_driver
from experiments.run.evidence import Finding as Finding
from experiments.run.evidence import Run, known, mean, number
from experiments.run.metrics import Row

# Where the last third of a run is so many standard errors above the first, it learns.
TREND = 4.0
# The name of a finding about a run that is too short to tell.
TOO_FEW = "too few generations"


def diagnose(
    driver: str,
    config: Mapping[str, object],
    rows: Sequence[Row],
    final: Mapping[str, object] | None = None,
) -> list[Finding]:
    """Why a run did not learn, the likeliest cause first; nothing of a run that learned.

    Args:
        driver: the driver's name.
        config: the settings by name; those in groups as "group.name", or as mappings.
        rows: the metric rows.
        final: the held-out figures after the last row, where they are known.

    Example:
        >>> rows = [{"fitness_mean": -2.3, "fitness_std": 0.1, "weights": 4810, "weight_norm": 9.0,
        ...          "noise_norm": 7.0, "update_norm": 0.3, "updated": True}] * 20
        >>> found = diagnose("supervised", {"population": 4, "sigma": 0.1, "learning_rate": 0.03}, rows)
        >>> print(found[0].sentence)
        2 pairs for 4,810 weights: by the law of alignment the cosine of the estimate and the gradient is \
about 0.02; try --population 386 instead of 4.
    """
    run = Run(driver, config, rows, final)
    if rows and learned(run):
        return []
    found = [one for cause in CAUSES if (one := cause(run)) is not None] if rows else []
    if found or len(rows) >= FEW_ROWS:
        return found
    count = len(rows)
    seen = f"{count} generation{'s' * (count != 1)} tell nothing of learning"
    name = "generations" if run.setting("generations") is not None else "max_generations"
    return [run.finding(TOO_FEW, seen, name, 5 * FEW_ROWS)]


def way(run: Run) -> float:
    """Which share of the way to the best possible held-out figure the run went; NaN if it is not known.

    1 for a run that had nothing left to learn.
    """
    if run.driver not in FOLDERS:
        return math.nan
    goal = find_driver(run.driver).figure
    best = number(run.setting("target")) if goal.best is None else goal.best
    values = known(np.append(run.figure(goal.name), mean(run.final.get(goal.name))))
    if len(values) < 2 or math.isnan(best):
        return math.nan
    target = number(run.setting("target"))
    if goal.meets([float(values[-1])], None if math.isnan(target) else target):
        return 1.0
    sign = 1 if goal.better == "larger" else -1
    left, still = sign * (best - values[0]), sign * (best - values[-1])
    little = 0.02 * abs(best)
    if left <= little:  # of what it had, something may be lost
        return 1.0 if still <= little else 0.0
    return float((left - still) / left)


def trend(run: Run) -> float:
    """How many standard errors the training score of the last third is above that of the first."""
    score = known(run.figure("fitness_mean"))
    if not score.size:
        score = -known(run.figure("loss"))
    third = len(score) // 3
    if third < 3:
        return math.nan
    first, last = score[:third], score[-third:]
    error = math.sqrt((first.var(ddof=1) + last.var(ddof=1)) / third)
    return float((last.mean() - first.mean()) / error) if error > 0 else math.nan


def learned(run: Run) -> bool:
    """Whether the run is on its way."""
    share = way(run)
    if run.driver in FOLDERS and share >= find_driver(run.driver).figure.way:
        return True
    # Few held-out questions say less than the scores of all members.
    if math.isnan(share) or run.driver == "reasoning":
        return trend(run) > TREND
    return False
