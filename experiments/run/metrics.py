"""Metric rows as JSON lines: one row a generation, key `generation`, everything timed under `timing`."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.run.errors import RunError
from experiments.run.folder import full_disk_in_one_sentence, write_whole

Row = dict[str, Any]


class MetricsFile:
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
        self.path = path
        with full_disk_in_one_sentence(path):
            rows = [row for row in read_metrics(path) if row["generation"] < generation]
            if [row["generation"] for row in rows] != list(range(generation)):
                raise RunError(
                    f"{path} holds {len(rows)} of the {generation} rows before the checkpoint; "
                    "replace the run with --overwrite"
                )
            if path.is_file():
                text = "".join(json.dumps(row) + "\n" for row in rows)
                write_whole(path, lambda file: file.write(text.encode()))
            self._file = path.open("a")
        self.rows = rows

    def write(self, row: Mapping[str, Any]) -> Row:
        """Append one row; numbers that are not finite become null, as JSON has no name for them."""
        row = {name: plain(value) for name, value in row.items()}
        with full_disk_in_one_sentence(self.path):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        self.rows.append(row)
        return row

    def sync(self) -> None:
        """Returns when all rows would survive a loss of power."""
        with full_disk_in_one_sentence(self.path):
            os.fsync(self._file.fileno())

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with full_disk_in_one_sentence(self.path):
            self._file.close()


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl; a last line that was never finished does not count."""
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text().split("\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise RunError(f"{path}, line {number} is not JSON: {line[:60]!r}") from error
    return rows


def plain(value: Any) -> Any:
    """Arrays and NumPy scalars as Python's numbers and lists; what is not finite as None."""
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
