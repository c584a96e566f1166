r"""How near a run of Lion or Lion-K is to the solution of the problem that it solves.

All of them take the tree of the parameters and the kappa and weight decay of the run. The momentum
is optax's ``mu`` (the average of the gradients, the paper's with its sign changed).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from optim.kappa import Kappa, l1
from optim.lion import ScaleByLionState

Scalar = Float[Array, ""]


def constraint_violation(params: Any, weight_decay: Any, kappa: Kappa | None = None) -> Scalar:
    r"""The Euclidean distance of :math:`\lambda x` to the set that it is to be in, 0 inside.

    Phase I: with explicit decay it shrinks by a factor of at most :math:`1 - \eta\lambda` a step.

    Example:
      >>> constraint_violation({"w": jnp.array([0.5, 3.0])}, 1.0).item()
      2.0
    """
    function = kappa or l1()
    parts = [function.distance(weight_decay * x) for x in jax.tree.leaves(params)]
    return jnp.sqrt(sum(part**2 for part in parts))


def kkt_score(grads: Any, params: Any, weight_decay: Any, kappa: Kappa | None = None) -> Scalar:
    r"""How far from stationary, :math:`\mathcal K(g) + \mathcal K^*(\lambda x) + \lambda\langle x, g\rangle`.

    By the Fenchel-Young inequality it is at least 0, and 0 just where :math:`\lambda x` is in the
    subdifferential at minus the gradient: the Karush-Kuhn-Tucker conditions of the problem. For Lion
    it is :math:`\|g\|_1 + \lambda\langle x, g\rangle` inside the box. Infinite outside of the constraint.

    Args:
      grads: gradients of the loss at ``params``.
      params: the parameters.
      weight_decay: of the run.
      kappa: of the run; ``l1()``, Lion, by default.
    """
    function = kappa or l1()
    parts = [
        function.value(g) + function.conjugate(weight_decay * x) + weight_decay * jnp.sum(x * g)
        for g, x in zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True)
    ]
    return jnp.asarray(sum(parts))


def lyapunov(
    state: ScaleByLionState | Any,
    params: Any,
    f: Callable[[Any], Scalar],
    *,
    learning_rate: float,
    weight_decay: float,
    b1: float = 0.9,
    b2: float = 0.99,
    kappa: Kappa | None = None,
) -> Scalar:
    r"""The function that Lion-K decreases, for its discrete steps.

    .. math::
        H(x, m) = f(x) + \frac{\mathcal K^*(\lambda x)}{\lambda}
        + c' \left(\mathcal K^*(\lambda x) + \mathcal K(m) + \lambda\langle x, m\rangle\right), \quad
        c' = \frac{\eta' b_1}{\eta'\lambda(1 - b_1) + 1 - b_2}, \quad \eta' = \frac{\eta}{1 - \eta\lambda}

    with m the moving average of the gradients. The last bracket is at least 0, so the minimum over m is the
    objective that is solved. From step to step it falls, but for a term
    :math:`\tfrac L2 \eta'^2 \|V\|^2`: where kappa is not smooth it may rise by that much.

    Args:
      state: that of the transform, alone or in a chain.
      params: the parameters.
      f: the loss of the parameters.
      learning_rate: of the step, below 1 / weight_decay.
      weight_decay: of the run, above 0.
      b1: of the run.
      b2: of the run, at least b1.
      kappa: of the run; ``l1()``, Lion, by default.

    Raises:
      ValueError: where ``state`` holds no state of Lion or Lion-K.
    """
    function = kappa or l1()
    mu = optax.tree.get(state, "mu", None)
    if mu is None:
        raise ValueError(
            f"state holds no moving average 'mu': {type(state).__name__}; that of lion_k is right"
        )
    step = learning_rate / (1 - learning_rate * weight_decay)
    c = step * b1 / (step * weight_decay * (1 - b1) + (1 - b2))
    total = f(params)
    for x, m in zip(jax.tree.leaves(params), jax.tree.leaves(mu), strict=True):
        conjugate = function.conjugate(weight_decay * x)
        young = conjugate + function.value(m) + weight_decay * jnp.sum(x * m)
        total = total + conjugate / weight_decay + c * young
    return total
