"""SGDP: SGD with momentum that does not let scale-invariant weights grow."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from optim._trees import Scalar, need_params
from optim.adamp import with_decay


class ScaleBySgdpState(NamedTuple):
    """State of :func:`scale_by_sgdp`.

    Attributes:
      count: int32 scalar, updates done.
      momentum: tree of the parameters.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # as optax names it
    momentum: Any


def scale_by_sgdp(
    momentum: Scalar = 0.0,
    dampening: Scalar = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    *,
    nesterov: bool = False,
    eps: Scalar = 1e-8,
    delta: Scalar = 0.1,
    wd_ratio: Scalar = 0.1,
    channel_axis: Any = None,
    batch_axes: Any = None,
) -> optax.GradientTransformation:
    """The direction of SGD with momentum without its radial part, and the weight decay with it.

    The momentum begins at 0 and is never projected, as in the paper. (In the authors' program, without
    nesterov, the projection is taken out of the momentum itself, through memory that both share: its
    steps are then others.)

    Args:
      momentum: decay of the momentum, below 1.
      dampening: what of a gradient does not enter the momentum.
      weight_decay: a number, or a schedule over updates; divided by 1 - momentum.
      mask: a tree or a function of the parameters: what is decayed; everything by default.
      nesterov: gradient plus momentum times the momentum.
      eps, delta, wd_ratio, channel_axis, batch_axes: as in :func:`optim.scale_by_adamp`.

    Returns:
      A transform whose state is a :class:`ScaleBySgdpState`.
    """
    if isinstance(momentum, int | float) and not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum}: a number from 0 to below 1 is right")

    def init_fn(params: Any) -> ScaleBySgdpState:
        return ScaleBySgdpState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params))

    def update_fn(updates: Any, state: ScaleBySgdpState, params: Any = None) -> tuple[Any, Any]:
        params = need_params(params)

        def advance(g: Array, m: Array) -> tuple[Array]:
            return ((momentum * m + (1 - dampening) * g).astype(m.dtype),)

        def step(g: Array, m: Array) -> Array:
            return g + momentum * m if nesterov else m

        decay = weight_decay(state.count) if callable(weight_decay) else weight_decay
        out, (new,) = with_decay(
            step, advance, (state.momentum,), updates, params, decay / (1 - momentum), mask, channel_axis,
            batch_axes, delta=delta, wd_ratio=wd_ratio, eps=eps,
        )  # fmt: skip
        return out, ScaleBySgdpState(optax.safe_increment(state.count), new)

    return optax.GradientTransformation(init_fn, update_fn)


def sgdp(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Scalar = 0.0,
    dampening: Scalar = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    *,
    nesterov: bool = False,
    eps: Scalar = 1e-8,
    delta: Scalar = 0.1,
    wd_ratio: Scalar = 0.1,
    channel_axis: Any = None,
    batch_axes: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGDP: SGD with momentum, for networks whose weights are followed by a normalisation.

    .. math::
        x_{t+1} = x_t - \eta \left(\Pi_{x_t}(m_t) + \frac{\lambda\rho}{1 - \mu} x_t\right)

    with the projection :math:`\Pi` and the factor :math:`\rho` of :func:`optim.adamp`, :math:`\mu` the
    momentum's decay.

    Args: see :func:`optim.scale_by_sgdp`.

    Returns:
      A transform for ``optax.apply_updates``; its update needs the parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optim
      >>> f = lambda x: jnp.sum((x @ jnp.ones(3) - 1) ** 2)
      >>> solver = optim.sgdp(learning_rate=0.05, momentum=0.9)
      >>> x = jnp.array([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
      >>> state = solver.init(x)
      >>> for _ in range(3):
      ...     updates, state = solver.update(jax.grad(f)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      ...     print(f"objective: {f(x):.2f}")
      objective: 12.25
      objective: 1.21
      objective: 1.93

    References:
      Heo et al., `AdamP <https://arxiv.org/abs/2006.08217>`_, 2021
    """
    return optax.chain(
        scale_by_sgdp(
            momentum, dampening, weight_decay, mask, nesterov=nesterov, eps=eps, delta=delta,
            wd_ratio=wd_ratio, channel_axis=channel_axis, batch_axes=batch_axes,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )  # fmt: skip
