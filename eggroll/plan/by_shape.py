"""Plans from shapes alone."""

from jaxtyping import PyTree

from eggroll.plan._settle import Overrides, Planner, Rank, settle
from eggroll.plan.leaf import Plan, Shape
from eggroll.plan.treatments import Dense, Matrix, Treatment


def by_shape(overrides: Overrides | None = None) -> Planner:
    """Plans from shapes alone.

    A parameter with two axes is a matrix. With more axes, the last axis is the columns and the
    others are the rows. Vectors and scalars get dense noise. So does a matrix whose factors would
    be no smaller than the matrix, ``rank (m + n) >= m n``.

    Args:
      overrides: treatments by path pattern (``fnmatch`` on paths such as
        ``"params/Dense_0/kernel"``); the last matching pattern wins. Beside float leaves, an int8
        leaf is trained only if a pattern equals its path. It is then a quantised matrix with float
        noise, and sigma is in units of its quantisation step.

    Returns:
      A planner, for ``EvolutionStrategy(plan=...)``.

    Raises:
      ValueError: (from the planner) a pattern matches no parameter, axes do not partition the axes
        of the parameter, or the rank of an override is larger than a side of the matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> from eggroll import Frozen
      >>> params = {"kernel": jnp.zeros((64, 32)), "bias": jnp.zeros(32)}
      >>> plan = by_shape({"bias": Frozen()})(params, rank=1)
      >>> plan["kernel"].treatment
      Matrix(rows=(0,), columns=(1,), batch=(), rank=1, sigma=1.0)
      >>> plan["bias"].treatment
      Frozen()
    """

    def planner(params: PyTree, rank: Rank) -> Plan:
        return settle(params, rank, _propose_by_shape, overrides or {})

    return planner


def _propose_by_shape(path: str, shape: Shape) -> tuple[Treatment, str]:
    if len(shape) < 2:
        return Dense(), "vector" if shape else "scalar"
    last = len(shape) - 1
    return Matrix(rows=tuple(range(last)), columns=last), "by shape"
