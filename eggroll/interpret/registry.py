"""The one table of what the interpreter knows about each of JAX's primitives.

A primitive enters the table where its rule is defined, through :func:`rule`, or through
:func:`without_rule` where a low-rank operand has to be built. Nothing else in this package lists
primitives by name, and ``docs/rules.md`` is printed from here.
"""

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from eggroll.values.arithmetic import ValueArithmetic
from eggroll.values.deferred import Deferred
from eggroll.values.lowrank import LowRank, Upcast


@dataclasses.dataclass(frozen=True)
class Unhandled:
    """What a rule returns where the perturbed array has to be built.

    Attributes:
      advice: what the user can change so that nothing is built; empty for the general advice.
    """

    advice: str = ""


UNHANDLED = Unhandled()

# A rule. Its contract:
#
#     rule(context, equation, *values) -> value | list of values | Unhandled
#
# It is called where at least one operand has a type that it takes. The others are arrays, Python
# numbers, other lazy values, and LateBroadcast where the rule takes those. It returns one value for
# an equation of one output and a list for several, each with the shape and type of its output
# variable, or Unhandled before it has recorded anything.
RuleFn = Callable[..., Any]
Fn = TypeVar("Fn", bound=RuleFn)


class Rounding(enum.Enum):
    """What an equation does to numbers that are held in float32 in place of a narrower type.

    MOVES: moves numbers of one array. The result is held in float32 too, and int8 parameters with
      float noise may enter.
    EXACT: gives the operands' numbers, unrounded, of several arrays or with a sign. The result is
      held in float32 too.
    ELEMENTWISE: computed in float32; the result is held in float32 if all operands depend on
      parameters alone, and rounded once otherwise.
    SUMS: computed in float32 and rounded once.
    """

    MOVES = "moves"
    EXACT = "exact"
    ELEMENTWISE = "elementwise"
    SUMS = "sums"


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the interpreter knows about one primitive.

    Attributes:
      primitive: its name.
      rule: what it does to the values that it takes; None where they are built.
      keeps: what stays low rank, in one phrase.
      takes: the types of operands that the rule is called for.
      integers: whether the rule holds for arithmetics that are not linear, such as fixed point.
      late_broadcasts: whether the rule takes broadcasts that have not been carried out.
      rounding: what the equation does to Upcast operands; None where they are rounded first.
    """

    primitive: str
    rule: RuleFn | None
    keeps: str
    takes: tuple[type, ...]
    integers: bool
    late_broadcasts: bool
    rounding: Rounding | None

    @property
    def enters(self) -> bool:
        """Whether the primitive is control flow, which is entered and not computed."""
        return Upcast in self.takes

    @property
    def is_call(self) -> bool:
        """Whether the primitive is a call: a body that is evaluated once, on the operands."""
        return self.enters and Deferred in self.takes

    @property
    def moves_int8(self) -> bool:
        """Whether an int8 parameter with float noise may enter the equation as it is."""
        return self.enters or self.rounding is Rounding.MOVES

    def admits(self, arithmetic: ValueArithmetic) -> bool:
        """Whether the rule holds for values of this arithmetic."""
        return arithmetic.linear or self.integers


_TABLE: dict[str, Entry] = {}


def entry(primitive: str) -> Entry:
    """What is known about a primitive; for an unknown one that its operands are built."""
    unknown = Entry(primitive, None, "", (), False, False, None)
    return _TABLE.get(primitive, unknown)


def entries() -> Mapping[str, Entry]:
    """All entries by the name of their primitive."""
    return _TABLE


def rule(
    *primitives: str,
    keeps: str,
    takes: tuple[type, ...] = (LowRank,),
    integers: bool = False,
    late_broadcasts: bool = False,
    rounding: Rounding | None = None,
) -> Callable[[Fn], Fn]:
    """Registers a function as the rule of primitives.

    A rule has five duties towards each :class:`~eggroll.values.LowRank` operand:

    1. Value: the result's ``w`` is what the equation gives on ``w``, so that it stays shared by all
       members. Arrays of a member's own must not be mixed into it.
    2. Factors: the operation is applied to the noise. A factor has size 1 along the axes it does not
       vary along, and has to keep it there; the leading rank axis is not the operation's.
    3. Gains: the value is ``(w + noise) * prod gains``. The rule applies the operation to the gains
       too, moves them to another operand or to the result, or returns ``UNHANDLED`` for a value that
       has some.
    4. Activation: the flag says that the value is data rather than weights. It is kept, and set
       where rows are looked up.
    5. Use of axes: ``context.record("contracted" | "free" | "batched" | "scanned" | "indexed",
       value, axis)`` tells plan inference what the equation does with an axis.

    Args:
      *primitives: their names.
      keeps: what stays low rank, in one phrase, for the printed table.
      takes: the types of operands that the rule is called for. Control flow takes Upcast too.
      integers: whether the rule holds for arithmetics that are not linear, such as fixed point.
      late_broadcasts: whether operands come as :class:`~eggroll.values.LateBroadcast` too.
      rounding: what the equation does to numbers that are held in float32.

    Raises:
      ValueError: a primitive is registered twice.
    """

    def register(fn: Fn) -> Fn:
        for name in primitives:
            _add(Entry(name, fn, keeps, takes, integers, late_broadcasts, rounding))
        return fn

    return register


def without_rule(*primitives: str, rounding: Rounding) -> None:
    """Registers primitives that only Upcast operands enter without being rounded."""
    for name in primitives:
        _add(Entry(name, None, "", (), False, False, rounding))


def _add(new: Entry) -> None:
    if new.primitive in _TABLE:
        raise ValueError(f"the primitive {new.primitive!r} has a rule already")
    _TABLE[new.primitive] = new


def markdown() -> str:
    """The table as markdown, a row for each primitive that has a rule, sorted by file and name."""
    rows = [("primitive", "what stays low rank", "integers", "file"), ("---",) * 4]
    known = [e for e in _TABLE.values() if e.rule is not None]
    for e in sorted(known, key=lambda e: (e.rule.__module__, e.primitive)):
        file = e.rule.__module__.rpartition(".")[2]
        rows.append((f"`{e.primitive}`", e.keeps, "yes" if e.integers else "no", f"`{file}.py`"))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
