"""AdamP: Adam that does not let scale-invariant weights grow."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Inexact, PyTree

from optim import _numerics
from optim._numerics import common_dtype, wide
from optim._radial import Projected, project
from optim._trees import Scalar, Setting, broadcast, need_params


def scale_by_adamp(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    eps_root: Scalar = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Setting = None,
    nesterov: bool = False,
    delta: Scalar = 0.1,
    wd_ratio: Scalar = 0.1,
    channel_axis: Setting = None,
    batch_axes: Setting = None,
) -> optax.GradientTransformation:
    """Adam's direction without its radial part, plus the decayed parameters.

    The weight decay belongs here since it depends on whether a radial part was removed.

    Narrow dtypes are computed in float32, and moments are rounded when they are stored. The second
    moment is real. For float16 it is stored in float32, whose range a square needs; otherwise in
    the precision of the parameters. Parts of a finite gradient beyond the square root of the
    dtype's largest number (1e19 for float32) enter the moments as that.

    Args:
      b1, b2, eps, eps_root: as in ``optax.adamw``, with bias correction.
      mu_dtype: dtype that the first moment is stored in; that of the parameters by default.
      weight_decay: a number, or a schedule over updates.
      mask: which leaves are decayed, all by default: a tree of bools (a prefix of the parameters'
        tree) or a function of the parameters that returns one.
      nesterov: look one step ahead with the first moment.
      delta: bound on the cosine of gradient and weights (times 1 / sqrt(size)) below which the
        weights count as scale-invariant.
      wd_ratio: factor on the weight decay of scale-invariant weights.
      channel_axis: the axis of the output channels: an integer, a tree of integers (a prefix of the
        parameters' tree), or a function of the parameters that returns one. None is the last axis,
        where JAX has them; PyTorch's is 0.
      batch_axes: the number of leading axes that number the layers of a stack, each of which is
        decided separately; given as ``channel_axis`` is. None is 0.

    Returns:
      A transform with an ``optax.ScaleByAdamState``. Its update needs the parameters. Its updates
      have the dtype of the gradients, or float32 at least where the parameters have another one.

    Raises:
      ValueError: by the update, where the parameters are missing or a matrix has no
        ``channel_axis``.
    """
    dtype = None if mu_dtype is None else jax.dtypes.canonicalize_dtype(mu_dtype)

    def init_fn(params: PyTree) -> optax.ScaleByAdamState:
        nu = jax.tree.map(lambda x: jnp.zeros_like(x, _square_dtype(jnp.result_type(x))), params)
        mu = _numerics.zeros_like(params, dtype)
        return optax.ScaleByAdamState(count=jnp.zeros([], jnp.int32), mu=mu, nu=nu)

    def update_fn(
        updates: PyTree, state: optax.ScaleByAdamState, params: PyTree = None
    ) -> tuple[PyTree, optax.ScaleByAdamState]:
        params = need_params(params)
        count = optax.safe_increment(jnp.asarray(state.count))
        is_x64 = jax.config.jax_enable_x64  # type: ignore[attr-defined]
        rates = (jnp.asarray(b, jnp.float64 if is_x64 else jnp.float32) for b in (b1, b2))
        # Divided once and not for every entry, where a division takes longest of all operations.
        mu_scale, nu_scale = (1 / (1 - b**count) for b in rates)

        def advance(g: Array, m: Array, v: Array) -> tuple[Array, Array]:
            g = _squarable(g)
            return b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * _numerics.real_product(g, g)

        def step(g: Array, m: Array, v: Array) -> Array:
            if nesterov:
                m = b1 * m + (1 - b1) * _squarable(g)
            v = v * nu_scale.astype(v.dtype)
            # The default is left out, so that it costs nothing.
            is_plain = isinstance(eps_root, int | float) and eps_root == 0
            root = jnp.sqrt(v if is_plain else v + eps_root)
            return _numerics.divided(m * mu_scale.astype(v.dtype), root + eps)

        new, (mu, nu) = with_decay(
            step, advance, (state.mu, state.nu), updates, params,
            decay=weight_decay(state.count) if callable(weight_decay) else weight_decay,
            mask=mask, channel_axis=channel_axis, batch_axes=batch_axes,
            delta=delta, wd_ratio=wd_ratio, eps=eps,
        )  # fmt: skip
        return new, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(init_fn, update_fn)


def _square_dtype(dtype: DTypeLike) -> DTypeLike:
    """The dtype that squares are stored in: real, and not float16, which lacks the range."""
    dtype = _numerics.real_dtype(dtype)
    return jnp.float32 if dtype == jnp.float16 else dtype


def _squarable(g: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
    """The gradient, with entries whose squares would overflow shortened; infinite ones stay."""
    most = 0.5 * float(jnp.finfo(g.dtype).max) ** 0.5
    if not jnp.iscomplexobj(g):
        return jnp.where(jnp.isinf(g), g, jnp.clip(g, -most, most))
    return jnp.where((jnp.abs(g) > most) & jnp.isfinite(g), most * _numerics.sign(g), g)


def with_decay(
    step: Callable[..., Array],
    advance: Callable[..., Sequence[Array]],
    moments: Sequence[PyTree],
    grads: PyTree,
    params: PyTree,
    *,
    decay: Scalar,
    mask: Setting,
    channel_axis: PyTree,
    batch_axes: PyTree,
    **settings: Scalar,
) -> tuple[PyTree, tuple[PyTree, ...]]:
    """Projected steps plus the decayed parameters, and the advanced moments, as trees.

    Args:
      step, advance: functions of gradient and moments, see :func:`optim._radial.project`.
      moments: trees of the moments so far; the advanced ones are returned in their dtypes.
      grads, params: trees of one structure.
      decay: the weight decay of this update.
      mask, channel_axis, batch_axes: as in :func:`scale_by_adamp`.
      **settings: further keywords of ``project``.
    """

    def of(
        path: tuple,
        g: ArrayLike,
        x: ArrayLike,
        axis: int,
        batch: int,
        is_decayed: bool,
        *old: Array,
    ) -> tuple[Array, list[Array]]:
        g, x = jnp.asarray(g), jnp.asarray(x)
        if x.ndim - batch >= 2 and not batch - x.ndim <= axis < x.ndim - batch:
            name = jax.tree_util.keystr(path, simple=True, separator="/") or "the parameter"
            raise ValueError(
                f"channel_axis must be an axis of {name}, of shape {x.shape[batch:]}, got {axis}"
            )
        found: Projected = project(
            step, g, x, *old, advance=advance, channel_axis=axis, batch_axes=batch, **settings
        )
        out = found.step + decay * found.decay * wide(x) if is_decayed else found.step
        kept = [new.astype(m.dtype) for new, m in zip(found.moments, old, strict=True)]
        return out.astype(common_dtype(g.dtype, x.dtype)), kept

    # None and not a number is the default, so that inject_hyperparams does not take it for a rate.
    defaults = ((channel_axis, -1), (batch_axes, 0), (mask, True))
    each = [broadcast(p, params, default) for p, default in defaults]
    tree: Any = jax.tree.structure(grads)  # JAX gives this type no attributes
    found = tree.flatten_up_to(jax.tree_util.tree_map_with_path(of, grads, params, *each, *moments))
    new = (tree.unflatten([m[i] for _, m in found]) for i in range(len(moments)))
    return tree.unflatten([out for out, _ in found]), tuple(new)


def adamp(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    eps_root: Scalar = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Setting = None,
    nesterov: bool = False,
    delta: Scalar = 0.1,
    wd_ratio: Scalar = 0.1,
    channel_axis: Setting = None,
    batch_axes: Setting = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamP: for networks whose weights are followed by a normalisation.

    Where the output does not change with the norm of some weights, momentum lets that norm grow, so
    that the effective step shrinks. AdamP finds such weights by their gradient, which is orthogonal
    to them, channel by channel or over a layer. It removes the radial part from their step:

    .. math::
        x_{t+1} = x_t - \eta (\Pi_{x_t}(\hat m_t / (\sqrt{\hat v_t} + \epsilon)) + \lambda \rho\, x_t)

    with :math:`\rho` = ``wd_ratio`` where the projection :math:`\Pi` applies, 1 elsewhere.

    A gradient of exactly zero counts as orthogonal, as in the authors' program. The first four
    arguments are those of ``optax.adamw``; the others are keywords, with optax's names where optax
    has them. The default of ``weight_decay`` is the authors', 0.

    Args:
      learning_rate: a number or a schedule.
      b1, b2, eps, eps_root, mu_dtype, nesterov: see :func:`optim.scale_by_adamp`.
      weight_decay, mask: see :func:`optim.scale_by_adamp`.
      delta, wd_ratio, channel_axis, batch_axes: see :func:`optim.scale_by_adamp`.

    Returns:
      A transform for ``optax.apply_updates``. Its update needs the parameters.

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
            b1, b2, eps, eps_root=eps_root, mu_dtype=mu_dtype, weight_decay=weight_decay, mask=mask,
            nesterov=nesterov, delta=delta, wd_ratio=wd_ratio, channel_axis=channel_axis,
            batch_axes=batch_axes,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )  # fmt: skip
