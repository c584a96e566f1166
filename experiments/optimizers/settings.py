"""From settings to an optimizer: what of them it takes, and what it does not."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from experiments.optimizers.config import Config
from experiments.run.errors import UsageError, suggestion
from experiments.run.fields import flag
from experiments.run.optimizers import find_optimizer

# A setting of ours, and what it is called in optax or in optim.
ARGUMENTS = {
    "momentum": "momentum",
    "b2": "b2",
    "density": "density",
    "gap": "update_gap",
    "projector": "projector",
    "scale": "scale",
    "kappa": "kappa",
}
# GaLore has optax's names for two of them.
GALORE = {"update_gap": "update_proj_gap", "dimension_numbers": "weight_dimension_numbers"}


def optimizer_of(config: Config, rate: Any, stacked: PyTree) -> optax.GradientTransformation:
    """The optimizer that the settings name.

    Args:
        config: with the optimizer's name and its settings.
        rate: the learning rate, a number or a schedule; it may be traced.
        stacked: which parameters are stacks of matrices, one a layer: a tree of booleans.

    Raises:
        UsageError: for a name that is no optimizer, or a setting that it does not have.
    """
    own = config.optimizer
    make = find_optimizer(own.name)
    takes = inspect.signature(make).parameters
    chosen: dict[str, Any] = {}
    for setting, name in ARGUMENTS.items():
        value = getattr(own, setting)
        if value is None:
            continue
        if GALORE.get(name) in takes:
            name = GALORE[name]
        if setting == "density" and name not in takes:
            # GaLore counts dimensions, and BAdam blocks: layers.
            for name, whole in (("rank", config.width), ("active", config.depth)):
                if name in takes:
                    value = max(round(value * whole), 1)
                    break
        if name not in takes:
            raise UsageError(f"{flag(setting)} {value}: {own.name} has no such setting")
        make_value = {"kappa": kappa_of, "projector": projector_of}.get(setting)
        chosen[name] = make_value(value) if make_value else value
    if "weight_decay" in takes:
        chosen["weight_decay"] = own.weight_decay
    elif own.weight_decay:
        raise UsageError(f"--weight-decay {own.weight_decay}: {own.name} has no weight decay")
    if "batch_axes" in takes:
        chosen["batch_axes"] = jax.tree.map(int, stacked)
    one = optax.contrib.MuonDimensionNumbers(1, 2)
    numbers = jax.tree.map(lambda yes: one if yes else None, stacked)
    for name in ("weight_dimension_numbers", "dimension_numbers"):
        if name in takes:
            chosen[name] = numbers
            break
    if "split" in takes:
        chosen["split"] = split_of(own.also_split, numbers)
    elif own.also_split is not None:
        raise UsageError(f"--also-split {own.also_split}: {own.name} has no such setting")
    return make(rate, **chosen)


def kappa_of(words: str) -> Any:
    """A function of optim.kappa from its name, with its number behind a colon if it has one.

    Raises:
        UsageError: for a name that there is not, or a number that is none.

    Example:
        >>> kappa_of("huber:0.5").problem
        'minimise f + (0.5 wd / 2) |x|^2 subject to max |x| <= 1/wd'
    """
    from optim import kappa

    name, colon, number = words.partition(":")
    known = {n: f for n, f in vars(kappa).items() if inspect.isfunction(f) and n[0] != "_"}
    if name not in known:
        raise UsageError(f"--kappa {words}: there is no such function{suggestion(name, known)}")
    try:
        numbers = [int(number) if number.isdigit() else float(number)] if colon else []
        return known[name](*numbers)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--kappa {words}: {error}") from error


def projector_of(name: str) -> Any:
    """A projector of optim.projector from its name."""
    from optim import projector

    found = getattr(projector, name, None)
    if found is None:
        raise UsageError(f"--projector {name}: optim has none of this name")
    return found()


def split_of(also: str | None, dimension_numbers: PyTree) -> Callable[[PyTree], PyTree]:
    """Parameters -> what is split: their linear weights, and the one at this path.

    Raises:
        UsageError: while it works, for a path that no parameter has.
    """
    from optim import linear_weights

    def split(params: PyTree) -> PyTree:
        leaves, structure = jax.tree_util.tree_flatten_with_path(params)
        paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
        if also is not None and also not in paths:
            raise UsageError(
                f"--also-split {also}: there is no such parameter{suggestion(also, paths)}"
            )
        usual = jax.tree.leaves(linear_weights(params, dimension_numbers))
        flags = [one or path == also for one, path in zip(usual, paths, strict=True)]
        return jax.tree.unflatten(structure, flags)

    return split
