"""FRUGAL: a stateful optimizer on a small part of the gradient, a stateless one on the rest."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, DTypeLike, Int, PyTree, UInt32

# Not among optax's public names, though optax's own transforms ask for it.
from optax.tree_utils._state_utils import _ParamsPlaceholder

from optim._cut import cut
from optim._sharding import gathered, spread, zeros
from optim._trees import Scalar, Setting
from optim.projector import Projector, rows

OnRefresh = Literal["reset", "keep", "reproject"]


class FrugalState(NamedTuple):
    """State of :func:`scale_by_frugal`.

    Attributes:
      count: int32 scalar, updates done.
      turn: int32 scalar, splits drawn so far.
      key: two words that all randomness comes from.
      projection: state of the projector: indices or bases of the present split.
      part: state of the full optimizer on the compact part of the leaves that are split.
      whole: state of the full optimizer on the leaves that are left whole.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # as optax names it
    turn: Int[Array, ""]
    key: UInt32[Array, "2"]
    projection: Any
    part: Any
    whole: Any


def _checked(
    density: Any, update_gap: Any, on_refresh: str, state_free: Any
) -> optax.GradientTransformation | None:
    """Checks the settings and returns the stateless transform."""
    if not isinstance(density, int | float):
        raise ValueError(
            f"density must be a plain number, since it fixes shapes, got {density!r}; "
            "under optax.inject_hyperparams, name it in static_args"
        )
    if not 0 <= density <= 1:
        raise ValueError(f"density must be a number from 0 to 1, got {density}")
    if update_gap is not None and (not isinstance(update_gap, int) or update_gap < 1):
        raise ValueError(
            "update_gap must be an int of at least 1, or None for refreshes by hand, "
            f"got {update_gap!r}"
        )
    if on_refresh not in ("reset", "keep", "reproject"):
        raise ValueError(f"on_refresh must be 'reset', 'keep' or 'reproject', got {on_refresh!r}")
    if state_free is None or isinstance(state_free, optax.GradientTransformation):
        return state_free
    named = {"sign": optax.scale_by_sign, "sgd": optax.identity}
    if state_free not in named:
        raise ValueError(
            f"state_free must be 'sign', 'sgd', None or an optax transform, got {state_free!r}"
        )
    return named[state_free]()


def _check_stateless(free: optax.GradientTransformation | None, rest: PyTree) -> None:
    if free is not None and jax.tree.leaves(free.init(zeros(rest))):
        raise ValueError(f"state_free must be a transform without state, got {free}")


def _cond(due: bool | Array, new: Callable[[], PyTree], old: PyTree) -> PyTree:
    """``new()`` where it is due; no conditional where that is known while tracing."""
    if isinstance(due, bool):
        return new() if due else old
    return jax.lax.cond(due, new, lambda: old)


def _select(due: bool | Array, new: PyTree, old: PyTree) -> PyTree:
    """The same for cheap values, which XLA fuses with the loop that reads them."""
    if isinstance(due, bool):
        return new if due else old
    return jax.tree.map(lambda a, b: jnp.where(due, a, b), new, old)


def _cast(x: Array, dtype: DTypeLike) -> Array:
    """To another dtype; from complex to real the real part."""
    is_real = not jnp.issubdtype(dtype, jnp.complexfloating)
    return (x.real if is_real and jnp.iscomplexobj(x) else x).astype(dtype)


def _strong(x: Any) -> Any:
    """A Python number as an array with a dtype of its own, which the state then has too."""
    is_number = isinstance(x, int | float | complex)
    return jnp.asarray(x, jnp.result_type(x)) if is_number else x


def _kept_as(new: PyTree, old: PyTree) -> PyTree:
    """A new state in the dtypes of the old one, which gradients of another dtype would change."""
    return jax.tree.map(lambda n, o: n.astype(o.dtype) if n.dtype != o.dtype else n, new, old)


def _words(key: int | Array) -> UInt32[Array, "2"]:
    """A key of any kind, or a seed, as the two words of a threefry key, which checkpoints take."""
    is_key = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    is_old_key = isinstance(key, jax.Array) and key.ndim == 1
    if not is_key and not is_old_key:
        # By one generator, so that a seed gives the same splits whatever JAX's default is.
        key = jax.random.key(key, impl="threefry2x32")
    return jax.random.bits(key, (2,), jnp.uint32)


