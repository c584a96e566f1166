"""Figures on which nothing is cut off: texts are measured and wrapped, legends get the columns that fit."""

import functools
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POPULATION, HELD_OUT, GREY = "#4C78A8", "#E4572E", "#8A8A8A"
COLORS = ("#4C78A8", "#E4572E", "#54A24B", "#B279A2", "#F2A541", "#439894", "#8A8A8A", "#9D755D")

# Inches, and points.
WIDTH, HEIGHT = 7.2, 4.8
BIG, NORMAL, SMALL = 10.0, 9.0, 8.0
TITLE_SIZES, TITLE_LINES = (11.0, 10.0, 9.0, 8.0), 3
LONGEST = 400  # letters of a text


def new_figure(width: float = WIDTH, height: float = HEIGHT) -> "Figure":
    """A figure whose parts make room for each other."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def literal(text: str) -> str:
    """A text as it is: no formula, one line, and in the legend too where it begins with an underscore.

    Example:
        >>> literal("a $x$\\nb")
        'a \\\\$x\\\\$ b'
    """
    text = " ".join(text.split()).replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def text_width(text: str, size: float) -> float:
    """Inches that a line takes at a font size in points, without kerning, and a little more for hinting."""
    return 1.03 * size / 100 * sum(map(_letter_width, text)) / 72


@functools.cache
def _letter_width(letter: str) -> float:
    """Points that a letter takes at a size of 100."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    font = FontProperties(size=100)
    # A space at the end has no width: letters are measured between others.
    between, without = (
        TextToPath().get_text_width_height_descent(text, font, ismath=False)[0]
        for text in (f"|{letter}|", "||")
    )
    return float(between - without)


def lines_of(text: str, size: float, inches: float) -> list[str]:
    """A text in lines that are no wider than so many inches; words that are wider are cut.

    Example:
        >>> lines_of("held-out return of an episode", 10.0, 1.2)
        ['held-out return', 'of an episode']
    """
    text = " ".join(text.split())
    if len(text) > LONGEST:
        text = text[:LONGEST] + "…"
    lines: list[str] = []
    line = ""
    for word in text.split(" "):
        longer = f"{line} {word}" if line else word
        if text_width(longer, size) <= inches:
            line = longer
            continue
        if line:
            lines.append(line)
        while len(word) > 1 and text_width(word, size) > inches:
            fits = 1
            while text_width(word[: fits + 1], size) <= inches:
                fits += 1
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    return [*lines, line]


def wrapped(text: str, size: float, inches: float, most: int = 4) -> str:
    """A text for matplotlib, in lines that fit; what goes beyond so many lines is left out."""
    lines = lines_of(text, size, inches)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1][:-1] + "…"]
    return "\n".join(literal(line) for line in lines)


def label_axes(figure: "Figure", axes: "Axes", x: str, y: str) -> None:
    """Names the axes, in lines that are no longer than the axes turn out; comes last."""
    axes.set_xlabel(wrapped(x, BIG, figure.get_figwidth() - 1.2))
    axes.set_ylabel(wrapped(y, BIG, 2.5))
    for _ in range(2):
        figure.draw_without_rendering()
        box = axes.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
        axes.set_xlabel(wrapped(x, BIG, max(box.width, 1.0)))
        axes.set_ylabel(wrapped(y, BIG, max(box.height, 1.0), 3))


def title_above(figure: "Figure", title: str) -> None:
    """A title over the whole width; a long one gets smaller letters, then more lines."""
    if not title:
        return
    inches = figure.get_figwidth() - 0.35
    for size in TITLE_SIZES:
        lines = lines_of(title, size, inches)
        if len(lines) <= TITLE_LINES:
            break
    text = "\n".join(literal(line) for line in lines)
    figure.suptitle(text, x=0.02, ha="left", fontsize=size)


def finish(axes: "Axes") -> None:
    """What all axes share."""
    axes.margins(x=0.02)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def short(value: float | int) -> str:
    """A number for a tick.

    Example:
        >>> [short(x) for x in (0, 0.25, 1500, 20_000, 1_250_000, 3e9, -2e6)]
        ['0', '0.25', '1500', '20k', '1.25M', '3G', '-2M']
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / min(size, 1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.6g}"


def count_axis(axes: "Axes") -> None:
    """Ticks of an x axis that counts something from 0: no more than fit, no powers of ten in a corner."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if axes.get_xlim()[1] <= 0.06:
        axes.set_xlim(-0.02, 1)
    whole = axes.get_xlim()[1] > 3
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=whole))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def legend_below(figure: "Figure", axes: "Axes") -> None:
    """The legend under the axes, with as many columns as fit, and higher for many lines."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    inches = figure.get_figwidth() - 0.4
    handle = 0.45  # with the spaces beside it
    labels = [wrapped(unliteral(label), NORMAL, inches - handle) for label in labels]
    widths = [
        handle + max(text_width(line, NORMAL) for line in label.split("\n")) for label in labels
    ]
    columns = next(n for n in (4, 3, 2, 1) if n == 1 or _fits(widths, n, inches))
    rows = -(-len(labels) // columns) + sum(label.count("\n") for label in labels)
    figure.set_figheight(figure.get_figheight() + 0.18 * max(0, rows - 3))
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=NORMAL,
        columnspacing=1.5,
    )


def unliteral(text: str) -> str:
    """The opposite of `literal`."""
    return text.replace(r"\$", "$").removeprefix("\u200b")


def _fits(widths: Sequence[float], columns: int, inches: float) -> bool:
    """Whether a legend of so many columns, filled one after another, is no wider."""
    columns = min(columns, len(widths))
    rows, longer = divmod(len(widths), columns)
    ends = [0]
    for column in range(columns):
        ends.append(ends[-1] + rows + (column < longer))
    wide = [max(widths[a:b]) for a, b in itertools.pairwise(ends)]
    return bool(sum(wide) + 0.22 * (len(wide) - 1) <= inches)


def lines_at_right(axes: "Axes", marks: Mapping[str, float | int], named: bool = True) -> None:
    """Dotted lines at values in the range, to compare with; their names at the right do not touch."""
    low, high = axes.get_ylim()
    # The height of a name at this size, in units of the axis.
    gap = (high - low) * SMALL * 1.25 / 72 / (HEIGHT - 1.5)
    below = low - gap
    seen = {name: value for name, value in marks.items() if low <= value <= high}
    for name, value in sorted(seen.items(), key=lambda item: item[1]):
        axes.axhline(value, color=GREY, lw=0.8, ls=":", zorder=0)
        if not named:
            continue
        below = max(value, below + gap)
        axes.annotate(
            literal(name),
            (1, value),
            xytext=(1.015, below),
            xycoords=axes.get_yaxis_transform(),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=SMALL,
            color=GREY,
            annotation_clip=False,
        )


def save(figure: "Figure", file: IO[bytes] | io.BytesIO, kind: str = "png") -> None:
    """Writes a figure; an SVG says nothing of the time at which it was made."""
    about = {"Date": None} if kind == "svg" else {}
    figure.savefig(file, format=kind, metadata=about)
