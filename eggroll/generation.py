"""The parts of a generation, as functions of a strategy and a state; all of them are traced.

values of every member -> weights of the pairs -> gradient estimate -> optimizer step. ``es`` is the
EvolutionStrategy, whose file imports this one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import UInt32

from eggroll import estimator
from eggroll.interpret.interpreter import Context, interpret
from eggroll.noise import stream
from eggroll.perturbation import draw_pairs, perturb
from eggroll.plan import Leaf, Plan
from eggroll.population.pairs import map_pairs, split_pairs, stored
from eggroll.population.placement import AXIS, constrain_all, on_all
from eggroll.state import Metrics, State, trainable_of
from eggroll.values import fixed_point
from eggroll.values.lowrank import is_narrow

# Even the square of a gradient's entry, which optimizers form, is then a finite float32.
LARGEST_SUM = 1e17

# Roles 0 to 2 of the noise streams are factors and dense noise.
FITNESS_KEY_ROLE = 3


def is_real(dtype: DTypeLike) -> bool:
    """Whether arrays of the type hold real numbers or truth values."""
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    return any(jnp.issubdtype(dtype, kind) for kind in kinds)


def typed_key(words: UInt32[Array, "2"]) -> Array:
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def sign_type(plan: Plan) -> Any:
    """The type of the sign that a member sees its pair's noise with."""
    return jnp.int32 if plan.integer else jnp.float32


def map_members(
    es: Any,
    state: State,
    fn: Callable[..., Any],
    args: tuple,
    members: Any,
    draws: Any,
) -> Any:
    """``fn`` of every member; ``draws`` of all pairs, or None to draw them as they are used."""
    plan, epoch = es.plan_of(state.params), es.epoch(state)
    pairs = es.population // 2
    for keys, leaf in jax.tree_util.tree_flatten_with_path(members)[0]:
        if jnp.shape(leaf)[:1] != (es.population,):
            raise ValueError(
                f"members{jax.tree_util.keystr(keys)} has the shape {list(jnp.shape(leaf))}; a "
                f"leading axis of population={es.population} is right"
            )
    by_pair = jax.tree.map(lambda x: x.reshape(pairs, 2, *x.shape[1:]), members)
    # One interpretation reports a built matrix once, however often it is traced.
    # A perturbed integer matrix is defined by its operations alone, and never built.
    context = Context(on_dense="error" if plan.integer else es.on_dense)
    lazy_fn = interpret(fn, context)

    def of_pair(params: Any, sigma: Any, pair: Array, drawn: Any, own: Any) -> Any:
        words = stream(state.seed, "", state.generation, pair, FITNESS_KEY_ROLE)

        def of_member(sign: Array, which: Array, own: Any) -> Any:
            lazy = perturb(plan, params, drawn, sigma, sign)
            key = typed_key(words)
            if not es.shared_keys:
                key = jax.random.fold_in(key, which)
            extra = () if members is None else (own,)
            return lazy_fn(lazy, key, *extra, *args)

        signs = jnp.array([1, -1], sign_type(plan))
        return jax.vmap(of_member)(signs, jnp.arange(2), own)

    def of_chunk(ids: Array, data: Any) -> Any:
        drawn, own = data
        if drawn is None:
            drawn = draw_pairs(plan, es.noise, state.seed, epoch, ids)
        params = constrain_all(state.params, plan.specs)
        of_pairs = functools.partial(of_pair, params, es.noise_sigma(state))
        return jax.vmap(of_pairs)(ids, drawn, own)

    always = state.generation >= 0 if es.deterministic else None
    return map_pairs(of_chunk, pairs, (draws, by_pair), es.chunk, es.mesh, always)


def scores_of(es: Any, out: Any) -> tuple[Array, Any, bool]:
    """(values, aux, whether there was aux), or a ValueError that says what the fitness gave."""
    with_aux = isinstance(out, tuple) and len(out) == 2
    values, aux = out if with_aux else (out, None)
    leaves = jax.tree.leaves(values)
    if len(leaves) != 1 or leaves[0] is not values:
        raise ValueError(
            f"the fitness returned {jax.tree.structure(values)}; a score [], scores [tasks], or "
            "(scores, aux) is right"
        )
    if values.ndim > 2 or values.size == 0:
        raise ValueError(
            f"the fitness returned scores of the shape {list(values.shape[1:])}; "
            "[] or [tasks] is right"
        )
    if not is_real(values.dtype):
        raise ValueError(
            f"the fitness returned scores of the type {values.dtype}; real numbers are right"
        )
    if not jnp.issubdtype(values.dtype, jnp.floating):
        values = values.astype(jnp.int32 if es.noise.integer else jnp.float32)
    return values, aux, with_aux


