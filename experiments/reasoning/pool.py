"""Processes that compute rewards while others go on; nothing here imports JAX, so that they start fast.

What a model wrote may make a reward hang, die, take all memory, begin other processes or write where it
should not. So each part of a batch has a limit of time that holds in any case: the process is killed with
all that it began, another takes its place, and the reward is None.
"""

import math
import queue
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from experiments.reasoning.reward_values import Reward, RewardError, call, names
from experiments.reasoning.rewards import load
from experiments.reasoning.worker import START_S, Part, Worker
from experiments.run.errors import UsageError


class Batch(NamedTuple):
    """Rewards of a batch of completions, in its order.

    Attributes:
        rewards: None for those that cannot be told.
        parts: the same for each reward that these are summed from, by its name.
        failures: how many are None for a "timeout", a "crash" of the process (which ended, or wrote
            something else than its answer into its pipe), or for lack of "memory".
    """

    rewards: list[float | None]
    parts: dict[str, list[float | None]]
    failures: dict[str, int]


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

    A worker leaves SIGTERM, SIGINT and SIGHUP to the run, and is killed when the run ends. Processes that a
    reward begins live as long as its worker at most; :mod:`experiments.reasoning.guard` says what is out
    of reach.

    Args:
        workers: how many processes; 0 computes in this one, without limits.
        timeout_s: seconds for `task_size` completions. Where these take longer, each is tried alone with
            as much time, so that none but the guilty is None.
        reward: a function of a module, or a name for :func:`experiments.reasoning.rewards.load`.
        task_size: completions that a process is given at once.
        memory_gib: address space that a process may take beyond what it holds when it has imported its
            reward and computed it for no completions; None for no limit, which a reward needs that has a
            model on a GPU. On Linux alone. Each process that a reward begins has the same limit for
            itself.

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
        memory_gib: float | None = 4.0,
    ) -> None:
        if workers < 0 or task_size < 1 or not timeout_s > 0:
            raise UsageError(
                f"a pool of {workers} workers, {task_size} completions a task and {timeout_s} seconds: "
                "choose at least 0, at least 1, and a positive number"
            )
        if memory_gib is not None and not 0 < memory_gib < math.inf:
            raise UsageError(f"memory_gib={memory_gib!r} must be a positive number, or None")
        self.failures: Counter[str] = Counter()
        self._reward = load(reward) if isinstance(reward, str) else reward
        self._timeout_s, self._task_size, self._memory_gib = timeout_s, task_size, memory_gib
        self._closed = False
        self._lock = threading.Lock()
        self._workers: list[Worker] = []
        # Where nobody closes the pool.
        self._end = weakref.finalize(self, _end, self._workers)
        for _ in range(workers):
            self._workers.append(Worker(self._reward, memory_gib))
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
                worker.stop()  # the thread that waits for it is told by its pipe
        self._threads.shutdown(cancel_futures=True)
        self._end()

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
            # What a process wrote after its last answer is no fault of these completions.
            if worker.warm and not worker.clean():
                worker = self._replaced(worker)
            if not worker.warm:
                # What a reward imports is not its time: it is called once without completions.
                answer = worker.ask(part.cut(0, 0), START_S)
                if "failure" in answer:
                    worker = self._replaced(worker)
                    raise RewardError(
                        f"a worker process for {', '.join(names(self._reward))} does not start "
                        f"({answer['failure']} within {START_S:.0f} seconds)"
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
            new = Worker(self._reward, self._memory_gib)
            self._workers[self._workers.index(worker)] = new
        return new


def _joined(reward: Reward, batches: Sequence[Batch]) -> Batch:
    failures: Counter[str] = Counter()
    for batch in batches:
        failures.update(batch.failures)
    parts = {name: [x for b in batches for x in b.parts[name]] for name in names(reward)}
    return Batch([x for batch in batches for x in batch.rewards], parts, dict(failures))


def _end(workers: Sequence[Worker]) -> None:
    for worker in workers:
        worker.stop()
    for worker in workers:
        worker.end()
