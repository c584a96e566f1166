"""Rules of element-wise arithmetic: multiples, sums, squares and masks of perturbed values.

What a perturbed value is combined with decides what becomes of it. An array that all members share
goes into the weights. A row or a column of a member's own goes beside them, as a gain or as one more
rank. Where the array is as large as the matrix and a member's own, the result is data and is built.
"""

import math

import jax.numpy as jnp
from jax import Array
from jax.extend import core

from eggroll.interpret.context import SPLIT, Context, Origin
from eggroll.interpret.equations import bind, type_of
from eggroll.interpret.joins import aligned, combined
from eggroll.interpret.registry import UNHANDLED, Rounding, Unhandled, rule
from eggroll.interpret.structure import Result
from eggroll.interpret.upcasting import as_data
from eggroll.values.deferred import Deferred, as_term
from eggroll.values.lowrank import LateBroadcast, LowRank, Upcast, Value, materialize

BOTH = (LowRank, Deferred)


def thin(value: Value, ndim: int) -> Array:
    """An array operand with ``ndim`` axes and without the axes' sizes that a broadcast added."""
    value = value.value if isinstance(value, LateBroadcast) else value
    array = jnp.asarray(value.value if isinstance(value, Upcast) else value)
    return array if array.ndim else array.reshape((1,) * ndim)


def varying(array: Array) -> list[int]:
    """The axes that an array varies along."""
    return [axis for axis, n in enumerate(array.shape) if n > 1]


def repeated_along(value: LowRank, array: Array) -> bool:
    """Whether an array varies where the perturbed value is a repetition of itself, as data do."""
    return any(value.shape[a] > 1 and not value.along(a) for a in varying(array))


# ---------------------------------------------------------------- products


@rule(
    "mul",
    keeps="times an array that members share, or one along the axes of one factor; "
    "sums of products of two values",
    takes=BOTH,
    late_broadcasts=True,
    rounding=Rounding.ELEMENTWISE,
)
def mul(ctx: Context, eqn: core.JaxprEqn, left: Value, right: Value) -> Result:
    left, right = thin_as_array(ctx, eqn, left, right)
    if isinstance(left, BOTH) and isinstance(right, BOTH):
        return product(eqn, left, right)
    if not isinstance(left, BOTH) and not isinstance(right, BOTH):
        return UNHANDLED  # nothing is low rank any more
    at = 0 if isinstance(left, BOTH) else 1
    return multiplied(ctx, eqn, (left, right)[at], (right, left)[at], eqn.invars[1 - at])


@rule(
    "div",
    keeps="over an array that members share, or one along the axes of one factor",
    takes=BOTH,
    late_broadcasts=True,
    rounding=Rounding.ELEMENTWISE,
)
def div(ctx: Context, eqn: core.JaxprEqn, left: Value, right: Value) -> Result:
    left, right = thin_as_array(ctx, eqn, left, right)
    if isinstance(right, BOTH) or not isinstance(left, BOTH):
        return UNHANDLED
    return multiplied(ctx, eqn, left, right, eqn.invars[1])


def thin_as_array(
    ctx: Context, eqn: core.JaxprEqn, left: Value, right: Value
) -> tuple[Value, Value]:
    """The operands, of which a row, a column or a number of a matrix is built beside a larger one."""
    size = math.prod(type_of(eqn.outvars[0]).shape)

    def settled(v: Value) -> Value:
        small = isinstance(v, LowRank) and v.thin and v.w.size < size
        return ctx.upcast(v, eqn) if small else v

    return settled(left), settled(right)


