"""Runs any traced JAX function on perturbed parameters that are never built.

``jax.make_jaxpr`` turns a function, whatever library its model is written in, into equations over
primitives. :func:`interpret` evaluates those equations with some inputs replaced by
:class:`~eggroll.values.LowRank` values. An equation without such an operand is bound as it is; one
with such an operand goes through the rule of its primitive (:mod:`eggroll.interpret.registry`);
control flow is entered. Where no rule applies, the array is built, which is reported
(:class:`~eggroll.DenseBuildWarning`) or refused (:class:`~eggroll.DenseBuildError`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from eggroll import _compat as compat
from eggroll.interpret import nodes
from eggroll.interpret.context import Context as Context
from eggroll.interpret.context import DenseBuildError as DenseBuildError
from eggroll.interpret.context import DenseBuildWarning as DenseBuildWarning
from eggroll.interpret.context import Origin, check_integers, origin_of, union
from eggroll.interpret.equations import type_of
from eggroll.interpret.member_loops import must_enter
from eggroll.interpret.node_pass import uses_of
from eggroll.interpret.registry import Entry, Rounding, Unhandled, entry
from eggroll.interpret.upcasting import apply
from eggroll.values.deferred import Deferred
from eggroll.values.lowrank import (
    LowRank,
    Value,
    broadcast_late,
    is_lazy,
    materialize,
    narrow,
)
from eggroll.values.node import Node


def interpret(fn: Callable[..., Any], context: Context | None = None) -> Callable[..., Any]:
    """Returns ``fn`` such that its arguments may hold LowRank and Upcast values.

    Args:
      fn: any traceable function of pytrees of arrays.
      context: how to treat what has to be built, and where to note it.

    Returns:
      A function of the same arguments; its outputs are ordinary arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> w = LowRank(jnp.eye(2), (jnp.ones((1, 2, 1)), jnp.ones((1, 1, 2))), jnp.float32(0.1))
      >>> interpret(lambda w, x: x @ w)(w, jnp.ones(2)).tolist()
      [1.2000000476837158, 1.2000000476837158]
    """
    context = context or Context()

    def interpreted(*args: Any) -> Any:
        values, tree = jax.tree.flatten(args, is_leaf=is_lazy)
        stand_ins = jax.tree.unflatten(tree, [stand_in(v) for v in values])
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*stand_ins)
        ctx = context.inner()
        origins = [
            origin_of(leaf) | (Origin.SHARED if any(map(is_lazy, leaves)) else Origin.DATA)
            for leaves in (jax.tree.leaves(arg, is_leaf=is_lazy) for arg in args)
            for leaf in leaves
        ]
        outs = evaluate(ctx, closed.jaxpr, closed.consts, values, origins)
        outs = [output(ctx, v) for v in outs]
        return jax.tree.unflatten(jax.tree.structure(shapes), outs)

    return interpreted


def output(context: Context, value: Value) -> Any:
    """What a function returns, as an array.

    Raises:
      ValueError: it was computed from parameters under node noise alone, and so carries no noise.
    """
    if isinstance(value, Node) and not value.looked_up:
        raise ValueError(
            f"parameter {value.paths[0]!r} has node noise and reaches an output through no product or "
            "sum with data, so no noise reaches it: data must be arguments of the fitness and not "
            "constants in it, or the parameter must have eggroll.Dense() or Frozen() in the plan's overrides"
        )
    return (
        nodes.realise(context, value) if isinstance(value, Node) else context.dense(value, "output")
    )


def stand_in(value: Value) -> Any:
    """What the function is traced with in a value's place: an array of its shape and type."""
    return compat.inside_mesh(value.w if isinstance(value, LowRank | Node) else narrow(value))


