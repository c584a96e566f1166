"""Removes from a step the part that only changes the norm of scale-invariant weights.

Heo et al., "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights",
arXiv 2006.08217, section 3 and algorithm 1.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from optim._numerics import common_dtype, compute_dtype, real_dtype, real_product, wide
from optim._trees import Scalar


class Projected(NamedTuple):
    """A step without its radial part, and the factor on the weight decay that goes with it.

    Attributes:
      step: of the shape of the weights, in float32 at least.
      decay: ``wd_ratio`` where the radial part was removed, 1 elsewhere; broadcasts against the
        weights.
      moments: the moments that the step was computed from.
    """

    step: Array
    decay: Array
    moments: tuple[Array, ...] = ()


Step = Callable[..., Array]
Advance = Callable[..., Sequence[Array]]
# BLOCK: entries that one turn of the loop in _sums_by_rows works on, so that intermediate values
# stay in cache. From 2**15 on XLA also splits each sum of a turn among threads, which then wait for
# each other. LARGE: entries of a leaf from which on the loop is faster.
BLOCK, LARGE = 2**14, 2**18


def project(
    step: Step | Inexact[Array, "*shape"],
    grad: Inexact[Array, "*shape"],
    weight: Inexact[Array, "*shape"],
    *moments: Inexact[Array, "*shape"],
    advance: Advance | None = None,
    delta: Scalar = 0.1,
    wd_ratio: Scalar = 0.1,
    eps: Scalar = 1e-8,
    channel_axis: int = -1,
    batch_axes: int = 0,
) -> Projected:
    """The step of one leaf, without the part along weights that the gradient is orthogonal to.

    Two views are tried: every channel, then the layer as a whole. Where the largest cosine between
    gradient and weights is below ``delta / sqrt(size)`` of that view, the weights count as
    scale-invariant in it, and the component of the step along them is removed. The first view that
    passes counts. A leaf of fewer than two axes, or without entries, is left alone. Complex weights
    count as their real and imaginary parts.

    Args:
      step: the step of the optimizer; or a function of the gradient and ``moments`` that computes
        it entry by entry. The function is evaluated where its values are needed, and no array of
        them is kept.
      grad: the gradient.
      weight: the weights before they are decayed.
      moments: arguments of ``step``, of the shape of the weights.
      advance: a function of the gradient and the previous ``moments`` that computes the present
        ones entry by entry. Both functions get their arguments in float32 at least.
      delta: bound on the cosine.
      wd_ratio: factor on the weight decay of scale-invariant weights.
      eps: lower bound on the norms that are divided by.
      channel_axis: axis of the output channels, of the weights without their batch axes. JAX has
        them last, PyTorch first (0).
      batch_axes: number of leading axes that number layers; each layer is decided separately.
    """
    if callable(step):
        direction = step
    else:
        moments, direction, advance = (step,), lambda _, step: step, None
    axes = weight.ndim - batch_axes
    is_projected = axes >= 2 and weight.size > 0
    by_rows = is_projected and _rows_are_faster(weight, channel_axis, batch_axes)
    # The loop writes rows over those of the previous moments, which must have the same dtypes.
    if advance and not (by_rows and _keeps_dtypes(advance, grad, *moments)):
        moments, advance = tuple(advance(wide(grad), *map(wide, moments))), None
    if not is_projected:
        new = direction(wide(grad), *map(wide, moments))
        return Projected(new, jnp.ones((), real_dtype(new.dtype)), moments)
    axis = channel_axis % axes + batch_axes
    within = tuple(i for i in range(batch_axes, weight.ndim) if i != axis)
    layer = tuple(range(batch_axes, weight.ndim))

    if by_rows:
        moments, by_channel = _sums_by_rows(direction, advance, grad, weight, *moments)
    else:
        pairs = _pairs(direction, grad, weight, *moments)
        by_channel = [jnp.sum(real_product(a, b), within, keepdims=True) for a, b in pairs]
    by_channel.append(_shifted_squares(grad, by_channel[1], within, is_rare=by_rows))
    # Sums over the layer are sums of these. Without the barrier XLA would compute both from the
    # products, and write all of those to memory.
    by_channel = jax.lax.optimization_barrier(by_channel)
    by_layer = [jnp.sum(x, layer, keepdims=True) for x in by_channel]

    def view(sums: list[Array], size: int) -> tuple[Array, Array]:
        """Whether the view passes, by layer; and the multiple of the weights that the step loses."""
        gx, gg, xx, xd, shifted = sums
        norm = jnp.where(jnp.isfinite(gg), jnp.sqrt(gg), jnp.sqrt(shifted) / _shift(gg.dtype))
        cosine = gx / jnp.maximum(norm, eps) / jnp.maximum(jnp.sqrt(xx), eps)
        passes = jnp.max(jnp.abs(cosine), layer, keepdims=True) < delta / math.sqrt(size)
        return passes, xd / (jnp.sqrt(xx) + eps) ** 2

    size = math.prod(weight.shape[batch_axes:])
    channels, along_channels = view(by_channel, size // weight.shape[axis])
    whole, along_whole = view(by_layer, size)
    along = jnp.where(channels, along_channels, jnp.where(whole, along_whole, 0))
    decay = jnp.where(channels | whole, wd_ratio, 1.0).astype(along.dtype)
    new = direction(wide(grad), *map(wide, moments)) - wide(weight) * along
    return Projected(new, decay, moments)


def _pairs(
    step: Step, grad: Array, weight: Array, *moments: Array
) -> Sequence[tuple[Array, Array]]:
    """The factors of <g, x>, |g|^2, |x|^2 and <x, d>, in float32 at least."""
    g, x = wide(grad), wide(weight)
    return (g, x), (g, g), (x, x), (x, step(g, *map(wide, moments)))


def _shift(dtype: jnp.dtype) -> float:
    """A power of two by which the largest numbers have finite squares: 2**-80 for float32."""
    return 2.0 ** -(jnp.finfo(dtype).maxexp * 5 // 8)


def _shifted_squares(
    grad: Array, squares: Array, within: tuple[int, ...], *, is_rare: bool
) -> Array:
    """The sums ``squares`` of the gradient times :func:`_shift`, for where they overflow.

    With ``is_rare`` they are computed only if one overflows, and 0 otherwise. A GPU would wait for
    the host at that condition, and computes them in the same pass as the other sums.
    """

    def compute() -> Array:
        g = wide(grad) * _shift(squares.dtype)
        return jnp.sum(real_product(g, g), within, keepdims=True).astype(squares.dtype)

    if not is_rare:
        return compute()
    return jax.lax.cond(jnp.isfinite(squares.sum()), lambda: jnp.zeros_like(squares), compute)


def _keeps_dtypes(advance: Advance, grad: Array, *moments: Array) -> bool:
    new = jax.eval_shape(advance, grad, *moments)
    return all(a.dtype == b.dtype for a, b in zip(new, moments, strict=True))


def _rows_are_faster(weight: Array, axis: int, batch_axes: int) -> bool:
    """Whether :func:`_sums_by_rows` is faster: for large leaves where one CPU is the only device.

    A loop over rows that are spread over devices would gather them.
    """
    alone = jax.default_backend() == "cpu" and jax.device_count() == 1
    last = axis % weight.ndim == weight.ndim - 1
    # Narrow rows are converted outside the loop, all of them at every turn.
    alone = alone and compute_dtype(weight.dtype) == weight.dtype
    return alone and batch_axes == 0 and last and weight.size >= LARGE


def _sums_by_rows(
    step: Step, advance: Advance | None, grad: Array, weight: Array, *moments: Array
) -> tuple[tuple[Array, ...], list[Array]]:
    """The moments of this step, and the sums of :func:`_pairs` over all but the last axis.

    A loop takes some rows at a time. Otherwise XLA's CPU compiler keeps the step and the squared
    gradient, which are used twice, in arrays of the size of the weights, newly allocated at each
    step. It also reads the weights once for each sum, and once more for each moment.
    """
    channels = weight.shape[-1]
    flat_grad, flat_weight, *flat = (a.reshape(-1, channels) for a in (grad, weight, *moments))
    rows = weight.size // channels
    block = min(max(1, BLOCK // channels), rows)
    turns, left = divmod(rows, block)

    def products(
        start: Array | int, size: int, flat: list[Array]
    ) -> tuple[list[Array], list[Array]]:
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, start, size)
        if advance:
            new = advance(wide(cut(flat_grad)), *(wide(cut(a)) for a in flat))
            flat = [
                jax.lax.dynamic_update_slice_in_dim(a, part.astype(a.dtype), start, 0)
                for a, part in zip(flat, new, strict=True)
            ]
        # The rows just written are read again. If their values were used directly, XLA would copy
        # all of the moments at each turn.
        pairs = _pairs(step, cut(flat_grad), cut(flat_weight), *map(cut, flat))
        return flat, [real_product(a, b) for a, b in pairs]

    def turn(i: Array, carry: tuple[list[Array], list[Array]]) -> tuple[list[Array], list[Array]]:
        flat, sums = carry
        flat, more = products(i * block, block, flat)
        return flat, [s + x for s, x in zip(sums, more, strict=True)]

    dtype = compute_dtype(grad.dtype)
    for a in (weight, *moments):
        dtype = common_dtype(dtype, a.dtype)
    dtype = real_dtype(dtype)
    zeros = [jnp.zeros((block, channels), dtype)] * 4
    flat, sums = jax.lax.fori_loop(0, turns, turn, (flat, zeros))
    sums = [s.sum(0) for s in sums]
    if left:
        flat, more = products(turns * block, left, flat)
        sums = [s + x.sum(0).astype(dtype) for s, x in zip(sums, more, strict=True)]
    shape = [1] * (weight.ndim - 1) + [channels]
    return (
        tuple(a.reshape(weight.shape) for a in flat),
        [s.reshape(shape) for s in sums],
    )
