"""Several runs in one program are the runs that each would be alone, in folders of their own."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import leaves_of

from experiments.rl.config import PRESETS as RL
from experiments.run.cli import main
from experiments.run.errors import InUse, RunError, UsageError
from experiments.run.fields import changed
from experiments.run.folder import held
from experiments.run.loop import HOPELESS
from experiments.run.metrics import read_metrics
from experiments.run.result import Result
from experiments.run.train import train, train_many
from experiments.supervised.config import PRESETS as DIGITS

digits = changed(
    DIGITS["digits"],
    population=32,
    width=8,
    generations=4,
    evaluate_every=2,
    checkpoint_seconds=0.0,
)
# Returns of CartPole are counts of steps, which rounding leaves alone; Pendulum makes more of it at every step.
cartpole = changed(RL["cartpole"], population=16, width=8, generations=3, held_out_episodes=4)


def three(base: Any, path: Path, **settings: Any) -> list[Any]:
    """Runs that differ in all that a program takes as numbers; in decays where one is given."""
    rates = ((5, 0.1, 0.03), (6, 0.2, 0.01), (5, 0.05, 0.1))
    apart = lambda i: {n: v - 0.1 * i if n.endswith("_decay") else v for n, v in settings.items()}
    return [
        changed(base, seed=seed, sigma=sigma, learning_rate=rate, run_dir=path / str(i), **apart(i))
        for i, (seed, sigma, rate) in enumerate(rates)
    ]


def assert_close(folder: Path, right: Path) -> None:
    """Rows, states and results are the same to rounding; the times are not compared."""
    runs = [read_metrics(path / "metrics.jsonl") for path in (folder, right)]
    assert len(runs[0]) == len(runs[1]) > 0
    for row, right_row in zip(*runs, strict=True):
        assert row.keys() == right_row.keys()
        for name in row.keys() - {"timing"}:
            if isinstance(row[name], float):
                assert math.isclose(row[name], right_row[name], rel_tol=2e-3, abs_tol=1e-4), name
            else:
                assert row[name] == right_row[name], name
    states = [leaves_of(path) for path in (folder, right)]
    for leaf, right_leaf in zip(*states, strict=True):
        np.testing.assert_allclose(leaf, right_leaf, rtol=2e-3, atol=2e-4)
    results = [json.loads((path / "result.json").read_text()) for path in (folder, right)]
    assert results[0]["generations"] == results[1]["generations"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "decays"),
    [
        (digits, {}),
        (changed(cartpole, normalise=True, rank="full"), {"learning_rate_decay": 0.9}),
        pytest.param(
            digits,
            {"sigma_decay": 0.9, "learning_rate_decay": 0.8},
            marks=pytest.mark.soak,
        ),
        pytest.param(changed(digits, algorithm="backprop"), {}, marks=pytest.mark.soak),
        pytest.param(cartpole, {}, marks=pytest.mark.soak),
    ],
)
def test_runs_together_are_the_runs_alone(
    base: Any, decays: dict[str, float], tmp_path: Path
) -> None:
    configs = three(base, tmp_path, **decays)
    results = train_many(configs)
    assert [type(result) for result in results] == [Result] * 3
    alone = changed(configs[1], run_dir=tmp_path / "alone")
    train(alone)
    assert_close(configs[1].run_dir, alone.run_dir)
    first, second = (read_metrics(c.run_dir / "metrics.jsonl")[-1] for c in configs[:2])
    assert (
        first["sigma" if "sigma" in first else "loss"]
        != second["sigma" if "sigma" in second else "loss"]
    )
    assert first["timing"]["together"] == 3


def test_their_folders_are_read_by_the_other_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = three(digits, tmp_path)
    results = train_many(configs)
    folders = [str(config.run_dir) for config in configs]
    assert main(["report", *folders, "--out", str(tmp_path)]) == 0
    assert main(["eval", folders[1]]) == 0
    assert f"{results[1]['held_out_accuracy']:.6g}" in capsys.readouterr().out
    assert (configs[2].run_dir / "curve.png").exists()


@pytest.mark.slow
def test_each_goes_on_from_where_its_own_folder_stands(tmp_path: Path) -> None:
    configs, whole = three(digits, tmp_path / "a"), three(digits, tmp_path / "b")
    train(changed(configs[0], generations=1))
    train_many([changed(c, generations=3) for c in configs[1:]])
    results = train_many(configs)
    assert [result.generations for result in results] == [4, 4, 4]
    train_many(whole)
    for config, right in zip(configs, whole, strict=True):
        assert_close(config.run_dir, right.run_dir)


@pytest.mark.slow
def test_one_that_never_saved_begins_beside_those_that_go_on(tmp_path: Path) -> None:
    configs, whole = three(digits, tmp_path / "a"), three(digits, tmp_path / "b")
    train(changed(configs[0], generations=2))
    train(changed(configs[1], generations=1))
    # Killed in its first save: there is a folder, and nothing whole in it.
    shutil.rmtree(configs[1].run_dir / "checkpoints")
    (configs[1].run_dir / "checkpoints").mkdir()
    results = train_many(configs)
    assert [result.generations for result in results] == [4, 4, 4]
    train_many(whole)
    for config, right in zip(configs, whole, strict=True):
        assert_close(config.run_dir, right.run_dir)


def test_a_run_ends_when_it_reaches_its_target_and_the_others_go_on(tmp_path: Path) -> None:
    settings = {"generations": None, "max_generations": 8, "evaluate_every": 1, "target": 0.25}
    configs = three(digits, tmp_path, **settings)
    generations = [result.generations for result in train_many(configs)]
    assert generations == [3, 8, 6]
    alone = changed(configs[0], run_dir=tmp_path / "alone")
    assert train(alone).generations == 3
    for config, count in zip(configs, generations, strict=True):
        assert len(read_metrics(config.run_dir / "metrics.jsonl")) == count


def test_what_stops_one_run_does_not_stop_the_others(tmp_path: Path) -> None:
    configs = three(digits, tmp_path, generations=HOPELESS + 1)
    configs[0] = changed(configs[0], learning_rate=1e38)
    with held_folder(configs[1].run_dir):
        results = train_many(configs)
    assert isinstance(results[0], RunError)
    assert "no member had a usable score" in str(results[0])
    assert isinstance(results[1], InUse)
    assert results[2].generations == HOPELESS + 1


def held_folder(path: Path) -> Any:
    path.mkdir(parents=True)
    return held(path)


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    configs = three(digits, tmp_path)
    for change in ({"width": 16}, {"sigma_decay": 0.5}, {"optimizer": "sgd"}):
        with pytest.raises(UsageError, match="differ in more"):
            train_many([configs[0], changed(configs[1], **change)])
    assert not (tmp_path / "0").exists()


@pytest.mark.parametrize(
    ("config", "may"),
    [
        (digits, True),
        (changed(digits, seeds=2), False),
        (changed(digits, tensorboard=True), False),
        (cartpole, True),
        (changed(cartpole, algorithm="ppo"), False),
        (RL["gymnasium-cartpole"], False),
    ],
)
def test_which_runs_may_be_together(config: Any, may: bool) -> None:
    assert (config.together is not None) == may
    assert config.together == changed(config, seed=3, sigma=0.5, generations=9, patience=2).together
    for other in ({"width": 16}, {"evaluate_every": 7}, {"sigma_decay": 0.5}, {"chunk": 2}):
        assert (config.together != changed(config, other).together) == may, other
