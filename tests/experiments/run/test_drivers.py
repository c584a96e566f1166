"""Every driver keeps what its record says: the smallest run of each, and the names in its result."""

import json
from pathlib import Path

import pytest

from experiments.run.cli import COMMANDS, main
from experiments.run.drivers import FOLDERS, find_driver
from experiments.run.metrics import read_metrics

SMALLEST = {
    "rl": "--population 4 --width 4 --depth 1 --held-out-episodes 2 --env Pendulum-v1",
    "pretrain": "--preset tiny",
    "reasoning": "--preset tiny",
    "supervised": "--population 4 --width 4 --batch 8",
    "optimizers": "--preset tiny",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FOLDERS))
def test_the_smallest_run_has_what_the_record_says(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = find_driver(name)
    command = [name, *SMALLEST[name].split(), "--generations", "1", "--run-dir", str(tmp_path)]
    assert main(command) == 0
    told = capsys.readouterr().out.splitlines()[0]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["sentence"] == told
    missing = set(driver.result_names) - result.keys()
    assert not missing, f"result.json lacks {missing}"
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert driver.figure.name in row
    for column in driver.columns:
        where = row["timing"] if column.name.startswith("timing/") else row
        alternatives = {"fitness_mean", "episode_return", "loss", "reward_mean"}
        assert column.name.removeprefix("timing/") in where or column.name in alternatives


def test_every_driver_is_a_command_with_its_summary() -> None:
    for name in FOLDERS:
        driver = find_driver(name)
        assert (driver.name, driver.config.driver) == (name, name)
        assert COMMANDS[name].summary == driver.summary
        assert COMMANDS[name].trains
