"""Rules of products: ``dot_general`` of perturbed values.

A product with ``W + s A B^T`` is the product with ``W``, which all members share, and a thin product
with each member's own factors.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.extend import core

from eggroll.interpret.context import SPLIT, Context
from eggroll.interpret.equations import bind, type_of
from eggroll.interpret.registry import UNHANDLED, Rounding, Unhandled, rule
from eggroll.interpret.structure import Result, on_each
from eggroll.interpret.upcasting import held
from eggroll.values.contraction import Labelled, align, contract, labelled
from eggroll.values.deferred import Deferred, as_term, sum_of_product
from eggroll.values.dtypes import accumulator
from eggroll.values.lowrank import LowRank, Upcast, Value, is_lazy


@rule(
    "dot_general",
    keeps="all but products of two values that do not share one contraction",
    takes=(LowRank, Deferred),
    integers=True,
    rounding=Rounding.SUMS,
)
def dot_general(ctx: Context, eqn: core.JaxprEqn, lhs: Value, rhs: Value) -> Result:
    if isinstance(lhs, Deferred) or isinstance(rhs, Deferred):
        return dot_of_flat(eqn, lhs, rhs)
    if isinstance(lhs, LowRank) and isinstance(rhs, LowRank):
        for product in (product_of_two(ctx, eqn, lhs, rhs), sum_of_two(ctx, eqn, lhs, rhs)):
            if product is not UNHANDLED:
                return product
        # Data gives way before weights, and the smaller before the larger.
        if (not lhs.activation, lhs.w.size) < (not rhs.activation, rhs.w.size):
            lhs = ctx.upcast(lhs, eqn)
        else:
            rhs = ctx.upcast(rhs, eqn)
    left, right, out = dot_labels(eqn, lhs, rhs)
    dtype = type_of(eqn.outvars[0]).dtype
    acc = accumulator(dtype)
    if isinstance(lhs, LowRank):
        value, x, labels, x_labels = lhs, rhs, left, right
    else:
        value, x, labels, x_labels = rhs, lhs, right, left
    if ctx.recorder is not None:
        value = value.replace(gains=(), shared=())
    sides = sides_of_gains(value, labels, x_labels, out)
    if sides is None:
        return Unhandled(SPLIT)
    value, x = in_one_type(ctx, eqn, value, x)
    for gain in sides[0]:
        x = (x.astype(acc) * align(gain, x_labels)).astype(x.dtype)
    record_dot(ctx, value, labels, x_labels, out)
    operands = (value.w, x) if isinstance(lhs, LowRank) else (x, value.w)
    if not value.arithmetic.fits(x, x_labels, value, labels, out):
        return UNHANDLED
    main = bind(eqn, *operands, preferred_element_type=acc)
    precision = eqn.params["precision"]
    y = main + value.arithmetic.perturbation(x, x_labels, value, labels, out, acc, precision)
    for gain in sides[1]:
        y = y * align(gain, out)
    return y.astype(dtype)


def sides_of_gains(
    value: LowRank, labels: Sequence[str], x_labels: Sequence[str], out: Sequence[str]
) -> tuple[list[Labelled], list[Labelled]] | None:
    """The gains that go to the other operand and those that go to the output, if all do."""
    before, after = [], []
    for gain in (labelled(gain, labels) for gain in value.gains):
        if set(gain[1]) <= set(out):
            after.append(gain)
        elif set(gain[1]) <= set(x_labels):
            before.append(gain)
        else:
            return None
    return before, after


def in_one_type(
    ctx: Context, eqn: core.JaxprEqn, value: LowRank, x: Value
) -> tuple[LowRank, Array]:
    """Where ``x`` is a narrow parameter held in float32, the other operand is taken there too."""
    x = ctx.upcast(x, eqn)
    if isinstance(x, Upcast):
        return value.replace(w=value.w.astype(x.value.dtype)), x.value
    return value, jnp.asarray(x)


def dot_labels(
    eqn: core.JaxprEqn, lhs: Value, rhs: Value
) -> tuple[list[str], list[str], list[str]]:
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    left = [f"l{a}" for a in range(len(lhs.shape))]
    right = [f"r{a}" for a in range(len(rhs.shape))]
    for a, b in (*zip(lc, rc, strict=True), *zip(lb, rb, strict=True)):
        right[b] = left[a]
    batch = [left[a] for a in lb]
    free_left = [left[a] for a in range(len(left)) if a not in (*lc, *lb)]
    free_right = [right[b] for b in range(len(right)) if b not in (*rc, *rb)]
    return left, right, [*batch, *free_left, *free_right]


def record_dot(
    ctx: Context, value: LowRank, labels: Sequence[str], other: Sequence[str], out: Sequence[str]
) -> None:
    for axis, label in enumerate(labels):
        role = "contracted" if label not in out else "batched" if label in other else "free"
        ctx.record(role, value, axis)


def product_of_two(ctx: Context, eqn: core.JaxprEqn, lhs: LowRank, rhs: LowRank) -> Result:
    """``(W + p q^T)(V + u v^T)`` is ``W V + p (q^T (V + u v^T)) + (W u) v^T``: not built either.

    Taken where of both one factor holds all that is contracted and the other all that is free.
    """
    left, right, out = dot_labels(eqn, lhs, rhs)
    contracted = [label for label in left if label not in out]
    special = lambda v: v.activation or v.gains or not v.arithmetic.linear
    if set(left) & set(right) & set(out) or special(lhs) or special(rhs):
        return UNHANDLED
    of_left = inner_and_outer(lhs, left, contracted)
    of_right = inner_and_outer(rhs, right, contracted)
    if of_left is None or of_right is None:
        return UNHANDLED
    (q, p), (u, v) = of_left, of_right
    record_dot(ctx, lhs, left, right, out)
    record_dot(ctx, rhs, right, left, out)
    dtype, precision = type_of(eqn.outvars[0]).dtype, eqn.params["precision"]
    acc = accumulator(dtype)
    order = ("thin", *out)

    def thin(factor: Array, labels: Sequence[str], scale: Array) -> Labelled:
        f, kept = labelled(factor, ("thin", *labels))
        return f.astype(acc) * scale.astype(acc), kept

    def through(t: Labelled, w: Array, labels: Sequence[str]) -> Array:
        return align(contract(t, (w, tuple(labels)), set(order), order, acc, precision), order)

    one = jnp.ones((), acc)
    t = thin(q, left, one)
    across = through(t, rhs.w, right) + rhs.arithmetic.perturbation(
        *t, rhs, right, order, acc, precision
    )
    pairs = (
        (align(thin(p, left, lhs.scale), order), through(thin(u, right, rhs.scale), lhs.w, left)),
        (across, align(thin(v, right, one), order)),
    )
    return LowRank(
        bind(eqn, lhs.w, rhs.w),
        tuple(jnp.concatenate(factors).astype(dtype) for factors in pairs),
        jnp.ones_like(lhs.scale),
        tuple(dict.fromkeys((*lhs.paths, *rhs.paths))),
        tags=(frozenset(), frozenset()) if lhs.tags else (),
    )


def sum_of_two(ctx: Context, eqn: core.JaxprEqn, lhs: LowRank, rhs: LowRank) -> Result:
    """A product of two without free axes, such as ``vdot``: the sum of their entries' products."""
    left, right, out = dot_labels(eqn, lhs, rhs)
    if set(left) != set(right) or lhs.activation or rhs.activation or not lhs.arithmetic.linear:
        return UNHANDLED
    record_dot(ctx, lhs, left, right, out)
    record_dot(ctx, rhs, right, left, out)
    # Axes in the order of the output, then what is contracted.
    order = [*out, *(label for label in left if label not in out)]
    turned = [
        turn(v, [labels.index(label) for label in order])
        for v, labels in ((lhs, left), (rhs, right))
    ]
    same = turned[0] if lhs is rhs and left == right else turned[1]
    total = sum_of_product((turned[0], same), range(len(out), len(order)), eqn.params["precision"])
    return held(total, type_of(eqn.outvars[0]).dtype)


