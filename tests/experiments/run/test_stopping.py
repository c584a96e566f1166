"""Every way out of a command, by real processes: signals from the start to the end, and saves that fail."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import CACHE

from experiments.run.metrics import read_metrics
from experiments.run.stopping import StopRequest, stop_requests

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
RUN = (
    "supervised --preset digits --population 8 --width 4 --generations 100000 --evaluate-every 100000"
).split()
ENVIRONMENT = {
    **os.environ,
    "JAX_COMPILATION_CACHE_DIR": CACHE,
    "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
}
# Has the command wait at a place, and says when it is there.
CODE = """
import ctypes, importlib, signal, sys
from experiments.run import cli, stopping
where, seconds = sys.argv.pop(1), float(sys.argv.pop(1))
def late(module, name):
    module = importlib.import_module(module)
    fn = getattr(module, name)
    def wait(*args, **kwargs):
        print("HERE", flush=True)
        # As a compilation does: no handler of Python is called, and the wait goes on.
        signal.pthread_sigmask(signal.SIG_BLOCK, stopping.SIGNALS)
        ctypes.CDLL(None).usleep(int(1e6 * seconds))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping.SIGNALS)
        return fn(*args, **kwargs)
    setattr(module, name, wait)
if where:
    late(*where.split(":"))
sys.exit(cli.main())
"""


@pytest.fixture(autouse=True)
def _no_nohup() -> Iterator[None]:
    """Under nohup, SIGHUP is ignored here and in processes that are begun, which is not what is tested."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def begin(
    words: list[str], where: str = "", seconds: float = 20, prefix: str = ""
) -> subprocess.Popen:
    command = [sys.executable, "-c", CODE, where, str(seconds), *words]
    if prefix:
        command = ["sh", "-c", f'{prefix} exec "$@"', "sh", *command]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen, code: int) -> str:
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, (process.returncode, out, err)
    assert "Traceback" not in err
    return out + err


def wait_here(process: subprocess.Popen) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "HERE\n"


def wait_for_rows(folder: Path, process: subprocess.Popen, rows: int = 1) -> None:
    deadline = time.monotonic() + 60
    path = folder / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < rows:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no rows appear"
        time.sleep(0.01)


@pytest.mark.parametrize("number", SIGNALS)
def test_before_anything_is_imported(number: signal.Signals, tmp_path: Path) -> None:
    process = begin([*RUN, "--run-dir", str(tmp_path / "run")], "experiments.run.cli:parse")
    wait_here(process)
    began = time.monotonic()
    process.send_signal(number)
    told = ended(process, 75)
    assert time.monotonic() - began < 5
    assert re.match(
        r"Stopped by \S+; nothing is lost. Run the same command again to continue.\n$", told
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("experiments.run.compilation:keep_compiled_programs", signal.SIGTERM),
        ("experiments.run.loop:Record", signal.SIGHUP),
        ("jax:device_get", signal.SIGTERM),  # the first measurement, while it is compiled
        ("experiments.run.train:finish", signal.SIGINT),
    ],
)
def test_where_nothing_is_unsaved(where: str, number: signal.Signals, tmp_path: Path) -> None:
    words = [*RUN, "--run-dir", str(tmp_path / "run")]
    if where.endswith("finish"):
        words += ["--generations", "2"]
    process = begin(words, where)
    wait_here(process)
    began = time.monotonic()
    process.send_signal(number)
    assert "nothing is lost" in ended(process, 75)
    assert time.monotonic() - began < 5
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_run_under_way_is_saved(number: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = begin([*RUN, "--run-dir", str(folder)])
    wait_for_rows(folder, process, 3)
    process.send_signal(number)
    told = ended(process, 75)
    done = len(read_metrics(folder / "metrics.jsonl"))
    assert f"after {done} generations; everything is saved" in told
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [str(done)]


@pytest.mark.slow
def test_a_hang_up_that_is_ignored_stays_so(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = begin([*RUN, "--run-dir", str(folder)], prefix="trap '' HUP;")
    wait_for_rows(folder, process)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert "Stopped by SIGTERM" in ended(process, 75)


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait_for_a_generation(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    # What follows a generation takes a minute, in C.
    process = begin([*RUN, "--run-dir", str(folder)], "experiments.run.loop:_nothing", 60)
    wait_here(process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert "Interrupted." in ended(process, 130)
    assert time.monotonic() - began < 5


@pytest.mark.slow
@pytest.mark.parametrize("by_signal", [True, False])
def test_a_last_save_that_fails_is_told(by_signal: bool, tmp_path: Path) -> None:
    """Files may have so many blocks and no more, as on a disk that is full."""
    folder = tmp_path / "run"
    # Python ignores SIGXFSZ, and writing fails.
    words = [*RUN, "--run-dir", str(folder), "--width", "64"]
    if not by_signal:
        words += ["--generations", "2"]
    process = begin(words, prefix="trap '' XFSZ; ulimit -f 30;")
    if by_signal:
        wait_for_rows(folder, process)
        process.send_signal(signal.SIGTERM)
    told = ended(process, 1)
    assert "a checkpoint could not be written" in told
    assert "everything is saved" not in told
    assert not (folder / "result.json").exists()
    assert not [path for path in (folder / "checkpoints").iterdir() if path.name.isdecimal()]


def test_blocks_within_a_block_see_what_was_asked_for() -> None:
    with stop_requests() as outer:
        os.kill(os.getpid(), signal.SIGHUP)
        with stop_requests(begun=False) as inner:
            assert inner is outer
            assert inner.reason == "SIGHUP"
            assert inner.at(0)
    assert StopRequest().reason is None
