"""Differences between JAX versions (0.10.2 and 0.11), in one file."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, api_util, lax
from jax.extend import core, linear_util
from jax.interpreters import batching, partial_eval
from jax.sharding import AxisType

# XLA's older CPU emitters round sums and products differently from program to program. Before JAX
# 0.11, this compiler option disables them, regardless of the flags of the process.
ONE_EMITTER = {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else {}


class ScanParts(NamedTuple):
    """The parts of a scan equation.

    Attributes:
      jaxpr: the body.
      jaxpr_consts: constants of the body.
      consts: inputs that every iteration receives.
      carry: initial values of the carry.
      xs: inputs that are scanned over their leading axis.
      length: number of iterations.
      reverse: whether the scan runs from the last index to the first.
      unroll: number of iterations that are unrolled.
    """

    jaxpr: core.Jaxpr
    jaxpr_consts: list[Any]
    consts: list[Any]
    carry: list[Any]
    xs: list[Any]
    length: int
    reverse: bool
    unroll: Any


def bind(eqn: Any, values: Sequence[Any], changes: Mapping[str, Any]) -> Any:
    """Binds the primitive of an equation, with some of its parameters changed."""
    params = eqn.primitive.get_bind_params(eqn.params)
    if isinstance(params, tuple):  # (functions, parameters) in some versions of JAX
        subfuns, params = params
        return eqn.primitive.bind(*subfuns, *values, **{**params, **changes})
    return eqn.primitive.bind(*values, **{**params, **changes})


def solve_parts(eqn: Any, values: list[Any]) -> tuple[core.Jaxpr, list[Any], list[Any]]:
    """The solver's body in a ``lax.custom_linear_solve`` equation, its constants and its operands."""
    lengths, bodies = eqn.params["const_lengths"], eqn.params["jaxprs"]
    start = lengths.matvec + lengths.vecmat
    operands = values[start + lengths.solve + lengths.transpose_solve :]
    given = [*values[start : start + lengths.solve], *operands]
    return bodies.solve.jaxpr, bodies.solve.consts, given


def scan_parts(eqn: Any, values: list[Any]) -> ScanParts:
    """Splits a scan equation and its input values into parts."""
    p = eqn.params
    if "ft_in" in p:  # JAX 0.11: a tree of (constants, carry, scanned)
        consts, carry, _ = p["ft_in"].unpack()
        n, m = len(list(consts.vals)), len(list(carry.vals))
    else:
        n, m = p["num_consts"], p["num_carry"]
    return ScanParts(
        p["jaxpr"].jaxpr,
        p["jaxpr"].consts,
        values[:n],
        values[n : n + m],
        values[n + m :],
        p["length"],
        p["reverse"],
        p["unroll"],
    )


def called_jaxpr(eqn: Any) -> tuple[core.Jaxpr, list[Any]]:
    """The body of a call-like equation (jit, remat, custom rules) and its constants.

    Raises:
      ValueError: the equation has no body under a known name.
    """
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr", "fwd_jaxpr", "call", "callee"):
        body = eqn.params.get(name)
        if body is not None:
            return (body.jaxpr, body.consts) if isinstance(body, core.ClosedJaxpr) else (body, [])
    raise ValueError(
        f"equation {eqn.primitive.name!r}: expected a jaxpr in its parameters, got "
        f"{list(eqn.params)}"
    )


def inside_mesh(x: Any) -> Any:
    """A stand-in for an array that enters a trace inside a shard_map from outside of it.

    The type of such an array names the mesh outside of the shard_map, and look-ups by an array of
    indices refuse that type. The trace only needs the shape and the dtype.
    """
    here = jax.sharding.get_abstract_mesh()
    if AxisType.Manual not in here.axis_types or not hasattr(x, "dtype"):
        return x
    there = getattr(getattr(jax.typeof(x), "sharding", None), "mesh", here)
    if there.empty or there == here or set(there.axis_types) != {AxisType.Auto}:
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes over which a value varies inside a shard_map."""
    aval = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    # JAX 0.10 has the set behind another name on types and on shapes; other versions have it on both.
    kind = getattr(aval, "mat", getattr(aval, "manual_axis_type", None))
    return kind.varying if kind is not None else getattr(aval, "vma", None) or frozenset()


def zeros_like(aval: Any) -> jax.Array:
    """Zeros of a shape and type, which vary over the same mesh axes inside a shard_map."""
    zeros = jnp.zeros(aval.shape, aval.dtype)
    axes = varying_axes(aval)
    return lax.pcast(zeros, tuple(sorted(axes)), to="varying") if axes else zeros


def is_batched(x: Any) -> bool:
    """Whether a value differs between the elements of a vmap that is being traced."""
    return type(x).__name__ == "BatchTracer"


def has_batching_rule(primitive: core.Primitive) -> bool:
    """Whether JAX has a batching rule for a primitive."""
    rules = batching.fancy_primitive_batchers
    table = getattr(batching, "primitive_batchers", {})
    return primitive in rules or (isinstance(table, Mapping) and primitive in table)


class Halves(NamedTuple):
    """A function that was run as far as one argument allows that is not known yet.

    Attributes:
      known: the leaves of its result that do not depend on the argument; None in the place of others.
      kept: the arrays that the rest needs.
      rest: ``rest(leaves of the argument)`` gives all leaves of the result.
    """

    known: list[Array | None]
    kept: list[Array]
    rest: Callable[[Sequence[Array]], list[Array]]


# Whether this version of JAX has the trace of :func:`halves`.
HALVES = hasattr(partial_eval, "trace_to_jaxpr_nounits")


def halves(fn: Callable[..., list[Array]], later: Sequence[Any]) -> Halves:
    """Runs ``fn(*later)`` as far as it does not depend on ``later``, of which the shapes are known.

    This is what JAX does for derivatives, whose tangents are the unknown argument. Needs :data:`HALVES`.
    """
    unknown = [
        partial_eval.PartialVal.unknown(jax.core.ShapedArray(x.shape, x.dtype)) for x in later
    ]
    told = api_util.debug_info("halves", fn, tuple(later), {})
    whole = linear_util.wrap_init(fn, debug_info=told)
    jaxpr, outs, kept = partial_eval.trace_to_jaxpr_nounits(whole, unknown)

    def rest(given: Sequence[Array]) -> list[Array]:
        computed = iter(jax.core.eval_jaxpr(jaxpr, kept, *given))
        return [out.get_known() if out.is_known() else next(computed) for out in outs]

    known = [out.get_known() if out.is_known() else None for out in outs]
    return Halves(known, list(kept), rest)
