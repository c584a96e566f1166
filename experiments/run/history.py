"""The history of a run: a line a generation with the scores that rebuild its update from the seed.

Noise is a function of the seed, so that the scores of the members say which step was taken: a few kilobytes a
generation, where a checkpoint has the whole model.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from experiments.run.errors import RunError
from experiments.run.folder import (
    AppendedFile,
    as_object,
    full_disk_in_one_sentence,
    is_number,
    kind_of,
    write_whole,
)

NAME = "history.jsonl"
# Figures of an update by which a replay is compared with the run.
FIGURES = ("weight_norm", "update_norm")
# The name in a generation's row under which the scores go to the history instead of the metrics.
SCORES = "scores"


class Line(NamedTuple):
    """One generation.

    Attributes:
        generation: its number.
        scores: what the update was made of, ``[population]`` or ``[population, tasks]``; NaN for a score
            that was dropped.
        figures: by the names of `FIGURES`, those that are finite.
    """

    generation: int
    scores: Float32[np.ndarray, "population *tasks"]
    figures: Mapping[str, float]


class HistoryFile(AppendedFile):
    """Appends lines to a history.jsonl, in the order of rows in metrics.jsonl.

    Args:
        path: the file, made where there is none.
        generation: lines from this generation on are cut off first, and a half-written last line. Lines
            before it may be absent: a run that was begun without a history goes on, and cannot be replayed.

    Raises:
        RunError: if a line is damaged, or the file cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "history.jsonl"
        >>> with HistoryFile(path) as history:
        ...     history.write(0, np.array([[0.1, np.nan], [1.0, 0.0]], np.float32), {"update_norm": 0.5})
        >>> path.read_text()
        '{"generation": 0, "update_norm": 0.5, "scores": [[0.1, null], [1.0, 0.0]]}\\n'
        >>> read_history(path)[0].scores.tolist()[1]
        [1.0, 0.0]
    """

    def __init__(self, path: Path, generation: int = 0) -> None:
        with full_disk_in_one_sentence(path):
            if path.is_file():
                whole = path.read_bytes().split(b"\n")[:-1]
                lines = zip(whole, read_history(path), strict=True)
                text = b"".join(raw + b"\n" for raw, line in lines if line.generation < generation)
                write_whole(path, lambda file: file.write(text))
        super().__init__(path)

    def write(
        self, generation: int, scores: Float[np.ndarray, "..."], figures: Mapping[str, Any]
    ) -> None:
        """Appends a line.

        Scores and figures that are not finite become null. A score that is null is dropped in an update,
        as one that is not finite is.
        """
        finite = {name: _figure(float(value)) for name, value in figures.items()}
        line = {"generation": generation, **finite, SCORES: _plain(np.asarray(scores, np.float32))}
        self.append(json.dumps(line, allow_nan=False))


def read_history(path: Path) -> list[Line]:
    """The lines of a history.jsonl; a last line that was never finished does not count.

    A line has the figures that are finite numbers alone, so that others are not compared.

    Raises:
        RunError: for a line that is none; it names the line and the field.
    """
    found: list[Line] = []
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error
    for number, raw in enumerate(content.split(b"\n")[:-1], 1):
        where = f"{path}, line {number}"
        try:
            told = as_object(raw)
        except ValueError as error:
            raise RunError(f"{where} {error}") from error
        generation, last = told.get("generation"), found[-1].generation if found else -1
        if type(generation) is not int or generation <= last:
            raise RunError(
                f"{where}: generation must be a whole number above {last}, got {kind_of(generation)}"
            )
        scores = _array(told.get(SCORES))
        if scores is None or (found and scores.shape[0] != found[0].scores.shape[0]):
            raise RunError(
                f"{where}: scores must be a number or null for each member, or a list of them, got "
                f"{kind_of(told.get(SCORES))}"
            )
        figures = {name: told[name] for name in FIGURES if is_number(told.get(name))}
        found.append(Line(generation, scores, figures))
    return found


def _figure(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(scores: Any) -> Any:
    """Lists of the shortest numbers that give the same bits in float32, None for what is not finite."""
    if scores.ndim:
        return [_plain(one) for one in scores]
    if not math.isfinite(scores):
        return None
    short = float(str(np.float32(scores)))
    return short if np.float32(short).tobytes() == scores.tobytes() else float(scores)


def _array(given: Any) -> Float32[np.ndarray, "population *tasks"] | None:
    """The opposite of `_plain`; None for something else."""
    if not isinstance(given, list) or not given:
        return None
    rows = given if all(isinstance(one, list) for one in given) else [given]
    if not all(one is None or is_number(one) for row in rows for one in row):
        return None
    if len({len(row) for row in rows}) != 1 or not rows[0]:
        return None
    values = [[math.nan if one is None else one for one in row] for row in rows]
    return np.asarray(values if rows is given else values[0], np.float32)
