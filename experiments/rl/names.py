"""Names of environments, checked before anything is imported that takes time."""

import ast
import functools
import importlib.util
from pathlib import Path

from experiments.rl.libraries import LIBRARIES, own
from experiments.run import own_code
from experiments.run.errors import UsageError, suggestion


def check(name: str) -> None:
    """Raises UsageError for a name of no environment, and for a file of one's own that is not there.

    Example:
        >>> check("Pendulum-v1"), check("gymnasium:Acrobot-v1")
        (None, None)
        >>> check("Pendulum")
        Traceback (most recent call last):
        experiments.run.errors.UsageError: gymnax has no environment 'Pendulum'; did you mean ...
    """
    library, colon, inner = name.partition(":")
    if own.is_own(name):
        own_code.check(name, f"--env {name}")
    elif library == "gymnasium":
        _check_outside(inner)
    elif colon and library not in LIBRARIES:
        raise UsageError(
            f"--env {name}: expected one of {', '.join(LIBRARIES)} or FILE.py before the colon, "
            f"got {library!r}{suggestion(library, LIBRARIES)}"
        )
    elif gymnax_names() and name.removeprefix("gymnax:") not in gymnax_names():
        raise unknown(name, gymnax_names())


def unknown(name: str, known: tuple[str, ...]) -> UsageError:
    """The error for a name that gymnax does not have."""
    return UsageError(
        f"gymnax has no environment {name!r}{suggestion(name, known)}; "
        "eggroll rl --list-envs names them"
    )


@functools.cache
def gymnax_names() -> tuple[str, ...]:
    """The environments of gymnax, read in its source; none where they are not found there.

    gymnax itself imports JAX.
    """
    spec = importlib.util.find_spec("gymnax")
    file = Path(spec.origin).parent / "registration.py" if spec and spec.origin else None
    if file is None or not file.exists():
        return ()
    found: list[str] = []
    for node in ast.parse(file.read_text("utf-8")).body:
        # One list of names; what else is a list there has other things in it.
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List):
            values = [one.value for one in node.value.elts if isinstance(one, ast.Constant)]
            found += [value for value in values if isinstance(value, str)]
    return tuple(found)


def _check_outside(name: str) -> None:
    """Raises UsageError where Gymnasium has no such environment, unless another package may add it."""
    if "/" in name or ":" in name or importlib.util.find_spec("gymnasium") is None:
        return
    import gymnasium

    if name not in gymnasium.registry:
        known = [one for one in gymnasium.registry if "/" not in one]
        raise UsageError(
            f"Gymnasium has no environment {name!r}{suggestion(name, known)}; "
            "eggroll rl --list-envs names them"
        )
