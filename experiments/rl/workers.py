"""Processes that step Gymnasium environments; nothing here imports JAX, so that they start fast."""

import atexit
import multiprocessing
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from experiments.run.errors import RunError, UsageError
from experiments.run.stopping import ignore_signals, shielded


class Workers:
    """Environments of one kind, shared out over worker processes and stepped together.

    An environment that is over is not stepped again: its rewards are 0 and its observation stays.

    Args:
        name: of a Gymnasium environment.
        environments: how many.
        processes: over how many processes; no more than there are environments.

    Attributes:
        environments: how many.
        processes: the worker processes.
        close: ends the processes; called by itself when the object goes.

    Raises:
        RunError: from any method, when a worker process has died or its environment has failed.
    """

    def __init__(self, name: str, environments: int, processes: int) -> None:
        # Spawned, not forked: a fork of a process with JAX's threads may hang.
        context = multiprocessing.get_context("spawn")
        self._name = name
        self.environments = environments
        processes = min(processes, environments)
        self._sizes = [len(part) for part in np.array_split(range(environments), processes)]
        self._pipes: list[Connection] = []
        self.processes: list[Any] = []
        for size in self._sizes:
            here, there = context.Pipe()
            process = context.Process(target=work, args=(there, name, size), daemon=True)
            with shielded():
                process.start()
            there.close()
            self._pipes.append(here)
            self.processes.append(process)
        self.close = weakref.finalize(self, end, self._pipes, self.processes)
        # Before multiprocessing waits for them at the end, which they would not notice.
        atexit.register(self.close)

    def reset(self, seeds: Sequence[int]) -> np.ndarray:
        """First observations of new episodes, float32 [environments, observations]."""
        ends = np.cumsum(self._sizes)
        for pipe, part in zip(self._pipes, np.split(np.asarray(seeds), ends[:-1]), strict=True):
            self._send(pipe, ("reset", part.tolist()))
        return np.concatenate([self._answer(pipe) for pipe in self._pipes])

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(observations, rewards [environments], which episodes are over, bool [environments])."""
        ends = np.cumsum(self._sizes)
        for pipe, part in zip(self._pipes, np.split(actions, ends[:-1]), strict=True):
            self._send(pipe, ("step", part))
        parts = [self._answer(pipe) for pipe in self._pipes]
        observations, rewards, over = (np.concatenate(x) for x in zip(*parts, strict=True))
        return observations, rewards, over

    def _send(self, pipe: Connection, message: Any) -> None:
        try:
            pipe.send(message)
        except OSError as error:
            raise self._died() from error

    def _answer(self, pipe: Connection) -> Any:
        try:
            kind, answer = pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if kind == "failed":
            raise RunError(f"gymnasium:{self._name} failed in a worker process: {answer}")
        return answer

    def _died(self) -> RunError:
        return RunError(
            f"a worker process of gymnasium:{self._name} has died; run the same command again to continue"
        )


def end(pipes: Sequence[Connection], processes: Sequence[Any]) -> None:
    """Ends workers: each leaves its loop when its pipe is closed."""
    for pipe in pipes:
        pipe.close()
    for process in processes:
        process.join(timeout=5)
        if process.is_alive():
            process.kill()


def work(pipe: Connection, name: str, size: int) -> None:
    """What a worker process does until its pipe closes."""
    ignore_signals()
    import gymnasium

    environments = [gymnasium.make(name) for _ in range(size)]
    observations = np.zeros((size, *shape_of(environments[0].observation_space)), np.float32)
    over = np.ones(size, bool)
    while True:
        try:
            command, data = pipe.recv()
        except EOFError:
            return
        try:
            rewards = np.zeros(size, np.float32)
            for i, environment in enumerate(environments):
                if command == "reset":
                    first, _ = environment.reset(seed=data[i])
                    observations[i], over[i] = encode(environment.observation_space, first), False
                elif not over[i]:
                    action = data[i] if data.ndim > 1 else int(data[i])
                    seen, reward, terminated, truncated, _ = environment.step(action)
                    observations[i] = encode(environment.observation_space, seen)
                    rewards[i], over[i] = reward, terminated or truncated
            answer = observations if command == "reset" else (observations, rewards, over)
        # Whatever an environment of somebody else's raises is told, and ends the run.
        except Exception as error:
            pipe.send(("failed", f"{type(error).__name__}: {error}"))
            return
        pipe.send(("done", answer))


def shape_of(space: Any) -> tuple[int]:
    """The shape of an encoded observation."""
    import gymnasium

    if isinstance(space, gymnasium.spaces.Discrete):
        return (int(space.n),)
    return (int(np.prod(space.shape)),)


def encode(space: Any, observation: Any) -> np.ndarray:
    """An observation as a float32 vector; whole numbers as one-hot."""
    import gymnasium

    if isinstance(space, gymnasium.spaces.Discrete):
        return np.eye(int(space.n), dtype=np.float32)[int(observation) - int(space.start)]
    return np.asarray(observation, np.float32).reshape(-1)


def spaces_of(name: str) -> tuple[Any, Any, int]:
    """(observation space, action space, time limit) of a Gymnasium environment.

    Raises:
        UsageError: if Gymnasium cannot make it, or its spaces are not numbers or vectors.
    """
    import gymnasium

    try:
        environment = gymnasium.make(name)
    except gymnasium.error.Error as error:
        raise UsageError(f"Gymnasium cannot make {name!r}: {error}") from error
    spec, seen, takes = environment.spec, environment.observation_space, environment.action_space
    environment.close()
    box, discrete = gymnasium.spaces.Box, gymnasium.spaces.Discrete
    if not isinstance(seen, box | discrete):
        raise UsageError(
            f"gymnasium:{name} gives observations of {seen}; a Box or Discrete is right"
        )
    if not isinstance(takes, discrete) and not (isinstance(takes, box) and len(takes.shape) == 1):
        raise UsageError(
            f"gymnasium:{name} takes actions of {takes}; a vector or Discrete is right"
        )
    if isinstance(takes, box) and not takes.is_bounded():
        raise UsageError(
            f"gymnasium:{name} takes actions from {takes.low} to {takes.high}; finite bounds are right"
        )
    if spec is None or spec.max_episode_steps is None:
        raise UsageError(f"gymnasium:{name} has no time limit, so an episode may never end")
    return seen, takes, spec.max_episode_steps
