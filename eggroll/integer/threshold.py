"""Optax transforms for int8 parameters: the threshold step, error feedback and momentum.

The "gradient" of an integer strategy is ``-Z`` in int32. ``Z = sum_p F_p A_p B_p`` is a sum over
pairs, with F in {-1, 0, 1}. If the scores do not depend on the noise, an entry of ``Z`` has mean 0
and standard deviation ``16 * 16 * sqrt(P')``, where P' is the number of pairs with F not 0. The
strategy passes P' as ``pairs``. All three transforms keep the scale of ``Z``, so they chain in any
order with the threshold last.
"""

from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Int32

from eggroll.values.fixed_point import isqrt, shift_round

# The number of integer units for one standard deviation of Z in the states, by dtype.
UNITS = {jnp.dtype(jnp.int16): 64, jnp.dtype(jnp.int8): 8}


class ThresholdState(NamedTuple):
    """The state of :func:`threshold`.

    Attributes:
      count: number of steps taken.
    """

    count: Int32[Array, ""]  # type: ignore[assignment]  # as optax names it


class TraceState(NamedTuple):
    """The state of :func:`momentum`.

    Attributes:
      trace: the decaying sum, in 1/64 (int16) or 1/8 (int8) of a standard deviation of ``Z``.
    """

    trace: Any


class FeedbackState(NamedTuple):
    """The state of :func:`error_feedback`.

    Attributes:
      residual: the sum since the last move of each weight, in the units of :class:`TraceState`.
      inner: the state of the inner rule.
    """

    residual: Any
    inner: Any


def inverse_decay(rate: float = 0.015) -> Callable[[Any], Any]:
    """The schedule ``1 / (rate t + 1)``, the paper's choice for the fraction of weights that move.

    Example:
      >>> inverse_decay()(200)
      0.25
    """
    return lambda t: 1 / (rate * t + 1)


