"""Says where a run's time went."""

import time


class Stopwatch:
    """Seconds since a start, and how they divide into named phases.

    Args:
        started: `time.perf_counter()` at the start; now by default.

    Attributes:
        phases: seconds of every phase so far, in order.
    """

    def __init__(self, started: float | None = None) -> None:
        self.started = time.perf_counter() if started is None else started
        self.phases: dict[str, float] = {}

    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started

    def finish(self, phase: str) -> None:
        """End a phase that began where the last one ended."""
        self.phases[phase] = round(self.total() - sum(self.phases.values()), 3)
