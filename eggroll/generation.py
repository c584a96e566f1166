"""One generation, from top to bottom: evaluate -> weigh -> estimate -> apply.

    values  = evaluate(g, state, fitness, ...)    the score of every member
    weighed = weigh(g, values, groups)            what the noise of each pair counts
    grads   = estimate(g, weighed, ...)           the weighted sum of noise, as a gradient
    state   = apply(g, state, grads, ...)         a step of the optimizer

Every function here is traced. ``begin`` makes the one object that the others share; nothing calls
back into the strategy. Arithmetic that differs between floats and integers is in
:mod:`eggroll.arithmetic`, the order of computation in :mod:`eggroll.population.schedule`.
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
    """What one generation of a state needs, made once a trace.

    Attributes:
      settings: of the strategy.
      plan: the treatment of every parameter.
      arithmetic: of floats or of integers.
      seed: the run's seed.
      number: generations done before this one.
      epoch: what noise is keyed by: the number, unless noise is reused.
      sigma: standard deviation of the noise.
      noise_sigma: the same as the arithmetic takes it.
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
        """Pairs of members."""
        return self.settings.population // 2

    @property
    def noise(self) -> Noise:
        """The source of samples."""
        return self.settings.noise

    def isolate(self, fn: Callable[..., Out], *args: PyTree) -> Out:
        """``fn(*args)``; compiled in isolation under a reproducible schedule."""
        return self.settings.schedule.isolate(fn, self.number >= 0, *args)


def begin(settings: Settings, state: State) -> Generation:
    """The coming generation of a state."""
    number = state.generation
    # In isolation, since a schedule's arithmetic may round otherwise in another program.
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
    """The treatment of every parameter."""
    plan = settings.plan(params, settings.rank)
    for leaf in plan.leaves:
        trained_by = leaf.arithmetic if leaf.trainable else None
        settings.arithmetic.check_leaf(leaf.path, leaf.dtype, trained_by)
    # Parameters come first in a state.
    specs = specs_of(params, settings.mesh) if settings.specs is None else settings.specs
    return plan if specs is None else plan.placed(specs[: len(plan.leaves)])


