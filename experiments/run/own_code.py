"""A user's own functions, named on the command line as FILE.py:NAME or MODULE:NAME.

A file is read once and runs from what was read: a process that is started later, such as one that computes
rewards, is sent the text (:func:`sources`, :func:`adopt`), so that all of a run have the same code although
somebody edits the file meanwhile. Nothing here imports anything heavy.
"""

import ast
import hashlib
import importlib
import importlib.abc
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple

from experiments.run.errors import UsageError, suggestion

FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
# Files whose modules this process has run, by the name of the module.
_LOADED: dict[str, "Source"] = {}


class Source(NamedTuple):
    """A file as it was read.

    Attributes:
        path: of the file.
        content: of the file.
    """

    path: Path
    content: bytes

    @property
    def module(self) -> str:
        """The name of its module: another one for another file, and for other content."""
        digest = hashlib.sha256(str(self.path).encode() + b"\0" + self.content).hexdigest()
        return f"own_code_{digest[:16]}"


def is_own(text: str) -> bool:
    """Whether a text on the command line names a user's own function, rightly or not.

    A file of questions does not, though its path may have a colon.

    Example:
        >>> is_own("my_file.py:make"), is_own("my_file.py"), is_own("package.module:make")
        (True, True, True)
        >>> is_own("sums"), is_own("my:data.jsonl")
        (False, False)
    """
    return not text.endswith(".jsonl") and (":" in text or text.endswith(".py"))


def load(place: str, subject: str) -> Callable[..., Any]:
    """The function that a place names.

    A file runs as a module of its own; files beside it cannot be imported from it, installed packages can.

    Args:
        place: "folder/file.py:name", or "package.module:name".
        subject: what messages begin with, such as "--task my_file.py:make".

    Raises:
        UsageError: where there is no such file, module or name, the code raises an error when it is imported
            (the message names file and line), or what is named is no function.

    Example:
        >>> load("operator:add", "--reward operator:add")(1, 2)
        3
        >>> load("operator:concatt", "--reward operator:concatt")
        Traceback (most recent call last):
        ...
        experiments.run.errors.UsageError: --reward operator:concatt: operator has no function 'concatt'; did
        you mean 'concat' ...
    """
    where, name = _parts(place, subject)
    module = _run_file(Path(where), subject) if where.endswith(".py") else _import(where, subject)
    if not hasattr(module, name):
        near = [k for k, value in vars(module).items() if callable(value) and k[0] != "_"]
        raise UsageError(f"{subject}: {where} has no function {name!r}{suggestion(name, near)}")
    found = getattr(module, name)
    if not callable(found):
        raise UsageError(f"{subject}: {name} in {where} must be a function, got {_shown(found)}")
    return found


def check(place: str, subject: str) -> None:
    """Raises UsageError for what is wrong with a place as far as that is seen without running its code.

    Args:
        place: as in :func:`load`.
        subject: as in :func:`load`.

    Example:
        >>> check("there_is_none.py:make", "--task there_is_none.py:make")
        Traceback (most recent call last):
        experiments.run.errors.UsageError: --task there_is_none.py:make: there is no file ...there_is_none.py
    """
    where, name = _parts(place, subject)
    if not where.endswith(".py"):
        return
    source = _read(Path(where), subject)
    _compiled(source, subject)
    # Whatever binds it has its name in it, but for an import of all names.
    if b"import *" not in source.content and name.encode() not in source.content:
        defined = [one.name for one in ast.parse(source.content).body if isinstance(one, FUNCTIONS)]
        near = suggestion(name, [one for one in defined if one[0] != "_"])
        raise UsageError(f"{subject}: {where} has no function {name!r}{near}")


def _parts(place: str, subject: str) -> tuple[str, str]:
    """The file or module of a place, and the name in it."""
    where, _, name = place.rpartition(":")
    if not where or not name.isidentifier():
        file = place.rpartition(":")[0] or place
        example = f"{file.rstrip(':')}:NAME" if file.endswith(".py") else "my_file.py:NAME"
        raise UsageError(f"{subject}: must name a function in a file, as {example} does")
    return where, name


