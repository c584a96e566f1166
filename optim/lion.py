"""Lion, at the speed of the memory it moves."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Inexact, Int, PyTree

from optim import _numerics
from optim._numerics import wide
from optim._trees import Scalar, Setting


class ScaleByLionState(NamedTuple):
    """State of :func:`scale_by_lion`.

    Attributes:
      count: int32 scalar, the number of updates so far.
      mu: tree like the parameters, the moving average of the gradients.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # as optax names it
    mu: PyTree


def start(params: PyTree, mu_dtype: DTypeLike | None) -> ScaleByLionState:
    """The state before the first update: zeros in the parameters' dtypes, or in ``mu_dtype``."""
    dtype = None if mu_dtype is None else jax.dtypes.canonicalize_dtype(mu_dtype)
    return ScaleByLionState(jnp.zeros([], jnp.int32), _numerics.zeros_like(params, dtype))


def averaged(grads: PyTree, mu: PyTree, b2: Scalar) -> PyTree:
    """``(1 - b2) * grads + b2 * mu`` in float32 at least, not rounded to the dtype of ``mu``."""
    return jax.tree.map(lambda g, m: (1 - b2) * wide(g) + b2 * wide(m), grads, mu)


def advanced(state: ScaleByLionState, new: PyTree) -> ScaleByLionState:
    """The state with new averages, in the dtypes of the old ones."""
    mu = jax.tree.map(lambda n, m: n.astype(m.dtype), new, state.mu)
    return ScaleByLionState(optax.safe_increment(state.count), mu)


def blended(
    g: ArrayLike, old: Array, new: Inexact[Array, "*shape"], b1: Scalar, b2: Scalar
) -> Inexact[Array, "*shape"]:
    r"""``b1 * old + (1 - b1) * g`` in float32 at least, from ``new`` where that is as exact.

    XLA's CPU compiler copies the old average before it is overwritten in place, since both the new
    parameters and the new average read it. The copy takes most of the time of optax's step. Written
    with the new average as :math:`(b_1/b_2) m_{t+1} + (1 - b_1/b_2) g_t`, the direction does not
    read the old one. Both weights are at least 0 where :math:`b_1 \le b_2`, so that nothing cancels
    or overflows. Otherwise, and where a rate is traced, the plain form is used.
    """
    if all(isinstance(b, int | float) for b in (b1, b2)) and 0 < b2 and b1 <= b2:
        return (b1 / b2) * new + (1 - b1 / b2) * wide(g)
    return (1 - b1) * wide(g) + b1 * wide(old)


def scale_by_lion(
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    mu_dtype: DTypeLike | None = None,
    *,
    cautious: bool = False,
) -> optax.GradientTransformation:
    r"""The sign of a weighted mean of the gradient and its moving average.

    .. math::
        u_t = \operatorname{sign}(b_1 m_t + (1 - b_1) g_t), \qquad
        m_{t+1} = b_2 m_t + (1 - b_2) g_t

    The mathematics is that of ``optax.scale_by_lion``, at a third of its time on a CPU. A sign can
    differ from optax's where its argument is within a few units in the last place of its terms of
    0. ``optax.inject_hyperparams`` makes every rate an array, for which the faster form is not
    used: name b1 and b2 in its ``static_args`` to keep the speed.

    Narrow dtypes are computed in float32, and the average is rounded when it is stored. The sign of
    a complex entry is z / abs(z), as in optax.

    Args:
      b1: weight of the moving average in the direction.
      b2: decay of the moving average.
      mu_dtype: dtype that the moving average is stored in; that of the parameters by default.
      cautious: set entries of the update that point against the gradient to 0, and scale the others
        by n / (kept + 1) (Liang et al., arXiv 2411.16085, algorithm 1).

    Returns:
      A transform with a :class:`ScaleByLionState`. Its updates have the dtype of the gradients, or
      float32 at least where the average has another one.

    References:
      Chen et al., `Symbolic Discovery of Optimization Algorithms
      <https://arxiv.org/abs/2302.06675>`_, 2023
    """

    def update_fn(
        updates: PyTree, state: ScaleByLionState, params: PyTree = None
    ) -> tuple[PyTree, ScaleByLionState]:
        del params
        new = averaged(updates, state.mu, b2)

        def direction(g: ArrayLike, old: Array, new: Array) -> Array:
            u = _numerics.sign(blended(g, old, new, b1, b2))
            if cautious:
                is_dropped = _numerics.opposes(u, wide(g))
                kept = u.size - is_dropped.sum()
                u = jnp.where(is_dropped, 0, u) * (u.size / (kept + 1)).astype(u.dtype)
            return u.astype(_numerics.common_dtype(jnp.result_type(g), old.dtype))

        signs = jax.tree.map(direction, updates, state.mu, new)
        return signs, advanced(state, new)

    return optax.GradientTransformation(lambda params: start(params, mu_dtype), update_fn)


def lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Setting = None,
    *,
    cautious: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Lion: steps of the same size in every entry, with decoupled weight decay.

    .. math::
        x_{t+1} = x_t - \eta_t (\operatorname{sign}(b_1 m_t + (1 - b_1) g_t) + \lambda x_t)

    Lion minimises the loss subject to :math:`\|x\|_\infty \le 1/\lambda` (see
    :func:`optim.lion_k`). Learning rates are three to ten times smaller than Adam's, weight decays
    three to ten times larger.

    Arguments have the names, order and defaults of ``optax.lion``.

    Args:
      learning_rate: a number or a schedule.
      b1: weight of the moving average in the direction.
      b2: decay of the moving average.
      mu_dtype: dtype that the moving average is stored in; that of the parameters by default.
      weight_decay: a number or a schedule. A step subtracts it times the learning rate times the
        parameters.
      mask: which leaves are decayed, all by default: a tree of bools (a prefix of the parameters'
        tree) or a function of the parameters that returns one.
      cautious: set entries of the step that point against the gradient to 0.

    Returns:
      A transform for ``optax.apply_updates``. Its update needs the parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optim
      >>> f = lambda x: jnp.sum(x**2)
      >>> solver = optim.lion(learning_rate=0.01)
      >>> x = jnp.array([1.0, 2.0, 3.0])
      >>> state = solver.init(x)
      >>> for _ in range(3):
      ...     updates, state = solver.update(jax.grad(f)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      ...     print(f"objective: {f(x):.2f}")
      objective: 13.88
      objective: 13.76
      objective: 13.64

    References:
      Chen et al., `Symbolic Discovery of Optimization Algorithms
      <https://arxiv.org/abs/2302.06675>`_, 2023
    """
    return optax.chain(
        scale_by_lion(b1, b2, mu_dtype, cautious=cautious),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
