"""report, eval and export, on small finished runs."""

import base64
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.numpy import load_file

from experiments.rl.config import PRESETS
from experiments.run.cli import main
from experiments.run.fields import changed
from experiments.run.metrics import read_metrics
from experiments.run.report import Group, draw, group, read_run
from experiments.run.train import train

SMALL = changed(
    PRESETS["cartpole"],
    width=8,
    depth=1,
    population=16,
    generations=4,
    held_out_episodes=4,
    evaluate_every=2,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for name, changes in {
        "a": {}, "b": {"seed": 1}, "wide": {"sigma": 0.4}, "seeds": {"seeds": 2, "normalise": True},
    }.items():  # fmt: skip
        settings: dict[str, Any] = {"run_dir": root / name, **changes}
        train(changed(SMALL, settings))
    return root


def test_runs_that_differ_in_their_seed_are_one_curve(runs: Path) -> None:
    found = [read_run(runs / name, "generation", "held_out_return") for name in ("a", "b", "wide")]
    one, wide = group(found)
    assert (one.label, wide.label) == ("sigma=0.1", "sigma=0.4")
    assert one.x.tolist() == [0, 2, 4]
    assert one.y.shape == (3, 2)
    rows = [read_metrics(runs / name / "metrics.jsonl") for name in ("a", "b")]
    assert one.y[1].tolist() == [r[2]["held_out_return"] for r in rows]


def test_runs_can_be_named(runs: Path, tmp_path: Path) -> None:
    names = ["a", "wide", "seeds"]
    found = [read_run(runs / name, "generation", "held_out_return") for name in names]
    one, other = group(found, ["EGGROLL", "another", "EGGROLL"])
    assert (one.label, other.label) == ("EGGROLL", "another")
    assert one.y.shape == (3, 3)
    words = ["report", *(str(runs / name) for name in names), "--out", str(tmp_path), "--names"]
    assert main([*words, "EGGROLL", "<another>", "EGGROLL"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<td>EGGROLL</td><td>3</td>" in page
    assert "<td>&lt;another&gt;</td><td>1</td>" in page


@pytest.mark.parametrize("label", ["short", "x" * 60])
def test_no_label_is_cut_off(label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    save = Figure.savefig

    def savefig(figure: Figure, *args: Any, **settings: Any) -> None:
        figures.append(figure)
        save(figure, *args, **settings)

    monkeypatch.setattr(Figure, "savefig", savefig)
    x = np.arange(3.0)
    groups = [Group(f"{label}{i}", [], x, np.stack([x, x + i], axis=1)) for i in range(3)]
    draw(groups, "seconds", "held_out_return", tmp_path / "r.png")
    (figure,) = figures
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert figure.axes[0].get_ylabel() == "held-out return"


def test_several_seeds_of_one_run_are_a_band(runs: Path) -> None:
    (one,) = group([read_run(runs / "seeds", "environment_steps", "held_out_return")])
    assert one.y.shape == (3, 2)
    assert (np.diff(one.x) > 0).all()


@pytest.mark.parametrize("x", ["generation", "environment_steps", "seconds"])
def test_report_writes_a_picture_and_a_page(
    runs: Path, x: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(runs / name) for name in ("a", "b", "wide")]
    assert main(["report", *names, "--out", str(tmp_path / "r"), "--x", x]) == 0
    png = (tmp_path / "r" / "report.png").read_bytes()
    page = (tmp_path / "r" / "report.html").read_text()
    assert png.startswith(b"\x89PNG")
    embedded = re.search(r'src="data:image/png;base64,([^"]+)"', page)
    assert embedded is not None
    assert base64.b64decode(embedded[1]) == png
    # Self-contained: it asks for nothing from elsewhere.
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "sigma=0.4" in page
    assert str(tmp_path / "r" / "report.html") in capsys.readouterr().out


def test_labels_are_text_in_the_page(runs: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "<script>alert(1)<"
    hostile.mkdir()
    for name in ("config.json", "metrics.jsonl", "result.json"):
        (hostile / name).write_bytes((runs / "a" / name).read_bytes())
    assert main(["report", str(hostile), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_another_metric_can_be_drawn(runs: Path, tmp_path: Path) -> None:
    assert main(["report", str(runs / "a"), "--y", "fitness_mean", "--out", str(tmp_path)]) == 0


def test_eval_gives_mean_and_error(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(runs / "seeds"), "--episodes", "5"]) == 0
    text = capsys.readouterr().out
    assert "after 4 generations" in text
    assert (
        len(
            re.findall(
                r"seed [01]: [\d.]+ ± [\d.]+ \(standard error\), [\d.]+ to [\d.]+ in 5", text
            )
        )
        == 2
    )
    assert main(["eval", str(runs / "seeds"), "--episodes", "5"]) == 0
    assert capsys.readouterr().out == text


def test_export_writes_every_leaf(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(runs / "a")]) == 0
    tensors = load_file(runs / "a" / "params.safetensors")
    leaves = {f"params/policy/Dense_{i}/{leaf}" for i in range(2) for leaf in ("kernel", "bias")}
    assert set(tensors) == leaves
    assert tensors["params/policy/Dense_0/kernel"].shape == (4, 8)
    with safe_open(runs / "a" / "params.safetensors", "np") as file:
        assert file.metadata() == {"generation": "4", "run": "a"}
    assert "4 tensors, 58 numbers" in capsys.readouterr().out
    assert (
        main(["export", str(runs / "seeds"), "--to", str(tmp_path / "sub" / "p.safetensors")]) == 0
    )
    tensors = load_file(tmp_path / "sub" / "p.safetensors")
    assert set(tensors) == leaves | {f"statistics/{name}" for name in ("seen", "mean", "squares")}
    assert tensors["params/policy/Dense_0/kernel"].shape == (2, 4, 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report"], "name at least one run folder"),
        (["report", "{root}/a", "--names", "b", "c"], "--names gives 2 names for 1 runs: give one for each"),
        (["report", "{root}/nothing"], "not a run folder: it has no config.json"),
        (["report", "{root}/a", "--y", "fitnes_mean"], "no metric 'fitnes_mean'; did you mean 'fitness_mean'"),
        (["eval", "{root}/nothing"], "not a run folder"),
        (["eval", "{root}/a", "--episodes", "0"], "--episodes 0: choose a whole number of at least 1"),
        (["export", "{root}/nothing"], "not a run folder"),
    ],
)  # fmt: skip
def test_mistakes_get_one_sentence(
    runs: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(root=runs) for word in words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_a_run_without_a_checkpoint_is_told(tmp_path: Path, runs: Path, capsys: Any) -> None:
    (tmp_path / "config.json").write_bytes((runs / "a" / "config.json").read_bytes())
    assert main(["eval", str(tmp_path)]) == 2
    assert "has no checkpoint yet" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"driver": "chess"}')
    assert main(["eval", str(tmp_path)]) == 2
    assert "names the driver 'chess', which there is not" in capsys.readouterr().err
