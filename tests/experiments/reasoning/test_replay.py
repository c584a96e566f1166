"""A run is rebuilt bit for bit from its start, its seed and its history."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from runs import state_of

pytest.importorskip("tokenizers")

from experiments.models import hugging_face
from experiments.reasoning.config import PRESETS, Config
from experiments.run.cli import main
from experiments.run.commands import trainer_of
from experiments.run.errors import UsageError
from experiments.run.fields import changed
from experiments.run.history import read_history
from experiments.run.replaying import lines_of, replayed
from experiments.run.train import train

# With what each run has that an update depends on beside the scores.
RUNS: dict[str, dict[str, Any]] = {
    "momentum": dict(optimizer="lion", noise_reuse=2, learning_rate=0.01, anchor=0.1, fitness="likelihood"),
    "adam": dict(optimizer="adam", learning_rate=0.01, sigma=0.1, sigma_decay=0.9, fitness="likelihood"),
    "bfloat16": dict(dtype="bfloat16", rank="full", sigma=0.1, learning_rate=0.1, learning_rate_decay=0.9),
    "int8": dict(quantised=True, sigma=0.3, learning_rate=0.1, fitness="likelihood", trained=("vectors",)),
}  # fmt: skip


def settings(folder: Path, **changes: Any) -> Config:
    usual = {"run_dir": folder, "checkpoint_seconds": 0.0, "width": 32, "evaluate_every": 4}
    return changed(PRESETS["tiny"], {**usual, **changes})


def equal(got: Any, right: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, right)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    # In two parts: what is written of a generation beyond the checkpoint is cut.
    config = settings(folder, **RUNS["momentum"])
    train(changed(config, generations=3))
    with (folder / "history.jsonl").open("a") as file:
        file.write('{"generation": 3, "scores": [0, 0, 0, 0, 0, 0, 0, 1]}\n{"generation": 4, "sco')
    train(changed(config, generations=4))
    return folder


@pytest.mark.parametrize(
    "name",
    ["momentum", "adam", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bfloat16", "int8"))],
)
def test_the_whole_state_is_rebuilt(name: str, run: Path, tmp_path: Path) -> None:
    if name != "momentum":
        run = tmp_path / "run"
        train(settings(run, **RUNS[name]))
    assert [line.generation for line in lines_of(run)] == [0, 1, 2, 3]
    with trainer_of(run) as trainer:
        state, furthest, compared, figures = replayed(trainer, lines_of(run))
        start = trainer.start()
    assert furthest == 0 and compared == figures == 8
    equal(state, state_of(run))
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()), start.learner.params, state.learner.params
    )
    assert any(jax.tree.leaves(moved))


def test_any_generation_is_rebuilt(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = settings(tmp_path / "half", **RUNS["momentum"], generations=2)
    train(half)
    capsys.readouterr()
    out = tmp_path / "replayed"
    assert main(["replay", str(run), "--generation", "2", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert (
        "Made 2 updates again; every figure of every update is the run's own, bit for bit." in said
    )
    equal(hugging_face.load(out)[1], state_of(half.run_dir).learner.params)
    # Neither rows nor checkpoints are needed.
    for other in ("checkpoints", "metrics.jsonl", "result.json"):
        path = half.run_dir / other
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(["replay", str(half.run_dir)]) == 0
    equal(hugging_face.load(half.run_dir / "replayed")[1], hugging_face.load(out)[1])


def copy_of(run: Path, to: Path, history: list[str] | None) -> Path:
    to.mkdir()
    shutil.copy(run / "config.json", to)
    if history is not None:
        (to / "history.jsonl").write_text("".join(history))
    return to


def test_a_history_that_is_not_whole_is_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (run / "history.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 4 and len(read_history(run / "history.jsonl")) == 4
    gap = copy_of(run, tmp_path / "gap", [lines[0], lines[3]])
    absent = copy_of(run, tmp_path / "absent", None)
    wrong = copy_of(
        run, tmp_path / "wrong", [lines[0].replace('"update_norm": ', '"update_norm": 7')]
    )
    damaged = copy_of(run, tmp_path / "damaged", [lines[0].replace("[[", "[[[")])
    cases: list[tuple[list[Any], str, int]] = [
        ([gap], "has a gap: the scores of generations 1 to 2 are missing", 2),
        ([gap, "--generation", "1"], "", 0),
        ([run, "--generation", "5"], "ends before, and has the updates up to generation 4", 2),
        ([absent], "has no history.jsonl", 2),
        ([wrong], "generation 0: update_norm is", 1),
        ([damaged], "line 1", 1),
        ([tmp_path], "is not a run folder", 2),
    ]
    for words, sentence, code in cases:
        capsys.readouterr()
        assert main(["replay", *map(str, words)]) == code
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == (1 if code else 0)


def test_figures_without_a_number_are_not_called_the_run_s_own(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    lines[0]["weight_norm"] = None
    # As earlier versions wrote it.
    lines[1]["update_norm"] = float("nan")
    some = copy_of(run, tmp_path / "some", [json.dumps(line) + "\n" for line in lines])
    absent = [{k: line[k] for k in ("generation", "scores")} for line in lines]
    none = copy_of(run, tmp_path / "none", [json.dumps(line) + "\n" for line in absent])
    for folder, words in (
        (
            some,
            "6 of 8 figures of updates are the run's own, bit for bit; the history lacks the others",
        ),
        (none, "none of 8 figures of updates was compared"),
    ):
        capsys.readouterr()
        assert main(["replay", str(folder)]) == 0
        said = capsys.readouterr().out
        assert words in said and "every figure" not in said


def test_a_start_that_is_gone_is_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(run, tmp_path / "moved", (run / "history.jsonl").read_text().splitlines(True))
    told = json.loads((folder / "config.json").read_text())
    for changes, sentence in (
        ({"model": str(tmp_path / "gone")}, "gone is no folder"),
        ({"start": str(tmp_path / "gone")}, "gone"),
        ({"seed": 1}, "generation 0: weight_norm is"),
    ):
        (folder / "config.json").write_text(json.dumps(told | changes))
        capsys.readouterr()
        assert main(["replay", str(folder)]) in (1, 2)
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == 1


def test_backpropagation_leaves_no_history(tmp_path: Path) -> None:
    config = settings(tmp_path / "run", algorithm="sft", optimizer="adamw", generations=1)
    train(config)
    with pytest.raises(UsageError, match=r"has no history.jsonl"):
        lines_of(config.run_dir)


def test_a_run_that_began_without_a_history_goes_on(tmp_path: Path) -> None:
    config = settings(tmp_path / "run", **RUNS["momentum"])
    train(changed(config, generations=1))
    (config.run_dir / "history.jsonl").unlink()
    train(changed(config, generations=2))
    assert [line.generation for line in read_history(config.run_dir / "history.jsonl")] == [1]
    with pytest.raises(UsageError, match="generations 0 to 0 are missing"):
        lines_of(config.run_dir)
