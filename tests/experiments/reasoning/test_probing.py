"""`eggroll probe`: numbers of answers by closed forms, the sigma that is chosen, and the command."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from experiments.reasoning import probing
from experiments.reasoning.config import PRESETS, Config
from experiments.reasoning.hints import hints
from experiments.reasoning.probing import (
    Probed,
    choose,
    ladder,
    learning_rate,
    no_signal_chance,
    pair_correlation,
    probed,
    table,
)
from experiments.run.cli import main
from experiments.run.errors import UsageError
from experiments.run.fields import changed
from experiments.run.metrics import read_metrics
from experiments.run.train import train

TINY = PRESETS["tiny"]
NAN = math.nan


def settings(**changes: Any) -> Config:
    return changed(TINY, changes)


# ---------------------------------------------------------------- numbers


def test_correlations_whose_value_is_known() -> None:
    a = np.array([1.0, 0.0, 1.0, 0.0])
    assert pair_correlation(np.stack([a, a])) == pytest.approx(1)
    assert pair_correlation(np.stack([a, 1 - a])) == pytest.approx(-1)
    assert pair_correlation(np.stack([a, np.array([1.0, 1.0, 0.0, 0.0])])) == pytest.approx(0)
    assert math.isnan(pair_correlation(np.ones((4, 3))))
    # An unknown reward takes its partner's with it.
    unknown = np.array([[1.0, 0.0, 1.0], [1.0, 0.0, NAN]])
    assert pair_correlation(unknown) == pytest.approx(1)


def test_the_chance_of_no_signal_is_that_of_equal_sums() -> None:
    rng, prompts, p = np.random.default_rng(0), 64, 0.3
    a, b = (rng.random((100_000, prompts)) < p for _ in range(2))
    equal = float(np.mean(a.sum(1) == b.sum(1)))
    rewards = np.array([1.0] * 3 + [0.0] * 7)
    assert no_signal_chance(rewards, 0.0, prompts) == pytest.approx(equal, rel=0.05)
    # Weighed by a tenth, the same rewards tell as much.
    assert no_signal_chance(rewards / 10, 0.0, prompts) == pytest.approx(equal, rel=0.05)
    assert no_signal_chance(rewards, 1.0, prompts) == no_signal_chance(rewards, NAN, prompts) == 1


def test_numbers_of_answers() -> None:
    rewards = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, NAN], [0.0, 0.0]])
    texts = [["a", "b"], ["a", "c"], ["d", "e"], ["d", "e"]]
    ended = np.array([[True, True], [True, True], [True, False], [False, False]])
    found = probed(0.1, rewards, texts, ended, {"format": np.full((4, 2), 0.5)}, 3.0)
    assert (found.identical, found.ended, found.reward, found.best) == (0.75, 5 / 8, 3 / 7, 1.0)
    assert found.spread == pytest.approx(np.std([0.5, 1.0, 0.0, 0.0], ddof=1))
    assert (found.rewards, found.seconds) == ({"format": 0.5}, 3.0)
    alone = probed(0.0, rewards[:1], texts[:1], ended[:1], {})
    assert math.isnan(alone.identical) and math.isnan(alone.spread) and alone.reward == 0.5


# ---------------------------------------------------------------- the choice

BASE = Probed(0.0, NAN, NAN, NAN, NAN, 1.0, 0.5, 1.0, {"exact": 0.5, "format": 0.0}, None)


def at(sigma: float, identical: float, reward: float, spread: float, **other: Any) -> Probed:
    return BASE._replace(sigma=sigma, identical=identical, reward=reward, spread=spread, **other)


GOOD = (at(0.01, 0.9, 0.5, 0.02), at(0.02, 0.4, 0.48, 0.06), at(0.04, 0.2, 0.44, 0.09))
NEVER_RIGHT = dict(reward=0.0, best=0.0, spread=0.0)


@pytest.mark.parametrize(
    ("tried", "sigma"),
    [
        (GOOD, 0.04),
        # The reward fell by more than a fifth.
        ((*GOOD[:2], at(0.04, 0.2, 0.39, 0.2)), 0.02),
        # Answers no longer end.
        ((*GOOD[:2], at(0.04, 0.2, 0.44, 0.2, ended=0.9)), 0.02),
        # More than half of the pairs write the same.
        ((at(0.01, 0.5, 0.5, 0.3), GOOD[1]), 0.02),
    ],
)
def test_the_sigma_that_tells_members_apart_and_loses_little(
    tried: tuple[Probed, ...], sigma: float
) -> None:
    assert choose(BASE, tried).sigma == sigma


@pytest.mark.parametrize(
    ("base", "tried", "words"),
    [
        (BASE, GOOD[:1], "at 0.01 still 90% of pairs write the same: raise --sigma, to 0.08"),
        (BASE, (at(0.1, 0.1, 0.1, 0.1),), "where pairs differ, from 0.1 on, the model has lost"),
        (BASE, (GOOD[0], at(0.1, 0.1, 0.1, 0.1)), "try --probe-sigmas between 0.01 and 0.1"),
        (BASE, (at(0.1, 0.1, 0.1, 0.1),), "try a smaller --sigma, such as 0.0125"),
        (
            BASE._replace(reward=0.0, best=0.0),
            (at(0.1, 0.1, **NEVER_RIGHT),),
            "gym takes every answer for wrong, although exact gives 50% on the same answers: choose --reward "
            "exact",
        ),
        (
            BASE._replace(reward=0.0, best=0.0, ended=0.0, rewards={"exact": 0.0}),
            (at(0.1, 0.1, **NEVER_RIGHT, ended=0.0, rewards={"exact": NAN}),),
            "no answer ended, and none is right: raise --max-new-tokens",
        ),
        (
            BASE._replace(reward=0.0, best=0.0, rewards={"format": 1.0}),
            (at(0.1, 0.1, **NEVER_RIGHT, rewards={"format": 1.0}),),
            "choose easier questions",
        ),
        (BASE._replace(reward=1.0), (at(0.1, 0.1, 1.0, 0.0),), "every answer has the largest reward"),
    ],
)  # fmt: skip
def test_why_no_sigma_will_do(base: Probed, tried: tuple[Probed, ...], words: str) -> None:
    found = choose(base, tried, "gym")
    assert found.sigma is None and words in found.why


def test_the_table_fits_a_terminal() -> None:
    long = {f"reward_{i}": 0.123456 for i in range(4)}
    tried = [
        at(s, 0.123456, 0.123456, NAN, rewards=long, seconds=12345.678)
        for s in (1.234e-5, 0.0012345, 0.5, 12.345, 123.456, 1.2345e-12)
    ]
    lines = table(BASE._replace(rewards=long), tried).split("\n")
    assert max(map(len, lines)) <= 80
    assert lines[0].split()[1:] == ["0", "1.2e-05", "0.00123", "0.5", "12.35", "123.5", "1.2e-12"]


def test_rates_and_ladders() -> None:
    assert learning_rate(0.003, 32) == 5.09e-5
    assert ladder(0.003) == (0.00075, 0.0015, 0.003, 0.006, 0.012)


# ---------------------------------------------------------------- hints


@pytest.mark.parametrize(
    ("row", "flags"),
    [
        ({"reward_best": 0.0, "exact_answers": 0.5}, ["--reward exact"]),
        ({"reward_best": 0.0, "exact_answers": 0.1}, []),
        ({"reward_best": 1.0, "exact_answers": NAN, "ended": 0.5, "identical_pairs": 0.8}, []),
        ({"ended": 0.0, "identical_pairs": 0.95}, ["--max-new-tokens", "--sigma"]),
        ({}, []),
    ],
)
def test_hints_name_the_flag(row: dict[str, float], flags: list[str]) -> None:
    found = hints(row, TINY)
    assert len(found) == len(flags)
    assert all(name in text for name, text in zip(flags, found, strict=True))


# ---------------------------------------------------------------- the command


@pytest.fixture
def constant(tmp_path: Path) -> str:
    """A reward of a text's own: half of its characters, so that members differ."""
    path = tmp_path / "length.py"
    path.write_text(
        "def score(completions, answers, **columns):\n"
        "    return [len(set(text)) / 8 for text in completions]\n"
    )
    return f"{path}:score"


