"""The places where JAX's versions differ, in one file (0.10.2 and 0.11)."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.sharding import AxisType

# XLA's older emitters for CPUs round sums and products differently from program to program. Until JAX
# 0.11 an option says that they are not used, whatever the flags of the process are.
ONE_EMITTER = {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else {}


class ScanParts(NamedTuple):
    """A scan equation taken apart: constants, carry and scanned inputs of its body."""

    jaxpr: core.Jaxpr
    jaxpr_consts: list[Any]
    consts: list[Any]
    carry: list[Any]
    xs: list[Any]
    length: int
    reverse: bool
    unroll: Any


def bind(eqn: Any, values: Sequence[Any], changes: Mapping[str, Any]) -> Any:
    """Binds an equation's primitive, some of its parameters changed."""
    params = eqn.primitive.get_bind_params(eqn.params)
    if isinstance(params, tuple):  # (functions, parameters) in some versions
        subfuns, params = params
        return eqn.primitive.bind(*subfuns, *values, **{**params, **changes})
    return eqn.primitive.bind(*values, **{**params, **changes})


def scan_parts(eqn: Any, values: list[Any]) -> ScanParts:
    p = eqn.params
    if "ft_in" in p:  # 0.11: the inputs as a tree of (constants, carry, scanned)
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
    """The body of a call-like equation (jit, remat, custom rules) and its constants."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"):
        body = eqn.params.get(name)
        if body is not None:
            return (body.jaxpr, body.consts) if isinstance(body, core.ClosedJaxpr) else (body, [])
    raise ValueError(f"the equation {eqn.primitive.name!r} calls no jaxpr that this version knows")


def inside_mesh(x: Any) -> Any:
    """What stands for an array in a trace inside a shard_map that it comes into from outside.

    The type of such an array still names the mesh as it is outside, and look-ups by an array of indices
    refuse that. Its shape and type are all that a trace needs.
    """
    here = jax.sharding.get_abstract_mesh()
    if AxisType.Manual not in here.axis_types or not hasattr(x, "dtype"):
        return x
    there = getattr(getattr(jax.typeof(x), "sharding", None), "mesh", here)
    if there.empty or there == here or set(there.axis_types) != {AxisType.Auto}:
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes that a value is known to vary over inside a shard_map."""
    aval = jax.typeof(x)
    kind = getattr(aval, "mat", None)  # 0.10; the set stands on the type itself in others
    return kind.varying if kind is not None else getattr(aval, "vma", frozenset())