def threshold(
    alpha: float | optax.Schedule, steps: int = 2**14
) -> optax.GradientTransformationExtraArgs:
    """Moves each weight with a significant ``Z`` by one unit (integer EGGROLL, arXiv 2511.16652).

    A weight moves by one unit along ``Z`` if
    ``|Z| >= floor(16 Phi^-1(1 - alpha / 2)) * 16 sqrt(P')``. This is a two-sided z-test that a
    fraction ``alpha`` of weights passes by chance. Weights stay in [-127, 127]. The state is the
    number of steps alone. The first factor comes from a table that is made in advance, so that the
    program has integer operations only.

    Args:
      alpha: the fraction of weights that move, in (0, 1], or a schedule over steps.
      steps: the number of steps that the schedule is tabulated for; later steps use the last value.

    Returns:
      An optax transform from int32 to int8. Its ``update`` requires ``params`` and ``pairs``.

    Raises:
      ValueError: ``alpha`` is outside (0, 1].

    Example:
      Three pairs were decided; they agree on the sign of the first weight only.

      >>> rule = threshold(0.2)
      >>> params = jnp.array([5, 5, 127], jnp.int8)
      >>> z = jnp.array([3 * 256, 256, 3 * 256])
      >>> rule.update(-z, rule.init(params), params, pairs=3)[0].tolist()
      [1, 0, 0]
    """
    table = jnp.asarray(_levels(alpha, steps))

    def init_fn(params: Any) -> ThresholdState:
        return ThresholdState(jnp.zeros((), jnp.int32))

    def update_fn(
        updates: Any, state: ThresholdState, params: Any = None, *, pairs: Any = None, **extra: Any
    ) -> tuple[Any, ThresholdState]:
        root = _root(pairs, params)
        # At most 2^11 (16 Phi^-1 * 16 for alpha above 1e-15) times 2^15.5.
        least = (table[jnp.minimum(state.count, table.size - 1)] * root) >> 4

        def step(g: Array, w: Array) -> Array:
            move = jnp.where(jnp.abs(g) >= least, -jnp.sign(g), 0)
            return jnp.where(jnp.abs(w + move) > 127, 0, move).astype(jnp.int8)

        return jax.tree.map(step, updates, params), ThresholdState(state.count + 1)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def by_rows() -> optax.GradientTransformationExtraArgs:
    """Scales every row of ``Z``, along its last axis, to the deviation that the other transforms expect.

    Under node noise an entry of ``Z`` is a sum of credit, inputs and noise, whose deviation differs from
    input to input: a byte that is seldom read has a small one. Every row is therefore divided by its own
    root mean square. Rows that are zero stay zero.

    Returns:
      An optax transform from int32 to int32, for ``optax.chain(by_rows(), threshold(...))``. Its ``update``
      requires ``params`` and ``pairs``.

    Example:
      >>> rule = by_rows()
      >>> params = jnp.zeros((3, 2), jnp.int8)
      >>> z = jnp.array([[3, -4], [3000, -4000], [0, 0]])
      >>> rule.update(z, rule.init(params), params, pairs=1)[0].tolist()
      [[217, -289], [217, -289], [0, 0]]
    """

    def update_fn(
        updates: Any, state: Any, params: Any = None, *, pairs: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        root = 16 * _root(pairs, params)
        return jax.tree.map(lambda z: _in_units_of_rms(z, root), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


def _in_units_of_rms(z: Int32[Array, "*shape"], unit: Array) -> Int32[Array, "*shape"]:
    """``z unit / rms(z)`` along the last axis, rounded towards zero; ``unit`` is at most 2^19.5."""
    n = z.shape[-1] if z.ndim else 1
    axis = -1 if z.ndim else None
    # So many bits that n squares fit int32, and at most 11 for the product with the unit.
    bits = min(11, (30 - (n - 1).bit_length()) // 2)
    largest = jnp.max(jnp.abs(z), axis=axis, keepdims=True)
    over = jnp.maximum(32 - lax.clz(largest) - bits, 0)
    under = jnp.maximum(lax.clz(largest) - (32 - bits), 0)
    small = jnp.where(over > 0, jnp.sign(z) * (jnp.abs(z) >> over), z << under)
    mean = jnp.sum(small * small, axis=axis, keepdims=True, dtype=jnp.int32) // n
    rms = isqrt(mean)
    return lax.div(small * unit, jnp.broadcast_to(jnp.maximum(rms, 1), z.shape))


def error_feedback(
    rule: optax.GradientTransformation, dtype: DTypeLike = jnp.int16
) -> optax.GradientTransformationExtraArgs:
    """Accumulates ``Z`` for each weight until the sum is large enough for a step.

    The threshold alone discards every ``Z`` below it. Here every weight keeps its sum of
    ``Z / sqrt(P')`` since its last move, and restarts from 0 when it moves (accumulated error
    feedback, as in QES for quantised models, arXiv 2602.03120). This goes beyond the paper of
    integer EGGROLL. Without any signal, a sum passes a threshold of q standard deviations after
    about q^2 steps. The same alpha therefore moves more weights than without feedback: about
    ``1 / q^2`` of them.

    Args:
      rule: the transform of the sums: :func:`threshold`, or a chain that ends with it.
      dtype: dtype of the sums, one a weight: int16 or int8. They saturate at 512 or 16 standard
        deviations.

    Returns:
      An optax transform that replaces ``rule``.

    Raises:
      ValueError: ``dtype`` is neither int16 nor int8.

    Example:
      >>> rule = error_feedback(threshold(0.05))  # 1.9 standard deviations
      >>> params = jnp.zeros(2, jnp.int8)
      >>> state, z = rule.init(params), jnp.array([256, -16])
      >>> for _ in range(4):
      ...     step, state = rule.update(-z, state, params, pairs=1)
      ...     print(step.tolist())
      [0, 0]
      [1, 0]
      [0, 0]
      [1, 0]
    """
    unit, inner = _unit("error_feedback", dtype), optax.with_extra_args_support(rule)

    def init_fn(params: Any) -> FeedbackState:
        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, dtype), params)
        return FeedbackState(zeros, inner.init(params))

    def update_fn(
        updates: Any, state: FeedbackState, params: Any = None, *, pairs: Any = None, **extra: Any
    ) -> tuple[Any, FeedbackState]:
        root = _root(pairs, params)
        add = lambda g, e: e + _to_units(g, root, unit)
        sums = jax.tree.map(add, updates, state.residual)
        scaled = jax.tree.map(lambda x: _from_units(x, root, unit), sums)
        moves, new = inner.update(scaled, state.inner, params, pairs=pairs, **extra)

        def left(x: Array, move: Array, w: Array) -> Array:
            # A weight at the end of the range cannot move further, so its sum is cleared.
            stuck = jnp.sign(x) * w == -127
            return _saturate(jnp.where((move != 0) | stuck, 0, x), dtype)

        return moves, FeedbackState(jax.tree.map(left, sums, moves, params), new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def momentum(shift: int = 3, dtype: DTypeLike = jnp.int16) -> optax.GradientTransformationExtraArgs:
    """Replaces ``Z`` by a decaying sum ``m <- m - m / 2^shift + Z / sqrt(P')`` in its scale.

    For noise alone, the sum has the spread of one ``Z``, so a threshold after it passes the same
    fraction of weights. For a steady signal, it is up to ``sqrt(2^(shift + 1))`` times as large.
    Halves round away from zero, so that signs are symmetric. This goes beyond the paper, which
    names it as future work.

    Args:
      shift: the decay of a step is ``1 - 2^-shift``; 1 to 8.
      dtype: dtype of the sums, one a weight: int16, or int8, which saturates at 16 standard
        deviations.

    Returns:
      An optax transform from int32 to int32, for ``optax.chain(momentum(), threshold(...))``.

    Raises:
      ValueError: ``shift`` is out of range, or ``dtype`` is neither int16 nor int8.

    Example:
      >>> rule = optax.chain(momentum(shift=2), threshold(0.1))
      >>> params = jnp.zeros(2, jnp.int8)
      >>> state, z = rule.init(params), jnp.array([256, 16])
      >>> for _ in range(4):
      ...     step, state = rule.update(-z, state, params, pairs=1)
      ...     print(step.tolist())
      [0, 0]
      [0, 0]
      [0, 0]
      [1, 0]
    """
    if not 1 <= shift <= 8:
        raise ValueError(f"momentum: shift={shift!r}: must be an integer from 1 (decay 1/2) to 8")
    unit = _unit("momentum", dtype)
    decay = 1 - 2.0**-shift
    gain = round(2**8 * (1 - decay**2) ** 0.5)

    def init_fn(params: Any) -> TraceState:
        return TraceState(jax.tree.map(lambda w: jnp.zeros(w.shape, dtype), params))

    def update_fn(
        updates: Any, state: TraceState, params: Any = None, *, pairs: Any = None, **extra: Any
    ) -> tuple[Any, TraceState]:
        root = _root(pairs, params)

        def add(g: Array, m: Array) -> Array:
            m = m.astype(jnp.int32)
            return _saturate(m - shift_round(m, shift) + _to_units(g, root, unit), dtype)

        trace = jax.tree.map(add, updates, state.trace)
        # At most 2^15 * 2^8 before the shift.
        scaled = lambda m: _from_units(shift_round(m.astype(jnp.int32) * gain, 8), root, unit)
        return jax.tree.map(scaled, trace), TraceState(trace)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# ---------------------------------------------------------------- helpers


def _levels(alpha: float | optax.Schedule, steps: int) -> np.ndarray:
    """``floor(16 Phi^-1(1 - alpha_t / 2)) * 16`` for every step, int32."""
    if callable(alpha):
        rates = np.broadcast_to(np.asarray(alpha(np.arange(steps)), np.float64), steps)
    else:
        rates = np.array([alpha], np.float64)
    distinct, where = np.unique(rates, return_inverse=True)
    if not (distinct.min() > 0 and distinct.max() <= 1):
        wrong = distinct[0] if not distinct[0] > 0 else distinct[-1]
        raise ValueError(
            f"threshold: alpha={float(wrong):g}: must be a fraction of weights above 0 and up to 1"
        )
    normal = NormalDist()
    levels = [int(-16 * normal.inv_cdf(rate / 2)) * 16 for rate in distinct]
    return np.array(levels, np.int32)[where]


def _root(pairs: Any, params: Any) -> Int32[Array, ""]:
    """``floor(16 sqrt(P'))``, for up to 2^23 pairs."""
    if pairs is None or params is None:
        raise ValueError(
            "params, pairs: expected the parameters and the number of pairs without a tie, as in "
            "rule.update(grads, state, params, pairs=...), got None (an EvolutionStrategy passes "
            "both)"
        )
    return isqrt(jnp.asarray(pairs, jnp.int32) << 8)


def _unit(name: str, dtype: DTypeLike) -> int:
    if jnp.dtype(dtype) not in UNITS:
        raise ValueError(f"{name}: dtype={jnp.dtype(dtype).name}: must be int16 or int8")
    return UNITS[jnp.dtype(dtype)]


def _to_units(z: Int32[Array, "*shape"], root: Array, unit: int) -> Int32[Array, "*shape"]:
    """``Z`` in units of ``16 root / unit``, rounded to nearest, halves away from zero."""
    top, bottom = (unit // 16, 1) if unit >= 16 else (1, 16 // unit)
    # The clip at 2^28 is beyond 2^12 standard deviations of a million pairs.
    size = jnp.minimum(jnp.abs(z), 2**28) * top
    by = jnp.maximum(root * bottom, 1)
    return jnp.sign(z) * lax.div(size + by // 2, jnp.broadcast_to(by, size.shape))


def _from_units(x: Int32[Array, "*shape"], root: Array, unit: int) -> Int32[Array, "*shape"]:
    """The inverse of `_to_units`, at most ``2^15 * 2^15.5`` in magnitude."""
    x = jnp.clip(x, -(2**15), 2**15)
    return shift_round(x * root, 2) if unit == 64 else 2 * x * root


def _saturate(x: Int32[Array, "*shape"], dtype: DTypeLike) -> Array:
    """Clips to the symmetric range of the dtype, and casts."""
    largest = jnp.iinfo(dtype).max
    return jnp.clip(x, -largest, largest).astype(dtype)
