"""Learning curves: nothing is cut off, ranges show the curve, and the words are the method's."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.figure import Figure
from matplotlib.text import Text

from experiments.run.axes import (
    BYTES_READ,
    ENVIRONMENT_STEPS,
    GENERATIONS,
    SECONDS,
    Axis,
    positions,
    usual_axis,
)
from experiments.run.errors import RunError, UsageError
from experiments.run.plots import Curve, learning_curve

Rows = list[dict[str, Any]]
LONG = "MountainCarContinuous-v0: the return of the mean policy is 92.4 (mean of 3 seeds) " * 3


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Figure]:
    """Draws a curve; returns its figure."""
    figures: list[Figure] = []
    save = Figure.savefig

    def savefig(figure: Figure, *args: Any, **settings: Any) -> None:
        figures.append(figure)
        save(figure, *args, **settings)

    monkeypatch.setattr(Figure, "savefig", savefig)

    def draw(*args: Any, **settings: Any) -> Figure:
        learning_curve(tmp_path / "curve.png", *args, **settings)
        assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
        return figures[-1]

    return draw


def rows_of(values: list[Any], worst: float = 0.0, population: bool = True) -> Rows:
    scores = lambda v: {
        "fitness_mean": v, "fitness_std": 1.0, "fitness_worst": worst, "fitness_best": v,
    }  # fmt: skip
    return [
        {
            "generation": g,
            "score": value,
            "environment_steps": 100 * (g + 1),
            "timing": {"seconds": 2.0},
            **(scores(float(g)) if population else {}),
        }
        for g, value in enumerate(values)
    ]


def curve(**changes: Any) -> Curve:
    return Curve(**{"name": "score", "words": "score", **changes})


def assert_inside(figure: Figure) -> None:
    """No text lies outside the canvas, and the curve has room."""
    figure.draw_without_rendering()
    unseen = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            ticks = (*axis.get_major_ticks(), *axis.get_minor_ticks())
            # Ticks beyond the range are kept, and not drawn.
            unseen |= {tick.label1 for tick in ticks if not low <= tick.get_loc() <= high}
    boxes = [
        one.get_window_extent()
        for one in figure.findobj(Text)
        if isinstance(one, Text) and one.get_visible() and one.get_text() and one not in unseen
    ]
    assert boxes
    for box in boxes:
        assert figure.bbox.x0 - 1 <= box.x0 < box.x1 <= figure.bbox.x1 + 1
        assert figure.bbox.y0 - 1 <= box.y0 < box.y1 <= figure.bbox.y1 + 1
    box = figure.axes[0].get_window_extent()
    assert box.height > 0.3 * figure.bbox.height
    assert box.width > 0.5 * figure.bbox.width


def lines(axes: Axes) -> dict[str, np.ndarray]:
    return {str(one.get_label()): np.asarray(one.get_xydata()) for one in axes.get_lines()}


@pytest.mark.parametrize(
    ("words", "title"),
    [
        ({}, ""),
        ({}, LONG),
        ({"of": 9}, "W" * 200),
        ({"words": f"return of a {LONG} episode", "who": "a classifier of " + LONG[:90]}, LONG),
        ({"x": Axis("generation", LONG, 1e6), "target": 3e9}, "no $formula_{ and $ no \\frac"),
        ({"marks": {"bigram": 3.65, "gzip": 2.11, "xz": 2.1, "m" * 20: 2.09}}, "short"),
        ({"words": "x" * 300, "who": "_" + "y" * 200}, "short"),
    ],
)
def test_no_text_is_cut_off(drawn: Any, words: dict[str, Any], title: str) -> None:
    rows = rows_of([float(g) for g in range(8)])
    population = "of" not in words
    assert_inside(drawn(rows, curve(population=population, **words), title, (8, 8.0)))


@pytest.mark.parametrize(
    ("rows", "final"),
    [
        (rows_of([]), None),
        (rows_of([]), 1.0),
        (rows_of([1.0]), 2.0),
        (rows_of([None]), None),
        (rows_of([float("nan"), 1.0, None, float("inf")]), float("nan")),
        (rows_of([[1.0, None], None, [3.0, float("nan")]]), [1.0, 2.0]),
        (rows_of([5.0] * 9), 5.0),
        ([{**row, "fitness_mean": None, "fitness_worst": None} for row in rows_of([1.0, 2.0])], 3.0),
    ],
)  # fmt: skip
def test_any_rows_can_be_drawn(drawn: Any, rows: Rows, final: Any) -> None:
    assert_inside(drawn(rows, curve(population=True, target=4.0), "title", (len(rows), final)))


def test_a_huge_outlier_is_a_mark_on_the_edge(drawn: Any) -> None:
    values = [float(g % 7) for g in range(60)]
    values[30] = 1e9
    axes = drawn(rows_of(values, population=False), curve(), "", (60, 3.0)).axes[0]
    assert axes.get_ylim()[1] < 10
    assert any(one.get_text() == "1e+09" for one in axes.texts)


@pytest.mark.parametrize("worst", [-1e3, -1e9])
def test_a_band_from_worst_to_best_does_not_hide_the_curve(drawn: Any, worst: float) -> None:
    rows = rows_of([float(g) for g in range(40)], worst=worst)
    low, high = drawn(rows, curve(population=True), "", (40, 40.0)).axes[0].get_ylim()
    # The curve, which goes from 0 to 40, has most of the picture.
    assert 40 / (high - low) > 0.6


def test_a_target_that_is_far_is_told_and_does_not_press_the_curve_flat(drawn: Any) -> None:
    rows = rows_of([float(g) for g in range(9)], population=False)
    near, far = (drawn(rows, curve(target=t), "", (9, 9.0)).axes[0] for t in (12.0, 1e6))
    assert near.get_ylim()[1] > 12
    assert far.get_ylim()[1] < 12
    assert "target, 1e+06 (above the picture)" in lines(far)


def test_a_share_of_few_questions_has_a_band_of_chance(drawn: Any) -> None:
    rows = rows_of([0.0, 0.5], population=False)
    axes = drawn(rows, curve(of=64), "", (2, 1.0)).axes[0]
    (band,) = (one for one in axes.collections if isinstance(one, FillBetweenPolyCollection))
    corners = np.unique(np.asarray(band.get_paths()[0].vertices).round(3), axis=0).tolist()
    # Wilson's interval, to be looked up; 0 of 64 may be 5.7% in truth.
    for corner in ([0, 0], [0, 0.057], [1, 0.381], [1, 0.619], [2, 0.943], [2, 1]):
        assert corner in corners
    assert str(band.get_label()) == "95% by chance, 64 questions"
    assert not drawn(rows, curve(), "", (2, 1.0)).axes[0].collections


def test_words_are_those_of_the_method(drawn: Any) -> None:
    rows = [{**row, "episode_return": 3.0} for row in rows_of([1.0, 2.0], population=False)]
    told = curve(who="policy", population=True, training=("episode_return", "training episodes"))
    axes = drawn(rows, told, "", (2, 3.0)).axes[0]
    assert set(lines(axes)) == {"policy, held out", "training episodes"}
    assert not axes.collections


def test_a_row_measures_the_state_before_it(drawn: Any) -> None:
    rows = rows_of([1.0, None, 3.0], population=False)
    for axis, places in {
        GENERATIONS: [0, 2, 3],
        ENVIRONMENT_STEPS: [0, 200, 300],
        SECONDS: [0, 4, 6],
        Axis("generation", "bytes read", 50): [0, 100, 150],
    }.items():
        axes = drawn(rows, curve(x=axis), "", (3, 4.0)).axes[0]
        assert lines(axes)["model, held out"].T.tolist() == [places, [1, 3, 4]]
        assert axes.get_xlabel() == axis.words


def test_the_mean_of_seeds_is_of_those_that_are_finite(drawn: Any) -> None:
    axes = drawn(rows_of([[1.0, 3.0], [None, 5.0]]), curve(), "", (2, [7.0, 9.0])).axes[0]
    assert lines(axes)["model, held out"][:, 1].tolist() == [2, 5, 8]


def test_positions_need_what_they_count() -> None:
    rows = rows_of([1.0, 2.0])
    with pytest.raises(UsageError, match="do not count 'bytes_read'; choose another --x"):
        positions(rows, BYTES_READ)
    with pytest.raises(
        RunError,
        match=re.escape(
            "line 2: environment_steps must be a number, null or a list of them, got 'x'"
        ),
    ):
        positions([rows[0], {**rows[1], "environment_steps": "x"}], ENVIRONMENT_STEPS)


def test_methods_are_compared_over_what_all_of_them_count() -> None:
    counted = lambda **counts: [{"generation": 0, "timing": {"seconds": 1.0}, **counts}]
    steps, tokens = counted(environment_steps=[5, 5]), counted(generated_tokens=7)
    assert usual_axis([steps, steps], 2) == ENVIRONMENT_STEPS
    assert usual_axis([tokens, tokens], 1).name == "generated_tokens"
    # SFT writes nothing, so that tokens cannot tell it from others.
    assert usual_axis([tokens, counted(generated_tokens=0)], 2) == SECONDS
    assert usual_axis([counted(), counted()], 2) == SECONDS
    assert usual_axis([counted()], 1) == GENERATIONS
