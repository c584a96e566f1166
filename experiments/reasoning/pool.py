"""Processes that compute rewards while others go on; nothing here imports JAX, so that they start fast.

What a model wrote may make a reward hang, die or take all memory. So each part of a batch has a time limit
that holds in any case: the process is killed, another takes its place, and the reward is None. A process
answers in JSON, so that one which is no longer itself cannot run anything here.
"""

import json
import multiprocessing
import os
import queue
import signal
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from experiments.reasoning.rewards import Reward, RewardError, call, load, names
from experiments.run.errors import UsageError
from experiments.run.stopping import ignore_signals, shielded

# Seconds for a new process to import what its reward needs.
START_S = 300.0


class Batch(NamedTuple):
    """Rewards of a batch of completions, in its order.

    Attributes:
        rewards: None for those that cannot be told.
        parts: the same for each reward that these are summed from, by its name.
        failures: how many are None for a "timeout", a "crash" of the process, or for lack of "memory".
    """

    rewards: list[float | None]
    parts: dict[str, list[float | None]]
    failures: dict[str, int]


class Part(NamedTuple):
    """Some completions, and what belongs to them."""

    completions: list[str]
    answers: list[str]
    columns: dict[str, list[Any]]

    def cut(self, begin: int, end: int) -> "Part":
        """Those from `begin` to `end`."""
        columns = {name: column[begin:end] for name, column in self.columns.items()}
        return Part(self.completions[begin:end], self.answers[begin:end], columns)

    def cuts(self, size: int) -> list["Part"]:
        """All of them, `size` at a time."""
        return [self.cut(i, i + size) for i in range(0, len(self.completions), size)]


class Handle:
    """A batch that is being computed."""

    def __init__(self, reward: Reward, futures: Sequence[Future[Batch]]) -> None:
        self._reward = reward
        self._futures = futures

    def done(self) -> bool:
        """Whether `result` would not wait."""
        return all(future.done() for future in self._futures)

    def result(self) -> Batch:
        """The batch, waited for.

        Raises:
            RewardError: where the reward function has failed.
            CancelledError: where the pool was closed before.
        """
        return _joined(self._reward, [future.result() for future in self._futures])


