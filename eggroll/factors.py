"""The low-rank noise of one member as factors, which is what an adapter (LoRA) of the mean holds."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from eggroll.inputs import Generation
from eggroll.perturbation import draw, perturb
from eggroll.values import LowRank


class Factors(NamedTuple):
    """The noise of a member for one parameter: ``scale * sum_r a[r] * b[r]``.

    Attributes:
      a: ``[rank, *axes]``; ``axes`` are those of the parameter, of size 1 along its columns.
      b: ``[rank, *axes]``, of size 1 along the rows.
      scale: ``sign * sigma * factor * sqrt(subspaces) / sqrt(rank)``, where ``factor`` is the plan's factor
        on sigma for the parameter; float32 ``[]``. Factors on sigma that vary along axes, such as one a
        layer of a stack, are in ``b``, or in ``a`` where they vary along the rows. Outside the member's
        subspace, ``b`` is 0 where columns are divided, and ``a`` where rows are.
    """

    a: Float[Array, "rank ..."]
    b: Float[Array, "rank ..."]
    scale: Float[Array, ""]


def factors_of(g: Generation, params: PyTree, i: Int[Array, ""]) -> dict[str, Factors]:
    """The factors of a member's noise by path; parameters without noise are left out.

    Args:
      g: the coming generation.
      params: the mean.
      i: index of the member; may be traced.

    Raises:
      ValueError: a parameter has noise without factors.
    """
    if g.arithmetic.exact_sums:
        raise ValueError("the parameters are int8: their noise has no factors in floats")
    sign = (1 - 2 * (i % 2)).astype(g.arithmetic.sign_type)
    drawn = draw(g.plan, g.noise, g.seed, g.epoch, i // 2)
    lazy = perturb(g.plan, params, drawn, g.noise_sigma, sign)
    found = {}
    values = jax.tree.leaves(lazy, is_leaf=lambda value: isinstance(value, LowRank))
    for leaf, noise, value in zip(g.plan.leaves, drawn, values, strict=True):
        if noise and leaf.dtype == jnp.int8:
            raise ValueError(
                f"parameter {leaf.path!r} is int8, and its noise is in units of its quantisation step: must "
                "be a float parameter"
            )
        if isinstance(value, LowRank):
            a, b = value.factors
            found[leaf.path] = Factors(a, b, value.scale)
        elif noise:
            raise ValueError(
                f"parameter {leaf.path!r} has dense noise, which has no factors: must have low-rank noise"
            )
    return found
