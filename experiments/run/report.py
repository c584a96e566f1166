"""`eggroll report RUN...`: curves of runs, compared, as a PNG and one self-contained HTML page.

Runs whose settings differ in nothing but the seed are one curve: their mean, and a band from the
lowest to the highest of them; where a single curve is a share of a number of questions, the band is what 95
of 100 other sets of as many questions would give.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from tyro.conf import Positional

from experiments.run.axes import AXES, Axis, usual_axis
from experiments.run.canvas import (
    COLORS,
    GREY,
    count_axis,
    finish,
    label_axes,
    legend_below,
    literal,
    new_figure,
    save,
    short,
    title_above,
)
from experiments.run.compared import (
    Group,
    Run,
    essence,
    figure_of,
    group,
    on_grid,
    read_run,
    setting,
    target_of,
)
from experiments.run.errors import UsageError
from experiments.run.fields import check_ranges
from experiments.run.folder import full_disk_in_one_sentence, read_config, write_whole
from experiments.run.metrics import read_metrics
from experiments.run.page import Details, Point, Series, as_html
from experiments.run.plots import (
    BAND_ROOM,
    CHANCE_ROOM,
    mark_outliers,
    mean_of,
    usual_range,
    widened,
    wilson,
    with_target,
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Draw the curves of runs as report.png and report.html."""

    runs: Positional[tuple[Path, ...]]
    """Run folders."""
    out: Path | None = None
    """Folder to write to; that of the first run by default."""
    y: str | None = None
    """Metric to draw; the held-out one by default."""
    x: (
        Literal["generation", "environment_steps", "bytes_read", "generated_tokens", "seconds"]
        | None
    ) = None
    """What to draw it against; by default what all runs count, else seconds (generations for one run)."""
    names: tuple[str, ...] = ()
    """What the runs are called, in their order; by default what tells their settings apart."""


def report(settings: Settings) -> list[Path]:
    """Write report.png and report.html; returns their paths.

    Raises:
        UsageError: for a folder that holds no run, or a metric that a run does not have.
    """
    check_ranges(settings)
    if not settings.runs:
        raise UsageError("name at least one run folder")
    if settings.names and len(settings.names) != len(settings.runs):
        raise UsageError(
            f"--names gives {len(settings.names)} names for {len(settings.runs)} runs: give one for each"
        )
    y = settings.y or held_out_name(settings.runs[0])
    axis = AXES[settings.x] if settings.x else chosen_axis(settings.runs)
    runs = [read_run(path, axis, y) for path in settings.runs]
    groups = group(runs, settings.names)
    out = settings.out or settings.runs[0]
    png, page = out / "report.png", out / "report.html"
    with full_disk_in_one_sentence(out):
        out.mkdir(parents=True, exist_ok=True)
        picture = draw(groups, axis, y)
        text = page_of(groups, axis, y, picture)
        write_whole(png, lambda file: file.write(picture.png))
        write_whole(page, lambda file: file.write(text.encode()))
    return [png, page]


def held_out_name(path: Path) -> str:
    """What a run is judged by; of an unknown driver, the first metric whose name begins with held_out."""
    figure = figure_of(read_config(path))
    if figure:
        return figure.name
    rows = read_metrics(path / "metrics.jsonl")
    names = [name for name in (rows[0] if rows else {}) if name.startswith("held_out")]
    if not names:
        raise UsageError(f"{path} has no metric rows with a held-out value; name one with --y")
    return names[0]


def chosen_axis(paths: Sequence[Path]) -> Axis:
    """What runs are drawn over where nobody says it."""
    methods = {repr(sorted(essence(read_config(path)).items())) for path in paths}
    return usual_axis([read_metrics(path / "metrics.jsonl") for path in paths], len(methods))


class Picture(NamedTuple):
    """The curves of all groups: as PNG, as SVG, and what can be pointed at in it."""

    png: bytes
    svg: str
    series: list[Series]


class _Band(NamedTuple):
    low: np.ndarray
    high: np.ndarray


