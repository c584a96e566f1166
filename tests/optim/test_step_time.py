"""The benchmark of the optimizers on a tiny tree: its rows, its floors and its JSON file, no timings."""

import json
from pathlib import Path

import pytest

from benchmarks import optim as benchmark


def test_rows_table_and_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = ["optax.lion", "lion", "adamp"]
    path = tmp_path / "table.json"
    rows = benchmark.main(
        ["--shapes", "tiny", "--rounds", "2", "--json", str(path), "--optimizers", *names]
    )
    assert [row.name for row in rows] == [benchmark.TRIAD, *names]
    triad, optax_lion, lion, adamp = rows
    assert triad.times_floor == pytest.approx((1, 1, 1))
    assert lion.counterpart == "optax.lion" and lion.times_counterpart is not None
    assert optax_lion.times_counterpart is None
    # Its counterpart was not asked for.
    assert adamp.counterpart is None and adamp.times_counterpart is None
    printed = capsys.readouterr().out
    assert all(row.name in printed for row in rows)
    document = json.loads(path.read_text())
    assert set(document) == {"machine", "rounds", "rows"}
    assert [row["name"] for row in document["rows"]] == [row.name for row in rows]


def test_floors_count_every_array_once_a_pass() -> None:
    shapes = [(10, 10), (10,)]
    floor = lambda name: benchmark.OPTIMIZERS[name].floor(shapes)
    assert floor("optax.adamw") == 110 * 28
    assert floor("adamp") == 100 * 40 + 10 * 28
    assert floor("lion") == 110 * 20


def test_the_llama_has_58_million_parameters() -> None:
    sizes = [
        shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in benchmark.SHAPES["llama-60m"]
    ]
    assert sum(sizes) == 58_073_600


def test_wrong_arguments_are_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--rounds", "0"])
    assert "--rounds 0: at least 1 is right" in capsys.readouterr().err
