"""The benchmark scripts on a tiny grid: their rows, their table and their JSON file, no timings."""

import json
from pathlib import Path

import pytest

from benchmarks import common, forward, step
from benchmarks.common import Row

TINY = ["--dims", "8", "--population", "8", "--observations", "2", "--rank", "1", "--rounds", "2"]
TINY += ["--models", "mlp"]
ROW_KEYS = {
    "model", "dim", "population", "observations", "rank", "name", "seconds", "times_plain",
    "cpu_times_plain", "temporaries", "note",
}  # fmt: skip


def check_json(path: Path, rows: list[Row]) -> None:
    document = json.loads(path.read_text())
    assert set(document) == {"machine", "rounds", "tries", "chunk", "waited", "rows"}
    assert set(document["machine"]) == {"cpu", "cores", "device", "jax"}
    assert [row["name"] for row in document["rows"]] == [row.name for row in rows]
    for row in document["rows"]:
        assert set(row) == ROW_KEYS
        if not row["note"]:
            low, median, high = row["times_plain"]
            assert 0 < low <= median <= high
            assert row["seconds"] > 0


def test_step(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = step.main([*TINY, "--tries", "2", "--json", str(tmp_path / "table.json")])
    measured = {row.name for row in rows if row.seconds is not None}
    assert measured >= {common.PLAIN, step.UPDATE, step.STEP, step.DENSE}
    printed = capsys.readouterr().out
    assert "mlp D=8 N=8 B=2 rank=1" in printed
    assert all(row.name in printed for row in rows)
    check_json(tmp_path / "table.json", rows)


def test_forward_skips_what_does_not_fit_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = forward.main(
        [*TINY, "--memory", "0", "--chunk", "4", "--json", str(tmp_path / "table.json")]
    )
    *measured, dense = rows
    assert [row.name for row in measured] == [common.PLAIN, forward.KEPT, forward.LIVE]
    assert dense.name == forward.DENSE and dense.seconds is None
    assert "--memory is 0" in dense.note
    assert dense.note in capsys.readouterr().out
    check_json(tmp_path / "table.json", rows)


def test_grid() -> None:
    args = common.parse(common.parser(""), ["--rank", "1", "4", "--models", "mlp", "gru"])
    cases = list(common.cases(args))
    assert [c.rank for c in cases if c.model == "gru"] == [1, 4]
    assert len(cases) == 2 * 3 * 2 * 2 + 2
    quick = list(common.cases(common.parse(common.parser(""), ["--quick"])))
    assert [str(c) for c in quick] == [
        f"{model} D=256 N=512 B=1 rank=1" for model in ("mlp", "gru", "transformer")
    ]


@pytest.mark.parametrize(
    "flags", [["--population", "7"], ["--rounds", "0"], ["--tries", "0"], ["--chunk", "3"]]
)
def test_flags_that_make_no_sense_are_refused(
    flags: list[str], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        common.parse(common.parser(""), flags)
    assert f"{flags[0]} " in capsys.readouterr().err
