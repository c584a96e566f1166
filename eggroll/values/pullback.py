"""Sums over members of what products with a shared parameter received, formed in one product.

Member i computes ``y_i = op(W, x_i)``, linear in the parameter W that all members share, and has a
cotangent c_i of y_i. :func:`summed` gives ``sum_i (d op / d W)^T c_i``: for a matrix
``sum_i x_i^T c_i``, one product over all members, never one matrix a member. It is written for one
member; under ``jax.vmap`` it returns the sum over the mapped axis and not one result for each index.

Integers are summed exactly, in int32, by the transposes of this file. Operations that have none here
are taken to JAX's ``vjp``, for floats.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.extend import core
from jax.typing import DTypeLike

from eggroll import _compat as compat
from eggroll._isolation import isolated
from eggroll.values.dtypes import accumulator, is_integer
from eggroll.values.node import Operation


def sum_type(dtype: DTypeLike) -> DTypeLike:
    """The type of sums for a parameter of ``dtype``: int32, or float32 at least."""
    return jnp.int32 if is_integer(dtype) else accumulator(dtype)


def summed(
    op: Operation,
    roots: tuple[Array, ...],
    captured: Any,
    cotangent: Array,
    sign: Array,
    pair: Array,
) -> tuple[Array, ...]:
    """The cotangents of the roots, summed over all members of the vmaps around.

    Args:
      op: ``op(roots, captured)``, the value that the cotangent belongs to.
      roots: arrays that all members share.
      captured: a tree of a member's own arrays.
      cotangent: of the value; the two members of a pair have the same.
      sign: the sign of the member in its pair. The vmap that maps it is that over a pair: there the
        mean over its two members is taken and not the sum.
      pair: a mark of the member's pair: the vmap that maps it is that over pairs, which is summed over.

    Returns:
      One array for each root, of :func:`sum_type`. A vmap that maps neither mark is around whole
      generations, and is not summed over.
    """
    arrays, tree = jax.tree.flatten(captured)
    static = {i: x for i, x in enumerate(arrays) if not isinstance(x, jax.Array | np.ndarray)}
    moving = [jnp.asarray(x) for i, x in enumerate(arrays) if i not in static]

    def flat(roots: tuple[Array, ...], given: Sequence[Array]) -> Array:
        own = iter(given)
        every = [static[i] if i in static else next(own) for i in range(len(arrays))]
        return op(roots, jax.tree.unflatten(tree, every))

    return _over_members(flat)(roots, tuple(moving), cotangent, sign, pair)


def _over_members(op: Callable[..., Array]) -> Callable[..., tuple[Array, ...]]:
    """The sums of one member, whose rule under vmap tells by the marks which vmap it is.

    The first vmap maps ``sign``: over the two members of a pair. The next maps ``pair``: over pairs. All
    others are around whole generations, such as one over seeds, and sum nothing.
    """

    @custom_vmap
    def total(
        roots: Any, captured: Any, cotangent: Array, sign: Array, pair: Array
    ) -> tuple[Array, ...]:
        return transposed(op, roots, captured, cotangent)

    @total.def_vmap
    def rule(size: int, batched: Any, *operands: Any) -> Any:
        # Constants arrive as NumPy arrays.
        roots, captured, cotangent, sign, pair = jax.tree.map(jnp.asarray, operands)
        of_roots, of_captured, of_cotangent, of_sign, of_pair = batched
        if not of_sign and not of_pair:
            along = jax.tree.map(lambda b: 0 if b else None, (of_roots, of_captured, of_cotangent))
            each = jax.vmap(functools.partial(transposed, op), in_axes=along, axis_size=size)
            return each(roots, captured, cotangent), tuple(True for _ in roots)
        if any(of_roots):
            raise ValueError(
                "a parameter with node noise differs between members: it must be shared by all"
            )
        none = tuple(False for _ in roots)
        marks = (sign[0], pair) if of_sign else (sign, pair[0])
        means = zip(captured, of_captured, strict=True)
        if of_sign and not of_cotangent and all(_averages(x) or not b for x, b in means):
            means = zip(captured, of_captured, strict=True)
            captured = tuple(_mean_of_pair(x) if b else x for x, b in means)
            return _over_members(op)(roots, captured, cotangent, *marks), none
        axes = [0 if b else None for b in of_captured]
        mapped = jax.vmap(op, in_axes=(None, axes), axis_size=size)
        if not of_cotangent:
            cotangent = jnp.broadcast_to(cotangent, (size, *cotangent.shape))
        outs = _over_members(lambda r, c: mapped(r, list(c)))(roots, captured, cotangent, *marks)
        return (tuple(map(_half, outs)) if of_sign else outs), none

    return total


def _averages(x: Array) -> bool:
    """Whether a member's operand may be replaced by the mean over its pair: data, not indices."""
    return jnp.issubdtype(x.dtype, jnp.floating) or x.dtype == jnp.int8


