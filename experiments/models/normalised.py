"""A perceptron that does not change when its weights are multiplied by a number.

Every column of a matrix is divided by its norm and has a gain of its own: weight normalisation (Salimans
and Kingma, arXiv 1602.07868). The gradient of a column is then at right angles to it, as behind a batch
or layer normalisation, but exactly, and without statistics of a batch.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def init(key: Key[Array, ""], inputs: int, width: int, depth: int, outputs: int) -> dict[str, Any]:
    """Parameters: for each layer a kernel with columns of norm 1, gains and biases.

    Args:
        key: decides the kernels.
        inputs: size of the input, of entries with mean square 1.
        width: units of every hidden layer.
        depth: hidden layers.
        outputs: units of the last layer.
    """
    sizes = [inputs, *[width] * depth, outputs]
    names = [*(f"layer_{i}" for i in range(depth)), "head"]
    params = {}
    for one, name, a, b in zip(
        jax.random.split(key, len(names)), names, sizes, sizes[1:], strict=False
    ):
        kernel = jax.random.normal(one, (a, b))
        params[name] = {
            "kernel": kernel / jnp.linalg.norm(kernel, axis=0),
            "gain": jnp.ones(b),
            "bias": jnp.zeros(b),
        }
    return params


def apply(
    params: dict[str, Any], x: Float[Array, "*batch inputs"]
) -> Float[Array, "*batch outputs"]:
    """Hidden layers with ReLU, then the head.

    Example:
        >>> params = init(jax.random.key(0), 4, 8, 2, 3)
        >>> x = jnp.ones((5, 4))
        >>> y = apply(params, x)
        >>> params["layer_1"]["kernel"] *= 7                   # nothing changes
        >>> bool(jnp.allclose(apply(params, x), y, atol=1e-5))
        True
    """
    for i in range(len(params) - 1):
        x = jax.nn.relu(_linear(params[f"layer_{i}"], x))
    return _linear(params["head"], x)


def _linear(layer: dict[str, Array], x: Array) -> Array:
    norm = jnp.linalg.norm(layer["kernel"], axis=0)
    return (x @ layer["kernel"]) * (layer["gain"] / norm) + layer["bias"]


def norms(params: dict[str, Any]) -> Float[Array, ""]:
    """The mean norm of the columns of all kernels."""
    columns = [jnp.linalg.norm(layer["kernel"], axis=0) for layer in params.values()]
    return jnp.concatenate(columns).mean()
