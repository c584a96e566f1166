"""Turns the proposed treatment of every parameter into a plan: overrides, ranks, checks."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax.numpy as jnp
from jaxtyping import PyTree

from eggroll._types import IsArray
from eggroll.arithmetic import FLOATS, INTEGERS, QUANTISED, Arithmetic
from eggroll.plan.leaf import Leaf, Plan, Shape
from eggroll.plan.parameters import is_complex, leaf_paths, matches, trained_type
from eggroll.plan.treatments import Dense, Frozen, Given, Matrix, Treatment

Rank = int | Literal["full"]

# Makes a plan from parameters and the rank of a strategy.
Planner = Callable[[PyTree, Rank], Plan]

# Treatments by path pattern. Not Mapping[str, Treatment]: `_check_overrides` refuses a value that
# is not a treatment with a message.
Overrides = Mapping[str, object]

# Proposes a treatment for a path and a shape, with a reason.
Propose = Callable[[str, Shape], tuple[Treatment, str]]


def settle(params: PyTree, rank: Rank, propose: Propose, overrides: Overrides) -> Plan:
    """The plan of parameters, from a proposal for every leaf and the overrides.

    Args:
      params: a tree of arrays or ``jax.ShapeDtypeStruct``.
      rank: the rank of the strategy.
      propose: proposes a treatment for a trained leaf.
      overrides: treatments by path pattern; the last matching pattern wins.

    Raises:
      ValueError: an override or a leaf is wrong, or no leaf is trained.
    """
    leaves, is_trained = leaf_paths(params), trained_type(params)
    _check_overrides(overrides, [path for path, _ in leaves])
    plan = []
    for path, leaf in leaves:
        shape = tuple(leaf.shape)
        trained, named = is_trained(leaf), None
        treatment, reason = _proposed(path, leaf, trained, propose)
        for pattern, chosen in overrides.items():
            if not matches(path, pattern):
                continue
            assert isinstance(chosen, Treatment)
            # A pattern with wildcards applies to trained leaves; a quantised matrix must be named.
            exact = leaf.dtype == jnp.int8 and pattern == path
            if trained or exact or is_complex(leaf):
                named, treatment, reason = pattern, chosen, f"override {pattern!r}"
        if is_complex(leaf) and not (named and isinstance(treatment, Frozen)):
            raise ValueError(
                f"parameter {path!r} is {leaf.dtype}: must be real (store real and imaginary parts "
                "as two float arrays), or eggroll.Frozen() in the plan's overrides"
            )
        if isinstance(treatment, Matrix):
            treatment, reason = _settle_matrix(path, shape, treatment, rank, reason)
        arithmetic = _arithmetic_of(leaf, trained, treatment)
        plan.append(Leaf(path, shape, leaf.dtype, treatment, reason, arithmetic, named is not None))
    if not any(leaf.trainable for leaf in plan):
        kinds = {leaf.path: str(leaf.dtype) for leaf in plan}
        raise ValueError(
            "params: expected at least one float or int8 array that is not frozen, got the dtypes "
            f"{kinds}"
        )
    return Plan(tuple(plan))


def _proposed(path: str, leaf: IsArray, trained: bool, propose: Propose) -> tuple[Treatment, str]:
    if trained:
        return propose(path, tuple(leaf.shape))
    return Frozen(), f"{leaf.dtype}: passes through"


def _arithmetic_of(leaf: IsArray, trained: bool, treatment: Treatment) -> Arithmetic:
    if leaf.dtype != jnp.int8:
        return FLOATS
    beside_floats = not trained and not isinstance(treatment, Frozen)
    return QUANTISED if beside_floats else INTEGERS


def _check_overrides(overrides: Overrides, paths: Sequence[str]) -> None:
    for pattern, chosen in overrides.items():
        if not any(matches(path, pattern) for path in paths):
            raise ValueError(f"override {pattern!r}: must match a parameter, one of {list(paths)}")
        if not isinstance(chosen, Treatment):
            raise ValueError(
                f"override {pattern!r}={chosen!r}: must be an eggroll.Matrix, Dense, Nodes, Given or Frozen"
            )
        if not isinstance(chosen, Frozen | Given) and not (
            math.isfinite(chosen.sigma) and chosen.sigma > 0
        ):
            raise ValueError(
                f"override {pattern!r}: sigma={chosen.sigma!r}: must be a positive number (for no "
                "noise, use eggroll.Frozen())"
            )


def _settle_matrix(
    path: str, shape: Shape, matrix: Matrix, rank: Rank, reason: str
) -> tuple[Treatment, str]:
    groups = (matrix.rows, matrix.columns, matrix.batch)
    axes = [
        a % len(shape) if -len(shape) <= a < len(shape) else a for group in groups for a in group
    ]
    if sorted(axes) != list(range(len(shape))):
        raise ValueError(
            f"parameter {path!r}: rows={matrix.rows}, columns={matrix.columns}, "
            f"batch={matrix.batch}: must name each of the {len(shape)} axes of the shape "
            f"{list(shape)} once"
        )
    wrap = lambda group: tuple(a % len(shape) for a in group)
    matrix = dataclasses.replace(
        matrix, rows=wrap(matrix.rows), columns=wrap(matrix.columns), batch=wrap(matrix.batch)
    )
    m = math.prod(shape[a] for a in matrix.rows)
    n = math.prod(shape[a] for a in matrix.columns)
    if matrix.rank is not None:
        if not isinstance(matrix.rank, int) or not 1 <= matrix.rank <= min(m, n):
            raise ValueError(
                f"parameter {path!r}: rank={matrix.rank!r}: must be an integer from 1 to "
                f"{min(m, n)}, since its matrix is {m} x {n}"
            )
        return matrix, reason
    if rank == "full":
        return Dense(matrix.sigma), "rank='full'"
    if rank * (m + n) >= m * n:
        return Dense(matrix.sigma), f"rank {rank} of {m} x {n} is no smaller than dense"
    return dataclasses.replace(matrix, rank=rank), reason
