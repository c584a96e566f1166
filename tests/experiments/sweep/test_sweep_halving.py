"""Who goes on, what a run's state is, and what the sweep comes to, from files that are written by hand."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kruskal, spearmanr

from experiments.run.errors import UsageError
from experiments.run.fields import to_json
from experiments.run.folder import held, write_json
from experiments.sweep.halving import at_rung, settled, standings
from experiments.sweep.importance import importances
from experiments.sweep.outcome import best, compared, write_outcome
from experiments.sweep.plan import Run, make_plan
from experiments.sweep.records import Records
from experiments.sweep.spec import read_spec
from experiments.sweep.status import print_status, write_status

RATES = [0.01 * (i + 1) for i in range(9)]


def records(path: Path, **changes: Any) -> Records:
    text = {
        "driver": "supervised",
        "fixed": {"population": 32, "generations": 20, "evaluate_every": 2},
        "space": {"learning_rate": RATES},
        "halving": {"first": 2, "eta": 3},
        "out": str(path / "out"),
        **changes,
    }
    text = {name: value for name, value in text.items() if value is not None}
    (path / "sweep.yaml").write_text(repr(text))
    spec = read_spec(path / "sweep.yaml")
    return Records(spec, make_plan(spec))


def pretend(run: Run, generations: int, value: float | None) -> None:
    """A run folder as a driver leaves it."""
    folder = run.config.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"driver": "supervised", **to_json(run.config)})
    rows = [
        {
            "generation": g,
            "held_out_accuracy": 0.1 if g % 2 == 0 else None,
            "timing": {"seconds": 2.0},
        }
        for g in range(generations)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = {"generations": generations, "held_out_accuracy": value, "sentence": "Done."}
    write_json(folder / "result.json", result)


def at(found: Records, rung: int, values: dict[int, float | None]) -> None:
    """Runs that came to these values at a rung, by their number."""
    for number, value in values.items():
        run = found.plan.runs[number]
        pretend(run, found.spec.rungs[rung], value)
        found.note_rung(run, found.spec.rungs[rung])


def numbers(runs: list[Run]) -> list[int]:
    return [run.number for run in runs]


def test_the_best_third_goes_on(tmp_path: Path) -> None:
    found = records(tmp_path)
    assert found.spec.rungs == (2, 6, 18, 20)
    at(found, 0, dict(enumerate([0.5, 0.9, 0.1, 0.9, 0.2, 0.9, 0.9, 0.0, 0.3])))
    # Of four that are equal the first three; in the order of the sweep, which decides their jobs.
    assert numbers(at_rung(found, 1)) == [1, 3, 5]
    at(found, 1, {1: 0.2, 3: 0.4, 5: 0.4})
    assert numbers(at_rung(found, 2)) == [3]
    states = [one.state for one in standings(found)]
    assert states == ["dropped"] * 3 + ["queued"] + ["dropped"] * 5
    at(found, 2, {3: 0.7})
    at(found, 3, {3: 0.8})
    assert standings(found)[3].state == "done"
    assert [(one.mean, numbers(list(one.runs))) for one in best(found)] == [(0.8, [3])]


def test_less_is_better_where_the_metric_is_minimised(tmp_path: Path) -> None:
    found = records(tmp_path, metric={"goal": "minimise"})
    at(found, 0, dict(enumerate([0.5, 0.9, 0.1, 0.9, 0.2, 0.9, 0.9, 0.0, 0.3])))
    assert numbers(at_rung(found, 1)) == [2, 4, 7]


def test_what_failed_or_has_no_value_never_goes_on(tmp_path: Path) -> None:
    found = records(tmp_path)
    at(found, 0, {0: None, 1: 0.1, 2: 0.9, 3: 0.2, 4: 0.3, 5: 0.4, 6: None, 7: 0.1})
    assert not settled(found, 0)
    assert {one.state for one in standings(found)} == {"queued"}
    found.note_failure(found.plan.runs[8], "first line\nOSError: no data")
    assert settled(found, 0)
    assert numbers(at_rung(found, 1)) == [2, 4, 5]
    last = standings(found)[8]
    assert (last.state, last.error) == ("failed", "OSError: no data")
    found.note_failure(found.plan.runs[2], "RuntimeError")
    at(found, 1, {4: None, 5: None})
    assert at_rung(found, 2) == []  # nothing is left that could be compared


def test_seeds_go_on_together_by_their_mean(tmp_path: Path) -> None:
    found = records(tmp_path, space={"learning_rate": RATES[:3]}, seeds=2)
    at(found, 0, dict(enumerate([0.9, 0.1, 0.6, 0.6, 0.8, 0.2])))
    assert numbers(at_rung(found, 1)) == [2, 3]
    found.note_failure(found.plan.runs[3], "lost")
    assert numbers(at_rung(found, 1)) == [2, 3]  # it had come to the end of this rung


def test_a_rung_that_was_passed_is_read_from_the_rows_or_refused(tmp_path: Path) -> None:
    found = records(tmp_path)
    pretend(found.plan.runs[0], 6, 0.5)
    found.note_rung(found.plan.runs[0], 2)
    assert found.rung_value(found.plan.runs[0], 2) == (True, 0.1)
    with pytest.raises(UsageError, match="no held_out_accuracy after 3 generations"):
        found.note_rung(found.plan.runs[0], 3)


def test_finished_is_what_its_settings_ask_for(tmp_path: Path) -> None:
    settings = {"population": 32, "max_generations": 20}
    found = records(tmp_path, fixed=settings, halving=None)
    run = found.plan.runs[0]
    assert not found.finished(run)
    pretend(run, 7, 0.5)  # early, at its target
    assert found.finished(run)
    longer = records(tmp_path, fixed={**settings, "max_generations": 30}, halving=None)
    assert not longer.finished(longer.plan.runs[0])
    exact = records(tmp_path, fixed={**settings, "generations": 8}, halving=None)
    assert exact.plan.runs[0].id == run.id
    assert not exact.finished(exact.plan.runs[0])
    shorter = records(tmp_path, fixed={**settings, "generations": 5}, halving=None)
    with pytest.raises(UsageError, match="was trained for 7 generations, more than the 5 of this"):
        shorter.finished(shorter.plan.runs[0])


def test_states_and_what_is_known_so_far(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = records(tmp_path, halving=None, space={"learning_rate": RATES[:3]})
    first, second, _ = found.plan.runs
    pretend(first, 20, 0.75)
    pretend(second, 5, 0.3)
    (second.config.run_dir / "result.json").unlink()
    with held(second.config.run_dir):
        told = standings(found)
    assert [one.state for one in told] == ["done", "running", "queued"]
    assert [one.generations for one in told] == [20, 5, 0]
    assert [one.metric for one in told] == [0.75, 0.1, None]
    assert [one.seconds for one in told] == [40.0, 10.0, 0.0]
    assert standings(found)[1].state == "queued"
    write_status(found, told)
    text = (tmp_path / "out" / "status.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["state"] for row in rows] == ["done", "running", "queued"]
    assert [float(row["learning_rate"]) for row in rows] == RATES[:3]
    assert json.loads((tmp_path / "out" / "status.json").read_text())["runs"][0]["metric"] == 0.75
    print_status(found, told)
    text = capsys.readouterr().out
    assert "1 done, 1 running, 1 queued." in text
    assert "5 of 20" in text


def test_the_outcome_is_the_mean_over_seeds_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = records(
        tmp_path, halving=None, seeds=2, top=2, samples=4,
        space={"width": [8, 16], "sigma": {"log-uniform": [0.01, 1]}},
    )  # fmt: skip
    for run in found.plan.runs:
        pretend(run, 20, run.config.width / 100 + 0.01 * run.seed)
    found.note_failure(found.plan.runs[1], "not read, as the run is done")
    (found.plan.runs[0].config.run_dir / "result.json").unlink()
    files = write_outcome(found)
    assert [path.name for path in files] == [
        "best.json",
        "best.md",
        "importance.json",
        "importance.png",
    ]
    assert files[-1].read_bytes().startswith(b"\x89PNG")
    content = json.loads(files[0].read_text())
    assert len(content["settings"]) == 7  # all but the one with a run that is not done
    assert content["settings"][0]["mean"] == pytest.approx(0.165)
    assert content["settings"][0]["seeds"] == pytest.approx({"0": 0.16, "1": 0.17})
    assert files[1].read_text().count("\n") == 4
    importance = json.loads(files[2].read_text())["settings"]
    assert importance["width"]["share"] == pytest.approx(1)
    assert importance["width"]["trend"] == pytest.approx(1)
    assert importance["sigma"]["share"] < importance["sigma"]["chance"]
    assert "0.165" in capsys.readouterr().out


def test_with_halving_settings_are_compared_where_all_of_them_were(tmp_path: Path) -> None:
    found = records(tmp_path)
    values = dict(enumerate(np.linspace(0, 0.8, 9).tolist()))
    at(found, 0, values)
    at(found, 1, {8: 0.01})
    assert compared(found) == (values, "after 2 generations")


def test_importance_is_the_statistic_of_kruskal_and_wallis() -> None:
    chance = np.random.default_rng(0)
    group, number = list("aabbbcccccaabbccabc"), chance.normal(size=19).tolist()
    y = [chance.normal() + ord(g) for g in group]
    found = {one.field: one for one in importances({"g": group, "x": number}, y, maximise=False)}
    by_group = [[v for v, own in zip(y, group, strict=True) if own == g] for g in "abc"]
    assert found["g"].share == pytest.approx(kruskal(*by_group).statistic / (len(y) - 1))
    assert found["g"].share > found["g"].chance
    assert found["g"].trend is None
    assert found["x"].trend == pytest.approx(-spearmanr(number, y).statistic, abs=1e-5)
    assert found["x"].groups == 4
    assert found["x"].share < found["x"].chance


def test_what_is_not_finite_is_the_worst() -> None:
    (found,) = importances({"x": [1, 1, 2, 2]}, [None, None, 5.0, 6.0], maximise=False)
    assert (found.share, found.trend) == (
        pytest.approx(0.8889, abs=0.01),
        pytest.approx(0.943, abs=0.01),
    )
    (flat,) = importances({"x": [1, 2, 3, 4]}, [1.0] * 4, maximise=True)
    assert (flat.share, flat.trend) == (0, 0)
