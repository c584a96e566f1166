"""Which setting explains the metric: a share of variance for each setting by itself, and a picture.

The measure is a one-way analysis of variance on ranks. The settings of a sweep are ranked by their metric,
the worst first (what is not finite is the worst of all). For one field they are divided into groups by its
values, or, where it is a number with many values, by its quantiles; the importance is the variance of the
groups' mean ranks over the variance of all ranks, which is 0 where the field says nothing and 1 where it says
everything. Groups of few explain something by chance alone: how much, is what 95 of 100 shuffles of the ranks
stay below.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from experiments.run.canvas import (
    BIG,
    GREY,
    HELD_OUT,
    POPULATION,
    SMALL,
    finish,
    literal,
    new_figure,
    title_above,
    wrapped,
)
from experiments.run.folder import write_whole
from experiments.run.plots import usual_range
from experiments.run.report import in_words

LEAST = 4  # settings that can be told apart from chance at all
SHUFFLES = 2000
PANELS = 4
LETTERS = 22  # that stand side by side under a panel
LONGEST = 20  # letters of a value


class Importance(NamedTuple):
    """Of one field.

    Attributes:
        field: its name.
        share: of the variance of ranks that lies between its groups.
        chance: what 95 of 100 shuffles stay below.
        trend: rank correlation of its value and how good the metric is; None where it is no number.
        groups: how many.
    """

    field: str
    share: float
    chance: float
    trend: float | None
    groups: int


def importances(
    fields: Mapping[str, Sequence[Any]], values: Sequence[float | None], maximise: bool
) -> list[Importance]:
    """The importance of every field, the largest first.

    Args:
        fields: for each the values in the settings.
        values: the settings' metrics; None is the worst.
        maximise: whether more is better.

    Example:
        >>> rates, metrics = [0.1, 0.2, 0.3, 0.4] * 2, [1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0]
        >>> found = importances({"rate": rates, "other": list("aaaabbbb")}, metrics, True)
        >>> [(one.field, round(one.share, 3), one.trend) for one in found]
        [('rate', 1.0, 1.0), ('other', 0.0, None)]
    """
    sign = 1 if maximise else -1
    y = ranks(np.array([-np.inf if v is None else sign * v for v in values], float))
    chance = np.random.default_rng(0)
    shuffled = np.stack([chance.permutation(y) for _ in range(SHUFFLES)])
    found = []
    for field, own in fields.items():
        labels = groups(own)
        by_chance = float(np.quantile(explained(labels, shuffled), 0.95))
        trend = None
        if _numbers(own):
            trend = _correlation(ranks(np.array(own, float)), y)
        share = float(explained(labels, y[None])[0])
        found.append(Importance(field, share, by_chance, trend, int(labels.max()) + 1))
    return sorted(found, key=lambda one: (-one.share, one.field))


def ranks(x: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Places from 1, of equal values the mean of theirs.

    Example:
        >>> ranks(np.array([3.0, 1.0, 3.0])).tolist()
        [2.5, 1.0, 2.5]
    """
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((2 * last - counts + 1) / 2)[which]


