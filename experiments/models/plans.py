"""Plans of language models: which groups of parameters evolution strategies train, and by which noise."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from jaxtyping import PyTree

from eggroll.plan import Dense, Frozen, Matrix, Plan, Planner, Treatment, leaf_paths
from experiments.models import quantised

Group = Literal["matrices", "embeddings", "head", "vectors"]
# The groups that are frozen unless they are named. The matrices of layers are always trained.
GROUPS = ("embeddings", "head", "vectors")


def by_group(
    group_of: Callable[[str], Group],
    train: Collection[str] = (),
    steps: Mapping[str, float] | None = None,
) -> Planner:
    """A plan by the groups of parameters.

    The matrices of the layers ``[layers, inputs, outputs]`` get low-rank noise, each layer its own. The rest
    is frozen, as arXiv 2511.16652 has it for language models, unless it is named: then the embeddings and
    the head get low-rank noise, and vectors dense noise.

    Args:
        group_of: the group of the parameter of a path in the float model.
        train: any of "embeddings", "head", "vectors".
        steps: of a quantised model, `quantised.steps(params)`.

    Raises:
        ValueError: for another name, and (when used) for the head of a model without one of its own, or a
            quantised model without steps.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"layers": {"up": jnp.ones((3, 8, 12))}, "norm": jnp.ones(8)}
        >>> group_of = lambda path: "vectors" if path == "norm" else "matrices"
        >>> leaves = by_group(group_of, train=["vectors"])(params, rank=1)
        >>> leaves["layers/up"].treatment, leaves["norm"].treatment
        (Matrix(rows=(1,), columns=(2,), batch=(0,), rank=1, sigma=1.0), Dense(sigma=1.0))
    """
    for name in train:
        if name not in GROUPS:
            raise ValueError(
                f"train must name some of {', '.join(map(repr, GROUPS))}, got {name!r}"
            )

    def treatment(path: str) -> Treatment:
        group = group_of(path)
        if group == "matrices":
            return Matrix(rows=1, columns=2, batch=0)
        if group not in train:
            return Frozen()
        return Dense() if group == "vectors" else Matrix(rows=0, columns=1)

    def planner(params: PyTree, rank: Any) -> Plan:
        paths = (
            path.removesuffix("/int8").removesuffix("/scale") for path, _ in leaf_paths(params)
        )
        if "head" in train and not any(group_of(path) == "head" for path in paths):
            raise ValueError(
                "train names 'head', but the head is the embedding: name 'embeddings' instead"
            )
        return quantised.planner(treatment, steps)(params, rank)

    return planner
