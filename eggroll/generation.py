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
from eggroll.credit import causal, episode
from eggroll.interpret import Context, interpret
from eggroll.interpret.node_pass import NodeArithmetic, NodePass, Rows, Site
from eggroll.nodes import FloatNodes, IntegerNodes, node_pass
from eggroll.noise import Noise, Role, stream
from eggroll.perturbation import Draw, draw, draw_pairs, perturb
from eggroll.plan.leaf import Plan
from eggroll.plan.treatments import Given, Nodes
from eggroll.population.pairs import map_pairs, split_pairs, sum_pairs
from eggroll.population.placement import AXIS, constrain_all, devices, replicated, specs_of
from eggroll.state import Metrics, State, trainable_of

Out = TypeVar("Out", bound=PyTree)
Draws = list[Draw]


class Task(NamedTuple):
    """What the members of a generation do.

    Attributes:
      fn: ``fn(params, key, [member,] *args)``.
      args: the trees that every member receives.
      members: a tree with leading axis [population], or None.
    """

    fn: Function
    args: tuple = ()
    members: PyTree = None


class RowCredit(NamedTuple):
    """The credit of one pair, or of all pairs with a leading axis.

    Attributes:
      rows: of every row.
      whole: of what belongs to no row.
    """

    rows: Num[Array, "*pairs rows"]
    whole: Num[Array, "*pairs"]


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
    def node_arithmetic(self) -> NodeArithmetic:
        """How node noise is added and weighed."""
        return _node_arithmetic(self.arithmetic, self.noise_sigma)

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
    plan = plan.with_nodes() if settings.perturb == "nodes" else plan
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
    task = Task(fitness, args, members)
    values, _ = evaluate(g, state.params, task, draws)
    return finish(g, state, values, groups, draws, task)


def finish(
    g: Generation,
    state: State,
    values: Num[Array, "..."],
    groups: Int[Array, "population"] | None,
    draws: Draws | None,
    task: Task | None = None,
) -> tuple[State, Outcome | Metrics]:
    """Computes the next state from the scores of a population; node noise runs the task again."""
    given = [leaf.path for leaf in g.plan.leaves if isinstance(leaf.treatment, Given)]
    if given:
        raise ValueError(
            f"parameter {given[0]!r} is eggroll.Given(): must get its gradient from the caller, by "
            "es.evaluate, es.gradient and es.apply_gradient instead of es.step or es.update"
        )
    weighed = weigh(g, values, groups)
    grads, agreement = estimate(g, state.params, weighed, draws, task)
    value = g.arithmetic.value(weighed)
    new, change = apply(g, state, grads, weighed.moves, weighed.members, value)
    return told(g, new, Outcome(g.number, weighed.report, weighed.moves, change, agreement))


# ---------------------------------------------------------------- evaluate


def evaluate(g: Generation, params: PyTree, task: Task, draws: Draws | None) -> "Scores":
    """Scores of all members, ``[population]`` or ``[population, tasks]``, and aux."""
    return scores_of(g, map_members(g, params, task, draws))


def map_members(g: Generation, params: PyTree, task: Task, draws: Draws | None) -> PyTree:
    """Maps the function of a task over all members.

    Args:
      g: the generation.
      params: the mean.
      task: what is mapped.
      draws: the noise of all pairs, or None to draw it a chunk at a time.

    Returns:
      The outputs of the function, each leaf with a leading axis [population].
    """
    member_data(task.members, g.settings.population)
    by_pair = _by_pair(g, task)
    # One context for all traces, so that a built matrix is reported once.
    context = Context(on_dense=g.settings.dense_report)

    def of_pair(params: PyTree, pair: Array, drawn: Draws, own: PyTree) -> PyTree:
        run = functools.partial(_member, g, context, task, params, pair, drawn)
        alone = lambda sign, which, own: run(sign, which, own, None)[0]
        return _both_members(g, alone, own, 0)

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


def _by_pair(g: Generation, task: Task) -> PyTree:
    """The data of members, leaves ``[pairs, 2, ...]``."""
    return jax.tree.map(lambda x: x.reshape(g.pairs, 2, *x.shape[1:]), task.members)


def _both_members(g: Generation, of_member: Callable[..., PyTree], own: PyTree, out: Any) -> PyTree:
    """Maps a function over the two members of a pair; ``out`` is the axis of the outputs."""
    signs = jnp.array([1, -1], g.arithmetic.sign_type)
    return jax.vmap(of_member, out_axes=out)(signs, jnp.arange(2), own)


