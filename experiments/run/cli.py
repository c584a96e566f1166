"""The command line: `eggroll rl --preset cartpole`, `eggroll report RUN`, `eggroll --help`.

Anything heavy is imported by the command that needs it, so that help and mistakes are instant.
"""

import functools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from experiments.run import stopping
from experiments.run.errors import RUN_ME_AGAIN, Interrupted, RunError, UsageError, suggestion
from experiments.run.fields import changed, flag, places, value_at

STARTED = time.perf_counter()
Settings = TypeVar("Settings")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after `eggroll`; those of the process by default.

    Returns:
        The exit code: 0; 1 where a run could not go on, or could not be saved; 2 for a mistake in the
        command; 75 where a command that trains was stopped by SIGTERM, SIGHUP or Ctrl-C with everything
        saved, so that the same command again continues; 130 after a second Ctrl-C, or of another command
        after the first.
    """
    # Before NumPy is imported. XLA calls OpenBLAS (for SVD, QR) from threads of its own, and with more of
    # OpenBLAS's they can come to wait for each other, for seconds or for ever.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    name, *args = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if argv is None:
        sys.unraisablehook = _unraisable
    if argv is None and name in COMMANDS and COMMANDS[name].trains:
        # Of a process that is nothing but this command, until it ends.
        stopping.from_the_start()
        try:
            return _run(name, args)
        finally:
            stopping.hold()
    return _run(name, args)


def _unraisable(found: "sys.UnraisableHookArgs") -> None:
    """Prints an error that nothing can catch, but for one of orbax, whose threads tell an event loop that has
    ended of a file that cannot be written or read, which is told already."""
    if str(found.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(found)


def _run(name: str, args: Sequence[str]) -> int:
    """A command, and what ended it in words on stderr; the exit code."""
    try:
        if name not in COMMANDS:
            raise UsageError(f"there is no command {name!r}{suggestion(name, COMMANDS)}")
        return COMMANDS[name].run(args)
    except UsageError as error:
        return _fail(name, _sentences(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("eggroll", "experiments"):
            raise
        need = f"the package {error.name!r} is missing: pip install 'eggroll-jax[rl,supervised,reasoning]'"
        return _fail(name, need)
    except RunError as error:
        _fail(name, _sentences(error))
        return 1
    except Interrupted as stop:
        # Something that failed on the way out, and so is not saved.
        if notes(stop):
            _fail(name, "\n".join(notes(stop)))
            return 1
        print(stop, file=sys.stderr)
        return RUN_ME_AGAIN
    except KeyboardInterrupt as error:
        for note in notes(error):
            _fail(name, note)
        return stopping.INTERRUPTED


def _sentences(error: BaseException) -> str:
    """An error and its notes, each on a line."""
    return "\n".join(one.replace("\n", "\\n") for one in (str(error), *notes(error)))


def notes(error: BaseException) -> list[str]:
    """What else went wrong while an error was on its way."""
    # JAX adds one about its own frames, below a line.
    return [note for note in getattr(error, "__notes__", []) if not note.startswith("-----")]


def usage() -> str:
    """What `eggroll --help` prints."""
    commands = (f"  {name:11} {command.summary}" for name, command in COMMANDS.items())
    lines = [
        "usage: eggroll COMMAND [OPTIONS]",
        "",
        "Training without backpropagation, by low-rank evolution strategies.",
        "",
        *commands,
        "",
        "eggroll COMMAND --help lists the options of a command. A run that was stopped, however it was,",
        "goes on when the same command is given again.",
    ]
    return "\n".join(lines)


def parse(
    kind: type[Settings], presets: Mapping[str, Settings], args: Sequence[str], prog: str
) -> Settings:
    """Settings from a command line: the preset's, with the given flags in their place.

    Raises:
        UsageError: for a preset that there is not.
        SystemExit: with code 2 for an unknown flag or a value of the wrong type (the message names
            the nearest flags), with code 0 after `--help`.
    """
    import tyro

    words = [word for arg in args for word in arg.split("=", 1)]
    default = next(iter(presets.values()))
    at = [number for number, word in enumerate(words[:-1]) if word == "--preset"]
    if at:
        # The last one counts, as that of any flag.
        name = words[at[-1] + 1]
        if name not in presets:
            known = suggestion(name, presets) or f"; there are {', '.join(presets)}"
            raise UsageError(f"--preset {name}: there is no such preset{known}")
        default = presets[name]
    return _with_paths(tyro.cli(kind, prog=prog, default=default, args=args), args)


def _with_paths(settings: Settings, args: Sequence[str]) -> Settings:
    """The settings as they are.

    Raises:
        UsageError: for a path that was given as nothing, which Python takes for the current folder.
    """
    words = [arg.rpartition("=")[2] for arg in args]
    if "" in words and not any(word and Path(word) == Path() for word in words):
        for name, place in places(type(settings)).items():
            value = value_at(settings, place)
            if Path() in (value if isinstance(value, tuple) else (value,)):
                raise UsageError(f"{flag(name)}: a path must not be empty")
    return settings


def _train(name: str, args: Sequence[str]) -> int:
    """Any driver: settings, then a run, then what it came to."""
    from experiments.run.drivers import find_driver

    driver = find_driver(name)
    config = parse(driver.config, driver.presets, args, f"eggroll {name}").settled()
    config.check()
    config.check_places()

    from experiments.run import hosts

    # Before anything that might start JAX's backend.
    with hosts.joined(config.cluster):
        if hosts.several():
            stopping.hold()  # all of them end together
        from experiments.run.compilation import keep_compiled_programs
        from experiments.run.doctor import last_line
        from experiments.run.train import train

        keep_compiled_programs()
        try:
            sentence = train(config, STARTED).sentence
        except RunError as error:
            if hosts.first() and (why := last_line(config.run_dir)):
                error.add_note(why)
            raise
        if hosts.first():
            print(sentence)
            print(f"Metrics, checkpoints and the curve are in {config.run_dir}.")
            if why := last_line(config.run_dir):
                print(why)
    return 0


def _study(args: Sequence[str]) -> int:
    from experiments.optimizers.study import StudySettings, study
    from experiments.run.compilation import keep_compiled_programs

    settings = _plain_cli(StudySettings, args, "eggroll study")
    settings.check()
    keep_compiled_programs()
    print(f"Wrote {', '.join(map(str, study(settings)))}.")
    return 0


def _sweep(args: Sequence[str]) -> int:
    from experiments.sweep.sweep import SweepSettings, sweep

    return sweep(_plain_cli(SweepSettings, args, "eggroll sweep"), STARTED)


def _report(args: Sequence[str]) -> int:
    from experiments.run.report import Settings, report

    paths = report(_plain_cli(Settings, args, "eggroll report"))
    print(f"Wrote {' and '.join(map(str, paths))}.")
    return 0


def _eval(args: Sequence[str]) -> int:
    from experiments.run.commands import EvalSettings, evaluate

    print(evaluate(_plain_cli(EvalSettings, args, "eggroll eval")))
    return 0


def _export(args: Sequence[str]) -> int:
    from experiments.run.commands import ExportSettings, export

    print(export(_plain_cli(ExportSettings, args, "eggroll export")))
    return 0


def _replay(args: Sequence[str]) -> int:
    from experiments.run.replaying import ReplaySettings, replay

    print(replay(_plain_cli(ReplaySettings, args, "eggroll replay")))
    return 0


def _import(args: Sequence[str]) -> int:
    from experiments.models.importing import ImportSettings, import_model

    print(import_model(_plain_cli(ImportSettings, args, "eggroll import")))
    return 0


def _probe(args: Sequence[str]) -> int:
    from experiments.run.drivers import find_driver

    driver = find_driver("reasoning")
    config = parse(driver.config, driver.presets, args, "eggroll probe").settled()
    changed(config, probe=True).check()
    config.check_places()

    from experiments.run import hosts

    with hosts.joined(config.cluster):
        from experiments.reasoning.train import Reasoning
        from experiments.run.compilation import keep_compiled_programs

        keep_compiled_programs()
        trainer = Reasoning(changed(config, probe=False))
        with trainer:
            for note in trainer.notes:
                hosts.say(note)
            found = trainer.probe()
        if hosts.first():
            print(found.describe())
    return 0


def _sample(args: Sequence[str]) -> int:
    from experiments.run.commands import SampleSettings, sample

    print(sample(_plain_cli(SampleSettings, args, "eggroll sample")))
    return 0


def _rl(args: Sequence[str]) -> int:
    if "--list-envs" not in args:
        return _train("rl", args)
    others = [word for word in args if word != "--list-envs"]
    if others:
        raise UsageError(f"--list-envs: takes no other options, but got {others[0]!r}")
    from experiments.rl.libraries import names

    print("\n".join(names()))
    print(
        "An environment of your own: --env FILE.py:FUNCTION (docs/reinforcement-learning.md).",
        file=sys.stderr,
    )
    return 0


def _doctor(args: Sequence[str]) -> int:
    if args in (["-h"], ["--help"]):
        how = "usage: eggroll doctor\n       eggroll doctor RUN [RUN ...]"
        print(f"{how}\n\n{COMMANDS['doctor'].summary}; takes no options")
        return 0
    options = [word for word in args if word.startswith("-")]
    if options:
        raise UsageError(f"takes no options, but got {options[0]!r}")
    from experiments.run.doctor import doctor, tell

    return tell([Path(word) for word in args]) if args else doctor()


def _plain_cli(kind: type[Settings], args: Sequence[str], prog: str) -> Settings:
    """Settings without presets."""
    import tyro

    return _with_paths(tyro.cli(kind, prog=prog, args=args), args)


def _fail(command: str, sentence: str) -> int:
    # What was typed may hold anything that a terminal would act on; notes are lines of their own.
    shown = (one if one.isprintable() or one == "\n" else repr(one)[1:-1] for one in sentence)
    print(f"eggroll {command}: {''.join(shown)}", file=sys.stderr)
    return 2


class Command(NamedTuple):
    """A subcommand: one line for the help, what it does with the words after its name, and whether it can be
    stopped and goes on when it is given again."""

    summary: str
    run: Callable[[Sequence[str]], int]
    trains: bool = False


def _drivers() -> dict[str, Command]:
    from experiments.run.drivers import FOLDERS, find_driver

    run = {"rl": _rl}
    return {
        name: Command(
            find_driver(name).summary, run.get(name, functools.partial(_train, name)), True
        )
        for name in FOLDERS
    }


COMMANDS = {
    **_drivers(),
    "study": Command("compare optimizers, each at its best learning rate", _study, True),
    "probe": Command(
        "find the sigma of a run of reasoning before it, with the same options", _probe
    ),
    "sweep": Command(
        "run a driver at many settings, from a file that says what varies", _sweep, True
    ),
    "report": Command("draw and compare the curves of runs", _report),
    "eval": Command("measure the newest checkpoint of a run", _eval),
    "sample": Command("let the language model of a run write", _sample),
    "import": Command("write the model of a GGUF file as a folder that --model takes", _import),
    "export": Command("write the trained parameters of a run as safetensors", _export),
    "replay": Command("rebuild the model of any generation from the scores of a run", _replay),
    "doctor": Command(
        "check the installation; with run folders, say why they did not learn", _doctor
    ),
}


if __name__ == "__main__":
    sys.exit(main())
