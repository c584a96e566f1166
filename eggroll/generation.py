"""One generation, from top to bottom: evaluate -> weigh -> estimate -> apply.

    values  = evaluate(g, state, fitness, ...)    the scores of every member
    weighed = weigh(g, values, groups)            the weight of each pair's noise
    grads   = estimate(g, weighed, ...)           the weighted sum of noise, as a gradient
    state   = apply(g, state, grads, ...)         a step of the optimizer

JAX traces every function here. ``begin`` makes the one object that the others share, and no
function calls back into the strategy. :mod:`eggroll.arithmetic` has the arithmetic that differs
between floats and integers; :mod:`eggroll.population.schedule` has the order of computation.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Num, PyTree, UInt32

from eggroll import estimator
from eggroll._calling import Function, call
from eggroll._checks import is_real, member_data
from eggroll._settings import Settings
from eggroll.arithmetic import Arithmetic, Outcome, Sigma, Weighed
from eggroll.interpret import Context, interpret
from eggroll.noise import Noise, Role, stream
from eggroll.perturbation import Draw, draw_pairs, perturb
from eggroll.plan.leaf import Plan
from eggroll.population.pairs import map_pairs, split_pairs
from eggroll.population.placement import AXIS, constrain_all, devices, replicated, specs_of
from eggroll.state import Metrics, State, trainable_of

Out = TypeVar("Out", bound=PyTree)
Draws = list[Draw]


@dataclasses.dataclass(frozen=True)
class Generation:
    """The inputs of one generation, made once a trace.

    Attributes:
      settings: the settings of the strategy.
      plan: the treatment of every parameter.
      arithmetic: the arithmetic of the generation: floats or integers.
      seed: the two words of the run's seed; uint32 ``[2]``.
      number: number of generations done before this one; int32 ``[]``.
      epoch: ``number // noise_reuse``, the counter that noise is keyed by.
      sigma: standard deviation of the noise; float32 ``[]``.
      noise_sigma: sigma in the form that the arithmetic takes.
    """

    settings: Settings
    plan: Plan
    arithmetic: Arithmetic
    seed: UInt32[Array, "2"]
    number: Int[Array, ""]
    epoch: Int[Array, ""]
    sigma: Float[Array, ""]
    noise_sigma: Sigma

    @property
    def pairs(self) -> int:
        """Number of pairs of members."""
        return self.settings.population // 2

    @property
    def noise(self) -> Noise:
        """The source of samples."""
        return self.settings.noise

    def isolate(self, fn: Callable[..., Out], *args: PyTree) -> Out:
        """``fn(*args)``; a reproducible schedule compiles it in isolation."""
        return self.settings.schedule.isolate(fn, self.number >= 0, *args)


def begin(settings: Settings, state: State) -> Generation:
    """Makes the coming generation of a state."""
    number = state.generation
    # In isolation, since XLA may round the sigma schedule differently in another program.
    schedule = functools.partial(sigma_of, settings)
    sigma = settings.schedule.isolate(schedule, number >= 0, number)
    return Generation(
        settings=settings,
        plan=plan_of(settings, state.params),
        arithmetic=settings.arithmetic,
        seed=state.seed,
        number=number,
        epoch=number // settings.noise_reuse,
        sigma=sigma,
        noise_sigma=settings.arithmetic.noise_sigma(settings.sigma, sigma),
    )


def plan_of(settings: Settings, params: PyTree) -> Plan:
    """The plan of the parameters: the treatment of every leaf.

    Raises:
      ValueError: the arithmetic of the strategy cannot train a leaf.
    """
    plan = settings.plan(params, settings.rank)
    for leaf in plan.leaves:
        trained_by = leaf.arithmetic if leaf.trainable else None
        settings.arithmetic.check_leaf(leaf.path, leaf.dtype, trained_by)
    # The leaves of the parameters are the first leaves of a state.
    specs = specs_of(params, settings.mesh) if settings.specs is None else settings.specs
    return plan if specs is None else plan.placed(specs[: len(plan.leaves)])


def sigma_of(settings: Settings, generation: Int[Array, ""]) -> Float[Array, ""]:
    """The standard deviation of the noise in a generation; float32 ``[]``.

    Raises:
      ValueError: the schedule returns an array with axes.
    """
    sigma = settings.sigma(generation) if callable(settings.sigma) else settings.sigma
    if np.shape(sigma):
        raise ValueError(
            f"sigma: expected one number from the schedule, got the shape {list(np.shape(sigma))}"
        )
    return jnp.asarray(sigma, jnp.float32)


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
    draws = all_draws(g) if _keeps_noise(g) else None
    values, _ = evaluate(g, state.params, fitness, args, members, draws)
    return finish(g, state, values, groups, draws)


def finish(
    g: Generation,
    state: State,
    values: Num[Array, "..."],
    groups: Int[Array, "population"] | None,
    draws: Draws | None,
) -> tuple[State, Outcome | Metrics]:
    """Computes the next state from the scores of a population."""
    weighed = weigh(g, values, groups)
    grads, agreement = estimate(g, weighed, draws)
    value = g.arithmetic.value(weighed)
    new, change = apply(g, state, grads, weighed.moves, weighed.members, value)
    return told(g, new, Outcome(g.number, weighed.report, weighed.moves, change, agreement))


# ---------------------------------------------------------------- evaluate


def evaluate(
    g: Generation,
    params: PyTree,
    fitness: Function,
    args: tuple,
    members: PyTree,
    draws: Draws | None,
) -> "Scores":
    """Scores of all members, ``[population]`` or ``[population, tasks]``, and aux."""
    return scores_of(g, map_members(g, params, fitness, args, members, draws))


def map_members(
    g: Generation,
    params: PyTree,
    fn: Function,
    args: tuple,
    members: PyTree,
    draws: Draws | None,
) -> PyTree:
    """Maps ``fn`` over all members.

    Args:
      g: the generation.
      params: the mean.
      fn: ``fn(params, key, [member,] *args)``.
      args: the trees that every member receives.
      members: a tree with leading axis [population], or None.
      draws: the noise of all pairs, or None to draw it a chunk at a time.

    Returns:
      The outputs of ``fn``, each leaf with a leading axis [population].
    """
    member_data(members, g.settings.population)
    by_pair = jax.tree.map(lambda x: x.reshape(g.pairs, 2, *x.shape[1:]), members)
    # One interpretation for all traces, so that a built matrix is reported once.
    traced = interpret(fn, Context(on_dense=g.settings.dense_report))

    def of_pair(params: PyTree, pair: Array, drawn: Draws, own: PyTree) -> PyTree:
        words = stream(g.seed, "", g.number, pair, Role.FITNESS_KEY)

        def of_member(sign: Array, which: Array, own: PyTree) -> PyTree:
            key = typed_key(words)
            if not g.settings.shared_keys:
                key = jax.random.fold_in(key, which)
            perturbed = perturb(g.plan, params, drawn, g.noise_sigma, sign)
            return call(traced, perturbed, key, own, args)

        signs = jnp.array([1, -1], g.arithmetic.sign_type)
        return jax.vmap(of_member)(signs, jnp.arange(2), own)

    def of_chunk(ids: Array, data: tuple[Draws | None, PyTree]) -> PyTree:
        drawn, own = data
        if drawn is None:
            drawn = draw_pairs(g.plan, g.noise, g.seed, g.epoch, ids)
        here = constrain_all(params, g.plan.specs)
        return jax.vmap(lambda *each: of_pair(here, *each))(ids, drawn, own)

    always = g.number >= 0
    return map_pairs(
        of_chunk, g.pairs, (draws, by_pair), g.settings.schedule, g.settings.mesh, always
    )


def typed_key(words: UInt32[Array, "2"]) -> Array:
    """A JAX key from two words, always of the threefry implementation."""
    return jax.random.wrap_key_data(words, impl="threefry2x32")


class Scores(NamedTuple):
    """Scores of all members, and aux; None if the fitness returned scores alone."""

    values: Num[Array, "..."]
    aux: PyTree


def has_aux(out: PyTree) -> bool:
    """Whether a fitness returned ``(scores, aux)``."""
    return isinstance(out, tuple) and len(out) == 2


def scores_of(g: Generation, out: PyTree) -> Scores:
    """The scores and aux in the output of a fitness.

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
    return Scores(g.arithmetic.scores(values), aux)


