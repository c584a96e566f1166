"""One pass of a member under node noise: what is added to products, and what is summed for them.

There are two passes over the same equations with the same noise. The first has no credit: noise is
added to what comes out of every product with a parameter. The second has the credit of every row, and
adds up for every parameter what its products received (:mod:`eggroll.values.pullback`).
"""

import abc
import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import core
from jax.typing import DTypeLike

from eggroll import _compat as compat
from eggroll.values.lowrank import LateBroadcast, is_lazy
from eggroll.values.node import Node, Operation, root
from eggroll.values.pullback import sum_type, summed, transposed, type_of

# Noise of a site: (name, indices of the loops around it, shape, type) -> samples.
Draw = Callable[[str, tuple[Array, ...], tuple[int, ...], DTypeLike], Array]

# How often variables are used.
Uses = collections.Counter[Any]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which rows the scores of a member belong to.

    Attributes:
      length: the number of rows: the length of a loop or of an axis of the activations.
      pick: which of them, where several loops and axes have this length: the loops come first, from
        the outside in, then the axes from left to right. None refuses that.

    Example:
      >>> Rows(16, pick=0)
      Rows(length=16, pick=0)
    """

    length: int
    pick: int | None = None


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop around a site.

    Attributes:
      index: the iteration; int32 ``[]``.
      length: the number of iterations; None if it is not known before the run.
      over_parameters: whether parameters are scanned, such as those of stacked layers.
    """

    index: Array
    length: int | None
    over_parameters: bool


class NodeArithmetic(abc.ABC):
    """How noise is added to numbers and weighed by credit, in floats or in integers."""

    @abc.abstractmethod
    def noise_type(self, dtype: DTypeLike) -> DTypeLike | None:
        """The type of the noise of an output of ``dtype``; None where noise has no meaning."""

    @abc.abstractmethod
    def add(self, y: Array, noise: Array, sign: Array, sigma: float, fan_in: int) -> Array:
        """``y + sign sigma noise`` in the type of ``y``; ``sigma`` is the factor of the parameter."""

    @abc.abstractmethod
    def weigh(self, credit: Array, noise: Array) -> Array:
        """Credit times noise."""

    @abc.abstractmethod
    def cotangent(self, parts: Sequence[tuple[Array, float]]) -> Array:
        """What a sum gets for noise of (credit times noise, amplitude), over independent sources."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Noise that an array carries, of one site.

    Attributes:
      site: its name.
      amplitude: the factor that it comes with, beside the strategy's sigma; 0 for the result of a
        comparison, which the noise decides.
      weighed: credit times noise, with the axes of the array; None in the first pass.
      form: what was done to the axes of the site's outputs.
    """

    site: str
    amplitude: float
    weighed: Array | None
    form: str = ""


