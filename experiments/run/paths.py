"""Files and folders of settings, looked at before anything is imported that takes time."""

import os
from pathlib import Path

from experiments.run.errors import UsageError


def exists(path: Path, subject: str) -> bool:
    """Whether there is something at a path.

    Args:
        path: of a file or folder.
        subject: what messages begin with, such as "--data texts".

    Raises:
        UsageError: where that cannot be told: a name is too long, or a folder is closed.

    Example:
        >>> exists(Path("/"), "--data /"), exists(Path("/there/is/none"), "--data /there/is/none")
        (True, False)
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{subject} cannot be read: {why}") from error
    return True


def check_there(path: Path, subject: str) -> None:
    """Raises UsageError where there is neither a file nor a folder, or it cannot be read."""
    if not exists(path, subject):
        raise UsageError(f"{subject}: there is no such file or folder")
    if not os.access(path, os.R_OK):
        raise UsageError(f"{subject} cannot be read: Permission denied")


def check_writable(folder: Path, subject: str) -> None:
    """Raises UsageError where a folder is none, or cannot be made where it is to be.

    Example:
        >>> check_writable(Path("/dev/null/run"), "--run-dir /dev/null/run")
        Traceback (most recent call last):
        experiments.run.errors.UsageError: --run-dir /dev/null/run cannot be written to: /dev/null is no ...
    """
    here = folder.absolute()
    while not exists(here, subject) and here != here.parent:
        here = here.parent
    if not here.is_dir():
        raise UsageError(f"{subject} cannot be written to: {here} is no folder")
    if not os.access(here, os.W_OK | os.X_OK):
        raise UsageError(f"{subject} cannot be written to: {here}: Permission denied")
