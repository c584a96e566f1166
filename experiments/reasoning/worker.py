"""One process that computes rewards, and the run's end of its pipe; nothing here imports JAX.

The run asks in pickles and trusts no answer: it is one line of JSON, with the number of the question, and
of the right form. Whatever else comes out of the pipe is a crash.
"""

import functools
import json
import math
import os
import pickle
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing import current_process, spawn
from pathlib import Path
from typing import Any, NamedTuple

from experiments.reasoning.guard import KILL_S, guard
from experiments.reasoning.reward_values import Reward, RewardError, call, names
from experiments.run import own_code
from experiments.run.children import starting

# Seconds for a new process to import what its reward needs.
START_S = 300.0
# Characters of a sentence about a reward, and bytes of an answer beside its numbers.
LONGEST_ERROR, ROOM = 10_000, 2**17
SIZE = struct.Struct("!Q")


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


class Worker:
    """One process with its guard, and this end of its pipe.

    Args:
        reward: what it computes.
        memory_gib: address space that it may take beyond what it holds after its first question.

    Attributes:
        process: the guard, whose child computes.
        warm: whether it has imported what it needs.

    Raises:
        RewardError: for a reward that cannot be sent to a process.
    """

    def __init__(self, reward: Reward, memory_gib: float | None) -> None:
        self.warm = False
        self._names = names(reward)
        self._asked = 0
        try:
            sent = pickle.dumps(reward)
        # Each type that cannot be pickled raises an error of its own kind.
        except Exception as error:
            raise RewardError(
                f"the reward {self._names[0]!r} cannot be sent to a worker process ({error}): define it "
                "at the top of a module, or name it as module:function"
            ) from error
        program = spawn.get_preparation_data("reward")
        del program["authkey"]  # not to be sent, and not needed
        self._pipe, there = socket.socketpair()
        control, self._control = os.pipe()
        begin = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; main"
        try:
            with starting():
                self.process = subprocess.Popen(
                    [sys.executable, "-c", f"{begin}({control}, {there.fileno()})"],
                    pass_fds=(control, there.fileno()),
                    stdin=subprocess.DEVNULL,
                    # One process is one core, and threads of BLAS that wait would take address space.
                    env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                    # A signal to the group of the run is not for it.
                    start_new_session=True,
                )
        finally:
            there.close()
            os.close(control)
        try:
            message = (program, own_code.sources(), sent, memory_gib)
            self._send(message, time.monotonic() + START_S)
        except OSError:
            pass  # it has died, as the first question will tell

    def ask(self, part: Part, limit_s: float) -> dict[str, Any]:
        """Its rewards and parts, or an "error" of the reward, or the kind of its "failure"."""
        deadline = time.monotonic() + limit_s
        self._asked += 1
        try:
            self._send((self._asked, tuple(part)), deadline)
            line = self._line(deadline, ROOM + 32 * len(part.completions) * (1 + len(self._names)))
        except TimeoutError:
            return {"failure": "timeout"}
        except OSError:
            return {"failure": "crash"}
        return _read(line, self._asked, len(part.completions), self._names)

    def clean(self) -> bool:
        """Whether it is there, and nothing came out of its pipe since its last answer."""
        self._pipe.setblocking(False)
        try:
            self._pipe.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def stop(self) -> None:
        """Asks the guard to kill the process and all that it began, and does not wait for it."""
        if self._control >= 0:
            os.close(self._control)
            self._control = -1

    def end(self) -> None:
        """Kills the process and all that it began, at once."""
        self.stop()
        try:
            self.process.wait(2 * KILL_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._pipe.close()

    def _send(self, message: object, deadline: float) -> None:
        content = pickle.dumps(message)
        self._pipe.settimeout(_left(deadline))
        self._pipe.sendall(SIZE.pack(len(content)) + content)

    def _line(self, deadline: float, most: int) -> bytes:
        """What comes up to a line break, which must be the last; OSError for anything else."""
        found = b""
        while not found.endswith(b"\n"):
            try:
                self._pipe.settimeout(_left(deadline))
                part = self._pipe.recv(2**16)
            except TimeoutError:
                if found:
                    raise OSError("half an answer") from None
                raise
            if not part or b"\n" in part[:-1] or len(found) + len(part) > most:
                raise OSError("no answer")
            found += part
        return found


def _left(deadline: float) -> float:
    """Seconds until then; 0 would be without a limit's exception."""
    return max(deadline - time.monotonic(), 1e-6)


def _read(line: bytes, number: int, count: int, parts: Sequence[str]) -> dict[str, Any]:
    """An answer of the right form, or a "crash": anybody may have written into the pipe."""
    crash = {"failure": "crash"}
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return crash
    if not isinstance(found, dict) or found.pop("number", None) != number:
        return crash
    if found == {"failure": "memory"}:
        return found
    if found.keys() == {"error"}:
        return found if isinstance(found["error"], str) else crash
    if found.keys() != {"rewards", "parts"} or not isinstance(found["parts"], dict):
        return crash
    lists = [found["rewards"], *found["parts"].values()]
    right = found["parts"].keys() == set(parts) and all(_scores(one, count) for one in lists)
    return found if right else crash


def _scores(values: object, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(x is None or (type(x) is float and math.isfinite(x)) for x in values)
    )


# ---------------------------------------------------------------- in the process


def main(control: int, pipe: int) -> None:
    """What the new process does: it guards one that computes rewards until `control` closes."""
    guard(control, pipe, functools.partial(serve, pipe))


def serve(descriptor: int) -> None:
    """Answers questions until the pipe closes."""
    pipe, own = socket.socket(fileno=descriptor), os.getpid()
    begun = _receive(pipe)
    if begun is None:
        return
    program, sources, sent, memory_gib = pickle.loads(begun)
    reward, broken = None, None
    try:
        _import_program(program)
        own_code.adopt(sources)
        reward = pickle.loads(sent)
    # The module that the function is in may raise anything when it is imported here.
    except Exception as error:
        broken = f"a worker process cannot load the reward: {error!r}"
    while True:
        question = _receive(pipe)
        if question is None:
            return
        number, answer = _answer(reward, question, broken)
        if os.getpid() != own:  # a child that the reward forked, and that returned from it
            os._exit(0)
        if memory_gib is not None and number == 1:
            limit_memory(memory_gib)
        pipe.sendall(json.dumps({"number": number, **answer}).encode() + b"\n")


def _import_program(program: dict[str, Any]) -> None:
    """The search path, folder and main module of the run, as for processes of multiprocessing."""
    process: Any = current_process()
    # By this, multiprocessing refuses a main module that begins processes when it is imported.
    process._inheriting = True
    try:
        spawn.prepare(program)
    finally:
        del process._inheriting


def _receive(pipe: socket.socket) -> bytes | None:
    """A message; None where the pipe is closed."""
    try:
        (size,) = SIZE.unpack(_exactly(pipe, SIZE.size))
        return _exactly(pipe, size)
    except (EOFError, OSError):
        return None


def _exactly(pipe: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        part = pipe.recv(min(size - len(found), 2**20))
        if not part:
            raise EOFError
        found += part
    return bytes(found)


def _answer(reward: Any, question: bytes, broken: str | None) -> tuple[int, dict[str, Any]]:
    number, part = pickle.loads(question)
    if broken is not None:
        return number, {"error": broken[:LONGEST_ERROR]}
    try:
        return number, call(reward, *part)._asdict()
    except RewardError as error:
        return number, {"error": str(error)[:LONGEST_ERROR]}
    except MemoryError:
        return number, {"failure": "memory"}


def limit_memory(gib: float) -> None:
    """Lets this process, and each that it begins, take so much address space beyond what this one holds.

    On Linux alone; elsewhere the system does not say what is held.
    """
    import resource

    if sys.platform != "linux":
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + int(gib * 2**30)
    _, before = resource.getrlimit(resource.RLIMIT_AS)
    if before != resource.RLIM_INFINITY:
        most = min(most, before)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
