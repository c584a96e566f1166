"""SIGTERM and Ctrl-C as requests: the run saves at the next generation boundary, then ends."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

from experiments.run import hosts

SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class StopRequest:
    """Attributes: reason: "SIGTERM" or "Ctrl-C" once somebody asked, None before."""

    reason: str | None = None

    def at(self, generation: int) -> bool:
        """Whether to stop before this generation, which has to be asked before every one."""
        return self.reason is not None


class JointRequest(StopRequest):
    """Of several processes: somebody asked one of them, and all stop before the same generation."""

    def at(self, generation: int) -> bool:
        stop = hosts.preempted(generation)
        if stop and self.reason is None:
            self.reason = SIGNALS[signal.SIGTERM]
        return stop


# Of the outermost block, which those inside of it share.
_current: StopRequest | None = None


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Collects the signals within the block; a second Ctrl-C interrupts at once.

    Blocks inside of another see what was asked for before they began.
    """
    global _current
    if _current is not None:
        yield _current
        return
    joint = hosts.several()
    request = JointRequest() if joint else StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if request.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.reason = SIGNALS[signal.Signals(number)]
        if joint:
            # JAX has a handler of its own for it, by which all processes are told.
            os.kill(os.getpid(), signal.SIGTERM)

    numbers = [signal.SIGINT] if joint else list(SIGNALS)
    before = {number: signal.signal(number, note) for number in numbers}
    _current = request
    try:
        yield request
    finally:
        _current = None
        for number, handler in before.items():
            signal.signal(number, handler)
