"""Types commands at random, over every command, and counts what comes of them.

    make fuzz        or: python tests/helpers/fuzz_commands.py --count 2000 --seed 1

- good: training, drawing or measuring would begin, with the values that were typed
- one sentence: refused with exit code 2, by one sentence or by the box about flags
- traceback: any other error, or a message of several lines
- hang: not answered after five seconds
- silent: it would begin with another value than was typed

The last three must be 0.
"""

import contextlib
import io
import json
import os
import random
import sys
import tempfile
import traceback
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin
from unittest import mock

from fuzz_files import KINDS, Hang, limited, main

from experiments.models import importing
from experiments.models.importing import ImportSettings
from experiments.optimizers import study
from experiments.optimizers.study import StudySettings
from experiments.rl import libraries
from experiments.run import cli, commands, doctor, hosts, replaying, report
from experiments.run.commands import EvalSettings, ExportSettings, SampleSettings
from experiments.run.drivers import FOLDERS, find_driver
from experiments.run.fields import Place, flag, members, places, to_json, value_at
from experiments.run.replaying import ReplaySettings
from experiments.supervised.config import PRESETS as SUPERVISED
from experiments.sweep import sweep
from experiments.sweep.sweep import SweepSettings

SECONDS = 5.0
PLAIN: Mapping[str, type] = {
    "study": StudySettings,
    "sweep": SweepSettings,
    "report": report.Settings,
    "eval": EvalSettings,
    "sample": SampleSettings,
    "export": ExportSettings,
    "replay": ReplaySettings,
    "import": ImportSettings,
}
COMMANDS = (*FOLDERS, *FOLDERS, *PLAIN, "sweep", "sweep", "doctor")
# Values of no setting, of some, or of another type.
ODD = (
    *("", " ", "x", "None", "null", "true", "0", "-1", "1", "2", "0.5", "-0.0", "1e-320", "1e400"),
    *(
        "nan",
        "inf",
        "-inf",
        str(2**31),
        str(2**63),
        "9" * 5000,
        "1_0",
        "٣",
        "1e3",
        "0x10",
        "[]",
        "{}",
    ),
    *(
        '{"size": 1e400}',
        '{"a": 1, "a": 2}',
        "[" * 3000,
        "größe",
        "a\nb",
        "a\0b",
        "\udcff",
        "\x1b[31m",
    ),
    *(
        "x" * 5000,
        "x/" * 3000,
        "--",
        "-x",
        "=",
        "a=b",
        ":",
        "x:",
        ":x",
        "x.py:",
        "full",
        "auto",
        "a:1",
    ),
)
# Those of the folder that commands are typed in, and others.
PATHS = (
    "run",
    "empty",
    "file",
    "missing",
    "closed",
    "file/x",
    "/dev/null",
    "/proc/x",
    "~",
    ".",
    "..",
)
NAMES = (
    *(
        "adam",
        "adm",
        "sgd",
        "lbfgs",
        "sm3",
        "polyak_sgd",
        "contrib.muon",
        "optim.lion",
        "optim.lyon",
    ),
    *(
        "optim.frugal",
        "optim.galore",
        "optim.kappa",
        "os.system",
        "CartPole-v1",
        "gymnasium:CartPole-v1",
    ),
    *(
        "gymnasium:x",
        "sums",
        "countdown",
        "chain_sum",
        "own.py:make",
        "own.py:mak",
        "broken.py:make",
    ),
    *(
        "missing.py:make",
        "questions.jsonl",
        "missing.jsonl",
        "huber:0.1",
        "l2",
        "lp",
        "topk:3",
        "exact",
    ),
    *(
        "exact=1,format=nan",
        "exact,exact",
        "transformer",
        "rwkv7",
        "Qwen/Qwen3",
        "hf:a/b",
        "minipile",
    ),
    *(
        "digits",
        "tiny",
        "lm",
        "cartpole",
        "laptop",
        "held_out_accuracy",
        "adamw",
        "lion",
        "embeddings",
    ),
)


