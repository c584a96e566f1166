"""Every driver keeps what its record says: the smallest run of each, and the names in its result."""

import json
from pathlib import Path

import pytest

from experiments.run.cli import COMMANDS, main
from experiments.run.drivers import FOLDERS, find_driver
from experiments.run.learners import Rates
from experiments.run.metrics import read_metrics
from experiments.run.settings import shared_numbers

# The smallest runs, by the driver's name and what follows it, and the figures that they do not measure.
SMALLEST: dict[str, set[str]] = {
    "rl --population 4 --width 4 --depth 1 --held-out-episodes 2 --env Pendulum-v1": set(),
    "pretrain --preset tiny": set(),
    "pretrain --preset tiny --model gru": {"held_out_integer_bits_per_byte"},
    "reasoning --preset tiny": set(),
    "supervised --population 4 --width 4 --batch 8": set(),
    "optimizers --preset tiny": {"held_out_accuracy", "weight_norm"},
    "optimizers --preset tiny --task digits": set(),
}


def test_there_is_a_smallest_run_of_every_driver() -> None:
    assert {words.split()[0] for words in SMALLEST} == FOLDERS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("words", list(SMALLEST))
def test_the_smallest_run_has_what_the_record_says(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = find_driver(words.split()[0])
    assert main([*words.split(), "--generations", "1", "--run-dir", str(tmp_path)]) == 0
    told = capsys.readouterr().out.splitlines()[0]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["sentence"] == told
    lacks = SMALLEST[words] | {f"{name}_before" for name in SMALLEST[words]}
    assert result.keys() == set(driver.result_names) - lacks
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert driver.figure.name in row
    for column in driver.columns:
        where = row["timing"] if column.name.startswith("timing/") else row
        alternatives = {"fitness_mean", "episode_return", "loss", "reward_mean"}
        assert column.name.removeprefix("timing/") in where or column.name in alternatives


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "pretrain --preset tiny --model gru --algorithm backprop --optimizer sgd",
        "optimizers --preset tiny --optimizer sgd",
    ],
)
def test_a_figure_that_is_no_longer_finite_is_told(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"{words} --learning-rate 1e30 --generations 3"
    assert main([*command.split(), "--run-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("Not learned: the ")
    result = json.loads((tmp_path / "result.json").read_text())
    assert "no longer finite" in result["sentence"]
    assert result[find_driver(words.split()[0]).figure.fresh] is None


def test_every_driver_is_a_command_with_its_summary() -> None:
    for name in FOLDERS:
        driver = find_driver(name)
        assert (driver.name, driver.config.driver) == (name, name)
        assert COMMANDS[name].summary == driver.summary
        assert COMMANDS[name].trains


@pytest.mark.parametrize("name", list(FOLDERS))
def test_runs_of_one_program_differ_in_rates_alone(name: str) -> None:
    presets = find_driver(name).presets.values()
    if any(config.together for config in presets):
        # What is marked as a number of the program is what `Rates` passes into it.
        numbers = shared_numbers(next(iter(presets)))
        assert numbers.keys() == set(Rates._fields)
