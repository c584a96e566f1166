"""Runs on disk as curves, and grouped by their settings, for `eggroll report`."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.run.axes import SECONDS, Axis, positions
from experiments.run.driver import Figure
from experiments.run.drivers import FOLDERS, find_driver
from experiments.run.errors import UsageError, suggestion
from experiments.run.fields import Role, flat, places
from experiments.run.folder import is_number, kind_of, read_config, read_result
from experiments.run.metrics import Row, expect_names, read_metrics
from experiments.run.plots import column
from experiments.run.seeds import each

# A label of settings that is longer gives way to the name of the folder.
LONGEST_LABEL = 50
# Settings that name a method; they tell runs apart before others do.
METHODS = ("algorithm", "optimizer", "perturb", "model")


class Run(NamedTuple):
    """One run as it was found. `x` and `seconds` [points], `y` [points, seeds].

    `of` is the number of questions that the metric is a share of, if it is one and they are known;
    `figure` is what the run is judged by, where the metric is that.
    """

    path: Path
    config: dict[str, Any]
    result: dict[str, Any] | None
    x: np.ndarray
    y: np.ndarray
    seconds: np.ndarray
    of: int | None = None
    figure: Figure | None = None


class Group(NamedTuple):
    """Runs that differ in their seed alone, on one grid. `x` [points], `y` [points, seeds]."""

    label: str
    runs: list[Run]
    x: np.ndarray
    y: np.ndarray


def read_run(path: Path, axis: Axis, y: str) -> Run:
    """A run's curve: the rows that have a value, and the final one of its result."""
    config, result = read_config(path), read_result(path)
    rows = read_metrics(path / "metrics.jsonl")
    if not rows:
        raise UsageError(f"{path} has no metric rows yet")
    if y not in rows[0]:
        raise UsageError(f"{path} has no metric {y!r}{suggestion(y, rows[0])}")
    if not (target_of(config) is None or is_number(target_of(config))):
        raise UsageError(
            f"{path}/config.json: target must be a number or null, got {kind_of(target_of(config))}"
        )
    expect_names(path / "metrics.jsonl", rows, [y])
    at = positions(rows, axis, path / "metrics.jsonl")
    seconds = positions(rows, SECONDS, path / "metrics.jsonl")
    points = [i for i, row in enumerate(rows) if row[y] is not None]
    values = column([rows[i] for i in points], y) if points else np.zeros((0, 1))
    figure = figure_of(config)
    figure = figure if figure and figure.name == y else None
    last = (result or {}).get("by_seed" if figure and values.shape[1] > 1 else y)
    # Of several seeds result.json has the mean alone, but for the driver's figure.
    if last is not None and (figure or values.shape[1] == 1):
        if points and len(each(last)) != values.shape[1]:
            raise UsageError(
                f"{path}/result.json and metrics.jsonl have {y} of other numbers of seeds"
            )
        final = column([{y: last}], y)
        points, values = (
            [*points, len(rows)],
            np.concatenate([values, final] if points else [final]),
        )
    of = questions_of(path, config, rows) if "accuracy" in y and "held_out" in y else None
    return Run(path, config, result, at[points], values, seconds[points], of, figure)


def figure_of(config: Mapping[str, Any]) -> Figure | None:
    """What a run is judged by, from its config.json; None for a driver that is not known."""
    driver = config.get("driver")
    return find_driver(driver).figure if isinstance(driver, str) and driver in FOLDERS else None


def target_of(config: Mapping[str, Any]) -> Any:
    """The target in a run's settings, at whatever depth; None for none."""
    return setting(config, "target")


def questions_of(path: Path, config: Mapping[str, Any], rows: Sequence[Row]) -> int | None:
    """How many questions a held-out share is of, from the rows or the settings, if either says it."""
    counted, name = rows[0].get("held_out_count"), "held_out_questions"
    count = setting(config, name) if counted is None else counted
    if count is not None and (not isinstance(count, int) or count < 1):
        raise UsageError(
            f"{path}: {name if counted is None else 'held_out_count'} must be a whole number of at least 1, "
            f"got {kind_of(count)}"
        )
    return count


