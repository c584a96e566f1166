"""What one chip does in a compiled program, counted from the text of its HLO: loops times their trips.

XLA's own ``cost_analysis`` counts the body of a loop once, however often it runs; :func:`count` with
``loops=False`` does the same, so that the two can be compared, and with loops it is what is to be done.

* matmul: two operations for each product of a dot or convolution, by the type of what is multiplied;
* vector: one for each element of an element-wise operation, and of what is reduced;
* bytes: what top-level instructions read from and write to the chip's main memory. Arrays that the compiler
  placed in the fast memory (memory spaces other than 0) do not count; of an array that a fusion
  slices or gathers from, only what it takes does; a gather in a fusion reads what it gives;
* collectives: bytes that a chip sends in a ring.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator

from benchmarks.hlo import Instruction, Module, branches, parameter_number, types_of

ELEMENTWISE = frozenset(
    "abs add and atan2 ceil clamp compare convert cosine count-leading-zeros divide erf exponential "
    "exponential-minus-one floor is-finite log log-plus-one logistic maximum minimum multiply negate "
    "not or popcnt power remainder round-nearest-afz round-nearest-even rsqrt select "
    "shift-left shift-right-arithmetic shift-right-logical sign sine sqrt subtract tanh xor".split()
)
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Of no cost of their own: names for what is there, or counted by what they call.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id "
    "replica-id opt-barrier".split()
)
SLICES = frozenset(("dynamic-slice", "slice", "gather"))


@dataclasses.dataclass(frozen=True)
class Collective:
    """A kind of exchange, in groups of so many chips."""

    kind: str
    group: int


@dataclasses.dataclass
class Counts:
    """Of one chip and one run of a program.

    Attributes:
      matmul: operations by element type of the operands.
      vector: element-wise operations.
      bytes: read from and written to main memory.
      calls: how many collectives of each kind are run.
      payload: bytes that each kind is about (the operands of a chip).
      sent: bytes that a chip sends for them.
      gathered: elements that gathers give, a table look-up each. The compiler estimates no cycles for them.
      cycles: the sum of the compiler's own estimates, where it gives any.
      unknown: loops whose number of trips the program does not tell.
    """

    matmul: Counter[str] = dataclasses.field(default_factory=Counter)
    vector: float = 0.0
    bytes: float = 0.0
    calls: Counter[Collective] = dataclasses.field(default_factory=Counter)
    payload: Counter[Collective] = dataclasses.field(default_factory=Counter)
    sent: Counter[Collective] = dataclasses.field(default_factory=Counter)
    gathered: float = 0.0
    cycles: float = 0.0
    unknown: int = 0

    def add(self, other: "Counts", times: float = 1) -> None:
        for mine, theirs in (
            (self.matmul, other.matmul), (self.calls, other.calls),
            (self.payload, other.payload), (self.sent, other.sent),
        ):  # fmt: skip
            for key, value in theirs.items():
                mine[key] += value * times  # type: ignore[index,assignment]
        self.vector += times * other.vector
        self.bytes += times * other.bytes
        self.gathered += times * other.gathered
        self.cycles += times * other.cycles
        self.unknown += other.unknown

    @property
    def operations(self) -> float:
        return sum(self.matmul.values()) + self.vector


def count(module: Module, unknown_trips: int = 1, loops: bool = True) -> Counts:
    """All that one run of the program is about.

    Args:
      module: the program.
      unknown_trips: of loops that end by what they compute.
      loops: False counts every loop's body once.
    """

    @functools.cache
    def of(computation: str) -> Counts:
        total = Counts()
        inside = module.computations[computation]
        for i in inside.values():
            if i.opcode == "while":
                trips = module.trips(i)
                total.unknown += trips is None
                times = (unknown_trips if trips is None else trips) if loops else 1
                for key in ("body", "condition"):
                    total.add(of(str(i.called(key))), times)
            elif i.opcode == "conditional":
                costs = [of(name) for name in branches(i)]
                total.add(max(costs, key=lambda c: c.operations + c.bytes))
            elif i.opcode == "call":
                total.add(of(str(i.called("to_apply"))))
            else:
                total.add(_arithmetic(module, computation, i))
                total.bytes += _bytes(module, inside, i)
                if found := re.search(r'"estimated_cycles":"(\d+)"', i.attributes):
                    # Where there is no estimate the compiler writes its largest number.
                    total.cycles += int(found[1]) if int(found[1]) < 2**48 else 0
        return total

    return of(module.entry)


def _arithmetic(module: Module, computation: str, i: Instruction) -> Counts:
    """Operations and exchanges of one instruction, those of a fusion included."""
    inside, counts = module.computations[computation], Counts()
    size = max((t.size for t in i.types), default=0)
    kind = i.opcode.removesuffix("-start")
    if i.opcode in ELEMENTWISE:
        counts.vector = size
    elif i.opcode == "gather":
        counts.gathered = size
    elif i.opcode == "reduce":
        counts.vector = max(t.size for t in types_of(inside, i.operands))
    elif i.opcode in ("dot", "convolution"):
        left = types_of(inside, i.operands[:1])[0]
        counts.matmul[left.dtype] = int(_products(inside, i))
    elif kind in COLLECTIVES:
        counts.add(_exchange(module, computation, i, kind))
    elif i.opcode in ("fusion", "async-start", "call"):
        for key in ("calls", "to_apply"):
            if called := i.called(key):
                for j in module.computations[called].values():
                    counts.add(_arithmetic(module, called, j))
    return counts


def _exchange(module: Module, computation: str, i: Instruction, kind: str) -> Counts:
    counts = Counts()
    group = group_size(i.attributes, module.devices)
    payload = sum(t.bytes for t in types_of(module.computations[computation], i.operands))
    # An all-reduce of which each chip keeps a part is compiled into a computation of this name.
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    key = Collective(kind, group)
    counts.calls[key], counts.payload[key] = 1, payload  # type: ignore[assignment]
    counts.sent[key] = sent(kind, payload, group)  # type: ignore[assignment]
    return counts


def sent(kind: str, payload: float, group: int) -> float:
    """Bytes that each chip of a group sends in a ring, for operands of so many bytes.

    Example:
      >>> sent("all-reduce", 100.0, 4), sent("all-gather", 100.0, 4), sent("reduce-scatter", 100.0, 4)
      (150.0, 300.0, 75.0)
    """
    factors = {
        "all-reduce": 2 * (group - 1) / group,
        "all-gather": group - 1,
        "reduce-scatter": (group - 1) / group,
        "all-to-all": (group - 1) / group,
        "collective-permute": 1,
    }
    return factors[kind] * payload


def group_size(attributes: str, devices: int) -> int:
    """Chips that exchange with each other.

    Example:
      >>> group_size("replica_groups=[64,4]<=[256]", 256), group_size("replica_groups={{0,1},{2,3}}", 4)
      (4, 2)
      >>> group_size("source_target_pairs={{0,1},{1,2},{2,0},{3,4},{4,5},{5,3}}", 6)
      3
    """
    if found := re.search(r"source_target_pairs=\{(\{[^=]*?\})\}", attributes):
        # A ring is followed from its first chip until it closes.
        target = dict(map(_pair, found[1].strip("{}").split("},{")))
        at = start = next(iter(target))
        for length in range(1, len(target) + 1):
            at = target.get(at, start)
            if at == start:
                return length
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return found[1].count(",") + 1
    return devices


def _pair(text: str) -> tuple[int, int]:
    source, target = text.split(",")
    return int(source), int(target)


def _products(inside: dict[str, Instruction], i: Instruction) -> float:
    """Twice the multiplications of a dot or convolution."""
    left, right = types_of(inside, i.operands[:2])
    if i.opcode == "dot":
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
        axes = [int(n) for n in found[1].split(",") if n] if found else []
        return 2.0 * i.types[0].size * math.prod(left.shape[axis] for axis in axes)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert labels is not None
    lhs, rhs, out = labels.groups()
    spatial = [c for c in out if c.isdigit()]
    window = _window(i.attributes, len(spatial))
    at = lambda t, names, c: t.shape[names.index(c)]
    # Where a batch axis is written as a convolution, most positions of the window see padding.
    pairs = math.prod(
        _valid(at(left, lhs, c), at(right, rhs, c), at(i.types[0], out, c), *window[n])
        for n, c in enumerate(spatial)
    )
    features = at(i.types[0], out, "b") * at(i.types[0], out, "f")
    return 2.0 * features * at(right, rhs, "i") * pairs


def _window(attributes: str, axes: int) -> list[tuple[int, int, int, int]]:
    """Stride, padding below, dilation of the left and of the right of every axis."""
    if not axes:
        return []
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(f.split("=") for f in found[1].split()) if found else {}
    of = lambda name, default: (fields.get(name) or "x".join([default] * axes)).split("x")
    pads = [int(p.split("_")[0]) for p in of("pad", "0_0")]
    numbers = [list(map(int, of(name, "1"))) for name in ("stride", "lhs_dilate", "rhs_dilate")]
    return [(numbers[0][n], pads[n], numbers[1][n], numbers[2][n]) for n in range(axes)]


@functools.cache
def _valid(
    size: int, kernel: int, out: int, stride: int, pad: int, dilate: int, spread: int
) -> int:
    """Pairs of an output position and a window position that see an element, not padding."""
    extent = (size - 1) * dilate + 1
    total = 0
    for k in range(kernel):
        for o in range(out):
            at = o * stride - pad + k * spread
            total += 0 <= at < extent and at % dilate == 0
    return total


def _bytes(module: Module, inside: dict[str, Instruction], i: Instruction) -> float:
    """What a top-level instruction moves to and from main memory."""
    if i.opcode in FREE or i.opcode.endswith("-done"):
        return 0.0
    main = lambda types: sum(t.bytes for t in types if t.main)
    operands = [types_of(inside, [name]) for name in i.operands]
    if i.opcode == "copy-start":
        return main(i.types[:2])
    if i.opcode in ("slice-start", "async-start"):
        return 2.0 * min((t.bytes for t in i.types if t.bytes > 4), default=0.0)
    if i.opcode in SLICES:
        return 2 * main(i.types)
    if i.opcode == "dynamic-update-slice":
        return 2 * main(operands[1])
    if i.opcode != "fusion":
        return main(i.types) + sum(map(main, operands))
    called = str(i.called("calls"))
    fused = module.computations[called]
    total = 0.0
    users = _users(fused)
    for j in fused.values():
        number = parameter_number(j)
        if number is None or not main(operands[number]):
            continue
        uses = list(_through(fused, users, j.name))
        if uses and all(_takes_part(fused, use, source) for use, source in uses):
            total += sum(_part(fused, use) for use, _ in uses)
        else:
            total += main(operands[number])
    root = module.root(called)
    roots = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for given, j in zip(i.types, roots, strict=False):
        j = _unwrapped(fused, j)
        written = _part(fused, j) if j.opcode == "dynamic-update-slice" else given.bytes
        total += written if given.main else 0.0
    return total


def _users(fused: dict[str, Instruction]) -> dict[str, list[Instruction]]:
    users: dict[str, list[Instruction]] = {}
    for j in fused.values():
        for name in j.operands:
            users.setdefault(name, []).append(j)
    return users


def _through(
    fused: dict[str, Instruction], users: dict[str, list[Instruction]], name: str
) -> Iterator[tuple[Instruction, str]]:
    """Who uses a value, under whatever name it goes."""
    for use in users.get(name, []):
        if use.opcode == "bitcast":
            yield from _through(fused, users, use.name)
        else:
            yield use, name


def _takes_part(fused: dict[str, Instruction], use: Instruction, source: str) -> bool:
    first = bool(use.operands) and use.operands[0] == source
    return first and (use.opcode in SLICES or use.opcode == "dynamic-update-slice")


def _part(fused: dict[str, Instruction], use: Instruction) -> float:
    """Bytes of a slice that is taken or written."""
    types = (
        types_of(fused, use.operands[1:2]) if use.opcode == "dynamic-update-slice" else use.types
    )
    return sum(t.bytes for t in types)


def _unwrapped(fused: dict[str, Instruction], j: Instruction) -> Instruction:
    while j.opcode == "bitcast" and j.operands[0] in fused:
        j = fused[j.operands[0]]
    return j
