"""Mistakes of the person at the keyboard, told in one sentence."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A wrong command or setting; the command line prints its sentence and exits with code 2."""


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