def scale_by_frugal(
    density: float = 0.25,
    projector: Projector | None = None,
    update_gap: int | None = 200,
    state_full: optax.GradientTransformation | None = None,
    state_free: Literal["sign", "sgd"] | optax.GradientTransformation | None = "sign",
    *,
    on_refresh: OnRefresh = "reset",
    split: Setting = None,
    dimension_numbers: Setting = None,
    inactive_lr_scale: Scalar = 1.0,
    proj_lr_scale: Scalar = 1.0,
    key: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""A full optimizer on a compact part of the gradient, one without state on the rest of it.

    .. math::
        u_t = s\,(P_t^{-} \operatorname{full}(P_t g_t)
            + r \operatorname{free}(g_t - P_t^{-} P_t g_t))

    The split P changes at updates 0, T, 2T, ... (``update_gap``). Under ``vmap`` the condition on
    that becomes a selection and every update does the work of a refresh, which for
    :func:`optim.projector.svd` is a decomposition: pass ``update_gap=None`` there, and call
    ``update(..., refresh=True)`` when a refresh is due and ``refresh=False`` (a plain bool)
    otherwise. Other keyword arguments of ``update`` go to the full optimizer.

    Args:
      density: the part of every split leaf that the full optimizer gets.
      projector: chooses that part: see :mod:`optim.projector`; random rows by default, the default
        of the authors, who call them columns of PyTorch's transposed weights.
      update_gap: updates between two splits; None: only where ``update`` is called with
        ``refresh=True``.
      state_full: any optax transform; ``optax.scale_by_adam()`` by default. It sees compact arrays,
        and parameters in the same form.
      state_free: ``"sign"``, ``"sgd"`` (the rest as it is), None (the rest is not used), or a
        transform of optax without state.
      on_refresh: what becomes of the full optimizer's state on the compact part. ``"reset"``: it
        starts again, its count of updates and so its bias correction too. ``"keep"``: it stays as
        it is. ``"reproject"``: moments of the old split are moved to the new one, and are zero
        where it is new.
      split: which leaves are split: a tree of booleans (a prefix of the parameters'), or a function
        of the parameters that returns one; :func:`optim.linear_weights` by default. The others get
        the full optimizer. ``init`` warns of leaves that are left whole only because their axes are
        not known.
      dimension_numbers: which axes are rows, columns and a stack of layers: see
        :func:`optim.linear_weights`. By default they are read from the tree.
      inactive_lr_scale: r, the step of the rest over that of the compact part.
      proj_lr_scale: s, the step of the split leaves over that of the others.
      key: a seed or a key for random splits.

    Returns:
      A transform whose state is a :class:`FrugalState`. The state is spread over the devices that
      the parameters are spread over.
    """
    projector = rows() if projector is None else projector
    full = optax.with_extra_args_support(
        optax.scale_by_adam() if state_full is None else state_full
    )
    free = _checked(density, update_gap, on_refresh, state_free)

    def init_fn(params: PyTree) -> FrugalState:
        # Two arrays, since a buffer cannot be donated twice.
        count, turn = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        if isinstance(params, _ParamsPlaceholder):
            # optax.tree.map_params asks where arrays like the parameters are; the projection has
            # none.
            return FrugalState(count, turn, count, count, full.init(params), full.init(params))
        parts = cut(params, split, dimension_numbers, tell=True)
        matrices = jax.eval_shape(parts.split, params)
        projection = projector.init(matrices, density)
        compact, rest = jax.eval_shape(projector.down, matrices, projection)
        _check_stateless(free, rest)
        like = parts.select(params)
        part = full.init(spread(zeros(compact), like))
        whole = full.init(jax.tree.map(_strong, parts.whole(params)))
        return FrugalState(count, turn, _words(key), spread(projection, like), part, whole)

    def update_fn(
        updates: PyTree,
        state: FrugalState,
        params: PyTree = None,
        *,
        refresh: bool | Array | None = None,
        **extra: Any,
    ) -> tuple[PyTree, FrugalState]:
        parts = cut(updates, split, dimension_numbers)
        grads, like = parts.split(updates), parts.select(updates)
        due = refresh
        if due is None:
            due = False if update_gap is None else state.count % update_gap == 0
        key = jax.random.wrap_key_data(state.key, impl="threefry2x32")
        old = gathered(state.projection)
        projection = _cond(due, lambda: projector.refresh(key, state.turn, grads, old), old)
        compact, rest = projector.down(grads, projection)
        compact, part = spread(compact, like), state.part
        if on_refresh == "reset":
            start = full.init(jax.tree.map(jnp.zeros_like, compact))
            part = _select(due, _kept_as(start, part), part)
        elif on_refresh == "reproject":

            def move(x: PyTree) -> PyTree:
                moved = projector.down(projector.up(gathered(x), old, grads), projection)[0]
                return spread(moved, like)

            part = _cond(due, lambda: _moved(state.part, compact, move), part)

        small, matrices, large = None, None, None
        if params is not None:
            matrices, large = parts.split(params), parts.whole(params)
            small = spread(projector.down(matrices, projection)[0], like)
        steps, part = full.update(compact, part, small, **extra)
        whole, kept = full.update(parts.whole(updates), state.whole, large, **extra)
        part, kept = _kept_as(part, state.part), _kept_as(kept, state.whole)
        steps = projector.up(gathered(steps), projection, grads)
        if free is not None:
            others, _ = free.update(rest, free.init(rest), matrices)
            steps = jax.tree.map(lambda a, b: a + inactive_lr_scale * b, steps, others)
        # In the wider one of the dtypes of gradient and parameter, as the steps of optax.adamw are.
        given = (grads,) if matrices is None else (grads, matrices)
        steps = jax.tree.map(
            lambda a, *xs: _cast(proj_lr_scale * a, jnp.result_type(*xs)), steps, *given
        )
        count = optax.safe_increment(state.count)
        turn = state.turn + jnp.asarray(due, jnp.int32)
        return parts.join(steps, whole, updates), FrugalState(
            count, turn, state.key, spread(projection, like), part, kept
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _moved(state: PyTree, compact: PyTree, move: Callable[[PyTree], PyTree]) -> PyTree:
    """A state in which every tree of the form of the compact part is moved to the new split."""
    structure: Any = jax.tree.structure(compact)
    shapes = [x.shape for x in jax.tree.leaves(compact)]

    def is_moment(x: PyTree) -> bool:
        return jax.tree.structure(x) == structure and shapes == [
            getattr(leaf, "shape", None) for leaf in jax.tree.leaves(x)
        ]

    def of(path: tuple[Any, ...], x: PyTree) -> PyTree:
        if not is_moment(x):
            return x
        moved = move(x)
        # optax's name of second moments, which are not negative.
        if path and getattr(path[-1], "name", "").startswith("nu"):
            moved = jax.tree.map(lambda a: jnp.maximum(a.real, 0), moved)
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
    mask: Setting = None,
    *,
    on_refresh: OnRefresh = "reset",
    split: Setting = None,
    dimension_numbers: Setting = None,
    inactive_lr_scale: Scalar = 1.0,
    proj_lr_scale: Scalar = 1.0,
    key: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""FRUGAL: Adam's state for a part of the weights at a time, sign descent for the rest.

    .. math::
        x_{t+1} = x_t - \eta_t (P^{-} \operatorname{Adam}(P g_t)
            + \operatorname{sign}(g_t - P^{-} P g_t) + \lambda x_t)

    The part changes every ``update_gap`` steps. With ``density=1`` this is the full optimizer; with
    0, sign descent on linear weights. Embeddings, norms, biases and the output head always get the
    full optimizer, since sign descent suits them badly, the head most.

    State: with Adam 8 * density bytes per float32 parameter that is split (and the projector's
    state), 8 for each that is not.

    Args: see :func:`optim.scale_by_frugal`, and
      learning_rate: a number or a schedule.
      weight_decay: a number or a schedule; the decay of a step is this times the learning rate.
      mask: a tree or a function of the parameters: which leaves decay; all by default.

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
            density, projector, update_gap, state_full, state_free, on_refresh=on_refresh,
            split=split, dimension_numbers=dimension_numbers, inactive_lr_scale=inactive_lr_scale,
            proj_lr_scale=proj_lr_scale, key=key,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )  # fmt: skip
