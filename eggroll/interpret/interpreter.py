"""Runs any traced JAX function on perturbed parameters that are never built.

``jax.make_jaxpr`` turns a function, whatever library its model is written in, into equations over
primitives. :func:`interpret` evaluates those equations with some inputs replaced by
:class:`~eggroll.values.LowRank` values. An equation without such an operand is bound as it is; one
with such an operand goes through the rule of its primitive (:mod:`eggroll.interpret.registry`);
control flow is entered. Where no rule applies, the array is built, which is reported
(:class:`~eggroll.DenseBuildWarning`) or refused (:class:`~eggroll.DenseBuildError`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from eggroll import _compat as compat
from eggroll.interpret.context import Context as Context
from eggroll.interpret.context import DenseBuildError as DenseBuildError
from eggroll.interpret.context import DenseBuildWarning as DenseBuildWarning
from eggroll.interpret.context import check_integers
from eggroll.interpret.equations import results
from eggroll.interpret.registry import Entry, Unhandled, entry
from eggroll.interpret.upcasting import in_float32
from eggroll.values.lowrank import (
    LowRank,
    Upcast,
    Value,
    broadcast_late,
    is_lazy,
    materialize,
    narrow,
)


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
        outs = evaluate(ctx, closed.jaxpr, closed.consts, values)
        outs = [ctx.dense(v, "output") for v in outs]
        return jax.tree.unflatten(jax.tree.structure(shapes), outs)

    return interpreted


def stand_in(value: Value) -> Any:
    """What the function is traced with in a value's place: an array of its shape and type."""
    return compat.inside_mesh(value.w if isinstance(value, LowRank) else narrow(value))


def evaluate(
    context: Context, jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Value]
) -> list[Value]:
    """Evaluates a jaxpr on arrays and lazy values."""
    env: dict[Any, Value] = {}

    def read(atom: Any) -> Value:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        with eqn.ctx.manager:
            outs = step(context, eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def step(context: Context, eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
    """Evaluates one equation."""
    known = entry(eqn.primitive.name)
    check_operands(known, eqn, values)
    lazy = any(isinstance(v, LowRank) for v in values)
    if known.primitive == "broadcast_in_dim" and len(values) == 1 and not lazy:
        shape, where = eqn.params["shape"], eqn.params["broadcast_dimensions"]
        return [broadcast_late(materialize(values[0]), tuple(shape), where)]
    if not (known.late_broadcasts and lazy):
        values = [materialize(v) for v in values]
    if applies(known, values):
        assert known.rule is not None
        out = known.rule(context, eqn, *values)
        if not isinstance(out, Unhandled):
            outs = out if isinstance(out, list) else [out]
            return [v.w if isinstance(v, LowRank) and v.w.size == 0 else v for v in outs]
    if lazy:
        values = [context.upcast(v, eqn) for v in values]
    if any(isinstance(v, Upcast) for v in values):
        return in_float32(known, eqn, values)
    return results(eqn, values)


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
