"""What ends a run early, told in one sentence, and the exit code that goes with it."""

import difflib
from collections.abc import Iterable

# sysexits.h calls it EX_TEMPFAIL: nothing is wrong, the same command again will go on.
RUN_ME_AGAIN = 75


class UsageError(ValueError):
    """A wrong command or setting; the command line prints its sentence and exits with code 2."""


class InUse(UsageError):
    """A folder that another process holds: nothing is wrong with the settings, only with the moment."""


class RunError(RuntimeError):
    """Something outside the settings stops a run, such as a full disk; exit code 1."""


class Interrupted(Exception):
    """A run was asked to stop, and has saved what it needs to go on; exit code 75."""


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """The ending of an error sentence: the closest known names, if any.

    Example:
        >>> suggestion("cartpol", ["cartpole", "pendulum"])
        "; did you mean 'cartpole'?"
        >>> suggestion("xyz", ["cartpole"])
        ''
    """
    close = difflib.get_close_matches(wrong, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
