"""A whole sweep: it skips, continues, keeps failures apart, and survives being killed."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from places import CACHE

from experiments.run.cli import main
from experiments.run.errors import RUN_ME_AGAIN
from experiments.run.folder import held
from experiments.run.metrics import read_metrics
from experiments.supervised.data import FILES
from experiments.sweep import sweep as module
from experiments.sweep import worker
from experiments.sweep.arrays import gke_manifest, write_scripts
from experiments.sweep.halving import standings
from experiments.sweep.plan import make_plan
from experiments.sweep.records import Records
from experiments.sweep.spec import read_spec

ENVIRONMENT = {**os.environ, "JAX_COMPILATION_CACHE_DIR": CACHE}
SMALL = {
    "population": 16,
    "width": 4,
    "generations": 4,
    "evaluate_every": 2,
}


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", CACHE)


def write(path: Path, **changes: Any) -> Path:
    content = {
        "driver": "supervised",
        "fixed": SMALL,
        "space": {"learning_rate": [0.01, 0.1], "sigma": {"log-uniform": [0.05, 0.5]}},
        "samples": 2,
        "out": str(path / "out"),
        **changes,
    }
    file = path / "sweep.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    return file


def records(file: Path) -> Records:
    spec = read_spec(file)
    return Records(spec, make_plan(spec))


def write_images(path: Path) -> None:
    """Four images of two pixels, in MNIST's format."""
    path.mkdir()
    for name in FILES:
        shape, content = (
            ((4, 1, 2), bytes(range(8))) if "idx3" in name else ((4,), bytes([0, 1, 0, 1]))
        )
        head = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
        (path / name).write_bytes(head + content)


def states(file: Path) -> list[str]:
    return [one.state for one in standings(records(file))]


def touched(file: Path) -> list[int]:
    """When the result of each run was written."""
    runs = records(file).plan.runs
    return [(run.config.run_dir / "result.json").stat().st_mtime_ns for run in runs]


@pytest.mark.slow
def test_a_job_is_done_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path)
    assert main(["sweep", str(file), "--index", "0"]) == 0
    assert states(file) == ["done"] * 4
    before = touched(file)
    assert main(["sweep", str(file), "--index", "0"]) == 0
    assert touched(file) == before
    # One more sample is one more setting of each rate; what is done stays.
    write(tmp_path, samples=3)
    assert states(file) == ["done"] * 4 + ["queued"] * 2
    assert main(["sweep", str(file), "--index", "0"]) == 0
    assert states(file) == ["done"] * 6
    assert touched(file)[:4] == before
    # Longer runs go on from where they are.
    write(tmp_path, fixed={**SMALL, "generations": 6})
    assert main(["sweep", str(file), "--index", "0"]) == 0
    assert "at generation 4" in capsys.readouterr().err
    assert [one.generations for one in standings(records(file))] == [6] * 4
    assert main(["sweep", str(file), "--status"]) == 0
    assert "4 done." in capsys.readouterr().out


@pytest.mark.slow
def test_a_folder_goes_by_the_name_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, out=None, space={"learning_rate": [0.01, 0.1]}, samples=None)
    file = file.rename(tmp_path / "rates.yaml")
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "rates.yaml"]) == 0
    assert "2 done." in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["rates"]
    assert read_spec(tmp_path / "runs" / "rates" / "sweep.yaml").out == Path("runs/rates")


def test_a_rung_is_left_open_where_a_worker_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rungs: list[int | None] = []
    monkeypatch.setattr(module, "_run", lambda records, copy, rung, stop: rungs.append(rung))
    file = write(tmp_path, halving={"first": 1, "eta": 2})
    assert main(["sweep", str(file)]) == RUN_ME_AGAIN
    assert rungs == [0] and states(file) == ["queued"] * 4


@pytest.mark.slow
def test_failures_are_kept_apart_and_tried_again_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    file = write(tmp_path, samples=None, space={"data": [str(images), None], "depth": [1, 0]})
    found = records(file)
    for number in range(len(found.plan.jobs)):
        main(["sweep", str(file), "--index", str(number)])
    assert states(file) == ["failed", "failed", "done", "done"]
    errors = [one.error for one in standings(found)]
    assert all("there is neither train-images" in str(error) for error in errors[:2])
    write_images(images)
    assert main(["sweep", str(file), "--index", "0"]) == 1  # it stays failed
    assert states(file)[0] == "failed"
    assert main(["sweep", str(file), "--index", "0", "--resume"]) == 0
    assert states(file)[0] == "done"
    capsys.readouterr()
    assert main(["sweep", str(file), "--status"]) == 0
    assert "3 done, 1 failed." in capsys.readouterr().out


def test_any_error_of_a_run_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, executor={"together": 1})

    def broken(config: Any, started: float) -> Any:
        raise ZeroDivisionError("in a library\nof someone")

    monkeypatch.setattr("experiments.run.train.train", broken)
    assert main(["sweep", str(file), "--index", "1"]) == 1
    assert states(file) == ["queued", "failed", "queued", "queued"]
    error = json.loads(next((tmp_path / "out" / "failed").iterdir()).read_text())["error"]
    assert error == "of someone"


