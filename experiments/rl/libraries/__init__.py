"""The libraries that environments come from. A new one is a file in this folder and a line in LIBRARIES.

The module of a library has three functions:

- ``names()``: the names of its environments;
- ``make(name, settings)``: one of them as the library makes it, with keyword arguments ``settings``;
- ``adapt(found)``: an object of the library's own types as an Environment of
  :mod:`experiments.rl.environments` (JAX) or a ``gymnasium.Env`` (not JAX); None for other objects.

Worker processes import this file. It imports no JAX, and a library only when that is named, so that they
start fast.
"""

import importlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.rl.libraries import own
from experiments.run.errors import UsageError, suggestion

Settings = Mapping[str, Any]


class Library(NamedTuple):
    """Where a library's functions are, and the kind of its environments.

    Attributes:
        module: with the three functions.
        outside: whether its environments are stepped by worker processes, not inside a JAX program.
    """

    module: str
    outside: bool


# By the name of the package, which stands before the colon in `--env`.
LIBRARIES: dict[str, Library] = {
    "gymnax": Library("experiments.rl.libraries.gymnax", outside=False),
    "gymnasium": Library("experiments.rl.libraries.gymnasium", outside=True),
}
# An environment that is named without a library is one of this.
DEFAULT = "gymnax"


def names() -> list[str]:
    """The names that ``--env`` takes, library by library.

    Example:
        >>> found = names()
        >>> "CartPole-v1" in found and "gymnasium:CartPole-v1" in found
        True
    """
    return [
        name if library == DEFAULT else f"{library}:{name}"
        for library in LIBRARIES
        for name in _module(library).names()
    ]


def is_outside(name: str) -> bool | None:
    """Whether worker processes step an environment; None for a file of one's own, which says so when loaded.

    Example:
        >>> is_outside("CartPole-v1"), is_outside("gymnasium:CartPole-v1"), is_outside("mine.py:make")
        (False, True, None)
    """
    if own.in_file(name):
        return None
    library = _split(name)[0]
    return library in LIBRARIES and LIBRARIES[library].outside


def named(name: str) -> tuple[str, str]:
    """The library of an environment, and the environment's name there.

    Args:
        name: ``NAME`` (gymnax) or ``LIBRARY:NAME``.

    Raises:
        UsageError: where there is no such library.

    Example:
        >>> named("CartPole-v1"), named("gymnasium:CartPole-v1")
        (('gymnax', 'CartPole-v1'), ('gymnasium', 'CartPole-v1'))
    """
    library, inner = _split(name)
    if library not in LIBRARIES:
        raise UsageError(
            f"--env {name}: expected one of {', '.join(LIBRARIES)} or FILE.py before the colon, "
            f"got {library!r}{suggestion(library, LIBRARIES)}"
        )
    return library, inner


def unknown(library: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that a library does not have.

    Args:
        library: as its authors write it.
        name: without the library.
        known: the names that it has.
    """
    return UsageError(
        f"{library} has no environment {name!r}{suggestion(name, known)}; "
        "eggroll rl --list-envs names them"
    )


def make(name: str, settings: Settings) -> Any:
    """The environment as its library, or the user's own file, makes it.

    Args:
        name: ``NAME`` (gymnax), ``LIBRARY:NAME`` or ``FILE.py:FUNCTION``.
        settings: keyword arguments for it.

    Raises:
        UsageError: where there is no such library, environment, file or function, or it cannot be made.
    """
    if own.in_file(name):
        return own.make(name, settings)
    library, inner = named(name)
    return _module(library).make(inner, settings)


def adapt(found: Any) -> Any:
    """An object of a library as an Environment or a gymnasium.Env; None where no library knows it."""
    for library in LIBRARIES:
        # An object of a library's types exists only where the library was imported.
        if library in sys.modules:
            adapted = _module(library).adapt(found)
            if adapted is not None:
                return adapted
    return None


def parse_settings(words: Sequence[str]) -> dict[str, Any]:
    """Settings as they are typed: ``NAME=VALUE``, where a value is JSON or else a text.

    Raises:
        UsageError: for a word of another form.

    Example:
        >>> parse_settings(["length=3", "mode=fast", "slippery=false"])
        {'length': 3, 'mode': 'fast', 'slippery': False}
    """
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"--env-settings {word}: expected NAME=VALUE, such as length=3")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _module(library: str) -> Any:
    return importlib.import_module(LIBRARIES[library].module)


def _split(name: str) -> tuple[str, str]:
    library, colon, inner = name.partition(":")
    return (library, inner) if colon else (DEFAULT, name)
