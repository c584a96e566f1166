"""Names of environments, checked before anything is imported that takes time."""

import ast
import functools
import importlib.util
from pathlib import Path

from experiments.rl.libraries import named, own, unknown
from experiments.run import own_code


def check(name: str) -> None:
    """Raises UsageError for a name of no environment, and for a file of one's own that is not there.

    Example:
        >>> check("Pendulum-v1"), check("gymnasium:Acrobot-v1")
        (None, None)
        >>> check("Pendulum")
        Traceback (most recent call last):
        experiments.run.errors.UsageError: gymnax has no environment 'Pendulum'; did you mean ...
    """
    if own.in_file(name):
        own_code.check(name, f"--env {name}")
        return
    library, inner = named(name)
    # Other libraries say so themselves, when they make an environment.
    if library == "gymnasium":
        _check_gymnasium(inner)
    elif library == "gymnax" and gymnax_names() and inner not in gymnax_names():
        raise unknown("gymnax", inner, gymnax_names())


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


def _check_gymnasium(name: str) -> None:
    """Raises UsageError where Gymnasium has no such environment, unless another package may add it."""
    if "/" in name or ":" in name or importlib.util.find_spec("gymnasium") is None:
        return
    import gymnasium

    if name not in gymnasium.registry:
        raise unknown("Gymnasium", name, [one for one in gymnasium.registry if "/" not in one])
