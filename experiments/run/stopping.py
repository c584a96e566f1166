"""SIGTERM and Ctrl-C as requests: the run saves at the next generation boundary, then ends."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class StopRequest:
    """Attributes: reason: "SIGTERM" or "Ctrl-C" once somebody asked, None before."""

    reason: str | None = None


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Collects the signals within the block; a second Ctrl-C interrupts at once."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if request.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.reason = SIGNALS[signal.Signals(number)]

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
