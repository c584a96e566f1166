"""Metric rows as JSON lines, and the clock that says where a run's time went."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


class MetricsFile:
    """Appends rows to a metrics.jsonl; every row is on disk before `write` returns.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> with MetricsFile(path) as metrics:
        ...     metrics.write({"generation": 0, "fitness_mean": float("nan")})
        >>> path.read_text()
        '{"generation": 0, "fitness_mean": null}\\n'
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; numbers that are not finite become null, as JSON has no name for them."""
        self._file.write(json.dumps({name: _plain(value) for name, value in row.items()}) + "\n")
        self._file.flush()

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _plain(value: Any) -> Any:
    """NumPy scalars as Python's; what is not finite as None."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Stopwatch:
    """Seconds since a start, and how they divide into named phases.

    Attributes:
        started: `time.perf_counter()` at the start.
        phases: seconds of every phase so far, in order.
    """

    def __init__(self, started: float) -> None:
        self.started = started
        self.phases: dict[str, float] = {}

    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started

    def finish(self, phase: str) -> None:
        """End a phase that began where the last one ended."""
        self.phases[phase] = round(self.total() - sum(self.phases.values()), 3)
