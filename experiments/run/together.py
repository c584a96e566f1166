"""Several runs in one program: they differ in numbers that the program takes as arrays.

Every run has its own folder, rows and checkpoints, as if it were alone, and may be continued alone. Only the
generations are computed for all at once, by `vmap`: a program is compiled once and started once a generation,
whatever the number of runs. A run that has ended stays in the program, unread, until all have.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.run.driver import Driver
from experiments.run.errors import RunError, UsageError
from experiments.run.fields import value_at
from experiments.run.folder import open_run_folder
from experiments.run.learners import Rates
from experiments.run.loop import Record, interrupted
from experiments.run.program import ProgramTrainer
from experiments.run.progress import Progress
from experiments.run.result import Result
from experiments.run.settings import RunSettings, shared_numbers
from experiments.run.stopping import stop_requests
from experiments.run.stopwatch import Stopwatch
from experiments.run.trainer import Carry, Outcome, Trainer


def run_together(
    driver: Driver,
    configs: Sequence[RunSettings],
    finish: Callable[[Trainer[Any], RunSettings, Path, Outcome, Stopwatch], Result],
    watch: Stopwatch,
) -> list[Result | Exception]:
    """Run all of them in one program, each from where its folder says that it stands.

    Args:
        driver: whose runs they are.
        configs: settings whose `together` is the same.
        finish: fills the folder of a run that has ended, and gives its result.
        watch: of the process.

    Returns:
        For every run its result; or the UsageError or RunError that stopped it alone.

    Raises:
        UsageError: for settings that do not belong into one program.
        Interrupted: after SIGTERM, SIGHUP or Ctrl-C, with everything saved.
    """
    for config in configs:
        config.check()
    if len({config.together for config in configs}) != 1 or configs[0].together is None:
        raise UsageError("these runs differ in more than one program can take as numbers")
    # The runs are mapped, not their members divided.
    trainer = driver.load()(configs[0].on_one_device())
    assert isinstance(trainer, ProgramTrainer), "only such settings have a `together`"
    many = _Programs(configs, trainer)
    out: list[Any] = [None] * len(configs)
    with contextlib.ExitStack() as stack:
        records: dict[int, Record] = {}
        for i, config in enumerate(configs):
            try:
                folder = stack.enter_context(open_run_folder(driver.name, config))
                start = functools.partial(many.start, i)
                record = Record(driver, trainer, config, start, folder, watch)
                records[i] = stack.enter_context(record)
            except (UsageError, RunError) as error:
                out[i] = error
        watch.finish("start")
        for i, ended in _loop(many, configs, records).items():
            out[i] = ended
        watch.finish("training")
        for i, ended in enumerate(out):
            if isinstance(ended, Outcome):
                out[i] = finish(trainer, configs[i], configs[i].run_dir, ended, watch)
    return out


def _loop(
    many: "_Programs", configs: Sequence[RunSettings], records: dict[int, Record]
) -> dict[int, Outcome | RunError]:
    """Generations of all until each has ended; by number of the run."""
    ended: dict[int, Outcome | RunError] = {}
    if not records:
        return ended
    # Of a run without a record the program trains its first state, which nobody reads.
    states = many.stack(
        [records[i].state if i in records else many.start(i) for i in range(len(configs))]
    )
    for record in records.values():
        del record.state  # their memory is the next generation's
    alive = dict(records)
    with stop_requests(begun=False) as stop, Progress(max(c.limit for c in configs)) as progress:
        progress.update(min(r.generation for r in alive.values()), "compiling")
        while True:
            began = time.perf_counter()
            measured: Any = None
            if any(record.due for record in alive.values()):
                measured = many.slices(jax.device_get(many.measure(states)))
            fresh = functools.cache(functools.partial(_fresh, many, states))
            over = [
                i
                for i, r in alive.items()
                if r.over(measured[i] if r.due else None, functools.partial(_of_run, fresh, i))
            ]
            if over:
                parts = many.split(states)
                for i in over:
                    record = alive.pop(i)
                    record.save(parts[i])
                    record.wait()
                    ended[i] = record.outcome(parts[i])
            if stop.reason or not alive:
                break
            states, rows = many.generation(states)
            rows = many.slices(jax.device_get(dict(rows)))
            stop.begin()
            for i, record in alive.items():
                record.add(rows[i], began, together=len(configs))
            first = next(iter(alive.values()))
            progress.update(first.generation, f"{len(alive)} runs, the first: {first.told}")
            if any(record.save_due or record.hopeless for record in alive.values()):
                parts = many.split(states)
                for i, record in list(alive.items()):
                    record.save(parts[i])
                    if hopeless := record.hopeless:
                        ended[i] = hopeless
                        del alive[i]
        if alive:
            _save_all(alive, many.split(states))
            raise interrupted(stop.reason, max(r.generation for r in alive.values()))
    return ended


def _save_all(alive: Mapping[int, Record], parts: Sequence[Any]) -> None:
    """Saves every run, also where that of another fails.

    Raises:
        RunError: the first, with the others as notes.
    """
    problems: list[RunError] = []
    steps: list[Callable[[], None]] = [
        functools.partial(record.save, parts[i]) for i, record in alive.items()
    ]
    for step in steps + [record.wait for record in alive.values()]:
        try:
            step()
        except RunError as error:
            problems.append(error)
    if problems:
        for other in problems[1:]:
            problems[0].add_note(str(other))
        raise problems[0]


def _fresh(many: "_Programs", states: Carry) -> list[dict[str, Any]]:
    """The driver's figure of data that decided nothing before, by run."""
    return many.slices(jax.device_get(many.confirm(states)))


