"""Which parameters evolve and at which sigma: the plan of a model as the settings change it."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

import eggroll
from eggroll.plan import Leaf, Plan, Planner
from eggroll.plan.parameters import matches, unmatched
from experiments.reasoning.config import Config
from experiments.run.errors import UsageError


def planner_of(config: Config, planner: Planner, params: Callable[[Array], PyTree]) -> Planner:
    """The plan of a model with `--only`, `--sigma-scale` and `--subspaces`.

    The factors of `--sigma-scale rms` are computed here, from the parameters that training begins with, so
    that a run that goes on and all processes of a run have the same ones.

    Args:
        config: the settings.
        planner: of the model.
        params: makes these parameters, from an array of the seed.

    Raises:
        UsageError: for a pattern of `--only` without a parameter to train, or parameters without a size.
    """
    if config.algorithm != "eggroll":
        return planner
    if config.only:
        shapes = jax.eval_shape(params, jnp.int32(0))
        planner = eggroll.plan.only(planner, paths_of(planner, shapes, config.only))
    if config.sigma_scale == "rms":
        try:
            planner = eggroll.plan.relative(planner, params(jnp.int32(config.seed)))
        except ValueError as error:
            raise UsageError(f"--sigma-scale rms: {error}") from error
    return planner if config.subspaces == 1 else eggroll.plan.subspaces(planner, config.subspaces)


def on_outputs(planner: Planner) -> Planner:
    """The plan of a model with node noise in place of the low-rank noise of its matrices.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.ones((8, 8)), "b": jnp.ones(8)}
        >>> plan = on_outputs(eggroll.plan.by_shape({"w": eggroll.Matrix(rows=0, columns=1)}))(params, 1)
        >>> plan["w"].treatment, plan["b"].treatment
        (Nodes(sigma=1.0), Dense(sigma=1.0))
    """

    def of(leaf: Leaf) -> Leaf:
        if not isinstance(leaf.treatment, eggroll.Matrix):
            return leaf
        return dataclasses.replace(leaf, treatment=eggroll.Nodes(leaf.sigma), reason="outputs")

    return lambda params, rank: Plan(tuple(map(of, planner(params, rank).leaves)))


def paths_of(planner: Planner, params: PyTree, patterns: Sequence[str]) -> list[str]:
    """The paths of trained parameters that match a pattern, by the whole path or by names in it.

    Args:
        planner: says which parameters are trained.
        params: arrays or their shapes.
        patterns: `fnmatch` on paths such as "layers/q_proj", or on one or more names in a row of a path.

    Raises:
        UsageError: for a pattern that matches no parameter, or none that is trained.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"layers": {"q_proj": jnp.ones((2, 8, 8)), "up_proj": jnp.ones((2, 8, 8))}}
        >>> paths_of(eggroll.plan.by_shape(), params, ["q_proj"])
        ['layers/q_proj']
    """
    leaves, found = planner(params, 1).leaves, dict[str, None]()
    for pattern in patterns:
        # A matrix in int8 is two parameters below its name.
        ways = (pattern, f"*/{pattern}", f"{pattern}/*", f"*/{pattern}/*")
        matched = [leaf for leaf in leaves if any(matches(leaf.path, way) for way in ways)]
        if not matched:
            paths = [leaf.path for leaf in leaves]
            raise UsageError(f"--only: {unmatched('pattern', pattern, paths)}")
        trained = [leaf.path for leaf in matched if leaf.trainable]
        if not trained:
            raise UsageError(
                f"--only {pattern}: must match a parameter that is trained, and {matched[0].path!r} is not; "
                "--trained embeddings, head or vectors adds such parameters"
            )
        found |= dict.fromkeys(trained)
    return list(found)
