"""`eggroll report RUN...`: curves of runs, compared, as a PNG and one self-contained HTML page.

Runs whose settings differ in nothing but the seed are one curve: their mean, and a band from the
lowest to the highest of them.
"""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tyro.conf import Positional

from experiments.run.drivers import FOLDERS, find_driver
from experiments.run.errors import UsageError, suggestion
from experiments.run.fields import Place, Role, flat, places
from experiments.run.folder import (
    full_disk_in_one_sentence,
    is_number,
    kind_of,
    read_config,
    read_result,
    write_whole,
)
from experiments.run.metrics import Row, expect_names, read_metrics, seconds_of
from experiments.run.plots import column, finish

X_LABELS = {
    "generation": "generations",
    "environment_steps": "environment steps",
    "seconds": "seconds of training",
}
COLORS = ("#4C78A8", "#E4572E", "#54A24B", "#B279A2", "#F2A541", "#439894", "#8A8A8A", "#9D755D")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Draw the curves of runs as report.png and report.html."""

    runs: Positional[tuple[Path, ...]]
    """Run folders."""
    out: Path | None = None
    """Folder to write to; that of the first run by default."""
    y: str | None = None
    """Metric to draw; the held-out one by default."""
    x: Literal["generation", "environment_steps", "seconds"] = "generation"
    """What to draw it against."""
    names: tuple[str, ...] = ()
    """What the runs are called, in their order; by default what tells their settings apart."""


# A label of settings that is longer gives way to the name of the folder; two columns of a legend hold
# labels of so many letters side by side.
LONGEST_LABEL, SIDE_BY_SIDE = 50, 40


class Run(NamedTuple):
    """One run as it was found. `x` [points], `y` [points, seeds]."""

    path: Path
    config: dict[str, Any]
    result: dict[str, Any] | None
    x: np.ndarray
    y: np.ndarray


class Group(NamedTuple):
    """Runs that differ in their seed alone, on one grid. `x` [points], `y` [points, seeds]."""

    label: str
    runs: list[Run]
    x: np.ndarray
    y: np.ndarray


def report(settings: Settings) -> list[Path]:
    """Write report.png and report.html; returns their paths.

    Raises:
        UsageError: for a folder that holds no run, or a metric that a run does not have.
    """
    if not settings.runs:
        raise UsageError("name at least one run folder")
    if settings.names and len(settings.names) != len(settings.runs):
        raise UsageError(
            f"--names gives {len(settings.names)} names for {len(settings.runs)} runs: give one for each"
        )
    y = settings.y or held_out_name(settings.runs[0])
    runs = [read_run(path, settings.x, y) for path in settings.runs]
    groups = group(runs, settings.names)
    out = settings.out or settings.runs[0]
    png, page = out / "report.png", out / "report.html"
    with full_disk_in_one_sentence(out):
        out.mkdir(parents=True, exist_ok=True)
        draw(groups, settings.x, y, png)
        text = as_html(groups, settings.x, y, png.read_bytes())
        write_whole(page, lambda file: file.write(text.encode()))
    return [png, page]


def held_out_name(path: Path) -> str:
    """The first metric of a run whose name begins with held_out."""
    read_config(path)  # says so where this is no run
    rows = read_metrics(path / "metrics.jsonl")
    names = [name for name in (rows[0] if rows else {}) if name.startswith("held_out")]
    if not names:
        raise UsageError(f"{path} has no metric rows with a held-out value; name one with --y")
    return names[0]


def read_run(path: Path, x: str, y: str) -> Run:
    """A run's curve: the rows that have a value, and the final one of its result."""
    config, result = read_config(path), read_result(path)
    rows = read_metrics(path / "metrics.jsonl")
    if not rows:
        raise UsageError(f"{path} has no metric rows yet")
    if y not in rows[0]:
        raise UsageError(f"{path} has no metric {y!r}{suggestion(y, rows[0])}")
    if not (config.get("target") is None or is_number(config["target"])):
        raise UsageError(
            f"{path}/config.json: target is {kind_of(config['target'])}; a number or null is right"
        )
    expect_names(path / "metrics.jsonl", rows, [y])
    at = positions(rows, x, path / "metrics.jsonl")
    points = [i for i, row in enumerate(rows) if row[y] is not None]
    values = column([rows[i] for i in points], y) if points else np.zeros((0, 1))
    if result is not None and result.get(y) is not None:
        last = result.get("by_seed") or result[y]
        if points and (len(last) if isinstance(last, list) else 1) != values.shape[1]:
            raise UsageError(
                f"{path}/result.json and metrics.jsonl have {y} of other numbers of seeds"
            )
        points, values = [*points, len(rows)], np.concatenate([values, column([{y: last}], y)])
    return Run(path, config, result, at[points], values)