def _mean_of_pair(x: Array) -> Array:
    """The mean over the leading axis of size 2; of integers, halves to the even number."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return (x[0] + x[1]) * jnp.asarray(0.5, x.dtype)
    total = x[0].astype(jnp.int32) + x[1].astype(jnp.int32)
    return ((total + ((total >> 1) & 1)) >> 1).astype(x.dtype)


def _half(x: Array) -> Array:
    return x * jnp.asarray(0.5, x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x // 2


@custom_vmap
def for_any_member(holds: Array) -> Array:
    """Whether something holds for any member of the vmaps around; bool ``[]``."""
    return holds


@for_any_member.def_vmap
def _for_any(size: int, batched: list[bool], holds: Array) -> tuple[Array, bool]:
    return for_any_member(jnp.any(holds, 0) if batched[0] else holds), False


# ---------------------------------------------------------------- transposes


def transposed(
    op: Callable[..., Array], roots: tuple[Array, ...], captured: Any, cotangent: Array
) -> tuple[Array, ...]:
    """The cotangents of ``roots`` under ``op(roots, captured)``, of :func:`sum_type`."""
    closed = jax.make_jaxpr(op)(roots, captured)
    args = [*roots, *jax.tree.leaves(captured)]
    at = list(range(len(roots)))
    return tuple(_walk_back(closed.jaxpr, closed.consts, args, at, [cotangent]))


def _walk_back(
    jaxpr: core.Jaxpr,
    consts: Sequence[Any],
    args: Sequence[Any],
    at: Sequence[int],
    cotangents: Sequence[Array | None],
) -> list[Array]:
    """The cotangents of the arguments at ``at``, from those of the outputs; None stands for zeros."""
    roots = [jaxpr.invars[i] for i in at]
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    depends = set(roots)

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    def on_roots(atom: Any) -> bool:
        return not isinstance(atom, core.Literal) and atom in depends

    path = []
    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        with eqn.ctx.manager:
            out = compat.bind(eqn, values, {})
        outs = list(out) if eqn.primitive.multiple_results else [out]
        env.update(zip(eqn.outvars, outs, strict=True))
        if any(map(on_roots, eqn.invars)):
            depends.update(eqn.outvars)
            path.append((eqn, values))
    sums: dict[Any, Array] = {}

    def add(atom: Any, ct: Array) -> None:
        sums[atom] = ct if atom not in sums else _wide(sums[atom]) + _wide(ct)

    for result, ct in zip(jaxpr.outvars, cotangents, strict=True):
        if ct is not None and on_roots(result):
            add(result, ct)
    for eqn, values in reversed(path):
        cts = [sums.get(v) for v in eqn.outvars]
        if all(ct is None for ct in cts):
            continue
        inner = [i for i, atom in enumerate(eqn.invars) if on_roots(atom)]
        with eqn.ctx.manager:
            for i, ct in zip(inner, _transpose(eqn, values, inner, cts), strict=True):
                add(eqn.invars[i], ct)
    return [
        sums[v].astype(sum_type(type_of(v).dtype))
        if v in sums
        else jnp.zeros(type_of(v).shape, sum_type(type_of(v).dtype))
        for v in roots
    ]


def _transpose(
    eqn: core.JaxprEqn, values: list[Any], at: list[int], cts: list[Array | None]
) -> list[Array]:
    """The cotangents of the operands at ``at`` from those of the outputs."""
    if eqn.primitive.name in _CALLS:
        jaxpr, consts = compat.called_jaxpr(eqn)
        return _walk_back(jaxpr, consts, values, at, cts)
    rule = _TRANSPOSES.get(eqn.primitive.name)
    if rule is not None and len(cts) == 1:
        assert cts[0] is not None
        if len(at) == 1 or eqn.primitive.name in _SUMS:
            return [rule(eqn, values, i, cts[0]) for i in at]
    return _by_vjp(eqn, values, at, cts)


def _by_vjp(
    eqn: core.JaxprEqn, values: list[Any], at: list[int], cts: list[Array | None]
) -> list[Array]:
    name = eqn.primitive.name
    if any(is_integer(type_of(eqn.invars[i]).dtype) for i in at):
        raise ValueError(
            f"an int8 parameter with node noise enters {name!r}, whose transpose for integers is not "
            "known: give the parameter eggroll.Dense() or Frozen() in the plan's overrides"
        )

    def of(*operands: Array) -> list[Array]:
        every = list(values)
        for i, x in zip(at, operands, strict=True):
            every[i] = x
        out = compat.bind(eqn, every, {})
        return list(out) if eqn.primitive.multiple_results else [out]

    try:
        outs, pull = jax.vjp(of, *(values[i] for i in at))
    except NotImplementedError as error:
        raise ValueError(
            f"a parameter with node noise enters {name!r}, which has no derivative in JAX: must have weight "
            "noise, by eggroll.Matrix(...) or Dense() in the plan's overrides"
        ) from error
    given = [
        jnp.zeros_like(out) if ct is None else ct.astype(out.dtype)
        for out, ct in zip(outs, cts, strict=True)
    ]
    return [x.astype(sum_type(x.dtype)) for x in pull(given)]


def _shape(eqn: core.JaxprEqn, i: int) -> tuple[int, ...]:
    return type_of(eqn.invars[i]).shape


def _dot(eqn: core.JaxprEqn, values: list[Any], i: int, ct: Array) -> Array:
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    mine, theirs = ((lc, rc), (lb, rb)) if i == 0 else ((rc, lc), (rb, lb))
    (contracted, other_contracted), (batch, other_batch) = mine, theirs
    other = values[1 - i]
    ndim, other_ndim = len(_shape(eqn, i)), np.ndim(other)
    free = [a for a in range(ndim) if a not in (*contracted, *batch)]
    other_free = [a for a in range(other_ndim) if a not in (*other_contracted, *other_batch)]
    n = len(batch)
    # The axes of the output: batch, free of the left, free of the right.
    start = n if (i == 1) else n + len(free)
    ct_other = list(range(start, start + len(other_free)))
    ct_free = [a for a in range(n, ct.ndim) if a not in ct_other]
    kind = sum_type(type_of(eqn.invars[i]).dtype)
    narrow = other.dtype
    # Operands as narrow as the data: sums are formed in `kind` all the same.
    if jnp.issubdtype(narrow, jnp.floating):
        operand = ct.astype(narrow)
    elif ct.dtype == narrow:
        operand = ct  # an int8 product is the fast one
        if not batch and other_free and np.size(other):
            # XLA's CPU compiler is 7 to 20 times as fast where the summed axis is the last of the left
            # operand, and would fold a transposition into the product again.
            other = jnp.asarray(other)
            always = (other.ravel()[0] & 1) != 2
            order = (*other_contracted, *other_free)
            other = isolated(lambda x: jnp.transpose(x, order), always, other)
            other_free = list(range(len(other_contracted), other_ndim))
            other_contracted = list(range(len(other_contracted)))
    else:
        other, operand = other.astype(jnp.int32), ct.astype(jnp.int32)
    out = lax.dot_general(
        other,
        operand,
        ((other_free, ct_other), (list(other_batch), list(range(n)))),
        precision=eqn.params["precision"],
        preferred_element_type=kind,
    )
    # Now: batch, contracted (in the other's order), free.
    order_of_contracted = sorted(range(len(other_contracted)), key=lambda k: other_contracted[k])
    axes = [*batch, *(contracted[k] for k in order_of_contracted), *free]
    assert len(ct_free) == len(free)
    return jnp.transpose(out, np.argsort(axes).tolist())


def type_of(atom: core.Var | core.Literal) -> jax.core.ShapedArray:
    """The shape and type of an operand or an output."""
    aval = atom.aval
    assert isinstance(aval, jax.core.ShapedArray), aval
    return aval


def _wide(ct: Array) -> Array:
    """A cotangent in the type of sums: those of integers start as int8."""
    return ct.astype(sum_type(ct.dtype))


def _gather(eqn: core.JaxprEqn, values: list[Any], i: int, ct: Array) -> Array:
    d = eqn.params["dimension_numbers"]
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=d.offset_dims,
        inserted_window_dims=d.collapsed_slice_dims,
        scatter_dims_to_operand_dims=d.start_index_map,
        operand_batching_dims=d.operand_batching_dims,
        scatter_indices_batching_dims=d.start_indices_batching_dims,
    )
    ct = _wide(ct)
    return lax.scatter_add(
        jnp.zeros(_shape(eqn, 0), ct.dtype),
        values[1],
        ct,
        numbers,
        indices_are_sorted=eqn.params["indices_are_sorted"],
        unique_indices=eqn.params["unique_indices"],
        mode=eqn.params["mode"],
    )


def _dynamic_slice(eqn: core.JaxprEqn, values: list[Any], i: int, ct: Array) -> Array:
    zeros = jnp.zeros(_shape(eqn, 0), ct.dtype)
    return lax.dynamic_update_slice(zeros, ct, values[1:])


def _slice(eqn: core.JaxprEqn, values: list[Any], i: int, ct: Array) -> Array:
    p = eqn.params
    strides = p["strides"] or (1,) * ct.ndim
    config = []
    for n, start, out, step in zip(
        _shape(eqn, 0), p["start_indices"], ct.shape, strides, strict=True
    ):
        end = start + (out - 1) * step + 1 if out else start
        config.append((start, n - end, step - 1))
    return lax.pad(ct, jnp.zeros((), ct.dtype), config)


def _broadcast(eqn: core.JaxprEqn, values: list[Any], i: int, ct: Array) -> Array:
    where, shape = eqn.params["broadcast_dimensions"], _shape(eqn, 0)
    grown = [a for a in range(ct.ndim) if a not in where]
    grown += [a for a, n in zip(where, shape, strict=True) if n == 1 and ct.shape[a] != 1]
    if not grown:
        return ct.reshape(shape)
    wide = _wide(ct)
    return jnp.sum(wide, grown, dtype=wide.dtype).reshape(shape)


def _mul(eqn: core.JaxprEqn, values: list[Any], i: int, ct: Array) -> Array:
    ct = _wide(ct)
    other = jnp.asarray(values[1 - i]).astype(ct.dtype)
    return _unbroadcast(ct * other, _shape(eqn, i))


def _div(eqn: core.JaxprEqn, values: list[Any], i: int, ct: Array) -> Array:
    if i != 0 or is_integer(type_of(eqn.invars[0]).dtype):
        return _by_vjp(eqn, values, [i], [ct])[0]
    return _unbroadcast(ct / jnp.asarray(values[1]).astype(ct.dtype), _shape(eqn, i))


def _shift_left(eqn: core.JaxprEqn, values: list[Any], i: int, ct: Array) -> Array:
    if i != 0:
        return _by_vjp(eqn, values, [i], [ct])[0]
    ct = _wide(ct)
    return _unbroadcast(ct << jnp.asarray(values[1]).astype(ct.dtype), _shape(eqn, 0))


def _unbroadcast(ct: Array, shape: tuple[int, ...]) -> Array:
    if ct.shape == shape:
        return ct
    lead = ct.ndim - len(shape)
    axes = [
        *range(lead),
        *(lead + a for a, n in enumerate(shape) if n == 1 and ct.shape[lead + a] != 1),
    ]
    wide = _wide(ct)
    return jnp.sum(wide, axes, dtype=wide.dtype).reshape(shape)


def _cast(eqn: core.JaxprEqn, values: list[Any], i: int, ct: Array) -> Array:
    kind = type_of(eqn.invars[0]).dtype
    if is_integer(kind) and is_integer(ct.dtype):
        return ct
    return ct.astype(sum_type(kind))


def _concatenate(eqn: core.JaxprEqn, values: list[Any], i: int, ct: Array) -> Array:
    axis = eqn.params["dimension"]
    start = sum(_shape(eqn, k)[axis] for k in range(i))
    return lax.slice_in_dim(ct, start, start + _shape(eqn, i)[axis], axis=axis)


_CALLS = ("jit", "pjit", "closed_call")
_SUMS = ("add", "sub", "add_any", "concatenate")
_TRANSPOSES: dict[str, Callable[[core.JaxprEqn, list[Any], int, Array], Array]] = {
    "dot_general": _dot,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
    "slice": _slice,
    "broadcast_in_dim": _broadcast,
    "mul": _mul,
    "div": _div,
    "convert_element_type": _cast,
    "concatenate": _concatenate,
    "neg": lambda eqn, values, i, ct: -ct,
    "add": lambda eqn, values, i, ct: _unbroadcast(ct, _shape(eqn, i)),
    "add_any": lambda eqn, values, i, ct: ct,
    "sub": lambda eqn, values, i, ct: _unbroadcast(-ct if i else ct, _shape(eqn, i)),
    "copy": lambda eqn, values, i, ct: ct,
    "copy_p": lambda eqn, values, i, ct: ct,
    "reshard": lambda eqn, values, i, ct: ct,
    "sharding_constraint": lambda eqn, values, i, ct: ct,
    "shift_left": _shift_left,
    "reshape": lambda eqn, values, i, ct: ct.reshape(_shape(eqn, 0)),
    "squeeze": lambda eqn, values, i, ct: ct.reshape(_shape(eqn, 0)),
    "expand_dims": lambda eqn, values, i, ct: ct.reshape(_shape(eqn, 0)),
    "rev": lambda eqn, values, i, ct: lax.rev(ct, eqn.params["dimensions"]),
    "transpose": lambda eqn, values, i, ct: jnp.transpose(
        ct, np.argsort(eqn.params["permutation"]).tolist()
    ),
}
