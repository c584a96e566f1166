"""Runs that are broken on purpose, really trained, get the right cause first; healthy ones get none.

Runs that differ in sigma and learning rate are one program (`train_many`), so that they compile once.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import HELPERS

pytest.importorskip("gymnax")

from experiments.pretrain.config import PRESETS as PRETRAIN
from experiments.rl.config import PRESETS as RL
from experiments.run import doctor
from experiments.run.cli import main
from experiments.run.diagnosis import Finding, diagnose, learned
from experiments.run.errors import RunError
from experiments.run.evidence import Run
from experiments.run.fields import changed
from experiments.run.train import train, train_many
from experiments.supervised.config import PRESETS as SUPERVISED

REWARDS = HELPERS / "odd_rewards.py"

DIGITS = changed(
    SUPERVISED["digits"],
    run_dir=Path("unused"),
    width=16,
    batch=128,
    population=128,
    max_generations=40,
    evaluate_every=10,
)
CARTPOLE = changed(
    RL["cartpole"], population=128, max_generations=12, held_out_episodes=16, evaluate_every=3
)
TINY = changed(
    PRETRAIN["tiny"],
    evaluate_every=20,
    max_generations=40,
    sample_every=100,
    held_out_streams=2,
    held_out_tokens=32,
)


def together(config: Any, changes: Mapping[str, Any], at: Path) -> dict[str, Path]:
    """Trains variants of settings in one program; their folders by name."""
    made = [changed(config, change, run_dir=at / name) for name, change in changes.items()]
    ended = train_many(made)
    # One that has no usable score in ten generations is ended.
    assert all(isinstance(one, RunError) for one in ended if isinstance(one, Exception)), ended
    return {name: at / name for name in changes}


def first(path: Path) -> Finding:
    """The likeliest cause of a run."""
    found = doctor.examine(path)
    assert not found.learned
    return found.findings[0]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    changes = {
        "healthy": {},
        "sigma": {"sigma": 5.0},
        "stands": {"learning_rate": 1e-6},
        "jumps": {"learning_rate": 30.0},
        "explodes": {"learning_rate": 1e36},
    }
    return together(DIGITS, changes, tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    changes = {"healthy": {}, "sigma": {"sigma": 1e-6}}
    return together(CARTPOLE, changes, tmp_path_factory.mktemp("cartpole"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} green bottles hanging on the wall.\n" for i in range(999)))
    return str(path)


def test_sigma_far_too_large(digits: dict[str, Path]) -> None:
    found = first(digits["sigma"])
    assert (found.name, found.flag, found.now) == ("sigma too large", "--sigma", 5.0)
    assert 0.02 < found.better < 0.2  # 0.1 learns


def test_a_rate_of_nearly_0(digits: dict[str, Path]) -> None:
    found = first(digits["stands"])
    assert (found.name, found.flag, found.now) == ("rate too small", "--learning-rate", 1e-6)
    assert 0.003 < found.better < 0.1  # 0.03 learns
    assert "generations 0 to 39" in found.sentence and "instead of 1e-06" in found.sentence


def test_a_rate_far_too_large(digits: dict[str, Path]) -> None:
    found = first(digits["jumps"])
    assert (found.name, found.flag) == ("rate too large", "--learning-rate")
    assert 0.003 < found.better < 0.1


def test_a_rate_after_which_nothing_is_finite(digits: dict[str, Path]) -> None:
    found = first(digits["explodes"])
    assert (found.name, found.flag) == ("rate too large", "--learning-rate")
    assert "not finite from generation 1 on" in found.sentence
    assert 0.003 < found.better < 0.1


def test_a_population_of_2(tmp_path: Path) -> None:
    train(changed(DIGITS, population=2, run_dir=tmp_path))
    found = first(tmp_path)
    assert (found.name, found.flag, found.now) == ("population too small", "--population", 2)
    assert found.better == 98  # sqrt(49 / 1210) is 0.2
    assert "1,210 weights" in found.sentence


def test_pairs_that_tie(cartpole: dict[str, Path]) -> None:
    found = first(cartpole["sigma"])
    assert (found.name, found.flag, found.now) == ("ties", "--sigma", 1e-6)
    assert "100% of the pairs" in found.sentence
    assert 0.03 < found.better < 0.3  # 0.1 learns


def test_healthy_runs_are_left_alone(
    digits: dict[str, Path], cartpole: dict[str, Path], text: str, tmp_path: Path
) -> None:
    train(changed(TINY, data=text, run_dir=tmp_path))
    for path in (digits["healthy"], cartpole["healthy"], tmp_path):
        examined = doctor.examine(path)
        assert examined.learned and examined.findings == []
        assert doctor.last_line(path) is None


# ---------------------------------------------------------------- language models


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Settings of a model that has learned to answer 7, for whatever is asked, and then ends."""
    pytest.importorskip("tokenizers")
    from experiments.reasoning.config import PRESETS

    at = tmp_path_factory.mktemp("seven")
    rows = [{"question": f"{i}?", "answer": "7", "solution": "7\n#### 7"} for i in range(100, 140)]
    (at / "seven.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = changed(
        PRESETS["tiny"], task=str(at / "seven.jsonl"), task_settings='{"trace": "solution"}',
        max_new_tokens=12, max_generations=2, evaluate_every=1,
    )  # fmt: skip
    taught = changed(
        config, algorithm="sft", optimizer="adamw", learning_rate=0.03, prompts=8,
        max_generations=60, evaluate_every=60, run_dir=at / "taught",
    )  # fmt: skip
    train(taught)
    return changed(config, start=at / "taught")


