"""What one interpretation collects, and how it reports the matrices that it has to build."""

import dataclasses
import enum
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax.extend import core

from eggroll import _compat as compat
from eggroll.interpret.node_pass import Loop, NodePass
from eggroll.interpret.registry import entry
from eggroll.values.deferred import Deferred
from eggroll.values.lowrank import (
    LateBroadcast,
    LowRank,
    Upcast,
    Value,
    arithmetic_of,
    build,
    is_lazy,
    materialize,
    narrow,
)
from eggroll.values.node import Node

OnDense = Literal["error", "warn", "ignore"]
# An equation, or what stands in its place in messages.
Where = core.JaxprEqn | str


class DenseBuildWarning(UserWarning):
    """A perturbed matrix had to be built for every member, which is slow and takes memory."""


class DenseBuildError(ValueError):
    """A perturbed matrix would have to be built for every member under ``on_dense="error"``."""


class Origin(enum.Flag):
    """What an array was computed from.

    SHARED: constants and parameters without noise alone, the same for every member.
    OWN: something that differs between members: perturbed parameters, their keys, their states.
    DATA: arguments of the function that hold no perturbed parameter.
    """

    SHARED = 0
    OWN = enum.auto()
    DATA = enum.auto()


def origin_of(value: Value) -> Origin:
    """The origin of an array as far as the array itself tells."""
    value = value.value if isinstance(value, LateBroadcast) else value
    own = is_lazy(value) or compat.is_batched(value)
    return Origin.OWN if own else Origin.SHARED


@dataclasses.dataclass
class Context:
    """What one interpretation collects while it traces.

    Attributes:
      on_dense: what to do where a perturbed matrix must be built.
      built: for each parameter path the primitives that it was built for.
      recorder: called with (use, path, axis of the parameter) where plan inference listens.
      origins: of the variables of the jaxpr that is being evaluated.
      nodes: the pass of a member under node noise; None if no parameter has node noise.
      site: the equation that is being evaluated, as its place in the program.
    """

    on_dense: OnDense = "warn"
    built: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    recorder: Callable[[str, str, int], None] | None = None
    origins: dict[core.Var, Origin] = dataclasses.field(default_factory=dict)
    nodes: NodePass | None = None
    site: str = ""
    # Built arrays by the identity of their value, so that several uses share one. The value is
    # kept beside it because an identity is only good while its object lives.
    _memo: dict[int, tuple[Value, Value]] = dataclasses.field(default_factory=dict)

    def inner(self, *, quiet: bool = False) -> "Context":
        """The context of an inner trace, such as a loop's body: what it builds stays in there."""
        inner = dataclasses.replace(self, _memo=dict(self._memo))
        if quiet:
            inner = dataclasses.replace(inner, on_dense="ignore", built={})
        return inner

    # ------------------------------------------------------------ node noise

    @property
    def summing(self) -> bool:
        """Whether parameters under node noise get sums in this pass."""
        return self.nodes is not None and self.nodes.sums

    def enter_loop(self, loop: Loop, on: Any = None) -> None:
        """Makes this, the context of a loop's body, one with parameters of its own."""
        if self.nodes is not None:
            self.nodes = self.nodes.inside(loop, on)

    def enter_branch(self, on: Any = None) -> None:
        """Makes this, the context of a branch, one with parameters of its own."""
        if self.nodes is not None:
            self.nodes = self.nodes.inside(None, on)

    def enter_shards(self, axes: frozenset[str]) -> None:
        """Makes this, the context of a shard_map's body, one with parameters of its own."""
        if self.nodes is not None:
            self.nodes = self.nodes.sharded(axes)

    def adopt(self, value: Value, w: Any = None) -> Value:
        """A parameter under node noise as one of this body's own; other values as they are."""
        if not isinstance(value, Node):
            return value
        assert self.nodes is not None
        return self.nodes.region.adopt(value, w)

    def sums(self) -> list[Any]:
        """The sums of this body's parameters; none in the first pass."""
        return self.nodes.region.sums() if self.nodes is not None and self.nodes.sums else []

    def take(self, given: Sequence[Node], totals: Sequence[Any]) -> None:
        """Adds what a body summed for the parameters that it was given."""
        if not self.summing:
            return
        assert self.nodes is not None
        for node, total in zip(given, totals, strict=True):
            self.nodes.region.add_total(node, total)

    # ------------------------------------------------------------ origins and uses of axes

    def origin(self, atom: core.Var | core.Literal) -> Origin:
        """What an operand of the equation at hand was computed from."""
        return Origin.SHARED if isinstance(atom, core.Literal) else self.origins[atom]

    def origins_of(self, eqn: core.JaxprEqn) -> list[Origin]:
        """The origins of an equation's operands."""
        return [self.origin(atom) for atom in eqn.invars]

    def record(self, use: str, value: LowRank, axis: int) -> None:
        """Tells plan inference what is done with an axis of a value."""
        if self.recorder is not None:
            for k, tags in enumerate(value.tags):
                if value.varies(k, axis):
                    for path, original in tags:
                        self.recorder(use, path, original)

    def dense(self, value: Value, where: Where) -> Any:
        """The value as one array of its own type, reported where that is a matrix of parameters.

        Raises:
          DenseBuildError: the matrix would be built under ``on_dense="error"``.
          ValueError: the value is an int8 parameter with float noise.
        """
        check_integers(value, where)
        return narrow(self.upcast(value, where))

    def upcast(self, value: Value, where: Where, advice: str | None = None) -> Value:
        """As :meth:`dense`, but a narrow type stays :class:`~eggroll.values.Upcast`.

        Args:
          value: the value.
          where: the equation that needs it.
          advice: what the user can change, for the report; None for the general advice, and the
            empty string where the build is no cost and is not reported.
        """
        if not isinstance(value, LowRank | Deferred):
            return materialize(value)
        if id(value) not in self._memo:
            if isinstance(value, Deferred):
                array = self._combine(value, where, advice)
            else:
                if advice != "":
                    self._report(value, where, advice)
                array = build(value)
            held = array.dtype != value.dtype
            self._memo[id(value)] = (value, Upcast(array, value.dtype) if held else array)
        return self._memo[id(value)][1]

    def _combine(self, value: Deferred, where: Where, advice: str | None) -> Any:
        """A deferred value, carried out."""

        if value.reshaped and advice is None:
            where, advice = "reshape", SPLIT

        def built(v: LowRank) -> Any:
            array = self.upcast(v, where, advice)
            return array.value if isinstance(array, Upcast) else array

        products = [functools.reduce(jnp.multiply, map(built, term)) for term in value.terms]
        total = functools.reduce(jnp.add, products)
        if value.plain is not None:
            total = total + value.plain.astype(total.dtype)
        return total.reshape(value.shape)

    def _report(self, value: LowRank, where: Where, advice: str | None) -> None:
        if value.activation or value.thin:
            return
        name = name_of(where)
        for path in value.paths:
            seen = self.built.setdefault(path, [])
            if name in seen:
                continue
            seen.append(name)
            message = (
                f"parameter {path!r} is perturbed at low rank, but {name!r} has no rule for that "
                f"and builds its {list(value.shape)} matrix for every member; "
                f"{advice or advice_for(name)}"
            )
            if self.on_dense == "error":
                raise DenseBuildError(message)
            if self.on_dense == "warn":
                warnings.warn(DenseBuildWarning(message), stacklevel=2)


