"""Rules of operations on the form of an array: axes, shapes, types, placement.

Rules never look at the shape alone: they ask along which axes each factor varies, so that one rule
serves matrices, kernels with several row or column axes, stacks and batches.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core

from eggroll import _compat as compat
from eggroll.interpret.context import Context
from eggroll.interpret.equations import bind
from eggroll.interpret.registry import UNHANDLED, Rounding, Unhandled, rule
from eggroll.values.deferred import Deferred, as_term, common_groups
from eggroll.values.lowrank import LowRank, Value

Shape = tuple[int, ...]
Result = Value | list[Value] | Unhandled


def on_each(value: LowRank, on_w: Callable, on_factor: Callable, **changes: Any) -> LowRank:
    """Applies an operation to the array and to the factors, of each rank, and gains."""
    factors = tuple(jax.vmap(on_factor)(factor) for factor in value.factors)
    gains = tuple(on_factor(gain) for gain in value.gains)
    return value.replace(w=on_w(value.w), factors=factors, gains=gains, **changes)


def on_deferred(
    value: Deferred, on_value: Callable[[LowRank], Result], on_plain: Callable[[Array], Array]
) -> Deferred | Unhandled:
    """Applies a rule to every value of a deferred one, and the operation to its array."""
    once: dict[int, LowRank] = {}
    for v in (v for term in value.terms for v in term):
        out = on_value(v) if id(v) not in once else once[id(v)]
        if not isinstance(out, LowRank):
            return UNHANDLED
        once[id(v)] = out
    terms = tuple(tuple(once[id(v)] for v in term) for term in value.terms)
    plain = None if value.plain is None else on_plain(value.plain)
    return Deferred(terms, value.shape, plain)


def dims(factor: Array) -> tuple[int, ...]:
    return factor.shape[1:]


# ---------------------------------------------------------------- the same on every part


@rule(
    "copy", "copy_p", "name", "transpose",
    keeps="all", integers=True, rounding=Rounding.MOVES,
)  # fmt: skip
def same_on_all(ctx: Context, eqn: core.JaxprEqn, value: LowRank) -> Result:
    return on_each(value, lambda x: bind(eqn, x), lambda x: bind(eqn, x))


@rule("stop_gradient", keeps="all", integers=True, rounding=Rounding.MOVES)
def stop_gradient(ctx: Context, eqn: core.JaxprEqn, value: LowRank) -> Result:
    # The same object, by which select_n knows that a vmapped branch selects a value or itself.
    return value


# Rounding the parts of a shifted product is not rounding the product.
rule("reduce_precision", keeps="all")(same_on_all)


@rule(
    "convert_element_type",
    keeps="casts to float types; in fixed point to wider integers",
    takes=(LowRank, Deferred),
    integers=True,
)
def convert_element_type(ctx: Context, eqn: core.JaxprEqn, value: LowRank | Deferred) -> Result:
    dtype = eqn.params["new_dtype"]
    if isinstance(value, Deferred):
        return on_deferred(
            value, lambda v: convert_element_type(ctx, eqn, v), lambda x: bind(eqn, x)
        )
    out = value.arithmetic.cast(value, dtype, lambda w: bind(eqn, w))
    return UNHANDLED if out is None else out


@rule("neg", keeps="all", takes=(LowRank, Deferred), integers=True, rounding=Rounding.EXACT)
def neg(ctx: Context, eqn: core.JaxprEqn, value: LowRank | Deferred) -> Result:
    if isinstance(value, Deferred):
        return value.negate()
    return value.arithmetic.negate(value)


@rule("optimization_barrier", keeps="all", integers=True, rounding=Rounding.MOVES)
def optimization_barrier(ctx: Context, eqn: core.JaxprEqn, *values: Value) -> Result:
    return list(lax.optimization_barrier(tuple(values)))


@rule("pvary", "pcast", keeps="all", integers=True, rounding=Rounding.MOVES)
def pcast(ctx: Context, eqn: core.JaxprEqn, value: LowRank) -> Result:
    # The factors are a member's own and mostly vary over the mesh already.
    def cast(x: Array) -> Array:
        axes = eqn.params.get("axes", eqn.params.get("axis_name", ()))
        axes = (axes,) if isinstance(axes, str) else tuple(axes)
        missing = tuple(a for a in axes if a not in compat.varying_axes(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, value)


@rule("sharding_constraint", "reshard", keeps="all", integers=True, rounding=Rounding.MOVES)
def sharding_constraint(ctx: Context, eqn: core.JaxprEqn, value: LowRank) -> Result:
    # The factors are thin: their layout is left to the compiler.
    return value.replace(w=bind(eqn, value.w))


# ---------------------------------------------------------------- axes and shapes


@rule("broadcast_in_dim", keeps="all", integers=True, rounding=Rounding.MOVES)
def broadcast_in_dim(ctx: Context, eqn: core.JaxprEqn, value: LowRank, *dynamic: Any) -> Result:
    shape, where = eqn.params["shape"], eqn.params["broadcast_dimensions"]

    def on_factor(f: Array) -> Array:
        target = [1] * len(shape)
        for axis, out in enumerate(where):
            target[out] = f.shape[axis]
        return lax.broadcast_in_dim(f, target, where)

    return on_each(value, lambda x: bind(eqn, x, *dynamic), on_factor)


@rule("squeeze", keeps="all", integers=True, rounding=Rounding.MOVES)
def squeeze(ctx: Context, eqn: core.JaxprEqn, value: LowRank) -> Result:
    op = lambda x: lax.squeeze(x, eqn.params["dimensions"])
    return on_each(value, op, op)


@rule(
    "reshape",
    keeps="where each new axis is made of rows, of columns or of batch axes only; otherwise sums",
    takes=(LowRank, Deferred),
    integers=True,
    rounding=Rounding.MOVES,
)
def reshape(ctx: Context, eqn: core.JaxprEqn, value: LowRank | Deferred, *dynamic: Any) -> Result:
    if eqn.params.get("dimensions") is not None:
        return UNHANDLED
    new = tuple(eqn.params["new_sizes"])
    if isinstance(value, LowRank):
        out = reshape_factors(ctx, eqn, value, *dynamic)
        if out is UNHANDLED and value.arithmetic.linear and not value.activation:
            return Deferred(((value,),), new)
        return out
    operation = lambda x: bind(eqn, x, *dynamic)
    whole = on_deferred(value, lambda v: reshape_factors(ctx, eqn, v, *dynamic), operation)
    if isinstance(whole, Unhandled):
        return dataclasses.replace(value, shape=new)
    return as_term(whole) or dataclasses.replace(whole, shape=new)


def reshape_factors(ctx: Context, eqn: core.JaxprEqn, value: LowRank, *dynamic: Any) -> Result:
    """The reshape of every factor; Unhandled where rows and columns come to stand in one axis."""
    new = eqn.params["new_sizes"]
    groups = common_groups(value.shape, new)
    if ctx.recorder is not None:
        value = merge_factors(value, [old for old, _ in groups])
    count = len(value.factors)
    alike = {a for a in range(value.ndim) if not any(value.varies(k, a) for k in range(count))}

    def run_together(sizes: tuple[int, ...]) -> bool:
        """Rows and columns, or layers and rows, come to stand in one axis."""
        part = lambda a: sizes[a] < value.shape[a] and a not in alike
        return any(any(sizes[a] > 1 for a in old) and any(map(part, old)) for old, _ in groups)

    def on_factor(f: Array) -> Array:
        full, target = list(f.shape), [1] * len(new)
        for old, fresh in groups:
            if any(f.shape[a] > 1 for a in old):
                for a in old:
                    full[a] = value.shape[a]
                for a in fresh:
                    target[a] = new[a]
        return jnp.broadcast_to(f, full).reshape(target)

    if any(map(run_together, [*map(dims, value.factors), *(g.shape for g in value.gains)])):
        return UNHANDLED
    return on_each(value, lambda x: bind(eqn, x, *dynamic), on_factor)


def merge_factors(value: LowRank, groups: Sequence[Sequence[int]]) -> LowRank:
    """Multiplies together the factors that share a group of axes (plan inference only).

    Inference gives every axis a factor of its own; axes that are run together become one.
    """
    factors, tags = list(value.factors), list(value.tags)
    for group in groups:
        members = [k for k, f in enumerate(factors) if any(dims(f)[a] > 1 for a in group)]
        if len(members) > 1:
            merged = math.prod(factors[k] for k in members[1:]) * factors[members[0]]
            union = frozenset().union(*(tags[k] for k in members))
            keep = [k for k in range(len(factors)) if k not in members]
            factors = [factors[k] for k in keep] + [merged]
            tags = [tags[k] for k in keep] + [union]
    return value.replace(factors=tuple(factors), tags=tuple(tags))


@rule("tile", keeps="all", integers=True, rounding=Rounding.MOVES)
def tile(ctx: Context, eqn: core.JaxprEqn, value: LowRank) -> Result:
    reps = eqn.params["reps"]

    def on_factor(f: Array) -> Array:
        return jnp.tile(f, [1 if n == 1 else r for n, r in zip(f.shape, reps, strict=True)])

    return on_each(value, lambda x: bind(eqn, x), on_factor)


@rule("rev", keeps="all", integers=True, rounding=Rounding.MOVES)
def rev(ctx: Context, eqn: core.JaxprEqn, value: LowRank) -> Result:
    op = lambda x: lax.rev(x, eqn.params["dimensions"])
    return on_each(value, op, op)
