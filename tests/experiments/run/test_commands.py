"""report, eval and export, on small finished runs."""

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.numpy import load_file

from experiments.rl.config import PRESETS
from experiments.run import driver
from experiments.run.axes import AXES, ENVIRONMENT_STEPS, GENERATIONS, SECONDS
from experiments.run.cli import main
from experiments.run.compared import Group, Run, group, read_run
from experiments.run.fields import changed
from experiments.run.folder import read_result
from experiments.run.metrics import read_metrics
from experiments.run.report import draw, page_of, target_of_group, to_the_target
from experiments.run.samples import add_sample
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
    found = [read_run(runs / name, GENERATIONS, "held_out_return") for name in ("a", "b", "wide")]
    one, wide = group(found)
    assert (one.label, wide.label) == ("sigma=0.1", "sigma=0.4")
    assert one.x.tolist() == [0, 2, 4]
    assert one.y.shape == (3, 2)
    rows = [read_metrics(runs / name / "metrics.jsonl") for name in ("a", "b")]
    assert one.y[1].tolist() == [r[2]["held_out_return"] for r in rows]


def test_runs_can_be_named(runs: Path, tmp_path: Path) -> None:
    names = ["a", "wide", "seeds"]
    found = [read_run(runs / name, GENERATIONS, "held_out_return") for name in names]
    one, other = group(found, ["EGGROLL", "another", "EGGROLL"])
    assert (one.label, other.label) == ("EGGROLL", "another")
    assert one.y.shape == (3, 3)
    words = ["report", *(str(runs / name) for name in names), "--out", str(tmp_path), "--names"]
    assert main([*words, "EGGROLL", "<another>", "EGGROLL"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<td>EGGROLL</td><td>3</td>" in page
    assert "<td>&lt;another&gt;</td><td>1</td>" in page


@pytest.mark.parametrize("label", ["short", "x" * 60])
def test_no_label_is_cut_off(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    save = Figure.savefig

    def savefig(figure: Figure, *args: Any, **settings: Any) -> None:
        figures.append(figure)
        save(figure, *args, **settings)

    monkeypatch.setattr(Figure, "savefig", savefig)
    x = np.arange(3.0)
    groups = [Group(f"{label}{i}", [], x, np.stack([x, x + i], axis=1)) for i in range(3)]
    draw(groups, SECONDS, "held_out_return")
    figure, of_svg = figures
    assert of_svg is figure
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert figure.axes[0].get_ylabel() == "held-out return"


def test_several_seeds_of_one_run_are_a_band(runs: Path) -> None:
    (one,) = group([read_run(runs / "seeds", ENVIRONMENT_STEPS, "held_out_return")])
    assert one.y.shape == (3, 2)
    assert (np.diff(one.x) > 0).all()


def test_only_the_figure_that_a_run_is_judged_by_has_its_target_and_its_end_by_seed(
    runs: Path, tmp_path: Path
) -> None:
    target = float(read_result(runs / "seeds")["by_seed"][0]) + 1e6  # type: ignore[index]
    folder = shutil.copytree(runs / "seeds", tmp_path / "seeds")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "target": target}))
    (judged,) = group([read_run(folder, GENERATIONS, "held_out_return")])
    assert judged.y[-1].tolist() == read_result(folder)["by_seed"]  # type: ignore[index]
    assert to_the_target(judged, GENERATIONS) == "not reached"
    (other,) = group([read_run(folder, GENERATIONS, "fitness_mean")])
    rows = read_metrics(folder / "metrics.jsonl")
    assert other.y.tolist() == [row["fitness_mean"] for row in rows]
    assert (target_of_group(other), to_the_target(other, GENERATIONS)) == (None, "")


@pytest.mark.parametrize("x", ["generation", "environment_steps", "seconds"])
def test_report_writes_a_picture_and_a_page(
    runs: Path, x: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(runs / name) for name in ("a", "b", "wide")]
    assert main(["report", *names, "--out", str(tmp_path / "r"), "--x", x]) == 0
    png = (tmp_path / "r" / "report.png").read_bytes()
    page = (tmp_path / "r" / "report.html").read_text()
    assert png.startswith(b"\x89PNG")
    assert page.count("<svg") == 1
    # Self-contained: it asks for nothing from elsewhere.
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert AXES[x].words in page
    assert "sigma=0.4" in page
    assert str(tmp_path / "r" / "report.html") in capsys.readouterr().out


