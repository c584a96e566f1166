"""BAdam: Adam on one block of layers at a time."""

from typing import Any

import jax
import optax

from optim._trees import broadcast, need_params
from optim.frugal import scale_by_frugal
from optim.projector._blocks import Order, Unit, blockwise


def badam(
    learning_rate: optax.ScalarOrSchedule,
    update_gap: int | None = 50,
    base: optax.GradientTransformation | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    *,
    order: Order = "shuffled",
    unit: Unit = "layer",
    active: int = 1,
    split: Any = True,
    dimension_numbers: Any = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""BAdam: :func:`optim.scale_by_frugal` by blocks; those that are not active stay as they are.

    .. math::
        x_{t+1} = x_t - \eta_t (\operatorname{Adam}(g_t) + \lambda x_t) \text{ on the active block},
        \qquad \text{another one every } T \text{ steps}

    Moments start from zero with each block. Every leaf takes its turn; the authors' program leaves embeddings
    and head out by default: ``optax.partition`` with ``optax.set_to_zero()`` does.

    State: 8 bytes a parameter of the largest block (float32), whatever the size of the model.

    Args:
      learning_rate: a number or a schedule.
      update_gap: steps from one block to the next; None: only where ``update`` is called with
        ``refresh=True``.
      base: any optax transform that works entry by entry; ``optax.scale_by_adam()`` by default.
      weight_decay: a number, or a schedule over updates; of the active block, times the learning rate.
      mask: a tree or a function of the parameters: what is decayed in its turn; everything by default.
      order, unit, active: see :func:`optim.projector.blockwise`.
      split: which leaves take turns, all by default; the others have Adam all the time.
      dimension_numbers: which axes number the layers of a stack: see :func:`optim.scale_by_frugal`.
      key: a seed or a key: what the order comes from.

    Returns:
      A transform for ``optax.apply_updates``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optim
      >>> f = lambda x: sum(jnp.sum(w**2) for w in x)
      >>> solver = optim.badam(learning_rate=0.1, update_gap=1)
      >>> x = [jnp.ones((2, 2)), jnp.ones(3)]
      >>> state = solver.init(x)
      >>> for _ in range(3):
      ...     updates, state = solver.update(jax.grad(f)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      ...     print(f"objective: {f(x):.2f}")
      objective: 6.43
      objective: 5.67
      objective: 4.99

    References:
      Luo et al., `BAdam <https://arxiv.org/abs/2404.02827>`_, 2024, algorithm 1
    """
    adam = optax.scale_by_adam() if base is None else base
    # The decay is inside, so that it is of the active block alone: what it adds is what the full optimizer is
    # told the parameters are.
    inner = scale_by_frugal(
        1.0, blockwise(order, unit, active), update_gap,
        optax.chain(adam, optax.add_decayed_weights(1.0)), None,
        split=split, dimension_numbers=dimension_numbers, key=key,
    )  # fmt: skip

    def update_fn(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        params = need_params(params)
        rate = weight_decay(state.count) if callable(weight_decay) else weight_decay
        decayed = jax.tree.map(
            lambda x, is_decayed: (rate * x if is_decayed else 0 * x).astype(x.dtype),
            params,
            broadcast(mask, params, True),
        )
        return inner.update(updates, state, decayed, **extra)

    return optax.chain(
        optax.GradientTransformationExtraArgs(inner.init, update_fn),
        optax.scale_by_learning_rate(learning_rate),
    )
