"""SGDP: SGD with momentum that does not let scale-invariant weights grow."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Int, PyTree

from optim import _numerics
from optim._trees import Scalar, Setting, need_params
from optim.adamp import with_decay


class ScaleBySgdpState(NamedTuple):
    """State of :func:`scale_by_sgdp`.

    Attributes:
      count: int32 scalar, the number of updates so far.
      momentum: tree like the parameters.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # as optax names it
    momentum: PyTree


def scale_by_sgdp(
    momentum: Scalar | None = 0.0,
    nesterov: bool = False,
    accumulator_dtype: DTypeLike | None = None,
    *,
    dampening: Scalar = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Setting = None,
    eps: Scalar = 1e-8,
    delta: Scalar = 0.1,
    wd_ratio: Scalar = 0.1,
    channel_axis: Setting = None,
    batch_axes: Setting = None,
) -> optax.GradientTransformation:
    """The direction of SGD with momentum without its radial part, plus the decayed parameters.

    The momentum begins at 0 and is never projected, as in the paper. (The authors' program without
    nesterov projects the momentum itself, since step and momentum share memory there; its steps
    differ from these.)

    Narrow dtypes are computed in float32, and the momentum is rounded when it is stored.

    Args:
      momentum: decay of the momentum, from 0 to below 1; None is 0.
      nesterov: step by the gradient plus ``momentum`` times the momentum.
      accumulator_dtype: dtype that the momentum is stored in; that of the parameters by default.
      dampening: the part of a gradient that does not enter the momentum.
      weight_decay: a number, or a schedule over updates; it is divided by 1 - ``momentum``.
      mask, eps, delta, wd_ratio, channel_axis, batch_axes: as in :func:`optim.scale_by_adamp`.

    Returns:
      A transform with a :class:`ScaleBySgdpState`. Its update needs the parameters. Its updates
      have the dtype of the gradients, or float32 at least where the parameters have another one.

    Raises:
      ValueError: ``momentum`` is a number outside [0, 1), or ``nesterov`` is not a bool.
    """
    rate: Scalar = 0.0 if momentum is None else momentum
    if isinstance(rate, int | float) and not 0 <= rate < 1:
        raise ValueError(f"momentum must be from 0 to below 1, got {momentum}")
    if not isinstance(nesterov, bool):
        raise ValueError(f"nesterov must be a bool, got {nesterov}; dampening is a keyword")
    dtype = None if accumulator_dtype is None else jax.dtypes.canonicalize_dtype(accumulator_dtype)

    def init_fn(params: PyTree) -> ScaleBySgdpState:
        return ScaleBySgdpState(jnp.zeros([], jnp.int32), _numerics.zeros_like(params, dtype))

    def update_fn(
        updates: PyTree, state: ScaleBySgdpState, params: PyTree = None
    ) -> tuple[PyTree, ScaleBySgdpState]:
        params = need_params(params)

        def advance(g: Array, m: Array) -> tuple[Array]:
            return (rate * m + (1 - dampening) * g,)

        def step(g: Array, m: Array) -> Array:
            return g + rate * m if nesterov else m

        decay = weight_decay(state.count) if callable(weight_decay) else weight_decay
        out, (new,) = with_decay(
            step, advance, (state.momentum,), updates, params, decay=decay / (1 - rate),
            mask=mask, channel_axis=channel_axis, batch_axes=batch_axes,
            delta=delta, wd_ratio=wd_ratio, eps=eps,
        )  # fmt: skip
        return out, ScaleBySgdpState(optax.safe_increment(state.count), new)

    return optax.GradientTransformation(init_fn, update_fn)


def sgdp(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Scalar | None = 0.0,
    nesterov: bool = False,
    accumulator_dtype: DTypeLike | None = None,
    *,
    dampening: Scalar = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Setting = None,
    eps: Scalar = 1e-8,
    delta: Scalar = 0.1,
    wd_ratio: Scalar = 0.1,
    channel_axis: Setting = None,
    batch_axes: Setting = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGDP: SGD with momentum, for networks whose weights are followed by a normalisation.

    .. math::
        x_{t+1} = x_t - \eta \left(\Pi_{x_t}(m_t) + \frac{\lambda\rho}{1 - \mu} x_t\right)

    with the projection :math:`\Pi` and the factor :math:`\rho` of :func:`optim.adamp`, and
    :math:`\mu` the decay of the momentum. The first four arguments are those of ``optax.sgd``; the
    others are keywords.

    Args:
      learning_rate: a number or a schedule.
      momentum, nesterov, accumulator_dtype, dampening: see :func:`optim.scale_by_sgdp`.
      weight_decay, mask, eps, delta, wd_ratio: see :func:`optim.scale_by_sgdp`.
      channel_axis, batch_axes: see :func:`optim.scale_by_sgdp`.

    Returns:
      A transform for ``optax.apply_updates``. Its update needs the parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optim
      >>> f = lambda x: jnp.sum((x @ jnp.ones(3) - 1) ** 2)
      >>> solver = optim.sgdp(learning_rate=0.02, momentum=0.9)
      >>> x = jnp.array([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
      >>> state = solver.init(x)
      >>> for _ in range(3):
      ...     updates, state = solver.update(jax.grad(f)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      ...     print(f"objective: {f(x):.2f}")
      objective: 19.36
      objective: 11.10
      objective: 3.88

    References:
      Heo et al., `AdamP <https://arxiv.org/abs/2006.08217>`_, 2021
    """
    return optax.chain(
        scale_by_sgdp(
            momentum, nesterov, accumulator_dtype, dampening=dampening, weight_decay=weight_decay,
            mask=mask, eps=eps, delta=delta, wd_ratio=wd_ratio, channel_axis=channel_axis,
            batch_axes=batch_axes,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )  # fmt: skip
