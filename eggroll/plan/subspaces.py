"""Plans that divide the population over disjoint random subspaces of the parameters."""

import dataclasses
import math
from typing import Any

from jaxtyping import PyTree

from eggroll.arithmetic import INTEGERS
from eggroll.plan._settle import Planner, Rank
from eggroll.plan.leaf import Leaf, Plan
from eggroll.plan.treatments import Nodes

# Wider than the documented type: a wrong value is refused with a message.
Count = Any


def subspaces(planner: Planner, count: Count = 4) -> Planner:
    """A plan whose members perturb one of several disjoint subspaces each (CoPES, arXiv 2608.02391).

    Each parameter is divided at random into ``count`` parts of the same size, up to one: a matrix by its
    rows or its columns, whichever are more, so that noise stays low rank; dense noise by its entries. The
    matrices of a stack are divided separately. Part g of all parameters is subspace g. Pair p perturbs
    subspace ``p % count`` alone, by ``sqrt(count)`` times sigma, so that the noise of a member has the same
    expected norm as without subspaces. Scores are shaped over all members, and one update has the
    estimates of all subspaces; for every entry it is the mean over the members that perturb the entry.

    The division is a pure function of the seed, the path and ``generation // noise_reuse``: it is drawn
    again with the noise. If scores are invalid, the divisor is still that of the valid members of all
    subspaces together.

    Args:
      planner: chooses the treatments.
      count: the number of subspaces, K; must divide the number of pairs. The paper finds 4 best of those it
        tried, and 8 worse. 1 returns the planner itself. For int8 parameters its square root must be a
        power of two.

    Returns:
      A planner, for ``EvolutionStrategy(plan=...)``.

    Raises:
      ValueError: ``count`` is not an integer of at least 1; (from the planner, unless ``count``
        is 1) a parameter has node noise, is divided already, or is int8 and ``count`` is not 4, 16 or 64;
        (from the strategy) ``count`` does not divide the number of pairs.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from eggroll import EvolutionStrategy
      >>> from eggroll.plan import by_shape
      >>> plan = subspaces(by_shape(), 4)
      >>> es = EvolutionStrategy(optimizer=optax.sgd(0.1), population=16, sigma=0.1, plan=plan)
      >>> state = es.init({"w": jnp.zeros((4, 8))}, 0)
      >>> columns = [(es.member(state, 2 * pair)["w"] != 0).any(0).nonzero()[0] for pair in range(4)]
      >>> sorted(jnp.concatenate(columns).tolist())
      [0, 1, 2, 3, 4, 5, 6, 7]
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"subspaces: count={count!r}: must be an integer of at least 1")
    if count == 1:
        return planner

    def planner_of(params: PyTree, rank: Rank) -> Plan:
        plan = planner(params, rank)
        return Plan(tuple(_divided(leaf, count) if leaf.sigma else leaf for leaf in plan.leaves))

    return planner_of


def _divided(leaf: Leaf, count: int) -> Leaf:
    if isinstance(leaf.treatment, Nodes):
        raise ValueError(
            f"parameter {leaf.path!r} has node noise, which has no subspaces: must have weight noise "
            "(eggroll.Matrix or Dense) or none"
        )
    if leaf.subspaces > 1:
        raise ValueError(
            f"parameter {leaf.path!r}: must be divided once, but the plan has {leaf.subspaces} subspaces "
            "already"
        )
    if leaf.arithmetic == INTEGERS and math.frexp(math.sqrt(count))[0] != 0.5:
        raise ValueError(
            f"parameter {leaf.path!r} is int8: subspaces: count={count}: must be 1, 4, 16 or 64, since sigma "
            "times its square root must be a power of two"
        )
    return dataclasses.replace(leaf, subspaces=count)