def _member(
    g: Generation,
    context: Context,
    task: Task,
    params: PyTree,
    pair: Array,
    drawn: Draws,
    sign: Array,
    which: Array,
    own: PyTree,
    credit: RowCredit | None,
) -> tuple[PyTree, list[Array]]:
    """Runs one member: the outputs of the function, and with credit the sums of node noise."""
    words = stream(g.seed, "", g.number, pair, Role.FITNESS_KEY)
    key = typed_key(words)
    if not g.settings.shared_keys:
        key = jax.random.fold_in(key, which)
    nodes = None
    if g.plan.has_nodes:
        rows = None if credit is None else rows_of(g.settings, credit.rows.shape[0])
        given = () if credit is None else tuple(credit)
        nodes = node_pass(g.node_arithmetic, g.noise, g.seed, g.epoch, pair, sign, rows, *given)
        context = dataclasses.replace(context, nodes=nodes)
    perturbed = perturb(g.plan, params, drawn, g.noise_sigma, sign, nodes)
    out = call(interpret(task.fn, context), perturbed, key, own, task.args)
    if credit is None:
        return out, []
    assert nodes is not None
    _check_rows(nodes)
    return out, nodes.region.sums()


def rows_of(settings: Settings, scores: int) -> Rows:
    """The rows that the scores of a member belong to.

    Raises:
      ValueError: the number of scores is not that of the rows in the settings.
    """
    rows = settings.rows
    rows = Rows(scores) if rows is None else Rows(rows) if isinstance(rows, int) else rows
    if scores not in (1, rows.length):
        raise ValueError(
            f"rows={rows.length}: must be the number of scores that the fitness returns, {scores}"
        )
    return dataclasses.replace(rows, length=scores)


