"""Environments of one's own: a function in a file, named by ``--env FILE.py:FUNCTION``."""

import inspect
from collections.abc import Mapping
from typing import Any

from experiments.run import own_code
from experiments.run.errors import UsageError


def is_own(name: str) -> bool:
    """Whether a name is that of a function in a file.

    Example:
        >>> is_own("mine.py:make"), is_own("gymnasium:CartPole-v1")
        (True, False)
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
    """Whether the function has an argument of this name."""
    return setting in inspect.signature(own_code.load(name, f"--env {name}")).parameters
