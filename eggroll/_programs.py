"""What a strategy compiles: a generation and its parts, as jitted functions of a strategy and a state.

The strategy (``es``, whose file imports this one) and the fitness are static: they are compared by
identity, so that a loop that passes the same two objects compiles once.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from eggroll import _checks as checks
from eggroll import _compat as compat
from eggroll import generation, integer_generation
from eggroll.perturbation import built_member, draw
from eggroll.population.placement import devices
from eggroll.state import Metrics, State, trainable_of

# XLA may leave out roundings to bfloat16, and does so depending on the number of devices.
EXACT = {"xla_allow_excess_precision": False}


class _Program:
    """A jitted function; that of a deterministic strategy is compiled without excess precision."""

    def __init__(self, fn: Callable[..., Any], static: tuple[int, ...]) -> None:
        self._plain = jax.jit(fn, static_argnums=static)
        self._exact = jax.jit(fn, static_argnums=static, compiler_options=EXACT)

    def _of(self, es: Any) -> Any:
        # Inside another program it is compiled as that one is.
        return self._exact if es.deterministic and not compat.tracing() else self._plain

    def __call__(self, es: Any, *args: Any) -> Any:
        return self._of(es)(es, *args)

    def lower(self, es: Any, *args: Any) -> Any:
        return self._of(es).lower(es, *args)


def _program(*static: int) -> Callable[[Callable[..., Any]], _Program]:
    return lambda fn: _Program(fn, static)


@_program(0, 2)
def map(es: Any, state: State, fn: Callable, args: tuple, members: Any) -> Any:
    return generation.map_members(es, state, fn, args, members, None)


@_program(0, 2)
def evaluate(es: Any, state: State, fitness: Callable, args: tuple, members: Any) -> Any:
    values, aux, with_aux = generation.scores_of(
        es, generation.map_members(es, state, fitness, args, members, None)
    )
    return (values, aux) if with_aux else values


@_program(0, 2)
def step(
    es: Any, state: State, fitness: Callable, args: tuple, members: Any, groups: Any
) -> tuple[State, Any]:
    plan, pairs = es.plan_of(state.params), es.population // 2
    draws = None
    # Noise of all members is nowhere kept, and what is deterministic draws all of it again.
    keeps = not es.deterministic and es.exchanged(plan) == "update"
    if keeps and plan.noise_bytes * -(-pairs // devices(es.mesh)) <= es.factor_memory:
        draws = generation.all_draws(es, plan, state)
    out = generation.map_members(es, state, fitness, args, members, draws)
    values, _, _ = generation.scores_of(es, out)
    return _finish(es, state, values, groups, draws)


def _finish(es: Any, state: State, values: Array, groups: Any, draws: Any) -> tuple[State, Any]:
    if es.noise.integer:
        return integer_generation.finish(es, state, values, draws)
    return generation.finish(es, state, values, groups, draws)


@_program(0)
def update(es: Any, state: State, values: Array, groups: Any) -> tuple[State, Any]:
    return _finish(es, state, values, groups, None)


@_program(0)
def report(es: Any, outcome: integer_generation.Outcome) -> Metrics:
    return integer_generation.report(es, outcome)


@_program(0)
def gradient(es: Any, state: State, values: Array, groups: Any) -> Any:
    plan = es.plan_of(state.params)
    if es.noise.integer:
        signs = integer_generation.pair_signs(values)
        grads = integer_generation.gradient(es, plan, state, signs, None)
    else:
        weights, members, _ = generation.weigh(es, state, values, groups)
        grads, _ = generation.estimate(es, plan, state, weights, members, None)
    return jax.tree.unflatten(jax.tree.structure(state.params), grads)


@_program(0)
def apply_gradient(es: Any, state: State, grads: Any, pairs: Array) -> tuple[State, Any]:
    plan = es.plan_of(state.params)
    checks.gradients(grads, trainable_of(plan, state.params, state.master))
    # Not jax.tree.leaves: parameters may hold None themselves (as eqx.partition leaves them).
    tree: Any = jax.tree.structure(state.params)
    flat = tree.flatten_up_to(grads)
    leaves = jax.tree.leaves(grads)
    moved = jnp.any(jnp.stack([jnp.any(g != 0) for g in leaves]))
    moved &= jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in leaves]))
    if es.noise.integer:
        new, squares = integer_generation.apply(es, plan, state, flat, moved, pairs)
        return new, integer_generation.Outcome(state.generation, None, moved, squares)
    state, norm = generation.apply(es, plan, state, flat, moved)
    nan, zero = jnp.float32(jnp.nan), jnp.int32(0)
    before = state.generation - 1
    sigma = es.sigma_of(state._replace(generation=before))
    return state, Metrics(before, nan, nan, nan, nan, zero, zero, moved, norm, nan, sigma)


@_program(0, 2)
def optimize(
    es: Any,
    state: State,
    fitness: Callable,
    generations: Array,
    args: tuple,
    members: Any,
    groups: Any,
) -> State:
    return lax.fori_loop(
        0, generations, lambda _, s: step(es, s, fitness, args, members, groups)[0], state
    )


@_program(0)
def member(es: Any, state: State, i: Array) -> Any:
    plan = es.plan_of(state.params)
    sign = (1 - 2 * (i % 2)).astype(generation.sign_type(plan))
    drawn = draw(plan, es.noise, state.seed, es.epoch(state), i // 2)
    return built_member(plan, state.params, drawn, es.noise_sigma(state), sign)


@_program(0)
def ask(es: Any, state: State, indices: Array) -> Any:
    return jax.vmap(lambda i: member(es, state, i))(indices)
