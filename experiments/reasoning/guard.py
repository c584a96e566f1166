"""A guard beside each process that computes rewards: when that or the run ends, nothing it began is left.

The run starts the guard, the guard forks the worker. On Linux what a worker leaves behind becomes the
guard's child, in a session of its own or not, however the worker ended, and the guard kills all of it.
Elsewhere it kills the worker's group of processes, out of which a child may have stepped.

Out of its reach are programs that others begin for a reward (a daemon of containers, cron), processes of
another user, and what is left by a reward that kills its own guard.
"""

import contextlib
import ctypes
import os
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from experiments.run.children import leave_stops_to_parent

# Of Linux's prctl(2).
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
# Seconds for processes to end that were killed.
KILL_S = 5.0
PROCESSES = Path("/proc")


def guard(control: int, pipe: int, work: Callable[[], None]) -> None:
    """Runs `work` in a fork of this process, and ends it with all that it began; does not return.

    Args:
        control: a file descriptor that becomes readable, or closes, when everything has to end.
        pipe: a file descriptor of the worker's, which is closed here.
        work: of the worker, which ends when it returns.
    """
    parent, own = os.getppid(), os.getpid()
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    leave_stops_to_parent()
    # A child that ends is a byte in this pipe.
    bell, ringer = os.pipe()
    for end in (bell, ringer):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(ringer, warn_on_full_buffer=False)
    worker = os.fork()
    if worker == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for end in (bell, ringer, control):
            os.close(end)
        _work(own, work)
    os.close(pipe)
    with selectors.DefaultSelector() as waiting:
        waiting.register(control, selectors.EVENT_READ)
        waiting.register(bell, selectors.EVENT_READ)
        # `control` may be held open by a copy of the run, so its end is asked for, too.
        while worker not in _reaped() and os.getppid() == parent:
            ready = {key.fd for key, _ in waiting.select(timeout=1.0)}
            if control in ready:
                break
            with contextlib.suppress(BlockingIOError):
                os.read(bell, 4096)
    _kill_all(worker)
    os._exit(0)


def _work(guard: int, work: Callable[[], None]) -> None:
    try:
        os.setpgid(0, 0)
        # The kernel kills the worker where somebody kills the guard.
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == guard:
            work()
    except Exception:
        traceback.print_exc()
    finally:
        # What is registered to run at an end belongs to the guard.
        os._exit(0)


def _kill_all(worker: int) -> None:
    """Kills all descendants of this process, until there are none or they are not to be killed."""
    deadline, own = time.monotonic() + KILL_S, os.getpgid(0)
    _kill(os.killpg, worker)
    while time.monotonic() < deadline:
        found = descendants(os.getpid())
        # Groups too: of processes that fork and end faster than they are listed, the group stays.
        killed = [_kill(os.killpg, group) for group in set(found.values()) - {own}]
        killed += [_kill(os.kill, one) for one in found]
        if not any(killed):
            return
        time.sleep(0.002)
        _reaped()


def _kill(how: Callable[[int, int], None], number: int) -> bool:
    try:
        how(number, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _reaped() -> set[int]:
    """Children of this process that have ended since the last call."""
    found: set[int] = set()
    with contextlib.suppress(ChildProcessError):
        while process := os.waitpid(-1, os.WNOHANG)[0]:
            found.add(process)
    return found


def descendants(process: int) -> dict[int, int]:
    """Children of a process, their children, and so on, each with the number of its group.

    There are none where the system has no /proc.
    """
    if not PROCESSES.is_dir():
        return {}
    children: dict[int, list[int]] = {}
    groups: dict[int, int] = {}
    for entry in PROCESSES.iterdir():
        if entry.name.isdigit():
            # Some end while they are listed.
            with contextlib.suppress(OSError):
                # "1 (name) S PARENT GROUP ...", where the name may have brackets and blanks of its own.
                words = (entry / "stat").read_bytes().rpartition(b")")[2].split()
                children.setdefault(int(words[1]), []).append(int(entry.name))
                groups[int(entry.name)] = int(words[2])
    found = list(children.get(process, []))
    for one in found:
        found += children.get(one, [])
    return {one: groups[one] for one in found}


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