class Region:
    """The parameters that a body of equations was given, and their sums."""

    def __init__(self) -> None:
        self._arrays: list[Array] = []
        self._sums: list[Array | None] = []
        # By the identity of an array, which is kept beside it: an identity is only good while its
        # object lives.
        self.noise: dict[int, tuple[Array, tuple[Part, ...]]] = {}
        self.numbers: dict[int, tuple[Array, float]] = {}
        # For each site the number of uses of what carries its noise that were not followed yet.
        self.open: collections.Counter[str] = collections.Counter()
        self.realised: dict[int, tuple[Node, Array]] = {}

    def number(self, x: Any) -> float | None:
        """The one number of a constant."""
        x = x.value if isinstance(x, LateBroadcast) else x
        if isinstance(x, jax.core.Tracer):
            return self.numbers.get(id(x), (None, None))[1]
        if is_lazy(x) or np.size(x) != 1:
            return None
        return float(np.asarray(x).reshape(()))

    def adopt(self, node: Node, w: Array | None = None) -> Node:
        """A root for a parameter, or for a slice of it."""
        w = node.w if w is None else w
        self._arrays.append(w)
        self._sums.append(None)
        return root(w, len(self._arrays) - 1, node.paths, node.sigma)

    def add(
        self,
        roots: Sequence[int],
        fn: Operation,
        captured: Any,
        cotangent: Array,
        marks: tuple[Array, Array],
    ) -> None:
        """Adds what the roots get of a cotangent."""
        arrays = tuple(self._arrays[i] for i in roots)
        for i, x in zip(roots, summed(fn, arrays, captured, cotangent, *marks), strict=True):
            total = self._sums[i]
            self._sums[i] = x if total is None else total + x

    def add_total(self, node: Node, total: Array) -> None:
        """Adds a sum over members that a node got as a whole, in a loop or a branch."""
        arrays = tuple(self._arrays[i] for i in node.roots)
        back = transposed(node.fn, arrays, node.captured, total)
        for i, x in zip(node.roots, back, strict=True):
            so_far = self._sums[i]
            self._sums[i] = x if so_far is None else so_far + x

    def sums(self) -> list[Array]:
        """The sums of all roots, in the order of their adoption."""
        return [
            jnp.zeros(w.shape, sum_type(w.dtype)) if total is None else total
            for w, total in zip(self._arrays, self._sums, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class Site:
    """A place where noise is added, for tables and messages.

    Attributes:
      place: equations from the outside in, as ``/3/0?1/2``: ``?1`` is the second branch of a ``cond``.
      paths: the parameters of the product.
      nodes: number of outputs in a row, over the iterations of loops within it; in a member, if the
        site belongs to no row.
      fan_in: number of products in an output.
      rows: whether the rows of the scores are steps of a loop around it or an axis of its outputs; None if
        it belongs to no row.
    """

    place: str
    paths: tuple[str, ...]
    nodes: int
    fan_in: int
    rows: Literal["loop", "axis"] | None


@dataclasses.dataclass(frozen=True)
class NodePass:
    """One pass of a member.

    Attributes:
      draw: the source of noise.
      arithmetic: floats or integers.
      sign: of the member in its pair.
      pair: the member's pair.
      rows: which rows the scores belong to; None if every site has the whole score.
      credit: of every row, ``[rows]``; None in the first pass.
      whole: the credit of what belongs to no row; None in the first pass.
      region: the parameters of the equations at hand.
      loops: around the equations at hand, from the outside in.
      on: whether the equations at hand are run by this member: a factor on credit; None for always.
      shards: axes of a mesh that the equations at hand are divided over, by a shard_map around them.
      sites: every site that was met, by its name, for tables and messages.
    """

    draw: Draw
    arithmetic: NodeArithmetic
    sign: Array
    pair: Array
    rows: Rows | None = None
    credit: Array | None = None
    whole: Array | None = None
    region: Region = dataclasses.field(default_factory=Region)
    loops: tuple[Loop, ...] = ()
    on: Array | None = None
    shards: frozenset[str] = frozenset()
    sites: dict[str, Site] = dataclasses.field(default_factory=dict)

    @property
    def sums(self) -> bool:
        """Whether this is the pass that sums."""
        return self.credit is not None

    def inside(self, loop: Loop | None = None, on: Array | None = None) -> "NodePass":
        """The pass within a loop's or a branch's body, whose parameters are roots of its own."""
        loops = self.loops if loop is None else (*self.loops, loop)
        if on is not None and self.on is not None:
            on = on & self.on
        return dataclasses.replace(
            self, region=Region(), loops=loops, on=self.on if on is None else on
        )

    def sharded(self, axes: frozenset[str]) -> "NodePass":
        """The pass within a shard_map over these axes of a mesh."""
        return dataclasses.replace(self.inside(), shards=self.shards | axes)

    def site(
        self,
        name: str,
        y: Array,
        node: tuple[Sequence[int], Operation, Any],
        paths: tuple[str, ...],
        sigma: float,
        fan_in: int,
        certain: Sequence[int],
        possible: Sequence[int],
    ) -> Array:
        """Adds noise to what came out of a product, and sums for its parameters.

        Args:
          name: of the site in the program.
          y: what came out.
          node: roots, operation and captured operands that it is computed by.
          paths: the parameters.
          sigma: their factor on the strategy's sigma.
          fan_in: number of products in every output.
          certain: axes of ``y`` that come from the data.
          possible: axes that may.
        """
        dtype = self.arithmetic.noise_type(y.dtype)
        if dtype is None:
            return y
        place, name = name, f"{'+'.join(paths)}@{name}"
        # Shards of an output have noise of their own; copies of one have the same.
        axes = sorted(self.shards & compat.varying_axes(y))
        steps = (*(loop.index for loop in self.loops), *map(lax.axis_index, axes))
        noise = self.draw(name, steps, y.shape, dtype)
        out = self.arithmetic.add(y, noise, self.sign, sigma, fan_in)
        weighed = None
        at = self._row_of(y.shape, certain, possible, paths) if self.rows else None
        kind: Literal["loop", "axis"] | None
        kind = None if at is None else "loop" if isinstance(at, Loop) else "axis"
        self.sites[name] = Site(place, paths, self._nodes(y.shape, at), fan_in, kind)
        if self.sums:
            # Noise that is kept from the first pass is kept as narrow as it is drawn.
            weigh = jax.checkpoint(lambda credit, noise: self.arithmetic.weigh(credit, noise))
            weighed = weigh(self._credit(at, y.ndim), noise)
            cotangent = self.arithmetic.cotangent([(weighed, sigma)])
            self.region.add(*node, cotangent, (self.sign, self.pair))
        self.region.noise[id(out)] = (out, (Part(name, sigma, weighed),))
        return out

    def _nodes(self, shape: tuple[int, ...], at: "int | Loop | None") -> int:
        """Number of outputs of a site in a row."""
        inner = [loop.length or 1 for loop in self.loops if loop is not at]
        return math.prod(shape) // (shape[at] if isinstance(at, int) else 1) * math.prod(inner)

    def _credit(self, at: "int | Loop | None", ndim: int) -> Array:
        assert self.credit is not None and self.whole is not None
        if isinstance(at, Loop):
            c = self.credit[at.index]
        elif at is None:
            c = self.whole
        else:
            c = self.credit.reshape(-1, *(1,) * (ndim - at - 1))
        return c if self.on is None else jnp.where(self.on, c, jnp.zeros_like(c))

    def _row_of(
        self,
        shape: tuple[int, ...],
        certain: Sequence[int],
        possible: Sequence[int],
        paths: tuple[str, ...],
    ) -> "int | Loop | None":
        """The loop or the axis that the scores belong to; None if this site has none."""
        assert self.rows is not None
        n = self.rows.length
        if n == 1:
            return None
        found: list[int | Loop] = [
            loop for loop in self.loops if loop.length == n and not loop.over_parameters
        ]
        found += [a for a in sorted(certain) if shape[a] == n]
        if not found:
            found += [a for a in sorted(possible) if shape[a] == n][:1]
        if len(found) < 2:
            return found[0] if found else None
        if self.rows.pick is not None and -len(found) <= self.rows.pick < len(found):
            return found[self.rows.pick]
        names = ["a loop" if isinstance(x, Loop) else f"axis {x}" for x in found]
        raise ValueError(
            f"rows={n}: at a product with parameter {paths[0]!r}, whose outputs are {list(shape)}, "
            f"{' and '.join(names)} have this length: must be one, named by "
            f"eggroll.Rows({n}, pick=k) with k from 0 to {len(found) - 1}"
        )

    # ------------------------------------------------------------ noise that arrays carry

    def carried(self, x: Any) -> tuple[Part, ...]:
        """The noise that an array carries."""
        return self.region.noise.get(id(x), (None, ()))[1]

    def share(self, y: Any, out: Array, node: tuple[Sequence[int], Operation, Any]) -> bool:
        """Whether a parameter that is added to ``y`` shares noise that ``y`` carries.

        It does if all that the noise reaches is reached through this sum. Otherwise the credit of the
        noise would contain what it does elsewhere, which the parameter does not do.
        """
        parts = self.carried(y)
        own = [p for p in parts if self.region.open[p.site] == 1]
        if not own:
            return False
        if self.sums:
            weighed = [(p.weighed, p.amplitude) for p in own if p.weighed is not None]
            self.region.add(*node, self.arithmetic.cotangent(weighed), (self.sign, self.pair))
        self.follow(y)
        self.region.noise[id(out)] = (out, parts)
        return True

    def follow(self, x: Any) -> None:
        """Notes that a use of an array was followed to what it gives."""
        for part in self.carried(x):
            self.region.open[part.site] -= 1

    def begin_uses(self, variables: Sequence[Any], values: Sequence[Any], uses: Uses) -> None:
        """Notes how often variables are used that carry noise."""
        for variable, value in zip(variables, values, strict=True):
            for part in self.carried(value):
                self.region.open[part.site] += uses[variable]

    def hand_on(
        self, eqn: core.JaxprEqn, values: Sequence[Any], outs: Sequence[Any], uses: Uses
    ) -> None:
        """Notes which noise the outputs of an equation carry, and how often they are used."""
        noise = [self.carried(v) for v in values]
        if len(outs) == 1 and not self.carried(outs[0]):
            if any(noise):
                parts = _moved(self.region, eqn, values, noise)
                if parts:
                    self.region.noise[id(outs[0])] = (outs[0], parts)
                    followed = {part.site for part in parts}
                    for part in (part for n in noise for part in n if part.site in followed):
                        self.region.open[part.site] -= 1
            elif eqn.primitive.name == "convert_element_type":
                number = self.region.number(values[0])
                if number is not None:
                    self.region.numbers[id(outs[0])] = (outs[0], number)
        self.begin_uses(eqn.outvars, outs, uses)


def uses_of(jaxpr: core.Jaxpr) -> Uses:
    """How often each variable is used."""
    uses: Uses = collections.Counter()
    for eqn in jaxpr.eqns:
        uses.update(v for v in eqn.invars if not isinstance(v, core.Literal))
    uses.update(v for v in jaxpr.outvars if not isinstance(v, core.Literal))
    return uses


# What integers saturate at: a sum that is cut off there still carries its noise, but one that is cut off at
# 0 does not.
LARGEST = 127


def _moved(
    region: Region,
    eqn: core.JaxprEqn,
    values: Sequence[Any],
    noise: Sequence[tuple[Part, ...]],
) -> tuple[Part, ...]:
    """The noise of an output, from that of the operands, where it stays a known multiple of it."""
    name = eqn.primitive.name
    if name in ("lt", "le", "gt", "ge", "eq", "ne"):
        return _times((*noise[0], *noise[1]), 0.0)
    if name == "select_n":
        return _selected(noise)
    if any(part.amplitude == 0 for n in noise for part in n):
        return ()
    if name in ("convert_element_type", "copy", "reduce_precision"):
        return noise[0]
    if name in ("max", "min", "clamp"):
        return _saturated(region, eqn, values, noise)
    if name == "neg":
        return _times(noise[0], -1.0)
    if name in ("add", "sub"):
        second = _times(noise[1], -1.0) if name == "sub" else noise[1]
        return _together((*noise[0], *second))
    if name in ("mul", "div", "shift_left", "shift_right_arithmetic"):
        by = region.number(values[1] if noise[0] else values[0])
        if by is None or not by or (name != "mul" and not noise[0]):
            return ()
        factors = {"mul": by, "div": 1 / by, "shift_left": 2.0**by}
        return _times(noise[0] or noise[1], factors.get(name, 0.5**by))
    if name in ("transpose", "reshape", "squeeze", "expand_dims"):
        op: Callable[..., Array] = lambda x: eqn.primitive.bind(x, **eqn.params)
        form = f"{name}{sorted(eqn.params.items(), key=str)}"
        return tuple(
            dataclasses.replace(
                p, weighed=None if p.weighed is None else op(p.weighed), form=p.form + form
            )
            for p in noise[0]
        )
    return ()


def _selected(noise: Sequence[tuple[Part, ...]]) -> tuple[Part, ...]:
    """The noise of one of several arrays that carry the same; noise may decide which."""
    which, first, *rest = noise
    signature = lambda parts: [(p.site, p.amplitude, p.form) for p in parts]
    same = all(signature(n) == signature(first) for n in rest)
    decided = {p.site for p in which} <= {p.site for p in first}
    return first if same and decided else ()


def _together(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The noise of a sum: one part for each site and form."""
    merged: dict[tuple[str, str], Part] = {}
    for p in parts:
        before = merged.get((p.site, p.form))
        amplitude = p.amplitude + (before.amplitude if before else 0)
        merged[p.site, p.form] = dataclasses.replace(p, amplitude=amplitude)
    # What cancels may not stand for the result of a comparison.
    return tuple(p for p in merged.values() if p.amplitude != 0)


def _saturated(
    region: Region,
    eqn: core.JaxprEqn,
    values: Sequence[Any],
    noise: Sequence[tuple[Part, ...]],
) -> tuple[Part, ...]:
    """The noise of integers that are cut off at the ends of their range."""
    bounds = {"max": (-1, 0), "min": (1, 0), "clamp": (-1, None, 1)}[eqn.primitive.name]
    if not jnp.issubdtype(type_of(eqn.outvars[0]).dtype, jnp.integer):
        return ()
    carried: tuple[Part, ...] = ()
    for k, (value, own) in enumerate(zip(values, noise, strict=True)):
        if own:
            carried = own
            continue
        side = bounds[0] if len(values) == 2 else bounds[k]
        number = region.number(value)
        if side is None or number is None or number * side < LARGEST:
            return ()
    return carried


def _times(parts: tuple[Part, ...], factor: float) -> tuple[Part, ...]:
    return tuple(dataclasses.replace(p, amplitude=p.amplitude * factor) for p in parts)