def test_the_command_prints_a_table_and_the_settings(
    constant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--preset", "tiny", "--reward", constant, "--probe-sigmas", "0.3", "0.1"]
    assert main(["probe", *words, "--sigma-scale", "rms"]) == 0
    found = capsys.readouterr()
    lines = found.out.split("\n")
    assert lines[0].split() == ["sigma", "0", "0.1", "0.3"]
    assert [line for line in lines if line.startswith("  exact")]
    assert not [line for line in lines if line.startswith("  countdown")]
    assert max(map(len, lines[:12])) <= 80
    assert "sums: " in found.err and "a pair x 4 pairs" in found.err
    last = found.out.strip().split("\n")[-1]
    assert last.startswith("Take --sigma 0.") and "--sigma-scale rms --learning-rate" in last


def test_sigmas_share_their_noise_and_at_temperature_0_all_else(
    constant: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two columns of one sigma differ by the keys of sampling alone."""
    found: list[Any] = []
    monkeypatch.setattr(probing, "probed", lambda *given: found.append(given) or probed(*given))
    words = ["--preset", "tiny", "--reward", constant, "--probe-sigmas", "0.3", "0.3"]
    for temperature in ("0", "1"):
        assert main(["probe", *words, "--temperature", temperature]) == 0
        first, second = (given[2] for given in found[-2:])
        assert (first == second) == (temperature == "0")


def test_a_sigma_that_is_too_small_is_named(
    constant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--preset", "tiny", "--reward", constant, "--probe-sigmas", "1e-9"]
    assert main(["probe", *words]) == 0
    assert "at 1e-09 still 100% of pairs write the same" in capsys.readouterr().out


def test_a_run_takes_what_the_probe_names_and_keeps_it(
    constant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = dict(
        run_dir=tmp_path / "run",
        reward=constant,
        sigma=0.05,
        probe=True,
        checkpoint_seconds=0.0,
        max_generations=2,
    )
    train(settings(**changes, generations=1))
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    sigma = content["evolution"]["sigma"]
    assert sigma in ladder(0.05)
    assert content["optimizer"]["learning_rate"] == learning_rate(sigma, 8)
    assert "Take --sigma" in capsys.readouterr().err
    train(settings(**changes))
    assert "Take --sigma" not in capsys.readouterr().err
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["sigma"] for row in rows] == pytest.approx([sigma, sigma])


def test_a_run_without_a_sigma_does_not_begin(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--probe: no sigma of these will do"):
        train(settings(run_dir=tmp_path / "run", probe=True, sigma=1e-9))
    assert not (tmp_path / "run" / "config.json").exists()


def test_the_first_generation_says_what_cannot_be_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(run_dir=tmp_path / "run", sigma=1e-9, max_new_tokens=2)
    train(config)
    found = [line for line in capsys.readouterr().err.split("\n") if line.startswith("hint: ")]
    assert (
        len(found) == 2 and "--max-new-tokens 2" in found[0] and "--sigma above 1e-09" in found[1]
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(probe=True, algorithm="sft"), "--probe: it compares rewards of a population"),
        (dict(probe=True, fitness="match"), "--fitness match has none"),
        (dict(probe_sigmas=(0.1, -1.0)), "--probe-sigmas 0.1 -1.0: must be one to six positive"),
        (dict(probe_sigmas=(0.1,) * 7), "must be one to six positive numbers"),
    ],
)
def test_settings_of_the_probe_are_checked(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        settings(**changes).check()
