"""A check that a program has no float operations."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core


def float_operations(fn: Callable[..., Any], *args: Any) -> list[str]:
    """The operations with a float input or output that the outputs of ``fn(*args)`` depend on.

    The function walks the traced program, with the bodies of loops, branches and calls. A call
    counts as a whole if one of its outputs is used, so the list may hold too many operations, but
    never too few.

    Args:
      fn: any traceable function; its outputs are examined.
      *args: arrays, or ``jax.ShapeDtypeStruct``.

    Returns:
      One line an operation, ``"exp: float32[4] -> float32[4]"``. An empty list proves that there is
      none.

    Example:
      >>> float_operations(lambda x: (x * 2) >> 1, jnp.arange(3))
      []
      >>> float_operations(lambda x: (x * 0.5).astype(jnp.int32), jnp.arange(3))[0]
      'convert_element_type: int32[3] -> float32[3]'
    """
    closed = jax.make_jaxpr(fn)(*args)
    return [_line(eqn) for eqn in _used(closed.jaxpr) if _has_float(eqn)]


def _used(jaxpr: core.Jaxpr) -> Iterator[Any]:
    """The equations that the outputs depend on, and all equations in their bodies."""
    wanted = {id(v) for v in jaxpr.outvars}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(id(v) in wanted for v in eqn.outvars):
            wanted.update(id(v) for v in eqn.invars)
            kept.append(eqn)
    for eqn in reversed(kept):
        yield eqn
        for inner in _bodies(list(eqn.params.values())):
            yield from _used(inner)


def _bodies(value: Any) -> Iterator[core.Jaxpr]:
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _bodies(part)


def _has_float(eqn: Any) -> bool:
    return any(_is_float(v) for v in (*eqn.invars, *eqn.outvars))


def _is_float(v: Any) -> bool:
    dtype = getattr(v.aval, "dtype", None)
    return dtype is not None and (
        jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.complexfloating)
    )


def _line(eqn: Any) -> str:
    shown = lambda vs: ", ".join(v.aval.str_short() for v in vs)
    return f"{eqn.primitive.name}: {shown(eqn.invars)} -> {shown(eqn.outvars)}"