class RewardPool:
    """Worker processes for one reward; ends with its ``with``, or by `close`.

    Args:
        workers: how many processes; 0 computes in this one, without limits.
        timeout_s: seconds for `task_size` completions. Where these take longer, each is tried alone with
            as much time, so that none but the guilty is None.
        reward: a function of a module, or a name for :func:`experiments.reasoning.rewards.load`.
        task_size: completions that a process is given at once.
        memory_mb: address space of a process at most, where the system can limit it.

    Attributes:
        failures: completions so far that are None, by the kind of failure.

    Raises:
        UsageError: for numbers that cannot be, or a reward that is not found.
        RewardError: for a reward that cannot be sent to a process.

    Example:
        >>> with RewardPool(0, 5.0, "exact") as pool:
        ...     handle = pool.submit(["1+1=2", "3"], ["2", "2"])
        ...     handle.result()
        Batch(rewards=[1.0, 0.0], parts={'exact': [1.0, 0.0]}, failures={})
    """

    def __init__(
        self,
        workers: int,
        timeout_s: float,
        reward: Reward | str,
        *,
        task_size: int = 8,
        memory_mb: int | None = None,
    ) -> None:
        if workers < 0 or task_size < 1 or not timeout_s > 0:
            raise UsageError(
                f"a pool of {workers} workers, {task_size} completions a task and {timeout_s} seconds: "
                "choose at least 0, at least 1, and a positive number"
            )
        self.failures: Counter[str] = Counter()
        self._reward = load(reward) if isinstance(reward, str) else reward
        self._timeout_s, self._task_size, self._memory_mb = timeout_s, task_size, memory_mb
        self._closed = False
        self._lock = threading.Lock()
        self._workers = [Worker(self._reward, memory_mb) for _ in range(workers)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        # A thread waits for each process, so that each is waited for with a limit of its own.
        self._threads = ThreadPoolExecutor(max(workers, 1), "rewards")

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(
        self, completions: Sequence[str], answers: Sequence[str], **columns: Sequence[Any]
    ) -> Handle:
        """Begins to compute the rewards of a batch.

        Args:
            completions: what was written.
            answers: the right ones, of which a reward makes what it will.
            **columns: what else the reward needs, a sequence each.

        Raises:
            ValueError: where these are not as many as the completions.
        """
        for name, column in {"answers": answers, **columns}.items():
            if len(column) != len(completions):
                raise ValueError(
                    f"{name} has {len(column)} entries for {len(completions)} completions"
                )
        lists = {name: list(column) for name, column in columns.items()}
        parts = Part(list(completions), list(answers), lists).cuts(self._task_size)
        if self._workers:
            return Handle(self._reward, [self._threads.submit(self._score, p) for p in parts])
        future: Future[Batch] = Future()
        try:
            scores = [Batch(*call(self._reward, *part), {}) for part in parts]
            future.set_result(_joined(self._reward, scores))
        except RewardError as error:
            future.set_exception(error)
        return Handle(self._reward, [future])

    def close(self) -> None:
        """Ends the processes; what they have not computed is cancelled."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.process.kill()  # the thread that waits for it is told by its pipe
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.end()

    def _score(self, part: Part) -> Batch:
        answer = self._ask(part)
        if "error" in answer:
            raise RewardError(answer["error"])
        if "failure" not in answer:
            return Batch(answer["rewards"], answer["parts"], {})
        if len(part.completions) > 1:
            return _joined(self._reward, [self._score(one) for one in part.cuts(1)])
        kind = answer["failure"]
        with self._lock:
            self.failures[kind] += 1
        return Batch([None], {name: [None] for name in names(self._reward)}, {kind: 1})

    def _ask(self, part: Part) -> dict[str, Any]:
        """The answer of a process that is free, which is replaced where it fails."""
        worker = self._idle.get()
        try:
            if not worker.warm:
                # What a reward imports is not its time: it is called once without completions.
                answer = worker.ask(part.cut(0, 0), START_S)
                if "failure" in answer:
                    worker = self._replaced(worker)
                    raise RewardError(
                        f"a worker process for {', '.join(names(self._reward))} does not start "
                        f"({answer['failure']} within {START_S:.0f} seconds, memory_mb={self._memory_mb})"
                    )
                worker.warm = "error" not in answer
                if not worker.warm:
                    return answer
            answer = worker.ask(part, self._timeout_s)
            if "failure" in answer:
                worker = self._replaced(worker)
            return answer
        finally:
            self._idle.put(worker)

    def _replaced(self, worker: "Worker") -> "Worker":
        with self._lock:
            if self._closed:
                raise CancelledError
            worker.end()
            new = Worker(self._reward, self._memory_mb)
            self._workers[self._workers.index(worker)] = new
        return new


def _joined(reward: Reward, batches: Sequence[Batch]) -> Batch:
    failures: Counter[str] = Counter()
    for batch in batches:
        failures.update(batch.failures)
    parts = {name: [x for b in batches for x in b.parts[name]] for name in names(reward)}
    return Batch([x for batch in batches for x in batch.rewards], parts, dict(failures))


class Worker:
    """One process, and this end of its pipe.

    Attributes:
        process: the process.
        warm: whether it has imported what it needs.
    """

    def __init__(self, reward: Reward, memory_mb: int | None) -> None:
        # Spawned, not forked: a fork of a process with JAX's threads may hang.
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self.process = context.Process(target=work, args=(there, memory_mb), daemon=True)
        with shielded():
            self.process.start()
        there.close()
        self.warm = False
        try:
            self._pipe.send(reward)
        except BrokenPipeError:
            pass  # it has died, as the first question will tell
        # Of what cannot be pickled, every type tells in its own way.
        except Exception as error:
            self.end()
            raise RewardError(
                f"the reward {names(reward)[0]!r} cannot be sent to a worker process ({error}): define it "
                "at the top of a module, or name it as module:function"
            ) from error

    def ask(self, part: Part, limit_s: float) -> dict[str, Any]:
        """Its rewards and parts, or an "error" of the reward, or the kind of its "failure"."""
        try:
            self._pipe.send((part, limit_s))
            if not self._pipe.poll(limit_s):
                return {"failure": "timeout"}
            return json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            return {"failure": "crash"}

    def end(self) -> None:
        """Kills the process, at once."""
        self.process.kill()
        self.process.join()
        self._pipe.close()


def work(pipe: Connection, memory_mb: int | None) -> None:
    """What a worker process does until its pipe closes."""
    ignore_signals()
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    # One process is one core, and threads of BLAS that wait would take address space.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    if memory_mb is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory_mb * 2**20,) * 2)
    try:
        reward, broken = pipe.recv(), None
    # The module that the function is in may raise anything when it is imported here.
    except Exception as error:
        reward, broken = None, f"a worker process cannot load the reward: {error!r}"
    while True:
        try:
            part, limit_s = pipe.recv()
        except (EOFError, OSError):
            return
        # Where the parent is dead and a C function holds the lock that the thread waits for, nothing but
        # a signal without a handler ends this; while it lives, the parent is long before that.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, limit_s + 5)
        pipe.send_bytes(json.dumps(_answer(reward, part, broken)).encode())
        signal.setitimer(signal.ITIMER_REAL, 0)


def _answer(reward: Reward, part: Part, broken: str | None) -> dict[str, Any]:
    if broken is not None:
        return {"error": broken}
    try:
        return call(reward, *part)._asdict()
    except RewardError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"failure": "memory"}


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
