"""GaLore: the full optimizer in the leading subspace of the gradient."""

from typing import Any

import optax

from optim._trees import Scalar
from optim.frugal import frugal
from optim.projector._bases import Side, svd


def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    update_gap: int | None = 200,
    scale: Scalar = 0.25,
    base: optax.GradientTransformation | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    *,
    side: Side = "std",
    split: Any = None,
    dimension_numbers: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""GaLore: :func:`optim.frugal` with singular vectors, nothing of the rest, and moments that stay.

    .. math::
        x_{t+1} = x_t - \eta_t (s\, P_t^\top \operatorname{Adam}(P_t g_t) + \lambda x_t)

    P are the leading singular vectors of the gradient, every ``update_gap`` steps anew. The moments are
    those of the old subspace then, as in the authors' program.

    State: with r the rank, 8 r max(rows, columns) + 4 r min(rows, columns) bytes for a float32 matrix by
    ``side="std"``; 8 r min + 4 r max by ``"reverse_std"``.

    Args:
      learning_rate: a number or a schedule.
      rank: how many singular vectors, at most as many as a matrix has rows or columns.
      update_gap: steps from one decomposition to the next; None: only where ``update`` is called with
        ``refresh=True``, as should be under ``vmap`` (see :func:`optim.scale_by_frugal`).
      scale: s, on the steps of what is projected.
      base: any optax transform; ``optax.scale_by_adam()`` by default.
      weight_decay: a number or a schedule; the decay of a step is times the learning rate.
      mask: a tree or a function of the parameters: what is decayed; everything by default.
      side: ``"std"``, the official rule; ``"reverse_std"``, that of ``optax.contrib.galore``; see
        :func:`optim.projector.svd`.
      split, dimension_numbers: see :func:`optim.scale_by_frugal`.

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
    return frugal(
        learning_rate, 1.0, svd(rank, side), update_gap, base, None, weight_decay, mask,
        on_refresh="keep", split=split, dimension_numbers=dimension_numbers, proj_lr_scale=scale,
    )  # fmt: skip
