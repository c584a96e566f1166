"""Scores come back bit for bit; a continued run cuts what its checkpoint does not know of."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.run.errors import RunError
from experiments.run.history import HistoryFile, read_history


def test_scores_come_back_bit_for_bit(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    odd = chance.integers(0, 2**32, (64, 32), np.uint32).view(np.float32)
    odd[0, :6] = [0.0, -0.0, 1e-45, 3.4028235e38, np.nan, -np.inf]
    path = tmp_path / "history.jsonl"
    with HistoryFile(path) as history:
        history.write(0, odd, {"update_norm": np.float32(0.1)})
        history.write(1, np.linspace(0, 1, 64), {})
    first, second = read_history(path)
    known = np.isfinite(odd)
    np.testing.assert_array_equal(first.scores[known].view(np.uint32), odd[known].view(np.uint32))
    assert np.isnan(first.scores[~known]).all() and (~known).any()
    assert first.figures == {"update_norm": float(np.float32(0.1))}
    np.testing.assert_array_equal(second.scores, np.linspace(0, 1, 64).astype(np.float32))


def test_figures_that_are_not_finite_are_null(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    with HistoryFile(path) as history:
        history.write(0, np.ones(2), {"weight_norm": np.float32("nan"), "update_norm": np.inf})
        history.write(1, np.ones(2), {"weight_norm": 2.0, "update_norm": -np.inf})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    first, second = (
        json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()
    )
    assert first["weight_norm"] is first["update_norm"] is second["update_norm"] is None
    assert [line.figures for line in read_history(path)] == [{}, {"weight_norm": 2.0}]


@pytest.mark.parametrize("keep", [0, 2, 3])
@pytest.mark.parametrize("rest", ["", '{"generation": 3, "sco'])
def test_lines_from_a_generation_on_are_cut(tmp_path: Path, keep: int, rest: str) -> None:
    path = tmp_path / "history.jsonl"
    with HistoryFile(path) as history:
        for generation in range(3):
            history.write(generation, np.arange(4.0), {})
    text = path.read_text()
    path.write_text(text + rest)
    with HistoryFile(path, keep) as history:
        history.write(keep, np.ones(4), {})
        history.sync()
    assert [line.generation for line in read_history(path)] == list(range(keep + 1))
    assert path.read_text().startswith("".join(text.splitlines(keepends=True)[:keep]))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("junk", "line 2 is not JSON"),
        (
            '{"generation": 0, "scores": [1, 2]}',
            "line 2: generation must be a whole number above 0, got 0",
        ),
        ('{"generation": true, "scores": [1, 2]}', "line 2: generation must be .*, got True"),
        ('{"generation": 1}', "line 2: scores must be .*, got null"),
        ('{"generation": 1, "scores": []}', "line 2: scores must be"),
        ('{"generation": 1, "scores": [1]}', "line 2: scores must be"),
        ('{"generation": 1, "scores": [[1], [1, 2]]}', "line 2: scores must be"),
        ('{"generation": 1, "scores": [[1], 2]}', "line 2: scores must be"),
        ('{"generation": 1, "scores": ["1", 2]}', "line 2: scores must be"),
        ('{"generation": 1, "scores": {"a": 2}}', "line 2: scores must be"),
    ],
)
def test_a_damaged_line_is_told(tmp_path: Path, line: str, sentence: str) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text(f'{{"generation": 0, "scores": [0.5, null]}}\n{line}\n')
    with pytest.raises(RunError, match=sentence) as error:
        read_history(path)
    assert "\n" not in str(error.value)


def test_a_full_disk_gets_one_sentence() -> None:
    words = r"could not be written: No space left on device"
    with pytest.raises(RunError, match=words), HistoryFile(Path("/dev/full")) as history:
        history.write(0, np.ones(2), {})