def _of_run(figures: Callable[[], list[dict[str, Any]]], i: int) -> dict[str, Any]:
    return figures()[i]


class _Programs:
    """The functions of all runs at once; every leaf of a state or a row has a leading axis [runs]."""

    def __init__(self, configs: Sequence[RunSettings], trainer: ProgramTrainer[Any]) -> None:
        first, self._runs = configs[0], len(configs)
        numbers = shared_numbers(first)
        # A decay of 1 is a number of the program itself: without a schedule the state is another.
        traced = {
            name: jnp.array([value_at(c, place) for c in configs], jnp.float32)
            for name, place in numbers.items()
            if value_at(first, place) != 1 or not name.endswith("_decay")
        }
        fixed = dict.fromkeys(set(Rates._fields) - traced.keys(), 1.0)
        self._seeds = jnp.array([c.seed for c in configs], jnp.int32)
        self._traced = traced

        def every(use: Callable[..., Any]) -> Callable[..., Any]:
            """`use(program, seed, *state)` of all runs."""

            def one(seed: Any, rates: Mapping[str, Any], *state: Any) -> Any:
                own = Rates(**{**fixed, **rates})
                return use(trainer.program(first, rates=own), seed, *state)

            return jax.vmap(one)

        start = jax.jit(every(lambda one, seed: one.start(seed)))
        measure = jax.jit(every(lambda one, seed, state: one.measure(state)))
        confirm = jax.jit(every(lambda one, seed, state: one.confirm(state)))
        generation = jax.jit(
            every(lambda one, seed, state: one.generation(state)), donate_argnums=2
        )
        self.measure = lambda states: measure(self._seeds, traced, states)
        self.confirm = lambda states: confirm(self._seeds, traced, states)
        self.generation = lambda states: generation(self._seeds, traced, states)
        self.split = jax.jit(self.slices)
        # At once, and not when it is asked for, which may be inside a trace.
        self._first: list[Any] | None = self.slices(start(self._seeds, traced))

    def start(self, i: int) -> Any:
        """The state of run i before generation 0; not after :meth:`stack`."""
        assert self._first is not None
        return self._first[i]

    def slices(self, tree: Any) -> list[Any]:
        """A tree for each run."""
        return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(self._runs)]

    def stack(self, trees: Sequence[Any]) -> Any:
        """The opposite of `slices`; the first states, which are among the trees, are let go."""
        self._first = None
        return jax.jit(lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees))(*trees)
