"""What a comparison of optimizers found, as JSON, as a table and as a picture."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.optimizers.config import Config
from experiments.run.folder import full_disk_in_one_sentence, write_json, write_whole

# Colours by what a method keeps for every weight; the last is of those that belong to no family.
FAMILIES = {
    "frugal": "#E4572E",
    "adam": "#4C78A8",
    "lion": "#54A24B",
    "optax-lion": "#54A24B",
    "sgd": "#B279A2",
    "galore": "#F2A541",
    "badam": "#439894",
    "": "#8A8A8A",
}


# Losses that lie so many times as far above the middle one as that does above the best are left out of the
# picture.
FAR = 6


class Found(NamedTuple):
    """What a method came to.

    Attributes:
        rate: its best learning rate.
        tried: held-out loss of the search's seed, by learning rate.
        results: results of the runs at the best one.
    """

    rate: float
    tried: Mapping[float, float]
    results: list[dict[str, Any]]


class Line(NamedTuple):
    """A row of the table; losses in nats.

    Attributes:
        method: its name.
        rate: its learning rate.
        losses: held-out losses of its seeds; inf for one that is not finite.
        loss: their mean.
        spread: their standard deviation; None for one seed.
        accuracy: mean share of held-out digits that are right; None for text.
        norm: mean norm of the weights at the end, which began at 1; None for text.
        state_bytes: size of its state.
        bytes_a_parameter: that over the number of parameters.
        step_seconds: time of an update, timed in turns with the others; None where that is not done yet.
    """

    method: str
    rate: float
    losses: list[float]
    loss: float
    spread: float | None
    accuracy: float | None
    norm: float | None
    state_bytes: int
    bytes_a_parameter: float
    step_seconds: float | None


def line(method: str, found: Found, step_seconds: float | None) -> Line:
    """The row of a method."""

    def mean(name: str) -> float | None:
        values = [one[name] for one in found.results if one.get(name) is not None]
        return statistics.fmean(values) if len(values) == len(found.results) else None

    losses = [
        float("inf") if one["held_out_loss"] is None else one["held_out_loss"]
        for one in found.results
    ]
    finite = float("inf") not in losses
    size, numbers = found.results[0]["state_bytes"], found.results[0]["parameters"]
    return Line(
        method=method,
        rate=found.rate,
        losses=losses,
        loss=statistics.fmean(losses),
        spread=statistics.stdev(losses) if finite and len(losses) > 1 else None,
        accuracy=mean("held_out_accuracy"),
        norm=mean("weight_norm"),
        state_bytes=size,
        bytes_a_parameter=size / numbers,
        step_seconds=step_seconds,
    )


def table(lines: list[Line]) -> str:
    """The rows as Markdown, the lowest loss first.

    Seeds decide the first parameters and all batches, of every method alike: beside the losses stand their
    differences from AdamW's, seed by seed, which vary less.

    Example:
        >>> adamw = Line("adamw", 0.003, [1.5, 1.7], 1.6, 0.1, None, None, 8000, 8.0, 0.05)
        >>> other = adamw._replace(method="lion", rate=0.001, losses=[1.6, 1.9], loss=1.75)
        >>> print(table([other, adamw]))
        | method | learning rate | held-out loss | above adamw | state, bytes | a parameter | update |
        |---|---|---|---|---|---|---|
        | adamw | 0.003 | 1.600 ± 0.100 | | 8,000 | 8.00 | 50.0 ms |
        | lion | 0.001 | 1.750 ± 0.100 | +0.150 ± 0.071 | 8,000 | 8.00 | 50.0 ms |
    """
    digits = any(one.accuracy is not None for one in lines)
    head = ["method", "learning rate", "held-out loss", "above adamw"]
    head += ["right", "weight norm"] if digits else []
    head += ["state, bytes", "a parameter", "update"]
    adamw = next((one for one in lines if one.method == "adamw"), None)
    rows = []
    for one in sorted(lines, key=lambda one: one.loss):
        row = [one.method, f"{one.rate:g}", f"{one.loss:.3f}{_plus_minus(one.spread)}"]
        row += [_above(one, adamw)]
        if digits:
            row += ["" if one.accuracy is None else f"{one.accuracy:.2%}"]
            row += ["" if one.norm is None else f"{one.norm:.2f}"]
        row += [f"{one.state_bytes:,}", f"{one.bytes_a_parameter:.2f}"]
        seconds = one.step_seconds
        rows.append([*row, "" if seconds is None else f"{1000 * seconds:.1f} ms"])
    cells = (" ".join(f"| {cell}" if cell else "|" for cell in row) + " |" for row in (head, *rows))
    first, *others = cells
    return "\n".join([first, "|" + "---|" * len(head), *others])


def _plus_minus(spread: float | None) -> str:
    return "" if spread is None else f" ± {spread:.3f}"


def _above(one: Line, other: Line | None) -> str:
    """The mean difference of the losses of two methods, seed by seed."""
    if other is None or one is other or len(one.losses) != len(other.losses):
        return ""
    differences = [a - b for a, b in zip(one.losses, other.losses, strict=True)]
    if float("inf") in differences:
        return ""
    spread = statistics.stdev(differences) if len(differences) > 1 else None
    return f"{statistics.fmean(differences):+.3f}{_plus_minus(spread)}"


def write_results(
    folder: Path, base: Config, found: Mapping[str, Found], step_seconds: Mapping[str, float]
) -> list[Path]:
    """Write results.json, table.md and study.png; returns their paths."""
    lines = [line(name, one, step_seconds.get(name)) for name, one in found.items()]
    paths = [folder / name for name in ("results.json", "table.md", "study.png")]
    with full_disk_in_one_sentence(folder):
        content = {
            one.method: {**one._asdict(), "tried": dict(found[one.method].tried)} for one in lines
        }
        # JSON has no word for what is not finite.
        write_json(paths[0], json.loads(json.dumps(content), parse_constant=lambda name: None))
        text = table(lines) + "\n"
        write_whole(paths[1], lambda file: file.write(text.encode()))
        draw(lines, base, paths[2])
    return paths


def family(method: str) -> str:
    """The colour of a method."""
    return next(color for name, color in FAMILIES.items() if method.startswith(name))


def draw(lines: list[Line], base: Config, path: Path) -> None:
    """Losses of all seeds beside the bytes of the states, the lowest mean first."""
    import numpy as np

    from experiments.run.canvas import BIG, SMALL, finish, new_figure, title_above, wrapped
    from experiments.run.plots import usual_range

    lines = sorted((one for one in lines if one.loss < float("inf")), key=lambda one: -one.loss)
    figure = new_figure(8.4, 1.9 + 0.27 * max(2, len(lines)))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2.2, 1))
    for height, one in enumerate(lines):
        color = family(one.method)
        left.plot(one.losses, [height] * len(one.losses), "o", color=color, ms=5, alpha=0.5, mew=0)
        left.plot(one.loss, height, "|", color=color, ms=13, mew=2.2)
        told = f"{one.loss:.3f}" if one.loss < 1000 else f"{one.loss:.4g}"
        left.text(1.02, height, told, transform=left.get_yaxis_transform(), va="center",
                  fontsize=8, color="#555555")  # fmt: skip
        right.barh(height, one.bytes_a_parameter, color=color, height=0.55)
        right.text(one.bytes_a_parameter + 0.15, height, f"{one.bytes_a_parameter:.1f}", va="center",
                   fontsize=8, color="#555555")  # fmt: skip
    names = [wrapped(one.method, SMALL, 1.8, 2) for one in lines]
    left.set_yticks(range(len(lines)), names, fontsize=SMALL)
    seeds = max((len(one.losses) for one in lines), default=1)
    unit = "nats a byte" if base.task == "text" else "nats"
    words = f"held-out loss ({unit}): dots are seeds, the bar their mean"
    left.set_xlabel(wrapped(words, BIG, 4.2))
    right.set_xlabel("state, bytes a parameter")
    for axes in (left, right):
        finish(axes)
        axes.grid(axis="y", visible=False)
    left.set_ylim(-0.7, max(2, len(lines)) - 0.3)
    # The losses of one that went wrong stand in its line as a number alone.
    losses = np.array([loss for one in lines for loss in one.losses])
    if losses.size:
        usual = np.median(losses) + FAR * (np.median(losses) - losses.min())
        losses = losses[losses <= max(usual, losses.min())]
    low, high = usual_range(losses)
    left.set_xlim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    right.set_xlim(0, 1.15 * max([8.0, *(one.bytes_a_parameter for one in lines)]))
    several = lambda count, noun: f"{count} {noun}{'s' * (count != 1)}"
    title = (
        f"{several(len(lines), 'optimizer')}, {base.limit} updates each, {several(seeds, 'seed')}, "
    )
    title_above(figure, f"{title}each at the best learning rate of its ladder")
    write_whole(path, lambda file: figure.savefig(file, format="png"))
