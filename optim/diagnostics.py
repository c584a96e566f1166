r"""How near a run of Lion or Lion-K is to the solution of the problem that it solves.

All functions take the tree of the parameters, and the kappa and weight decay of the run. The
momentum is optax's ``mu``, the average of the gradients: the paper's momentum with its sign
changed. Values are float32 or float64. Complex leaves count as their real and imaginary parts.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from optim import _numerics
from optim._numerics import wide
from optim._trees import Scalar
from optim.kappa import Kappa, l1

Value = Float[Array, ""]


def constraint_violation(params: PyTree, weight_decay: Scalar, kappa: Kappa | None = None) -> Value:
    r"""The Euclidean distance of :math:`\lambda x` to the constraint set, 0 inside.

    Every step with explicit decay shrinks it at least by the factor :math:`1 - \eta\lambda` (phase
    I of the paper).

    Args:
      params: the parameters.
      weight_decay: of the run.
      kappa: of the run; ``l1()``, Lion, by default.

    Example:
      >>> constraint_violation({"w": jnp.array([0.5, 3.0])}, 1.0).item()
      2.0
    """
    function = kappa or l1()
    parts = [function.distance(weight_decay * wide(x)) for x in jax.tree.leaves(params)]
    return _numerics.euclidean(jnp.stack(parts)) if parts else jnp.zeros(())


def kkt_score(
    grads: PyTree, params: PyTree, weight_decay: Scalar, kappa: Kappa | None = None
) -> Value:
    r"""The gap of the Fenchel-Young inequality at the parameters, 0 at solutions.

    .. math::
        \mathcal K(g) + \mathcal K^*(\lambda x) + \lambda\langle x, g\rangle

    By the Fenchel-Young inequality it is at least 0. It is 0 exactly where :math:`\lambda x` is in
    the subdifferential at :math:`-g`, which are the Karush-Kuhn-Tucker conditions of the problem.
    For Lion it is :math:`\|g\|_1 + \lambda\langle x, g\rangle` inside the box. It is infinite
    outside the constraint set.

    Args:
      grads: gradients of the loss at ``params``.
      params: the parameters.
      weight_decay: of the run.
      kappa: of the run; ``l1()``, Lion, by default.

    Example:
      >>> inside = {"w": jnp.array([0.5, -1.0])}        # at the bound where the gradient is not 0
      >>> kkt_score({"w": jnp.array([0.0, 2.0])}, inside, 1.0).item()
      0.0
    """
    function = kappa or l1()
    leaves = zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True)
    return jnp.asarray(sum(_young(function, wide(g), wide(x), weight_decay)[1] for g, x in leaves))


def _young(function: Kappa, g: Array, x: Array, weight_decay: Scalar) -> tuple[Value, Value]:
    """The conjugate at the decayed parameters of a leaf, and the Fenchel-Young gap with ``g``."""
    conjugate = function.conjugate(weight_decay * x)
    product = jnp.sum(_numerics.real_product(x, g))
    return conjugate, conjugate + function.value(g) + weight_decay * product


def lyapunov(
    state: PyTree,
    params: PyTree,
    f: Callable[[PyTree], Value],
    *,
    learning_rate: Scalar,
    weight_decay: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    kappa: Kappa | None = None,
) -> Value:
    r"""The function that Lion-K decreases, for its discrete steps.

    .. math::
        H(x, m) = f(x) + \frac{\mathcal K^*(\lambda x)}{\lambda}
        + c' \left(\mathcal K^*(\lambda x) + \mathcal K(m) + \lambda\langle x, m\rangle\right), \quad
        c' = \frac{\eta' b_1}{\eta'\lambda(1 - b_1) + 1 - b_2}, \quad \eta' = \frac{\eta}{1 - \eta\lambda}

    with m the moving average of the gradients. The last bracket is at least 0, so that the minimum
    over m is the objective that Lion-K minimises. Every step decreases H but for a term
    :math:`\tfrac L2 \eta'^2 \|V\|^2`: where kappa is not smooth, H may increase by that much.

    Args:
      state: the state of the transform, alone or in a chain.
      params: the parameters.
      f: the loss of the parameters.
      learning_rate: of the step, below 1 / ``weight_decay``.
      weight_decay: of the run, above 0.
      b1: of the run.
      b2: of the run, at least ``b1``.
      kappa: of the run; ``l1()``, Lion, by default.

    Raises:
      ValueError: ``state`` holds no moving average of Lion or Lion-K.
    """
    function = kappa or l1()
    mu = optax.tree.get(state, "mu", None)
    if mu is None:
        raise ValueError(
            f"state must be that of lion or lion_k, got a {type(state).__name__} without 'mu'"
        )
    step = learning_rate / (1 - learning_rate * weight_decay)
    c = step * b1 / (step * weight_decay * (1 - b1) + (1 - b2))
    total = f(params)
    for x, m in zip(jax.tree.leaves(params), jax.tree.leaves(mu), strict=True):
        conjugate, young = _young(function, wide(m), wide(x), weight_decay)
        total = total + conjugate / weight_decay + c * young
    return total