def answer(config: Any, at: Path, **changes: Any) -> Path:
    train(changed(config, run_dir=at, **changes))
    return at


def test_a_model_that_was_taught_is_left_alone(seven: Any) -> None:
    assert doctor.examine(seven.start).findings == []


def test_a_reward_that_takes_all_for_wrong(seven: Any, tmp_path: Path) -> None:
    found = first(answer(seven, tmp_path, reward=f"{REWARDS}:wrong"))
    assert (found.name, found.flag, found.better) == ("all taken for wrong", "--reward", "exact")
    assert "100% of the completions give the right answer" in found.sentence


def test_a_reward_that_is_none(seven: Any, tmp_path: Path) -> None:
    found = first(answer(seven, tmp_path, reward=f"{REWARDS}:nothing"))
    assert (found.name, found.flag) == ("nothing valid", "--reward")
    assert "100% of the rewards are None from generation 0 on" in found.sentence


def test_a_reward_that_is_always_the_same(seven: Any, tmp_path: Path) -> None:
    found = first(answer(seven, tmp_path, reward=f"{REWARDS}:same"))
    assert (found.name, found.flag) == ("no spread", "--reward")
    assert "all members score the same, 0.7, in generations 0 to 1" in found.sentence


def test_answers_that_are_cut(seven: Any, tmp_path: Path) -> None:
    found = first(answer(seven, tmp_path, reward=f"{REWARDS}:letters", max_new_tokens=3))
    assert (found.name, found.flag, found.now) == ("answers cut", "--max-new-tokens", 3)
    assert found.better == 12


def test_updates_that_are_lost_in_bfloat16(seven: Any, tmp_path: Path) -> None:
    model, at = tmp_path / "model", tmp_path / "run"
    assert main(["export", str(seven.start), "--to", str(model)]) == 0
    config = changed(seven, start=None, model=str(model), dtype="bfloat16")
    found = first(answer(config, at, reward=f"{REWARDS}:letters", sigma=0.1, learning_rate=1e-7))
    assert (found.name, found.flag) == ("updates lost", "--learning-rate")
    assert "bfloat16" in found.sentence and 1e-6 < found.better < 1e-2


# ---------------------------------------------------------------- rows alone


HEALTHY = {
    "fitness_mean": -2.3, "fitness_std": 0.1, "weights": 1210, "weight_norm": 5.0, "noise_norm": 3.5,
    "update_norm": 0.2, "updated": True, "invalid": 0, "identical_pairs": 0,
}  # fmt: skip
SETTINGS = {"population": 256, "sigma": 0.1, "learning_rate": 0.03, "max_generations": 300}


def names(driver: str, config: Mapping[str, object], rows: list[dict[str, Any]]) -> list[str]:
    return [one.name for one in diagnose(driver, config, rows)]


def test_too_few_rows_say_so() -> None:
    (found,) = diagnose("supervised", SETTINGS, [HEALTHY] * 3)
    assert found.name == "too few generations"
    assert found.sentence.startswith(
        "3 generations tell nothing of learning; try --max-generations 50"
    )
    assert names("supervised", SETTINGS, []) == ["too few generations"]
    assert names("supervised", SETTINGS, [HEALTHY] * 30) == []


@pytest.mark.parametrize(
    "group",
    [
        {"evolution": {"population": 2, "sigma": 0.1}, "optimizer": {"learning_rate": 0.03}},
        {"evolution.population": 2, "evolution.sigma": 0.1, "optimizer.learning_rate": 0.03},
    ],
)
def test_settings_in_groups_are_found_and_named_in_full(group: dict[str, object]) -> None:
    other = {"ppo": {"population": 10**6}}
    (found,) = diagnose("supervised", other | group, [HEALTHY] * 30)
    assert (found.flag, found.now) == ("--evolution.population", 2)


def test_several_seeds_count_by_their_mean_and_odd_values_are_not_known() -> None:
    both = {name: [value, None] for name, value in HEALTHY.items()} | {"weight_norm": [5.0, 5.0]}
    assert names("supervised", SETTINGS, [both] * 30) == []
    assert names("supervised", SETTINGS | {"population": 2}, [both] * 30) == [
        "population too small"
    ]
    odd = dict.fromkeys(HEALTHY, None) | {"fitness_mean": [None, None], "timing": {"seconds": 1.0}}
    assert names("supervised", SETTINGS, [odd] * 30) == []
    assert names("reasoning", {}, [{"ended": 0.0, "reward_best": 0.0}] * 3) == [
        "answers cut",
        "none right",
    ]
    assert names("unknown", {}, [{}] * 30) == []


