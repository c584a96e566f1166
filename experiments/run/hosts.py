"""Several processes as one run, on one machine or many, by JAX's own distributed runtime.

All of them go through the same steps in the same order, each with its own members of the population, and
the first of them, number 0, writes the run folder. Imports nothing heavy.
"""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from experiments.run.errors import Interrupted, RunError, UsageError
from experiments.run.settings import Cluster

AUTO = "auto"
# What JAX reads itself, and beside it, by the names of its tutorials, what it wants as arguments.
ADDRESS, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# What gloo, NCCL, gRPC and JAX's coordination service say where another process is gone.
LOSS = re.compile(
    r"gloo|nccl|heartbeat|coordination|barrier|unavailable|deadline_exceeded|aborted|closed by peer",
    re.IGNORECASE,
)

CONNECTION = re.compile(r"gloo|connection reset|connection closed|closed by peer", re.IGNORECASE)


class Process(NamedTuple):
    """Which process this is, and of how many.

    Attributes:
        address: of process 0, "HOST:PORT"; None where JAX is to find out everything.
        processes: how many there are.
        process: the number of this one.
    """

    address: str | None
    processes: int | None
    process: int | None


def process_of(settings: Cluster, environment: Mapping[str, str]) -> Process | None:
    """What the settings say, or where they are silent the environment; None for a process alone.

    Raises:
        UsageError: where something is missing or cannot be right.

    Example:
        >>> from experiments.supervised.config import PRESETS
        >>> settings = PRESETS["digits"].cluster
        >>> process_of(settings, {ADDRESS: "a:1234", PROCESSES: "2", PROCESS: "1"})
        Process(address='a:1234', processes=2, process=1)
    """
    address = settings.coordinator or environment.get(ADDRESS)
    processes = _whole(settings.processes, "--processes", PROCESSES, environment)
    process = _whole(settings.process, "--process", PROCESS, environment)
    if address is None:
        # Other programs may have left numbers in the environment; flags are meant.
        if settings.processes is None and settings.process is None:
            return None
        raise UsageError(
            "--processes and --process need --coordinator HOST:PORT, the address of process 0, or "
            f"{ADDRESS}"
        )
    if address == AUTO:
        if settings.processes is not None or settings.process is not None:
            raise UsageError(
                "--coordinator auto: JAX asks the cluster for all else; leave --processes and --process out"
            )
        return Process(None, None, None)
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UsageError(
            f"--coordinator {address}: must be HOST:PORT of process 0, or {AUTO!r} on a cluster that JAX "
            "knows"
        )
    if processes is None or process is None:
        raise UsageError(
            f"--coordinator {address}: say with --processes how many there are, and with --process which "
            f"this one is (or by {PROCESSES} and {PROCESS})"
        )
    if processes < 1:
        raise UsageError(f"--processes {processes}: choose a whole number of at least 1")
    if not 0 <= process < processes:
        raise UsageError(
            f"--process {process}: of {processes} processes, choose 0 to {processes - 1}"
        )
    return Process(address, processes, process)


def _whole(given: int | None, flag: str, name: str, environment: Mapping[str, str]) -> int | None:
    if given is not None or name not in environment:
        return given
    try:
        return int(environment[name])
    except ValueError as error:
        raise UsageError(
            f"{name}={environment[name]!r}: must be a whole number, as for {flag}"
        ) from error


@contextlib.contextmanager
def joined(settings: Cluster) -> Iterator[None]:
    """The block is run as one of the processes that the settings name; has to begin before JAX's backend.

    Errors that all processes have alike leave the block as they are. Any other ends the process at once,
    with its sentence and exit code 1: in an orderly end JAX waits for the other processes, which may be
    gone, or wait themselves for what this one will not do.
    """
    own = process_of(settings, os.environ)
    if own is None:
        yield
        return
    import jax

    if own.process == 0:
        print(
            f"Waiting for {own.processes} processes at {own.address}, at most "
            f"{settings.lost_seconds} s.",
            file=sys.stderr,
        )
    try:
        jax.distributed.initialize(
            coordinator_address=own.address,
            num_processes=own.processes,
            process_id=own.process,
            cluster_detection_method=None if own.address is None else "deactivate",
            initialization_timeout=settings.lost_seconds,
            heartbeat_timeout_seconds=settings.lost_seconds,
            shutdown_timeout_seconds=settings.lost_seconds,
        )
    except ValueError as error:
        raise UsageError(
            f"--coordinator {AUTO}: JAX knows no cluster here ({error}); name HOST:PORT"
        ) from error
    try:
        yield
    except (UsageError, Interrupted):
        raise
    except KeyboardInterrupt:
        _leave("interrupted", 130)
    except RunError as error:
        told = "\n".join([str(error), *getattr(error, "__notes__", [])])
        # A checkpoint that all write together fails too where one of them is gone.
        _leave(lost() if several() and CONNECTION.search(told) else told)
    except Exception as error:
        _leave(lost() if tells_of_loss(error) else traceback.format_exc())


def _leave(words: str, code: int = 1) -> None:
    import jax

    print(f"eggroll, process {jax.process_index()}: {words}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def tells_of_loss(error: BaseException) -> bool:
    """Whether an error, or what it comes from, says that another process is gone."""
    import jax

    while error.__cause__ is not None:
        error = error.__cause__
    return (
        several()
        and isinstance(error, jax.errors.JaxRuntimeError)
        and bool(LOSS.search(str(error)))
    )


def lost() -> str:
    """What is said then."""
    return (
        "another process of this run was lost; run the same commands again, on all hosts, to continue from "
        "the last checkpoint"
    )


def several() -> bool:
    """Whether other processes work on this run."""
    # Without JAX there are none, and then it is not imported for this.
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this is the process that writes the run folder."""
    if not several():
        return True
    import jax

    return jax.process_index() == 0


def say(sentence: str) -> None:
    """Tells it on stderr, once."""
    if first():
        print(sentence, file=sys.stderr)


def preempted(generation: int) -> bool:
    """Whether all processes are to stop at this generation, as one of them was asked to.

    Every process has to ask at every generation; JAX lets them all stop at the same.
    """
    from jax.experimental import multihost_utils

    return several() and bool(multihost_utils.reached_preemption_sync_point(generation))
