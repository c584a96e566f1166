"""The run folder: everything a run leaves behind.

- config.json: the settings, resolved, and the driver that they are for
- files.json: the digests of files that decide what the run learns, such as a task or a reward of one's own
- versions.json: packages, Python, kind of machine, git commit; of the process that began the run
- metrics.jsonl: one row a generation
- history.jsonl: of language models that evolve, the scores that rebuild each update
- checkpoints/: the two newest states
- result.json: what the run came to
- curve.png: the learning curve
- episode.gif: an episode of the final policy, where it can be drawn
- anchors.json, samples.txt: of language models, what the text costs otherwise, and texts of the model's own
- tokenizer/: of language models that read byte pairs, learned when the run began
- damaged/: checkpoints that were not what had been saved, if there ever were any
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from experiments.run import hosts
from experiments.run.errors import InUse, RunError, UsageError
from experiments.run.fields import differences, to_json
from experiments.run.settings import RunSettings

FILES = (
    *("config.json", "files.json", "versions.json", "metrics.jsonl", "result.json", "curve.png"),
    "episode.gif",
    *("anchors.json", "history.jsonl", "samples.txt"),
)
FOLDERS = ("checkpoints", "damaged", "tensorboard", "tokenizer", "wandb")
# What is to be done about a file that is damaged.
REPLACE = "replace the run with --overwrite"
WRITE_AGAIN = "remove it, and run the same command again to have it written anew"
PACKAGES = ("eggroll-jax", "jax", "jaxlib", "numpy", "optax", "flax", "orbax-checkpoint", "gymnax")


@contextlib.contextmanager
def open_run_folder(
    driver: str, settings: RunSettings, files: Iterable[Path] = ()
) -> Iterator[Path]:
    """The folder of a run, made or found, held by this process alone.

    Of several processes the first holds it. The others get a folder that is removed at the end, so that all
    do the same, and one alone writes what is kept.

    Args:
        driver: the name of the command.
        settings: of the run.
        files: whose content decides what the run learns, beside the settings.

    Raises:
        UsageError: if it cannot be written to, is in use, or holds a run of other settings or files; or if
            another process does not see it, or has other files.
    """
    from experiments.run import agreement

    digests = {str(file): _digest(file) for file in files}
    with contextlib.ExitStack() as stack:
        path: Path = settings.run_dir
        problem: UsageError | None = None
        if hosts.first():
            try:
                stack.enter_context(_held_run_folder(driver, settings, digests))
            except UsageError as error:
                problem = error
        agreement.share_fate(problem)
        if not hosts.first():
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="eggroll-")))
            problem = _copy_rows(settings.run_dir, path) or _other_files(settings.run_dir, digests)
        agreement.share_fate(problem)
        yield path


def _copy_rows(run_dir: Path, to: Path) -> UsageError | None:
    """Copies the rows that there are; gives what is wrong, if anything is."""
    if not (run_dir / "config.json").exists():
        return UsageError(
            f"--run-dir {run_dir}: this process does not see what the first wrote there; choose a folder on "
            "a file system that all hosts share"
        )
    if (run_dir / "metrics.jsonl").exists():
        shutil.copy(run_dir / "metrics.jsonl", to)
    return None


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def _changed_files(run_dir: Path, digests: Mapping[str, str]) -> list[str]:
    """The files whose content is another than when the run began, in words."""
    known = read_object(run_dir / "files.json", REPLACE) or {}
    return [
        f"{path} has other content"
        for path, digest in digests.items()
        if known.get(path, digest) != digest
    ]


def _other_files(run_dir: Path, digests: Mapping[str, str]) -> UsageError | None:
    """What is wrong with the files of another process than the first, if anything is."""
    changed = _changed_files(run_dir, digests)
    if not changed:
        return None
    return UsageError(
        f"{', '.join(changed)} than in the first process: all processes must have one file"
    )


@contextlib.contextmanager
def _held_run_folder(
    driver: str, settings: RunSettings, digests: Mapping[str, str]
) -> Iterator[None]:
    path = settings.run_dir
    config = {"driver": driver, **to_json(settings)}
    with contextlib.ExitStack() as stack:
        try:
            make_folder(path)
            stack.enter_context(held(path))
            if settings.overwrite:
                _remove_run(path)
            known = read_object(path / "config.json", REPLACE)
            if known is not None and not settings.accept_changes:
                same_bits = settings.cluster.same_bits
                changed = [
                    *differences(known, config, type(settings), same_bits),
                    *_changed_files(path, digests),
                ]
                if changed:
                    raise UsageError(
                        f"{path} holds a run of other settings ({', '.join(changed)}): choose another "
                        "--run-dir, replace it with --overwrite, or go on with --accept-changes"
                    )
            if known is None or known != config:
                write_json(path / "config.json", config)
            if digests and read_object(path / "files.json", REPLACE) != digests:
                write_json(path / "files.json", digests)
            if not (path / "versions.json").exists():
                write_json(path / "versions.json", versions())
            # Of a run that has ended: where it is continued, it has not.
            (path / "result.json").unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(f"--run-dir {path} cannot be written to: {error.strerror}") from error
        yield


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """The folder is locked until the end of the block, or of the process however it ends.

    Raises:
        InUse: where another process holds it.
    """
    import fcntl

    with (path / ".lock").open("w") as file:
        # More than once: `is_held` has the lock for a moment.
        for last in (False,) * 9 + (True,):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if last:
                    raise InUse(f"{path} is in use by another process") from error
                time.sleep(0.05)
        yield


def is_held(path: Path) -> bool:
    """Whether a process, this one too, holds the folder at the moment."""
    import fcntl

    if not (path / ".lock").exists():
        return False
    with (path / ".lock").open() as file:
        try:
            # Shared: two that ask at once do not see each other.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _remove_run(path: Path) -> None:
    """Removes what runs write; other files are left alone."""
    for name in FILES:
        (path / name).unlink(missing_ok=True)
    for name in FOLDERS:
        if (path / name).is_dir():
            shutil.rmtree(path / name)


def read_object(path: Path, remedy: str) -> dict[str, Any] | None:
    """The JSON object that a file of one's own holds, None where there is no file.

    Args:
        path: the file.
        remedy: what is to be done where it is damaged.

    Raises:
        UsageError: where it holds anything else; it names the line or the byte.

    Example:
        >>> path = Path(tempfile.mkdtemp()) / "result.json"
        >>> read_object(path, "remove it")
        >>> _ = path.write_text("[]")
        >>> read_object(path, "remove it")
        Traceback (most recent call last):
        experiments.run.errors.UsageError: .../result.json must hold an object, got an array; remove it
    """
    try:
        return as_object(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; {remedy}") from error
    except ValueError as error:
        raise UsageError(f"{path} {error}; {remedy}") from error


def as_object(content: bytes) -> dict[str, Any]:
    """A JSON object from bytes.

    Raises:
        ValueError: where it is none; the message goes on from the name of the file.

    Example:
        >>> as_object(b'{"generation": 3}')
        {'generation': 3}
        >>> as_object(bytes([123, 255]))
        Traceback (most recent call last):
        ValueError: is not text in UTF-8: byte 0xff at position 1
    """
    try:
        found = json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"is not text in UTF-8: byte {error.object[error.start]:#04x} at position {error.start}"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except RecursionError as error:
        raise ValueError("is not JSON of ours: it is nested too deeply") from error
    # Of whole numbers, Python reads 4300 digits at most.
    except ValueError as error:
        raise ValueError(f"has a number that is too long: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"must hold an object, got {kind_of(found)}")
    return found


def kind_of(value: Any) -> str:
    """What a JSON value is, in words.

    Example:
        >>> kind_of([1]), kind_of("x"), kind_of(None)
        ('an array', "'x'", 'null')
    """
    if isinstance(value, list):
        return "an array"
    if isinstance(value, dict):
        return "an object"
    return "null" if value is None else repr(value)[:60]


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that is finite and fits into 64 bits.

    Example:
        >>> is_number(0.5), is_number(True), is_number(10**400), is_number(float("inf"))
        (True, False, False, False)
    """
    if type(value) is int:
        return -(2**63) <= value < 2**64
    return type(value) is float and math.isfinite(value)


