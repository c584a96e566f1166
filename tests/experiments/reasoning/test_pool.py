"""Rewards in processes: order, limits that hold in any case, and nothing left behind."""

import collections
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest

from experiments.reasoning.guard import descendants
from experiments.reasoning.pool import Batch, RewardPool
from experiments.reasoning.reward_values import RewardError, weighted
from experiments.reasoning.rewards import exact, format_
from experiments.run.errors import UsageError


def act(completions: list[str], answers: list[str], **_: Any) -> list[float]:
    """Does what each completion says, and gives its length."""
    for text in completions:
        if text == "sleep":
            time.sleep(1000)
        if text == "hold":  # in C, and so no thread of the process goes on
            collections.deque(itertools.repeat(None), maxlen=0)
        if text == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if text == "memory":
            bytearray(2**40)
        if text == "raise":
            raise KeyError("here")
    return [float(len(text)) for text in completions]


def pid(completions: list[str], answers: list[str], **_: Any) -> list[float]:
    return [float(os.getpid()) for _ in completions]


def jax_is_there(completions: list[str], answers: list[str], **_: Any) -> list[float]:
    return [float("jax" in sys.modules) for _ in completions]


def main_thread(completions: list[str], answers: list[str], **_: Any) -> list[float]:
    return [float(threading.current_thread() is threading.main_thread()) for _ in completions]


def column(completions: list[str], answers: list[str], *, level: list[float]) -> list[float]:
    return level


def gone(pids: set[int]) -> bool:
    """Whether all processes have ended, waited for a little."""
    for _ in range(100):
        if not any(Path(f"/proc/{one}").exists() for one in pids):
            return True
        time.sleep(0.1)
    return False


def test_rewards_keep_their_order() -> None:
    reward = weighted({"right": (exact, 1.0), "form": (format_, 0.5)})
    texts = [f"<answer>{i}</answer>" if i % 3 else str(i) for i in range(50)]
    answers = [str(i - i % 2) for i in range(50)]
    with RewardPool(0, 1.0, reward) as pool:
        here = pool.submit(texts, answers).result()
    with RewardPool(2, 60.0, reward, task_size=4) as pool:
        handles = [pool.submit(texts, answers) for _ in range(2)]
        for handle in handles:
            assert handle.result() == here
            assert handle.done()
        assert pool.submit([], []).result() == ([], {"right": [], "form": []}, {})
    assert here.parts["right"] == [float(i % 2 == 0) for i in range(50)]
    assert here.rewards[:3] == [1.0, 0.5, 1.5]
    assert here.failures == {}


@pytest.mark.slow
def test_whatever_a_completion_does_the_others_have_their_rewards() -> None:
    texts = ["a", "sleep", "bb", "memory", "hold", "ccc", "die", "dddd"]
    with RewardPool(2, 2.0, act, task_size=4, memory_gib=1.0) as pool:
        batch = pool.submit(texts, texts).result()
        assert batch.rewards == [1.0, None, 2.0, None, None, 3.0, None, 4.0]
        assert batch.parts == {"act": batch.rewards}
        assert batch.failures == {"timeout": 2, "memory": 1, "crash": 1} == pool.failures
        # Those that took their places work.
        again = pool.submit(["x", "yy", "sleep"], [""] * 3).result()
        assert again.rewards == [1.0, 2.0, None]
    assert pool.failures["timeout"] == 3


@pytest.mark.slow
def test_a_worker_computes_in_its_main_thread_without_jax_and_columns_reach_it() -> None:
    reward = weighted(
        {"jax": (jax_is_there, 1.0), "main": (main_thread, 1.0), "pid": (pid, 0.0), "level": (anything, 1.0)}
    )  # fmt: skip
    with RewardPool(1, 60.0, reward, task_size=2) as pool:
        batch = pool.submit(["x"] * 5, ["y"] * 5, level=[1.0, 2.0, 3.0, 4.0, 5.0]).result()
        with pytest.raises(ValueError, match="level has 1 entries for 2 completions"):
            pool.submit(["x"] * 2, ["y"] * 2, level=[1.0])
    assert batch.parts["jax"] == [0.0] * 5
    assert batch.parts["main"] == [1.0] * 5
    assert batch.parts["level"] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert os.getpid() not in batch.parts["pid"]