def evaluate(
    context: Context,
    jaxpr: core.Jaxpr,
    consts: Sequence[Any],
    args: Sequence[Value],
    origins: Sequence[Origin] | None = None,
) -> list[Value]:
    """Evaluates a jaxpr on arrays and lazy values.

    Args:
      context: of the interpretation.
      jaxpr: what to evaluate.
      consts: its constants.
      args: its arguments.
      origins: what each argument was computed from; None to judge by the values, which in the body
        of a loop or a branch do not tell.
    """
    env: dict[Any, Value] = {}
    context = dataclasses.replace(context, origins={})
    origins = [origin_of(v) for v in args] if origins is None else origins

    def read(atom: Any) -> Value:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    context.origins.update(zip(jaxpr.constvars, map(origin_of, consts), strict=True))
    context.origins.update(zip(jaxpr.invars, origins, strict=True))
    place, uses = context.site, None
    if context.nodes is not None:
        uses = uses_of(jaxpr)
        context.nodes.begin_uses(jaxpr.invars, args, uses)
    for i, eqn in enumerate(jaxpr.eqns):
        values = [read(atom) for atom in eqn.invars]
        context.site = f"{place}/{i}"
        with eqn.ctx.manager:
            outs = step(context, eqn, values)
        if context.nodes is not None and uses is not None:
            context.nodes.hand_on(eqn, values, outs, uses)
        env.update(zip(eqn.outvars, outs, strict=True))
        origin = union([*context.origins_of(eqn), *map(origin_of, values)])
        context.origins.update(dict.fromkeys(eqn.outvars, origin))
    return [read(atom) for atom in jaxpr.outvars]


def step(context: Context, eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    """Evaluates one equation."""
    known = entry(eqn.primitive.name)
    if not known.enters and any(isinstance(v, Node) for v in values):
        return nodes.step(context, known, eqn, values, step)
    check_operands(known, eqn, values)
    low_rank = any(isinstance(v, LowRank) for v in values)
    deferred = any(isinstance(v, Deferred) for v in values)
    if known.primitive == "broadcast_in_dim" and len(values) == 1 and not (low_rank or deferred):
        where = tuple(map(int, eqn.params["broadcast_dimensions"]))
        return [broadcast_late(materialize(values[0]), tuple(eqn.params["shape"]), where)]
    if not (known.late_broadcasts and (low_rank or deferred)):
        values = [materialize(v) for v in values]
    if deferred and Deferred not in known.takes:
        moved = on_terms(context, known, eqn, values)
        if moved is not None:
            return moved
        values = [context.upcast(v, eqn) if isinstance(v, Deferred) else v for v in values]
    advice = None
    enters = known.enters and (must_enter(eqn) or follows_noise(context, known, values))
    if applies(known, values) or enters:
        assert known.rule is not None
        out = known.rule(context, eqn, *values)
        if not isinstance(out, Unhandled):
            outs = out if isinstance(out, list) else [out]
            return [v.w if isinstance(v, LowRank) and v.w.size == 0 else v for v in outs]
        advice = out.advice or None
    if low_rank or deferred:
        values = [context.upcast(v, eqn, advice) for v in values]
    return apply(known, eqn, values)


def on_terms(
    context: Context, known: Entry, eqn: core.JaxprEqn, values: list[Value]
) -> list[Value] | None:
    """An operation that moves entries on a deferred value: the same on each of its values.

    Returns:
      None where that is not possible.
    """
    at = [i for i, v in enumerate(values) if isinstance(v, Deferred)]
    value = values[at[0]]
    if known.rounding is not Rounding.MOVES or known.rule is None or len(at) != 1:
        return None
    if value.reshaped or value.plain is not None:
        return None
    moved: dict[int, list[Value]] = {}
    for v in (v for term in value.terms for v in term):
        if id(v) not in moved:
            out = known.rule(context, eqn, *[v if i == at[0] else x for i, x in enumerate(values)])
            if isinstance(out, Unhandled):
                return None
            moved[id(v)] = out if isinstance(out, list) else [out]
    return [
        Deferred(
            tuple(tuple(moved[id(v)][i] for v in term) for term in value.terms), type_of(out).shape
        )
        for i, out in enumerate(eqn.outvars)
    ]


def follows_noise(context: Context, known: Entry, values: Sequence[Value]) -> bool:
    """Whether a call is entered to see what becomes of the node noise that an operand carries."""
    return context.nodes is not None and known.is_call and any(map(context.nodes.carried, values))


def applies(known: Entry, values: Sequence[Value]) -> bool:
    """Whether the primitive has a rule that holds for these operands."""
    taken = [v for v in values if isinstance(v, known.takes)]
    return bool(taken) and all(known.admits(v.arithmetic) for v in taken if isinstance(v, LowRank))


def check_operands(known: Entry, eqn: core.JaxprEqn, values: Sequence[Value]) -> None:
    """Raises ValueError for what would treat float noise on an int8 parameter as integers."""
    to_float = eqn.primitive.name == "convert_element_type" and jnp.issubdtype(
        eqn.params["new_dtype"], jnp.floating
    )
    if not known.moves_int8 and not to_float:
        for value in values:
            check_integers(value, eqn)
