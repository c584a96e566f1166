"""The command line: `eggroll rl --preset cartpole`, `eggroll doctor`.

Anything heavy is imported by the command that needs it, so that help and mistakes are instant.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from experiments.run.errors import UsageError, suggestion

STARTED = time.perf_counter()
Settings = TypeVar("Settings")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after `eggroll`; those of the process by default.

    Returns:
        The exit code: 0, or 2 for a mistake in the command.
    """
    name, *args = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    try:
        if name not in COMMANDS:
            raise UsageError(f"there is no command {name!r}{suggestion(name, COMMANDS)}")
        return COMMANDS[name].run(args)
    except UsageError as error:
        return _fail(name, str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("eggroll", "experiments"):
            raise
        return _fail(name, f"the package {error.name!r} is missing: pip install 'eggroll-jax[rl]'")
    except KeyboardInterrupt:
        return 130


def usage() -> str:
    """What `eggroll --help` prints."""
    commands = (f"  {name:8} {command.summary}" for name, command in COMMANDS.items())
    lines = [
        "usage: eggroll COMMAND [OPTIONS]",
        "",
        "Training without backpropagation, by low-rank evolution strategies.",
        "",
        *commands,
        "",
        "eggroll COMMAND --help lists the options of a command.",
    ]
    return "\n".join(lines)


def parse(
    kind: type[Settings], presets: Mapping[str, Settings], args: Sequence[str], prog: str
) -> Settings:
    """Settings from a command line: the preset's, with the given flags in their place.

    Raises:
        SystemExit: with code 2 for an unknown flag or a value of the wrong type (the message names
            the nearest flags), with code 0 after `--help`.
    """
    import tyro

    words = [word for arg in args for word in arg.split("=", 1)]
    name = words[words.index("--preset") + 1] if "--preset" in words[:-1] else ""
    default = presets.get(name, next(iter(presets.values())))
    return tyro.cli(kind, prog=prog, default=default, args=args)


def _rl(args: Sequence[str]) -> int:
    from experiments.rl.config import PRESETS, Config

    config = parse(Config, PRESETS, args, "eggroll rl")
    config.check()

    from experiments.rl.train import train
    from experiments.run.compilation import keep_compiled_programs

    keep_compiled_programs()
    print(train(config, STARTED).sentence)
    print(f"The curve, metrics and parameters are in {config.run_dir}.")
    return 0


def _doctor(args: Sequence[str]) -> int:
    if args:
        raise UsageError(f"takes no options, but got {args[0]!r}")
    from experiments.run.doctor import doctor

    return doctor()


def _fail(command: str, sentence: str) -> int:
    print(f"eggroll {command}: {sentence}", file=sys.stderr)
    return 2


class Command(NamedTuple):
    """A subcommand: one line for the help, and what it does with the words after its name."""

    summary: str
    run: Callable[[Sequence[str]], int]


COMMANDS = {
    "rl": Command("train a policy in a gymnax environment", _rl),
    "doctor": Command("print versions and devices, and check that a small program runs", _doctor),
}


if __name__ == "__main__":
    sys.exit(main())
