"""Taking out of a step what only changes the norm of scale-invariant weights.

Heo et al., "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights",
arXiv 2006.08217, section 3 and algorithm 1.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from optim.requirements import Scalar


class Projected(NamedTuple):
    """A step without its radial part, and the factor on the weight decay that goes with it.

    Attributes:
      step: of the shape of the weights.
      decay: ``wd_ratio`` where something was taken out, 1 elsewhere; broadcasts against the weights.
    """

    step: Array
    decay: Array


def project(
    step: Float[Array, "*shape"],
    grad: Float[Array, "*shape"],
    weight: Float[Array, "*shape"],
    *,
    delta: Scalar = 0.1,
    wd_ratio: Scalar = 0.1,
    eps: Scalar = 1e-8,
    channel_axis: int = -1,
    batch_axes: int = 0,
) -> Projected:
    """The step of one leaf, without the part along weights that the gradient is orthogonal to.

    First by channel, then the layer as a whole: where the largest cosine between gradient and
    weights is below ``delta / sqrt(size)`` of that view, the weights are taken to be scale-invariant in
    it, and the step's component along them is removed. The first view that passes counts. A leaf of
    fewer than two axes is left alone.

    Args:
      step: what the optimizer would do.
      grad: the gradient itself.
      weight: the weights before they are decayed.
      delta: how small a cosine has to be.
      wd_ratio: factor on the weight decay of weights that are found scale-invariant.
      eps: against division by zero.
      channel_axis: of the weights without their batch axes; JAX keeps output channels last, PyTorch
        first (0).
      batch_axes: leading axes that number layers, each of which is decided for itself.
    """
    if weight.ndim - batch_axes < 2:
        return Projected(step, jnp.ones((), weight.dtype))
    shape = weight.shape[batch_axes:]
    axis = channel_axis % len(shape) + batch_axes
    within = tuple(i for i in range(batch_axes, weight.ndim) if i != axis)
    layer = tuple(range(batch_axes, weight.ndim))

    # Sums over a channel give those over the layer. Without the barrier XLA would take both from the
    # products, and write all four of those to memory for it: five times the time on a CPU.
    pairs = ((grad, weight), (grad, grad), (weight, weight), (weight, step))
    by_channel = [jnp.sum(a * b, within, keepdims=True) for a, b in pairs]
    by_channel = jax.lax.optimization_barrier(by_channel)
    by_layer = [jnp.sum(x, layer, keepdims=True) for x in by_channel]

    def view(sums: list[Array], size: int) -> tuple[Array, Array]:
        """(whether it passes, per layer; what of the weights the step loses)."""
        gx, gg, xx, xd = sums
        norms = jnp.maximum(jnp.sqrt(gg), eps) * jnp.maximum(jnp.sqrt(xx), eps)
        passes = jnp.max(jnp.abs(gx / norms), layer, keepdims=True) < delta / math.sqrt(size)
        return passes, xd / (jnp.sqrt(xx) + eps) ** 2

    size = math.prod(shape)
    channels, along_channels = view(by_channel, size // weight.shape[axis])
    whole, along_whole = view(by_layer, size)
    along = jnp.where(channels, along_channels, jnp.where(whole, along_whole, 0))
    decay = jnp.where(channels | whole, wd_ratio, 1.0).astype(weight.dtype)
    return Projected(step - weight * along, decay)


def broadcast(prefix: Any, tree: Any) -> Any:
    """A prefix of a tree, a tree of functions' answers or one value, as a value for every leaf.

    Example:
      >>> broadcast({"a": 1, "b": 2}, {"a": [0.0, 0.0], "b": 0.0})
      {'a': [1, 1], 'b': 2}
    """
    if callable(prefix):
        prefix = prefix(tree)
    return jax.tree.map(lambda value, sub: jax.tree.map(lambda _: value, sub), prefix, tree)
