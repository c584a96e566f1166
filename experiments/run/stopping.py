"""SIGTERM, SIGHUP and Ctrl-C as requests: the run saves at the next generation boundary, then ends.

Where a process has nothing to save yet, or nothing more, it ends at once (:func:`from_the_start`). Imports
nothing heavy, so that this holds before anything else does.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from experiments.run.errors import RUN_ME_AGAIN

SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C", signal.SIGHUP: "SIGHUP"}
# After a second Ctrl-C, so long for what Python is in the middle of.
PATIENCE = 1.0
INTERRUPTED = 130


class StopRequest:
    """Attributes: reason: "SIGTERM", "SIGHUP" or "Ctrl-C" once somebody asked, None before."""

    reason: str | None = None

    def at(self, generation: int) -> bool:
        """Whether to stop before this generation, which has to be asked before every one.

        Of several processes, somebody asked one of them, and all stop before the same generation.
        """
        from experiments.run import hosts

        if not hosts.several():
            return self.reason is not None
        stop = hosts.preempted(generation)
        if stop and self.reason is None:
            self.reason = SIGNALS[signal.SIGTERM]
        return stop

    def begin(self) -> None:
        """From here on there is something to save, until the block of this request ends."""
        global _unsaved
        with _lock:
            _unsaved = True


# Of the outermost block, or of the process from its start; blocks inside of it share it.
_current: StopRequest | None = None
# Whether a signal is only noted, as something would be lost or said wrongly. The thread that ends the
# process holds the lock while it looks.
_unsaved = False
_lock = threading.Lock()
_interrupted = threading.Event()


@contextlib.contextmanager
def stop_requests(begun: bool = True) -> Iterator[StopRequest]:
    """Collects the signals within the block; a second Ctrl-C interrupts.

    Blocks inside of another see what was asked for before they began.

    Args:
        begun: whether there is something to save at once; otherwise from :meth:`StopRequest.begin` on. Until
            then a process that watches from its start ends at the first signal.
    """
    global _current, _unsaved
    request, outer, outer_unsaved = _current or StopRequest(), _current, _unsaved
    before = {} if outer else {number: signal.signal(number, _note) for number in _wanted()}
    _current = request
    if begun:
        request.begin()
    try:
        yield request
        # Not where an error is on its way: nothing may hide it.
        with _lock:
            _unsaved = outer_unsaved
    finally:
        _current = outer
        if outer is None:
            _unsaved = False
        for number, handler in before.items():
            signal.signal(number, handler)


def from_the_start() -> None:
    """From here on the process ends at once at a signal, with exit code 75, unless something is unsaved.

    For a process whose whole life is one command. A thread looks for signals, since Python's own handlers
    wait for what the main thread is in the middle of, such as a compilation.
    """
    global _current
    _current = StopRequest()
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read,), daemon=True).start()
    for number in _wanted():
        signal.signal(number, _note)


def hold() -> None:
    """From here on signals are only noted: the process is to end by itself, or not without others."""
    (_current or StopRequest()).begin()


def _wanted() -> list[signal.Signals]:
    # JAX has a handler of its own for SIGTERM, by which all of several processes are told. And nohup means
    # what it says.
    return [
        number
        for number in SIGNALS
        if not (number == signal.SIGTERM and _several())
        and not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN)
    ]


def _several() -> bool:
    if "jax" not in sys.modules:
        return False
    from experiments.run import hosts

    return hosts.several()


def _note(number: int, frame: FrameType | None) -> None:
    request = _current
    if request is None:
        return
    if request.reason is not None and number == signal.SIGINT:
        _interrupted.set()
        raise KeyboardInterrupt
    request.reason = SIGNALS[signal.Signals(number)]
    if number != signal.SIGTERM and _several():
        os.kill(os.getpid(), signal.SIGTERM)


def _watch(read: int) -> None:
    """Ends the process where that is due; in a thread of its own."""
    asked = False
    while numbers := os.read(read, 1):
        number = numbers[0]
        if number not in SIGNALS:
            continue
        with _lock:
            if not _unsaved:
                name = SIGNALS[signal.Signals(number)]
                _leave(
                    f"Stopped by {name}; nothing is lost. Run the same command again to continue."
                )
        if asked and number == signal.SIGINT and not _interrupted.wait(PATIENCE):
            _leave("Interrupted.", INTERRUPTED)
        asked = True


def _leave(sentence: str, code: int = RUN_ME_AGAIN) -> None:
    # A progress bar hides the cursor.
    shown = "\r\x1b[?25h" if os.isatty(2) else ""
    with contextlib.suppress(OSError):  # after a SIGHUP, nobody may be there to read
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{shown}{sentence}\n".encode())
    os._exit(code)