@pytest.mark.slow
def test_a_folder_that_another_process_writes_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path)
    first = records(file).plan.runs[0].config.run_dir
    monkeypatch.setattr(worker, "PATIENCE", 0.0)
    first.mkdir(parents=True)
    with held(first):
        assert main(["sweep", str(file), "--index", "0"]) == 75
    assert "In use by another process" in capsys.readouterr().err
    assert states(file) == ["queued", "done", "done", "done"]
    assert main(["sweep", str(file), "--index", "0"]) == 0
    assert states(file)[0] == "done"


def test_two_sweeps_do_not_share_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path)
    (tmp_path / "out").mkdir()
    with held(tmp_path / "out"):
        assert main(["sweep", str(file)]) == 2
    assert "in use by another sweep" in capsys.readouterr().err


@pytest.mark.slow
def test_every_rung_goes_on_from_the_one_below(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, halving={"first": 2, "eta": 2}, fixed={**SMALL, "generations": 6})
    for rung in range(3):
        assert main(["sweep", str(file), "--index", "0", "--rung", str(rung)]) == 0
    told = standings(records(file))
    assert sorted(one.state for one in told) == ["done", "dropped", "dropped", "dropped"]
    assert sorted(one.generations for one in told) == [2, 2, 4, 6]
    said = capsys.readouterr().err
    assert "at generation 2" in said
    assert "at generation 4" in said
    # The best run, which was stopped at every rung, is the one that was not.
    (run,) = [one.run for one in told if one.state == "done"]
    alone = write(tmp_path, fixed={**SMALL, "generations": 6}, out=str(tmp_path / "alone"))
    assert main(["sweep", str(alone), "--index", "0"]) == 0
    rows, right = (
        read_metrics(tmp_path / out / "runs" / run.id / "metrics.jsonl") for out in ("out", "alone")
    )
    assert [row["fitness_mean"] for row in rows] == pytest.approx(
        [row["fitness_mean"] for row in right], rel=1e-3
    )


# ---------------------------------------------------------------- processes


