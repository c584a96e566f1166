"""FRUGAL: a stateful optimizer on a small part of the gradient, a stateless one on the rest."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

# Not among optax's public names, though its own transforms ask for it.
from optax.tree_utils._state_utils import _ParamsPlaceholder

from optim._matrices import cut
from optim._trees import Scalar
from optim.projector import Projector, columns

OnRefresh = Literal["reset", "keep", "reproject"]


class FrugalState(NamedTuple):
    """State of :func:`scale_by_frugal`.

    Attributes:
      count: int32 scalar, updates done.
      turn: int32 scalar, splits drawn so far.
      key: two words, what is random comes from.
      projection: the projector's: indices or bases of the present split.
      part: state of the full optimizer on the compact part of what is split.
      whole: its state on the leaves that are not split.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # as optax names it
    turn: Int[Array, ""]
    key: Array
    projection: Any
    part: Any
    whole: Any


def _checked(
    density: Any, update_gap: Any, on_refresh: str, state_free: Any
) -> optax.GradientTransformation | None:
    """The stateless transform, once the settings are found right."""
    if not isinstance(density, int | float):
        raise ValueError(
            f"density={density}: a plain number is right, since it fixes shapes; "
            "under optax.inject_hyperparams, name it in static_args"
        )
    if not 0 <= density <= 1:
        raise ValueError(f"density={density}: a number from 0 to 1 is right")
    if update_gap is not None and (not isinstance(update_gap, int) or update_gap < 1):
        raise ValueError(
            f"update_gap={update_gap}: a whole number from 1 on is right, or None for refreshes by hand"
        )
    if on_refresh not in ("reset", "keep", "reproject"):
        raise ValueError(f"on_refresh={on_refresh!r}: 'reset', 'keep' or 'reproject' is right")
    if state_free is None or isinstance(state_free, optax.GradientTransformation):
        return state_free
    named = {"sign": optax.scale_by_sign, "sgd": optax.identity}
    if state_free not in named:
        raise ValueError(
            f"state_free={state_free!r}: 'sign', 'sgd', None or an optax transform is right"
        )
    return named[state_free]()


def _check_stateless(free: optax.GradientTransformation | None, rest: Any) -> None:
    if free is not None and jax.tree.leaves(free.init(_zeros(rest))):
        raise ValueError(f"state_free={free}: a transform without state is right")


def _cond(due: Any, new: Callable[[], Any], old: Any) -> Any:
    """``new()`` where it is due; no conditional where that is known beforehand."""
    if isinstance(due, bool):
        return new() if due else old
    return jax.lax.cond(due, new, lambda: old)


def _select(due: Any, new: Any, old: Any) -> Any:
    """The same for what costs nothing to make: it becomes part of the loop that reads it."""
    if isinstance(due, bool):
        return new if due else old
    return jax.tree.map(lambda a, b: jnp.where(due, a, b), new, old)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _words(key: Any) -> Array:
    """Any kind of key, or a seed, as the two words of a threefry key: arrays that every checkpoint takes."""
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        key = jax.random.key(key)
    return jax.random.bits(key, (2,), jnp.uint32)


