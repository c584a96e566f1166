"""Rows go to disk one by one; a continued run cuts what its checkpoint does not know of."""

from pathlib import Path

import numpy as np
import pytest

from experiments.run.errors import RunError
from experiments.run.metrics import MetricsFile, plain, read_metrics


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