def anything(completions: list[str], answers: list[str], *, level: list[float]) -> list[float]:
    return level


@pytest.mark.slow
def test_a_reward_that_fails_is_told_and_the_pool_goes_on() -> None:
    with RewardPool(1, 60.0, act) as pool:
        with pytest.raises(
            RewardError, match="the reward 'act' raised KeyError: 'here'; the first of 1"
        ):
            pool.submit(["raise"], ["x"]).result()
        assert pool.submit(["fine"], ["x"]).result().rewards == [4.0]
    with RewardPool(0, 1.0, act) as pool, pytest.raises(RewardError, match="KeyError: 'here'"):
        pool.submit(["raise"], ["x"]).result()


@pytest.mark.slow
def test_closing_ends_processes_that_are_at_work() -> None:
    with RewardPool(
        2, 1000.0, weighted({"pid": (pid, 1.0), "act": (act, 0.0)}), task_size=1
    ) as pool:
        pids = {int(x) for x in pool.submit(["x"] * 20, ["x"] * 20).result().parts["pid"] if x}
        guards = [worker.process for worker in pool._workers]
        assert pids <= {one for guard in guards for one in descendants(guard.pid)}
        late = pool.submit(["sleep"] * 5, ["x"] * 5)
        time.sleep(0.2)
        assert not late.done()
    assert [guard.poll() for guard in guards] == [0, 0]
    assert gone(pids)
    with pytest.raises(CancelledError):
        late.result()


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "text"), [(signal.SIGTERM, "sleep"), (signal.SIGKILL, "hold")])
def test_nothing_is_left_when_the_parent_is_killed(
    stop: signal.Signals, text: str, tmp_path: Path
) -> None:
    (tmp_path / "rewards_of_the_test.py").write_text(
        textwrap.dedent("""
        import collections, itertools, time

        def act(completions, answers):
            for text in completions:
                print("at work", flush=True)
                if text == "sleep":
                    time.sleep(1000)
                collections.deque(itertools.repeat(None), maxlen=0)
            return []
        """)
    )
    program = textwrap.dedent(f"""
        import time
        from experiments.reasoning.pool import RewardPool

        if __name__ == "__main__":
            pool = RewardPool(3, 2.0, "rewards_of_the_test.py:act", task_size=1)
            handle = pool.submit(["sleep", "{text}"], ["", ""])
            time.sleep(1000)
        """)
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert parent.stdout is not None
    assert [parent.stdout.readline() for _ in range(2)] == ["at work\n"] * 2
    parent.send_signal(stop)
    # Its end comes when the last process that could write there has ended.
    assert parent.communicate(timeout=60) == ("", None)


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(
        UsageError, match="a pool of -1 workers, 8 completions a task and 1.0 seconds"
    ):
        RewardPool(-1, 1.0, "exact")
    for memory in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(
            UsageError, match=f"memory_gib={memory} must be a positive number, or None"
        ):
            RewardPool(0, 1.0, "exact", memory_gib=memory)
    with pytest.raises(UsageError, match="there is no reward 'exat'; .*; did you mean 'exact'"):
        RewardPool(0, 1.0, "exat")
    with pytest.raises(
        RewardError, match="cannot be sent to a worker process .*at the top of a module"
    ):
        RewardPool(1, 1.0, lambda completions, answers: [])


# ---------------------------------------------------------------- what a reward begins ends with it


def note(folder: str) -> None:
    """Leaves the number of this process in a folder."""
    Path(folder, str(os.getpid())).touch()


