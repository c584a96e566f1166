"""Parameters under node noise: noise is added to what comes out of their products, not to them.

A :class:`Node` is an array that was computed from parameters: shared by all members, and without
noise. It keeps the operations that made it, so that a sum of what its products received can be
taken back to the parameters (:mod:`eggroll.values.pullback`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from eggroll.values.lowrank import Lazy

# ``fn(roots, captured) -> array`` takes the roots of a region and the other arrays of an operation.
Operation = Callable[[tuple[Array, ...], tuple[Any, ...]], Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Node(Lazy):
    """A function of parameters, with noise on what comes out of its products.

    Attributes:
      w: its value.
      roots: which roots of the region it was computed from.
      fn: the operation that computes it from them.
      captured: the other arrays that the operation takes, such as the indices of a look-up.
      looked_up: whether it holds rows that data chose, such as those of an embedding table.
      paths: the parameters that it was computed from.
      sigma: factor on the strategy's sigma.
      spread: axes along which it does not vary of itself: those that it was broadcast along, and
        those of the indices that rows were looked up by.
    """

    w: Array
    roots: tuple[int, ...]
    fn: Operation
    captured: tuple[Any, ...] = ()
    looked_up: bool = False
    paths: tuple[str, ...] = ()
    sigma: float = 1.0
    spread: frozenset[int] = frozenset()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    @property
    def ndim(self) -> int:
        return self.w.ndim

    @property
    def dtype(self) -> jnp.dtype:
        return self.w.dtype


def root(w: Array, index: int, paths: tuple[str, ...], sigma: float) -> Node:
    """A parameter, or what a region received of one."""
    return Node(w, (index,), lambda roots, captured: roots[0], (), False, paths, sigma)


def merged(
    bind: Callable[..., Array], operands: list[Any]
) -> tuple[tuple[int, ...], Operation, tuple[Any, ...]]:
    """The operation ``bind(*operands)`` as one of the roots of its Node operands.

    Returns:
      The roots, the operation, and what it takes beside them: for each operand either the captured
      arrays of a Node or the operand itself.
    """
    roots = tuple(dict.fromkeys(i for v in operands if isinstance(v, Node) for i in v.roots))
    where = [[roots.index(i) for i in v.roots] if isinstance(v, Node) else None for v in operands]
    fns = [v.fn if isinstance(v, Node) else None for v in operands]

    def fn(of_roots: tuple[Array, ...], captured: tuple[Any, ...]) -> Array:
        values = [
            given if of is None else of(tuple(of_roots[i] for i in at or ()), given)
            for of, at, given in zip(fns, where, captured, strict=True)
        ]
        return bind(*values)

    captured = tuple(v.captured if isinstance(v, Node) else v for v in operands)
    return roots, fn, captured