def multiplied(
    ctx: Context, eqn: core.JaxprEqn, value: Value, other: Value, atom: core.Var | core.Literal
) -> Result:
    """A perturbed value times or over an array, of which ``atom`` is the variable."""
    if isinstance(value, Deferred):
        return multiplied_terms(ctx, eqn, value, other, atom)
    op = jnp.multiply if eqn.primitive.name == "mul" else jnp.divide
    value = value.spread(type_of(eqn.outvars[0]).shape)
    if isinstance(atom, core.Literal):
        number = jnp.asarray(other)
        scale = op(value.scale, number.astype(value.scale.dtype))
        return value.replace(w=op(value.w, number), scale=scale)
    small = thin(other, value.ndim)
    gain = small if op is jnp.multiply else 1 / small
    shared = not ctx.origin(atom) & Origin.OWN
    # Plan inference gives every axis a factor of its own, and asks for no values.
    held_by = value.holder(small)
    # A gain as large as the matrix would go to neither side of a product.
    whole = shared and held_by is not None and len(value.factors) > 2 and small.size == value.w.size
    if ctx.recorder is not None or not varying(small) or (held_by is not None and not whole):
        return value.with_gain(gain, shared)
    if not shared:
        return as_data(ctx, eqn, value, other)
    data = value.activation or repeated_along(value, small)
    return value.masked(op(value.w, small), gain).replace(activation=data)


def multiplied_terms(
    ctx: Context, eqn: core.JaxprEqn, value: Deferred, other: Value, atom: core.Var | core.Literal
) -> Result:
    whole = value.spread(type_of(eqn.outvars[0]).shape)
    if whole is None or (whole.reshaped and not isinstance(atom, core.Literal)):
        return UNHANDLED
    value = whole
    if value.plain is not None and isinstance(other, Upcast):
        return UNHANDLED
    op = jnp.multiply if eqn.primitive.name == "mul" else jnp.divide
    terms = []
    for first, *rest in value.terms:
        out = multiplied(ctx, eqn, first, other, atom)
        if not isinstance(out, LowRank):
            return UNHANDLED
        terms.append((out, *rest))
    plain = None if value.plain is None else op(value.plain, materialize(other))
    return Deferred(tuple(terms), value.shape, plain)


def product(eqn: core.JaxprEqn, left: Value, right: Value) -> Result:
    """The element-wise product of two perturbed values, each of them one and not yet a product."""
    a, b = (as_term(v) if isinstance(v, Deferred) else v for v in (left, right))
    if a is None or b is None or a.activation or b.activation:
        return UNHANDLED  # data are as large as their products
    shape = type_of(eqn.outvars[0]).shape
    reshaped = [isinstance(v, Deferred) for v in (left, right)]
    if not any(reshaped):
        a, b = a.spread(shape), b.spread(shape)
    elif not all(reshaped) or a.shape != b.shape or not left.shape == right.shape == shape:
        return UNHANDLED
    return Deferred(((a, a if left is right else b),), shape)


@rule(
    "square",
    "integer_pow",
    "pow",
    keeps="sums of squares",
    takes=BOTH,
    rounding=Rounding.ELEMENTWISE,
)
def square(ctx: Context, eqn: core.JaxprEqn, value: Value, *exponent: Value) -> Result:
    number = exponent[0] if exponent else eqn.params.get("y", 2)
    constant = not exponent or isinstance(eqn.invars[1], core.Literal)
    if not isinstance(value, BOTH) or not constant or number != 2:
        return UNHANDLED
    return product(eqn, value, value)


# ---------------------------------------------------------------- sums