def _check_rows(nodes: NodePass) -> None:
    """Raises ValueError if the scores have rows and no product does."""
    assert nodes.rows is not None
    if nodes.rows.length > 1 and not any(site.in_row for site in nodes.sites.values()):
        shapes = sorted({site.paths[0] for site in nodes.sites.values()})
        raise ValueError(
            f"rows={nodes.rows.length}: must be the length of a loop or of an axis of the activations; "
            f"no product with the parameters {shapes} has one (for one score of a member, return a number "
            "or use credit=eggroll.credit.episode())"
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


def node_sums(
    g: Generation, params: PyTree, task: Task, credit: RowCredit, draws: Draws | None
) -> estimator.Sums:
    """The second pass: what every product received, times credit, summed over rows and members."""
    context = Context(on_dense="ignore")

    def of_pair(
        params: PyTree, pair: Array, drawn: Draws, own: PyTree, credit: RowCredit
    ) -> list[Array]:
        run = functools.partial(_member, g, context, task, params, pair, drawn)
        sums = lambda sign, which, own: run(sign, which, own, credit)[1]
        return _both_members(g, sums, own, None)

    def of_chunk(ids: Array, data: tuple[Draws | None, PyTree], credit: RowCredit) -> list[Array]:
        drawn, own = data
        if drawn is None:
            drawn = draw_pairs(g.plan, g.noise, g.seed, g.epoch, ids)
        here = constrain_all(params, g.plan.specs)
        # Every operation that sums over members does so by itself: nothing is mapped out.
        return jax.vmap(lambda *each: of_pair(here, *each), out_axes=None)(ids, drawn, own, credit)

    totals = iter(
        sum_pairs(
            of_chunk,
            g.pairs,
            (draws, _by_pair(g, task)),
            credit,
            g.settings.schedule,
            g.settings.mesh,
            g.arithmetic.exact_sums,
            g.number >= 0,
        )
    )
    return [
        estimator.follow(leaf, next(totals), g.settings.mesh)
        if isinstance(leaf.treatment, Nodes)
        else None
        for leaf in g.plan.leaves
    ]


def trace(
    settings: Settings,
    plan: Plan,
    context: Context,
    params: PyTree,
    fitness: Function,
    member: PyTree,
    args: tuple,
) -> list[Site]:
    """Traces one member abstractly; what is built is noted in the context.

    Returns:
      The products that get node noise.
    """
    arithmetic = settings.arithmetic
    sites: dict[str, Site] = {}

    def run(rows: Rows | None, params: PyTree, member: PyTree, args: tuple) -> PyTree:
        words, zero = jnp.zeros(2, jnp.uint32), jnp.int32(0)
        sign = jnp.ones((), arithmetic.sign_type)
        sigma = arithmetic.noise_sigma(settings.sigma, jnp.float32(1))
        nodes = None
        if plan.has_nodes:
            how = _node_arithmetic(arithmetic, sigma)
            nodes = node_pass(how, settings.noise, words, zero, zero, sign, rows)
            nodes = dataclasses.replace(nodes, sites=sites)
        drawn = draw(plan, settings.noise, words, zero, zero)
        lazy = perturb(plan, params, drawn, sigma, sign, nodes)
        traced = interpret(fitness, dataclasses.replace(context, nodes=nodes))
        return call(traced, lazy, typed_key(words), member, args)

    out = jax.eval_shape(functools.partial(run, None), params, member, args)
    if plan.has_nodes:
        scores = out[0] if has_aux(out) else out
        count = scores.shape[0] if getattr(scores, "ndim", 0) else 1
        rows = rows_of(settings, count)
        jax.eval_shape(functools.partial(run, rows), params, member, args)
    return list(sites.values())


def _node_arithmetic(arithmetic: Arithmetic, sigma: Sigma) -> NodeArithmetic:
    """How node noise is added and weighed."""
    exact = arithmetic.exact_sums
    return IntegerNodes(float(sigma)) if exact else FloatNodes(jnp.asarray(sigma))


# ---------------------------------------------------------------- weigh


def weigh(
    g: Generation, values: Num[Array, "..."], groups: Int[Array, "population"] | None
) -> Weighed:
    """The weight of each pair's noise, from the scores of its members."""
    table = values if values.ndim == 2 else values[:, None]

    def of(table: Array, groups: Array | None, sigma: Array) -> Weighed:
        weighed = g.arithmetic.weigh(table, groups, g.settings.shaping, sigma)
        return weighed._replace(moves=weighed.rows_move) if g.plan.has_nodes else weighed

    if g.arithmetic.exact_sums or not g.settings.schedule.is_reproducible:
        return of(table, groups, g.sigma)
    # Every device holds all scores and sums them in the same order.
    return replicated(lambda *args: g.isolate(of, *args), g.settings.mesh, table, groups, g.sigma)


# ---------------------------------------------------------------- estimate


def estimate(
    g: Generation, params: PyTree, weighed: Weighed, draws: Draws | None, task: Task | None
) -> tuple[estimator.Sums, Float[Array, ""] | None]:
    """The gradient estimate of every leaf, and the cosine between two halves of the pairs.

    Args:
      g: the generation.
      params: the mean.
      weighed: the weight of each pair, and of each row.
      draws: the noise of all pairs, or None to draw it again.
      task: what was evaluated, for the second pass of node noise; None without node noise.
    """
    if not g.settings.agreement:
        total = _sums(g, params, weighed, draws, task)
        gradient = functools.partial(estimator.gradient, g.plan)
        return g.isolate(gradient, total, g.noise_sigma, weighed.members), None
    first = jnp.arange(g.pairs) < g.pairs // 2
    halves = []
    for half in (first, ~first):
        of_half = weighed._replace(
            weights=jnp.where(half, weighed.weights, 0),
            differences=jnp.where(half[:, None], weighed.differences, 0),
        )
        halves.append(_sums(g, params, of_half, draws, task))
    return g.isolate(
        lambda *args: _joined_halves(g, *args), *halves, g.noise_sigma, weighed.members
    )


def _sums(
    g: Generation, params: PyTree, weighed: Weighed, draws: Draws | None, task: Task | None
) -> estimator.Sums:
    """The sums of noise by weights, and for node noise those of the second pass."""
    total = _weighted_noise(g, weighed.weights, draws)
    if not g.plan.has_nodes:
        return total
    if task is None:
        raise ValueError(
            "perturb='nodes': update and gradient need the fitness and its arguments for the second pass, "
            "as in es.update(state, values, fitness, *args)"
        )
    sums = node_sums(g, params, task, credit_of(g, weighed.differences), draws)
    return [a if b is None else b for a, b in zip(total, sums, strict=True)]


def credit_of(g: Generation, differences: Num[Array, "pairs rows"]) -> RowCredit:
    """The credit of the rows of every pair, from the differences of its two members' scores."""
    how = g.settings.credit or (causal() if differences.shape[1] > 1 else episode())
    return RowCredit(*g.arithmetic.credit(how, differences))


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
