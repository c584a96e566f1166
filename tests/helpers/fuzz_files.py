"""Damages the files that runs and sweeps read back, at random, and counts what comes of it.

    make fuzz        or: python tests/helpers/fuzz_files.py --count 2000 --seed 1

- good: read as if nothing were, and with the bits that were saved, or other values of the right kind: a digit
  of a text has no digest
- one sentence: refused, or a damaged checkpoint was told and the one before gave its own bits
- traceback: any other error, or a message of several lines
- hang: not done after ten seconds
- silent: a state with other bits; a setting that decides results and is not compared; rows or figures of
  another number or kind than those that were written

The last three must be 0.
"""

import argparse
import contextlib
import json
import math
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.run import compared, report
from experiments.run.axes import AXES
from experiments.run.checkpoints import Checkpoints
from experiments.run.errors import RunError, UsageError
from experiments.run.fields import changed, differences, from_json, to_json
from experiments.run.folder import open_run_folder, read_config, write_json
from experiments.run.history import HistoryFile, read_history
from experiments.run.metrics import MetricsFile, expect_names
from experiments.run.samples import add_sample
from experiments.supervised.config import PRESETS, Config
from experiments.sweep.plan import make_plan
from experiments.sweep.records import Records
from experiments.sweep.spec import read_spec

KINDS = ("good", "one sentence", "traceback", "hang", "silent")
SECONDS = 10.0
METRIC = "held_out_accuracy"
GENERATIONS = 6
# JSON values in the place of others.
ODD: list[Any] = [
    *(
        None,
        True,
        "x",
        "",
        [],
        {},
        [1],
        [None, "x"],
        {"a": []},
        -1,
        0,
        0.5,
        10**400,
        2**64,
        -(2**70),
    ),
    *(float("nan"), float("inf"), "\ud800", "\0", [[1.0]]),
]


class Hang(BaseException):
    """It takes too long."""


class Silent(Exception):
    """Something else was read than was written, and nobody said so."""


class Mutation(NamedTuple):
    """A damaged file: which, by what, and what it then holds; None where it is gone."""

    file: Path
    how: str
    content: bytes | None


def mutated(chance: random.Random, file: Path, others: list[Path]) -> Mutation:
    """One file of a folder, damaged."""
    content = file.read_bytes()
    at = chance.randrange(len(content) + 1)
    end = min(len(content), at + 1 + chance.randrange(16))
    foreign = chance.choice(others).read_bytes()
    flipped = bytearray(content or b"\0")
    flipped[at % len(flipped)] ^= 1 << chance.randrange(8)
    ways: dict[str, bytes | None] = {
        "a bit": bytes(flipped),
        "bytes": content[:at] + chance.randbytes(end - at) + content[end:],
        "more bytes": content[:at] + chance.randbytes(1 + chance.randrange(8)) + content[at:],
        "fewer bytes": content[:at] + content[end:],
        "a piece twice": content[:end] + content[at:],
        "truncated": content[:at],
        "emptied": b"",
        "a foreign file": foreign,
        "a foreign piece": content[:at] + foreign[at:],
        "removed": None,
    }
    # Damage that is still JSON gets further.
    if file.suffix in (".json", ".jsonl") and "checkpoints" not in file.parts:
        for number in range(10):
            ways[f"a JSON value, {number}"] = _other_value(chance, content)
    how = chance.choice(list(ways))
    return Mutation(file, how, ways[how])


def _other_value(chance: random.Random, content: bytes) -> bytes:
    lines = content.split(b"\n")
    several = len(lines) > 1 and lines[0].startswith(b"{") and lines[0].endswith(b"}")
    chosen = chance.randrange(max(len(lines) - 1, 1)) if several else 0
    root = json.loads(lines[chosen] if several else content)
    at = root
    while True:
        name = chance.choice(list(at) if isinstance(at, dict) else range(len(at))) if at else None
        if name is None:
            break
        if isinstance(at[name], dict | list) and at[name] and chance.random() < 0.7:
            at = at[name]
            continue
        if chance.random() < 0.3:
            del at[name]
        else:
            at[name] = chance.choice(ODD)
        break
    text = json.dumps(root).encode()
    return b"\n".join([*lines[:chosen], text, *lines[chosen + 1 :]]) if several else text


# ------------------------------------------------------------ what is read


def start() -> Any:
    """The state that is saved."""
    return {
        "w": jnp.zeros((64, 64)),
        "b": jnp.zeros(8, jnp.bfloat16),
        "seen": jnp.int32(0),
        "empty": jnp.zeros((2, 0)),
    }


