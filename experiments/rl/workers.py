"""Processes that step outside environments; nothing here imports JAX, so that they start fast."""

import atexit
import multiprocessing
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from experiments.rl import libraries
from experiments.rl.libraries import own
from experiments.run.children import leave_stops_to_parent, starting
from experiments.run.errors import RunError, UsageError
from experiments.run.own_code import Source


class Workers:
    """Environments of one kind, shared out over worker processes and stepped together.

    An environment that is over is not stepped again: its rewards are 0 and its observation stays. SIGTERM,
    SIGINT and SIGHUP do nothing in worker processes, so that the run can finish its generation and save.

    Args:
        name: of the environment, as `--env` says it.
        environments: how many.
        processes: over how many processes; no more than there are environments.
        settings: keyword arguments for what makes it.
        source: the file that it is made in, as this process has read it, for one of the user's own.

    Attributes:
        environments: how many.
        processes: the worker processes.
        close: ends the processes; called by itself when the object goes.

    Raises:
        RunError: from any method, when a worker process has died or its environment has failed.
    """

    def __init__(
        self,
        name: str,
        environments: int,
        processes: int,
        settings: Mapping[str, Any] | None = None,
        source: Source | None = None,
    ) -> None:
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
            process = context.Process(
                target=work, args=(there, name, dict(settings or {}), size, source), daemon=True
            )
            with starting():
                process.start()
            there.close()
            self._pipes.append(here)
            self.processes.append(process)
        self.close = weakref.finalize(self, end, self._pipes, self.processes)
        # Before multiprocessing's own, which sends SIGTERM and waits.
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
            raise RunError(f"{self._name} failed in a worker process: {answer}")
        return answer

    def _died(self) -> RunError:
        return RunError(
            f"a worker process of {self._name} has died; run the same command again to continue"
        )


def end(pipes: Sequence[Connection], processes: Sequence[Any]) -> None:
    """Ends workers: each leaves its loop when its pipe is closed."""
    for pipe in pipes:
        pipe.close()
    for process in processes:
        process.join(timeout=5)
        if process.is_alive():
            process.kill()


def work(
    pipe: Connection, name: str, settings: Mapping[str, Any], size: int, source: Source | None
) -> None:
    """What a worker process does until its pipe closes."""
    leave_stops_to_parent()
    if source is not None:
        own.adopt(source)
    environments: list[Any] = []
    while True:
        try:
            command, data = pipe.recv()
        except EOFError:
            return
        try:
            if not environments:
                made = (libraries.make(name, settings) for _ in range(size))
                environments = [libraries.adapt(environment) for environment in made]
                shape = shape_of(environments[0].observation_space)
                observations, over = np.zeros((size, *shape), np.float32), np.ones(size, bool)
            rewards = np.zeros(size, np.float32)
            for i, environment in enumerate(environments):
                if command == "reset":
                    first, _ = environment.reset(seed=data[i])
                    observations[i], over[i] = encode(environment.observation_space, first), False
                elif not over[i]:
                    seen, reward, terminated, truncated, _ = environment.step(action_of(data[i]))
                    observations[i] = encode(environment.observation_space, seen)
                    rewards[i], over[i] = reward, terminated or truncated
            answer = observations if command == "reset" else (observations, rewards, over)
        # Whatever an environment of somebody else's raises is told, and ends the run.
        except (Exception, SystemExit) as error:
            what = command if environments else "making it"
            failed = str(error) if isinstance(error, UsageError) else own.told(name, what, error)
            pipe.send(("failed", failed))
            return
        pipe.send(("done", answer))


def action_of(action: Any) -> Any:
    """An action as Gymnasium takes it: a vector as it is, a number as an int."""
    return action if np.ndim(action) else int(action)


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
