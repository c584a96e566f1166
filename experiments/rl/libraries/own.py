"""Environments of one's own: a function in a file, named by ``--env FILE.py:FUNCTION``."""

import inspect
from collections.abc import Mapping
from typing import Any

from experiments.run import own_code
from experiments.run.errors import UsageError


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
    function = own_code.load(name, f"--env {name}")
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
    function = own_code.load(name, f"--env {name}")
    try:
        inspect.signature(function).bind_partial(**{setting: None})
    except (TypeError, ValueError):
        return False
    return True


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
    file = own_code.file_of(name) if in_file(name) else None
    words = own_code.told(error, what if file is None else str(file.absolute()))
    advice = " ".join(str(error).strip().partition("\n")[2].split())
    words = words.removesuffix(advice).rstrip() if advice else words
    return words if file is None else f"{what}: {words}"
