"""samples.txt of a run folder: what the model writes, from early in training to its end."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.run.errors import RunError
from experiments.run.folder import full_disk_in_one_sentence, write_whole

if TYPE_CHECKING:
    from experiments.run.trainer import Carry, Trainer


class Samples:
    """Writes samples.txt, where a trainer has a language model.

    Args:
        trainer: of the run.
        path: the file.
    """

    def __init__(self, trainer: "Trainer[Any]", path: Path) -> None:
        # Reports read samples.txt without it, and without JAX.
        from experiments.run.trainer import LanguageTrainer

        self._trainer = trainer if isinstance(trainer, LanguageTrainer) else None
        self._path = path

    def add(self, generation: int, state: "Carry", last: bool = False) -> None:
        """Adds a sample, if one is due."""
        if self._trainer is None:
            return
        every = self._trainer.sample_every
        if last or generation == 0 or (every is not None and generation % every == 0):
            add_sample(self._path, generation, self._trainer.sample(state))


_HEADER = "after "
_INDENT = "    "


class Sample(NamedTuple):
    """What a model wrote after so many updates, line by line."""

    generation: int
    lines: tuple[str, ...]


def add_sample(path: Path, generation: int, text: bytes | str) -> None:
    """Append a sample; what the file already holds from this generation on is replaced.

    So a run that was killed and goes on leaves the file of an unbroken one. Bytes are made readable; a
    str is written as it is.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "samples.txt"
        >>> for generation, text in [(0, b"q@z"), (5, b"th the"), (5, b"the end")]:
        ...     add_sample(path, generation, text)
        >>> print(path.read_text())
        after 0 updates
            q@z
        after 5 updates
            the end
        <BLANKLINE>
    """
    kept = [one for one in read_samples(path) if one.generation < generation]
    own = text.split("\n") if isinstance(text, str) else readable(text)
    lines = [
        line
        for one in (*kept, Sample(generation, tuple(own)))
        for line in (f"{_HEADER}{one.generation} updates", *(_INDENT + own for own in one.lines))
    ]
    with full_disk_in_one_sentence(path):
        write_whole(path, lambda file: file.write("".join(f"{one}\n" for one in lines).encode()))


def read_samples(path: Path) -> list[Sample]:
    """The samples of a file, in its order; none where there is no file.

    Raises:
        RunError: for a file that is no samples.txt; it names the line.
    """
    try:
        text = path.read_text("utf-8") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise RunError(
            f"{path} is not text in UTF-8: byte {error.object[error.start]:#04x} at position {error.start}; "
            "remove it and run the same command again to continue"
        ) from error
    found: list[tuple[int, list[str]]] = []
    # Not splitlines: only a newline ends a line of this file.
    for number, line in enumerate(text.split("\n")[:-1], 1):
        header = re.fullmatch(_HEADER + r"(\d{1,18}) updates", line, re.ASCII)
        if header is not None:
            found.append((int(header[1]), []))
        elif found and line.startswith(_INDENT):
            found[-1][1].append(line.removeprefix(_INDENT))
        else:
            raise RunError(
                f"{path}, line {number} is {line[:60]!r}; {_HEADER!r} with a number or an indented line is "
                "right: remove the file and run the same command again to continue"
            )
    return [Sample(generation, tuple(lines)) for generation, lines in found]


def readable(text: bytes) -> Sequence[str]:
    """The lines of a text, of ASCII alone: any other byte as Python writes it.

    Example:
        >>> readable(b"a\\tb\\x00\\n\\xff")
        ['a\\\\tb\\\\x00', '\\\\xff']
    """
    return [
        "".join(chr(b) if 32 <= b < 127 else repr(bytes([b]))[2:-1] for b in line)
        for line in text.split(b"\n")
    ]
