"""Learning curves, drawn from metric rows. Matplotlib is imported only here, and without a screen."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from experiments.run.axes import GENERATIONS, Axis, positions
from experiments.run.canvas import (
    GREY,
    HELD_OUT,
    POPULATION,
    count_axis,
    finish,
    label_axes,
    legend_below,
    lines_at_right,
    literal,
    new_figure,
    save,
    title_above,
)
from experiments.run.folder import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A figure of a row: a number, nothing, or one for each of several seeds.
Value = float | int | None | Sequence[float | int | None]

# Values so many times the middle range (5% to 95%) beyond it are left out of the range of an axis.
OUTLIER = 10.0
# How far a band from worst to best, one of chance, a target, and lines to compare with may widen an axis, in
# heights of the curve.
BAND_ROOM, CHANCE_ROOM, TARGET_ROOM, MARK_ROOM = 0.25, 3.0, 4.0, 1.5


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What a learning curve shows, in the words of the method.

    Attributes:
        name: of the figure in the rows, such as "held_out_return".
        words: the figure and its unit, for the axis.
        who: what is trained, such as "mean policy", "policy", "classifier" or "model".
        target: a value to reach, if any.
        x: what it is drawn over.
        population: draw `fitness_mean`, `fitness_std`, `fitness_worst` and `fitness_best` of the rows too;
            they must be figures of the same kind.
        training: another figure of the same kind that rows have of training, and what it is called, such as
            ("episode_return", "training episodes"); None for none.
        of: how many questions (images, episodes) the figure is a share of; None for what is no share.
        marks: values to compare with, by name.

    Example:
        >>> curve = Curve(name="held_out_accuracy", words="share of digits that are right", of=360)
        >>> low, high = curve.by_chance(np.array([0.5]))
        >>> float(low[0].round(3)), float(high[0].round(3))
        (0.449, 0.551)
    """

    name: str
    words: str
    who: str = "model"
    target: float | int | None = None
    x: Axis = GENERATIONS
    population: bool = False
    training: tuple[str, str] | None = None
    of: int | None = None
    marks: Mapping[str, float | int] = field(default_factory=dict)

    def by_chance(
        self, shares: Float[np.ndarray, "points"]
    ) -> tuple[Float[np.ndarray, "points"], Float[np.ndarray, "points"]]:
        """What 95 of 100 other sets of as many questions would give: the lower and the upper end."""
        assert self.of is not None
        return wilson(shares, self.of)


