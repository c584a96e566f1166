"""What varies in a sweep: lists that are gone through, and ranges and lists that are drawn from.

A draw is a function of (the sweep's seed, its number, the field): more samples keep the earlier ones, and
another field in the space changes none of them.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.run.errors import suggestion
from experiments.run.fields import Range
from experiments.sweep.fields import fit, whole

KINDS = ("grid", "choice", "uniform", "log-uniform")
# Drawn numbers are cut to so many digits, so that they can be read in a table and typed again as they are.
DIGITS = 4


class Axis(NamedTuple):
    """One field that varies.

    Attributes:
        field: its dotted name.
        kind: "grid" takes every value; the others are drawn from.
        values: of a grid or a choice; the two ends of a range.
        unit: of a range: 1 for whole numbers and 2 for even ones, both ends included; 0 for any number.
    """

    field: str
    kind: str
    values: tuple[Any, ...]
    unit: int = 0

    def draw(self, seed: int, number: int) -> Any:
        """The value of sample `number`.

        Example:
            >>> axis = Axis("sigma", "log-uniform", (0.01, 1.0))
            >>> [axis.draw(0, number) for number in range(3)]
            [0.1487, 0.8098, 0.9063]
        """
        digest = hashlib.sha256(f"{seed}/{number}/{self.field}".encode()).digest()
        u = int.from_bytes(digest[:8], "big") / 2**64
        if self.kind == "choice":
            return self.values[min(int(u * len(self.values)), len(self.values) - 1)]
        low, high, unit = *self.values, self.unit
        if unit:
            low, high = math.ceil(low / unit), math.floor(high / unit)
        # A whole number has the stretch from half before it to half behind it.
        a, b = (low - 0.5, high + 0.5) if unit else (low, high)
        x = a + u * (b - a)
        if self.kind == "log-uniform":
            x = math.exp(math.log(a) + u * (math.log(b) - math.log(a)))
        x = round(x) if unit else float(f"{x:.{DIGITS}g}")
        return min(max(x, low), high) * (unit or 1)


def read_axis(field: str, found: Any, hint: Any, bounds: Range | None = None) -> Axis:
    """An axis from the file: a list is a grid, otherwise one of the kinds with its values.

    Args:
        field: its name.
        found: what the file has.
        hint: the type of the setting.
        bounds: of its numbers.

    Raises:
        ValueError: saying what is wrong and what would be right.
    """
    if isinstance(found, Sequence) and not isinstance(found, str):
        found = {"grid": found}
    if not isinstance(found, Mapping) or len(found) != 1:
        raise ValueError(f"{found!r}: choose a list, or one of {', '.join(KINDS)} with its values")
    ((kind, values),) = found.items()
    if kind not in KINDS:
        near = suggestion(str(kind), KINDS) or f"; there are {', '.join(KINDS)}"
        raise ValueError(f"there is no kind {kind!r}{near}")
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ValueError(f"{kind}: {values!r}: choose a list with at least one value")
    if kind in ("grid", "choice"):
        fitted = []
        for value in values:
            try:
                fitted.append(fit(value, hint))
            except ValueError as error:
                raise ValueError(f"{kind}: {value!r}: {error}") from error
        twice = [value for number, value in enumerate(fitted) if value in fitted[:number]]
        if kind == "grid" and twice:
            raise ValueError(f"{kind}: {twice[0]!r} is there twice: choose different values")
        return Axis(field, kind, tuple(fitted))
    return Axis(field, kind, *_range(kind, values, hint, bounds))


def _range(
    kind: str, values: Sequence[Any], hint: Any, bounds: Range | None
) -> tuple[tuple[Any, Any], int]:
    of_whole = whole(hint)
    if of_whole is None:
        raise ValueError(f"{kind}: this setting has no numbers: choose grid or choice")
    right = f"choose two {'whole ' * of_whole}numbers, the lower first"
    try:
        low, high = (fit(value, int if of_whole else float) for value in values)
    except ValueError as error:
        raise ValueError(f"{kind}: {list(values)!r}: {right}") from error
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"{kind}: {list(values)!r}: {right}")
    if kind == "log-uniform" and low <= 0:
        raise ValueError(f"{kind}: {list(values)!r}: a logarithm needs both above 0")
    if bounds is not None:
        # Even numbers are drawn between any two.
        for end in (low, high):
            if problem := bounds._replace(even=False).problem(end):
                raise ValueError(f"{kind}: {list(values)!r}: {problem}")
    unit = 2 if bounds is not None and bounds.even else int(of_whole)
    return (low, high), unit


def points(axes: Sequence[Axis], samples: int, seed: int) -> Iterator[dict[str, Any]]:
    """Settings of the sweep in order: every sample at every point of the grid.

    Example:
        >>> axes = [Axis("rank", "grid", (1, 2)), Axis("sigma", "uniform", (0.0, 1.0))]
        >>> for point in points(axes, 2, 0):
        ...     print(point)
        {'rank': 1, 'sigma': 0.5861}
        {'rank': 2, 'sigma': 0.5861}
        {'rank': 1, 'sigma': 0.9542}
        {'rank': 2, 'sigma': 0.9542}
    """
    grids = [axis for axis in axes if axis.kind == "grid"]
    drawn = [axis for axis in axes if axis.kind != "grid"]
    for number in range(samples if drawn else 1):
        sample = {axis.field: axis.draw(seed, number) for axis in drawn}
        for corner in itertools.product(*(axis.values for axis in grids)):
            found = {**dict(zip((axis.field for axis in grids), corner, strict=True)), **sample}
            yield {axis.field: found[axis.field] for axis in axes}