def draw(groups: Sequence[Group], axis: Axis, y: str) -> Picture:
    """The curves of all groups in one picture."""
    figure = new_figure()
    axes = figure.add_subplot()
    middles = [mean_of(one.y) for one in groups]
    bands = [band(one) for one in groups]
    colors = [COLORS[number % len(COLORS)] for number in range(len(groups))]
    for number, (one, middle, edges) in enumerate(zip(groups, middles, bands, strict=True)):
        style = ("-", "--", ":", "-.")[number // len(COLORS) % 4]
        label, marker = literal(named(one)), "o" if len(one.x) == 1 else None
        axes.plot(one.x, middle, style, color=colors[number], lw=2, marker=marker, label=label)
        if edges is not None:
            axes.fill_between(one.x, *edges, color=colors[number], alpha=0.18, lw=0)
    for several, label in ((False, "95% by chance"), (True, "lowest to highest seed")):
        pairs = zip(groups, bands, strict=True)
        if any(edges is not None and (one.y.shape[1] > 1) == several for one, edges in pairs):
            axes.fill_between([], [], [], color=GREY, alpha=0.3, lw=0, label=label)
    if not any(np.isfinite(middle).any() for middle in middles):
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", color=GREY)
    finish(axes)
    low, high = usual_range(np.concatenate(middles) if middles else np.empty(0))
    height = high - low
    for one, edges in zip(groups, bands, strict=True):
        if edges is not None:
            room = CHANCE_ROOM if one.y.shape[1] == 1 else 2 * BAND_ROOM
            low, high = widened(low, high, edges, room * height)
    for target in sorted({t for one in groups if (t := target_of_group(one)) is not None}):
        low, high = with_target(axes, target, low, high)
    axes.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    for one, middle, color in zip(groups, middles, colors, strict=True):
        mark_outliers(axes, one.x, middle, color)
    count_axis(axes)
    legend_below(figure, axes)
    title_above(figure, title_of(groups, y))
    label_axes(figure, axes, axis.words, in_words(y))

    # Both files are of one layout, which the places of the points belong to.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    png, svg = io.BytesIO(), io.BytesIO()
    save(figure, png)
    save(figure, svg, "svg")
    place = axes.transData + figure.transFigure.inverted()
    series = []
    for one, middle, edges, color in zip(groups, middles, bands, colors, strict=True):
        points = []
        for i in np.flatnonzero(np.isfinite(middle)):
            across, up = place.transform((one.x[i], middle[i]))
            span = None if edges is None else (float(edges.low[i]), float(edges.high[i]))
            points.append(
                Point(float(across), 1 - float(up), float(one.x[i]), float(middle[i]), span)
            )
        series.append(Series(named(one), color, points))
    return Picture(png.getvalue(), svg.getvalue().decode(), series)


def named(one: Group) -> str:
    """A group's name in the legend."""
    seeds = one.y.shape[1]
    return f"{one.label} ({seeds} seeds)" if seeds > 1 else one.label


def title_of(groups: Sequence[Group], y: str) -> str:
    """What all runs learn, where their settings name it."""
    for name in ("env", "task", "data"):
        found = {repr(setting(run.config, name)) for one in groups for run in one.runs}
        value = next((setting(run.config, name) for one in groups for run in one.runs), None)
        if len(found) == 1 and isinstance(value, str) and value:
            return f"{in_words(y)} on {value}"
    return ""


def band(one: Group) -> _Band | None:
    """From the lowest to the highest seed, or of one curve what chance makes of it, if that is known."""
    if one.y.shape[1] > 1:
        known = np.isfinite(one.y)
        some = known.any(1)
        low = np.where(some, np.where(known, one.y, np.inf).min(1), np.nan)
        high = np.where(some, np.where(known, one.y, -np.inf).max(1), np.nan)
        return _Band(low, high)
    of = one.runs[0].of if one.runs else None
    return None if of is None else _Band(*wilson(one.y[:, 0], of))


def target_of_group(one: Group) -> float | None:
    """The target of a group's runs, if it is one of the metric that is drawn."""
    judged = bool(one.runs) and one.runs[0].figure is not None
    target = target_of(one.runs[0].config) if judged else None
    return None if target is None else float(target)


def reached_at(
    at: Float[np.ndarray, "points"],
    values: Float[np.ndarray, "points"],
    target: float,
    better: Literal["larger", "smaller"] = "larger",
) -> float | None:
    """Where a curve is at its target for the first time, among its measurements; None for nowhere.

    Example:
        >>> reached_at(np.array([0.0, 10.0, 20.0]), np.array([1.0, 5.0, 4.0]), 4.5)
        10.0
    """
    good = values >= target if better == "larger" else values <= target
    return float(at[int(good.argmax())]) if good.any() else None


def to_the_target(one: Group, axis: Axis) -> str:
    """When a group's seeds reached the target, on the axis and in seconds, in words."""
    target = target_of_group(one)
    if target is None:
        return ""
    found = [
        (
            reached_at(run.x, values, target, run.figure.better),
            reached_at(run.seconds, values, target, run.figure.better),
        )
        for run in one.runs
        if run.figure
        for values in run.y.T
    ]
    there = [(x, seconds) for x, seconds in found if x is not None and seconds is not None]
    if not there:
        return "not reached"
    x, seconds = np.mean(there, axis=0)
    words = f"{short(float(x))} {axis.words}, " if axis.name != "seconds" else ""
    words += f"{seconds:,.1f} s"
    return words if len(found) == 1 else f"{words} ({len(there)} of {len(found)} seeds)"


def page_of(groups: Sequence[Group], axis: Axis, y: str, picture: Picture) -> str:
    """The page: the picture, a table of the groups, and what each run has."""
    common = min((float(one.x[-1]) for one in groups if len(one.x)), default=0.0)
    head = ["runs", "seeds", f"last {in_words(y)}, mean", "lowest to highest"]
    head += ["95% by chance"] if any(one.runs and one.runs[0].of for one in groups) else []
    head += [f"at {short(common)} {axis.words}"] if len(groups) > 1 else []
    aimed = any(target_of_group(one) is not None for one in groups)
    head += ["first at the target, mean"] if aimed else []
    head += [axis.words]
    rows = []
    for one in groups:
        last = one.y[-1:] if len(one.x) else np.full((1, 1), np.nan)
        row = [one.label, str(one.y.shape[1]), number(mean_of(last)[0])]
        known = last[np.isfinite(last)]
        row += [f"{number(known.min())} to {number(known.max())}" if known.size else ""]
        of = one.runs[0].of if one.runs else None
        if "95% by chance" in head:
            edges = wilson(mean_of(last), of) if of else None
            row += [f"{number(edges[0][0])} to {number(edges[1][0])}" if edges else ""]
        if len(groups) > 1:
            row += [number(float(on_grid(np.array([common]), one.x, mean_of(one.y))[0]))]
        row += [to_the_target(one, axis)] if aimed else []
        rows.append([*row, f"{max((run.x[-1] for run in one.runs if len(run.x)), default=0):,.0f}"])
    details = [
        Details(run.path, sentence(run), {**essence(run.config), "seed": run.config.get("seed")})
        for one in groups
        for run in one.runs
    ]
    alt = f"curves of {in_words(y)}"
    return as_html(alt, axis.words, picture.svg, picture.series, head, rows, details)


def number(value: float) -> str:
    """A figure of the table."""
    return f"{value:.4g}" if np.isfinite(value) else "not finite"


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
