"""Plans that train some of the parameters: a choice by path."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import PyTree

from eggroll.arithmetic import INTEGERS
from eggroll.plan._settle import Planner, Rank
from eggroll.plan.leaf import Leaf, Plan
from eggroll.plan.parameters import matches, unmatched
from eggroll.plan.treatments import Frozen

Patterns = str | Sequence[str]


def only(planner: Planner, patterns: Patterns) -> Planner:
    """A plan that trains the parameters that match a pattern, and freezes the others.

    The planner chooses the treatments of the parameters that stay, so patterns need not name any.

    Args:
      planner: chooses the treatments.
      patterns: one pattern or several; ``fnmatch`` on paths such as ``"params/Dense_0/kernel"``.

    Returns:
      A planner, for ``EvolutionStrategy(plan=...)``.

    Raises:
      ValueError: no pattern is given; (from the planner) a pattern matches no parameter, or only
        parameters that the planner freezes.

    Example:
      >>> import jax.numpy as jnp
      >>> from eggroll.plan import by_shape
      >>> params = {"body": {"w": jnp.zeros((8, 8)), "b": jnp.zeros(8)}, "head": jnp.zeros((8, 4))}
      >>> plan = only(by_shape(), "body/*")(params, rank=1)
      >>> [leaf.path for leaf in plan.leaves if leaf.trainable]
      ['body/b', 'body/w']
    """
    chosen = _patterns(patterns)

    def planner_of(params: PyTree, rank: Rank) -> Plan:
        plan = planner(params, rank)
        for pattern in chosen:
            found = _matched(plan, pattern)
            if not any(leaf.trainable for leaf in found):
                raise ValueError(
                    f"pattern {pattern!r}: must match a parameter that is trained, but the plan freezes "
                    f"{found[0].path!r} ({found[0].reason})"
                )
        kept = {leaf.path for pattern in chosen for leaf in _matched(plan, pattern)}
        why = f"not in only({', '.join(map(repr, chosen))})"
        return Plan(
            tuple(leaf if leaf.path in kept else _frozen(leaf, why) for leaf in plan.leaves)
        )

    return planner_of


def without(planner: Planner, patterns: Patterns) -> Planner:
    """A plan that freezes the parameters that match a pattern, and treats the others as before.

    Args:
      planner: chooses the treatments.
      patterns: as in :func:`only`.

    Returns:
      A planner, for ``EvolutionStrategy(plan=...)``.

    Raises:
      ValueError: no pattern is given; (from the planner) a pattern matches no parameter, or nothing is
        left to train.

    Example:
      >>> import jax.numpy as jnp
      >>> from eggroll.plan import by_shape
      >>> params = {"body": {"w": jnp.zeros((8, 8)), "b": jnp.zeros(8)}, "head": jnp.zeros((8, 4))}
      >>> plan = without(by_shape(), ["head", "*/b"])(params, rank=1)
      >>> [leaf.path for leaf in plan.leaves if leaf.trainable]
      ['body/w']
    """
    chosen = _patterns(patterns)

    def planner_of(params: PyTree, rank: Rank) -> Plan:
        plan = planner(params, rank)
        by = {leaf.path: pattern for pattern in chosen for leaf in _matched(plan, pattern)}
        why = lambda leaf: f"without({by[leaf.path]!r})"
        frozen = Plan(
            tuple(_frozen(leaf, why(leaf)) if leaf.path in by else leaf for leaf in plan.leaves)
        )
        if not any(leaf.trainable for leaf in frozen.leaves):
            raise ValueError(
                f"without({', '.join(map(repr, chosen))}): must leave a parameter that is trained"
            )
        return frozen

    return planner_of


def _patterns(patterns: Patterns) -> tuple[str, ...]:
    chosen = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not chosen:
        raise ValueError("patterns: expected at least one pattern such as 'layers/*', got none")
    return chosen


def _matched(plan: Plan, pattern: str) -> list[Leaf]:
    """The leaves that a pattern matches.

    Raises:
      ValueError: there are none.
    """
    found = [leaf for leaf in plan.leaves if matches(leaf.path, pattern)]
    if not found:
        raise ValueError(unmatched("pattern", pattern, [leaf.path for leaf in plan.leaves]))
    return found


def _frozen(leaf: Leaf, reason: str) -> Leaf:
    """The leaf without noise and update; what is frozen anyway keeps its reason."""
    if not leaf.trainable:
        return leaf
    # As for an int8 parameter that was never trained: quantised arithmetic is for trained ones alone.
    arithmetic = INTEGERS if leaf.dtype == jnp.int8 else leaf.arithmetic
    return dataclasses.replace(
        leaf, treatment=Frozen(), reason=reason, arithmetic=arithmetic, slices=None, subspaces=1
    )
