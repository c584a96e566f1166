"""The benchmarks of the optimizers: rows, floors and file of step times on a tiny tree; memory of Llamas."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from places import DOCS

from benchmarks import memory
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
    shapes = {"w": jnp.zeros((10, 10)), "b": jnp.zeros(10)}
    floor = lambda name: benchmark.OPTIMIZERS[name].floor(shapes)
    assert floor("optax.adamw") == 110 * 28
    assert floor("adamp") == 100 * 40 + 10 * 28
    assert floor("lion") == 110 * 20
    assert floor("frugal .25 columns") == 100 * 16 + 10 * 28
    # Embeddings have Adam.
    embedding = {"embed": jnp.zeros((10, 10))}
    assert benchmark.OPTIMIZERS["frugal .25 columns"].floor(embedding) == 100 * 28


# GiB of AdamW, Lion, GaLore .25, FRUGAL .25, FRUGAL 0, from the configurations of FRUGAL's authors; their
# paper's AdamW and FRUGAL columns agree.
MEMORY = {
    "60M": (58.1, [0.43, 0.22, 0.30, 0.29, 0.24]),
    "130M": (134.1, [1.00, 0.50, 0.57, 0.52, 0.37]),
    "350M": (368.0, [2.74, 1.37, 1.22, 1.05, 0.49]),
    "1B": (1339.1, [9.98, 4.99, 3.88, 3.23, 0.98]),
    "7B": (6738.4, [50.21, 25.10, 17.52, 14.02, 1.96]),
}


@pytest.mark.parametrize("model", list(MEMORY))
def test_memory_of_llamas(model: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "table.json"
    table = memory.main(["--models", model, "--fields", "--json", str(path)])
    millions, right = MEMORY[model]
    # The indices of columns, which the figures leave out, are less than a hundredth of a GiB.
    np.testing.assert_allclose(list(table[model].values()), right, atol=0.01)
    printed = capsys.readouterr().out
    assert f"{millions}M" in printed and "Lion: count 0.000, mu" in printed
    assert json.loads(path.read_text()) == table
    # The page shows the same row.
    page = (DOCS / "optimizers.md").read_text()
    assert printed.splitlines()[1] in page.splitlines()


def test_wrong_arguments_are_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--rounds", "0"])
    assert "--rounds 0: must be at least 1" in capsys.readouterr().err
