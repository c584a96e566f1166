"""A line that is redrawn on a terminal of any width, and a plain line now and then elsewhere."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from places import ROOT

from experiments.run import progress
from experiments.run.progress import Progress, State, line, speeds

FIGURES = ("45.1% of held-out questions right", "reward 0.382", "1,234 written tokens/s")


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_line_has_count_time_and_figure_at_any_width(width: int) -> None:
    for done, total, left in ((3, 8, 5.0), (1200, 12000, 45296.0)):
        for part in (None, (64, 512, "members")):
            text = line(State(done, total, FIGURES, part, left, 100.0), width)
            assert len(text) <= width
            assert f"{done}/{total}" in text
            assert "left" in text
            assert FIGURES[0] in text


def test_what_fits_less_gives_way_in_order() -> None:
    state = State(3, 8, FIGURES, (64, 512, "members"), 5.0, 100.0)
    told = {width: line(state, width) for width in (60, 80, 120, 140)}
    assert "members" not in told[60]
    assert "64/512 members" in told[80]
    assert FIGURES[2] not in told[80]
    assert FIGURES[2] in told[120]
    assert all(text in told[140] for text in ("generation 3/8", "64/512 members", *FIGURES, "━"))


def test_a_narrow_terminal_cuts_the_figure_not_the_count() -> None:
    text = line(State(3, 8, FIGURES, None, 5.0), 24)
    assert len(text) == 24
    assert text.startswith("3/8  0:05 left  45.1")


def test_the_time_left_is_that_of_the_newest_generations() -> None:
    clock = Clock()
    with Progress(100, stream=io.StringIO(), clock=clock) as shown:
        shown.update(0, "compiling")
        assert shown.state.left is None
        clock.now = 60.0
        shown.update(1, "")  # it compiled
        clock.now = 62.0
        shown.update(2, "")
        assert shown.state.left == pytest.approx(2.0 * 98)
        clock.now = 63.0
        assert shown.state.left == pytest.approx(2.0 * 98 - 1)
        shown.part(3, 4, "members")
        assert shown.state.left == pytest.approx(2.0 * 98 - 1.5)


def test_a_share_of_the_first_generation_says_how_long_the_run_takes() -> None:
    clock = Clock()
    with Progress(10, stream=io.StringIO(), clock=clock) as shown:
        shown.update(0, "compiling")
        clock.now = 30.0
        progress.part(128, 512, "members")
        assert shown.state.part == (128, 512, "members")
        # Most of it was compiled until now.
        assert shown.state.left is None
        clock.now = 60.0
        progress.part(256, 512, "members")
        assert shown.state.left == pytest.approx(120 * 9.5)
    progress.part(1, 2, "members")  # of no run: nothing happens
    assert shown.state.part == (256, 512, "members")


def test_a_file_gets_fewer_lines_the_longer_it_takes() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(100_000, stream=stream, clock=clock) as shown:
        for second in range(86_400 // 4):
            clock.now = 4.0 * second
            shown.update(second // 10, FIGURES)
            shown.part(second % 10, 10, "members")
    lines = stream.getvalue().splitlines()
    assert 100 < len(lines) < 200
    assert "━" not in stream.getvalue()
    assert re.fullmatch(
        r"generation \d+ of at most 100000, [\d:dh ]+ left: 45.1% of held-out questions right, "
        r"reward 0.382, 1,234 written tokens/s",
        lines[-1],
    )


def test_a_file_gets_nothing_of_a_run_of_seconds() -> None:
    stream = io.StringIO()
    with Progress(8, stream=stream) as shown:
        shown.update(3, "held out 4.5")
        shown.part(1, 2, "members")
    assert stream.getvalue() == ""


def test_a_rate_of_nothing_is_not_told() -> None:
    counts = {"written tokens": 0, "prompt tokens": None, "steps": [0, 0], "bytes": 3}
    assert speeds(counts, 2.0) == ["1.5 bytes/s"]
    assert speeds({"steps": 3}, 0.0) == []


SHOWN = """
from experiments.run.progress import Progress, part
with Progress(1200) as shown:
    shown.update(0, "compiling")
    shown.update(7, %r)
    part(64, 512, "members")
    print("a line of another")
"""


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_terminal_shows_the_line(width: int) -> None:
    """The real screen: a pseudo-terminal, with rich between."""
    text = screen(SHOWN % (FIGURES,), width)
    # Where another writes, the line is drawn anew after it.
    drawn = [one.rstrip() for one in re.split(r"[\r\n]+", text) if "/1200" in one]
    assert max(map(len, drawn)) <= width
    assert "7/1200" in drawn[-1]
    assert "left" in drawn[-1]
    assert FIGURES[0] in drawn[-1]
    assert ("64/512 members" in drawn[-1]) == (width >= 80)
    assert "a line of another" in text


def screen(program: str, width: int) -> str:
    """What a program writes on a terminal of so many columns."""
    terminal, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    # Not the environment of the tests: readline sets COLUMNS there, past os.environ.
    environment = {"TERM": "xterm", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdin=inner, stdout=inner, stderr=inner
    )
    os.close(inner)
    written = b""
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not data:
            break
        written += data
    os.close(terminal)
    assert process.wait() == 0, written.decode()
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.decode())