def setting(config: Mapping[str, Any], name: str) -> Any:
    """A setting by the last part of its dotted name, at whatever depth; None where there is none.

    Example:
        >>> setting({"stop": {"target": 3.0}}, "target"), setting({}, "target")
        (3.0, None)
    """
    found = (v for k, v in essence(config, every=True).items() if k.rpartition(".")[2] == name)
    return next(found, None)


def group(runs: Sequence[Run], names: Sequence[str] = ()) -> list[Group]:
    """Runs by their settings without the seed, named by the settings that tell them apart.

    Args:
        runs: in any order.
        names: what they are called instead; runs of one name are one group.
    """
    found: dict[str, list[Run]] = {}
    for number, run in enumerate(runs):
        key = names[number] if names else repr(sorted(essence(run.config).items()))
        found.setdefault(key, []).append(run)
    labels = telling([essence(own[0].config) for own in found.values()])
    groups = []
    for (key, own), label in zip(found.items(), labels, strict=True):
        x = np.unique(np.concatenate([run.x for run in own]))
        # A run that ended early stays at its last value.
        y = np.stack([on_grid(x, run.x, one) for run in own for one in run.y.T], axis=1)
        if names:
            label = key
        elif not 0 < len(label) <= LONGEST_LABEL:
            label = own[0].path.name
        groups.append(Group(label, own, x, y))
    return groups


def on_grid(x: np.ndarray, at: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A curve at other places, on the line between its finite points."""
    known = np.isfinite(values)
    if not known.any():
        return np.full(len(x), np.nan)
    return np.interp(x, at[known], values[known])


def telling(essences: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each of several settings the fewest fields that tell it from all others, in words.

    Example:
        >>> es = {"algorithm": "es", "rank": 1}
        >>> telling([es, {**es, "rank": 2}, {**es, "algorithm": "ppo"}])
        ['algorithm=es, rank=1', 'algorithm=es, rank=2', 'algorithm=ppo']
        >>> telling([{"rank": 1}])
        ['']
    """
    every = dict.fromkeys(name for one in essences for name in one)
    differ = [name for name in every if len({repr(one.get(name)) for one in essences}) > 1]
    differ.sort(key=lambda name: METHODS.index(name) if name in METHODS else len(METHODS))
    value = lambda one, fields: tuple(repr(one.get(name)) for name in fields)
    candidates = (
        fields for count in (1, 2, 3) for fields in itertools.combinations(differ[:20], count)
    )
    chosen = next(
        (
            fields
            for fields in candidates
            if len({value(one, fields) for one in essences}) == len(essences)
        ),
        tuple(differ),
    )
    labels = []
    for one in essences:
        # What is its own already is not told further: PPO has no rank to speak of.
        count = next(
            n
            for n in range(1, len(chosen) + 2)
            if n > len(chosen)
            or sum(value(other, chosen[:n]) == value(one, chosen[:n]) for other in essences) == 1
        )
        labels.append(", ".join(f"{name}={one[name]}" for name in chosen[:count] if name in one))
    return labels


def essence(config: Mapping[str, Any], *, every: bool = False) -> dict[str, Any]:
    """The settings that decide a run, but for the seed, by the names of their flags; or every one."""
    driver, known = config.get("driver"), dict[str, tuple[str, Role]]()
    if isinstance(driver, str) and driver in FOLDERS:
        at = places(find_driver(driver).config)
        known = {place.key: (name, place.role) for name, place in at.items()}
    found = {}
    for key, value in flat(config):
        name, role = known.get(key, (key, Role.RESULT))
        if every or (role is Role.RESULT and key not in ("seed", "seeds")):
            found[name] = value
    return found
