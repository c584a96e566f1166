"""Several processes are one run: real ones over loopback, which are killed, preempted and continued."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from places import CACHE, HELPERS
from runs import leaves_of

from experiments.run import agreement, report
from experiments.run.cli import main
from experiments.run.devices import layout_of
from experiments.run.errors import RunError, UsageError
from experiments.run.hosts import ADDRESS, PROCESS, PROCESSES, Process, process_of
from experiments.run.metrics import read_metrics
from experiments.supervised.config import PRESETS

SMALL = "--generations 6 --checkpoint-seconds 0 --evaluate-every 3".split()
COMMANDS = {
    "rl": "rl --preset cartpole --population 32 --width 8 --normalise".split(),
    "pretrain": ["pretrain", "--preset", "tiny", "--sample-every", "3", "--data", report.__file__],
    "reasoning": [
        *"reasoning --preset tiny --width 64 --reward-workers 1 --sigma 0.1 --learning-rate 0.01".split(),
        *("--reward", f"{HELPERS / 'own_reward.py'}:letters"),
    ],
}
LOST_SECONDS = 30


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def begin(command: list[str], folder: Path, processes: int, devices: int) -> list[subprocess.Popen]:
    """The processes of a run, each with its devices."""
    port = free_port()
    # Same bits are promised of the emitters that users have.
    flags = f"{os.environ['XLA_FLAGS']} --xla_cpu_use_fusion_emitters=true"
    flags += f" --xla_force_host_platform_device_count={devices}"
    here = {"JAX_COMPILATION_CACHE_DIR": CACHE, "XLA_FLAGS": flags}
    code = "import sys; from experiments.run.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", code, command[0], *SMALL, *command[1:], "--run-dir", str(folder)]
    words += ["--coordinator", f"127.0.0.1:{port}", "--lost-seconds", str(LOST_SECONDS)]
    return [
        subprocess.Popen(
            [*words, "--processes", str(processes)],
            env={**os.environ, **here, PROCESS: str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]


@contextlib.contextmanager
def running(
    command: list[str], folder: Path, processes: int = 2, devices: int = 1
) -> Iterator[list[subprocess.Popen]]:
    started = begin(command, folder, processes, devices)
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def ended(process: subprocess.Popen, timeout: float = 300) -> tuple[int, str]:
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out + err


def finish(started: list[subprocess.Popen], code: int = 0) -> list[str]:
    found = [ended(process) for process in started]
    assert [number for number, _ in found] == [code] * len(found), found
    return [told for _, told in found]


def wait_for_rows(folder: Path, wanted: int, started: list[subprocess.Popen]) -> None:
    path, deadline = folder / "metrics.jsonl", time.monotonic() + 300
    while not path.exists() or path.read_bytes().count(b"\n") < wanted:
        assert all(p.poll() is None for p in started), [ended(p) for p in started]
        assert time.monotonic() < deadline, "no rows appear"
        time.sleep(0.01)


def wait_for_checkpoint(folder: Path, started: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 300
    while not any(path.name.isdigit() for path in (folder / "checkpoints").glob("*")):
        assert all(p.poll() is None for p in started), [ended(p) for p in started]
        assert time.monotonic() < deadline, "no checkpoint appears"
        time.sleep(0.01)


def alone(command: list[str], folder: Path, *more: str) -> None:
    assert main([*command, *SMALL, *more, "--run-dir", str(folder)]) == 0


def assert_same(folder: Path, whole: Path, rounding: float = 0, of_rows: float = 0) -> None:
    """The same rows and the same state, to the bit or to rounding."""
    of_rows = of_rows or rounding
    rows, right = (read_metrics(path / "metrics.jsonl") for path in (folder, whole))
    assert len(rows) >= 6
    for row, other in zip(rows, right, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - {"timing"}:
            # Only figures in floats may be summed in another order.
            whole_numbers = isinstance(other[name], int)
            bound = 0 if whole_numbers else of_rows
            found, wanted = (np.asarray(r[name], float) for r in (row, other))
            np.testing.assert_allclose(found, wanted, bound, bound, err_msg=name)
    states = (leaves_of(path) for path in (folder, whole))
    for leaf, other in zip(*states, strict=True):
        np.testing.assert_allclose(leaf, other, rounding, rounding)


@pytest.mark.slow
def test_integers_of_two_processes_are_those_of_one_though_one_was_killed(tmp_path: Path) -> None:
    command = COMMANDS["pretrain"]
    with running([*command, "--generations", "4000"], tmp_path / "two") as (first, second):
        wait_for_rows(tmp_path / "two", 2, [first, second])
        wait_for_checkpoint(tmp_path / "two", [first, second])
        second.send_signal(signal.SIGKILL)
        code, told = ended(first, timeout=LOST_SECONDS + 60)
        # The closed connection is noticed, or on a busy machine JAX's heartbeat is first and aborts.
        assert code in (1, -signal.SIGABRT), told
        if code == 1:
            assert "another process of this run was lost; run the same commands again" in told
            assert "Traceback" not in told
        else:
            assert "another task died" in told, told
    assert not (tmp_path / "two" / "result.json").exists()
    total = ["--generations", str(len(read_metrics(tmp_path / "two" / "metrics.jsonl")) + 6)]
    with running([*command, *total], tmp_path / "two") as both:
        told, silent = finish(both)
    assert "Continuing" in told and "Continuing" not in silent
    assert "Metrics, checkpoints" in told and "Metrics, checkpoints" not in silent
    alone(command, tmp_path / "one", *total)
    # The state to the bit; a mean of float losses may be summed in another order.
    assert_same(tmp_path / "two", tmp_path / "one", of_rows=1e-6)
    samples = [(tmp_path / name / "samples.txt").read_text() for name in ("one", "two")]
    assert samples[0] == samples[1]


@pytest.mark.soak
def test_a_preempted_run_goes_on_elsewhere_with_the_same_bits(tmp_path: Path) -> None:
    """Eight devices, then two processes of two of which one gets SIGTERM, then four devices."""
    command, folder = [*COMMANDS["rl"], "--same-bits"], tmp_path / "moved"
    eight = ["--generations", "1", "--devices", "8"]
    with running([*command, *eight], folder, processes=1, devices=8) as first:
        finish(first)
    with running([*command, "--generations", "4000"], folder, devices=2) as both:
        wait_for_rows(folder, 2, both)
        both[1].send_signal(signal.SIGTERM)
        told, also = finish(both, code=75)
    done = len(read_metrics(folder / "metrics.jsonl"))
    total = ["--generations", str(max(done + 2, 6))]
    assert f"Stopped by SIGTERM after {done} generations; everything is saved" in told
    assert f"after {done} generations" in also
    for where, devices in ((folder, 4), (tmp_path / "whole", 1)):
        with running([*command, *total, "--devices", str(devices)], where, 1, devices) as last:
            finish(last)
    assert_same(folder, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("sharing", [1, *(pytest.param(n, marks=pytest.mark.soak) for n in (2, 4))])
def test_two_processes_write_and_reward_the_answers_of_one(sharing: int, tmp_path: Path) -> None:
    """Weights that are shared by the devices of one process, or by those of both."""
    shared = [*COMMANDS["reasoning"], "--tensor-parallel", str(sharing)]
    with running(shared, tmp_path / "two", devices=1 if sharing == 1 else 2) as both:
        finish(both)
    alone(COMMANDS["reasoning"], tmp_path / "one")
    assert_same(tmp_path / "two", tmp_path / "one", rounding=1e-4)
    assert all(row["updated"] for row in read_metrics(tmp_path / "one" / "metrics.jsonl"))


RESTORE = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from experiments.run import saving
from experiments.run.checkpoints import Checkpoints
from experiments.run.errors import RunError
from jax.sharding import NamedSharding
address, process, folder, damage = sys.argv[1:]
jax.distributed.initialize(address, 2, int(process))
mesh = jax.make_mesh((2,), ("a",))
lies = NamedSharding(mesh, jax.P("a"))
state = jax.jit(lambda: {"x": jnp.arange(16).reshape(4, 4)}, out_shardings=lies)
with Checkpoints(Path(folder)) as checkpoints:
    for generation in (1, 2):
        checkpoints.save(generation, state(), {})
    checkpoints.wait()
    read = saving.read
    def fails(path, shapes):
        if path.parent.name == "2" and damage == "unread":
            raise OSError("no such block")
        found = read(path, shapes)
        if path.parent.name == "2" and damage in ("differs", "differs elsewhere"):
            x = found["x"]
            parts = [shard.data.at[0].add(1) for shard in x.addressable_shards]
            found["x"] = jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)
        return found
    if process == "1":
        saving.read = fails
        if damage == "hidden":
            checkpoints._generations = lambda: [1]
    if damage in ("elsewhere", "differs elsewhere"):
        lies = NamedSharding(mesh, jax.P(None, "a"))
    try:
        generation, found, _ = checkpoints.restore(state, place=lies)
        print("told: generation", generation, found["x"].addressable_shards[0].data.tolist()[0])
    except RunError as error:
        print("told:", error)
"""


