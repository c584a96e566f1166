"""The uses of every axis of every parameter in a function, read from a trace.

The interpreter runs the function abstractly on values with one factor for every axis. Its rules
report which axes are contracted, free, batched, scanned or indexed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from eggroll._calling import call, one_of
from eggroll.interpret import Context, interpret
from eggroll.values import FLOATS, FixedPoint, LowRank, accumulator, is_integer

# The set of uses of each axis of a parameter.
AxisUses = dict[int, set[str]]


def trace_axis_uses(
    fitness: Callable[..., Any],
    params: Any,
    paths: Sequence[str | None],
    args: tuple,
    members: Any,
) -> dict[str, AxisUses]:
    """The uses of the axes of every parameter that has a path.

    Args:
      fitness: ``fitness(params, key, [member,] *args)``.
      params: arrays or ``jax.ShapeDtypeStruct``.
      paths: the path of each leaf of ``params``, or None for a leaf to ignore.
      args: the trees that the fitness receives beside the parameters.
      members: a tree with leading axis [population], or None.

    Example:
      >>> w = {"w": jnp.zeros((4, 8))}
      >>> trace_axis_uses(lambda p, key: jnp.ones(4) @ p["w"], w, ["w"], (), None)
      {'w': {0: {'contracted'}, 1: {'free'}}}
    """
    leaves, tree = jax.tree.flatten(params)
    uses: dict[str, AxisUses] = {
        path: {axis: set() for axis in range(len(leaf.shape))}
        for path, leaf in zip(paths, leaves, strict=True)
        if path is not None
    }

    def record(use: str, path: str, axis: int) -> None:
        uses[path][axis].add(use)

    def run(arrays: list[Any], key: Any, member: Any, args: tuple) -> Any:
        probes = [
            array if path is None else probe(path, array)
            for path, array in zip(paths, arrays, strict=True)
        ]
        traced = interpret(fitness, Context(on_dense="ignore", recorder=record))
        return call(traced, jax.tree.unflatten(tree, probes), key, member, args)

    key = jax.eval_shape(lambda: jax.random.key(0))
    jax.eval_shape(run, leaves, key, one_of(members), args)
    return uses


def probe(path: str, array: Array) -> Array | LowRank:
    """A value with one factor for every axis; vectors and scalars stay arrays."""
    varying = [axis for axis, n in enumerate(array.shape) if n > 1]
    if len(varying) < 2:
        return array
    ones = lambda axis: [1, *(n if a == axis else 1 for a, n in enumerate(array.shape))]
    return LowRank(
        array,
        tuple(jnp.ones(ones(axis), array.dtype) for axis in varying),
        jnp.ones((), accumulator(array.dtype)),
        (path,),
        tags=tuple(frozenset({(path, axis)}) for axis in varying),
        arithmetic=FixedPoint(0) if is_integer(array.dtype) else FLOATS,
    )
