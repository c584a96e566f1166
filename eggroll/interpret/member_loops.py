"""Equations that JAX cannot vmap over the members of a population: these run in a loop over them.

A population is mapped by ``jax.vmap``. Some primitives have no batching rule, and the rules of some
refuse part of their parameters. Control flow around such an equation is entered
(:func:`must_enter`), so that the equation itself is met here.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.custom_batching import custom_vmap
from jax.extend import core
from jax.typing import ArrayLike

from eggroll import _compat as compat

# Primitives whose batching rules refuse some of their parameters or operands.
PARTLY_BATCHED = frozenset(
    {"ffi_call", "io_callback", "pure_callback", "ragged_dot_general", "reduce_window"}
)


class MemberLoopWarning(UserWarning):
    """An operation runs for one member of the population after the other, which is slow."""


def bind(eqn: core.JaxprEqn, values: Sequence[Any], params: Mapping[str, Any]) -> Any:
    """Applies the primitive of an equation so that the result can be mapped by ``jax.vmap``.

    Args:
      eqn: the equation.
      values: operands.
      params: parameters that replace those of the equation.

    Returns:
      What the primitive gives: an array, or a list for a primitive of several results.
    """
    if not maps(eqn):
        return looped(eqn, params)(*values)
    try:
        return compat.bind(eqn, values, params)
    except NotImplementedError:  # a batching rule that refuses these parameters
        return looped(eqn, params)(*values)


def maps(eqn: core.JaxprEqn) -> bool:
    """Whether JAX has a batching rule that holds for all parameters of the primitive."""
    return eqn.primitive.name not in PARTLY_BATCHED and compat.has_batching_rule(eqn.primitive)


def must_enter(eqn: core.JaxprEqn) -> bool:
    """Whether the equation, or one in its bodies, may not be mapped as it is."""
    return not maps(eqn) or any(map(must_enter, inner_equations(eqn)))


def inner_equations(eqn: core.JaxprEqn) -> Iterator[core.JaxprEqn]:
    """The equations of all jaxprs among the parameters of an equation."""
    for value in eqn.params.values():
        for body in value if isinstance(value, list | tuple) else (value,):
            body = body.jaxpr if isinstance(body, core.ClosedJaxpr) else body
            if isinstance(body, core.Jaxpr):
                yield from body.eqns


def looped(eqn: core.JaxprEqn, params: Mapping[str, Any]) -> custom_vmap:
    """The equation as a function of its operands whose vmap is a loop, if JAX has no better one."""
    told: list[bool] = []  # pairs and their members are mapped apart, for one report

    @custom_vmap
    def one(*values: ArrayLike) -> Any:
        return compat.bind(eqn, values, params)

    @one.def_vmap
    def several(size: int, batched: Sequence[bool], *values: ArrayLike) -> tuple[Any, Any]:
        axes = [0 if own else None for own in batched]
        try:
            out = jax.vmap(lambda *values: compat.bind(eqn, values, params), axes)(*values)
        except NotImplementedError:
            if not told:
                told.append(True)
                warnings.warn(MemberLoopWarning(message(eqn)), stacklevel=2)
            out = loop(one, axes, values)
        return out, jax.tree.map(lambda _: True, out)

    return one


def message(eqn: core.JaxprEqn) -> str:
    name = eqn.primitive.name
    callback = "give it a vmap_method" if "vmap_method" in eqn.params else ""
    return (
        f"JAX cannot vmap {name!r}, so it runs for one member of the population after the other; "
        f"{callback or 'replace it by operations that have a batching rule'}"
    )


def loop(fn: custom_vmap, axes: Sequence[int | None], values: Sequence[ArrayLike]) -> Any:
    """``jax.vmap(fn, axes)(*values)`` as a loop; ``axes`` are 0 or None."""

    def of_member(own: Sequence[ArrayLike]) -> Any:
        rest = iter(own)
        return fn(
            *(x if axis is None else next(rest) for x, axis in zip(values, axes, strict=True))
        )

    return lax.map(of_member, [x for x, axis in zip(values, axes, strict=True) if axis == 0])
