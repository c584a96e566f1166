"""A run killed by SIGKILL at any moment, and continued by the same command, is the unbroken run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import CACHE
from runs import leaves_of
from safetensors.numpy import load_file

from experiments.run import report
from experiments.run.cli import main
from experiments.run.metrics import read_metrics

GENERATIONS = 8
SMALL = ["--generations", str(GENERATIONS), "--checkpoint-seconds", "0", "--evaluate-every", "3"]
COMMANDS = {
    "rl": "rl --preset cartpole --population 32 --width 8 --normalise".split(),
    "supervised": "supervised --preset digits --population 32 --width 8".split(),
    "nodes": "supervised --preset digits-nodes --population 4 --batch 64 --width 8".split(),
    "ppo": "rl --preset cartpole --algorithm ppo --ppo.environments 4 --ppo.steps 8 --ppo.minibatches 2".split(),
    "seeds": "rl --preset pendulum --population 16 --width 8 --seeds 2".split(),
    "gymnasium": "rl --preset gymnasium-cartpole --population 8 --width 8".split(),
    "pretrain": ["pretrain", "--preset", "tiny", "--sample-every", "3", "--data", report.__file__],
    "optimizers": "optimizers --preset tiny --optimizer optim.frugal --density 0.5 --gap 3".split(),
    "reasoning": "reasoning --preset tiny --population 8 --prompts 2 --held-out-questions 8".split(),
}
ENVIRONMENT = {
    **os.environ,
    "JAX_COMPILATION_CACHE_DIR": CACHE,
    "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
}


def begin(command: list[str], folder: Path) -> subprocess.Popen:
    code = "import sys; from experiments.run.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", code, *command, *SMALL, "--run-dir", str(folder)]
    return subprocess.Popen(
        words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out + err


def rows(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_after(process: subprocess.Popen, folder: Path, wanted: int, number: int) -> None:
    """Sends the signal as soon as the file has so many rows, or lets the process end before."""
    deadline = time.monotonic() + 120
    while rows(folder) < wanted and process.poll() is None:
        assert time.monotonic() < deadline, "no rows appear"
        time.sleep(0.001)
    process.send_signal(number)


def final(folder: Path) -> tuple[list[dict[str, Any]], dict[str, np.ndarray], dict[str, Any]]:
    """Everything that must not depend on interruptions."""
    assert main(["export", str(folder)]) == 0
    result = json.loads((folder / "result.json").read_text())
    del result["timing"], result["sentence"]  # it ends with the seconds
    untimed = [{**row, "timing": None} for row in read_metrics(folder / "metrics.jsonl")]
    names = ("params.safetensors", "exported/model.safetensors")
    (params,) = (folder / name for name in names if (folder / name).exists())
    return untimed, load_file(params), result


def assert_same(folder: Path, whole: Path) -> None:
    (rows, params, result), (right_rows, right_params, right_result) = final(folder), final(whole)
    assert [row["generation"] for row in rows] == list(range(GENERATIONS))
    assert rows == right_rows
    assert result == right_result
    assert params.keys() == right_params.keys()
    for name in params:
        np.testing.assert_array_equal(params[name], right_params[name])
    # All of the state: optimizers, statistics, every member's hidden state, the place in the text.
    states = (leaves_of(path) for path in (folder, whole))
    for leaf, right in zip(*states, strict=True):
        np.testing.assert_array_equal(leaf, right)
    samples, right_samples = (path / "samples.txt" for path in (folder, whole))
    assert samples.exists() == right_samples.exists()
    if samples.exists():
        assert samples.read_text() == right_samples.read_text()


def kill_and_compare(driver: str, tmp_path: Path, kills: list[int]) -> None:
    command = COMMANDS[driver]
    finish(begin(command, tmp_path / "whole"))
    for wanted in kills:
        process = begin(command, tmp_path / "killed")
        kill_after(process, tmp_path / "killed", wanted, signal.SIGKILL)
        process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0)
    finish(begin(command, tmp_path / "killed"))
    assert_same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("driver", "kills"), [("rl", [4]), pytest.param("pretrain", [3], marks=pytest.mark.soak)]
)
def test_killed_runs_are_continued_bit_for_bit(
    driver: str, kills: list[int], tmp_path: Path
) -> None:
    kill_and_compare(driver, tmp_path, kills)


@pytest.mark.soak
@pytest.mark.parametrize("driver", list(COMMANDS))
def test_runs_killed_twenty_times(driver: str, tmp_path: Path) -> None:
    chance = random.Random(driver)
    command = COMMANDS[driver]
    finish(begin(command, tmp_path / "whole"))
    for number in range(20):
        folder = tmp_path / f"killed {number // 4}"
        process = begin(command, folder)
        kill_after(process, folder, chance.randrange(GENERATIONS), signal.SIGKILL)
        time.sleep(chance.random() * 0.05)
        process.communicate()
        if number % 4 == 3:
            finish(begin(command, folder))
            assert_same(folder, tmp_path / "whole")


@pytest.mark.slow
def test_sigterm_saves_and_says_run_me_again(tmp_path: Path) -> None:
    command = COMMANDS["rl"]
    process = begin([*command, "--generations", "4000"], tmp_path / "run")
    kill_after(process, tmp_path / "run", 3, signal.SIGTERM)
    told = finish(process, code=75)
    done = rows(tmp_path / "run")
    assert f"Stopped by SIGTERM after {done} generations" in told
    assert "Run the same command again" in told
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.slow
def test_sigterm_to_the_group_of_processes_saves(tmp_path: Path) -> None:
    """Workers of Gymnasium get it too, and go on until the run has saved."""
    command = [*COMMANDS["gymnasium"], "--workers", "2", "--run-dir", str(tmp_path / "run")]
    code = "import sys; from experiments.run.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command, "--generations", "4000"],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while rows(tmp_path / "run") < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    told = finish(process, code=75)
    assert f"Stopped by SIGTERM after {rows(tmp_path / 'run')} generations" in told
    # The process of multiprocessing that cleans up ends a little later.
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)
