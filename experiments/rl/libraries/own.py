"""Environments of one's own: a function in a file, named by ``--env FILE.py:FUNCTION``."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.run import own_code
from experiments.run.errors import UsageError
from experiments.run.own_code import Source

# By file, the modules of those that another process has read for this one.
_ADOPTED: dict[Path, str] = {}


def in_file(name: str) -> bool:
    """Whether a name is that of a function in a file; what stands before other colons is a library.

    Example:
        >>> in_file("mine.py:make"), in_file("mine.py"), in_file("gymnasium:CartPole-v1")
        (True, True, False)
    """
    return name.rpartition(":")[0].endswith(".py") or name.endswith(".py")


def make(name: str, settings: Mapping[str, Any]) -> Any:
    """What the function gives, with the settings as keyword arguments.

    Raises:
        UsageError: where there is no such file or function, or it takes other arguments, or it raises.
    """
    function = _load(name)
    try:
        inspect.signature(function).bind(**settings)
    except TypeError as error:
        raise UsageError(
            f"--env {name}: the function does not take --env-settings "
            f"{' '.join(f'{key}={value}' for key, value in settings.items()) or '(none)'}: {error}"
        ) from error
    except ValueError:  # some callables have no signature
        pass
    return own_code.call(function, f"--env {name}", **settings)


def takes(name: str, setting: str) -> bool:
    """Whether the function has a keyword argument of this name, or any; one without a signature has none."""
    function = _load(name)
    try:
        inspect.signature(function).bind_partial(**{setting: None})
    except (TypeError, ValueError):
        return False
    return True


def source(name: str) -> Source | None:
    """The file of a name as this process has read it, for :func:`adopt`; None where there is none."""
    file = _file(name)
    known = [one for one in own_code.sources() if one.path == file]
    if file is None or not known:
        return None
    try:
        newest = Source(file, file.read_bytes())
    except OSError:
        return known[-1]
    # A file may have been another one meanwhile, and is what it was again.
    return newest if newest in known else known[-1]


def adopt(known: Source) -> None:
    """From here on, this process runs a file as another has read it, whatever its content is now."""
    own_code.adopt([known])
    _ADOPTED[known.path] = known.module


def told(name: str, what: str, error: BaseException) -> str:
    """An error in an environment in words; with the line of the user's file, where there is one.

    Args:
        name: of the environment, as `--env` says it.
        what: raised it, such as "step".
        error: that was raised. JAX's have a first line, and then advice.

    Example:
        >>> told("CartPole-v1", "step", ValueError("no such action"))
        'step raised ValueError: no such action'
        >>> told("/mine.py:make", "step", ValueError("no such action"))
        'step: /mine.py raised ValueError: no such action'
    """
    file = _file(name)
    words = own_code.told(error, what if file is None else str(file))
    advice = " ".join(str(error).strip().partition("\n")[2].split())
    words = words.removesuffix(advice).rstrip() if advice else words
    return words if file is None else f"{what}: {words}"


def _file(name: str) -> Path | None:
    file = own_code.file_of(name) if in_file(name) else None
    return None if file is None else file.absolute()


def _load(name: str) -> Any:
    module = _ADOPTED.get(_file(name) or Path())
    place = name if module is None else f"{module}:{name.rpartition(':')[2]}"
    return own_code.load(place, f"--env {name}")
