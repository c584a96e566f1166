"""A bar on a terminal, and a plain line now and then elsewhere."""

import io
import sys

import pytest

from experiments.run import progress
from experiments.run.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(8) as bar:
        bar.update(0, "compiling")
        bar.update(3, "held out 4.5")
    return stream.getvalue()


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whatever runs the tests may have told rich that it is no terminal.
    for name in ("NO_COLOR", "TERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    text = run(monkeypatch, Terminal())
    assert "3/8" in text
    assert "held out 4.5" in text
    assert "━" in text


def test_a_file_gets_a_line_when_some_time_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, io.StringIO()) == ""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1)
    assert run(monkeypatch, io.StringIO()) == (
        "generation 0 of at most 8: compiling\ngeneration 3 of at most 8: held out 4.5\n"
    )