SLEEPER = [sys.executable, "-c", "import os, sys, time; open(sys.argv[1] + '/' + str(os.getpid()), 'w').close(); time.sleep(1000)"]  # fmt: skip


def begin_others(folder: str) -> None:
    """A fork, a program in a session of its own, and one whose parent has ended; waits for all three."""
    if os.fork() == 0:
        note(folder)
        time.sleep(1000)
    subprocess.Popen([*SLEEPER, folder], start_new_session=True, env={})
    if (child := os.fork()) == 0:
        subprocess.Popen([*SLEEPER, folder], start_new_session=True)
        os._exit(0)
    os.waitpid(child, 0)
    while len(os.listdir(folder)) < 3:
        time.sleep(0.01)


def begins_others(completions: list[str], answers: list[str], **_: Any) -> list[float]:
    """Begins processes that note themselves in the folder of the answer, then does what it is told."""
    for text, folder in zip(completions, answers, strict=True):
        begin_others(folder)
        act([text], [folder])
    return [float(len(text)) for text in completions]


def noted(folder: Path) -> set[int]:
    return {int(name) for name in os.listdir(folder)}


linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere they may step out of reach")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("text", ["fine", "die", "sleep", "hold"])
def test_all_that_a_reward_begins_ends_with_its_worker(text: str, tmp_path: Path) -> None:
    with RewardPool(1, 3.0, begins_others) as pool:
        batch = pool.submit([text], [str(tmp_path)]).result()
        assert len(noted(tmp_path)) == 3
        if text == "fine":
            assert batch.rewards == [4.0]
            assert not gone_now(noted(tmp_path))
        else:
            assert batch.failures == {"crash" if text == "die" else "timeout": 1}
            assert gone_now(noted(tmp_path))
    assert gone_now(noted(tmp_path))


def gone_now(pids: set[int]) -> bool:
    return not any(Path(f"/proc/{one}").exists() for one in pids)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("text", ["sleep", "hold"])
def test_all_that_a_reward_begins_ends_with_the_run(text: str, tmp_path: Path) -> None:
    program = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from experiments.reasoning.pool import RewardPool
from test_pool import begins_others
pool = RewardPool(1, 1000.0, begins_others)
pool.submit([{text!r}], [sys.argv[1]])
time.sleep(1000)
"""
    words = [sys.executable, "-c", program, str(tmp_path)]
    run = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": os.getcwd()})
    for _ in range(600):
        if len(noted(tmp_path)) == 3:
            break
        time.sleep(0.1)
    run.kill()
    run.wait()
    assert len(noted(tmp_path)) == 3
    assert gone(noted(tmp_path))


def flees(completions: list[str], answers: list[str], **_: Any) -> list[float]:
    """Begins a process that forks and ends, as does its child, and so on, in a session of their own."""
    for folder in answers:
        if os.fork() == 0:
            os.setsid()
            note(folder)
            while not os.fork():
                pass
            os._exit(0)
        while not os.listdir(folder):
            time.sleep(0.01)
    return [1.0 for _ in completions]


@linux
@pytest.mark.slow
def test_processes_that_fork_faster_than_they_are_listed_end_too(tmp_path: Path) -> None:
    with RewardPool(1, 20.0, flees) as pool:
        assert pool.submit(["x"], [str(tmp_path)]).result().rewards == [1.0]
        (group,) = noted(tmp_path)
        time.sleep(0.2)
        os.killpg(group, 0)  # they are there
    with pytest.raises(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def kills_its_guard(completions: list[str], answers: list[str], **_: Any) -> list[float]:
    if completions:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(1000)
    return []


@pytest.mark.slow
def test_a_reward_that_kills_its_guard_or_leaves_is_a_crash() -> None:
    with RewardPool(1, 20.0, kills_its_guard) as pool:
        assert pool.submit(["x"], [""]).result().failures == {"crash": 1}
    with RewardPool(1, 20.0, leaves) as pool:
        assert pool.submit(["x"], [""]).result().failures == {"crash": 1}


def leaves(completions: list[str], answers: list[str], **_: Any) -> list[float]:
    if completions:
        sys.exit(0)
    return []


def forks(completions: list[str], answers: list[str], **_: Any) -> list[float]:
    """Both processes return; the child gives other values."""
    mine = os.fork() if completions else 1
    return [float(text) if mine else -1.0 for text in completions]


@pytest.mark.slow
def test_a_child_that_returns_from_a_reward_answers_nothing() -> None:
    with RewardPool(1, 20.0, forks, task_size=1) as pool:
        batch = pool.submit([str(i) for i in range(20)], [""] * 20).result()
    assert batch == Batch([float(i) for i in range(20)], {"forks": batch.rewards}, {})


# ---------------------------------------------------------------- junk in the pipe


def sockets() -> list[int]:
    """File descriptors of this process's pipe."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                found.append(int(name))
        except OSError:
            pass
    return found


