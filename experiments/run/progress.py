"""Progress on stderr: a line that is redrawn on a terminal, otherwise a plain line every now and then."""

import io
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Live

# Where there is no terminal: seconds from one line to the next, at first and at most. In between it is a
# tenth of the time that has passed, so that a run of a day writes some hundred lines.
SECONDS_BETWEEN_LINES, LONGEST_BETWEEN_LINES = 10.0, 600.0
# The time left is told by so many of the newest generations.
NEWEST = 20
# The shortest and the longest bar, in columns.
BAR = (8, 40)


class State(NamedTuple):
    """How far a run has come.

    Attributes:
        done: generations.
        total: after how many it ends at the latest.
        figures: what is told of it, the most important first.
        part: how far the generation is that is running: done, total and of what.
        left: seconds that remain; None where nothing says it yet.
        elapsed: seconds since the start of this process's share.
    """

    done: int
    total: int
    figures: Sequence[str] = ()
    part: tuple[int, int, str] | None = None
    left: float | int | None = None
    elapsed: float | int = 0.0


class Progress:
    """Shows how far a run has come; as a context, also to :func:`part`.

    Args:
        total: generations after which it ends.
        shown: whether anything is said at all.
        stream: where to; stderr by default.
        clock: seconds.
    """

    def __init__(
        self,
        total: int,
        shown: bool = True,
        stream: TextIO | io.StringIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._total, self._shown, self._clock = total, shown, clock
        self._stream = stream or sys.stderr
        self._live = _live(self, stream) if shown and self._stream.isatty() else None
        self._began = self._last_line = clock()
        self._done, self._figures = 0, tuple[str, ...]()
        self._part: tuple[int, int, str] | None = None
        # When generations were over.
        self._marks: list[tuple[float, int]] = []

    def __enter__(self) -> "Progress":
        _active.append(self)
        if self._live is not None:
            self._live.start()
            self._live.add_task("", total=None)
        return self

    def update(self, done: int, figures: str | Sequence[str]) -> None:
        """Say that `done` generations are over, and something about them.

        Args:
            done: how many.
            figures: phrases, the most important first; or one text of such phrases with ", " between them.
        """
        told = figures.split(", ") if isinstance(figures, str) else figures
        self._done, self._figures = done, tuple(filter(None, told))
        self._part = None
        self._marks = [*self._marks[-NEWEST:], (self._clock(), done)]
        self._say()

    def part(self, done: int, total: int, what: str) -> None:
        """Say how far the generation is that is running: `done` of `total` members, prompts, and so on."""
        self._part = (done, total, what) if total > 0 else None
        self._say()

    @property
    def state(self) -> State:
        """How far the run is now."""
        now = self._clock()
        return State(
            self._done, self._total, self._figures, self._part, self._left(now), now - self._began
        )

    def _left(self, now: float) -> float | None:
        """Seconds that remain, by the pace of the newest generations; the first compiles, and does not
        count where there are others."""
        if not self._marks:
            return None
        share = min(1.0, self._part[0] / self._part[1]) if self._part else 0.0
        marks = self._marks[1:] if len(self._marks) > 2 else self._marks
        (first, begun), (last, done) = marks[0], marks[-1]
        if done > begun:
            pace = (last - first) / (done - begun)
            ahead = self._total - done
            # Of the generation that runs as much is left as its share says, or as its time says.
            gone = share * pace if share else min(now - last, pace)
            return max(0.0, ahead * pace - gone) if ahead else 0.0
        # The first generation compiles before it does anything: its beginning says little of the rest.
        if share >= 0.5:
            return (now - last) / share * (self._total - done - share)
        return None

    def _say(self) -> None:
        if self._live is not None or not self._shown:
            return
        now = self._clock()
        pause = min(max(SECONDS_BETWEEN_LINES, (now - self._began) / 10), LONGEST_BETWEEN_LINES)
        if now - self._last_line >= pause:
            self._last_line = now
            print(plain(self.state), file=self._stream)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        _active.remove(self)
        if self._live is not None:
            self._live.stop()


_active: list[Progress] = []


def part(done: int, total: int, what: str) -> None:
    """Tells the progress that is shown, if any, how far the generation is that is running.

    Example:
        >>> part(64, 512, "members")  # nothing is shown here
    """
    if _active:
        _active[-1].part(done, total, what)


def speeds(
    counts: Mapping[str, float | int | Sequence[float | int] | None], seconds: float
) -> list[str]:
    """How many of each a second took, in words; nothing is said of what did not happen.

    Example:
        >>> speeds({"steps": 120_000, "written tokens": 0, "prompt tokens": [300, 300]}, 2.0)
        ['60,000 steps/s', '300 prompt tokens/s']
    """
    told = []
    for what, count in counts.items():
        number = sum(count) if isinstance(count, Sequence) else count or 0
        if number > 0 and seconds > 0:
            rate = number / seconds
            told.append(f"{rate:,.0f} {what}/s" if rate >= 10 else f"{rate:.2g} {what}/s")
    return told


def plain(state: State) -> str:
    """A state as a line of a file.

    Example:
        >>> plain(State(3, 8, ["held out 4.5"], None, 75.0))
        'generation 3 of at most 8, 1:15 left: held out 4.5'
        >>> plain(State(3, 8, [], (64, 512, "members")))
        'generation 3 of at most 8:  64/512 members'
    """
    head = f"generation {state.done} of at most {state.total}"
    if state.left is not None and state.done < state.total:
        head += f", {clock(state.left)} left"
    told = [*([_share(state.part)] if state.part else []), *state.figures]
    return f"{head}: {', '.join(told)}" if told else head


def line(state: State, width: int, ascii_only: bool = False) -> str:
    """A state as the line of a terminal with so many columns.

    The number of generations comes first, then the time left, then the first figure; what fits beside them
    is, in this order: the share of the generation, the other figures, a bar, and the time that has passed.

    Example:
        >>> state = State(120, 300, ["held out 412.5", "return 398.1"], (64, 512, "members"), 75.0, 50.0)
        >>> for width in (60, 40):
        ...     print(line(state, width, ascii_only=True))
        120/300  1:15 left   64/512 members  held out 412.5
        120/300  1:15 left  held out 412.5
    """
    count = f"{state.done}/{state.total}"
    left = f"{clock(state.left)} left" if state.left is not None else ""
    first, *others = state.figures or ("",)
    # What stands where is one order, what gives way is another.
    shown = {"count": count, "left": left, "figure": first}
    wanted = {"share": _share(state.part) if state.part else ""}
    wanted |= {f"other {i}": text for i, text in enumerate(others)}
    order = ["word", "count", "bar", "left", "passed", "share", "figure", *list(wanted)[1:]]
    joined = lambda texts: "  ".join(texts[name] for name in order if texts.get(name))
    for name, text in wanted.items():
        if text and len(joined({**shown, name: text})) <= width:
            shown[name] = text
    if len(joined({**shown, "word": "generation"})) - 1 <= width:
        shown["count"] = f"generation {count}"
    room = width - len(joined(shown)) - 2
    if room >= BAR[0]:
        size = min(room, BAR[1])
        shown["bar"] = _bar(state, size, ascii_only)
    if len(joined({**shown, "passed": f"{clock(state.elapsed)} passed"})) <= width:
        shown["passed"] = f"{clock(state.elapsed)} passed"
    text = joined(shown)
    mark = "..." if ascii_only else "…"
    return text if len(text) <= width else text[: max(0, width - len(mark))] + mark


def clock(seconds: float | int) -> str:
    """A time as people write it.

    Example:
        >>> clock(5), clock(75.4), clock(3 * 3600 + 61), clock(200 * 3600)
        ('0:05', '1:15', '3:01:01', '8 d 8 h')
    """
    whole = round(seconds)
    if whole >= 100 * 3600:
        return f"{whole // 86400} d {whole % 86400 // 3600} h"
    minutes = f"{whole // 60 % 60:02d}:{whole % 60:02d}"
    return f"{whole // 3600}:{minutes}" if whole >= 3600 else minutes.removeprefix("0")


def _share(part: tuple[int, int, str]) -> str:
    done, total, what = part
    whole = f"{total:,}"
    # As wide at the beginning as at the end, so that nothing beside it moves.
    return f"{done:>{len(whole)},}/{whole} {what}"


def _bar(state: State, size: int, ascii_only: bool) -> str:
    """How much of the run is over, the running generation's share with it."""
    share = min(1.0, state.part[0] / state.part[1]) if state.part else 0.0
    full = int(size * min(1.0, (state.done + share) / max(state.total, 1)))
    done, ahead = ("#", "-") if ascii_only else ("━", "─")
    return done * full + ahead * (size - full)


def _live(progress: Progress, stream: TextIO | io.StringIO | None) -> "Live | None":
    """A line that is redrawn; None on a terminal that cannot."""
    from rich.console import Console
    from rich.progress import Progress as Live
    from rich.progress import ProgressColumn, Task
    from rich.table import Column
    from rich.text import Text

    console = Console(file=stream, stderr=stream is None)
    if not console.is_terminal or console.is_dumb_terminal:
        return None

    class Line(ProgressColumn):
        """The whole line: it decides by itself what there is room for."""

        def render(self, task: Task) -> Text:
            text = line(progress.state, console.width - 1, console.options.ascii_only)
            return Text(text, no_wrap=True, overflow="crop")

    column = Line(table_column=Column(no_wrap=True, overflow="crop"))
    return Live(column, console=console, refresh_per_second=4)
