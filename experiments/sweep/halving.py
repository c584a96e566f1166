"""Successive halving (arXiv 1502.07943): all settings train a little, the best go on from where they are.

Who goes on is read from what runs came to at their rungs, so that it is the same whenever it is asked.
"""

from collections.abc import Mapping, Sequence

from experiments.sweep.plan import Run
from experiments.sweep.records import Records, Standing


def best_first(values: Mapping[int, float | None], maximise: bool) -> list[int]:
    """Settings by their metric; of equal ones the first in the sweep is the better. None has no place.

    Example:
        >>> best_first({0: 1.0, 1: 3.0, 2: None, 3: 3.0}, maximise=True)
        [1, 3, 0]
    """
    known = {setting: value for setting, value in values.items() if value is not None}
    return sorted(known, key=lambda s: (-known[s] if maximise else known[s], s))


def mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where a value is missing: a setting that failed with a seed is not compared."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def settings_of(runs: Sequence[Run]) -> dict[int, list[Run]]:
    """Runs by their setting, in order."""
    out: dict[int, list[Run]] = {}
    for run in runs:
        out.setdefault(run.setting, []).append(run)
    return out


def at_rung(records: Records, rung: int) -> list[Run]:
    """The runs that train up to rung number `rung`: of those of the rung below the best 1/eta, at least one.

    A run that failed below counts among those that are divided, but never goes on.
    """
    runs = list(records.plan.runs)
    assert records.spec.halving is not None
    for generations in records.spec.rungs[:rung]:
        settings = settings_of(runs)
        values = {
            setting: mean([records.rung_value(run, generations)[1] for run in own])
            for setting, own in settings.items()
        }
        kept = max(1, len(settings) // records.spec.halving.eta)
        going = best_first(values, records.spec.maximise)[:kept]
        runs = [run for run in runs if run.setting in set(going)]
    return runs


def settled(records: Records, rung: int) -> bool:
    """Whether all runs of a rung came to its end, or failed."""
    generations = records.spec.rungs[rung]
    return all(
        records.rung_value(run, generations)[0] or records.failure(run) is not None
        for run in at_rung(records, rung)
    )


def standings(records: Records) -> list[Standing]:
    """How far each run is; with halving also which were dropped."""
    found = [records.standing(run) for run in records.plan.runs]
    rung, rungs = 0, records.spec.rungs
    while rung + 1 < len(rungs) and settled(records, rung):
        rung += 1
    if rung == 0:
        return found
    going = {run.id for run in at_rung(records, rung)}
    return [
        one._replace(state="dropped") if one.state == "queued" and one.run.id not in going else one
        for one in found
    ]
