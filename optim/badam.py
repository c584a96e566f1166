"""BAdam: Adam on one block of layers at a time."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, PyTree

from optim._cut import cut
from optim._sharding import gathered
from optim._trees import Setting, broadcast, need_params
from optim.frugal import FrugalState, scale_by_frugal
from optim.projector._blocks import Order, Unit, active_entries, blockwise


def badam(
    learning_rate: optax.ScalarOrSchedule,
    update_gap: int | None = 50,
    base: optax.GradientTransformation | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Setting = None,
    *,
    order: Order = "shuffled",
    unit: Unit = "layer",
    active: int = 1,
    split: Setting = True,
    dimension_numbers: Setting = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""BAdam: Adam on one block of layers at a time; the other blocks stay as they are.

    .. math::
        x_{t+1} = x_t - \eta_t (\operatorname{Adam}(g_t) + \lambda x_t) \text{ on the active block},
        \qquad \text{another one every } T \text{ steps}

    Moments start from zero with each block.

    State: 8 bytes a parameter of the largest block (float32), whatever the size of the model.

    Differences from the authors' program: it leaves embeddings and head out (``optax.partition``
    with ``optax.set_to_zero()`` does that here); it goes through the layers in descending order by
    default, and ``"shuffled"`` is its ``"random"``; its first block gets ``update_gap - 1``
    updates, here all blocks get as many; it decays no biases (``mask`` does that here).

    Args:
      learning_rate: a number or a schedule.
      update_gap: steps from one block to the next; None: only where ``update`` is called with
        ``refresh=True``.
      base: any optax transform that works entry by entry; ``optax.scale_by_adam()`` by default.
      weight_decay: a number, or a schedule over updates; of the active block, times the learning
        rate.
      mask: a tree or a function of the parameters: which leaves decay in their turn; all by
        default.
      order, unit, active: see :func:`optim.projector.blockwise`.
      split: which leaves take turns, all by default; the others have Adam all the time.
      dimension_numbers: which axes number the layers of a stack: see :func:`optim.linear_weights`.
        By default stacks are read from the tree.
      key: a seed or a key for the order.

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
    projector = blockwise(order, unit, active)
    inner = scale_by_frugal(
        1.0, projector, update_gap, base, None,
        split=split, dimension_numbers=dimension_numbers, key=key,
    )  # fmt: skip

    def update_fn(
        updates: PyTree, state: FrugalState, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, FrugalState]:
        params = need_params(params)
        steps, new = inner.update(updates, state, params, **extra)
        rate = weight_decay(state.count) if callable(weight_decay) else weight_decay
        # Only the active block decays, and the leaves that take no turns.
        parts = cut(updates, split, dimension_numbers)
        blocks = gathered(new.projection)
        here = active_entries(jax.eval_shape(parts.split, updates), blocks, unit)
        here = parts.join(here, jax.tree.map(lambda _: True, parts.whole(updates)), updates)

        def decayed(u: Array, x: ArrayLike, is_here: ArrayLike, is_decayed: ArrayLike) -> Array:
            decay = jnp.where(is_here, rate * jnp.asarray(x), 0)
            return u + decay.astype(u.dtype) if is_decayed else u

        which = broadcast(mask, params, True)
        return jax.tree.map(decayed, steps, params, here, which), new

    return optax.chain(
        optax.GradientTransformationExtraArgs(inner.init, update_fn),
        optax.scale_by_learning_rate(learning_rate),
    )