def state_at(generation: int) -> Any:
    """What it is after so many generations."""
    key = jax.random.key(generation)
    return {
        **start(),
        "w": jax.random.normal(key, (64, 64)),
        "b": jnp.full(8, generation, jnp.bfloat16),
        "seen": jnp.int32(generation),
    }


def config_of(folder: Path) -> Config:
    """The settings of the run."""
    return changed(PRESETS["digits"], run_dir=folder, generations=GENERATIONS)


def records_of(folder: Path) -> Records:
    """The sweep beside the run, whose first run is that run."""
    spec = read_spec(folder / "sweep.yaml")
    found = Records(spec, make_plan(spec))
    run = found.plan.runs[0]._replace(config=config_of(folder))
    return Records(spec, found.plan._replace(runs=[run, *found.plan.runs[1:]]))


def write(folder: Path) -> None:
    """A run and the records of a sweep, whole."""
    with Checkpoints(folder / "checkpoints") as checkpoints:
        for generation in (GENERATIONS - 1, GENERATIONS):
            checkpoints.save(generation, state_at(generation), {"steps": 10 * generation})
    write_json(folder / "config.json", {"driver": "supervised", **to_json(config_of(folder))})
    with MetricsFile(folder / "metrics.jsonl") as metrics:
        for g in range(GENERATIONS):
            timing = {"seconds": 0.25, "since_start": 0.25 * g}
            score = None if g % 2 else g / 8
            metrics.write({"generation": g, "fitness_mean": -0.5, METRIC: score, "timing": timing})
    with HistoryFile(folder / "history.jsonl") as history:
        for g in range(GENERATIONS):
            history.write(g, np.arange(4.0) / 3, {"update_norm": 0.5})
    write_json(
        folder / "result.json",
        {METRIC: 0.75, f"{METRIC}_before": 0.0, "by_seed": None, "generations": GENERATIONS}
        | {"sentence": "Learned.", "timing": {"training": 1.5}},
    )
    for g in (0, 3):
        add_sample(folder / "samples.txt", g, f"text {g}\nand more")
    spec = {
        "driver": "supervised",
        "fixed": {"generations": GENERATIONS},
        "space": {"learning_rate": [0.1, 0.2, 0.3, 0.4]},
        "halving": {"first": 2, "eta": 2},
        "out": str(folder / "sweep"),
    }
    (folder / "sweep.yaml").write_text(json.dumps(spec))
    records = records_of(folder)
    for name, content in (("rungs", {"2": 0.25, "4": None}), ("failed", {"error": "it broke"})):
        (folder / "sweep" / name).mkdir(parents=True)
        write_json(folder / "sweep" / name / f"{records.plan.runs[0].id}.json", content)


def read_checkpoints(folder: Path, read_only: bool) -> list[str]:
    """Restores; what was said."""
    told: list[str] = []
    with Checkpoints(folder / "checkpoints", read_only) as checkpoints:
        found = checkpoints.restore(start, told.append)
    if found is None:
        raise Silent("no checkpoint was found")
    generation, state, totals = found
    if generation != GENERATIONS and not told:
        raise Silent(f"generation {generation} without a word")
    if totals != {"steps": 10 * generation}:
        raise Silent(f"totals {totals}")
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(state_at(generation)), strict=True):
        if np.asarray(x).tobytes() != np.asarray(y).tobytes():
            raise Silent("other bits")
    if told and not read_only and not (folder / "damaged" / str(GENERATIONS)).is_dir():
        raise Silent("it was not set aside")
    return told


def read_settings(folder: Path) -> list[str]:
    """As evaluation and export do, then as the same command again."""
    content = read_config(folder)
    content.pop("driver", None)
    config = from_json(Config, content)
    config.check()
    right = config_of(folder)
    other = list(differences(to_json(right), to_json(config), Config, same_bits=False))
    with open_run_folder("supervised", right):
        if other:
            raise Silent(f"{other} would be ignored")
    return []


