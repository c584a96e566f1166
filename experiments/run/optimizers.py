"""Optimizers by name: those of optax, and this project's own as "optim.NAME".

What there is, and which arguments it takes, is read in the sources of the two packages, so that a wrong
name is told before JAX is imported.
"""

import ast
import functools
import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.run.errors import UsageError, suggestion

if TYPE_CHECKING:
    import optax

# What begins a function that optax calls an alias; others that the packages export are no optimizers.
ALIAS = re.compile(r"^def ((?!scale_by)[a-z]\w*)\(\s*learning_rate\b", re.MULTILINE)
# Optimizers of optax that ask for more than a driver gives them: gradients, a state and parameters.
ASK_FOR_MORE = {
    "lbfgs": "it asks for values of the loss along a line, in every step",
    "polyak_sgd": "it asks for the value of the loss, in every step",
}
# Optimizers of optax whose learning rate is the same in every step.
ONE_RATE = ("optimistic_adam", "rprop", "sm3")
INSTEAD = "choose another one, such as adam, sgd or optim.lion"


class Signature(NamedTuple):
    """The arguments of a function; of an optimizer those beside its learning rate.

    Attributes:
        names: of all of them.
        needed: those without a default.
    """

    names: tuple[str, ...]
    needed: tuple[str, ...]


def make_optimizer(
    name: str, learning_rate: Any, **settings: Any
) -> "optax.GradientTransformation":
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


def find_optimizer(name: str) -> "Callable[..., optax.GradientTransformation]":
    """The function that makes the optimizer called `name`; its first argument is the learning rate.

    Raises:
        UsageError: for a name that is no optimizer, with the nearest ones.
    """
    signature_of(name)
    package, _, short = name.rpartition(".")
    found: Callable[..., optax.GradientTransformation] = getattr(
        importlib.import_module(package or "optax"), short
    )
    return found


def check_optimizer(name: str, scheduled: bool) -> None:
    """Raises UsageError for a name that is no optimizer, or one that drivers cannot use.

    Args:
        name: as in :func:`make_optimizer`.
        scheduled: whether the learning rate changes from step to step.

    Example:
        >>> check_optimizer("adam", scheduled=True)
        >>> check_optimizer("lbfgs", scheduled=False)
        Traceback (most recent call last):
        experiments.run.errors.UsageError: --optimizer lbfgs: it asks for values of the loss along a line, in
        every step; choose another one, such as adam, sgd or optim.lion
    """
    problem = ASK_FOR_MORE.get(name)
    if problem is None:
        needed = signature_of(name).needed
        if needed:
            problem = f"it needs {' and '.join(needed)}, which have no flag"
        elif scheduled and name in ONE_RATE:
            problem = "its learning rate is the same in every step, and here it changes"
    if problem is not None:
        raise UsageError(f"--optimizer {name}: {problem}; {INSTEAD}")


def signature_of(name: str) -> Signature:
    """The arguments of the optimizer called `name`, without importing it.

    Raises:
        UsageError: for a name that is no optimizer, with the nearest ones.

    Example:
        >>> signature_of("optim.badam").names[:3]
        ('update_gap', 'base', 'weight_decay')
    """
    package, _, short = name.rpartition(".")
    if package not in ("", "optim"):
        raise UsageError(
            f"--optimizer {name}: must be an optimizer of optax, such as adam, or of this project, such as "
            "optim.lion"
        )
    known = optimizers(package or "optax")
    if short not in known:
        where = package or "optax"
        raise UsageError(
            f"--optimizer {name}: {where} has no such optimizer{suggestion(short, known)}"
        )
    return Signature(*(names[1:] for names in _signatures(known[short])[short]))


@functools.cache
def optimizers(package: str) -> Mapping[str, Path]:
    """The optimizers that a package exports, each with the file that it is in; nothing is imported.

    Example:
        >>> sorted(optimizers("optim"))
        ['adamp', 'badam', 'frugal', 'galore', 'lion', 'lion_k', 'sgdp']
    """
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    top = Path(spec.origin)
    found: dict[str, Path] = {}
    for node in ast.parse(top.read_text("utf-8")).body:
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(
            f"{package}."
        ):
            continue
        file = top.parent.joinpath(*str(node.module).split(".")[1:]).with_suffix(".py")
        names = _aliases(file) if file.exists() else frozenset()
        found |= {one.name: file for one in node.names if one.name in names}
    return found


def functions_of(module: str) -> Mapping[str, Signature]:
    """The public functions of a module with their arguments, without importing it.

    Example:
        >>> functions_of("optim.kappa")["huber"].needed
        ('e',)
    """
    package, *inner = module.split(".")
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    file = Path(spec.origin).parent.joinpath(*inner).with_suffix(".py")
    return {name: one for name, one in _signatures(file).items() if name[0] != "_"}


@functools.cache
def _aliases(file: Path) -> frozenset[str]:
    return frozenset(ALIAS.findall(file.read_text("utf-8")))


@functools.cache
def _signatures(file: Path) -> Mapping[str, Signature]:
    """The functions of a file with their arguments."""
    found = {}
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            args, keywords = node.args.args, node.args.kwonlyargs
            needed = args[: len(args) - len(node.args.defaults)]
            pairs = zip(keywords, node.args.kw_defaults, strict=True)
            needed += [one for one, default in pairs if default is None]
            names = (tuple(one.arg for one in some) for some in ([*args, *keywords], needed))
            found[node.name] = Signature(*names)
    return found
