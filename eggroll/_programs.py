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
from eggroll.inputs import begin
from eggroll.members import Task, has_aux, map_members
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
def map(settings: Settings, state: State, fn: Function, args: tuple, members: PyTree) -> PyTree:
    g = begin(settings, state)
    return map_members(g, state.params, Task(fn, args, members), None)


@_program(0, 2)
def evaluate(
    settings: Settings, state: State, fitness: Function, args: tuple, members: PyTree
) -> PyTree:
    g = begin(settings, state)
    out = map_members(g, state.params, Task(fitness, args, members), None)
    scores = generation.scores_of(g, out)
    return tuple(scores) if has_aux(out) else scores.values


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
    g, task = begin(settings, state), task_of(fitness, args, members)
    return generation.finish(g, state, values, groups, None, task)


def task_of(fitness: Function | None, args: tuple, members: PyTree) -> Task | None:
    """The task of a second pass; None where there is none."""
    return None if fitness is None else Task(fitness, args, members)


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
    g, task = begin(settings, state), task_of(fitness, args, members)
    weighed = generation.weigh(g, values, groups)
    grads, _ = generation.estimate(g, state.params, weighed, None, task)
    return jax.tree.unflatten(jax.tree.structure(state.params), grads)


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
def ask(settings: Settings, state: State, indices: Int[Array, "members"]) -> PyTree:
    return jax.vmap(lambda i: member(settings, state, i))(indices)
