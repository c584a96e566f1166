"""Optimizers by name: those of optax, and this project's own as "optim.NAME"."""

import inspect
from collections.abc import Callable
from typing import Any

import optax

from experiments.run.errors import UsageError, suggestion


def make_optimizer(name: str, learning_rate: Any, **settings: Any) -> optax.GradientTransformation:
    """The optimizer called `name`, with its defaults beside the learning rate.

    Args:
        name: such as "adam", "sgd" (optax) or "optim.lion" (this project).
        learning_rate: a number or a schedule.
        **settings: further arguments of the optimizer.

    Raises:
        UsageError: for a name that is no optimizer, with the nearest ones.

    Example:
        >>> make_optimizer("adam", 1e-2).init({"w": 0.0})[0].count.item()
        0
    """
    return find_optimizer(name)(learning_rate, **settings)


def decayed(value: Any, decay: Any) -> Any:
    """A learning rate or a sigma that is multiplied by `decay` after every step: a number, or a schedule.

    Example:
        >>> decayed(0.5, 1.0), decayed(0.5, 0.1)(2)
        (0.5, 0.005000000000000001)
    """
    undecayed = isinstance(decay, int | float) and decay == 1
    return value if undecayed else lambda count: value * decay**count


def find_optimizer(name: str) -> Callable[..., optax.GradientTransformation]:
    """The function that makes the optimizer called `name`; its first argument is the learning rate.

    Raises:
        UsageError: for a name that is no optimizer, with the nearest ones.
    """
    package, _, short = name.rpartition(".")
    found: Any = None
    if package == "optim":
        import optim

        known = {n: getattr(optim, n) for n in optim.__all__}
    else:
        known = vars(optax)
    found = known.get(short) if package in ("", "optim") else None
    names = [n for n, f in known.items() if takes_learning_rate(f)]
    if short not in names or found is None:
        where = "optim" if package == "optim" else "optax"
        raise UsageError(
            f"--optimizer {name}: {where} has no such optimizer{suggestion(short, names)}"
        )
    return found


def takes_learning_rate(f: Any) -> bool:
    """Whether f is an optimizer of the kind that optax calls an alias."""
    if not inspect.isfunction(f) or f.__name__.startswith(("_", "scale_by")):
        return False
    return next(iter(inspect.signature(f).parameters), "") == "learning_rate"
