"""Matrices in int8 with a float32 scale for each output: a quarter of the bytes of float32.

A matrix becomes ``{"int8": matrix, "scale": float32}``, where a scale is the largest absolute entry of its
output over 127. Products are ``(x @ int8) * scale``. Evolution strategies perturb the int8 matrix at low
rank, in floats, beside that product, and what is trained is a float32 copy of which the matrix is the
rounded form.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, DTypeLike, Float, Int, PyTree

from eggroll.plan import Dense, Frozen, Given, Plan, Planner, Treatment, by_shape, leaf_paths

LARGEST = 127

# A matrix in floats, or in int8 with its scales.
Weight = Any


def quantise(params: PyTree, axis_of: Callable[[str], int | None]) -> PyTree:
    """The same model with some of its matrices in int8.

    Args:
        params: nested dicts of float arrays; of those of NumPy one at a time is on a device, and the rounded
            ones are of NumPy again.
        axis_of: of a matrix's path, the axis that a scale is taken over; None leaves it as it is.

    Example:
        >>> small = quantise({"w": jnp.array([[1.0, 0.0], [-2.0, 0.5]])}, lambda path: -2)
        >>> small["w"]["int8"].tolist(), (127 * small["w"]["scale"]).tolist()
        ([[64, 0], [-127, 127]], [2.0, 0.5])
    """

    def each(tree: PyTree, prefix: str) -> PyTree:
        if isinstance(tree, dict):
            return {name: each(leaf, f"{prefix}/{name}") for name, leaf in tree.items()}
        axis = axis_of(prefix.removeprefix("/"))
        return tree if axis is None else _where(tree, _rounded(tree, axis))

    return each(params, "")


def dequantise(params: PyTree, dtype: DTypeLike, axis_of: Callable[[str], int | None]) -> PyTree:
    """The float model that a quantised one stands for; one in floats stays as it is.

    Args:
        params: of :func:`quantise`; those of NumPy give such.
        dtype: of the matrices.
        axis_of: as in :func:`quantise`.
    """

    def each(tree: PyTree, prefix: str) -> PyTree:
        if is_quantised(tree):
            axis = axis_of(prefix.removeprefix("/"))
            assert axis is not None
            floats = (tree["int8"] * jnp.expand_dims(tree["scale"], axis)).astype(dtype)
            return _where(tree["int8"], floats)
        if isinstance(tree, dict):
            return {name: each(leaf, f"{prefix}/{name}") for name, leaf in tree.items()}
        return tree

    return each(params, "")


def _rounded(w: ArrayLike, axis: int) -> dict[str, Array]:
    w = jnp.asarray(w, jnp.float32)
    scale = jnp.abs(w).max(axis, keepdims=True) / LARGEST
    whole = jnp.round(w / jnp.where(scale == 0, 1, scale)).astype(jnp.int8)
    return {"int8": whole, "scale": scale.squeeze(axis)}


def _where(given: ArrayLike, made: PyTree) -> PyTree:
    """What was made of an array, on the host where that is one of NumPy."""
    return jax.device_get(made) if isinstance(given, np.ndarray) else made


def is_quantised(w: Weight) -> bool:
    return isinstance(w, dict) and w.keys() == {"int8", "scale"}


def linear(x: Float[Array, "*batch inputs"], w: Weight) -> Float[Array, "*batch outputs"]:
    """``x @ w``, in the dtype of x where w is in int8.

    All rows of x are in one axis: its gradient takes less time on a CPU so, as it is a product of two
    matrices.
    """
    rows = x.reshape(-1, x.shape[-1])
    if is_quantised(w):
        y = ((rows @ w["int8"].astype(x.dtype)) * w["scale"]).astype(x.dtype)
    else:
        y = rows @ w
    return y.reshape(*x.shape[:-1], y.shape[-1])


def look_up(
    table: Weight, tokens: Int[Array, "*batch"], dtype: DTypeLike
) -> Float[Array, "*batch hidden"]:
    """Rows of a table whose scales are those of its rows; of floats in their own dtype."""
    if not is_quantised(table):
        return table[tokens]
    rows = table["int8"][tokens].astype(jnp.float32) * table["scale"][tokens][..., None]
    return rows.astype(dtype)


def transposed(table: Weight) -> Weight:
    """A table for :func:`look_up` as a matrix for :func:`linear`."""
    return {**table, "int8": table["int8"].T} if is_quantised(table) else table.T


def steps(params: PyTree) -> dict[str, float]:
    """What a step of each int8 matrix is worth, by path: the mean of its scales.

    Example:
        >>> print(steps({"w": {"int8": jnp.ones((2, 2), jnp.int8), "scale": jnp.array([0.5, 1.5])}}))
        {'w': 1.0}
    """
    leaves: dict[str, Any] = dict(leaf_paths(params))
    return {
        path.removesuffix("/int8"): float(leaves[path.removesuffix("int8") + "scale"].mean()) or 1.0
        for path in leaves
        if path.endswith("/int8")
    }


def planner(
    treatment: Callable[[str], Treatment], steps: Mapping[str, float] | None = None
) -> Planner:
    """A plan by the paths of matrices, whether they are in floats or in int8.

    Those in int8 get noise of sigma / step in their own steps, so that weights move by sigma as they would
    in floats; their scales dense noise of sigma / 127, which moves the largest weights by sigma.

    Args:
        treatment: of the parameter of a path in the float model.
        steps: of :func:`steps`, for a quantised model.

    Raises:
        ValueError: (when used) for a quantised model without steps.
    """

    def of(path: str) -> Treatment:
        stem, _, last = path.rpartition("/")
        if last not in ("int8", "scale"):
            return treatment(path)
        own = treatment(stem)
        if isinstance(own, Frozen | Given):
            return own
        if last == "scale":
            return Dense(sigma=own.sigma / LARGEST)
        if steps is None:
            raise ValueError(
                f"plan(steps=None): must be quantised.steps(params), since parameter {path!r} is quantised"
            )
        return dataclasses.replace(own, sigma=own.sigma / steps[stem])

    def make(params: PyTree, rank: Any) -> Plan:
        return by_shape({path: of(path) for path, _ in leaf_paths(params)})(params, rank)

    return make