FORGED = {"number": 2, "rewards": [9.0], "parts": {"writes": [9.0]}}
JUNK = {
    "text": b"hello", "a line": b"hello\n", "half an answer": json.dumps(FORGED).encode()[:20],
    "bytes": bytes(range(256)), "a length of gigabytes": b"\x7f\xff\xff\xff", "brackets": b"[" * 10**5,
    "no object": b"[1]\n", "null": b"null\n", "megabytes": b"x" * 10**7,
    "another question's": json.dumps({**FORGED, "number": 1}).encode() + b"\n",
    "two answers": 2 * (json.dumps(FORGED).encode() + b"\n"),
    **{
        f"values {wrong}": json.dumps({**FORGED, "rewards": wrong}).encode() + b"\n"
        for wrong in (None, [], [1.0, 2.0], ["1"], [True], [float("nan")], {"0": 1.0}, [[1.0]])
    },
    "other parts": json.dumps({**FORGED, "parts": {"others": [9.0]}}).encode() + b"\n",
    "no parts": json.dumps({**FORGED, "parts": None}).encode() + b"\n",
    "another failure": json.dumps({"number": 2, "failure": "timeout"}).encode() + b"\n",
    "an error that is no text": json.dumps({"number": 2, "error": 5}).encode() + b"\n",
}  # fmt: skip


def writes(completions: list[str], answers: list[str], **_: Any) -> list[float]:
    for text in completions:
        if text in JUNK:
            for one in sockets():
                left = JUNK[text]
                while left:
                    left = left[os.write(one, left) :]
            time.sleep(1000)
        if text == "close":
            os.closerange(3, 100)
        if text == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if text == "later" and os.fork() == 0:
            time.sleep(0.5)
            for one in sockets():
                os.write(one, b"later\n")
            os._exit(0)
    return [float(len(text)) for text in completions]


@linux
@pytest.mark.slow
@pytest.mark.parametrize("case", JUNK)
def test_junk_in_the_pipe_is_a_crash_of_its_reward_alone(case: str) -> None:
    with RewardPool(1, 1.0, writes, task_size=1) as pool:
        batch = pool.submit([case, "fine"], ["", ""]).result()
    assert batch.rewards == [None, 4.0]
    # Where more may come, it was waited for.
    assert batch.failures == {"crash": 1}


@linux
@pytest.mark.slow
def test_pipes_that_are_closed_stopped_or_written_to_later() -> None:
    with RewardPool(1, 2.0, writes, task_size=1) as pool:
        batch = pool.submit(["close", "fine", "stop", "fine"], [""] * 4).result()
        assert batch.rewards == [None, 4.0, None, 4.0]
        assert batch.failures == {"crash": 1, "timeout": 1}
        # More than a stopped process's pipe takes in: what is sent has a limit of time, too.
        batch = pool.submit(["stop", "x" * 10**7], ["", ""]).result()
        assert batch.rewards == [None, 1e7]
        assert pool.submit(["later"], [""]).result().rewards == [5.0]
        time.sleep(1)
        assert pool.submit(["fine"], [""]).result() == ([4.0], {"writes": [4.0]}, {})


