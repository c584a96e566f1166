"""Metric rows as JSON lines: one row a generation, key `generation`, everything timed under `timing`."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.run.errors import RunError
from experiments.run.folder import (
    AppendedFile,
    as_object,
    full_disk_in_one_sentence,
    is_figure,
    is_number,
    kind_of,
    write_whole,
)

Row = dict[str, Any]


class MetricsFile(AppendedFile):
    """Appends rows to a metrics.jsonl; every row is in the file before `write` returns.

    Args:
        path: the file, made where there is none.
        generation: rows from this generation on are cut off first, and a half-written last line.

    Raises:
        RunError: if the file lacks rows before `generation`, or cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> with MetricsFile(path) as metrics:
        ...     row = metrics.write({"generation": 0, "fitness_mean": float("nan")})
        >>> path.read_text()
        '{"generation": 0, "fitness_mean": null}\\n'
    """

    def __init__(self, path: Path, generation: int = 0) -> None:
        with full_disk_in_one_sentence(path):
            rows = read_metrics(path)[:generation]
            if len(rows) < generation:
                raise RunError(
                    f"{path} holds {len(rows)} of the {generation} rows before the checkpoint; "
                    "replace the run with --overwrite"
                )
            if path.is_file():
                text = "".join(json.dumps(row) + "\n" for row in rows)
                write_whole(path, lambda file: file.write(text.encode()))
        super().__init__(path)
        self.rows = rows

    def write(self, row: Mapping[str, Any]) -> Row:
        """Append one row; numbers that are not finite become null, as JSON has no name for them."""
        row = {name: plain(value) for name, value in row.items()}
        self.append(json.dumps(row))
        self.rows.append(row)
        return row


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl; a last line that was never finished does not count.

    Raises:
        RunError: for a line that is no row; it names the line and the field.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> _ = path.write_text('{"generation": 0, "score": 0.5}\\n{"generation": "x"}\\n')
        >>> read_metrics(path)
        Traceback (most recent call last):
        experiments.run.errors.RunError: .../metrics.jsonl, line 2: generation must be 1, got 'x'
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = as_object(line)
        except ValueError as error:
            raise RunError(f"{path}, line {number} {error}") from error
        if type(row.get("generation")) is not int or row["generation"] != number - 1:
            raise wrong(path, number, row, "generation", str(number - 1))
        for name, value in row.items():
            if not _is_value(value):
                raise wrong(path, number, row, name, "a number, null, or several of them")
        rows.append(row)
    return rows


def wrong(path: Path, line: int, row: Row, name: str, right: str) -> RunError:
    """What is said of a field of a row."""
    found = kind_of(row[name]) if name in row else "nothing"
    return RunError(f"{path}, line {line}: {name} must be {right}, got {found}")


def expect_names(path: Path, rows: Sequence[Row], names: Iterable[str]) -> None:
    """Raises RunError for the first row that lacks one of the names, or where it is another kind of value.

    A number for each of several seeds is a list in every row, as long as in the others.
    """
    for name in names:
        size: int | None = None
        for number, row in enumerate(rows, 1):
            if name not in row or not is_figure(row[name]):
                raise wrong(path, number, row, name, "a number, null or a list of them")
            if row[name] is None:
                continue
            own = len(row[name]) if isinstance(row[name], list) else 0
            size = own if size is None else size
            if own != size or row[name] == []:
                raise wrong(path, number, row, name, "as many numbers as in the lines before")


def seconds_of(path: Path, rows: Sequence[Row], alone: bool = False) -> list[float]:
    """The time that each row took, in seconds.

    Args:
        path: where the rows are from.
        rows: of :func:`read_metrics`.
        alone: count a run's share of a program of several.

    Raises:
        RunError: for a row that does not tell.
    """
    times = []
    for number, row in enumerate(rows, 1):
        timing = row.get("timing")
        if not isinstance(timing, dict) or not is_number(timing.get("seconds")):
            raise wrong(path, number, row, "timing", "an object with seconds")
        share = timing.get("together", 1)
        if not is_number(share) or share < 1:
            raise wrong(path, number, row, "timing", "an object whose together is 1 or more")
        times.append(timing["seconds"] / (share if alone else 1))
    return times


def _is_value(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_value, value.values()))
    values = value if isinstance(value, list) else [value]
    return all(isinstance(one, bool) or one is None or is_number(one) for one in values)


def plain(value: Any) -> Any:
    """Arrays and NumPy scalars as Python's numbers and lists; what is not finite as None."""
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
