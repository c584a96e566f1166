"""One generation, from top to bottom: evaluate -> weigh -> estimate -> apply.

    values  = evaluate(g, state, fitness, ...)    the scores of every member
    weighed = weigh(g, values, groups)            the weight of each pair's noise
    grads   = estimate(g, params, weighed, ...)   the weighted sum of noise, as a gradient; for node
                                                  noise by a second pass over the members
    state   = apply(g, state, grads, ...)         a step of the optimizer

JAX traces every function here. ``begin`` (:mod:`eggroll.inputs`) makes the one object that the others
share, :mod:`eggroll.members` runs members, and no function calls back into the strategy.
:mod:`eggroll.arithmetic` has the arithmetic that differs between floats and integers;
:mod:`eggroll.population.schedule` has the order of computation.
"""

import functools
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Num, PyTree

from eggroll import _compat as compat
from eggroll import estimator
from eggroll._calling import Function
from eggroll._checks import is_real
from eggroll._settings import Settings
from eggroll.arithmetic import Outcome, Sigma, Weighed
from eggroll.credit import causal, episode
from eggroll.inputs import Generation, begin, sigma_of
from eggroll.members import (
    RowCredit,
    SecondPass,
    Task,
    has_aux,
    keep,
    map_members,
    node_sums,
    reporter,
    rows_are_steps,
)
from eggroll.perturbation import Draw, draw_pairs
from eggroll.plan.treatments import Given
from eggroll.population.pairs import split_pairs
from eggroll.population.placement import AXIS, constrain_all, devices, replicated
from eggroll.population.schedule import share
from eggroll.state import Metrics, State, rest_of, trainable_of

Out = TypeVar("Out", bound=PyTree)
Draws = list[Draw]


# ---------------------------------------------------------------- the whole


def step(
    settings: Settings,
    state: State,
    fitness: Function,
    args: tuple,
    members: PyTree,
    groups: Int[Array, "population"] | None,
) -> tuple[State, Outcome | Metrics]:
    """Evaluates the population and updates the parameters."""
    g = begin(settings, state)
    draws = kept_draws(g)
    scores, second = run(g, state.params, Task(fitness, args, members), groups, draws)
    return finish(g, state, scores.values, groups, draws, second)


def finish(
    g: Generation,
    state: State,
    values: Num[Array, "..."],
    groups: Int[Array, "population"] | None,
    draws: Draws | None,
    second: SecondPass | None,
) -> tuple[State, Outcome | Metrics]:
    """Computes the next state from the scores of a population."""
    given = [leaf.path for leaf in g.plan.leaves if isinstance(leaf.treatment, Given)]
    if given:
        raise ValueError(
            f"parameter {given[0]!r} is eggroll.Given(): must get its gradient from the caller, by "
            "es.evaluate, es.gradient and es.apply_gradient instead of es.step or es.update"
        )
    weighed = weigh(g, values, groups)
    grads, agreement = estimate(g, weighed, draws, second)
    value = g.arithmetic.value(weighed)
    new, change = apply(g, state, grads, weighed.moves, weighed.members, value)
    return told(g, new, Outcome(g.number, weighed.report, weighed.moves, change, agreement))


# ---------------------------------------------------------------- evaluate


def evaluate(g: Generation, params: PyTree, task: Task, draws: Draws | None) -> "Scores":
    """Scores of all members, ``[population]`` or ``[population, tasks]``."""
    return scores_of(g, map_members(g, params, task, draws))


def run(
    g: Generation,
    params: PyTree,
    task: Task,
    groups: Int[Array, "population"] | None,
    draws: Draws | None,
) -> tuple["Scores", SecondPass | None]:
    """Evaluates all members, and gives the second pass of node noise; None without node noise.

    The inputs of products are kept for the second pass if they fit into ``factor_memory`` and rows are not
    steps of a loop; otherwise the second pass computes them again. (On a CPU, writing and reading them
    step by step took as long as computing them.)
    """
    second = second_pass(g, params, task, draws)
    if second is None or not _runs_at_once(g):
        return evaluate(g, params, task, draws), second

    context = reporter(g)

    def of_task() -> Scores:
        return scores_of(g, map_members(g, params, task, draws, context))

    def credit() -> RowCredit:
        return credit_of(g, weigh(g, of_task().values, groups).differences)

    # First, since it finds what is wrong with a fitness or its arguments.
    like = jax.eval_shape(credit)
    if rows_are_steps(g, params, task):
        return of_task(), second
    first = functools.partial(keep, g, params, task, draws, context, like)
    arrays = jax.eval_shape(lambda: first().arrays)
    size = sum(x.size * x.dtype.itemsize for x in arrays)
    if size > g.settings.factor_memory * devices(g.settings.mesh):
        return of_task(), second
    kept = first()
    return scores_of(g, kept.out), kept.sums


