"""Signals that ask a run to stop: held back while its processes start, and without effect in them."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from experiments.run.children import STOPS, starting

CHILD = """
import signal, subprocess, sys
sys.stdin.readline()
from experiments.run.children import leave_stops_to_parent
leave_stops_to_parent()
print("ready", flush=True)
sys.stdin.readline()
program = subprocess.Popen(["sleep", "100"])
program.terminate()
print(program.wait(), flush=True)
"""


def ask(child: subprocess.Popen[str]) -> str:
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write("\n")
    child.stdin.flush()
    return child.stdout.readline()


def test_a_child_that_leaves_signals_to_its_parent_lives_on() -> None:
    with starting():
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
    for number in STOPS:
        os.kill(child.pid, number)  # before it has said what to do
    assert ask(child) == "ready\n"
    for number in STOPS:
        os.kill(child.pid, number)
    # Programs that it begins are ended as usual.
    assert ask(child) == f"{-signal.SIGTERM}\n"
    assert child.communicate(timeout=60) == ("", None)
    assert child.returncode == 0


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_for_the_parent_waits_until_the_block_ends(number: signal.Signals) -> None:
    told: list[int] = []
    before = signal.signal(number, lambda number, frame: told.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        with starting():
            signal.pthread_kill(threading.get_ident(), number)
            assert told == []
        assert told == [number]
    finally:
        signal.signal(number, before)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
