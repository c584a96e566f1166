"""Taking out of a step what only changes the norm of scale-invariant weights.

Heo et al., "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights",
arXiv 2006.08217, section 3 and algorithm 1.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from optim._trees import Scalar


class Projected(NamedTuple):
    """A step without its radial part, and the factor on the weight decay that goes with it.

    Attributes:
      step: of the shape of the weights.
      decay: ``wd_ratio`` where something was taken out, 1 elsewhere; broadcasts against the weights.
      moments: those that the step was taken with.
    """

    step: Array
    decay: Array
    moments: tuple[Array, ...] = ()


Step = Callable[..., Array]
Advance = Callable[..., Sequence[Array]]
# Entries that one turn of the loop in _sums_by_rows works on, so that what is between stays in cache (from
# 2**15 on XLA also splits each sum of a turn among threads, which then wait for each other), and those of a
# leaf from which on that is faster.
BLOCK, LARGE = 2**14, 2**18


def project(
    step: Step | Float[Array, "*shape"],
    grad: Float[Array, "*shape"],
    weight: Float[Array, "*shape"],
    *moments: Float[Array, "*shape"],
    advance: Advance | None = None,
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
      step: what the optimizer would do; or a function of the gradient and ``moments`` that tells it, entry
        by entry, which is then worked out where it is needed and never kept in memory.
      grad: the gradient itself.
      weight: the weights before they are decayed.
      moments: arguments of ``step``, of the shape of the weights.
      advance: a function of the gradient and ``moments`` that gives, entry by entry, those of this step.
      delta: how small a cosine has to be.
      wd_ratio: factor on the weight decay of weights that are found scale-invariant.
      eps: against division by zero.
      channel_axis: of the weights without their batch axes; JAX keeps output channels last, PyTorch
        first (0).
      batch_axes: leading axes that number layers, each of which is decided for itself.
    """
    if callable(step):
        direction = step
    else:
        moments, direction, advance = (step,), lambda _, step: step, None
    by_rows = weight.ndim - batch_axes >= 2 and _rows_are_faster(weight, channel_axis, batch_axes)
    # Rows are written over those of the moments of before, which have to be of the same dtypes.
    if advance and not (by_rows and _keeps_dtypes(advance, grad, *moments)):
        moments, advance = tuple(advance(grad, *moments)), None
    if weight.ndim - batch_axes < 2:
        return Projected(direction(grad, *moments), jnp.ones((), weight.dtype), moments)
    shape = weight.shape[batch_axes:]
    axis = channel_axis % len(shape) + batch_axes
    within = tuple(i for i in range(batch_axes, weight.ndim) if i != axis)
    layer = tuple(range(batch_axes, weight.ndim))

    if by_rows:
        moments, by_channel = _sums_by_rows(direction, advance, grad, weight, *moments)
    else:
        pairs = _pairs(direction, grad, weight, *moments)
        by_channel = [jnp.sum(a * b, within, keepdims=True) for a, b in pairs]
    # Sums over a channel give those over the layer. Without the barrier XLA would take both from the
    # products, and write all four of those to memory for it.
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
    return Projected(direction(grad, *moments) - weight * along, decay, moments)


def _pairs(
    step: Step, grad: Array, weight: Array, *moments: Array
) -> Sequence[tuple[Array, Array]]:
    """What is multiplied and summed: <g, x>, |g|^2, |x|^2, <x, d>."""
    return (grad, weight), (grad, grad), (weight, weight), (weight, step(grad, *moments))


def _keeps_dtypes(advance: Advance, grad: Array, *moments: Array) -> bool:
    new = jax.eval_shape(advance, grad, *moments)
    return all(a.dtype == b.dtype for a, b in zip(new, moments, strict=True))


def _rows_are_faster(weight: Array, axis: int, batch_axes: int) -> bool:
    """Whether the sums of this leaf are taken by :func:`_sums_by_rows`: large ones on one CPU alone, since a
    loop over rows that are spread over devices would gather them."""
    alone = jax.default_backend() == "cpu" and jax.device_count() == 1
    last = axis % weight.ndim == weight.ndim - 1
    return alone and batch_axes == 0 and last and weight.size >= LARGE


def _sums_by_rows(
    step: Step, advance: Advance | None, grad: Array, weight: Array, *moments: Array
) -> tuple[tuple[Array, ...], list[Array]]:
    """This step's moments, and the sums of :func:`_pairs` over all but the last axis, some rows at a time.

    XLA's CPU compiler keeps the step and the squared gradient, which are used twice, in arrays of the
    size of the weights, fresh from the system at each step; and goes over the weights once for each sum, and
    once more for each moment.
    """
    channels = weight.shape[-1]
    flat_grad, flat_weight, *flat = (a.reshape(-1, channels) for a in (grad, weight, *moments))
    rows = weight.size // channels
    block = min(max(1, BLOCK // channels), rows)
    turns, left = divmod(rows, block)

    def products(start: Any, size: int, flat: list[Array]) -> tuple[list[Array], list[Array]]:
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, start, size)
        if advance:
            new = advance(cut(flat_grad), *map(cut, flat))
            flat = [
                jax.lax.dynamic_update_slice_in_dim(a, part, start, 0)
                for a, part in zip(flat, new, strict=True)
            ]
        # What was written is read again: where it is used as it was worked out, XLA copies all of the
        # moments at each turn, to have what they were before.
        pairs = _pairs(step, cut(flat_grad), cut(flat_weight), *map(cut, flat))
        return flat, [a * b for a, b in pairs]

    def turn(i: Array, carry: tuple[list[Array], list[Array]]) -> tuple[list[Array], list[Array]]:
        flat, sums = carry
        flat, more = products(i * block, block, flat)
        return flat, [s + x for s, x in zip(sums, more, strict=True)]

    dtype = jnp.result_type(jnp.float32, grad, weight, *moments)
    zeros = [jnp.zeros((block, channels), dtype)] * 4
    flat, sums = jax.lax.fori_loop(0, turns, turn, (flat, zeros))
    sums = [s.sum(0) for s in sums]
    if left:
        flat, more = products(turns * block, left, flat)
        sums = [s + x.sum(0).astype(dtype) for s, x in zip(sums, more, strict=True)]
    shape = [1] * (weight.ndim - 1) + [channels]
    return (
        tuple(a.reshape(weight.shape) for a in flat),
        [s.reshape(shape).astype(weight.dtype) for s in sums],
    )