def read_rows(folder: Path) -> list[str]:
    """As a run that goes on."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().count(b"\n") if path.exists() else 0
    with MetricsFile(path, GENERATIONS) as metrics:
        expect_names(path, metrics.rows, [METRIC])
    if len(metrics.rows) != GENERATIONS or lines < GENERATIONS:
        raise Silent(f"{len(metrics.rows)} rows of {lines} lines")
    return []


def read_lines(folder: Path) -> list[str]:
    """The history, as a run that goes on."""
    path = folder / "history.jsonl"
    with HistoryFile(path, GENERATIONS):
        pass
    lines = read_history(path)
    numbers = [line.generation for line in lines]
    if numbers != sorted(set(numbers)) or len({line.scores.shape[0] for line in lines}) > 1:
        raise Silent(f"generations {numbers}")
    return []


def draw(folder: Path, x: str) -> list[str]:
    """As `eggroll report`, but for the picture."""
    name = report.held_out_name(folder)
    axis = AXES[x]
    run = compared.read_run(folder, axis, name)
    page = report.page_of(compared.group([run]), axis, name, report.Picture(b"", "", []))
    whole = run.x.dtype == run.y.dtype == float and np.isfinite(run.x).all()
    if not whole or run.y.ndim != 2 or len(run.x) != len(run.y) or "<table>" not in page:
        raise Silent(f"a curve of {run.x.shape} and {run.y.shape}")
    return []


def read_records(folder: Path) -> list[str]:
    """As a sweep."""
    records = records_of(folder)
    run = records.plan.runs[0]
    standing = records.standing(run)
    for value in (standing.metric, records.value(run), records.rung_value(run, 2)[1]):
        if not (value is None or (type(value) in (int, float) and math.isfinite(value))):
            raise Silent(f"a metric of {value!r}")
    if not isinstance(records.failure(run), str | None):
        raise Silent("a failure that is no text")
    records.note_rung(run, 4)
    return []


def read_samples(folder: Path) -> list[str]:
    """As a run that adds one."""
    add_sample(folder / "samples.txt", GENERATIONS, "the end")
    if not (folder / "samples.txt").read_text("utf-8").endswith("6 updates\n    the end\n"):
        raise Silent("the sample was not added")
    return []


def readers_of(file: Path, chance: random.Random) -> list[Callable[[Path], list[str]]]:
    """All that read a file; those that write come last."""
    if "checkpoints" in file.parts:
        read_only = chance.random() < 0.7
        return [lambda folder: read_checkpoints(folder, read_only)]
    drawn = [lambda folder, x=x: draw(folder, x) for x in ("generation", "seconds")]
    if file.name == "config.json":
        return [*drawn, read_settings]
    if file.name == "samples.txt":
        return [read_samples]
    if file.name == "history.jsonl":
        return [read_lines]
    if file.parent.name in ("rungs", "failed"):
        return [read_records]
    return [*drawn, read_records, read_rows]


# ------------------------------------------------------------ what comes of it


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises Hang after so long."""

    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(read: Callable[[Path], list[str]], folder: Path) -> tuple[str, str]:
    """What comes of reading, one of KINDS, and the words."""
    try:
        with limited(SECONDS):
            told = read(folder)
    except (RunError, UsageError) as error:
        told = [str(error)]
    except Silent as error:
        return "silent", str(error)
    except Hang:
        return "hang", ""
    except Exception:
        return "traceback", traceback.format_exc()
    if any("\n" in one or len(one) > 1000 for one in told):
        return "traceback", "\n".join(told)
    return ("one sentence" if told else "good"), " ".join(told)


def fuzz(count: int, seed: int, show: Callable[[str], None] = print) -> Counter[str]:
    """Damages files so often, and counts what comes of it; all that is wrong is shown."""
    chance = random.Random(seed)
    counts: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    with tempfile.TemporaryDirectory() as top, warnings.catch_warnings():
        # Orbax leaves things unawaited where a file is damaged.
        warnings.simplefilter("ignore")
        whole, folder = Path(top) / "whole", Path(top) / "run"
        write(folder)
        folder.rename(whole)
        files = [path for path in sorted(whole.rglob("*")) if path.is_file()]
        newest = [p for p in files if whole / "checkpoints" / str(GENERATIONS) in p.parents]
        data = [p for p in newest if p.parent.name == "d"]
        texts = [p for p in files if "checkpoints" not in p.parts and p.name != "sweep.yaml"]
        texts = [p for p in texts if p.name != ".lock"]
        for number in range(count):
            file = chance.choice((texts, newest, texts, data)[number % 4])
            shutil.copytree(whole, folder)
            one = mutated(chance, file, files)
            name = file.relative_to(whole)
            if one.content is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(one.content)
            found = [outcome(read, folder) for read in readers_of(name, chance)]
            worst = max(found, key=lambda kind: KINDS.index(kind[0]))
            counts[worst[0]] += 1
            if KINDS.index(worst[0]) > 1:
                show(f"{number}: {name}, {one.how}: {worst[0]}\n{worst[1]}")
            shutil.rmtree(folder)
    return counts


def main(fuzz: Callable[[int, int], Counter[str]], count: int) -> int:
    """Runs a fuzzer by its command line and prints the counts; the exit code is 0 where the last three are."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts = fuzz(args.count, args.seed)
    print(", ".join(f"{kind} {counts[kind]}" for kind in KINDS))
    return int(any(counts[kind] for kind in KINDS[2:]))


if __name__ == "__main__":
    sys.exit(main(fuzz, 1000))