def call(function: Callable[..., Any], subject: str, *args: Any, **settings: Any) -> Any:
    """Calls a user's function; an error in it becomes one sentence.

    Args:
        function: of :func:`load`.
        subject: as in :func:`load`.
        *args: of the function.
        **settings: of the function.

    Raises:
        UsageError: where the function raises an error; with its file and line. One that the function raises
            itself as a UsageError goes on as it is.

    Example:
        >>> call(lambda: 1 / 0, "--task my_file.py:make")
        Traceback (most recent call last):
        ...
        experiments.run.errors.UsageError: --task my_file.py:make: ... raised ZeroDivisionError: division by
        zero
    """
    try:
        return function(*args, **settings)
    except (UsageError, MemoryError):
        raise
    # A user's code may raise anything at all, and end its process.
    except (Exception, SystemExit) as error:
        code = getattr(function, "__code__", None)
        file = code.co_filename if code is not None else ""
        raise UsageError(f"{subject}: {told(error, file)}") from error


def told(error: BaseException, file: str) -> str:
    """An error of a user's code in words, with the line that it comes from.

    Args:
        error: that was raised.
        file: of the user's code; the last of its lines on the way to the error is named.

    Example:
        >>> told(ValueError("no such size"), "my_file.py")
        'my_file.py raised ValueError: no such size'
    """
    what = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
    if isinstance(error, SyntaxError) and error.filename is not None:
        what = f"{type(error).__name__}: {error.msg}"
        return f"{error.filename}, line {error.lineno} raised {what}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    place = f"{file}, line {lines[-1]}" if lines else file or "it"
    return f"{place} raised {what}"


def file_of(place: str) -> Path | None:
    """The file that the code of a place is in; None for a module without any.

    Example:
        >>> file_of("my_file.py:make"), file_of("sys:exit")
        (PosixPath('my_file.py'), None)
    """
    where = place.rpartition(":")[0]
    if where.endswith(".py"):
        return Path(where)
    file = getattr(sys.modules.get(where), "__file__", None)
    return None if file is None else Path(file)


def sources() -> tuple[Source, ...]:
    """The files that this process has loaded, for :func:`adopt` in another."""
    return tuple(_LOADED.values())


def adopt(known: Iterable[Source]) -> None:
    """Lets this process import files as another has read them; each runs when something of it is needed."""
    sys.meta_path.append(_Adopted({source.module: source for source in known}))


class _Adopted(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports modules of files that another process has read."""

    def __init__(self, known: Mapping[str, Source]) -> None:
        self._known = known

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in self._known else None

    def exec_module(self, module: ModuleType) -> None:
        source = self._known[module.__name__]
        module.__file__ = str(source.path)
        exec(compile(source.content, str(source.path), "exec"), vars(module))
        _LOADED[module.__name__] = source


def _run_file(path: Path, subject: str) -> ModuleType:
    return _run(_read(path, subject), subject)


def _read(path: Path, subject: str) -> Source:
    path = path.absolute()
    try:
        return Source(path, path.read_bytes())
    except FileNotFoundError as error:
        raise UsageError(f"{subject}: there is no file {path}") from error
    except OSError as error:
        raise UsageError(f"{subject}: {path} cannot be read: {error.strerror}") from error


def _compiled(source: Source, subject: str) -> CodeType:
    try:
        return compile(source.content, str(source.path), "exec")
    # A NUL in the file is a ValueError before Python 3.12.
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"{subject}: {told(error, str(source.path))}") from error


def _run(source: Source, subject: str) -> ModuleType:
    name = source.module
    if name in _LOADED:
        return sys.modules[name]
    code = _compiled(source, subject)
    module = ModuleType(name)
    module.__file__ = str(source.path)
    # Before it runs: dataclasses look their module up.
    sys.modules[name] = module
    try:
        exec(code, vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UsageError(f"{subject}: {told(error, str(source.path))}") from error
    _LOADED[name] = source
    return module


def _import(name: str, subject: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name + ".").startswith(error.name + "."):
            raise UsageError(
                f"{subject}: there is no module {error.name!r}; a file is named as my_file.py:NAME"
            ) from error
        raise UsageError(f"{subject}: {told(error, _origin(name))}") from error
    except (Exception, SystemExit) as error:
        raise UsageError(f"{subject}: {told(error, _origin(name))}") from error


def _origin(name: str) -> str:
    try:
        spec = importlib.util.find_spec(name)
    # What is around the module may not be importable either.
    except (ImportError, ValueError):
        return ""
    return (spec.origin or "") if spec is not None else ""


def _shown(value: object) -> str:
    try:
        text = " ".join(repr(value).split())
    # An object of anybody's making may fail here.
    except Exception:
        return f"a value of the type {type(value).__name__}"
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
