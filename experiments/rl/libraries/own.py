"""Environments of one's own: a function in a file, named by ``--env FILE.py:FUNCTION``."""

import functools
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments.run.errors import UsageError, suggestion


def is_own(name: str) -> bool:
    """Whether a name is that of a function in a file.

    Example:
        >>> is_own("mine.py:make"), is_own("gymnasium:CartPole-v1")
        (True, False)
    """
    return name.partition(":")[0].endswith(".py")


def make(name: str, settings: Mapping[str, Any]) -> Any:
    """What the function gives, with the settings as keyword arguments.

    Raises:
        UsageError: where there is no such file or function, or it takes other arguments, or it raises.
    """
    function = load(name)
    try:
        inspect.signature(function).bind(**settings)
    except TypeError as error:
        raise UsageError(
            f"--env {name}: the function does not take --env-settings "
            f"{' '.join(f'{key}={value}' for key, value in settings.items()) or '(none)'}: {error}"
        ) from error
    except ValueError:  # some callables have no signature
        pass
    try:
        return function(**settings)
    # A user's function may raise anything at all.
    except Exception as error:
        raise UsageError(f"--env {name}: it raised {type(error).__name__}: {error}") from error


def takes(name: str, setting: str) -> bool:
    """Whether the function has an argument of this name."""
    return setting in inspect.signature(load(name)).parameters


def digest(name: str) -> str | None:
    """SHA-256 of the file that a name is in; None for an environment of a library.

    Raises:
        UsageError: where the file cannot be read.

    Example:
        >>> digest("CartPole-v1") is None
        True
    """
    if not is_own(name):
        return None
    path = Path(name.partition(":")[0])
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"--env {name}: {path} cannot be read: {error.strerror}") from error


def load(name: str) -> Callable[..., Any]:
    """The function that a name says.

    Raises:
        UsageError: where there is no such file or function, or the file cannot be imported.
    """
    place, _, function = name.partition(":")
    path = Path(place)
    if not path.is_file():
        raise UsageError(f"--env {name}: there is no file {place}")
    if not function.isidentifier():
        raise UsageError(f"--env {name}: expected FILE.py:FUNCTION, such as {place}:make")
    try:
        module = _module(path.resolve(), digest(name))
    # A user's file may raise anything at all.
    except Exception as error:
        raise UsageError(
            f"--env {name}: {place} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    found = getattr(module, function, None)
    if not callable(found):
        near = suggestion(function, [key for key, x in vars(module).items() if callable(x)])
        raise UsageError(f"--env {name}: {place} has no function {function!r}{near}")
    return found


@functools.lru_cache
def _module(path: Path, content: str | None) -> ModuleType:
    """The file as a module, once for each content."""
    del content
    spec = importlib.util.spec_from_file_location(f"eggroll_own_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
