"""Rewards in processes: order, limits that hold in any case, and nothing left behind."""

import collections
import itertools
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

from experiments.reasoning.pool import RewardPool
from experiments.reasoning.rewards import RewardError, exact, format_, weighted
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
    with RewardPool(2, 2.0, act, task_size=4, memory_mb=4096) as pool:
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
        processes = [worker.process for worker in pool._workers]
        late = pool.submit(["sleep"] * 5, ["x"] * 5)
        time.sleep(0.2)
        assert not late.done()
    assert not any(process.is_alive() for process in processes)
    assert pids <= {process.pid for process in processes}
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
    with pytest.raises(UsageError, match="there is no reward 'exat'; .*; did you mean 'exact'"):
        RewardPool(0, 1.0, "exat")
    with pytest.raises(
        RewardError, match="cannot be sent to a worker process .*at the top of a module"
    ):
        RewardPool(1, 1.0, lambda completions, answers: [])