def second_pass(
    g: Generation, params: PyTree, task: Task | None, draws: Draws | None
) -> SecondPass | None:
    """The second pass of node noise, which computes inputs again; None without node noise or a task."""
    if task is None or not g.plan.has_nodes:
        return None
    return functools.partial(node_sums, g, params, task, draws)


def _runs_at_once(g: Generation) -> bool:
    """Whether a device evaluates all of its members at a time, in a program of one step."""
    s = g.settings
    if s.schedule.is_reproducible or not s.factor_memory or not compat.HALVES:
        return False
    return s.schedule.pairs_at_once(g.pairs, s.mesh) >= share(g.pairs, s.mesh)


class Scores(NamedTuple):
    """Scores of all members, and the output of the fitness that they come from, scores or (scores, aux)."""

    values: Num[Array, "..."]
    out: PyTree


def scores_of(g: Generation, out: PyTree) -> Scores:
    """The scores in the output of a fitness.

    Raises:
      ValueError: the output is not a score ``[]``, scores ``[tasks]`` or ``(scores, aux)``, or the
        scores are not real numbers.
    """
    values, aux = out if has_aux(out) else (out, None)
    leaves = jax.tree.leaves(values)
    if len(leaves) != 1 or leaves[0] is not values:
        raise ValueError(
            "fitness: expected a score [], scores [tasks] or (scores, aux), got "
            f"{jax.tree.structure(values)}"
        )
    if values.ndim > 2 or values.size == 0:
        raise ValueError(
            f"fitness: expected scores of the shape [] or [tasks], got {list(values.shape[1:])}"
        )
    if not is_real(values.dtype):
        raise ValueError(f"fitness: expected scores that are real numbers, got {values.dtype}")
    values = g.arithmetic.scores(values)
    return Scores(values, (values, aux) if has_aux(out) else values)


def all_draws(g: Generation) -> Draws:
    """The noise of all pairs, drawn on the device that evaluates the pair; padded as pairs are."""

    def on_device(ids: Array, valid: Array, data: None) -> Draws:
        return draw_pairs(g.plan, g.noise, g.seed, g.epoch, ids)

    return split_pairs(on_device, g.pairs, None, g.settings.mesh, jax.P(AXIS))


def kept_draws(g: Generation) -> Draws | None:
    """The noise of all pairs, where a step keeps it from the evaluation to the update."""
    return all_draws(g) if _keeps_noise(g) else None


