"""Runs the members of a generation: the first pass of any noise, and the second pass of node noise.

``vmap`` maps over pairs and, inside, over the two members of a pair, so that both share one draw of noise.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Num, PyTree, UInt32

from eggroll import _compat as compat
from eggroll import estimator
from eggroll._calling import Function, call, one_of
from eggroll._checks import member_data
from eggroll._settings import Settings
from eggroll.inputs import Generation
from eggroll.interpret import Context, interpret
from eggroll.interpret.node_pass import NodePass, Rows, Site
from eggroll.nodes import node_pass
from eggroll.noise import Role, stream
from eggroll.perturbation import Draw, draw, draw_pairs, perturb
from eggroll.plan.treatments import Nodes
from eggroll.population.pairs import map_and_sum, map_pairs, sum_pairs
from eggroll.population.placement import constrain_all

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


def reporter(g: Generation) -> Context:
    """A context for all traces of a task, so that a built matrix is reported once."""
    return Context(on_dense=g.settings.dense_report)


def map_members(
    g: Generation,
    params: PyTree,
    task: Task,
    draws: Draws | None,
    context: Context | None = None,
    some: Int[Array, "some"] | None = None,
) -> PyTree:
    """Maps the function of a task over all members, or over those of some pairs.

    Args:
      g: the generation.
      params: the mean.
      task: what is mapped.
      draws: the noise of all pairs, or None to draw it a chunk at a time.
      context: from :func:`reporter`; made here by default.
      some: numbers of the pairs; all by default. The data of members are then those of these pairs.

    Returns:
      The outputs of the function, each leaf with a leading axis [population], or [2 * some].
    """
    count = g.pairs if some is None else some.shape[0]
    member_data(task.members, 2 * count)
    by_pair = _by_pair(task.members, count)
    context = context or reporter(g)

    def of_pair(params: PyTree, pair: Array, drawn: Draws, own: PyTree) -> PyTree:
        def of_member(sign: Array, which: Array, own: PyTree) -> PyTree:
            nodes = _pass(g, pair, sign)
            return _member(g, context, task, params, pair, drawn, sign, which, own, nodes)

        return _both_members(g, of_member, own, 0)

    def of_chunk(ids: Array, data: tuple[Draws | None, PyTree]) -> PyTree:
        drawn, own = data
        if drawn is None:
            drawn = draw_pairs(g.plan, g.noise, g.seed, g.epoch, ids)
        here = constrain_all(params, g.plan.specs)
        return jax.vmap(lambda *each: of_pair(here, *each))(ids, drawn, own)

    always = g.number >= 0
    return map_pairs(
        of_chunk, g.pairs, (draws, by_pair), g.settings.schedule, g.settings.mesh, always, some
    )


def _by_pair(members: PyTree, pairs: int) -> PyTree:
    """The data of members, leaves ``[pairs, 2, ...]``."""
    return jax.tree.map(lambda x: x.reshape(pairs, 2, *x.shape[1:]), members)


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
    nodes: NodePass | None,
) -> PyTree:
    """Runs one member, with a pass of node noise if parameters have it."""
    key = typed_key(stream(g.seed, "", g.number, pair, Role.FITNESS_KEY))
    if not g.settings.shared_keys:
        key = jax.random.fold_in(key, which)
    perturbed = perturb(g.plan, params, drawn, g.noise_sigma, sign, nodes)
    traced = interpret(task.fn, dataclasses.replace(context, nodes=nodes))
    return call(traced, perturbed, key, own, task.args)


def _pass(g: Generation, pair: Array, sign: Array, *rows_and_credit: Any) -> NodePass | None:
    """A pass of node noise: the first one, or with rows and credit the second."""
    if not g.plan.has_nodes:
        return None
    how = g.node_arithmetic
    return node_pass(how, g.noise, g.seed, g.epoch, pair, sign, *rows_and_credit)


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
    if nodes.rows.length > 1 and not any(site.rows for site in nodes.sites.values()):
        shapes = sorted({site.paths[0] for site in nodes.sites.values()})
        raise ValueError(
            f"rows={nodes.rows.length}: must be the length of a loop or of an axis of the activations; "
            f"no product with the parameters {shapes} has one (for one score of a member, return a number "
            "or use credit=eggroll.credit.episode())"
        )


def rows_are_steps(g: Generation, params: PyTree, task: Task) -> bool:
    """Whether the rows of the scores are steps of a loop around a product, and not an axis."""
    sites = trace(g, Context(on_dense="ignore"), params, task, one_of(task.members))
    return any(site.rows == "loop" for site in sites)


def typed_key(words: UInt32[Array, "2"]) -> Array:
    """A JAX key from two words, always of the threefry implementation."""
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def has_aux(out: PyTree) -> bool:
    """Whether a fitness returned ``(scores, aux)``."""
    return isinstance(out, tuple) and len(out) == 2


# The sums of node noise for every leaf, from the credit of all pairs.
SecondPass = Callable[[RowCredit], estimator.Sums]


def node_sums(
    g: Generation, params: PyTree, task: Task, draws: Draws | None, credit: RowCredit
) -> estimator.Sums:
    """The second pass: what every product received, times credit, summed over rows and members."""
    of_chunk = functools.partial(_both_passes, g, Context(on_dense="ignore"), params, task)

    def sums(ids: Array, data: tuple[Draws | None, PyTree], credit: RowCredit) -> list[Array]:
        return of_chunk(ids, data, credit)[1]

    totals = sum_pairs(
        sums,
        g.pairs,
        (draws, _by_pair(task.members, g.pairs)),
        credit,
        g.settings.schedule,
        g.settings.mesh,
        g.arithmetic.exact_sums,
        g.number >= 0,
    )
    return _of_leaves(g, totals)


class Kept(NamedTuple):
    """The first pass over all members, with what the second pass needs of it.

    Attributes:
      out: as from :func:`map_members`.
      arrays: what is kept: the inputs of products and their noise.
      sums: the second pass.
    """

    out: PyTree
    arrays: list[Array]
    sums: SecondPass


def keep(
    g: Generation,
    params: PyTree,
    task: Task,
    draws: Draws | None,
    context: Context,
    credit: RowCredit,
) -> Kept:
    """Runs all members at a time, and keeps what their products received for the second pass.

    Both passes are traced as one with the credit unknown, so that all that does not depend on it is
    computed once.

    Args:
      g: the generation.
      params: the mean.
      task: what is run.
      draws: the noise of all pairs, or None to draw it.
      context: from :func:`reporter`.
      credit: the shapes of the credit of all pairs.
    """
    member_data(task.members, g.settings.population)
    later, tree = jax.tree.flatten(credit)
    of_out: list[Any] = []

    def both(*leaves: Array) -> list[Array]:
        data = draws, _by_pair(task.members, g.pairs)
        out = map_and_sum(
            functools.partial(_both_passes, g, context, params, task),
            g.pairs,
            data,
            jax.tree.unflatten(tree, leaves),
            g.settings.mesh,
        )
        flat, structure = jax.tree.flatten(out)
        of_out.append(structure)
        return flat

    halves = compat.halves(both, later)

    def sums(credit: RowCredit) -> estimator.Sums:
        _, totals = jax.tree.unflatten(of_out[0], halves.rest(jax.tree.leaves(credit)))
        return _of_leaves(g, totals)

    # The sums depend on the credit: None stands in their place.
    out, _ = jax.tree.unflatten(of_out[0], halves.known)
    return Kept(out, halves.kept, sums)


def _both_passes(
    g: Generation,
    context: Context,
    params: PyTree,
    task: Task,
    ids: Array,
    data: tuple[Draws | None, PyTree],
    credit: RowCredit,
) -> tuple[PyTree, list[Array]]:
    """The outputs ``[n, 2, ...]`` of the members of ``n`` pairs, and the sums of all of them."""

    def of_pair(
        params: PyTree, pair: Array, drawn: Draws, own: PyTree, credit: RowCredit
    ) -> tuple[PyTree, list[Array]]:
        rows = rows_of(g.settings, credit.rows.shape[0])

        def of_member(sign: Array, which: Array, own: PyTree) -> tuple[PyTree, list[Array]]:
            nodes = _pass(g, pair, sign, rows, *credit)
            assert nodes is not None
            out = _member(g, context, task, params, pair, drawn, sign, which, own, nodes)
            _check_rows(nodes)
            return out, nodes.region.sums()

        return _both_members(g, of_member, own, (0, None))

    drawn, own = data
    if drawn is None:
        drawn = draw_pairs(g.plan, g.noise, g.seed, g.epoch, ids)
    here = constrain_all(params, g.plan.specs)
    # Every operation that sums over members does so by itself: sums are not mapped out.
    over_pairs = jax.vmap(lambda *each: of_pair(here, *each), out_axes=(0, None))
    return over_pairs(ids, drawn, own, credit)


def _of_leaves(g: Generation, totals: list[Array]) -> estimator.Sums:
    """The sums of the parameters with node noise, at their leaves."""
    left = iter(totals)
    return [
        estimator.follow(leaf, next(left), g.settings.mesh)
        if isinstance(leaf.treatment, Nodes)
        else None
        for leaf in g.plan.leaves
    ]


def trace(
    g: Generation, context: Context, params: PyTree, task: Task, member: PyTree
) -> list[Site]:
    """Traces one member abstractly; what is built is noted in the context.

    Args:
      g: a generation.
      context: of the interpretation.
      params: the mean.
      task: what is traced.
      member: the shapes of one member's data.

    Returns:
      The products that get node noise.
    """
    sites: dict[str, Site] = {}

    def run(rows: Rows | None, params: PyTree, member: PyTree, args: tuple) -> PyTree:
        zero, sign = jnp.int32(0), jnp.ones((), g.arithmetic.sign_type)
        nodes = _pass(g, zero, sign, rows)
        if nodes is not None:
            nodes = dataclasses.replace(nodes, sites=sites)
        drawn = draw(g.plan, g.noise, g.seed, g.epoch, zero)
        own = task._replace(args=args)
        return _member(g, context, own, params, zero, drawn, sign, zero, member, nodes)

    out = jax.eval_shape(functools.partial(run, None), params, member, task.args)
    if g.plan.has_nodes:
        scores = out[0] if has_aux(out) else out
        rows = rows_of(g.settings, scores.shape[0] if getattr(scores, "ndim", 0) else 1)
        jax.eval_shape(functools.partial(run, rows), params, member, task.args)
    return list(sites.values())
