"""The file of a sweep, read and checked; every mistake is one sentence that names file, field and value."""

import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments.run.driver import Driver
from experiments.run.drivers import FOLDERS, find_driver
from experiments.run.errors import UsageError, suggestion
from experiments.run.fields import MOST_COUNT, Place, Range, changed, count, is_text, places
from experiments.run.settings import SEED
from experiments.sweep.fields import find, fit
from experiments.sweep.space import Axis, read_axis

GOALS = {"maximise": True, "minimise": False}
# The sweep decides these itself.
OWN = {"run_dir": "out", "preset": "preset", "seed": "seeds"}
# A sweep's runs are all planned before the first begins; of more than these the plan takes minutes.
MOST_RUNS = 100_000
# A run of a sweep is one process.
NEVER = ("overwrite", "accept_changes", "coordinator", "processes", "process", "lost_seconds")
EXECUTORS = ("processes", "slurm", "gke")
KEYS = (
    *("driver", "preset", "fixed", "space", "samples", "seeds", "sweep_seed"),
    *("metric", "out", "executor", "halving", "top"),
)


class Halving(NamedTuple):
    """Successive halving: `first` generations for all, then `eta` times as many for the best 1/eta."""

    first: int
    eta: int


@dataclass(frozen=True, kw_only=True)
class Executor:
    """Where the runs run, and how many at once."""

    kind: str = "processes"
    """processes (on this machine), slurm or gke (scripts are written)."""
    at_once: int = count(2)
    """Processes at a time."""
    together: int = count(8)
    """Runs in one program at most, where the driver can."""
    command: tuple[str, ...] = ("eggroll",)
    """slurm, gke: what the command line is called there."""
    sbatch: tuple[str, ...] = ()
    """slurm: further options of sbatch."""
    setup: str = ""
    """slurm: lines of the script before the command."""
    image: str = ""
    """gke: the container."""
    claim: str = ""
    """gke: the PersistentVolumeClaim that all pods share."""
    mount: str = "/sweep"
    """gke: where it is mounted; `out` lies in it unless it is absolute."""
    resources: tuple[tuple[str, str], ...] = ()
    """gke: limits of a pod, such as nvidia.com/gpu."""
    nodes: tuple[tuple[str, str], ...] = ()
    """gke: the node selector."""


class Spec(NamedTuple):
    """A sweep as its file describes it.

    Attributes:
        file: where it was read.
        driver: the command that is swept.
        base: its settings where nothing varies.
        axes: what varies.
        samples: draws of what is drawn.
        seeds: of the runs of every setting.
        sweep_seed: decides the draws.
        metric: name of a value in result.json.
        maximise: whether more of it is better.
        out: folder of the sweep.
        executor: where the runs run.
        halving: None for full length at once.
        top: settings in the table of the best.
    """

    file: Path
    driver: str
    base: Any
    axes: tuple[Axis, ...]
    samples: int
    seeds: tuple[int, ...]
    sweep_seed: int
    metric: str
    maximise: bool
    out: Path
    executor: Executor
    halving: Halving | None
    top: int

    @property
    def rungs(self) -> tuple[int, ...]:
        """Generations at which the best go on; the last is the full length. Empty without halving."""
        if self.halving is None:
            return ()
        rungs, last = [], self.base.limit
        rung = self.halving.first
        while rung < last:
            rungs.append(rung)
            rung *= self.halving.eta
        return (*rungs, last)