def positions(rows: Sequence[Row], x: str, path: Path = Path("metrics.jsonl")) -> np.ndarray:
    """Where the state before each row stands on the axis, and after the last one, float64 [rows + 1].

    Times are summed up row by row, so that a run that was stopped and continued counts its work alone.
    """
    if x == "generation":
        after = [row["generation"] + 1 for row in rows]
    elif x == "seconds":
        after = np.cumsum(seconds_of(path, rows)).tolist()
    elif x in rows[0]:
        expect_names(path, rows, [x])
        after = column(rows, x).mean(1).tolist()
    else:
        raise UsageError(f"--x {x}: these runs do not count it")
    return np.array([0, *after], float)


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
    essences = [essence(runs[0].config) for runs in found.values()]
    telling = [
        name
        for name in dict.fromkeys(name for one in essences for name in one)
        if len({repr(one.get(name)) for one in essences}) > 1
    ]
    groups = []
    for (key, runs), settings in zip(found.items(), essences, strict=True):
        x = np.unique(np.concatenate([run.x for run in runs]))
        # A run that ended early stays at its last value.
        y = np.stack([np.interp(x, run.x, one) for run in runs for one in run.y.T], axis=1)
        # The settings that tell it apart where they are few enough to read, its folder otherwise.
        label = ", ".join(f"{name}={settings[name]}" for name in telling if name in settings)
        if names:
            label = key
        elif not 0 < len(label) <= LONGEST_LABEL:
            label = runs[0].path.name
        groups.append(Group(label, runs, x, y))
    return groups


def essence(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide a run, but for the seed."""
    driver, known = config.get("driver"), dict[str, Place]()
    if driver in FOLDERS:
        kind = find_driver(driver).config
        known = {place.key: place._replace(path=(name,)) for name, place in places(kind).items()}
    found = {}
    for key, value in flat(config):
        place = known.get(key)
        if key not in ("seed", "seeds") and (place is None or place.role is Role.RESULT):
            # By the name of its flag.
            found[place.key if place else key] = value
    return found


def draw(groups: Sequence[Group], x: str, y: str, path: Path) -> None:
    """The curves of all groups in one picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for number, one in enumerate(groups):
        color = COLORS[number % len(COLORS)]
        seeds = one.y.shape[1]
        label = f"{one.label} ({seeds} seeds)" if seeds > 1 else one.label
        axes.plot(one.x, one.y.mean(1), color=color, lw=2, label=label)
        if seeds > 1:
            axes.fill_between(one.x, one.y.min(1), one.y.max(1), color=color, alpha=0.2, lw=0)
    for target in {run.config.get("target") for one in groups for run in one.runs}:
        if target is None:
            continue
        axes.axhline(target, color="#8A8A8A", lw=1, ls="--", zorder=0, label=f"target, {target:g}")
    axes.set_xlabel(X_LABELS[x])
    axes.set_ylabel(in_words(y))
    finish(axes)
    longest = max(len(text) for text in axes.get_legend_handles_labels()[1])
    columns = 2 if longest <= SIDE_BY_SIDE else 1
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    write_whole(path, lambda file: figure.savefig(file, format="png"))


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; }
table { border-collapse: collapse; margin: .5rem 0; }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid #ddd; }
"""


def as_html(groups: Sequence[Group], x: str, y: str, png: bytes) -> str:
    """The page: the picture, a table of the groups, and the settings of each run."""
    head = ("runs", "seeds", f"last {in_words(y)}, mean", "lowest to highest", X_LABELS[x])
    rows = [
        (
            one.label,
            one.y.shape[1],
            f"{one.y[-1].mean():.4g}",
            f"{one.y[-1].min():.4g} to {one.y[-1].max():.4g}",
            f"{max(run.x[-1] for run in one.runs):,.0f}",
        )
        for one in groups
    ]
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Runs compared</title>',
        f"<style>{STYLE}</style></head><body>\n<h1>Runs compared</h1>",
        f'<img alt="curves of {html.escape(in_words(y))}"',
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}">',
        table(rows, head),
    ]
    for run in (run for one in groups for run in one.runs):
        settings = {**essence(run.config), "seed": run.config.get("seed")}
        parts += [
            f"<details><summary>{html.escape(str(run.path))}</summary>",
            f"<p>{html.escape(sentence(run))}</p>{table(settings.items())}</details>",
        ]
    return "\n".join([*parts, "</body></html>\n"])


def table(rows: Iterable[Sequence[Any]], head: Sequence[str] = ()) -> str:
    """An HTML table; whatever is in a cell is text."""

    def line(cells: Sequence[Any], kind: str) -> str:
        return "".join(f"<{kind}>{html.escape(str(cell))}</{kind}>" for cell in cells)

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    top = f"<tr>{line(head, 'th')}</tr>" if head else ""
    return f"<table>{top}{body}</table>"


def in_words(metric: str) -> str:
    """The name of a metric for people.

    Example:
        >>> in_words("held_out_return")
        'held-out return'
    """
    return metric.replace("held_out", "held-out").replace("_", " ")


def sentence(run: Run) -> str:
    """What a run came to, in words."""
    return str(run.result["sentence"]) if run.result else "This run has not ended."
