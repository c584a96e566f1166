"""Plans whose sigma differs from parameter to parameter: by given factors, or by the parameters' RMS.

Factors are numbers on the host, made once from the parameters that training begins with. A planner does
not compute them from its argument: a program traces the planner with arrays that change from generation
to generation, and settings are often planned from shapes alone. Resumed runs and all hosts agree because
they start from the same parameters.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from eggroll.arithmetic import INTEGERS
from eggroll.plan._settle import Planner, Rank
from eggroll.plan.leaf import Leaf, Plan, Slices
from eggroll.plan.parameters import is_float, leaf_paths, matches, unmatched
from eggroll.plan.treatments import Frozen, Given, Matrix, Nodes

# A factor on sigma: a number, or an array with the axes of a parameter.
Factor = float | np.ndarray

# Wider than the documented types: a wrong value is refused with a message.
Floor = Any
Factors = Mapping[str, Any]

# The entries that a root mean square converts to float64 at a time.
BLOCK = 2**20


def relative(planner: Planner, params: PyTree, floor: Floor = None) -> Planner:
    """A plan whose sigma is relative to the size of each parameter.

    The sigma of every perturbed parameter is multiplied by its RMS in ``params``, so that a sigma of 0.01
    moves every parameter by about 1 percent. Matrices in a stack (with batch axes) have one RMS each;
    other parameters have one as a whole. ``relative(planner, params)`` is
    ``scaled(planner, rms_of(planner, params))``.

    Args:
      planner: chooses the treatments.
      params: the parameters that training begins with, not a later state's: arrays on this host.
      floor: as in :func:`rms_of`.

    Returns:
      A planner, for ``EvolutionStrategy(plan=...)``.

    Raises:
      ValueError: as in :func:`rms_of` and :func:`scaled`.

    Example:
      >>> import jax.numpy as jnp
      >>> from eggroll.plan import by_shape
      >>> params = {"large": jnp.full((8, 8), 2.0), "small": jnp.full((8, 8), 0.5)}
      >>> plan = relative(by_shape(), params)(params, rank=1)
      >>> plan["large"].sigma, plan["small"].sigma
      (2.0, 0.5)
    """
    return scaled(planner, rms_of(planner, params, floor))


def rms_of(planner: Planner, params: PyTree, floor: Floor = None) -> dict[str, Factor]:
    """The root mean square of every perturbed parameter, as factors for :func:`scaled`.

    The result is a pure function of the values, computed on the host in float64 and rounded to four
    digits, so that processes whose sums round differently agree. A quantised model has its sigma in steps
    of its int8 matrices: give this function the float model, or write the factors by hand.

    Args:
      planner: says which parameters are perturbed, and which axes are batch axes.
      params: arrays on this host, before they are divided over a mesh of several hosts.
      floor: the smallest RMS; a positive number. None: a parameter or a slice of zeros has the median of
        the other parameters' RMS, and no other RMS is raised.

    Returns:
      For the path of each perturbed parameter a number, or for a :class:`~eggroll.Matrix` with batch axes
      float64 with the axes of the parameter, of size 1 along rows and columns.

    Raises:
      ValueError: a parameter is abstract, traced, on another host, not finite or int8; all are zero and
        ``floor`` is None; or ``floor`` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from eggroll.plan import by_shape
      >>> stack = Matrix(rows=1, columns=2, batch=0)
      >>> layers = jnp.array([1.0, 3.0])[:, None, None] * jnp.ones((2, 8, 8))
      >>> rms = rms_of(by_shape({"layers": stack}), {"layers": layers, "bias": jnp.zeros(8)})
      >>> rms["layers"].ravel().tolist(), rms["bias"]
      ([1.0, 3.0], 2.236)
    """
    if floor is not None and not (isinstance(floor, int | float) and 0 < floor < math.inf):
        raise ValueError(f"floor={floor!r}: must be a positive number, or None")
    found: dict[str, np.ndarray] = {}
    leaves: dict[str, Any] = dict(leaf_paths(params))
    for leaf in planner(params, 1).leaves:
        if leaf.sigma and math.prod(leaf.shape):
            found[leaf.path] = _mean_square(leaf, leaves[leaf.path])
    wholes = [math.sqrt(x.mean()) for x in found.values() if x.any()]
    if not wholes and floor is None and found:
        raise ValueError(
            f"params: expected a perturbed parameter with an entry that is not 0, got zeros in "
            f"{list(found)}; give floor=, the RMS of such parameters"
        )
    least = float(np.median(wholes)) if floor is None else floor

    def of(squares: np.ndarray) -> Factor:
        rms = np.sqrt(squares)
        rms = np.where(rms > 0, rms, least) if floor is None else np.maximum(rms, floor)
        rounded = np.reshape([_four_digits(x) for x in rms.flat], rms.shape)
        return rounded if rounded.size > 1 else rounded.item()

    return {path: of(squares) for path, squares in found.items()}


def scaled(planner: Planner, factors: Factors) -> Planner:
    """A plan whose sigma is multiplied by a factor for each parameter.

    Args:
      planner: chooses the treatments; their own factors on sigma stay.
      factors: for every perturbed parameter a positive number, by path or by a pattern as in
        :func:`by_shape`; an exact path counts before patterns, and the last matching pattern before
        others. Or an array with the axes of the parameter, of size 1 where the factor does not vary: for
        low-rank noise it may vary along rows and batch axes or along columns and batch axes. Int8
        parameters of integer models take powers of two. Paths of frozen parameters are ignored.

    Returns:
      A planner, for ``EvolutionStrategy(plan=...)``. Parameters may be abstract
      (``jax.ShapeDtypeStruct``).

    Raises:
      ValueError: (from the planner) a path or pattern matches no parameter, a perturbed parameter has no
        factor, or a factor is not positive or has a wrong shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from eggroll.plan import by_shape
      >>> params = {"w": jnp.zeros((8, 8)), "b": jnp.zeros(8)}
      >>> plan = scaled(by_shape(), {"*": 1.0, "w": 0.25})(params, rank=1)
      >>> plan["w"].sigma, plan["b"].sigma
      (0.25, 1.0)
    """

    def planner_of(params: PyTree, rank: Rank) -> Plan:
        plan = planner(params, rank)
        paths = [leaf.path for leaf in plan.leaves]
        patterns = [name for name in factors if name not in set(paths)]
        for pattern in patterns:
            if not any(matches(path, pattern) for path in paths):
                raise ValueError(unmatched("factor", pattern, paths))

        def factor_of(leaf: Leaf) -> Any:
            if leaf.path in factors:
                return factors[leaf.path]
            for pattern in reversed(patterns):
                if matches(leaf.path, pattern):
                    return factors[pattern]
            raise ValueError(
                f"parameter {leaf.path!r}: must have a factor on sigma, since it is perturbed (a factor "
                "'*': 1.0 leaves the others as they are)"
            )

        return Plan(
            tuple(_times(leaf, factor_of(leaf)) if leaf.sigma else leaf for leaf in plan.leaves)
        )

    return planner_of


def _mean_square(leaf: Leaf, w: Any) -> np.ndarray:
    """The mean square of a parameter, float64 with its axes; of size 1 along all but batch axes."""
    if isinstance(w, jax.ShapeDtypeStruct | jax.core.Tracer):
        raise ValueError(
            f"parameter {leaf.path!r} is {type(w).__name__}: must be an array with values, since its size "
            "is measured once, before any program is traced"
        )
    if isinstance(w, jax.Array) and not w.is_fully_addressable:
        raise ValueError(
            f"parameter {leaf.path!r} is divided over several hosts: must be an array of this host, so "
            "measure parameters before they are placed"
        )
    if not is_float(leaf):
        raise ValueError(
            f"parameter {leaf.path!r} is {leaf.dtype}: must be a float array, since noise of an integer is "
            "in its own steps; give factors by eggroll.plan.scaled(planner, factors)"
        )
    batch = leaf.treatment.batch if isinstance(leaf.treatment, Matrix) else ()
    rest = [axis for axis in range(len(leaf.shape)) if axis not in batch]
    flat = np.transpose(np.asarray(w), (*batch, *rest))
    flat = flat.reshape(math.prod(leaf.shape[axis] for axis in batch), -1)
    squares = np.array([_mean_square_of(row) for row in flat])
    if not np.isfinite(squares).all():
        raise ValueError(f"parameter {leaf.path!r}: must be finite to have a size")
    moved = squares.reshape([*(leaf.shape[axis] for axis in batch), *(1 for _ in rest)])
    return np.transpose(moved, np.argsort([*batch, *rest]))


def _mean_square_of(x: np.ndarray) -> float:
    """The mean square of a vector, a block at a time, since a model may fill the memory."""
    blocks = (x[i : i + BLOCK].astype(np.float64) for i in range(0, x.size, BLOCK))
    return math.fsum(float(np.sum(block * block)) for block in blocks) / x.size


def _four_digits(x: float) -> float:
    return float(f"{x:.4g}")


def _times(leaf: Leaf, factor: Any) -> Leaf:
    """The leaf with its sigma multiplied.

    Raises:
      ValueError: the factor is wrong.
    """
    array = np.asarray(factor, np.float64)
    wrong = array[~(np.isfinite(array) & (array > 0))]
    if wrong.size or not array.size:
        raise ValueError(
            f"parameter {leaf.path!r}: factor {wrong.tolist()[0] if wrong.size else factor!r}: must be a "
            "positive number (for no noise, use eggroll.plan.without)"
        )
    if array.ndim and (
        array.ndim != len(leaf.shape)
        or any(k not in (1, n) for k, n in zip(array.shape, leaf.shape, strict=True))
    ):
        raise ValueError(
            f"parameter {leaf.path!r}: expected a factor that is a number, or an array with the axes of "
            f"{list(leaf.shape)} of size 1 where it does not vary, got the shape {list(array.shape)}"
        )
    exact = leaf.arithmetic == INTEGERS
    if exact and (array.size > 1 or math.frexp(array.item())[0] != 0.5):
        raise ValueError(
            f"parameter {leaf.path!r} is int8: factor {array.tolist()}: must be a power of two, since sigma "
            "is a shift"
        )
    if array.size == 1:
        return _with_sigma(leaf, leaf.sigma * array.item(), leaf.slices)
    whole = array * (1.0 if leaf.slices is None else leaf.slices.array)
    rms = math.sqrt(np.mean(np.square(whole)))
    slices = Slices(whole.shape, tuple((whole / rms).ravel().tolist()))
    scaled = _with_sigma(leaf, leaf.sigma * rms, slices)
    if isinstance(leaf.treatment, Nodes):
        raise ValueError(
            f"parameter {leaf.path!r} has node noise: expected a factor that is a number, got the shape "
            f"{list(array.shape)}"
        )
    if scaled.sliced is None:
        t = leaf.treatment
        assert isinstance(t, Matrix)
        raise ValueError(
            f"parameter {leaf.path!r}: factors of the shape {list(whole.shape)}: must not vary along both "
            f"rows {t.rows} and columns {t.columns}, since low-rank noise is a product of two factors"
        )
    return scaled


def _with_sigma(leaf: Leaf, sigma: float, slices: Slices | None) -> Leaf:
    assert not isinstance(leaf.treatment, Frozen | Given)
    treatment = dataclasses.replace(leaf.treatment, sigma=sigma)
    return dataclasses.replace(leaf, treatment=treatment, slices=slices)