class _Population(NamedTuple):
    """Scores of the members, each [rows]."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    worst: np.ndarray
    best: np.ndarray


def learning_curve(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    curve: Curve,
    title: str,
    final: tuple[int, Value],
) -> None:
    """Draw a figure of the rows, and what the population scored, as a PNG.

    Args:
        path: the PNG to write.
        rows: metric rows. A value may be None, or a list with one for each of several seeds: their mean is
            drawn, and each faintly.
        curve: what is drawn.
        title: what the run came to.
        final: generations done, and the figure after them.
    """
    figure = new_figure()
    axes = figure.add_subplot()
    ends = positions(rows, curve.x, path.with_name("metrics.jsonl"))

    found = _population(rows, ends) if curve.population else None
    if found is not None:
        _draw_population(axes, found)
    if curve.training is not None:
        name, called = curve.training
        scores = _means(rows, name)
        if np.isfinite(scores).any():
            axes.plot(ends[:-1], scores, color=POPULATION, lw=1.2, label=literal(called))

    # What a row measured is of the state before it.
    measured = [i for i, row in enumerate(rows) if row.get(curve.name) is not None]
    at = np.array([*(ends[i] for i in measured), ends[-1]])
    values = column([*(rows[i] for i in measured), {curve.name: final[1]}], curve.name)
    middle = mean_of(values)
    known = np.isfinite(middle)
    at, values, middle = at[known], values[known], middle[known]
    if curve.of is not None and at.size:
        low, high = curve.by_chance(middle)
        label = f"95% by chance, {curve.of:,} questions"
        axes.fill_between(at, low, high, color=HELD_OUT, alpha=0.15, lw=0, label=label)
    # A point for each measurement, as long as points can be told apart.
    marker = "o" if len(at) <= 40 else None
    label = literal(f"{curve.who}, held out")
    if not known.all() and not known[-1]:
        label += " (not finite at the end)"
    axes.plot(at, middle, color=HELD_OUT, lw=2, marker=marker, ms=4, label=label)
    if values.shape[1] > 1:
        axes.plot(at, values, color=HELD_OUT, lw=0.8, alpha=0.4)

    finish(axes)
    _limit(axes, curve, middle, values, found)
    mark_outliers(axes, at, middle, HELD_OUT)
    if not at.size:
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", color=GREY)
    count_axis(axes)
    legend_below(figure, axes)
    title_above(figure, title)
    label_axes(figure, axes, curve.x.words, curve.words)
    write_whole(path, lambda file: save(figure, file))


def _population(rows: Sequence[Mapping[str, Any]], ends: np.ndarray) -> _Population | None:
    """Scores of the members, if the rows have them."""
    names = ("fitness_mean", "fitness_std", "fitness_worst", "fitness_best")
    if not rows or any(name not in rows[0] for name in names):
        return None
    mean, std, worst, best = (_means(rows, name) for name in names)
    low, high = np.maximum(mean - std, worst), np.minimum(mean + std, best)
    return _Population(ends[:-1], mean, low, high, worst, best)


def _draw_population(axes: "Axes", found: _Population) -> None:
    shade: dict[str, Any] = {"color": POPULATION, "lw": 0}
    axes.fill_between(
        found.x, found.worst, found.best, alpha=0.1, label="population, worst to best", **shade
    )
    axes.fill_between(
        found.x, found.low, found.high, alpha=0.25, label="one standard deviation", **shade
    )
    marker = "o" if len(found.x) == 1 else None
    axes.plot(
        found.x, found.mean, color=POPULATION, lw=1.5, marker=marker, ms=4, label="population, mean"
    )


def _limit(
    axes: "Axes",
    curve: Curve,
    middle: np.ndarray,
    values: np.ndarray,
    found: _Population | None,
) -> None:
    """Sets the range of the y axis by the curve, and draws the target and the lines to compare with."""
    own = [middle, values.ravel()]
    if found is not None:
        own += [found.mean, found.low, found.high]
    low, high = usual_range(np.concatenate(own))
    height = high - low
    if found is not None:
        low, high = widened(low, high, [found.worst, found.best], BAND_ROOM * height)
    if curve.of is not None:
        low, high = widened(low, high, curve.by_chance(middle), CHANCE_ROOM * height)
    low, high = with_target(axes, curve.target, low, high)
    near = {n: v for n, v in curve.marks.items() if -MARK_ROOM < (v - low) / height < 1 + MARK_ROOM}
    if not middle.size:
        near = {}
    low, high = min([low, *near.values()]), max([high, *near.values()])
    pad = 0.04 * (high - low)
    axes.set_ylim(low - pad, high + pad)
    lines_at_right(axes, near)


def widened(
    low: float, high: float, bands: Sequence[np.ndarray], room: float
) -> tuple[float, float]:
    """The range with the edges of bands in it, but no more than `room` wider on either side.

    Example:
        >>> widened(0.0, 1.0, [np.array([-9.0]), np.array([1.1])], 0.25)
        (-0.25, 1.1)
    """
    edges = np.concatenate(bands)
    edges = edges[np.isfinite(edges)]
    if not edges.size:
        return low, high
    return (
        max(min(low, float(edges.min())), low - room),
        min(max(high, float(edges.max())), high + room),
    )


def with_target(
    axes: "Axes", target: float | int | None, low: float, high: float
) -> tuple[float, float]:
    """The range with the target in it, unless that would press the curve flat; draws its line.

    Where it is left out the legend says on which side it is.
    """
    if target is None:
        return low, high
    seen = -TARGET_ROOM < (target - low) / (high - low) < 1 + TARGET_ROOM
    label = f"target, {target:g}"
    if not seen:
        label += " (above the picture)" if target > high else " (below the picture)"
    axes.axhline(target, color=GREY, lw=1, ls="--", zorder=0, label=label)
    if seen:
        low, high = min(low, target), max(high, target)
    return low, high


def usual_range(values: np.ndarray) -> tuple[float, float]:
    """From the lowest to the highest value, but for those far beyond the middle nine tenths.

    Example:
        >>> usual_range(np.array([1.0, 2.0, 3.0])), usual_range(np.array([*range(40), 1e9]))
        ((1.0, 3.0), (0.0, 39.0))
        >>> usual_range(np.array([np.nan, 2.0]))
        (1.95, 2.05)
    """
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    # Of few values one is an outlier already: by quartiles, they say nothing of it.
    share = 0.05 if values.size >= 20 else 0.25
    first, last = np.quantile(values, [share, 1 - share])
    reach = OUTLIER * (last - first)
    kept = values[(values >= first - reach) & (values <= last + reach)]
    low, high = float(kept.min()), float(kept.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        # A curve that is flat stands in the middle.
        room = 0.025 * abs(low) or 0.5
        low, high = low - room, high + room
    return low, high


def mark_outliers(axes: "Axes", at: np.ndarray, values: np.ndarray, color: str) -> None:
    """Points beyond the picture as triangles on its edge, with the value of the farthest."""
    low, high = axes.get_ylim()
    for beyond, edge, marker, align in (
        (values > high, high, "^", "top"),
        (values < low, low, "v", "bottom"),
    ):
        if not beyond.any():
            continue
        edges = np.full(int(beyond.sum()), edge)
        axes.plot(at[beyond], edges, marker, color=color, ms=7, clip_on=False, zorder=5)
        far = int(np.argmax(np.where(beyond, np.abs(values), -math.inf)))
        left = at[far] <= np.mean(axes.get_xlim())
        shift = (8, -3) if left else (-8, -3)
        axes.annotate(
            f"{values[far]:.3g}",
            (at[far], edge),
            xytext=(shift[0], shift[1] if align == "top" else 3),
            textcoords="offset points",
            ha="left" if left else "right",
            va=align,
            fontsize=8,
            color=color,
        )


def wilson(
    shares: Float[np.ndarray, "points"], of: int, z: float = 1.96
) -> tuple[Float[np.ndarray, "points"], Float[np.ndarray, "points"]]:
    """Wilson's interval of shares of so many questions: 95% for z = 1.96.

    Example:
        >>> low, high = wilson(np.array([0.0, 0.5]), 64)
        >>> low.round(3).tolist(), high.round(3).tolist()
        ([0.0, 0.381], [0.057, 0.619])
    """
    centre = (shares + z * z / (2 * of)) / (1 + z * z / of)
    inside = np.maximum(shares * (1 - shares), 0) / of + z * z / (4 * of * of)
    half = z * np.sqrt(inside) / (1 + z * z / of)
    return np.maximum(centre - half, 0), np.minimum(centre + half, 1)


def column(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """One value of every row, float64 [rows, seeds]; None becomes NaN."""
    values = [row[name] if isinstance(row[name], list) else [row[name]] for row in rows]
    seeds = max((len(one) for one in values), default=1)
    # A figure that none of several seeds has is one None.
    whole = [one if len(one) == seeds else one * seeds for one in values]
    return np.array(whole, dtype=float).reshape(len(whole), seeds)


def mean_of(values: Float[np.ndarray, "points seeds"]) -> Float[np.ndarray, "points"]:
    """The mean over the seeds that have a value; NaN where none has."""
    known = np.isfinite(values)
    count = known.sum(1)
    total = np.where(known, values, 0.0).sum(1)
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def _means(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return mean_of(column([{name: row.get(name)} for row in rows], name))