def read_spec(file: Path) -> Spec:
    """The sweep of a file.

    Raises:
        UsageError: for the first thing in it that cannot be right.
    """
    return _Reader(file, read_yaml(file)).spec()


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file, by the safe loader; a key that is there twice is an error.

    Raises:
        UsageError: if it cannot be read, or is something else.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses what the loader would drop silently."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for number, key in enumerate(keys):
                if key in keys[:number]:
                    raise yaml.MarkedYAMLError(
                        problem=f"{key!r} is there twice",
                        problem_mark=node.value[number][0].start_mark,
                    )
            return super().construct_mapping(node, deep)

    try:
        found = yaml.load(file.read_text("utf-8"), Loader)  # a safe one
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not a text in UTF-8") from error
    except (ValueError, RecursionError) as error:
        # A date that there is not, a number of too many digits, lists within lists without end.
        raise UsageError(f"{file} is not YAML that can be used: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(f"{file}{where} is not YAML that can be used: {problem}") from error
    if not isinstance(found, dict):
        raise UsageError(
            f"{file} holds {found!r}: it has to begin with names such as driver and space"
        )
    return found


class _Reader:
    """Takes the mapping of a file apart, with the file's name in every complaint."""

    def __init__(self, file: Path, content: Mapping[str, Any]) -> None:
        self.file, self.content = file, content

    def wrong(self, field: str, problem: object) -> UsageError:
        return UsageError(f"{self.file}: {field}: {problem}")

    def spec(self) -> Spec:
        self.names("", self.content, KEYS)
        driver = self.driver()
        known = {n: at for n, at in places(driver.config).items() if n not in NEVER}
        base = self.base(driver, known)
        axes = self.axes(known)
        metric, maximise = self.metric(driver)
        samples, seeds = self.count("samples", 1), self.seeds()
        self.runs(axes, samples, len(seeds))
        if "samples" in self.content and all(axis.kind == "grid" for axis in axes):
            raise self.wrong("samples", f"{samples}: nothing in the space is drawn; leave it out")
        halving = self.halving(base, axes)
        return Spec(
            self.file, driver.name, base, axes, samples, seeds,
            self.count("sweep_seed", 0, least=0), metric, maximise, self.out(), self.executor(),
            halving, self.count("top", 5),
        )  # fmt: skip

    def runs(self, axes: tuple[Axis, ...], samples: int, seeds: int) -> None:
        """Refuses a sweep of more runs than can be planned."""
        points = math.prod(len(axis.values) for axis in axes if axis.kind == "grid")
        if any(axis.kind != "grid" for axis in axes):
            points *= samples
        if points * seeds > MOST_RUNS:
            many = f"{points:,} settings with {seeds:,} seeds each are {points * seeds:,} runs"
            raise UsageError(f"{self.file}: {many}; choose at most {MOST_RUNS:,} in all")

    def names(self, prefix: str, found: Mapping[str, Any], known: Any) -> None:
        for name in found:
            if name not in known:
                near = suggestion(str(name), known) or f"; there are {', '.join(known)}"
                raise UsageError(f"{self.file}: there is no field {prefix}{name}{near}")

    def driver(self) -> Driver:
        found = self.content.get("driver")
        if not isinstance(found, str) or found not in FOLDERS:
            near = suggestion(str(found), FOLDERS) or f"; there are {', '.join(FOLDERS)}"
            raise self.wrong("driver", f"{found!r} is no driver{near}")
        return find_driver(found)

    def base(self, driver: Driver, known: Mapping[str, Place]) -> Any:
        presets = driver.presets
        preset = self.content.get("preset", next(iter(presets)))
        if not isinstance(preset, str) or preset not in presets:
            near = suggestion(str(preset), presets) or f"; there are {', '.join(presets)}"
            raise self.wrong("preset", f"{preset!r} is no preset{near}")
        base = presets[preset]
        for name, value in self.mapping("fixed").items():
            field = self.field("fixed", name, known)
            base = self.put(base, field, value, known, f"fixed.{name}")
        return base

    def put(self, base: Any, field: str, value: Any, known: Mapping[str, Place], where: str) -> Any:
        try:
            return changed(base, {field: fit(value, known[field].hint)})
        except ValueError as error:
            raise self.wrong(where, f"{value!r}: {error}") from error

    def field(self, where: str, name: object, known: Mapping[str, Place]) -> str:
        try:
            field = find(name, known)
        except ValueError as error:
            raise self.wrong(where, error) from error
        if field in OWN:
            raise self.wrong(f"{where}.{name}", f"the sweep sets it: use {OWN[field]} of the sweep")
        return field

    def axes(self, known: Mapping[str, Place]) -> tuple[Axis, ...]:
        space, fixed = self.mapping("space"), self.mapping("fixed")
        axes: list[Axis] = []
        for name, found in space.items():
            field = self.field("space", name, known)
            if field in {str(one).replace("-", "_") for one in fixed}:
                raise self.wrong(f"space.{name}", "it is fixed too: choose one of the two")
            if field in {axis.field for axis in axes}:
                raise self.wrong(f"space.{name}", "it is there twice, once with - and once with _")
            try:
                axes.append(read_axis(field, found, known[field].hint, known[field].range))
            except ValueError as error:
                raise self.wrong(f"space.{name}", error) from error
        return tuple(axes)

    def mapping(self, name: str) -> Mapping[str, Any]:
        found = self.content.get(name) or {}
        if not isinstance(found, Mapping):
            raise self.wrong(
                name, f"{found!r}: choose settings with their values, as `name: value`"
            )
        return found

    def count(
        self,
        name: str,
        default: int,
        least: int = 1,
        of: Any = None,
        prefix: str = "",
        most: int = MOST_COUNT,
    ) -> int:
        found = (self.content if of is None else of).get(name, default)
        right = Range(least, most, whole=True)
        number = isinstance(found, int) and not isinstance(found, bool)
        if problem := right.problem(found) if number else f"choose {right.words}":
            raise self.wrong(prefix + name, f"{found!r}: {problem}")
        return int(found)

    def seeds(self) -> tuple[int, ...]:
        found = self.content.get("seeds", 1)
        if isinstance(found, list):
            fine = [type(x) is int and 0 <= x <= SEED for x in found]
            if not found or not all(fine) or len(set(found)) < len(found):
                right = "choose different whole numbers from 0, or how many seeds from 0 on"
                raise self.wrong("seeds", f"{found!r}: {right}")
            return tuple(found)
        many = self.count("seeds", 1)
        if many > MOST_RUNS:
            raise self.wrong("seeds", f"{many}: choose at most {MOST_RUNS}")
        return tuple(range(many))

    def metric(self, driver: Driver) -> tuple[str, bool]:
        found = self.content.get("metric", {})
        found = {"name": found} if isinstance(found, str) else found
        if not isinstance(found, Mapping):
            raise self.wrong("metric", f"{found!r}: choose the name of a value in result.json")
        self.names("metric.", found, ("name", "goal"))
        usual, maximise = driver.figure.name, driver.figure.better == "larger"
        name, goal = found.get("name", usual), found.get("goal")
        if name != usual:
            result = driver.result_names
            if str(name).partition(".")[0] not in result:
                near = suggestion(str(name), result) or f"; there are {', '.join(result)}"
                raise self.wrong(
                    "metric.name", f"{name!r} is not in result.json of {driver.name}{near}"
                )
            if goal is None:
                raise self.wrong("metric.goal", f"say whether to maximise or minimise {name}")
        if goal is not None and (not isinstance(goal, str) or goal not in GOALS):
            near = suggestion(str(goal), GOALS) or "; choose maximise or minimise"
            raise self.wrong("metric.goal", f"{goal!r} is no goal{near}")
        return name, maximise if goal is None else GOALS[goal]

    def out(self) -> Path:
        found = self.content.get("out", f"runs/{self.file.stem}")
        if not isinstance(found, str) or not found or not is_text(found):
            raise self.wrong("out", f"{found!r}: choose a folder")
        return Path(found)

    def executor(self) -> Executor:
        found = self.content.get("executor", {})
        found = {"kind": found} if isinstance(found, str) else found
        if not isinstance(found, Mapping):
            raise self.wrong("executor", f"{found!r}: choose {', '.join(EXECUTORS)}")
        hints = typing.get_type_hints(Executor)
        self.names("executor.", found, hints)
        kind = found.get("kind", "processes")
        if kind not in EXECUTORS:
            near = suggestion(str(kind), EXECUTORS) or f"; there are {', '.join(EXECUTORS)}"
            raise self.wrong("executor.kind", f"{kind!r} is no executor{near}")
        values: dict[str, Any] = {}
        for name, value in found.items():
            if isinstance(value, Mapping):
                value = [[str(a), str(b)] for a, b in value.items()]
            if name == "command" and isinstance(value, str):
                value = value.split()
            try:
                values[name] = fit(value, hints[name])
            except ValueError as error:
                raise self.wrong(f"executor.{name}", f"{value!r}: {error}") from error
        for name in ("at_once", "together"):
            self.count(name, 1, of=found, prefix="executor.")
        for name in ("image", "claim") if kind == "gke" else ():
            if not values.get(name):
                what = (
                    "container image" if name == "image" else "PersistentVolumeClaim all pods share"
                )
                raise self.wrong(f"executor.{name}", f"name the {what}")
        return Executor(**values)

    def halving(self, base: Any, axes: tuple[Axis, ...]) -> Halving | None:
        if "halving" not in self.content:
            return None
        found = self.mapping("halving")
        self.names("halving.", found, Halving._fields)
        first = self.count("first", 0, of=found, prefix="halving.")
        eta = self.count("eta", 3, least=2, of=found, prefix="halving.")
        if {"generations", "max_generations"} & {axis.field for axis in axes}:
            raise self.wrong(
                "halving", "runs are compared at equal length: do not vary generations"
            )
        if base.generations is None:
            raise self.wrong("halving", "say how long the best train: set fixed.generations")
        if first >= base.generations:
            right = f"choose fewer generations than fixed.generations, {base.generations}"
            raise self.wrong("halving.first", f"{first}: {right}")
        return Halving(first, eta)