def sigma_of(settings: Settings, generation: Int[Array, ""]) -> Float[Array, ""]:
    """The standard deviation of the noise in a generation."""
    sigma = settings.sigma(generation) if callable(settings.sigma) else settings.sigma
    if np.shape(sigma):
        raise ValueError(
            f"sigma's schedule gives the shape {list(np.shape(sigma))}; one number is right"
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
    """From the scores of a population to the next state."""
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
    """Scores of all members, ``[population]`` or ``[population, tasks]``, with aux."""
    return scores_of(g, map_members(g, params, fitness, args, members, draws))


def map_members(
    g: Generation,
    params: PyTree,
    fn: Function,
    args: tuple,
    members: PyTree,
    draws: Draws | None,
) -> PyTree:
    """``fn`` of every member; ``draws`` of all pairs, or None to draw them as they are used."""
    member_data(members, g.settings.population)
    by_pair = jax.tree.map(lambda x: x.reshape(g.pairs, 2, *x.shape[1:]), members)
    # One interpretation reports a built matrix once, however often it is traced.
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
    """A JAX key from two words; threefry, whatever JAX's default."""
    return jax.random.wrap_key_data(words, impl="threefry2x32")


class Scores(NamedTuple):
    """Scores of all members, and the rest of what the fitness gave (None where it gave no more)."""

    values: Num[Array, "..."]
    aux: PyTree


def has_aux(out: PyTree) -> bool:
    """Whether a fitness gave ``(scores, aux)``."""
    return isinstance(out, tuple) and len(out) == 2


def scores_of(g: Generation, out: PyTree) -> Scores:
    """Scores and aux of a fitness' output, or a ValueError that says what it gave."""
    values, aux = out if has_aux(out) else (out, None)
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
    return Scores(g.arithmetic.scores(values), aux)


def all_draws(g: Generation) -> Draws:
    """The draws of all pairs, each made on the device that evaluates the pair; padded as pairs are."""

    def on_device(ids: Array, valid: Array, data: None) -> Draws:
        return draw_pairs(g.plan, g.noise, g.seed, g.epoch, ids)

    return split_pairs(on_device, g.pairs, None, g.settings.mesh, jax.P(AXIS))


def _keeps_noise(g: Generation) -> bool:
    """Whether a step keeps the noise of the evaluation for the update.

    A device keeps that of its own members alone, and a reproducible schedule draws all of it again.
    """
    s = g.settings
    if s.schedule.is_reproducible or s.sends_scores_alone(g.plan):
        return False
    return g.plan.noise_bytes * -(-g.pairs // devices(s.mesh)) <= s.factor_memory


# ---------------------------------------------------------------- weigh


def weigh(
    g: Generation, values: Num[Array, "..."], groups: Int[Array, "population"] | None
) -> Weighed:
    """What the noise of each pair counts, from the scores of its members."""
    table = values if values.ndim == 2 else values[:, None]

    def of(table: Array, groups: Array | None, sigma: Array) -> Weighed:
        return g.arithmetic.weigh(table, groups, g.settings.shaping, sigma)

    if g.arithmetic.exact_sums or not g.settings.schedule.is_reproducible:
        return of(table, groups, g.sigma)
    # Every device has all scores, and sums them in the same order.
    return replicated(lambda *args: g.isolate(of, *args), g.settings.mesh, table, groups, g.sigma)


# ---------------------------------------------------------------- estimate


def estimate(
    g: Generation, weighed: Weighed, draws: Draws | None
) -> tuple[estimator.Sums, Float[Array, ""] | None]:
    """The gradient estimate of every leaf, and how far two halves of the pairs agree on it."""
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
    """The estimate of both halves of the pairs, and the cosine between those of each."""
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
    """Steps the optimizer, unless nothing moves; the generation always advances.

    Args:
      g: the generation.
      state: the state that the gradient is of.
      grads: one a leaf, None for a frozen one.
      moves: whether to step at all.
      members: as :class:`~eggroll.arithmetic.Weighed` has them.
      value: minus the mean fitness, for optimizers that take it.

    Returns:
      The next state, and how far parameters moved (as :class:`~eggroll.arithmetic.Outcome` has it).
    """
    old = trainable_of(g.plan, state.params, state.master)
    tree = jax.tree.unflatten(jax.tree.structure(state.params), grads)
    move = functools.partial(g.arithmetic.move, g.settings.optimizer)
    trained, optimizer, change = g.isolate(move, tree, state.optimizer, old, moves, members, value)
    new = _advanced(g, state, trained, optimizer)
    return constrain_all(new, g.settings.specs, g.settings.mesh), change


def _advanced(g: Generation, state: State, trained: PyTree, optimizer: PyTree) -> State:
    """The state of the next generation, from what the optimizer made of the trained tree."""
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
    """The next state with its metrics, or what a program of their own makes metrics of."""
    inside = g.arithmetic.metrics_inside
    return state, metrics(g.settings, outcome) if inside else outcome


def metrics(settings: Settings, outcome: Outcome) -> Metrics:
    """The metrics of an update, in floats."""
    told, norm = settings.arithmetic.statistics(outcome)
    zero = jnp.int32(0)
    return Metrics(
        generation=outcome.generation,
        fitness_mean=told and told.mean,
        fitness_best=told and told.best,
        fitness_worst=told and told.worst,
        fitness_std=told and told.std,
        invalid=told.invalid if told else zero,
        identical_pairs=told.identical if told else zero,
        updated=outcome.updated,
        update_norm=norm,
        agreement=outcome.agreement,
        sigma=sigma_of(settings, outcome.generation),
    )