def test_large_batches_go_through_the_pipe() -> None:
    texts, level = ["x" * 1000] * 3000, [1 / 3] * 3000
    with RewardPool(1, 60.0, column, task_size=3000) as pool:
        assert pool.submit(texts, texts, level=level).result().rewards == level


# ---------------------------------------------------------------- memory, signals


def takes(completions: list[str], answers: list[str], **_: Any) -> list[float]:
    """Takes so many MiB, in this process or in another."""
    out = []
    for text, where in zip(completions, answers, strict=True):
        if where == "here":
            bytearray(int(text) * 2**20)
            out.append(1.0)
        else:
            words = [sys.executable, "-c", f"bytearray({text} * 2**20)"]
            out.append(float(subprocess.run(words, stderr=subprocess.DEVNULL).returncode == 0))
    return out


@linux
@pytest.mark.slow
def test_the_limit_of_memory_is_beyond_what_a_worker_holds() -> None:
    with RewardPool(1, 30.0, takes, memory_gib=0.5, task_size=4) as pool:
        batch = pool.submit(["300", "700", "300"], ["here"] * 3).result()
        assert (batch.rewards, batch.failures) == ([1.0, None, 1.0], {"memory": 1})
        # Others that it begins have the limit for themselves.
        assert pool.submit(["1000", "100"], ["there"] * 2).result().rewards == [0.0, 1.0]
    with RewardPool(1, 30.0, takes, memory_gib=None) as pool:
        assert pool.submit(["1000"], ["here"]).result().rewards == [1.0]


def ends_a_program(completions: list[str], answers: list[str], **_: Any) -> list[float]:
    """How a program ends that is sent SIGTERM."""
    out = []
    for _ in completions:
        program = subprocess.Popen(["sleep", "1000"])
        program.terminate()
        out.append(float(program.wait()))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_that_ask_to_stop_do_nothing_in_workers(number: signal.Signals) -> None:
    with RewardPool(1, 60.0, pid) as pool:
        guard = pool._workers[0].process
        os.kill(guard.pid, number)  # while it starts, too
        (worker,) = pool.submit(["x"], [""]).result().rewards
        assert worker is not None
        for one in (guard.pid, int(worker)):
            os.kill(one, number)
        assert pool.submit(["x"], [""]).result().rewards == [worker]
        assert os.getpgid(guard.pid) != os.getpgid(0)
        assert os.getpgid(int(worker)) == int(worker)
    with RewardPool(1, 60.0, ends_a_program) as pool:
        assert pool.submit(["x"], [""]).result().rewards == [-signal.SIGTERM]


@pytest.mark.slow
def test_a_main_module_that_makes_a_pool_when_it_is_imported_is_told(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "from experiments.reasoning.pool import RewardPool\n"
        "def one(completions, answers):\n    return [1.0] * len(completions)\n"
        "with RewardPool(1, 60.0, one) as pool:\n    print(pool.submit(['a'], ['']).result().rewards)\n"
    )
    words = [sys.executable, str(tmp_path / "program.py")]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    told = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert told.returncode == 1
    assert "a worker process cannot load the reward: RuntimeError" in told.stderr


def test_descendants_are_children_and_theirs() -> None:
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '100']).pid, flush=True); time.sleep(100)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    grandchild = int(child.stdout.readline())
    try:
        assert descendants(child.pid) == {grandchild: os.getpgid(0)}
        assert {child.pid, grandchild} <= set(descendants(os.getpid()))
        assert os.getpid() not in descendants(os.getpid())
    finally:
        os.kill(grandchild, signal.SIGKILL)
        child.kill()
        child.communicate()