def is_figure(value: Any) -> bool:
    """Whether it is a number or null, or a list of them, one for each of several seeds.

    Example:
        >>> is_figure([0.5, None]), is_figure(None), is_figure("x"), is_figure([[1]])
        (True, True, False, False)
    """
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(one is None or is_number(one) for one in values)


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a run.

    Raises:
        UsageError: if there is none, or it is damaged.
    """
    found = read_object(path / "config.json", REPLACE)
    if found is None:
        raise UsageError(f"{path} is not a run folder: it has no config.json")
    return found


def read_result(path: Path) -> dict[str, Any] | None:
    """result.json of a run, None where it has not ended yet.

    Raises:
        UsageError: where it is damaged; it names the field.
    """
    file = path / "result.json"
    found = read_object(file, WRITE_AGAIN)
    if found is None:
        return None
    # What is used of every driver's; figures that are not finite stand as NaN.
    generations, seeds = found.get("generations"), found.get("by_seed")
    wrong = None
    if type(generations) is not int or not 0 <= generations < 2**63:
        wrong = "generations", "a whole number of at least 0"
    elif not isinstance(found.get("sentence"), str):
        wrong = "sentence", "a text"
    elif seeds is not None and not (
        seeds and isinstance(seeds, list) and all(map(_is_score, seeds))
    ):
        wrong = "by_seed", "null or a list of numbers"
    for name, value in found.items():
        values = value if isinstance(value, list) else [value]
        figure = values and all(map(_is_score, values))
        if wrong is None and name.startswith("held_out") and not figure:
            wrong = name, "a number, null or a list of them"
    if wrong is not None:
        name, right = wrong
        raise UsageError(
            f"{file}: {name} must be {right}, got {kind_of(found[name]) if name in found else 'nothing'}; "
            f"{WRITE_AGAIN}"
        )
    return found


def _is_score(value: Any) -> bool:
    return value is None or type(value) is float or is_number(value)


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file so that it is never seen half-written: a neighbour first, then a rename; synced.

    Raises:
        RunError: if it cannot be written; nothing of it is left then.
    """
    part = path.with_name(path.name + ".part")
    with full_disk_in_one_sentence(path), contextlib.ExitStack() as stack:
        with part.open("wb") as file:
            stack.callback(part.unlink, missing_ok=True)
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Returns when what is in a file would survive a loss of power."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sync_folder(path: Path) -> None:
    """Returns when the names in a folder, as after a rename, would survive a loss of power."""
    sync_file(path)


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it that are missing, so that they would survive a loss of power."""
    made = [one for one in (path, *path.parents) if not one.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for one in made:
        sync_folder(one.parent)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented."""
    text = json.dumps(content, indent=2) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


