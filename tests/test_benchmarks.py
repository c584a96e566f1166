"""The benchmark scripts on a tiny grid: their rows, their table and their JSON file, no timings."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import model_folders
import numpy as np
import pytest

from benchmarks import (
    arms,
    common,
    estimators,
    forward,
    nodes,
    pretraining,
    real_models,
    reasoning,
    saving,
    scaling,
    step,
)
from benchmarks.common import Row
from experiments.pretrain import config as pretrain
from experiments.run.cli import parse

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


def test_scaling(capsys: pytest.CaptureFixture) -> None:
    ratios = scaling.main(
        ["--devices", "1", "2", "--dim", "8", "--population", "16", "--rounds", "3"]
    )
    assert set(ratios) == {(d, name) for d in (1, 2) for name in scaling.ROWS}
    told = capsys.readouterr().out
    assert told.count("deterministic") == 2
    for ratio in ratios.values():
        assert f"{ratio:.2f}" in told


def test_saving(capsys: pytest.CaptureFixture) -> None:
    shares = saving.main("--mib 1 --seconds 0.001 --generations 2 --blocks 2".split())
    assert list(shares) == [0.001] and 0 < shares[0.001] < 1
    told = capsys.readouterr().out
    assert "1 MiB saved every generation" in told and f"{shares[0.001]:.1%}" in told


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


def test_pretraining_tells_and_draws(tmp_path: Path) -> None:
    measured = [
        {"generation": g, "held_out_bits_per_byte": bits} for g, bits in ((0, 8.5), (4, 6.0))
    ]
    rows = [*measured, {"generation": 6, "held_out_bits_per_byte": None}]
    result = {
        "held_out_bits_per_byte": 5.25, "parameters": 82240, "generations": 8, "tokens": 1_600_000,
        "timing": {"training": 12.3}, "anchors": {"unigram": 4.8, "bigram": 3.7}, "rows": rows,
    }  # fmt: skip
    assert pretraining.line("256", result) == "| 256 | 82,240 | 8 | 1,600,000 | 5.250 | 12 |"
    assert pretraining.at(rows, 3) == 8.5
    assert pretraining.at(rows, 6) == 6.0
    pretraining.draw({"256": result, "512": result}, tmp_path / "new" / "population.png")
    assert (tmp_path / "new" / "population.png").read_bytes().startswith(b"\x89PNG")


def test_every_line_of_pretraining_is_a_command_that_is_taken() -> None:
    for lines in pretraining.PARTS.values():
        for flags in lines.values():
            parse(pretrain.Config, pretrain.PRESETS, flags, "eggroll pretrain").check()


def test_pretraining_names_its_lines(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        pretraining.main(["rules", "--only", "treshold"])
    assert "--only 'treshold': the lines of this part are threshold, 1, " in capsys.readouterr().err


def test_arms_are_compared_at_equal_cost() -> None:
    curves = {
        "EGGROLL": [[(1.0, 0, 0.25), (5.0, 80, 0.5), (9.0, 200, 0.75)]],
        "GRPO": [[(1.0, 0, 0.25), (7.0, 100, 0.5)]],
        "SFT": [[(1.0, 0, 0.25), (4.0, 0, 0.5), (6.0, 0, 1.0)]],
    }
    head, _, eggroll, grpo, sft = arms.table(curves)
    assert "| after 7 s | after 100 tokens |" in head
    assert eggroll == "| EGGROLL | 25.0% | 62.5% | 54.2% | **75.0%** (75.0%) | 9 | 200 |"
    assert grpo == "| GRPO | 25.0% | 50.0% | 50.0% | **50.0%** (50.0%) | 7 | 100 |"
    # It has ended, and stays.
    assert sft == "| SFT | 25.0% | 100.0% | - | **100.0%** (100.0%) | 6 | 0 |"


def test_reasoning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny = {"hidden": 32, "layers": 1, "vocab": 16, "population": 4, "prompts": 2, "tokens": 3}
    flags = [word for name, value in tiny.items() for word in (f"--{name}", str(value))]
    path = tmp_path / "table.json"
    words = [*flags, "--prompt-tokens", "4", "--rounds", "1", "--models", "transformer"]
    rows = reasoning.main([*words, "--json", str(path)])
    assert [r.name for r in rows] == [reasoning.PLAIN, reasoning.PERTURBED, reasoning.DRAWING]
    told = capsys.readouterr().out
    assert "of plain inference" in told and all(row.name in told for row in rows)
    document = json.loads(path.read_text())
    assert document["tokens"] == 3 and len(document["rows"]) == 3
    with pytest.raises(SystemExit):
        reasoning.main(["--hidden", "33"])
    assert "--hidden 33: must be a multiple of 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    "some",
    [
        list(estimators.ESTIMATORS)[::5],
        pytest.param(list(estimators.ESTIMATORS), marks=pytest.mark.soak),
    ],
    ids=["some", "all"],
)
def test_estimators(tmp_path: Path, capsys: pytest.CaptureFixture, some: list[str]) -> None:
    path = tmp_path / "table.json"
    rows = estimators.main(["--quick", "--json", str(path), "--estimators", *some])
    assert [row.name for row in rows] == some
    assert rows[0].cosine == pytest.approx(1)
    told = capsys.readouterr().out
    for row in rows:
        assert all(-1 <= x <= 1 + 1e-6 for x in row.cosines) and np.isfinite(row.losses).all()
        assert f"| {row.name} | {row.cosine:.3f} | {row.best[0]:.3f} | {row.best[1]:g} |" in told
    assert len(json.loads(path.read_text())["rows"]) == len(rows)
    with pytest.raises(SystemExit):
        estimators.main(["--pairs", "100"])
    assert "--pairs 100: must be a multiple of 128" in capsys.readouterr().err


LINEAR = estimators.Problem(
    "linear",
    {"a": jnp.zeros((3, 2)), "b": jnp.zeros(4)},
    lambda params, x: x @ jnp.concatenate([params["a"].ravel(), params["b"]]),
    lambda i, pairs: jax.random.normal(jax.random.key(i), (pairs, 1, 10)) + jnp.arange(10),
    1, {"a": 0, "b": 1}, 0.1, 0.1, 0.0, (0.1,),
)  # fmt: skip
DIRECTIONS = {
    "normal": estimators.gaussian,
    "disjoint": estimators.disjoint(2),
    "layers": estimators.by_layer(LINEAR),
    "orthogonal": estimators.orthogonal(8),
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_directions_have_the_covariance_of_the_identity(name: str) -> None:
    e = np.asarray(DIRECTIONS[name](jnp.int32(3), 2**14, 10))
    np.testing.assert_allclose(e.T @ e / len(e), np.eye(10), atol=0.06)


def test_orthogonal_directions_are_at_right_angles() -> None:
    e = np.asarray(estimators.orthogonal(8)(jnp.int32(0), 16, 40)).reshape(2, 8, 40)
    np.testing.assert_allclose(e @ e.transpose(0, 2, 1), np.stack([40 * np.eye(8)] * 2), atol=1e-3)


def test_disjoint_parts_share_no_parameter() -> None:
    # A sample may be zero, so that the parts are what all of their pairs perturb.
    e = np.asarray(estimators.disjoint(4)(jnp.int32(0), 32, 40)) != 0
    assert (e.reshape(8, 4, 40).any(0).sum(0) == 1).all()


def test_shared_directions_are_shared() -> None:
    e = np.asarray(estimators.shared_subspace(4)(jnp.int32(0), 32, 40))
    assert np.linalg.matrix_rank(e) == 4
    kept = np.asarray(estimators.sparse(0.25)(jnp.int32(0), 32, 400)) != 0
    assert 50 < kept.any(0).sum() < 150


def test_an_estimate_from_many_pairs_is_the_gradient() -> None:
    data = LINEAR.data(0, 4096)
    exact = estimators.backpropagation(LINEAR)(LINEAR.params, jnp.int32(0), data)
    found = estimators.two_sided(LINEAR, estimators.gaussian)(LINEAR.params, jnp.int32(0), data)
    for name, x in exact.items():
        np.testing.assert_allclose(found[name], x, atol=1.0)


@pytest.mark.parametrize(
    ("model", "title"),
    [
        ("mlp", f"mlp D={estimators.HIDDEN} N=4 rows=16"),
        pytest.param("egg", "tiny D=32 N=4 rows=3", marks=pytest.mark.soak),
    ],
)
def test_nodes(tmp_path: Path, capsys: pytest.CaptureFixture, model: str, title: str) -> None:
    tiny = "--egg tiny --egg-population 4 --tokens 3 --rounds 1 --factor-memory 1024 --population 4"
    path = tmp_path / "table.json"
    rows = nodes.main([*tiny.split(), "--models", model, "--json", str(path)])
    names = [nodes.FORWARD, nodes.WEIGHTS, nodes.EVALUATE, nodes.STEP]
    assert [row.name for row in rows] == names
    told = capsys.readouterr().out
    assert title in told and "a generation with node noise takes" in told
    document = json.loads(path.read_text())
    assert document["factor_memory"] == 1024
    assert all(row["seconds"] > 0 for row in document["rows"])


def test_real_models(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("tokenizers")
    pytest.importorskip("jinja2")
    model = model_folders.qwen3(tmp_path / "qwen")
    words = ["--model", str(model), "--out", str(tmp_path / "runs"), "--seconds", "0.01"]
    words += ["--seeds", "1", "--methods", "EGGROLL", "--more", "population=4"]
    words += ["prompts=2", "held-out-questions=4", "max-new-tokens=3"]
    for _ in range(2):  # the second time the runs are there
        real_models.main(words)
        head, _, base, eggroll = capsys.readouterr().out.strip().split("\n")
        cells = lambda line: [cell.strip() for cell in line.strip("|").split("|")]
        assert [cells(line)[0] for line in (base, eggroll)] == ["as it is", "EGGROLL"]
        assert {len(cells(line)) for line in (head, base, eggroll)} == {10}
        assert cells(eggroll)[6] == "3" and 0.05 < float(cells(eggroll)[9]) < 50
        # A model of random numbers knows no text.
        assert float(cells(base)[5]) > 3