class Reached(BaseException):
    """Where the work would begin, with these settings."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings


class Line(NamedTuple):
    """A command: its words, and what the last of each flag says; a flag without a word says None."""

    words: list[str]
    typed: dict[str, str | None]


# ------------------------------------------------------------ commands


def value_of(chance: random.Random, name: str, place: Place) -> str | None:
    """A word for a setting: one that is right, at a bound, or anything; None for a flag alone."""
    hints = members(place.hint)
    if bool in hints:
        return None
    if chance.random() < 0.3:
        return chance.choice((*ODD, *PATHS, *NAMES))
    hint = chance.choice(hints)
    if hint is type(None):
        return "None"
    if get_origin(hint) is Literal:
        return misspelt(chance, chance.choice(get_args(hint)))
    if place.range is not None:
        low, high = place.range.low, place.range.high
        near = [low, high, low + 1, high + 1, low - 1, (low + high) / 2, 2, 4, 64]
        value = chance.choice(near)
        return str(int(value)) if place.range.whole else str(value)
    return chance.choice(PATHS if hint is Path or "run" in name else NAMES)


def misspelt(chance: random.Random, word: str, share: float = 0.1) -> str:
    """A word, now and then with a letter more, less or changed."""
    if chance.random() > share or not word:
        return word
    at = chance.randrange(len(word))
    return chance.choice((word[:at] + word[at + 1 :], word[:at] + "x" + word[at:], word.upper()))


def line_of(chance: random.Random, command: str) -> Line:
    """A random command."""
    if command == "doctor":
        return Line([chance.choice((*PATHS, *ODD)) for _ in range(chance.randrange(3))], {})
    kind = find_driver(command).config if command in FOLDERS else PLAIN[command]
    known, words, typed = places(kind), [], dict[str, str | None]()
    if command in FOLDERS:
        preset = misspelt(chance, chance.choice(list(find_driver(command).presets)))
        words += ["--preset", preset]
        typed["preset"] = preset
    else:
        first = {"study": "tiny", "sweep": "sweep.yaml", "import": "smollm2"}.get(command, "run")
        words.append(chance.choice((*ODD, *PATHS)) if chance.random() < 0.2 else first)
    bare = ("model", "folder") if command == "import" else ("file", "run", "runs", "study")
    flags = [name for name in known if name not in bare]
    named = {flag(name): name for name in flags}
    for name in (chance.choice(flags) for _ in range(chance.randrange(5))):
        value = value_of(chance, name, known[name])
        typed_flag = misspelt(chance, flag(name), 0.05)
        no = value is None and chance.random() < 0.3
        typed_flag = typed_flag.replace("--", "--no-", 1) if no else typed_flag
        together = value is not None and chance.random() < 0.2
        added = [f"{typed_flag}={value}"] if together else [typed_flag]
        added += [] if value is None or together else [value]
        # One that is misspelt may be another.
        name = named.get(typed_flag, name)
        typed.pop(name, None)
        if chance.random() < 0.03:
            added = added[:-1]  # a word is lost
        else:
            typed[name] = "no" if no else value
        words += added
    return Line(words, typed)


def sweep_file(chance: random.Random) -> str:
    """A sweep's file, with something in it that may be wrong."""
    content: dict[str, Any] = {
        "driver": "rl",
        "preset": "cartpole",
        "fixed": {"generations": 20},
        "space": {"sigma": {"log-uniform": [0.01, 1.0]}, "rank": [1, "full"]},
        "samples": 4,
        "seeds": 2,
        "executor": {"at_once": 2, "together": 4},
        "halving": {"first": 2, "eta": 3},
        "top": 3,
    }
    odd = [*ODD, *NAMES, 0, -1, 10**12, 10**30, 2**31 - 1, 0.5, 1e308, float("nan"), float("inf")]
    odd += [
        None,
        True,
        [],
        {},
        [1],
        [0, 10**12],
        {"uniform": [-1e308, 1e308]},
        {"x": 1},
        {"grid": [[]]},
    ]
    for _ in range(chance.randrange(3)):
        at: Any = content
        while True:
            name = chance.choice(list(at) if isinstance(at, dict) else range(len(at)))
            if not isinstance(at[name], dict | list) or not at[name] or chance.random() < 0.3:
                break
            at = at[name]
        if isinstance(at, dict) and chance.random() < 0.2:
            at[misspelt(chance, name, 1.0)] = at.pop(name)
        else:
            at[name] = chance.choice(odd)
    text = json.dumps(content)
    if chance.random() < 0.1:
        cut = chance.randrange(len(text))
        text = text[:cut] + chance.choice(("", "\0", "[" * 3000, "2020-13-45", "9" * 5000))
    return text


# ------------------------------------------------------------ what is stubbed