def all_draws(g: Generation) -> Draws:
    """The noise of all pairs, drawn on the device that evaluates the pair; padded as pairs are."""

    def on_device(ids: Array, valid: Array, data: None) -> Draws:
        return draw_pairs(g.plan, g.noise, g.seed, g.epoch, ids)

    return split_pairs(on_device, g.pairs, None, g.settings.mesh, jax.P(AXIS))


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
        return g.arithmetic.weigh(table, groups, g.settings.shaping, sigma)

    if g.arithmetic.exact_sums or not g.settings.schedule.is_reproducible:
        return of(table, groups, g.sigma)
    # Every device holds all scores and sums them in the same order.
    return replicated(lambda *args: g.isolate(of, *args), g.settings.mesh, table, groups, g.sigma)


# ---------------------------------------------------------------- estimate


def estimate(
    g: Generation, weighed: Weighed, draws: Draws | None
) -> tuple[estimator.Sums, Float[Array, ""] | None]:
    """The gradient estimate of every leaf, and the cosine between two halves of the pairs."""
    weights = weighed.weights
    if not g.settings.agreement:
        total = _weighted_noise(g, weights, draws)
        gradient = functools.partial(estimator.gradient, g.plan)
        return g.isolate(gradient, total, g.noise_sigma, weighed.members), None
    first = jnp.arange(g.pairs) < g.pairs // 2
    halves = [_weighted_noise(g, jnp.where(h, weights, 0), draws) for h in (first, ~first)]
    return g.isolate(
        lambda *args: _joined_halves(g, *args), *halves, g.noise_sigma, weighed.members
    )


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
        if leaf.path in state.master:
            master[leaf.path] = value
        params.append(leaf.arithmetic.stored(value, leaf.dtype))
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
