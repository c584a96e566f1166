"""The runs of a sweep, each with the id of its settings, and which of them are one program."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.run.errors import UsageError
from experiments.run.fields import changed, flat, free_keys, places, to_json
from experiments.sweep.space import points
from experiments.sweep.spec import Spec


class Run(NamedTuple):
    """One run.

    Attributes:
        number: its place in the sweep.
        setting: number of the point of the space; runs that differ in their seed alone share it.
        values: what varies, by field.
        seed: its seed.
        id: a hash of its settings, the name of its folder.
        config: all of its settings.
    """

    number: int
    setting: int
    values: Mapping[str, Any]
    seed: int
    id: str
    config: Any


class Plan(NamedTuple):
    """All runs; `jobs` has the numbers of those that one process trains, in one program if many."""

    runs: tuple[Run, ...]
    jobs: tuple[tuple[int, ...], ...]


def make_plan(spec: Spec) -> Plan:
    """The runs of a sweep, a function of its file alone; settings that were drawn twice are there once.

    Raises:
        UsageError: for settings that the driver refuses.
    """
    runs: list[Run] = []
    known: set[str] = set()
    setting = 0
    for values in points(spec.axes, spec.samples, spec.sweep_seed):
        config = spec.base
        for field, value in values.items():
            config = changed(config, {field: value})
        new = False
        for seed in spec.seeds:
            one = changed(config, seed=seed)
            name = run_id(spec, one)
            if name in known:
                continue
            known.add(name)
            one = changed(one, run_dir=spec.out / "runs" / name)
            _check(spec, one, values)
            runs.append(Run(len(runs), setting, values, seed, name, one))
            new = True
        setting += new
    return Plan(tuple(runs), _jobs(runs, spec.executor.together))


def run_id(spec: Spec, config: Any) -> str:
    """Ten hexadecimal digits that name the settings: where, how long and what is logged do not count,
    unless it varies."""
    varied = {places(type(config))[axis.field].key for axis in spec.axes}
    left_out = free_keys(type(config)) - varied
    own = {name: value for name, value in flat(to_json(config)) if name not in left_out}
    text = json.dumps({"driver": spec.driver, **own}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _check(spec: Spec, config: Any, values: Mapping[str, Any]) -> None:
    try:
        config.check()
    except UsageError as error:
        point = ", ".join(f"{field} {value}" for field, value in values.items())
        where = f"at {point}: " if point else ""
        raise UsageError(f"{spec.file}: {where}{error}") from error


def _jobs(runs: list[Run], most: int) -> tuple[tuple[int, ...], ...]:
    """Runs of one program side by side, `most` at a time; the others alone; in the order of their first."""
    jobs: list[list[int]] = []
    open_jobs: dict[str, list[int]] = {}
    for run in runs:
        program = run.config.together
        job = open_jobs.get(program) if program is not None else None
        if job is None or len(job) == most:
            job = []
            jobs.append(job)
        if program is not None:
            open_jobs[program] = job
        job.append(run.number)
    return tuple(map(tuple, jobs))
