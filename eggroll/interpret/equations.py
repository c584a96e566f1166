"""Helpers around one equation of a jaxpr."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core

from eggroll.interpret import member_loops


def bind(eqn: core.JaxprEqn, *values: Any, **params: Any) -> Any:
    """Applies the equation's primitive to other operands, or with other parameters."""
    return member_loops.bind(eqn, values, params)


def results(eqn: core.JaxprEqn, values: Sequence[Any], **params: Any) -> list[Any]:
    """As :func:`bind`, always a list."""
    out = bind(eqn, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def type_of(atom: core.Var | core.Literal) -> jax.core.ShapedArray:
    """The shape and type of an operand or an output."""
    aval = atom.aval
    assert isinstance(aval, jax.core.ShapedArray), aval
    return aval
