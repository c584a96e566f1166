"""From settings to an optimizer: what of them it takes, and what it does not."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from experiments.optimizers.config import Config, Projector, check_kappa
from experiments.run.errors import UsageError, suggestion
from experiments.run.optimizers import make_optimizer, signature_of


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
    chosen = own.arguments(config.width, config.depth)
    for setting, make_value in (("kappa", kappa_of), ("projector", projector_of)):
        if setting in chosen:
            chosen[setting] = make_value(chosen[setting])
    takes = signature_of(own.name).names
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
    return make_optimizer(own.name, rate, **chosen)


def kappa_of(words: str) -> Any:
    """A function of optim.kappa from its name, with its number behind a colon if it has one.

    Raises:
        UsageError: for a name that there is not, or a number that is none.

    Example:
        >>> kappa_of("huber:0.5").problem
        'minimise f + (0.5 wd / 2) |x|^2 subject to max |x| <= 1/wd'
    """
    from optim import kappa

    check_kappa(words)
    name, _, number = words.partition(":")
    numbers = [int(number) if number.isdigit() else float(number)] if number else []
    try:
        found: Any = getattr(kappa, name)(*numbers)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--kappa {words}: {error}") from error
    return found


def projector_of(name: Projector) -> Any:
    """A projector of optim.projector from its name."""
    from optim import projector

    return getattr(projector, name)()


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
