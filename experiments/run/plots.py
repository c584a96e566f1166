"""Learning curves, drawn from metric rows. Matplotlib is imported only here, and without a screen."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.run.folder import write_whole

POPULATION, HELD_OUT, GREY = "#4C78A8", "#E4572E", "#8A8A8A"


class Curve(NamedTuple):
    """What a learning curve shows.

    Attributes:
        name: of the held-out figure in the rows.
        words: the figure and its unit, for the axis.
        who: what is trained, as the subject of a sentence.
        target: a value to mark, if any.
        better: whether larger or smaller values are better.
        x: a total of the rows that the curve is drawn over, and what it is in words; None for generations.
        population: whether the population's scores are of the same kind.
        of: the number of questions or images that the figure is a share of, if it is one.
        references: values to compare with, by name.
    """

    name: str
    words: str
    who: str
    target: float | None = None
    better: Literal["larger", "smaller"] = "larger"
    x: tuple[str, str] | None = None
    population: bool = False
    of: int | None = None
    references: Mapping[str, float] = {}


def draw_curve(
    path: Path, rows: Sequence[Mapping[str, Any]], curve: Curve, title: str, final: tuple[int, Any]
) -> None:
    """Draws a run's curve as a PNG."""
    learning_curve(
        path, rows, title, curve.words, final, curve.target, curve.name, curve.population, curve.who,
        curve.references,
    )  # fmt: skip


def learning_curve(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    title: str,
    measure: str,
    final: tuple[int, Any],
    target: float | None = None,
    name: str = "held_out_return",
    population: bool = True,
    who: str = "mean policy",
    marks: Mapping[str, float] | None = None,
) -> None:
    """Draw what the population scored and what the mean policy scores held out, against generations.

    Args:
        path: the PNG to write.
        rows: metric rows with `generation` and `name`; with `fitness_mean`, `fitness_std`,
            `fitness_worst` and `fitness_best`, the population is drawn too. A value may be None, or a
            list with one for each of several seeds: their mean is drawn, and each faintly.
        title: what the run came to.
        measure: what is drawn and its unit, for the axis.
        final: generations done, and the held-out value after them.
        target: a value to mark, if any.
        name: the held-out value.
        population: draw what the population scored, if it is of the same kind.
        who: what is trained.
        marks: values to compare with, by name.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    if population and rows and "fitness_mean" in rows[0]:
        generation = np.array([row["generation"] for row in rows])
        mean, std, worst, best = (
            column(rows, key).mean(1)
            for key in ("fitness_mean", "fitness_std", "fitness_worst", "fitness_best")
        )
        low, high = np.maximum(mean - std, worst), np.minimum(mean + std, best)
        shade: dict[str, Any] = {"color": POPULATION, "lw": 0}
        axes.fill_between(
            generation, worst, best, alpha=0.12, label="population, worst to best", **shade
        )
        axes.fill_between(
            generation, low, high, alpha=0.25, label="one standard deviation", **shade
        )
        axes.plot(generation, mean, color=POPULATION, lw=2, label="population, mean")
    measured = [row for row in rows if row[name] is not None]
    at = np.array([*(row["generation"] for row in measured), final[0]])
    values = column([*measured, {name: final[1]}], name)
    # A point for each measurement, as long as points can be told apart.
    marker = "o" if len(at) <= 40 else None
    axes.plot(
        at, values.mean(1), color=HELD_OUT, lw=2, marker=marker, ms=4, label=f"{who}, held out"
    )
    if values.shape[1] > 1:
        axes.plot(at, values, color=HELD_OUT, lw=0.8, alpha=0.4)
    if target is not None:
        axes.axhline(target, color=GREY, lw=1, ls="--", zorder=0, label=f"target, {target:g}")
    for mark, value in (marks or {}).items():
        axes.axhline(value, color=GREY, lw=0.8, ls=":", zorder=0)
        at_right: dict[str, Any] = {"ha": "right", "va": "bottom", "fontsize": 8, "color": GREY}
        axes.text(1, value, mark, transform=axes.get_yaxis_transform(), **at_right)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(f"updates of the {who} (generations)")
    axes.set_ylabel(measure)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    finish(axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    write_whole(path, lambda file: figure.savefig(file, format="png"))


def column(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """One value of every row, float64 [rows, seeds]; None becomes NaN."""
    values = [row[name] if isinstance(row[name], list) else [row[name]] for row in rows]
    return np.array(values, dtype=float)


def finish(axes: Any) -> None:
    """What all axes share."""
    axes.margins(x=0.02)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
