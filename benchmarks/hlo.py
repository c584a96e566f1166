"""Programs as XLA writes them, parsed: computations, instructions, and how often loops run."""

import dataclasses
import math
import re

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64,
}  # fmt: skip

_TYPE = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(")
_LINE = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")
_SPACE = re.compile(r"S\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Type:
    """One array: its element type, shape, and whether it lies in the chip's main memory."""

    dtype: str
    shape: tuple[int, ...]
    main: bool = True

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        return self.size * BITS.get(self.dtype, 0) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: what it gives, from which operands."""

    name: str
    types: tuple[Type, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def called(self, key: str) -> str | None:
        """The computation named by an attribute, as in ``body=%name``."""
        found = re.search(rf"\b{key}=%([\w.\-]+)", self.attributes)
        return found[1] if found else None


class Module:
    """A parsed program.

    Args:
      text: ``compiled.as_text()``.
      devices: how many chips it is for.
    """

    def __init__(self, text: str, devices: int) -> None:
        self.devices = devices
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        body: dict[str, Instruction] = {}
        for line in text.splitlines():
            if head := _HEAD.match(line):
                body = self.computations[head[1]] = {}
                if line.startswith("ENTRY"):
                    self.entry = head[1]
            elif instruction := parse_line(line):
                body[instruction.name] = instruction
        if not self.entry:
            raise ValueError("the text has no line that begins with ENTRY; compiled.as_text() does")

    def root(self, computation: str) -> Instruction:
        return next(i for i in self.computations[computation].values() if i.root)

    def trips(self, loop: Instruction) -> int | None:
        """How often a loop runs; None where it depends on what is computed."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition, body = loop.called("condition"), loop.called("body")
        assert condition is not None and body is not None
        inside, test = self.computations[condition], self.root(condition)
        if test.opcode == "fusion":
            # The comparison of a counter with a constant, in a fusion of its own.
            called = self.computations[str(test.called("calls"))]
            compare = self.root(str(test.called("calls")))
            if compare.opcode != "compare":
                return None
            sides = []
            for side in (called[name] for name in compare.operands):
                number = parameter_number(side)
                sides.append(side if number is None else inside[test.operands[number]])
        else:
            compare = test
            sides = [inside[name] for name in compare.operands if name in inside]
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            return None
        if len(sides) != 2 or sides[0].opcode != "get-tuple-element":
            return None
        limit = _constant(sides[1])
        if limit is None:
            return None
        return -(-limit // self._stride(body, _index(sides[0])))

    def _stride(self, body: str, index: int) -> int:
        """What the body adds to its counter: more than 1 where the compiler unrolled it."""
        inside, root = self.computations[body], self.root(body)
        if root.opcode != "tuple":
            return 1
        step = inside[root.operands[index]]
        constants = [_constant(inside[name]) for name in step.operands if name in inside]
        strides = [c for c in constants if c]
        return strides[0] if step.opcode == "add" and strides else 1


def parse_line(line: str) -> Instruction | None:
    """One line of a computation; None for any other.

    Example:
      >>> i = parse_line("  %y.1 = (bf16[8,128]{1,0:T(8,128)S(1)}, u32[]) copy-start(%x), foo=1")
      >>> i.opcode, i.operands, i.types[0]
      ('copy-start', ('x',), Type(dtype='bf16', shape=(8, 128), main=False))
    """
    match = _LINE.match(line)
    if not match:
        return None
    rest = line[match.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    types = tuple(
        Type(dtype, tuple(int(n) for n in dims.split(",") if n), _in_main_memory(layout))
        for dtype, dims, layout in _TYPE.findall(rest[:end])
    )
    call = rest[end + 1 :]
    opening = call.index("(")
    closing = _closing(call, opening)
    inside, attributes = call[opening + 1 : closing], call[closing + 1 :]
    if call.startswith("constant"):
        attributes = f"value={inside}{attributes}"
        inside = ""
    elif call.startswith("parameter"):
        attributes = f"number={inside}{attributes}"
    return Instruction(
        match[2], types, call[:opening], tuple(_NAME.findall(inside)), attributes, bool(match[1])
    )


def types_of(inside: dict[str, Instruction], names: object) -> list[Type]:
    assert isinstance(names, list | tuple)
    return [t for name in names if name in inside for t in inside[name].types]


def branches(i: Instruction) -> list[str]:
    if found := re.search(r"branch_computations=\{([^}]*)\}", i.attributes):
        return _NAME.findall(found[1])
    return [str(i.called(key)) for key in ("true_computation", "false_computation")]


def _constant(i: Instruction) -> int | None:
    found = re.match(r"value=(-?\d+)(?![\d.])", i.attributes) if i.opcode == "constant" else None
    return int(found[1]) if found else None


def parameter_number(i: Instruction) -> int | None:
    found = re.match(r"number=(\d+)", i.attributes) if i.opcode == "parameter" else None
    return int(found[1]) if found else None


def _index(i: Instruction) -> int:
    found = re.search(r"index=(\d+)", i.attributes)
    assert found is not None
    return int(found[1])


def _in_main_memory(layout: str) -> bool:
    space = _SPACE.search(layout)
    return space is None or space[1] == "0"


def _closing(text: str, opening: int) -> int:
    """Where the bracket that opens there closes."""
    depth = 0
    for at in range(opening, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    raise ValueError(f"no closing bracket in {text[:80]!r}")
