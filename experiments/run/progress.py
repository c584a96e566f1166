"""Progress on stderr: a bar on a terminal, otherwise a plain line every now and then."""

import sys
import time
from typing import Any

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows how far a run has come.

    Args:
        total: generations after which it ends.
        shown: whether anything is said at all.
    """

    def __init__(self, total: int, shown: bool = True) -> None:
        self._total, self._shown = total, shown
        self._bar = _bar() if shown and sys.stderr.isatty() else None
        self._last_line = time.perf_counter()

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total)
        return self

    def update(self, done: int, text: str) -> None:
        """Say that `done` generations are over, and something about them."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text)
        elif self._shown and time.perf_counter() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.perf_counter()
            print(f"generation {done} of at most {self._total}: {text}", file=sys.stderr)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("generation"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
    )
