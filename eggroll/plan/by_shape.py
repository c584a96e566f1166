"""Plans by shapes alone."""

from jaxtyping import PyTree

from eggroll.plan._settle import Overrides, Planner, Rank, settle
from eggroll.plan.leaf import Plan, Shape
from eggroll.plan.treatments import Dense, Matrix, Treatment


def by_shape(overrides: Overrides | None = None) -> Planner:
    """Plans by shapes alone.

    Two axes are a matrix; of more, the last is the columns and the rest are the rows; vectors and
    scalars get dense noise. A matrix whose factors would be no smaller than itself, that is
    ``rank (m + n) >= m n``, gets dense noise too.

    Args:
      overrides: treatments by path pattern (``fnmatch`` on paths such as
        ``"params/Dense_0/kernel"``); of several that match, the last counts. Beside float leaves one in
        int8 is trained only where an override is its very path: a quantised matrix, with noise of floats,
        whose sigma is in its own steps.

    Returns:
      A planner, for ``EvolutionStrategy(plan=...)``.

    Raises:
      ValueError: (when used) for a pattern that matches nothing, axes that do not partition the
        parameter's, or a named rank above a side.

    Example:
      >>> import jax.numpy as jnp
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