def begin(file: Path) -> subprocess.Popen:
    code = "import sys; from experiments.run.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", code, "sweep", str(file)]
    return subprocess.Popen(
        words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    return out + err


def until(condition: Any, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def rows(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in out.glob("runs/*/metrics.jsonl"))


def children(pid: int) -> list[int]:
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def final(out: Path) -> tuple[Any, ...]:
    """All that may not depend on interruptions."""
    status = json.loads((out / "status.json").read_text())
    for run in status["runs"]:
        del run["seconds"]
    names = ("best.json", "importance.json")
    return status, *(json.loads((out / name).read_text()) for name in names)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="children are looked for in /proc")
@pytest.mark.parametrize(
    "halving", [None, pytest.param({"first": 6, "eta": 2}, marks=pytest.mark.soak)]
)
def test_a_sweep_that_is_killed_goes_on(halving: Any, tmp_path: Path) -> None:
    # Two widths are two programs, so that two processes work at once.
    space = {"width": [4, 8], "learning_rate": {"log-uniform": [0.01, 0.3]}}
    fixed = {**SMALL, "generations": 24, "checkpoint_seconds": 0.0}
    del fixed["width"]
    file = write(tmp_path, space=space, fixed=fixed, samples=3, halving=halving)
    whole = tmp_path / "whole"
    whole.mkdir()
    unbroken = write(whole, space=space, fixed=fixed, samples=3, halving=halving)
    assert "6 done" in (said := finish(begin(unbroken))) or halving, said
    for wanted in (1, 40) if halving else (30,):
        process = begin(file)
        until(lambda wanted=wanted: rows(tmp_path / "out") >= wanted, process)
        workers = children(process.pid)
        process.kill()
        process.communicate()
        deadline = time.monotonic() + 60
        while any(map(alive, workers)):
            assert time.monotonic() < deadline, "workers outlive the sweep"
            time.sleep(0.02)
        # They were told to stop, and did not just come to their end.
        assert halving or rows(tmp_path / "out") < 6 * 24
        assert not (tmp_path / "out" / "failed").exists()
    finish(begin(file))
    broken, right = final(tmp_path / "out"), final(whole / "out")
    assert broken == right
    assert {run["state"] for run in right[0]["runs"]} == {"done"} | (
        {"dropped"} if halving else set()
    )


@pytest.mark.slow
def test_ctrl_c_stops_the_workers_and_saves(tmp_path: Path) -> None:
    file = write(tmp_path, fixed={**SMALL, "generations": 2000})
    process = begin(file)
    until(lambda: rows(tmp_path / "out") >= 8, process)
    process.send_signal(signal.SIGINT)
    assert "Run the same command again" in finish(process, code=75)
    told = standings(records(file))
    assert [one.state for one in told] == ["queued"] * 4
    assert all((one.run.config.run_dir / "checkpoints").iterdir() for one in told)
    assert "Stopped by SIGTERM after" in next((tmp_path / "out" / "logs").iterdir()).read_text()


@pytest.mark.slow
def test_a_worker_that_dies_fails_its_runs_alone(tmp_path: Path) -> None:
    file = write(
        tmp_path, fixed={**SMALL, "generations": 300}, executor={"at_once": 1, "together": 2}
    )
    process = begin(file)
    until(lambda: rows(tmp_path / "out") >= 2, process)
    (pid,) = children(process.pid)
    os.kill(pid, signal.SIGKILL)
    told = finish(process, code=1)
    assert states(file) == ["failed", "failed", "done", "done"]
    assert "ended by SIGKILL: see" in told
    assert "2 runs failed; --resume tries again" in told


# ---------------------------------------------------------------- clusters


@pytest.mark.slow
def test_the_script_of_slurm_runs_its_index(tmp_path: Path) -> None:
    code = "import sys; from experiments.run.cli import main; sys.exit(main())"
    executor = {
        "kind": "slurm", "together": 2, "at_once": 7, "command": [sys.executable, "-c", code],
        "sbatch": ["--time=00:10:00"], "setup": "export FROM_SETUP=yes",
    }  # fmt: skip
    file = write(tmp_path, executor=executor)
    assert main(["sweep", str(file)]) == 0
    script = tmp_path / "out" / "sweep.sbatch"
    lines = script.read_text().splitlines()
    assert "#SBATCH --array=0-1%7" in lines
    assert "#SBATCH --time=00:10:00" in lines
    options = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert options == list(range(1, len(options) + 1))  # Slurm reads none after the first command
    subprocess.run(
        ["bash", str(script)], env={**ENVIRONMENT, "SLURM_ARRAY_TASK_ID": "1"}, check=True
    )
    assert states(file) == ["queued", "queued", "done", "done"]


def test_the_script_of_slurm_passes_the_signal_and_the_code_on(tmp_path: Path) -> None:
    # In place of the command line: ends with 75 half a second after SIGTERM, as a run that saves does.
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), sys.exit(75)));"
        "print('ready', flush=True); time.sleep(60)"
    )
    file = write(tmp_path, executor={"kind": "slurm", "command": [sys.executable, "-c", code]})
    assert main(["sweep", str(file)]) == 0
    process = subprocess.Popen(
        ["bash", str(tmp_path / "out" / "sweep.sbatch")],
        env={**ENVIRONMENT, "SLURM_ARRAY_TASK_ID": "0"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 75


def test_halving_on_slurm_is_an_array_a_rung(tmp_path: Path) -> None:
    file = write(tmp_path, executor="slurm", halving={"first": 2, "eta": 2})
    assert "bash " in (told := write_scripts_of(file)), told
    fake = tmp_path / "sbatch"
    fake.write_text('#!/bin/sh\necho "$@" >> "$0.log"; wc -l < "$0.log"\n')
    fake.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    script = tmp_path / "out" / "submit.sh"
    subprocess.run(["bash", str(script)], env={**os.environ, "PATH": path}, check=True)
    calls = (tmp_path / "sbatch.log").read_text().splitlines()
    assert [call.split()[1:-1] for call in calls] == [
        ["--export=ALL,RUNG=0"],
        ["--export=ALL,RUNG=1", "--dependency=afterany:1"],
    ]
    assert '--rung "$RUNG"' in (tmp_path / "out" / "sweep.sbatch").read_text()


def write_scripts_of(file: Path) -> str:
    (file.parent / "out").mkdir(exist_ok=True)
    return write_scripts(records(file))


def test_the_manifest_of_gke_is_an_indexed_job(tmp_path: Path) -> None:
    executor = {
        "kind": "gke", "image": "registry/eggroll:1", "claim": "shared", "together": 2, "at_once": 9,
        "resources": {"nvidia.com/gpu": 1}, "nodes": {"cloud.google.com/gke-accelerator": "nvidia-l4"},
    }  # fmt: skip
    file = write(tmp_path, executor=executor, out="runs/My sweep")
    manifest = gke_manifest(records(file), None)
    assert manifest["metadata"]["name"] == "my-sweep"
    job = manifest["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 2, 2)
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "1"}}
    assert container["command"][-1] == (
        "exec eggroll sweep 'runs/My sweep/sweep.yaml' --index \"$JOB_COMPLETION_INDEX\""
    )
    assert yaml.safe_load(yaml.safe_dump(manifest)) == manifest
    # A job with an index that failed is never complete: the next rung waits for either end.
    file = write(tmp_path, executor=executor, halving={"first": 1, "eta": 2})
    told = write_scripts_of(file)
    assert "until kubectl get job/out-rung-0 -o 'jsonpath={.status.conditions[*].type}'" in told
    assert told.index("grep -qwE 'Complete|Failed'") < told.index("sweep-job-1.yaml")