def _keeps_noise(g: Generation) -> bool:
    """Whether a step keeps the noise of the evaluation for the update.

    A device keeps the noise of its own members alone. A reproducible schedule draws all noise
    again.
    """
    s = g.settings
    if s.schedule.is_reproducible or s.sends_scores_alone(g.plan):
        return False
    return g.plan.noise_bytes * -(-g.pairs // devices(s.mesh)) <= s.factor_memory


# ---------------------------------------------------------------- weigh


def weigh(
    g: Generation, values: Num[Array, "..."], groups: Int[Array, "population"] | None
) -> Weighed:
    """The weight of each pair's noise, from the scores of its members."""
    table = values if values.ndim == 2 else values[:, None]

    def of(table: Array, groups: Array | None, sigma: Array) -> Weighed:
        return g.arithmetic.weigh(table, groups, g.settings.shaping, sigma, g.plan.has_nodes)

    if g.arithmetic.exact_sums or not g.settings.schedule.is_reproducible:
        return of(table, groups, g.sigma)
    # Every device holds all scores and sums them in the same order.
    return replicated(lambda *args: g.isolate(of, *args), g.settings.mesh, table, groups, g.sigma)


# ---------------------------------------------------------------- estimate


def estimate(
    g: Generation, weighed: Weighed, draws: Draws | None, second: SecondPass | None
) -> tuple[estimator.Sums, Float[Array, ""] | None]:
    """The gradient estimate of every leaf, and the cosine between two halves of the pairs.

    Args:
      g: the generation.
      weighed: the weight of each pair, and of each row.
      draws: the noise of all pairs, or None to draw it again.
      second: the second pass of node noise; None without node noise.
    """
    if not g.settings.agreement:
        total = _sums(g, weighed, draws, second)
        gradient = functools.partial(estimator.gradient, g.plan)
        return g.isolate(gradient, total, g.noise_sigma, weighed.members), None
    first = jnp.arange(g.pairs) < g.pairs // 2
    halves = []
    for half in (first, ~first):
        of_half = weighed._replace(
            weights=jnp.where(half, weighed.weights, 0),
            differences=jnp.where(half[:, None], weighed.differences, 0),
        )
        halves.append(_sums(g, of_half, draws, second))
    return g.isolate(
        lambda *args: _joined_halves(g, *args), *halves, g.noise_sigma, weighed.members
    )


def _sums(
    g: Generation, weighed: Weighed, draws: Draws | None, second: SecondPass | None
) -> estimator.Sums:
    """The sums of noise by weights, and for node noise those of the second pass."""
    total = _weighted_noise(g, weighed.weights, draws)
    if not g.plan.has_nodes:
        return total
    if second is None:
        raise ValueError(
            "perturb='nodes': update and gradient need the fitness and its arguments for the second pass, "
            "as in es.update(state, values, fitness, *args)"
        )
    sums = second(credit_of(g, weighed.differences))
    return [a if b is None else b for a, b in zip(total, sums, strict=True)]


def credit_of(g: Generation, differences: Num[Array, "pairs rows"]) -> RowCredit:
    """The credit of the rows of every pair, from the differences of its two members' scores."""
    how = g.settings.credit or (causal() if differences.shape[1] > 1 else episode())
    rows, whole = g.arithmetic.credit(how, differences)
    # One credit for all rows needs no rows in the program.
    return RowCredit(whole[:, None] if how == episode() else rows, whole)


def _weighted_noise(
    g: Generation, weights: Num[Array, "pairs"], draws: Draws | None
) -> estimator.Sums:
    return estimator.weighted_noise(
        g.plan,
        g.noise,
        g.seed,
        g.epoch,
        weights,
        kept=draws,
        mesh=g.settings.mesh,
        everywhere=g.settings.sends_scores_alone(g.plan),
        schedule=g.settings.schedule,
    )


def _joined_halves(
    g: Generation, a: estimator.Sums, b: estimator.Sums, sigma: Sigma, members: Int[Array, ""]
) -> tuple[estimator.Sums, Float[Array, ""]]:
    """The estimate from both halves of the pairs, and the cosine between the two estimates."""
    a, b = (estimator.gradient(g.plan, half, sigma, members) for half in (a, b))
    size = optax.tree.norm(a) * optax.tree.norm(b)
    cosine = (optax.tree.vdot(a, b) / jnp.where(size > 0, size, 1)).astype(jnp.float32)
    return jax.tree.map(jnp.add, a, b), cosine


# ---------------------------------------------------------------- apply


def apply(
    g: Generation,
    state: State,
    grads: estimator.Sums,
    moves: Bool[Array, ""],
    members: Int[Array, ""],
    value: Num[Array, ""] | None,
) -> tuple[State, Num[Array, ""]]:
    """Steps the optimizer if ``moves`` is true; always advances the generation.

    Args:
      g: the generation.
      state: the state that the gradient was estimated at.
      grads: one array a leaf, None for a frozen leaf.
      moves: whether to step; bool ``[]``.
      members: the divisor of the sum, as in :class:`~eggroll.arithmetic.Weighed`.
      value: minus the mean fitness, for optimizers that take ``value``.

    Returns:
      The next state, and the size of the change as in :class:`~eggroll.arithmetic.Outcome`.
    """
    old = trainable_of(g.plan, state.params, state.master)
    tree = jax.tree.unflatten(jax.tree.structure(state.params), grads)
    move = functools.partial(g.arithmetic.move, g.settings.optimizer)
    trained, optimizer, change = g.isolate(move, tree, state.optimizer, old, moves, members, value)
    new = _advanced(g, state, trained, optimizer)
    return constrain_all(new, g.settings.specs, g.settings.mesh), change


def _advanced(g: Generation, state: State, trained: PyTree, optimizer: PyTree) -> State:
    """The state of the next generation, from the tree that the optimizer returned."""
    tree: Any = jax.tree.structure(state.params)
    master, params = {}, []
    for leaf, value, before in zip(
        g.plan.leaves, tree.flatten_up_to(trained), jax.tree.leaves(state.params), strict=True
    ):
        if value is None:
            params.append(before)
            continue
        value = leaf.arithmetic.in_range(value)
        stored = leaf.arithmetic.stored(value, leaf.dtype)
        if leaf.path in state.master:
            rest = state.master[leaf.path].dtype == jnp.int8
            master[leaf.path] = rest_of(value, stored) if rest else value
        params.append(stored)
    return State(
        jax.tree.unflatten(tree, params), master, optimizer, state.generation + 1, state.seed
    )


def told(g: Generation, state: State, outcome: Outcome) -> tuple[State, Outcome | Metrics]:
    """The next state with metrics, or with the outcome if a second program makes the metrics."""
    inside = g.arithmetic.metrics_inside
    return state, metrics(g.settings, outcome) if inside else outcome


def metrics(settings: Settings, outcome: Outcome) -> Metrics:
    """The metrics of an update, in floats."""
    scores, norm = settings.arithmetic.statistics(outcome)
    zero = jnp.int32(0)
    return Metrics(
        generation=outcome.generation,
        fitness_mean=scores and scores.mean,
        fitness_best=scores and scores.best,
        fitness_worst=scores and scores.worst,
        fitness_std=scores and scores.std,
        invalid=scores.invalid if scores else zero,
        identical_pairs=scores.identical if scores else zero,
        updated=outcome.updated,
        update_norm=norm,
        agreement=outcome.agreement,
        sigma=sigma_of(settings, outcome.generation),
    )
