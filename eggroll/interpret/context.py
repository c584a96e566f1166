"""What one interpretation collects, and how it reports the matrices that it has to build."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, Literal

from jax.extend import core

from eggroll.values.lowrank import (
    LowRank,
    Upcast,
    Value,
    arithmetic_of,
    build,
    materialize,
    narrow,
)

OnDense = Literal["error", "warn", "ignore"]
# An equation, or what stands in its place in messages.
Where = core.JaxprEqn | str


class DenseBuildWarning(UserWarning):
    """A perturbed matrix had to be built for every member, which is slow and takes memory."""


class DenseBuildError(ValueError):
    """A perturbed matrix would have to be built for every member under ``on_dense="error"``."""


@dataclasses.dataclass
class Context:
    """What one interpretation collects while it traces.

    Attributes:
      on_dense: what to do where a perturbed matrix must be built.
      built: for each parameter path the primitives that it was built for.
      recorder: called with (use, path, axis of the parameter) where plan inference listens.
    """

    on_dense: OnDense = "warn"
    built: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    recorder: Callable[[str, str, int], None] | None = None
    # Built arrays by the identity of their value, so that several uses share one. The value is
    # kept beside it because an identity is only good while its object lives.
    _memo: dict[int, tuple[LowRank, Value]] = dataclasses.field(default_factory=dict)

    def inner(self, *, quiet: bool = False) -> "Context":
        """The context of an inner trace, such as a loop's body: what it builds stays in there."""
        inner = dataclasses.replace(self, _memo=dict(self._memo))
        if quiet:
            inner = dataclasses.replace(inner, on_dense="ignore", built={})
        return inner

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

    def upcast(self, value: Value, where: Where) -> Value:
        """As :meth:`dense`, but a narrow type stays :class:`~eggroll.values.Upcast`."""
        if not isinstance(value, LowRank):
            return materialize(value)
        if id(value) not in self._memo:
            self._report(value, where)
            array = build(value)
            held = array.dtype != value.dtype
            self._memo[id(value)] = (value, Upcast(array, value.dtype) if held else array)
        return self._memo[id(value)][1]

    def _report(self, value: LowRank, where: Where) -> None:
        thin = value.w.size <= max(factor[0].size for factor in value.factors)
        if value.activation or thin:
            return
        name = name_of(where)
        for path in value.paths:
            seen = self.built.setdefault(path, [])
            if name in seen:
                continue
            seen.append(name)
            message = (
                f"parameter {path!r} is perturbed at low rank, but {name!r} has no rule for that "
                f"and builds its {list(value.shape)} matrix for every member; give it a treatment "
                "of its own (eggroll.Dense or eggroll.Frozen in the plan's overrides, or "
                "eggroll.plan.infer)"
            )
            if self.on_dense == "error":
                raise DenseBuildError(message)
            if self.on_dense == "warn":
                warnings.warn(DenseBuildWarning(message), stacklevel=2)


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