def test_late_rewards_come_before_rewards_that_are_none() -> None:
    row = {"late_rewards": 0.9, "unknown_rewards": 0.9, "fitness_mean": None}
    found = diagnose("reasoning", {"reward_seconds": 5.0}, [row] * 5)
    assert [one.name for one in found] == ["rewards late", "nothing valid"]
    assert (found[0].flag, found[0].better) == ("--reward-seconds", 20.0)


def test_a_population_for_many_weights_is_bounded_and_keeps_groups_whole() -> None:
    many = [HEALTHY | {"weights": 10**9}] * 30
    (found,) = diagnose("reasoning", SETTINGS, many)
    assert found.better == 4096
    (found,) = diagnose("pretrain", SETTINGS | {"population": 64, "group": 48}, many[:30])
    assert found.better % 48 == 0


def test_noise_for_every_answer_counts_by_answers() -> None:
    many = [{**HEALTHY, "weights": 10**6}] * 30
    settings = SETTINGS | {"population": 64, "prompts": 10, "samples": 2}
    (whole,) = diagnose("reasoning", settings, many)
    assert whole.sentence.startswith("32 pairs for") and whole.better == 4096
    (single,) = diagnose("reasoning", settings | {"perturb": "answers"}, many)
    assert single.sentence.startswith("640 pairs for") and single.better == pytest.approx(
        4000, abs=4
    )


def test_node_noise_that_changes_no_answer_is_raised_step_by_step() -> None:
    tied = {**HEALTHY, "identical_pairs": 0.9, "noise_norm": 0.0}
    found = diagnose("reasoning", SETTINGS | {"perturb": "nodes", "sigma": 0.005}, [tied] * 30)
    assert found[0].name == "ties" and found[0].better == 0.02
    assert "of the weights" not in found[0].sentence


def test_a_return_that_all_members_have_needs_more_noise() -> None:
    # Of MountainCar-v0, where no member reaches the flag.
    row = HEALTHY | {
        "fitness_mean": -200.0,
        "fitness_std": 0.0,
        "noise_norm": 1.1,
        "updated": False,
    }
    rows = [row | {"update_norm": 0.0, "identical_pairs": 128}] * 12
    found = diagnose("rl", SETTINGS | {"target": -110.0}, rows)
    assert (found[0].name, found[0].flag, found[0].better) == ("no spread", "--sigma", 0.4)
    assert "all members score the same, -200" in found[0].sentence


def test_the_best_possible_score_is_no_failure() -> None:
    row = {"held_out_return": 500.0, "fitness_std": 0.0, "fitness_mean": 500.0}
    assert names("rl", {"target": 500.0}, [row] * 12) == []


@pytest.mark.parametrize(
    ("values", "fine"),
    [
        ([30.0, 108.0], True),  # above the target from its beginning
        ([30.0, 25.0], True),
        ([30.0, 5.0], False),
        ([20.0, 5.0], False),
        ([0.0, 9.0], True),
        ([0.0, 1.0], False),
        ([0.0, -9.0], False),
    ],
)
def test_the_way_to_a_target_is_that_of_the_figure(values: list[float], fine: bool) -> None:
    rows = [HEALTHY | {"held_out_return": value} for value in np.linspace(*values, 30)]
    assert learned(Run("rl", SETTINGS | {"target": 20.0}, rows)) == fine


# ---------------------------------------------------------------- the command


def test_the_command_prints_findings(
    digits: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(digits["jumps"]), str(digits["healthy"])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0]
        == f"{digits['jumps']}, 40 generations: it did not learn. The likeliest cause first:"
    )
    assert lines[1].startswith("  1. rate too large: a step is ")
    assert lines[-1] == f"{digits['healthy']}, 40 generations: it learns."


def test_a_folder_without_rows_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"driver": "rl"}')
    assert main(["doctor", str(tmp_path)]) == 2
    assert "has no metric rows yet" in capsys.readouterr().err
    assert doctor.last_line(tmp_path) is None


def test_a_run_that_did_not_learn_ends_with_the_cause(digits: dict[str, Path]) -> None:
    line = doctor.last_line(digits["jumps"])
    assert line is not None and line.startswith("Why, most likely (rate too large): a step is ")


def test_a_run_that_could_not_go_on_tells_the_cause_too(
    digits: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def train(config: Any, started: float) -> None:
        raise RunError("no member had a usable score")

    monkeypatch.setattr("experiments.run.train.train", train)
    assert main(["supervised", "--preset", "digits", "--run-dir", str(digits["jumps"])]) == 1
    told = capsys.readouterr().err
    assert "no member had a usable score\nWhy, most likely (rate too large): " in told


def test_an_installation_without_extras_passes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "is_there", lambda name: name in doctor.NEEDED)
    assert doctor.doctor() == 0
    told = capsys.readouterr().out
    assert "eggroll supervised needs flax, sklearn, matplotlib" in told
    assert "pip install 'eggroll-jax[supervised]'" in told
    assert told.endswith("Everything works.\n")