def groups(values: Sequence[Any]) -> Int[np.ndarray, "n"]:
    """The group of each: by value, or by quantile of numbers with more than five values.

    As many groups as leave four or more settings in each, two to five.

    Example:
        >>> groups(["b", "a", "b"]).tolist(), groups(list(range(8))).tolist()
        ([0, 1, 0], [0, 0, 0, 0, 1, 1, 1, 1])
    """
    if _numbers(values) and len(set(values)) > 5:
        many = min(5, max(2, len(values) // 4))
        place = ranks(np.array(values, float)) - 1
        found = np.minimum((place * many / len(values)).astype(int), many - 1)
        return np.unique(found, return_inverse=True)[1]
    known = list(dict.fromkeys(map(repr, values)))
    return np.array([known.index(repr(value)) for value in values])


def explained(labels: Int[np.ndarray, "n"], y: Float[np.ndarray, "k n"]) -> Float[np.ndarray, "k"]:
    """The share of the variance of each row that lies between the groups; 0 where there is none."""
    member = labels[:, None] == np.arange(labels.max() + 1)
    centred = y - y.mean(1, keepdims=True)
    means = centred @ member / member.sum(0)
    between, total = (means**2 @ member.sum(0)), (centred**2).sum(1)
    return np.divide(between, total, out=np.zeros_like(total), where=total > 0)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return round(float(a @ b) / scale, 6) if scale else 0.0


def _numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def draw(
    path: Path,
    found: Sequence[Importance],
    fields: Mapping[str, Sequence[Any]],
    values: Sequence[float | None],
    metric: str,
    when: str,
    scales: Mapping[str, str],
) -> None:
    """The importances as bars, and the metric against the fields that have most of it.

    Args:
        path: the PNG to write.
        found: of :func:`importances`.
        fields: as there.
        values: as there.
        metric: its name.
        when: at what length the settings are compared, in words.
        scales: of fields that are drawn from a range: "linear" or "log".
    """
    panels = found[:PANELS]
    bars = 1.15 + 0.34 * len(found)
    size = (max(7.2, 2.6 * len(panels)), bars + 3.4)
    figure = new_figure(*size)
    above, below = figure.subfigures(  # type: ignore[misc]
        2, 1, height_ratios=[bars, 3.4]
    )
    _bars(above.add_subplot(), found)
    title_above(figure, f"What {in_words(metric)} depends on, {len(values)} settings {when}")
    axes = below.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for one, panel in zip(panels, axes, strict=True):
        _points(panel, fields[one.field], values, scales.get(one.field))
        panel.set_xlabel(wrapped(one.field, BIG, size[0] / len(panels) - 0.6))
    low, high = usual_range(np.array([np.nan if v is None else v for v in values], float))
    axes[0].set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    beyond = sum(v is not None and not low <= v <= high for v in values)
    note = f" ({beyond} far beyond left out)" if beyond else ""
    axes[0].set_ylabel(wrapped(in_words(metric) + note, BIG, 2.6))
    write_whole(path, lambda file: figure.savefig(file, format="png"))


def _bars(axes: Any, found: Sequence[Importance]) -> None:
    at = np.arange(len(found))
    axes.barh(at, [one.share for one in found], color=POPULATION, height=0.62)
    chance: dict[str, Any] = {"ls": "", "marker": "|", "ms": 15, "mew": 2, "color": HELD_OUT}
    axes.plot([one.chance for one in found], at, **chance)
    axes.set_yticks(at, [wrapped(one.field, SMALL, 1.6, 2) for one in found], fontsize=SMALL)
    axes.invert_yaxis()
    axes.set_xlabel(
        "share of the variance of ranks that the setting alone explains\n"
        "(red: 95 of 100 shuffles of the metric stay below)"
    )
    finish(axes)
    axes.set_xlim(0, 1)


def _points(
    axes: Any, own: Sequence[Any], values: Sequence[float | None], scale: str | None
) -> None:
    """A point a setting; where there are no more than a few values, side by side with their means."""
    y = np.array([np.nan if v is None else v for v in values], float)
    style: dict[str, Any] = {"color": POPULATION, "alpha": 0.75, "s": 28, "lw": 0}
    finish(axes)
    axes.margins(x=0.08)
    if scale is not None:
        x = np.array(own, float)
        axes.scatter(x, y, **style)
        if scale == "log":
            _decades(axes, x.max() / x.min())
        return
    names = sorted(set(own), key=(lambda v: v) if _numbers(own) else str)
    at = np.array([names.index(v) for v in own])
    axes.scatter(at, y, **style)
    for i in range(len(names)):
        known = y[(at == i) & np.isfinite(y)]
        if known.size:
            axes.plot([i], [known.mean()], marker="_", ms=22, mew=2, color=GREY, zorder=0)
    labels = [str(name) for name in names]
    labels = [literal(one if len(one) <= LONGEST else one[:LONGEST] + "…") for one in labels]
    aslant: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
    crowded = sum(map(len, labels)) > LETTERS
    axes.set_xticks(range(len(names)), labels, **(aslant if crowded else {}))
    axes.set_xlim(-0.5, len(names) - 0.5)


def _decades(axes: Any, span: float) -> None:
    """A logarithmic axis, with numbers that do not touch."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 30 else (1,)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())
