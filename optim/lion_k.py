"""Lion-K: one update rule for a family of constrained problems."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, PyTree

from optim import _numerics
from optim import kappa as kappas
from optim._sharding import alike
from optim._trees import Scalar, Setting
from optim.lion import ScaleByLionState, advanced, averaged, blended, start


def scale_by_lion_k(
    kappa: kappas.Kappa | None = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    r"""A subgradient of a convex function at a mean of the gradient and its moving average.

    .. math::
        u_t \in \partial\mathcal K(b_1 m_t + (1 - b_1) g_t), \qquad
        m_{t+1} = b_2 m_t + (1 - b_2) g_t

    Narrow dtypes are computed in float32, and the average is rounded when it is stored.

    Args:
      kappa: the function, applied to each leaf separately (:mod:`optim.kappa`); ``l1()``, which is
        Lion, by default.
      b1: weight of the moving average in the direction.
      b2: decay of the moving average.
      mu_dtype: dtype that the moving average is stored in; that of the parameters by default.

    Returns:
      A transform with a :class:`optim.ScaleByLionState`. Its updates have the dtype of the
      gradients, or float32 at least where the average has another one.

    Raises:
      ValueError: ``kappa`` is not a Kappa.
    """
    function = kappas.l1() if kappa is None else kappa
    if not isinstance(function, kappas.Kappa):
        raise ValueError(f"kappa must be an optim.kappa.Kappa such as l2(), got {kappa!r}")

    def update_fn(
        updates: PyTree, state: ScaleByLionState, params: PyTree = None
    ) -> tuple[PyTree, ScaleByLionState]:
        del params
        new = averaged(updates, state.mu, b2)

        def direction(g: ArrayLike, old: Array, new: Array) -> Array:
            u = function.subgradient(blended(g, old, new, b1, b2))
            # The compiler would leave some of them whole on every device.
            return alike(u.astype(_numerics.common_dtype(jnp.result_type(g), old.dtype)), g)

        steps = jax.tree.map(direction, updates, state.mu, new)
        return steps, advanced(state, new)

    return optax.GradientTransformation(lambda params: start(params, mu_dtype), update_fn)


def lion_k(
    learning_rate: optax.ScalarOrSchedule,
    kappa: kappas.Kappa | None = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Setting = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lion with another convex function than the 1-norm, which solves another constrained problem.

    .. math::
        x_{t+1} = x_t - \eta_t (\nabla\mathcal K(b_1 m_t + (1 - b_1) g_t) + \lambda x_t)

    Lion-K minimises :math:`f(x) + \mathcal K^*(\lambda x)/\lambda`, which ``kappa.problem`` states
    in words.

    Args:
      learning_rate: a number or a schedule.
      kappa: the function, one of :mod:`optim.kappa` or a ``Kappa`` of one's own; ``l1()``, which is
        Lion, by default.
      b1: weight of the moving average in the direction.
      b2: decay of the moving average.
      mu_dtype: dtype that the moving average is stored in; that of the parameters by default.
      weight_decay: a number or a schedule. Its inverse is the size of the constraint set.
      mask: which leaves are decayed, all by default: a tree of bools (a prefix of the parameters'
        tree) or a function of the parameters that returns one.

    Returns:
      A transform for ``optax.apply_updates``. Its update needs the parameters.

    Raises:
      ValueError: ``kappa`` is not a Kappa.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optim
      >>> print(optim.kappa.l2().problem)
      minimise f subject to the Euclidean norm of x <= 1/wd
      >>> f = lambda x: jnp.sum((x - 3.0) ** 2)         # its minimum is outside that ball
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
