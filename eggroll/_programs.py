"""The compiled programs of a strategy: a generation and its parts, jitted over settings and state.

Settings and the fitness are static arguments, compared by identity. A loop that passes the same two
objects compiles once.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int, Num, PyTree

from eggroll import generation
from eggroll._calling import Function
from eggroll._checks import gradients as check_gradients
from eggroll._settings import Settings
from eggroll.arithmetic import Outcome
from eggroll.factors import Factors, factors_of
from eggroll.inputs import Generation, begin
from eggroll.members import SecondPass, Task, map_members
from eggroll.perturbation import built_member, draw
from eggroll.population.placement import tracing
from eggroll.population.schedule import EXACT
from eggroll.state import Metrics, State, trainable_of

Groups = Int[Array, "population"] | None


class _Program:
    """A jitted function of settings; deterministic settings compile without excess precision."""

    def __init__(self, fn: Callable[..., Any], static: tuple[int, ...]) -> None:
        self._plain = jax.jit(fn, static_argnums=static)
        self._exact = jax.jit(fn, static_argnums=static, compiler_options=EXACT)

    def _of(self, settings: Settings) -> Any:
        # A call inside another program is compiled with the options of that program.
        return self._exact if settings.deterministic and not tracing() else self._plain

    def __call__(self, settings: Settings, *args: Any) -> Any:
        return self._of(settings)(settings, *args)

    def lower(self, settings: Settings, *args: Any) -> Any:
        """The lowered program, as from ``jax.jit(...).lower``."""
        return self._of(settings).lower(settings, *args)


def _program(*static: int) -> Callable[[Callable[..., Any]], _Program]:
    return lambda fn: _Program(fn, static)


@_program(0, 2)
def map(
    settings: Settings,
    state: State,
    fn: Function,
    args: tuple,
    members: PyTree,
    pairs: Int[Array, "some"] | None = None,
) -> PyTree:
    g = begin(settings, state)
    return map_members(g, state.params, Task(fn, args, members), None, some=pairs)


@_program(0, 2)
def evaluate(
    settings: Settings, state: State, fitness: Function, args: tuple, members: PyTree
) -> PyTree:
    g = begin(settings, state)
    return generation.evaluate(g, state.params, Task(fitness, args, members), None).out


@_program(0, 2)
def step(
    settings: Settings,
    state: State,
    fitness: Function,
    args: tuple,
    members: PyTree,
    groups: Groups,
) -> tuple[State, Outcome | Metrics]:
    return generation.step(settings, state, fitness, args, members, groups)


@_program(0, 4)
def update(
    settings: Settings,
    state: State,
    values: Num[Array, "..."],
    groups: Groups,
    fitness: Function | None = None,
    args: tuple = (),
    members: PyTree = None,
) -> tuple[State, Outcome | Metrics]:
    g = begin(settings, state)
    second = second_pass(g, state, fitness, args, members)
    return generation.finish(g, state, values, groups, None, second)


def second_pass(
    g: Generation, state: State, fitness: Function | None, args: tuple, members: PyTree
) -> SecondPass | None:
    """The second pass of node noise; None without node noise or without a fitness."""
    task = None if fitness is None else Task(fitness, args, members)
    return generation.second_pass(g, state.params, task, None)


@_program(0)
def metrics(settings: Settings, outcome: Outcome) -> Metrics:
    return generation.metrics(settings, outcome)


@_program(0, 4)
def gradient(
    settings: Settings,
    state: State,
    values: Num[Array, "..."],
    groups: Groups,
    fitness: Function | None = None,
    args: tuple = (),
    members: PyTree = None,
) -> PyTree:
    g = begin(settings, state)
    weighed = generation.weigh(g, values, groups)
    second = second_pass(g, state, fitness, args, members)
    grads, _ = generation.estimate(g, weighed, None, second)
    return jax.tree.unflatten(jax.tree.structure(state.params), grads)


@_program(0, 2)
def value_and_gradient(
    settings: Settings,
    state: State,
    fitness: Function,
    args: tuple,
    members: PyTree,
    groups: Groups,
) -> tuple[PyTree, PyTree]:
    g = begin(settings, state)
    draws = generation.kept_draws(g)
    scores, second = generation.run(g, state.params, Task(fitness, args, members), groups, draws)
    weighed = generation.weigh(g, scores.values, groups)
    grads, _ = generation.estimate(g, weighed, draws, second)
    return scores.out, jax.tree.unflatten(jax.tree.structure(state.params), grads)


@_program(0)
def apply_gradient(
    settings: Settings,
    state: State,
    grads: PyTree,
    pairs: Int[Array, ""],
    value: Num[Array, ""] | None,
) -> tuple[State, Outcome | Metrics]:
    g = begin(settings, state)
    check_gradients(grads, trainable_of(g.plan, state.params, state.master))
    leaves = jax.tree.leaves(grads)
    moves = jnp.any(jnp.stack([jnp.any(x != 0) for x in leaves]))
    moves &= jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))
    # Not jax.tree.leaves, since parameters may hold None (for example after eqx.partition).
    tree: Any = jax.tree.structure(state.params)
    flat = tree.flatten_up_to(grads)
    new, change = generation.apply(g, state, flat, moves, pairs, value)
    return generation.told(g, new, Outcome(g.number, None, moves, change, None))


@_program(0, 2)
def optimize(
    settings: Settings,
    state: State,
    fitness: Function,
    generations: Int[Array, ""],
    args: tuple,
    members: PyTree,
    groups: Groups,
) -> State:
    def one(_: Array, state: State) -> State:
        return generation.step(settings, state, fitness, args, members, groups)[0]

    return lax.fori_loop(0, generations, one, state)


@_program(0)
def member(settings: Settings, state: State, i: Int[Array, ""]) -> PyTree:
    g = begin(settings, state)
    sign = (1 - 2 * (i % 2)).astype(g.arithmetic.sign_type)
    drawn = draw(g.plan, g.noise, g.seed, g.epoch, i // 2)
    return built_member(g.plan, state.params, drawn, g.noise_sigma, sign)


@_program(0)
def factors(settings: Settings, state: State, i: Int[Array, ""]) -> dict[str, Factors]:
    return factors_of(begin(settings, state), state.params, i)


@_program(0)
def ask(settings: Settings, state: State, indices: Int[Array, "members"]) -> PyTree:
    return jax.vmap(lambda i: member(settings, state, i))(indices)