def turn(value: LowRank, axes: Sequence[int]) -> LowRank:
    """The value with its axes in another order."""
    op = lambda x: jnp.transpose(x, axes)
    return on_each(value, op, op)


def dot_of_flat(eqn: core.JaxprEqn, lhs: Value, rhs: Value) -> Result:
    """A product of flattened values without free axes, such as ``vdot``."""
    (left, right), batches = eqn.params["dimension_numbers"]
    in_order = left == right and batches[0] == batches[1] and list(batches[0]) == sorted(batches[0])
    if not in_order or len(left) + len(batches[0]) != len(lhs.shape):
        return UNHANDLED
    a, b = (as_term(v) if isinstance(v, Deferred) else None for v in (lhs, rhs))
    dtype, precision = type_of(eqn.outvars[0]).dtype, eqn.params["precision"]
    if a is not None and b is not None and a.shape == b.shape:
        total = Deferred(((a, b),), lhs.shape).sum(left, precision)
        return UNHANDLED if total is None else held(total, dtype)
    value, x = (a, rhs) if a is not None else (b, lhs)
    if value is None or value.gains or batches[0] or is_lazy(x):
        return UNHANDLED
    acc = accumulator(dtype)
    x = jnp.reshape(x, value.shape)
    labels = [f"l{a}" for a in range(value.ndim)]
    main = jnp.sum(value.w.astype(acc) * x.astype(acc))
    noise = value.arithmetic.perturbation(x, labels, value, labels, (), acc, precision)
    return (main + noise).astype(dtype)


def inner_and_outer(
    value: LowRank, labels: Sequence[str], contracted: Sequence[str]
) -> tuple[Array, Array] | None:
    """The factor that varies along all contracted axes, and the one that does along none."""
    wide = {label for label, n in zip(labels, value.shape, strict=True) if n > 1}
    along = [set(labelled(f[0], labels)[1]) for f in value.factors]
    for k, other in ((0, 1), (1, 0)):
        if len(along) == 2 and along[k] == wide & {*contracted} and not along[other] & along[k]:
            return value.factors[k], value.factors[other]
    return None
