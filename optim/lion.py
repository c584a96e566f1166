"""Lion, as fast as the memory it moves."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from optim._trees import Scalar


class ScaleByLionState(NamedTuple):
    """State of :func:`scale_by_lion`.

    Attributes:
      count: int32 scalar, updates done.
      mu: tree of the parameters, the moving average of the gradients.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # as optax names it
    mu: Any


def moved(grads: Any, mu: Any, b2: Scalar) -> Any:
    """The moving averages with the gradients in them, not yet rounded to the dtype they are kept in."""
    return jax.tree.map(lambda g, m: (1 - b2) * g + b2 * m, grads, mu)


def kept_as(new: Any, old: Any) -> Any:
    """New averages in the dtypes of the old ones."""
    return jax.tree.map(lambda n, o: n.astype(o.dtype), new, old)


def blended(g: Array, old: Array, new: Array, b1: Scalar, b2: Scalar) -> Array:
    r"""``b1 * old + (1 - b1) * g``, without ``old`` where its successor ``new`` tells as much.

    XLA's CPU compiler lets the new parameters and the new average both read the old average, which is
    overwritten in place, and so copies it first: most of the time of optax's step. Written by the new one,
    :math:`(b_1/b_2) m_{t+1} + (1 - b_1 - (1 - b_2) b_1/b_2) g_t`, the old one has one reader. Where
    ``b2 < b1 / 2`` that would lose digits, and where a rate is traced that cannot be known: the plain
    form is used there.
    """
    if all(isinstance(b, int | float) for b in (b1, b2)) and 0 < b2 and b1 <= 2 * b2:
        return (b1 / b2) * new + ((1 - b1) - (1 - b2) * b1 / b2) * g
    return (1 - b1) * g + b1 * old


def scale_by_lion(
    b1: Scalar = 0.9, b2: Scalar = 0.99, mu_dtype: Any = None, *, cautious: bool = False
) -> optax.GradientTransformation:
    r"""Signs of an average of the gradient with its moving average.

    .. math::
        u_t = \operatorname{sign}(b_1 m_t + (1 - b_1) g_t), \qquad
        m_{t+1} = b_2 m_t + (1 - b_2) g_t

    The mathematics is that of ``optax.scale_by_lion``, in a third of its time on a CPU (see
    :func:`optim.lion.blended`). A sign can differ from optax's where its argument is within a few
    units in the last place of its terms of 0. ``optax.inject_hyperparams`` makes every rate an
    array: name b1 and b2 as static there to keep the speed.

    Args:
      b1: weight of the moving average in the direction.
      b2: decay of the moving average.
      mu_dtype: dtype that the moving average is kept in; that of the gradients by default.
      cautious: drop the entries of the update that point against the gradient, and scale the others
        by n / (kept + 1) (Liang et al., arXiv 2411.16085, algorithm 1).

    Returns:
      A transform whose state is a :class:`ScaleByLionState`.

    References:
      Chen et al., `Symbolic Discovery of Optimization Algorithms <https://arxiv.org/abs/2302.06675>`_,
      2023
    """
    dtype = None if mu_dtype is None else jax.dtypes.canonicalize_dtype(mu_dtype)

    def init_fn(params: Any) -> ScaleByLionState:
        return ScaleByLionState(
            jnp.zeros([], jnp.int32), optax.tree.zeros_like(params, dtype=dtype)
        )

    def update_fn(updates: Any, state: ScaleByLionState, params: Any = None) -> tuple[Any, Any]:
        del params
        new = moved(updates, state.mu, b2)

        def direction(g: Array, old: Array, new: Array) -> Array:
            u = jnp.sign(blended(g, old, new, b1, b2))
            if cautious:
                agrees = u * g > 0
                u = jnp.where(agrees, u, 0) * (agrees.size / (agrees.sum() + 1)).astype(u.dtype)
            return u.astype(g.dtype)

        signs = jax.tree.map(direction, updates, state.mu, new)
        return signs, ScaleByLionState(optax.safe_increment(state.count), kept_as(new, state.mu))

    return optax.GradientTransformation(init_fn, update_fn)


def lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Any = None,
    *,
    cautious: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Lion: steps of one size for every entry, with decoupled weight decay.

    .. math::
        x_{t+1} = x_t - \eta_t (\operatorname{sign}(b_1 m_t + (1 - b_1) g_t) + \lambda x_t)

    It minimises the loss subject to :math:`\|x\|_\infty \le 1/\lambda` (see :func:`optim.lion_k`).
    Learning rates are three to ten times smaller than Adam's, weight decays as much larger.

    Args:
      learning_rate: a number or a schedule.
      b1: weight of the moving average in the direction.
      b2: decay of the moving average.
      mu_dtype: dtype that the moving average is kept in; that of the gradients by default.
      weight_decay: a number or a schedule; the decay of a step is times the learning rate.
      mask: a tree or a function of the parameters: what is decayed; everything by default.
      cautious: drop the entries that point against the gradient.

    Returns:
      A transform for ``optax.apply_updates``.

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
      Chen et al., `Symbolic Discovery of Optimization Algorithms <https://arxiv.org/abs/2302.06675>`_,
      2023
    """
    return optax.chain(
        scale_by_lion(b1, b2, mu_dtype, cautious=cautious),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
