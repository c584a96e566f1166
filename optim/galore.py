"""GaLore: the full optimizer in the leading subspace of the gradient."""

import optax

from optim._deprecated import UNSET, Unset, renamed
from optim._trees import Scalar, Setting
from optim.frugal import frugal
from optim.projector._bases import Side, svd


def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    update_proj_gap: int | None = 200,
    scale: Scalar = 0.25,
    base_optimizer: optax.GradientTransformation | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Setting = None,
    weight_dimension_numbers: Setting = None,
    *,
    side: Side = "std",
    split: Setting = None,
    update_gap: int | Unset | None = UNSET,
    base: optax.GradientTransformation | Unset | None = UNSET,
    dimension_numbers: Setting | Unset = UNSET,
) -> optax.GradientTransformationExtraArgs:
    r"""GaLore: :func:`optim.frugal` in singular vectors, without the rest, with moments that stay.

    .. math::
        x_{t+1} = x_t - \eta_t (s\, P_t^\top \operatorname{Adam}(P_t g_t) + \lambda x_t)

    P are the leading singular vectors of the gradient, computed anew every ``update_proj_gap``
    steps. The moments remain those of the old subspace, as in the authors' program.

    State: with r the rank, 8 r max(rows, columns) + 4 r min(rows, columns) bytes for a float32
    matrix with ``side="std"``; 8 r min + 4 r max with ``"reverse_std"``.

    Arguments have the names and the order of ``optax.contrib.galore``. Differences from it:

    * Only linear weights are projected; optax projects all matrices.
    * ``scale`` is 0.25 by default, the value that the authors recommend; optax's default is 1.
    * ``side="std"`` is the authors' rule; optax has ``"reverse_std"``.
    * Base optimizers may use parameters, which they see projected, and arguments of ``update``.
    * A refresh may be asked for: ``update(..., refresh=True)``.

    Differences from the authors' program: Adam's epsilon is optax's 1e-8, added after bias
    correction (theirs is 1e-6, added before); the weights decay from their values before the step
    (theirs, after it).

    Args:
      learning_rate: a number or a schedule.
      rank: how many singular vectors, at most as many as a matrix has rows or columns.
      update_proj_gap: steps from one decomposition to the next; None: only where ``update`` is
        called with ``refresh=True``, as it should be under ``vmap`` (see
        :func:`optim.scale_by_frugal`).
      scale: s, on the steps of what is projected.
      base_optimizer: any optax transform; ``optax.scale_by_adam()`` by default.
      weight_decay: a number or a schedule; the decay of a step is this times the learning rate.
      mask: a tree or a function of the parameters: which leaves decay; all by default.
      weight_dimension_numbers: which axes are rows, columns and a stack of layers: see
        :func:`optim.linear_weights`. ``optax.contrib.GaLoreDimensionNumbers`` are taken.
      side: which side is projected, see :func:`optim.projector.svd`.
      split: which leaves are projected, see :func:`optim.scale_by_frugal`.
      update_gap, base, dimension_numbers: deprecated names of ``update_proj_gap``,
        ``base_optimizer`` and ``weight_dimension_numbers``.

    Returns:
      A transform for ``optax.apply_updates``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optim
      >>> f = lambda w: jnp.sum((w @ jnp.array([1.0, 2.0, 3.0, 4.0]) - 1) ** 2)
      >>> solver = optim.galore(learning_rate=0.1, rank=1, scale=1.0)
      >>> w = jnp.ones((3, 4))
      >>> state = solver.init(w)
      >>> for _ in range(3):
      ...     updates, state = solver.update(jax.grad(f)(w), state, w)
      ...     w = optax.apply_updates(w, updates)
      ...     print(f"objective: {f(w):.2f}")
      objective: 212.82
      objective: 184.71
      objective: 158.69

    References:
      Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024
    """
    gap = renamed("update_gap", update_gap, "update_proj_gap", update_proj_gap)
    inner = renamed("base", base, "base_optimizer", base_optimizer)
    numbers = renamed(
        "dimension_numbers", dimension_numbers, "weight_dimension_numbers", weight_dimension_numbers
    )
    return frugal(
        learning_rate, 1.0, svd(rank, side), gap, inner, None, weight_decay, mask,
        on_refresh="keep", split=split, dimension_numbers=numbers, proj_lr_scale=scale,
    )  # fmt: skip