def all_draws(es: Any, plan: Plan, state: State) -> Any:
    """The draws of all pairs, each made on the device that evaluates the pair; padded as pairs are."""

    def on_device(ids: Any, valid: Any, data: Any) -> Any:
        return draw_pairs(plan, es.noise, state.seed, es.epoch(state), ids)

    return split_pairs(on_device, es.population // 2, None, es.mesh, jax.P(AXIS))


def by_itself(es: Any, state: State, fn: Callable[..., Any], *args: Any) -> Any:
    """``fn(*args)``; of a deterministic strategy compiled the same whatever stands around it."""
    return stored(fn, state.generation >= 0, *args) if es.deterministic else fn(*args)


class Statistics(NamedTuple):
    mean: Array
    best: Array
    worst: Array
    std: Array
    invalid: Array
    identical: Array


def weigh(es: Any, state: State, values: Array, groups: Any) -> tuple[Array, Array, Statistics]:
    """Differences of the pairs' weights ``[pairs]``, the number of valid members, statistics."""
    # Of a deterministic strategy every device has all scores, and sums them in the same order.
    of_values = functools.partial(_weigh, es)
    if not es.deterministic:
        return of_values(values, groups)
    return on_all(functools.partial(by_itself, es, state, of_values), es.mesh, values, groups)


def _weigh(es: Any, values: Array, groups: Any) -> tuple[Array, Array, Statistics]:
    table = values if values.ndim == 2 else values[:, None]
    if not jnp.issubdtype(table.dtype, jnp.floating) or is_narrow(table.dtype):
        table = table.astype(jnp.float32)
    finite = jnp.isfinite(table)
    paired = finite.reshape(-1, 2, table.shape[1]).all(1)
    valid = jnp.repeat(paired, 2, axis=0)
    clean = jnp.where(valid, table, 0)
    if groups is not None:
        groups = jnp.asarray(groups)
        if groups.shape != (es.population,) or not jnp.issubdtype(groups.dtype, jnp.integer):
            raise ValueError(
                f"groups have the shape {list(groups.shape)} and the type {groups.dtype}; a whole "
                f"number a member, [{es.population}], is right"
            )
    shaped = clean if es.shaping is None else es.shaping(clean, valid, groups)
    if jnp.shape(shaped) != clean.shape:
        raise ValueError(
            f"the shaping returned weights of the shape {list(jnp.shape(shaped))}; that of the scores, "
            f"{list(clean.shape)}, is right"
        )
    weights = jnp.where(valid, shaped, 0).mean(1)
    d = weights[0::2] - weights[1::2]
    return d, 2 * paired.any(1).sum(dtype=jnp.int32), statistics(table)


def statistics(table: Array) -> Statistics:
    """Of scores ``[population, tasks]`` in floats; over each member's own finite ones, pairs or not."""
    finite = jnp.isfinite(table)
    paired = finite.reshape(-1, 2, table.shape[1]).all(1)
    counts = finite.sum(1)
    score = jnp.where(finite, table, 0).sum(1) / jnp.maximum(counts, 1)
    has = counts > 0
    n = has.sum()
    mean = jnp.where(has, score, 0).sum() / n
    std = jnp.sqrt(jnp.where(has, (score - mean) ** 2, 0).sum() / n)
    best = jnp.where(n > 0, jnp.where(has, score, -jnp.inf).max(), jnp.nan)
    worst = jnp.where(n > 0, jnp.where(has, score, jnp.inf).min(), jnp.nan)
    same = jnp.where(paired, table[0::2] == table[1::2], True).all(1) & paired.any(1)
    f32 = lambda x: x.astype(jnp.float32)
    return Statistics(
        f32(mean), f32(best), f32(worst), f32(std),
        (~finite.all(1)).sum(dtype=jnp.int32), same.sum(dtype=jnp.int32),
    )  # fmt: skip


def estimate(
    es: Any, plan: Plan, state: State, d: Array, members: Array, draws: Any
) -> tuple[list[Array | None], Array]:
    """The gradient estimate of every leaf, and how far two halves of the pairs agree on it."""
    first = jnp.arange(d.shape[0]) < d.shape[0] // 2
    halves = [jnp.where(h, d, 0) for h in (first, ~first)] if es.agreement else [d]
    sums = [weighted_noise(es, plan, state, half, draws) for half in halves]

    def of_sums(sums: list[Any], members: Array) -> tuple[list[Array | None], Array]:
        grads = [estimator.gradient(plan, x, es.sigma_of(state), members) for x in sums]
        if not es.agreement:
            return grads[0], jnp.float32(jnp.nan)
        a, b = grads
        size = optax.tree.norm(a) * optax.tree.norm(b)
        agreement = (optax.tree.vdot(a, b) / jnp.where(size > 0, size, 1)).astype(jnp.float32)
        return jax.tree.map(jnp.add, a, b), agreement

    return by_itself(es, state, of_sums, sums, members)


def weighted_noise(es: Any, plan: Plan, state: State, d: Array, draws: Any) -> list[Array | None]:
    """:func:`eggroll.estimator.weighted_noise` by a strategy's settings."""
    return estimator.weighted_noise(
        plan,
        es.noise,
        state.seed,
        es.epoch(state),
        d,
        kept=draws,
        mesh=es.mesh,
        everywhere=es.exchanged(plan) == "fitness",
        fixed=es.deterministic,
    )


def finish(es: Any, state: State, values: Array, groups: Any, draws: Any) -> tuple[State, Metrics]:
    """From the values of a population to the next state."""
    plan = es.plan_of(state.params)
    d, members, stats = weigh(es, state, values, groups)
    grads, agreement = estimate(es, plan, state, d, members, draws)
    # Where sums would overflow, as with raw scores near the largest float or a sigma that has come
    # down to zero, nothing moves either. NaN is not below the limit.
    size = jnp.abs(d.astype(jnp.float32)).sum() / jnp.abs(es.sigma_of(state))
    moved = jnp.any(d != 0) & (size < LARGEST_SUM)
    new, norm = apply(es, plan, state, grads, moved)
    return new, Metrics(
        state.generation, stats.mean, stats.best, stats.worst, stats.std, stats.invalid,
        stats.identical, moved, norm, agreement, es.sigma_of(state),
    )  # fmt: skip


def apply(
    es: Any, plan: Plan, state: State, grads: list[Array | None], moved: Array
) -> tuple[State, Array]:
    """Steps the optimizer, unless nothing ``moved``; the generation always advances."""
    old = trainable_of(plan, state.params, state.master)
    moves = functools.partial(_moves, es, jax.tree.structure(state.params))
    new, optimizer, norm = by_itself(es, state, moves, old, state.optimizer, grads, moved)
    return constrain_all(advance(plan, state, new, optimizer), es.specs, es.mesh), norm


def _moves(
    es: Any, tree: Any, old: Any, state: Any, grads: list[Array | None], moved: Array
) -> tuple[Any, Any, Array]:
    """What the optimizer makes of the trained parameters, its next state, how far it moved them."""
    grads = [
        None if g is None else g.astype(w.dtype)
        for g, w in zip(grads, tree.flatten_up_to(old), strict=True)
    ]
    updates, optimizer = es.optimizer.update(jax.tree.unflatten(tree, grads), state, old)
    new = optax.apply_updates(old, updates)
    keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(moved, new, old))
    new, optimizer = keep(new, old), keep(optimizer, state)
    change = jax.tree.map(lambda a, b: (a - b).astype(jnp.float32), new, old)
    return new, optimizer, optax.tree.norm(change)


def narrowed(value: Array, leaf: Leaf) -> Array:
    """What was trained in the type of its parameter: the nearest number, also where that is whole."""
    return (jnp.round(value) if leaf.quantised else value).astype(leaf.dtype)


def advance(plan: Plan, state: State, new: Any, optimizer: Any) -> State:
    """The state of the next generation, from the tree that the optimizer saw and its own state."""
    tree: Any = jax.tree.structure(state.params)
    master, params = {}, []
    for leaf, value, before in zip(
        plan.leaves,
        tree.flatten_up_to(new),
        jax.tree.leaves(state.params),
        strict=True,
    ):
        if leaf.quantised:
            value = jnp.clip(value, -fixed_point.LARGEST, fixed_point.LARGEST)
        if leaf.path in state.master:
            master[leaf.path] = value
        params.append(before if value is None else narrowed(value, leaf))
    return State(
        jax.tree.unflatten(tree, params), master, optimizer, state.generation + 1, state.seed
    )
