"""Rows go to disk one by one; a continued run cuts what its checkpoint does not know of."""

from pathlib import Path

import numpy as np
import pytest

from experiments.run.errors import RunError
from experiments.run.metrics import MetricsFile, expect_names, plain, read_metrics, seconds_of


def write(path: Path, generations: int) -> None:
    with MetricsFile(path) as metrics:
        for g in range(generations):
            metrics.write({"generation": g, "score": g / 3})


@pytest.mark.parametrize("keep", [0, 2, 5])
@pytest.mark.parametrize("rest", ["", '{"generation": 5, "sco'])
def test_rows_from_a_generation_on_are_cut(tmp_path: Path, keep: int, rest: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 5)
    text = path.read_text()
    path.write_text(text + rest)
    with MetricsFile(path, keep) as metrics:
        assert [row["generation"] for row in metrics.rows] == list(range(keep))
        metrics.write({"generation": keep, "score": keep / 3})
    rows = read_metrics(path)
    assert [row["generation"] for row in rows] == list(range(keep + 1))
    assert path.read_text().startswith("".join(text.splitlines(keepends=True)[:keep]))


def test_missing_rows_are_told(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 3)
    with pytest.raises(RunError, match="holds 3 of the 5 rows before the checkpoint"):
        MetricsFile(path, 5)
    assert len(read_metrics(path)) == 3


def test_a_damaged_row_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 2)
    path.write_text(path.read_text().replace('{"generation": 1', '{"gen\x00'))
    with pytest.raises(RunError, match=r"line 2 is not JSON"):
        read_metrics(path)


def test_values_become_plain() -> None:
    row = {"a": np.float32(0.5), "b": np.array([1.0, np.nan]), "c": {"d": float("inf")}, "e": "x"}
    assert plain(row) == {"a": 0.5, "b": [1.0, None], "c": {"d": None}, "e": "x"}


def test_a_full_disk_gets_one_sentence() -> None:
    words = r"could not be written: No space left on device"
    with pytest.raises(RunError, match=words) as error, MetricsFile(Path("/dev/full")) as metrics:
        metrics.write({"generation": 0})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"[]", "line 2 must hold an object, got an array"),
        (b"\xff", "line 2 is not text in UTF-8: byte 0xff at position 0"),
        (b'{"score": 1}', "line 2: generation must be 1, got nothing"),
        (b'{"generation": 2}', "line 2: generation must be 1, got 2"),
        (b'{"generation": 1, "score": "x"}', "line 2: score must be a number, null"),
        (
            b'{"generation": 1, "score": 1e999}',
            "line 2: score must be a number, null, or several of them, got inf",
        ),
    ],
)
def test_a_line_that_is_no_row_is_told(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"generation": 0}\n' + line + b"\n")
    with pytest.raises(RunError) as error:
        read_metrics(path)
    assert words in str(error.value)


@pytest.mark.parametrize("value", [None, 0.5, [1.0, 2.0, 3.0], []])
def test_seeds_are_as_many_in_every_row(value: object) -> None:
    rows = [{"generation": 0, "score": [1.0, None]}, {"generation": 1, "score": value}]
    path = Path("metrics.jsonl")
    if value is None:
        expect_names(path, rows, ["score"])
    else:
        with pytest.raises(RunError, match="line 2: score must be"):
            expect_names(path, rows, ["score"])
    with pytest.raises(
        RunError, match="line 1: loss must be a number, null or a list of them, got nothing"
    ):
        expect_names(path, rows, ["loss"])
    with pytest.raises(RunError, match="line 1: timing must be an object with seconds"):
        seconds_of(path, rows)
