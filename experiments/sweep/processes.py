"""Commands as processes of this machine, some at a time, that do not outlive this one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.run.stopping import StopRequest
from experiments.sweep.worker import PARENT


class Task(NamedTuple):
    """A command, the words after `eggroll`, and the file for what it prints."""

    number: int
    words: tuple[str, ...]
    log: Path


def run_tasks(
    tasks: Sequence[Task],
    at_once: int,
    stop: StopRequest,
    ended: Callable[[Task, int], None],
    wait: Callable[[], None],
) -> None:
    """Run all of them, or until somebody asks to stop: then those under way get SIGTERM, and are waited for.

    Args:
        tasks: in the order in which they begin.
        at_once: how many at a time.
        stop: asked for by a signal to this process.
        ended: gets a task and its exit code (minus the signal that killed it).
        wait: called a few times a second.
    """
    queue = list(tasks)
    alive: dict[subprocess.Popen, Task] = {}
    asked = False
    try:
        while alive or (queue and not stop.reason):
            while queue and len(alive) < at_once and not stop.reason:
                task = queue.pop(0)
                alive[_begin(task)] = task
            if stop.reason and not asked:
                asked = True
                for process in alive:
                    process.terminate()
            wait()
            time.sleep(0.05)
            for process in [p for p in alive if p.poll() is not None]:
                task = alive.pop(process)
                ended(task, process.returncode)
    finally:
        for process in alive:
            process.kill()
            process.wait()


def _begin(task: Task) -> subprocess.Popen:
    task.log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, PARENT: str(os.getpid())}
    # The same packages as in this process, whatever the folder that it was started in holds.
    code = f"import sys; sys.path[:] = {sys.path!r}; from experiments.run.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *task.words]
    with task.log.open("a") as log:
        # In a session of its own: Ctrl-C is for this process, which passes it on as SIGTERM.
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def how_it_ended(code: int) -> str:
    """An exit code in words.

    Example:
        >>> how_it_ended(-9), how_it_ended(3)
        ('its process was ended by SIGKILL', 'its process ended with exit code 3')
    """
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"
