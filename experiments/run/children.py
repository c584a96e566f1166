"""Processes that work for a run leave it to the run when to end: SIGTERM does not reach them first.

A scheduler, a terminal or `kill -- -GROUP` sends a signal to all processes of a job at once. The run saves
then, for which it may need those that work for it; it ends them itself.
"""

import contextlib
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker
from types import FrameType

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Processes that are begun within the block get no signal of `STOPS` before they say what to do.

    They have to call :func:`leave_stops_to_parent`. A signal for this process waits until the end of the
    block.
    """
    # Where multiprocessing begins this process of its own, it lets signals through again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_stops_to_parent() -> None:
    """From here on, signals of `STOPS` do nothing in this process.

    Programs that it executes have the signals' usual effects, so that they can be ended by SIGTERM.
    """
    for number in STOPS:
        # A handler, not SIG_IGN, which programs that are executed would inherit; theirs is kept.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _nothing)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def _nothing(number: int, frame: FrameType | None) -> None:
    pass