def scale_by_frugal(
    density: float = 0.25,
    projector: Projector | None = None,
    update_gap: int | None = 200,
    state_full: optax.GradientTransformation | None = None,
    state_free: Literal["sign", "sgd"] | optax.GradientTransformation | None = "sign",
    *,
    on_refresh: OnRefresh = "reset",
    split: Any = None,
    dimension_numbers: Any = None,
    inactive_lr_scale: Scalar = 1.0,
    proj_lr_scale: Scalar = 1.0,
    key: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""A full optimizer on a compact part of the gradient, one without state on the rest of it.

    .. math::
        u_t = s\,(P_t^{-} \operatorname{full}(P_t g_t) + r \operatorname{free}(g_t - P_t^{-} P_t g_t))

    The split P changes at updates 0, T, 2T, ... (``update_gap``). Under ``vmap`` the condition on that
    becomes a selection and every update does the work of a refresh, which for :func:`optim.projector.svd`
    is a decomposition: say ``update_gap=None`` there, and call ``update(..., refresh=True)`` when one is
    due and ``refresh=False`` (a plain bool) otherwise.

    Args:
      density: the part of every split leaf that the full optimizer gets.
      projector: how it is chosen: see :mod:`optim.projector`; random columns by default.
      update_gap: updates between two splits; None: only where ``update`` is called with ``refresh=True``.
      state_full: any optax transform; ``optax.scale_by_adam()`` by default. It sees compact arrays, and
        parameters in the same form.
      state_free: ``"sign"``, ``"sgd"`` (the rest as it is), None (the rest is not used), or a transform of
        optax without state.
      on_refresh: what becomes of the full optimizer's state on the compact part: ``"reset"`` (also its count
        of updates, so that bias correction starts again), ``"keep"`` as it is, or ``"reproject"``: moments of
        the old split are taken to the new one, and zero where it is new.
      split: which leaves are split: a tree of booleans (a prefix of the parameters'), or a function of the
        parameters that gives one; :func:`optim.matrices.linear_weights` by default. The others get the
        full optimizer.
      dimension_numbers: which axes are rows, columns and a stack of layers: see :func:`optim.matrices.views`.
        By default only leaves of two axes are split.
      inactive_lr_scale: r, the step of the rest over that of the compact part.
      proj_lr_scale: s, the step of what is split over that of the other leaves.
      key: a seed or a key: what random splits come from.

    Returns:
      A transform whose state is a :class:`FrugalState`.
    """
    projector = columns() if projector is None else projector
    full = optax.scale_by_adam() if state_full is None else state_full
    free = _checked(density, update_gap, on_refresh, state_free)

    def init_fn(params: Any) -> FrugalState:
        # Two arrays, since a buffer cannot be donated twice.
        count, turn = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        if isinstance(params, _ParamsPlaceholder):
            # Asked by optax.tree.map_params where the parameters' likes are: the projection has none.
            return FrugalState(count, turn, count, count, full.init(params), full.init(params))
        parts = cut(params, split, dimension_numbers)
        matrices = jax.eval_shape(parts.split, params)
        projection = projector.init(matrices, density)
        compact, rest = jax.eval_shape(projector.down, matrices, projection)
        _check_stateless(free, rest)
        part, whole = full.init(_zeros(compact)), full.init(parts.whole(params))
        return FrugalState(count, turn, _words(key), projection, part, whole)

    def update_fn(
        updates: Any, state: FrugalState, params: Any = None, *, refresh: Any = None, **extra: Any
    ) -> tuple[Any, FrugalState]:
        del extra
        parts = cut(updates, split, dimension_numbers)
        grads = parts.split(updates)
        due = refresh
        if due is None:
            due = False if update_gap is None else state.count % update_gap == 0
        old, key = state.projection, jax.random.wrap_key_data(state.key)
        projection = _cond(due, lambda: projector.refresh(key, state.turn, grads, old), old)
        compact, rest = projector.down(grads, projection)
        part = state.part
        if on_refresh == "reset":
            part = _select(due, full.init(_zeros(compact)), part)
        elif on_refresh == "reproject":
            move = lambda x: projector.down(projector.up(x, old, grads), projection)[0]
            part = _cond(due, lambda: _moved(state.part, compact, move), part)

        small, matrices, large = None, None, None
        if params is not None:
            matrices, large = parts.split(params), parts.whole(params)
            small = projector.down(matrices, projection)[0]
        steps, part = full.update(compact, part, small)
        whole, kept = full.update(parts.whole(updates), state.whole, large)
        steps = projector.up(steps, projection, grads)
        if free is not None:
            others, _ = free.update(rest, free.init(rest), matrices)
            steps = jax.tree.map(lambda a, b: a + inactive_lr_scale * b, steps, others)
        steps = jax.tree.map(lambda a, g: (proj_lr_scale * a).astype(g.dtype), steps, grads)
        count = optax.safe_increment(state.count)
        turn = state.turn + jnp.asarray(due, jnp.int32)
        return parts.join(steps, whole, updates), FrugalState(
            count, turn, state.key, projection, part, kept
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _moved(state: Any, compact: Any, move: Callable[[Any], Any]) -> Any:
    """A state with every tree in it that is like the compact one taken to the new split."""
    structure: Any = jax.tree.structure(compact)
    shapes = [x.shape for x in jax.tree.leaves(compact)]

    def is_moment(x: Any) -> bool:
        return jax.tree.structure(x) == structure and shapes == [
            getattr(leaf, "shape", None) for leaf in jax.tree.leaves(x)
        ]

    def of(path: Any, x: Any) -> Any:
        if not is_moment(x):
            return x
        moved = move(x)
        # optax's name of second moments, which are not negative.
        if path and getattr(path[-1], "name", "").startswith("nu"):
            moved = jax.tree.map(lambda a: jnp.maximum(a, 0), moved)
        return jax.tree.map(lambda a, old: a.astype(old.dtype), moved, x)

    return jax.tree_util.tree_map_with_path(of, state, is_leaf=is_moment)


def frugal(
    learning_rate: optax.ScalarOrSchedule,
    density: float = 0.25,
    projector: Projector | None = None,
    update_gap: int | None = 200,
    state_full: optax.GradientTransformation | None = None,
    state_free: Literal["sign", "sgd"] | optax.GradientTransformation | None = "sign",
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    *,
    on_refresh: OnRefresh = "reset",
    split: Any = None,
    dimension_numbers: Any = None,
    inactive_lr_scale: Scalar = 1.0,
    proj_lr_scale: Scalar = 1.0,
    key: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""FRUGAL: Adam's state for a part of the weights at a time, sign descent for the rest.

    .. math::
        x_{t+1} = x_t - \eta_t (P^{-} \operatorname{Adam}(P g_t)
            + \operatorname{sign}(g_t - P^{-} P g_t) + \lambda x_t)

    The part is another one every ``update_gap`` steps. With ``density=1`` it is the full optimizer; with 0,
    sign descent on linear weights. Embeddings, norms, biases and the output head always get the full
    optimizer, since sign descent suits them badly, the head above all.

    State: with Adam 8 * density bytes per float32 parameter that is split (and what the projector says),
    8 for each that is not.

    Args: see :func:`optim.scale_by_frugal`, and
      learning_rate: a number or a schedule.
      weight_decay: a number or a schedule; the decay of a step is times the learning rate.
      mask: a tree or a function of the parameters: what is decayed; everything by default.

    Returns:
      A transform for ``optax.apply_updates``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optim
      >>> f = lambda w: jnp.sum((w @ jnp.array([1.0, 2.0, 3.0, 4.0]) - 1) ** 2)
      >>> solver = optim.frugal(learning_rate=0.02, density=0.5, update_gap=2)
      >>> w = jnp.ones((3, 4))
      >>> state = solver.init(w)
      >>> for _ in range(3):
      ...     updates, state = solver.update(jax.grad(f)(w), state, w)
      ...     w = optax.apply_updates(w, updates)
      ...     print(f"objective: {f(w):.2f}")
      objective: 232.32
      objective: 221.88
      objective: 211.68

    References:
      Zmushko et al., `FRUGAL <https://arxiv.org/abs/2411.07837>`_, 2024, algorithm 1
    """
    return optax.chain(
        scale_by_frugal(
            density, projector, update_gap, state_full, state_free, on_refresh=on_refresh, split=split,
            dimension_numbers=dimension_numbers, inactive_lr_scale=inactive_lr_scale,
            proj_lr_scale=proj_lr_scale, key=key,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )  # fmt: skip
