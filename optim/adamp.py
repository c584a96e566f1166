"""AdamP: Adam that does not let scale-invariant weights grow."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from optim._radial import Projected, project
from optim._trees import Scalar, broadcast, need_params


def scale_by_adamp(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    *,
    delta: Scalar = 0.1,
    wd_ratio: Scalar = 0.1,
    nesterov: bool = False,
    mu_dtype: Any = None,
    channel_axis: Any = None,
    batch_axes: Any = None,
) -> optax.GradientTransformation:
    """Adam's direction without its radial part, and the weight decay that goes with it.

    The decay is inside, since it depends on what was taken out.

    Args:
      b1, b2, eps: of Adam, with bias correction.
      weight_decay: a number, or a schedule over updates.
      mask: a tree or a function of the parameters: what is decayed; everything by default.
      delta: how small the cosine of gradient and weights has to be (times 1 / sqrt(size)).
      wd_ratio: factor on the weight decay of weights that are found scale-invariant.
      nesterov: look one step ahead with the first moment.
      mu_dtype: dtype of the first moment; that of the gradients by default.
      channel_axis: the axis of the output channels: a number, or a tree (a prefix of the parameters',
        or a function of them) of numbers. None is the last, where JAX keeps them; PyTorch's is 0.
      batch_axes: as ``channel_axis``: how many leading axes number layers of a stack, each of which is
        decided for itself; None is 0.

    Returns:
      A transform whose state is an ``optax.ScaleByAdamState``.
    """
    adam = optax.scale_by_adam(b1, b2, eps=0.0, mu_dtype=mu_dtype)
    dtype = None if mu_dtype is None else jax.dtypes.canonicalize_dtype(mu_dtype)

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        params = need_params(params)
        count = optax.safe_increment(state.count)
        c1 = 1 - jnp.asarray(b1, jnp.float32) ** count
        c2 = 1 - jnp.asarray(b2, jnp.float32) ** count
        if jax.config.jax_enable_x64:  # type: ignore[attr-defined]
            c1, c2 = 1 - jnp.asarray(b1, float) ** count, 1 - jnp.asarray(b2, float) ** count

        # Once, and not for every entry, where divisions take longest of all.
        scale, root_scale = 1 / c1, 1 / jnp.sqrt(c2)

        def advance(g: Array, m: Array, v: Array) -> tuple[Array, Array]:
            m = optax.tree.update_moment(g, m, b1, 1)
            return m, optax.tree.update_moment_per_elem_norm(g, v, b2, 2)

        def step(g: Array, m: Array, v: Array) -> Array:
            if nesterov:
                m = optax.tree.update_moment(g, m, b1, 1)
            return m * scale.astype(v.dtype) / (jnp.sqrt(v) * root_scale.astype(v.dtype) + eps)

        decay = weight_decay(state.count) if callable(weight_decay) else weight_decay
        new, (mu, nu) = with_decay(
            step, advance, (state.mu, state.nu), updates, params, decay, mask, channel_axis, batch_axes,
            delta=delta, wd_ratio=wd_ratio, eps=eps,
        )  # fmt: skip
        mu = optax.tree.cast(mu, dtype)
        return new, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(adam.init, update_fn)


def with_decay(
    step: Callable[..., Array],
    advance: Callable[..., Sequence[Array]],
    moments: Sequence[Any],
    grads: Any,
    params: Any,
    decay: Any,
    mask: Any,
    channel_axis: Any,
    batch_axes: Any,
    **settings: Scalar,
) -> tuple[Any, tuple[Any, ...]]:
    """Projected steps, functions of the advanced moments, plus the decayed parameters, for every leaf; and
    those moments."""

    def of(g: Array, x: Array, axis: int, batch: int, decayed: bool, *moments: Array) -> Any:
        found: Projected = project(
            step, g, x, *moments, advance=advance, channel_axis=axis, batch_axes=batch, **settings
        )
        out = found.step + (decay * found.decay * x if decayed else 0)
        return out.astype(g.dtype), found.moments

    # None and not a number is the default, so that inject_hyperparams takes neither for a rate.
    defaults = ((channel_axis, -1), (batch_axes, 0), (mask, True))
    each = [broadcast(p, params, default) for p, default in defaults]
    tree: Any = jax.tree.structure(grads)
    found = tree.flatten_up_to(jax.tree.map(of, grads, params, *each, *moments))
    new = (tree.unflatten([m[i] for _, m in found]) for i in range(len(moments)))
    return tree.unflatten([step for step, _ in found]), tuple(new)


def adamp(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    *,
    delta: Scalar = 0.1,
    wd_ratio: Scalar = 0.1,
    nesterov: bool = False,
    mu_dtype: Any = None,
    channel_axis: Any = None,
    batch_axes: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamP: for networks whose weights are followed by a normalisation.

    Where the output does not change with the norm of some weights, momentum lets that norm grow, and
    so the effective step shrink. AdamP finds such weights (the gradient is orthogonal to them, channel by
    channel or over a layer) and takes the radial part out of their step:

    .. math::
        x_{t+1} = x_t - \eta (\Pi_{x_t}(\hat m_t / (\sqrt{\hat v_t} + \epsilon)) + \lambda \rho\, x_t)

    with :math:`\rho` = ``wd_ratio`` where the projection :math:`\Pi` applies, 1 elsewhere.

    A gradient of exactly zero counts as orthogonal, as in the authors' program.

    Args: see :func:`optim.scale_by_adamp`.

    Returns:
      A transform for ``optax.apply_updates``; its update needs the parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optim
      >>> f = lambda x: jnp.sum((x @ jnp.ones(3) - 1) ** 2)
      >>> solver = optim.adamp(learning_rate=0.1)
      >>> x = jnp.array([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
      >>> state = solver.init(x)
      >>> for _ in range(3):
      ...     updates, state = solver.update(jax.grad(f)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      ...     print(f"objective: {f(x):.2f}")
      objective: 22.09
      objective: 19.37
      objective: 16.83

    References:
      Heo et al., `AdamP <https://arxiv.org/abs/2006.08217>`_, 2021
    """
    return optax.chain(
        scale_by_adamp(
            b1, b2, eps, weight_decay, mask, delta=delta, wd_ratio=wd_ratio, nesterov=nesterov,
            mu_dtype=mu_dtype, channel_axis=channel_axis, batch_axes=batch_axes,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )  # fmt: skip
