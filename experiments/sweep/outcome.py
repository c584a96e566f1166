"""What a sweep came to: the best settings, and which settings the metric depends on."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.run.folder import write_json, write_whole
from experiments.sweep.halving import best_first, mean, settings_of
from experiments.sweep.plan import Run
from experiments.sweep.records import Records, plain
from experiments.sweep.status import markdown, print_table, shown


class Best(NamedTuple):
    """A setting all of whose runs are done: the metric's mean over its seeds, and each."""

    runs: Sequence[Run]
    mean: float
    each: Sequence[float | None]


def best(records: Records) -> list[Best]:
    """All settings whose runs are done, with a finite metric, the best first; ties in the sweep's order."""
    values: dict[int, list[float | None]] = {}
    runs = settings_of(records.plan.runs)
    for setting, own in runs.items():
        if all(records.finished(run) for run in own):
            values[setting] = [records.value(run) for run in own]
    means = {setting: mean(each) for setting, each in values.items()}
    order = best_first(means, records.spec.maximise)
    return [Best(runs[s], means[s], values[s]) for s in order]  # type: ignore[arg-type]


def write_outcome(records: Records) -> list[Path]:
    """Prints the table of the best, and writes best.json, best.md and, of enough settings, importance.json
    and importance.png.

    Returns:
        The files.
    """
    spec = records.spec
    found = best(records)
    if not found:
        return []
    axes = [axis.field for axis in spec.axes]
    seeds = [f"seed {run.seed}" for run in found[0].runs] if len(spec.seeds) > 1 else []
    head = ["place", *axes, f"{spec.metric}{', mean' * bool(seeds)}", *seeds]
    rows = [
        [
            str(place),
            *(shown(one.runs[0].values[name]) for name in axes),
            shown(one.mean),
            *(shown(value) for value in (one.each if seeds else ())),
        ]
        for place, one in enumerate(found[: spec.top], 1)
    ]
    print_table(head, rows)
    goal = "highest" if spec.maximise else "lowest"
    content = {
        "metric": spec.metric,
        "goal": f"{goal} first",
        "settings": [
            {
                "settings": {name: plain(value) for name, value in one.runs[0].values.items()},
                "mean": one.mean,
                "seeds": {str(run.seed): v for run, v in zip(one.runs, one.each, strict=True)},
                "runs": [run.id for run in one.runs],
            }
            for one in found
        ],
    }
    paths = [spec.out / "best.json", spec.out / "best.md"]
    write_json(paths[0], content)
    text = markdown(head, rows) + "\n"
    write_whole(paths[1], lambda file: file.write(text.encode()))
    return paths + _importance(records)


def _importance(records: Records) -> list[Path]:
    from experiments.sweep.importance import LEAST, draw, importances

    spec, (values, when) = records.spec, compared(records)
    settings = settings_of(records.plan.runs)
    varied = {
        axis.field: [settings[s][0].values[axis.field] for s in values]
        for axis in spec.axes
        if len({repr(settings[s][0].values[axis.field]) for s in values}) > 1
    }
    if len(values) < LEAST or not varied:
        print(
            f"Which settings matter is told of {LEAST} settings that are done, or more.",
            file=sys.stderr,
        )
        return []
    found = importances(varied, list(values.values()), spec.maximise)
    paths = [spec.out / "importance.json", spec.out / "importance.png"]
    told = {one.field: {k: v for k, v in one._asdict().items() if k != "field"} for one in found}
    write_json(paths[0], {"of": when, "settings": told})
    ranges = {"uniform": "linear", "log-uniform": "log"}
    scales = {axis.field: ranges[axis.kind] for axis in spec.axes if axis.kind in ranges}
    draw(paths[1], found, varied, list(values.values()), spec.metric, when, scales)
    return paths


def compared(records: Records) -> tuple[dict[int, float | None], str]:
    """The metric of every setting that can be compared with all others, mean over seeds, and when it is of.

    With successive halving that is the lowest rung: the others have only those in them that were good there.
    """
    values: dict[int, float | None] = {}
    rungs = records.spec.rungs
    for setting, own in settings_of(records.plan.runs).items():
        if rungs:
            found = [records.rung_value(run, rungs[0]) for run in own]
            if all(there for there, _ in found):
                values[setting] = mean([value for _, value in found])
        elif all(records.finished(run) for run in own):
            values[setting] = mean([records.value(run) for run in own])
    return values, f"after {rungs[0]} generations" if rungs else "at the end"
