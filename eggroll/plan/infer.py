"""Plans from the uses of each parameter's axes in a traced fitness."""

from collections.abc import Callable

from jaxtyping import PyTree

from eggroll.plan._settle import Overrides, Planner, Rank, settle
from eggroll.plan.axis_uses import AxisUses, trace_axis_uses
from eggroll.plan.leaf import Plan, Shape
from eggroll.plan.parameters import leaf_paths, trained_type
from eggroll.plan.treatments import Dense, Matrix, Treatment


def infer(
    fitness: Callable[..., PyTree],
    params: PyTree,
    *args: PyTree,
    members: PyTree = None,
    overrides: Overrides | None = None,
) -> Planner:
    """Plans from the operations of the fitness on each parameter.

    The fitness is traced once, abstractly, and every axis of every parameter is followed to the
    products that it enters. Contracted axes are rows; free axes are columns. Scanned, batched and
    indexed axes (of a stack) are batch axes: each index gets independent noise. A parameter that
    enters no product gets dense noise. An embedding table is indexed along its rows.

    Args:
      fitness: ``fitness(params, key, [member,] *args)``.
      params: the parameters, or a tree of ``jax.ShapeDtypeStruct``.
      *args: the trees that the fitness receives beside the parameters.
      members: as in ``EvolutionStrategy.evaluate`` (leading axis [population]).
      overrides: as in :func:`by_shape`.

    Returns:
      A planner, for ``EvolutionStrategy(plan=...)``.

    Raises:
      ValueError: (from the planner) the parameters differ from those of the trace, or an override
        is wrong, as in :func:`by_shape`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def fitness(params, key, x):
      ...     layer = lambda x, w: (jnp.tanh(x @ w), None)
      ...     return jax.lax.scan(layer, x, params["layers"])[0].sum()
      >>> params = {"layers": jnp.zeros((12, 32, 32))}
      >>> infer(fitness, params, jnp.zeros((4, 32)))(params, rank=1)["layers"].treatment
      Matrix(rows=(1,), columns=(2,), batch=(0,), rank=1, sigma=1.0)
    """
    is_trained = trained_type(params)
    paths = [path if is_trained(leaf) else None for path, leaf in leaf_paths(params)]
    uses = trace_axis_uses(fitness, params, paths, args, members)

    def propose(path: str, shape: Shape) -> tuple[Treatment, str]:
        if path not in uses:
            raise ValueError(
                f"parameter {path!r}: must be a parameter of the traced fitness, one of "
                f"{sorted(uses)}"
            )
        if len(uses[path]) != len(shape):
            raise ValueError(
                f"parameter {path!r}: expected {len(uses[path])} axes as in the traced fitness, "
                f"got {len(shape)} in the shape {list(shape)}"
            )
        return _classify(shape, uses[path])

    def planner(params: PyTree, rank: Rank) -> Plan:
        return settle(params, rank, propose, overrides or {})

    return planner


def _classify(shape: Shape, uses: AxisUses) -> tuple[Treatment, str]:
    wide = [a for a, n in enumerate(shape) if n > 1]
    if len(wide) < 2:
        return Dense(), "vector" if shape else "scalar"
    if not any(uses[a] & {"contracted", "free"} for a in wide):
        rows = [a for a in wide if "indexed" in uses[a]]
        columns = [a for a in range(len(shape)) if a not in rows]
        if not rows or len(rows) == len(wide):
            return Dense(), "never in a product"
        return Matrix(rows, columns), "rows looked up"

    def is_batch(axis: int) -> bool:
        if uses[axis] & {"scanned", "batched"}:
            return True
        return "indexed" in uses[axis] and not uses[axis] & {"contracted", "free"}

    batch = [a for a in wide if is_batch(a)]
    rest = [a for a in range(len(shape)) if a not in batch]
    rows = [a for a in rest if "contracted" in uses[a] or "free" not in uses[a]]
    columns = [a for a in rest if a not in rows]
    if not any(a in wide for a in columns):
        both = [a for a in rows if "free" in uses[a]]
        if len(both) < 2:
            return Dense(), "only contracted as a whole"
        columns, rows = both[-1:], [a for a in rows if a != both[-1]]  # used as W and as W^T
    if not any(a in wide for a in rows):
        return Dense(), "never contracted"
    return Matrix(rows, columns, batch), "from the traced fitness"