def test_labels_are_text_in_the_page(runs: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "<script>alert(1)<"
    hostile.mkdir()
    for name in ("config.json", "metrics.jsonl", "result.json"):
        (hostile / name).write_bytes((runs / "a" / name).read_bytes())
    assert main(["report", str(hostile), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    (points,) = hovered(page)["series"]
    assert points["label"] == hostile.name


def hovered(page: str) -> dict[str, Any]:
    """What the page knows of its points."""
    found = re.search(r'<script id="points" type="application/json">(.*?)</script>', page)
    assert found is not None
    told: dict[str, Any] = json.loads(found[1])
    return told


def test_what_can_be_pointed_at_is_what_the_rows_say(runs: Path, tmp_path: Path) -> None:
    words = [str(runs / name) for name in ("a", "b", "wide")]
    assert main(["report", *words, "--out", str(tmp_path)]) == 0
    told = hovered((tmp_path / "report.html").read_text())
    assert told["x"] == "environment steps"  # by default: all runs count them
    one, wide = told["series"]
    assert (one["label"], wide["label"]) == ("sigma=0.1 (2 seeds)", "sigma=0.4")
    rows = read_metrics(runs / "wide" / "metrics.jsonl")
    result = json.loads((runs / "wide" / "result.json").read_text())
    steps = [0, rows[1]["environment_steps"], rows[3]["environment_steps"]]
    returns = [rows[0]["held_out_return"], rows[2]["held_out_return"], result["held_out_return"]]
    assert [point[2:] for point in wide["points"]] == [
        [x, y, None, None] for x, y in zip(steps, returns, strict=True)
    ]
    for across, down, _, y, low, high in one["points"]:
        assert low <= y <= high
        assert 0 < across < 1
        assert 0 < down < 1
    # Right in the picture is later, and up is more.
    points = wide["points"]
    assert points[0][0] < points[1][0] < points[2][0]
    assert (points[0][1] > points[2][1]) == (points[0][3] < points[2][3])


def made(
    y: list[float],
    config: dict[str, Any],
    of: int | None = None,
    x: list[float] | None = None,
    better: Literal["larger", "smaller"] = "larger",
) -> Group:
    """A group of one run, measured every 100 environment steps, which take a second each time."""
    judged = driver.Figure("held_out", "fresh", better)
    at = 100 * np.arange(len(y), dtype=float) if x is None else np.array(x)
    values = np.array(y, float)[:, None]
    run = Run(Path(config["label"]), config, None, at, values, at / 100, of, judged)
    return Group(config["label"], [run], at, values)


def cells(groups: list[Group], metric: str) -> list[dict[str, str]]:
    """The table of the page, by its head."""
    page = page_of(groups, ENVIRONMENT_STEPS, metric, draw(groups, ENVIRONMENT_STEPS, metric))
    first = page[page.index("<table>") : page.index("</table>")]
    head = re.findall("<th>(.*?)</th>", first)
    return [
        dict(zip(head, re.findall("<td>(.*?)</td>", row), strict=True))
        for row in re.findall("<tr>(.*?)</tr>", first)[1:]
    ]


def test_the_table_tells_when_the_target_was_reached() -> None:
    quick = made([0.0, 5.0, 4.0], {"label": "quick", "target": 4.5})
    slow = made([0.0, 1.0, 2.0, 3.0], {"label": "slow", "target": 4.5})
    first, second = cells([quick, slow], "held_out_return")
    assert first["first at the target, mean"] == "100 environment steps, 1.0 s"
    assert second["first at the target, mean"] == "not reached"
    # Both at the end of the shorter one.
    assert (first["at 200 environment steps"], second["at 200 environment steps"]) == ("4", "2")
    # What is to fall is at its target below it.
    falling = made([5.0, 4.6, 4.4], {"label": "loss", "target": 4.5}, better="smaller")
    (loss,) = cells([falling], "held_out_loss")
    assert loss["first at the target, mean"] == "200 environment steps, 2.0 s"


def test_several_seeds_reach_the_target_on_average_and_some_not_at_all() -> None:
    one, two, never = (
        made(y, {"label": "a", "target": 4.5}).runs[0]
        for y in ([0.0, 5.0, 5.0], [0.0, 0.0, 5.0], [0.0, 0.0, 0.0])
    )
    (several,) = group([one, two, never])
    (row,) = cells([several], "held_out_return")
    assert row["first at the target, mean"] == "150 environment steps, 1.5 s (2 of 3 seeds)"


def test_a_share_of_few_questions_has_its_chance_in_table_and_picture() -> None:
    (row,) = cells([made([0.25, 0.5], {"label": "a"}, of=64)], "held_out_accuracy")
    assert row["95% by chance"] == "0.381 to 0.619"
    picture = draw([made([0.25, 0.5], {"label": "a"}, of=64)], SECONDS, "held_out_accuracy")
    assert picture.series[0].points[1].span == pytest.approx((0.381, 0.619), abs=1e-3)


def test_a_run_without_a_finite_value_is_drawn_and_told() -> None:
    nothing = made([float("nan")], {"label": "a"})
    (row, other) = cells([nothing, made([1.0], {"label": "b"})], "held_out_loss")
    assert row["last held-out loss, mean"] == "not finite"
    assert other["last held-out loss, mean"] == "1"
    assert draw([nothing], SECONDS, "held_out_loss").series[0].points == []
    assert draw([made([], {"label": "a"})], SECONDS, "held_out_loss").series[0].points == []


def test_the_page_shows_an_episode_and_what_was_written(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs / "a", folder, ignore=shutil.ignore_patterns("checkpoints"))
    (folder / "episode.gif").write_bytes(b"GIF89a and so on")
    for generation in (0, 2, 4):
        add_sample(folder / "samples.txt", generation, f"<b>{generation}")
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert base64.b64encode(b"GIF89a and so on").decode() in page
    assert "Written after 0 updates:</p><pre>&lt;b&gt;0</pre>" in page
    assert "Written after 4 updates:</p><pre>&lt;b&gt;4</pre>" in page
    assert "after 2 updates" not in page
    (folder / "episode.gif").write_bytes(b"<html>")
    assert main(["report", str(folder)]) == 2


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