def world() -> None:
    """The files that commands find, in the current folder."""
    for name in ("run/checkpoints/3", "empty", "closed"):
        Path(name).mkdir(parents=True)
    Path("file").write_text("text")
    Path("own.py").write_text("def make():\n    return 1\n")
    Path("broken.py").write_text("def make(:\n")
    Path("questions.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    run = SUPERVISED["digits"]
    Path("run/config.json").write_text(json.dumps({"driver": "supervised", **to_json(run)}))
    rows = [{"generation": g, "held_out_accuracy": 0.5, "timing": {"seconds": 1.0}} for g in (0, 1)]
    Path("run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("run/history.jsonl").write_text('{"generation": 0, "scores": [0.5, null]}\n')
    Path("closed").chmod(0)


LINES_OF = replaying.lines_of


def begins(settings: Any, *_: Any, **__: Any) -> Any:
    """In the place of what takes time."""
    raise Reached(settings)


@contextlib.contextmanager
def joined(settings: Any) -> Iterator[None]:
    """Joins nobody."""
    hosts.process_of(settings, {})
    yield


def history(run: Path, generation: int | None = None) -> Any:
    """Makes no update again."""
    raise Reached(LINES_OF(run, generation))


@contextlib.contextmanager
def found(path: Path, on_host: bool = False) -> Iterator[Any]:
    """Reads no checkpoint."""
    commands.check_run(path)
    raise Reached(None)
    yield


@contextlib.contextmanager
def stubbed() -> Iterator[None]:
    """Nothing is trained, drawn or measured within the block."""
    with contextlib.ExitStack() as stack:
        modules = {
            "experiments.run.train": {"train": begins},
            "experiments.run.compilation": {"keep_compiled_programs": lambda: None},
        }
        for name, content in modules.items():
            module: Any = types.ModuleType(name)
            vars(module).update(content)
            stack.enter_context(mock.patch.dict(sys.modules, {name: module}))
        patches: list[tuple[Any, str, Any]] = [
            *(
                (hosts, "joined", joined),
                (libraries, "names", lambda: ["CartPole-v1"]),
                (commands, "read_run", found),
                (commands, "_of_model", begins),
                (replaying, "lines_of", history),
            ),
            *((study, "study", begins), (doctor, "doctor", lambda: begins(None))),
            *(
                (report, "draw", begins),
                (sweep, "_whole", lambda settings, records: begins(settings)),
                (importing, "_write", begins),
            ),
            *(
                (sweep, "work", begins),
                (sweep, "print_status", lambda *_: None),
                (sweep, "standings", lambda records: []),
            ),
        ]
        for owner, name, stub in patches:
            stack.enter_context(mock.patch.object(owner, name, stub))
        yield


# ------------------------------------------------------------ what comes of it


def same(typed: str | None, value: Any, place: Place) -> bool:
    """Whether a setting has the value that was typed."""
    if typed is None or (typed == "no" and isinstance(value, bool)):
        return value is (typed is None)
    if value is None:
        return typed == "None"
    if isinstance(value, tuple):
        return bool(value) and same(typed, value[-1], place)
    if isinstance(value, Path):
        return bool(typed) and value == Path(typed)
    return bool(value == type(value)(typed))


def changed_in(line: Line, settings: Any) -> str | None:
    """The first setting that has another value than was typed."""
    known = places(type(settings))
    for name, typed in line.typed.items():
        if (name, typed) == ("task_settings", "None"):
            continue  # those of the preset
        value = value_at(settings, known[name])
        if not same(typed, value, known[name]):
            return f"{flag(name)}: {typed!r} was typed, and it is {value!r}"
    return None


def outcome(command: str, line: Line) -> tuple[str, str]:
    """What comes of a command, one of KINDS, and the words."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = None
    try:
        with limited(SECONDS), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main([command, *line.words])
    except Reached as reached:
        checked = command in FOLDERS or reached.settings.__class__ in PLAIN.values()
        problem = changed_in(line, reached.settings) if checked else None
        return ("silent", problem) if problem else ("good", "")
    except SystemExit as error:
        return ("good" if error.code == 0 else "one sentence"), err.getvalue()
    except Hang:
        return "hang", ""
    except BaseException:
        return "traceback", traceback.format_exc()
    told = err.getvalue()
    if code == 0:
        return "good", told
    right = told.startswith(f"eggroll {command}: ") and told.count("\n") == 1
    return ("one sentence" if right and code in (1, 2) else "traceback"), f"{code}: {told}"


def fuzz(count: int, seed: int, show: Callable[[str], None] = print) -> Counter[str]:
    """Types so many commands, and counts what comes of them; all that is wrong is shown."""
    chance = random.Random(seed)
    counts: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as top, stubbed():
        os.chdir(top)
        try:
            world()
            for number in range(count):
                command = chance.choice(COMMANDS)
                line = line_of(chance, command)
                if command == "sweep":
                    Path("sweep.yaml").write_text(sweep_file(chance), "utf-8", "surrogatepass")
                kind, words = outcome(command, line)
                counts[kind] += 1
                if KINDS.index(kind) > 1:
                    show(f"{number}: {kind}: eggroll {command} {line.words!r}"[:600])
                    show(words[-1500:])
        finally:
            os.chdir(before)
    return counts


if __name__ == "__main__":
    sys.exit(main(fuzz, 500))
