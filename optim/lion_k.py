"""Lion-K: one update rule for a family of constrained problems."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from optim import kappa as kappas
from optim._trees import Scalar
from optim.lion import ScaleByLionState, blended, kept_as, moved


def scale_by_lion_k(
    kappa: kappas.Kappa | None = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""The subgradient of a convex function at an average of the gradient with its moving average.

    .. math::
        u_t = \nabla\mathcal K(b_1 m_t + (1 - b_1) g_t), \qquad m_{t+1} = b_2 m_t + (1 - b_2) g_t

    Args:
      kappa: the function, of each leaf by itself (:mod:`optim.kappa`); ``l1()``, Lion, by default.
      b1: weight of the moving average in the direction.
      b2: decay of the moving average.
      mu_dtype: dtype that the moving average is kept in; that of the gradients by default.

    Returns:
      A transform whose state is an :class:`optim.ScaleByLionState`.
    """
    function = kappas.l1() if kappa is None else kappa
    dtype = None if mu_dtype is None else jax.dtypes.canonicalize_dtype(mu_dtype)

    def init_fn(params: Any) -> ScaleByLionState:
        return ScaleByLionState(
            jnp.zeros([], jnp.int32), optax.tree.zeros_like(params, dtype=dtype)
        )

    def update_fn(updates: Any, state: ScaleByLionState, params: Any = None) -> tuple[Any, Any]:
        del params

        new = moved(updates, state.mu, b2)

        def direction(g: Array, old: Array, new: Array) -> Array:
            return function.subgradient(blended(g, old, new, b1, b2)).astype(g.dtype)

        steps = jax.tree.map(direction, updates, state.mu, new)
        return steps, ScaleByLionState(optax.safe_increment(state.count), kept_as(new, state.mu))

    return optax.GradientTransformation(init_fn, update_fn)


def lion_k(
    learning_rate: optax.ScalarOrSchedule,
    kappa: kappas.Kappa | None = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lion with another convex function than the 1-norm: it solves another constrained problem.

    .. math::
        x_{t+1} = x_t - \eta_t (\nabla\mathcal K(b_1 m_t + (1 - b_1) g_t) + \lambda x_t)

    It minimises :math:`f(x) + \mathcal K^*(\lambda x)/\lambda`; ``kappa.problem`` says what that is.

    Args:
      learning_rate: a number or a schedule.
      kappa: the function (:mod:`optim.kappa`), or one's own; ``l1()``, Lion, by default.
      b1: weight of the moving average in the direction.
      b2: decay of the moving average.
      mu_dtype: dtype that the moving average is kept in; that of the gradients by default.
      weight_decay: a number or a schedule; its inverse is the size of the constraint.
      mask: a tree or a function of the parameters: what is decayed; everything by default.

    Returns:
      A transform for ``optax.apply_updates``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optim
      >>> print(optim.kappa.l2().problem)
      minimise f subject to the Euclidean norm of x <= 1/wd
      >>> f = lambda x: jnp.sum((x - 3.0) ** 2)         # its minimum lies outside of that ball
      >>> solver = optim.lion_k(0.01, optim.kappa.l2(), weight_decay=0.5)
      >>> x = jnp.zeros(2)
      >>> state = solver.init(x)
      >>> def step(_, carry):
      ...     x, state = carry
      ...     updates, state = solver.update(jax.grad(f)(x), state, x)
      ...     return optax.apply_updates(x, updates), state
      >>> x, state = jax.lax.fori_loop(0, 2000, step, (x, state))
      >>> print(f"norm {jnp.linalg.norm(x):.2f}, objective {f(x):.2f} after 18.00")
      norm 2.00, objective 5.03 after 18.00

    References:
      Chen et al., `Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts
      <https://arxiv.org/abs/2310.05898>`_, 2024
    """
    return optax.chain(
        scale_by_lion_k(kappa, b1, b2, mu_dtype),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
