"""Learning curves, drawn from metric rows. Matplotlib is imported only here, and without a screen."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.run.folder import write_whole

POPULATION, HELD_OUT, GREY = "#4C78A8", "#E4572E", "#8A8A8A"


def learning_curve(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    title: str,
    measure: str,
    final: tuple[int, float],
    target: float | None = None,
) -> None:
    """Draw the population's fitness and the mean policy's held-out return against generations.

    Args:
        path: the PNG to write.
        rows: metric rows with `generation`, `fitness_mean`, `fitness_std`, `fitness_worst`,
            `fitness_best` and `held_out_return`; a value may be None.
        title: what the run came to.
        measure: what is drawn and its unit, for the axis.
        final: generations done, and the held-out return after them.
        target: a return to mark, if any.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    generation = np.array([row["generation"] for row in rows])
    mean, std, worst, best = (
        np.array([row[name] for row in rows], dtype=float)
        for name in ("fitness_mean", "fitness_std", "fitness_worst", "fitness_best")
    )
    measured = [row for row in rows if row["held_out_return"] is not None]
    held_out = [(row["generation"], row["held_out_return"]) for row in measured] + [final]

    figure = Figure(figsize=(7.2, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    low, high = np.maximum(mean - std, worst), np.minimum(mean + std, best)
    shade: dict[str, Any] = {"color": POPULATION, "lw": 0}
    axes.fill_between(
        generation, worst, best, alpha=0.12, label="population, worst to best", **shade
    )
    axes.fill_between(generation, low, high, alpha=0.25, label="one standard deviation", **shade)
    axes.plot(generation, mean, color=POPULATION, lw=2, label="population, mean")
    dots: dict[str, Any] = {"color": HELD_OUT, "lw": 2, "marker": "o", "ms": 4}
    axes.plot(*zip(*held_out, strict=True), label="mean policy, held out", **dots)
    if target is not None:
        axes.axhline(target, color=GREY, lw=1, ls="--", zorder=0, label=f"target, {target:g}")
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("updates of the mean policy (generations)")
    axes.set_ylabel(measure)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    write_whole(path, lambda file: figure.savefig(file, format="png"))
