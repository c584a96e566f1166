"""Decay towards the model that training began with, against forgetting, and the drift from there."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

Norm = Literal["l2", "l1"]


class AnchorState(NamedTuple):
    """What `anchored` carries.

    Attributes:
        anchor: the parameters that training began with.
        drift: norm of the way from there, as a share of their own norm.
        moved: share of the parameters that are not where they were.
    """

    anchor: PyTree
    drift: Float[Array, ""]
    moved: Float[Array, ""]


def anchored(rate: float, norm: Norm = "l2") -> optax.GradientTransformation:
    """Decay towards the parameters at the start instead of 0 (arXiv 2605.30148), to be chained last.

    Args:
        rate: with "l2" the share of the way back, an update; with "l1" the length of the step back, the same
            for all parameters: what has moved less than that goes all the way, so that few parameters end
            elsewhere than they began (the proximal step of an L1 norm).
        norm: which of the two.

    Example:
        >>> rule = anchored(0.5)
        >>> state = rule.init(jnp.array(1.0))
        >>> rule.update(jnp.array(0.0), state, jnp.array(3.0))[0].item()
        -1.0
        >>> rule = anchored(0.5, "l1")
        >>> updates, state = rule.update(jnp.array([0.1, 2.0]), rule.init(jnp.zeros(2)), jnp.zeros(2))
        >>> print(updates, state.moved)
        [0.  1.5] 0.5
    """

    def init(params: PyTree) -> AnchorState:
        # Two arrays: an update reuses the memory of each.
        nothing = lambda: jnp.zeros((), jnp.float32)
        anchor = jax.tree.map(functools.partial(jnp.array, copy=True), params)
        return AnchorState(anchor, nothing(), nothing())

    def pull(u: Array, p: Array, a: Array) -> Array:
        if norm == "l2":
            return u - rate * (p - a)
        way = p + u - a
        return jnp.sign(way) * jnp.maximum(jnp.abs(way) - rate, 0) + (a - p)

    def update(
        updates: PyTree, state: AnchorState, params: PyTree = None
    ) -> tuple[PyTree, AnchorState]:
        updates = jax.tree.map(pull, updates, params, state.anchor)
        ways = jax.tree.map(lambda u, p, a: u + (p - a), updates, params, state.anchor)
        leaves = jax.tree.leaves(ways)
        moved = sum(((way != 0).sum(dtype=jnp.float32) for way in leaves), jnp.float32(0))
        size = optax.tree.norm(state.anchor)
        drift = optax.tree.norm(ways) / jnp.where(size > 0, size, 1)
        count = max(sum(way.size for way in leaves), 1)
        return updates, AnchorState(state.anchor, drift.astype(jnp.float32), moved / count)

    return optax.GradientTransformation(init, update)


def drift_of(optimizer: Any) -> dict[str, dict[str, Array]]:
    """The figures of an optimizer's state with an anchor, as part of a row; nothing without one."""
    states = jax.tree.leaves(optimizer, is_leaf=lambda x: isinstance(x, AnchorState))
    found = [one for one in states if isinstance(one, AnchorState)]
    return {"drift": {"relative": found[0].drift, "moved": found[0].moved}} if found else {}