@rule(
    "add",
    "sub",
    "add_any",
    keeps="sums of perturbed values; plus an array that members share, or one along the axes of "
    "one factor",
    takes=BOTH,
    late_broadcasts=True,
    rounding=Rounding.ELEMENTWISE,
)
def add(ctx: Context, eqn: core.JaxprEqn, left: Value, right: Value) -> Result:
    shape = type_of(eqn.outvars[0]).shape
    if isinstance(left, Deferred) or isinstance(right, Deferred):
        return add_deferred(eqn, left, right)
    if any(isinstance(v, LowRank) and v.activation for v in (left, right)):
        return as_data(ctx, eqn, left, right)
    lazy = [isinstance(v, LowRank) for v in (left, right)]
    absorbed = [v.absorb_gains() for v in (left, right) if isinstance(v, LowRank)]
    parts = [v.spread(shape) for v in absorbed if v is not None]
    if not all(lazy):
        at = lazy.index(True)
        other = (right, left)[at]
        small, origin = thin(other, len(shape)), ctx.origin(eqn.invars[1 - at])
        own = bool(origin & Origin.OWN)
        if own and (left, right)[at].spread(shape).holder(small) is None and varying(small):
            return as_data(ctx, eqn, left, right)
        if not parts:
            return UNHANDLED
        if not own:
            return add_shared(eqn, parts[0], at, other, small, origin)
        parts.insert(1 - at, as_rank(parts[0], small))
    if len(parts) < 2:
        return UNHANDLED
    w = bind(eqn, *(v.w for v in parts)) if all(lazy) else parts[lazy.index(True)].w
    if eqn.primitive.name == "sub":
        parts[1] = parts[1].arithmetic.negate(parts[1])
        w = w if lazy[0] else -w
    same_form = aligned(parts)
    return Unhandled(SPLIT) if same_form is None else combined(same_form, w, 0)


def add_shared(
    eqn: core.JaxprEqn, value: LowRank, at: int, other: Value, small: Array, origin: Origin
) -> LowRank:
    """Plus an array that all members share: the weights alone change."""
    operands = [value.w, materialize(other)]
    w = bind(eqn, *(operands if at == 0 else operands[::-1]))
    if eqn.primitive.name == "sub" and at == 1:
        value = value.arithmetic.negate(value)
    # A table that is added to data as large as itself is data from here on.
    whole = bool(origin & Origin.DATA) and value.holder(small) is None
    data = value.activation or whole or repeated_along(value, small)
    return value.replace(w=w, activation=data)


def as_rank(value: LowRank, small: Array) -> LowRank:
    """A row or a column of a member's own as noise of one rank beside a value without its own."""
    k = value.holder(small) or 0
    dtype = jnp.result_type(small.dtype, *(f.dtype for f in value.factors))
    one = jnp.ones((1,) * (value.ndim + 1), dtype)
    factors = tuple(small[None].astype(dtype) if i == k else one for i in range(len(value.factors)))
    tags: tuple[frozenset[tuple[str, int]], ...] = (frozenset(),) * len(value.tags)
    return value.replace(
        factors=factors, scale=jnp.ones_like(value.scale), gains=(), shared=(), tags=tags, paths=()
    )


def add_deferred(eqn: core.JaxprEqn, left: Value, right: Value) -> Result:
    """A sum with a value that is thin once it is summed: another term of it."""
    shape = type_of(eqn.outvars[0]).shape
    a, b = deferred(left, shape), deferred(right, shape)
    if a is None or b is None:
        return UNHANDLED
    if eqn.primitive.name == "sub":
        b = b.negate() if isinstance(b, Deferred) else -b
    out = plus(a, b)
    return UNHANDLED if out is None else out


def deferred(value: Value, shape: tuple[int, ...]) -> Deferred | Array | None:
    """A value as a term of a sum of a shape, or as the array that it is; None if it is reshaped."""
    if isinstance(value, LowRank):
        return Deferred(((value.spread(shape),),), shape)
    if isinstance(value, Deferred):
        return value.spread(shape)
    array = materialize(value)
    return jnp.asarray(array.value if isinstance(array, Upcast) else array)


def plus(left: Deferred | Array, right: Deferred | Array) -> Deferred | None:
    """The sum of two, at least one of them deferred; None where they are not of one form."""
    if not isinstance(left, Deferred):
        left, right = right, left
    assert isinstance(left, Deferred)
    if not isinstance(right, Deferred):
        if left.reshaped:
            return None
        plain = right if left.plain is None else left.plain + right
        return Deferred(left.terms, left.shape, plain)
    if (left.base, left.dtype) != (right.base, right.dtype):
        return None
    plains = [v.plain for v in (left, right) if v.plain is not None]
    plain = sum(plains[1:], plains[0]) if plains else None
    return Deferred((*left.terms, *right.terms), left.shape, plain)