def restore_in_two(damage: str, folder: Path) -> list[str]:
    """What two processes tell that save two checkpoints and restore the newest, damaged for the second."""
    address = f"127.0.0.1:{free_port()}"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    return finish(
        [
            subprocess.Popen(
                [sys.executable, "-c", RESTORE, address, str(i), str(folder), damage],
                env={**os.environ, "XLA_FLAGS": flags},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(2)
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "what"),
    [
        ("hidden", "the newest checkpoint is 2 in process 0, 1 in process 1"),
        ("unread", "the newest checkpoint that can be read is 2 in process 0, none in process 1"),
    ],
)
def test_processes_that_can_read_different_checkpoints_end(
    damage: str, what: str, tmp_path: Path
) -> None:
    for told in restore_in_two(damage, tmp_path / "c"):
        assert f"told: the processes of this run do not see the same files: {what};" in told
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["1", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["differs", "differs elsewhere"])
def test_what_one_process_finds_damaged_none_uses(damage: str, tmp_path: Path) -> None:
    """Also where the state is cut otherwise than it was saved, and no process has a region as a whole."""
    first, second = restore_in_two(damage, tmp_path / "c")
    warning = "the checkpoint of generation 2 is damaged (the leaf x is not what was saved)"
    assert (warning in first) and (warning not in second)
    assert all("told: generation 1" in told for told in (first, second))
    assert (tmp_path / "damaged" / "2" / "digests" / "process_1.json").is_file()
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["1"]


@pytest.mark.slow
def test_a_state_that_is_cut_otherwise_is_compared(tmp_path: Path) -> None:
    first, second = restore_in_two("elsewhere", tmp_path / "c")
    assert "told: generation 2 [0, 1]" in first
    assert "told: generation 2 [2, 3]" in second


@pytest.mark.soak
@pytest.mark.parametrize("driver", list(COMMANDS))
def test_four_processes(driver: str, tmp_path: Path) -> None:
    same = [] if driver == "pretrain" else ["--same-bits"]
    with running([*COMMANDS[driver], *same], tmp_path / "four", processes=4) as started:
        finish(started)
    alone([*COMMANDS[driver], *same], tmp_path / "one")
    # The deviation of the scores, which is told and not used, may round otherwise.
    assert_same(tmp_path / "four", tmp_path / "one", of_rows=1e-6)


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_first_process_is_lost(number: int, tmp_path: Path) -> None:
    """It is JAX's coordinator: where it is gone JAX ends the others itself, unless they notice before."""
    command = [*COMMANDS["pretrain"], "--generations", "4000"]
    with running(command, tmp_path / "two") as (first, second):
        wait_for_rows(tmp_path / "two", 2, [first, second])
        first.send_signal(number)
        code, told = ended(second, timeout=2 * LOST_SECONDS + 60)
    assert code in (1, -signal.SIGABRT)
    assert "another process of this run was lost" in told or "another task died" in told
    total = len(read_metrics(tmp_path / "two" / "metrics.jsonl")) + 2
    again = [*COMMANDS["pretrain"], "--generations", str(total)]
    with running(again, tmp_path / "two", devices=2) as both:
        finish(both)


# ---------------------------------------------------------------- settings

DIGITS = PRESETS["digits"]


@pytest.mark.parametrize(
    ("flags", "environment", "right"),
    [
        ({}, {}, None),
        ({}, {PROCESSES: "2", PROCESS: "0"}, None),
        ({"coordinator": "auto"}, {}, Process(None, None, None)),
        ({"coordinator": "h:1", "processes": 2, "process": 1}, {}, Process("h:1", 2, 1)),
        ({"process": 0}, {ADDRESS: "[::1]:9", PROCESSES: "3"}, Process("[::1]:9", 3, 0)),
    ],
)
def test_which_process_this_is(flags: Any, environment: Any, right: Process | None) -> None:
    assert process_of(replace(DIGITS.cluster, **flags), environment) == right


@pytest.mark.parametrize(
    ("flags", "environment", "words"),
    [
        ({"processes": 2}, {}, "need --coordinator HOST:PORT"),
        ({"coordinator": "auto", "process": 1}, {}, "leave --processes and --process out"),
        ({"coordinator": "host"}, {}, "--coordinator host: must be HOST:PORT of process 0"),
        ({"coordinator": "host:99999"}, {}, "--coordinator host:99999: must be HOST:PORT"),
        ({"coordinator": "h:1", "processes": 2}, {}, "with --process which this one is"),
        ({"coordinator": "h:1", "processes": 2, "process": 2}, {}, "--process 2: .* 0 to 1"),
        (
            {"coordinator": "h:1"},
            {PROCESSES: "two"},
            "JAX_NUM_PROCESSES='two': must be a whole number",
        ),
    ],
)
def test_mistakes_about_processes(flags: Any, environment: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        process_of(replace(DIGITS.cluster, **flags), environment)


@pytest.mark.parametrize(
    ("flags", "alone", "words"),
    [
        ({"devices": 9}, None, "--devices 9: there are 8"),
        (
            {"devices": 2},
            "--seeds 2 are one program",
            "--devices 2: must be left out, since --seeds 2 are one program",
        ),
        ({"same_bits": True}, "it has none", "--same-bits: must be left out, since it has none"),
    ],
)
def test_mistakes_about_devices(flags: Any, alone: str | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        layout_of(replace(DIGITS.cluster, **flags), 64, alone)


@pytest.mark.parametrize(
    ("devices", "alone", "words"),
    [
        (4, None, "--tensor-parallel 3: it does not divide the 4 devices of the run"),
        (None, None, "--tensor-parallel 3: it does not divide the 1 device of the run"),
        (
            None,
            "it has no population",
            "--tensor-parallel 3: must be left out, since it has no population",
        ),
    ],
)
def test_mistakes_about_shared_weights(devices: int | None, alone: str | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        layout_of(replace(DIGITS.cluster, devices=devices), 64, alone, sharing=3)


def test_members_lie_with_their_devices_where_these_divide_them() -> None:
    assert layout_of(DIGITS.cluster, 64).mesh is None  # CPU devices share their cores
    layout = layout_of(replace(DIGITS.cluster, devices=4), 64)
    assert layout.devices == 4
    assert layout.members is not None and layout.members.spec == jax.P("population")
    assert layout_of(replace(DIGITS.cluster, devices=4), 66).members == layout.everywhere


def test_a_process_alone_agrees_with_itself() -> None:
    assert agreement.agreed(True) and not agreement.agreed(False)
    assert agreement.least(2**40 + 3) == 2**40 + 3
    with pytest.raises(UsageError, match="mine"):
        agreement.share_fate(UsageError("mine"))
    agreement.share_fate(None)
    agreement.same(3, "generation")


def test_processes_that_see_different_things_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "gathered", lambda value: np.stack([value, value - 1]))
    with pytest.raises(RunError, match="the newest is 0 in process 0, none in process 1"):
        agreement.same(0, "the newest")


def test_parts_of_all_processes_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any count, also where some processes have less to do, or nothing."""
    monkeypatch.setattr("experiments.run.hosts.several", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    padded: list[np.ndarray] = []
    for count in (0, 1, 3, 4, 9, 16):
        things, parts = np.arange(count, dtype=np.float32), []
        padded.clear()
        for process in range(4):
            monkeypatch.setattr(jax, "process_index", lambda p=process: p)
            monkeypatch.setattr(agreement, "gathered", lambda x: padded.append(x) or x)
            parts.append(things[agreement.own_part(count)])
            agreement.from_parts(parts[-1], count)
        monkeypatch.setattr(agreement, "gathered", lambda x: np.stack(padded))
        np.testing.assert_array_equal(np.concatenate(parts), things)
        np.testing.assert_array_equal(agreement.from_parts(parts[0], count), things)