SPLIT = (
    "the operation needs rows and columns of the plan in one axis, or both varying along one: name "
    "other axes as rows and columns by eggroll.Matrix(rows=..., columns=...) in the plan's overrides"
)
FREEZE = "freeze the parameter by eggroll.Frozen() in the plan's overrides"
DENSE = "give it full-rank noise, at the same memory, by eggroll.Dense()"


def advice_for(name: str) -> str:
    """What really helps where a matrix is built by a primitive, if its rule does not say."""
    if name == "output":
        return (
            "return what is computed from the matrix, such as a product or a norm, and not the "
            "matrix itself"
        )
    if entry(name).enters:
        return (
            f"the body of {name!r} must hand the matrix on in the form that it came in: hand it on "
            "unchanged, or close over it"
        )
    return (
        f"no plan makes a low-rank form of {name!r}: apply it to the product with the matrix "
        f"instead, {FREEZE}, or {DENSE}"
    )


def name_of(where: Where) -> str:
    return where if isinstance(where, str) else where.primitive.name


def check_integers(value: Value, where: Where) -> None:
    """Raises ValueError where float noise on an int8 parameter would be treated as integers."""
    arithmetic = arithmetic_of(value)
    if arithmetic is None or arithmetic.as_integers:
        return
    path = f" {value.paths[0]!r}" if isinstance(value, LowRank) and value.paths else ""
    raise ValueError(
        f"the int8 parameter{path} has noise of floats and enters {name_of(where)!r} in int8; cast "
        "it to a float type before that, or freeze it by eggroll.Frozen()"
    )


def union(origins: Sequence[Origin]) -> Origin:
    return functools.reduce(lambda a, b: a | b, origins, Origin.SHARED)