@contextlib.contextmanager
def full_disk_in_one_sentence(path: Path) -> Iterator[None]:
    """An OSError within the block becomes a RunError that names the file."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{error.filename or path} could not be written: {error.strerror or error}; "
            "make room, or let it be written, and run the same command again to continue"
        ) from error


# Not Self: the checks of the test run know it in decorated classes alone.
Appended = TypeVar("Appended", bound="AppendedFile")


class AppendedFile:
    """A file of lines that only grows; a line is in the file before `append` returns.

    Args:
        path: the file, made where there is none.

    Raises:
        RunError: if it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with full_disk_in_one_sentence(path):
            self._file = path.open("a")

    def append(self, line: str) -> None:
        """Adds a line, given without its end."""
        with full_disk_in_one_sentence(self.path):
            self._file.write(line + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Returns when all lines would survive a loss of power."""
        with full_disk_in_one_sentence(self.path):
            os.fsync(self._file.fileno())

    def __enter__(self: Appended) -> Appended:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with full_disk_in_one_sentence(self.path):
            self._file.close()


def versions() -> dict[str, Any]:
    """Versions of Python, of the packages that decide results, and the kind of machine."""
    import jax

    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "git_commit": git_commit(),
        "packages": {name: _package_version(name) for name in PACKAGES},
    }


def git_commit() -> str | None:
    """The commit of the checkout that this file is in, "+" after it where files differ from it."""
    here = Path(__file__).parent
    commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "-uno"])
    try:
        commit, changes = (
            subprocess.run(
                command, cwd=here, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.SubprocessError):
        return None  # installed from a wheel, or there is no git
    return commit + "+" * bool(changes)


def _package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
