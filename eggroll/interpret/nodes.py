"""How an equation treats parameters under node noise.

Three cases, for an equation with an operand of type :class:`~eggroll.values.node.Node`:

* The other operands are constants and parameters: so is what comes out. It is computed as it is, and
  stays a Node. Rows that are looked up by data stay one as long as they are only moved and scaled.
* The equation is a product or a sum with data: it is a *site*. Noise is added to what comes out, anew
  for every row. A parameter that is added to what already carries noise shares that noise.
* Any other equation: noise is added to the parameter itself, as it is there, which is then data.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.extend import core

from eggroll.interpret.context import Context, Origin
from eggroll.interpret.equations import bind, results
from eggroll.interpret.registry import Entry, Rounding
from eggroll.values.lowrank import is_lazy, materialize
from eggroll.values.node import Node, merged

LOOKUPS = ("gather", "dynamic_slice")
SUMS = ("add", "add_any", "sub")
ELEMENTWISE = (*SUMS, "mul", "div", "max", "min", "pow", "atan2")
PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general")
SCALES = ("convert_element_type", "neg", "mul", "div", *SUMS)

Step = Callable[[Context, core.JaxprEqn, list[Any]], list[Any]]


def step(
    ctx: Context, known: Entry, eqn: core.JaxprEqn, values: list[Any], again: Step
) -> list[Any]:
    """Evaluates an equation with Node operands that is not control flow.

    Args:
      ctx: of the interpretation.
      known: the entry of the primitive.
      eqn: the equation.
      values: its operands.
      again: evaluates the equation on other operands, where no Node is left.
    """
    name = eqn.primitive.name
    values = [v if isinstance(v, Node) else _plain(ctx, eqn, v) for v in values]
    shared = all(
        ctx.origin(atom) is Origin.SHARED
        for atom, v in zip(eqn.invars, values, strict=True)
        if not isinstance(v, Node)
    )
    if name in LOOKUPS and not shared and isinstance(values[0], Node):
        return [_moved(eqn, values, looked_up=True)]
    if any(v.looked_up for v in values if isinstance(v, Node)):
        moves = known.rounding is Rounding.MOVES or name in SCALES
        if not (shared and moves):
            values = [realise(ctx, v) if isinstance(v, Node) and v.looked_up else v for v in values]
            return again(ctx, eqn, values)
    if shared:
        return _of_parameters(eqn, values)
    if name in (*ELEMENTWISE, *PRODUCTS):
        return [_site(ctx, eqn, values)]
    return again(ctx, eqn, [realise(ctx, v) if isinstance(v, Node) else v for v in values])


def realise(ctx: Context, node: Node) -> Array:
    """The array of a Node with noise on itself, the same for all its uses."""
    assert ctx.nodes is not None
    known = ctx.nodes.region.realised
    if id(node) not in known:
        of = (node.roots, node.fn, node.captured)
        certain = sorted(node.spread)
        possible = [a for a in range(node.ndim) if a not in node.spread]
        # A parameter itself has no rows; rows that were looked up do.
        possible = possible if node.looked_up else []
        out = ctx.nodes.site(
            f"{ctx.site}=", node.w, of, node.paths, node.sigma, 1, certain, possible
        )
        # How often it will be used is not known: nothing shares its noise.
        ctx.nodes.region.noise.pop(id(out), None)
        known[id(node)] = (node, out)
    return known[id(node)][1]


def _plain(ctx: Context, eqn: core.JaxprEqn, value: Any) -> Any:
    value = materialize(value)
    return ctx.dense(value, eqn) if is_lazy(value) else value


def _of_parameters(eqn: core.JaxprEqn, values: list[Any]) -> list[Any]:
    """An equation of parameters alone, without noise."""
    if len(eqn.outvars) == 1 and not eqn.primitive.multiple_results:
        return [_moved(eqn, values)]
    count = len(eqn.outvars)
    return [_moved(eqn, values, output=k) for k in range(count)]


def _moved(
    eqn: core.JaxprEqn, values: list[Any], looked_up: bool = False, output: int | None = None
) -> Any:
    """What an equation computes from parameters; an array where that has no derivative."""
    op: Callable[..., Any] = lambda *xs: bind(eqn, *xs)
    if output is not None:
        op = lambda *xs: results(eqn, xs)[output]
    nodes = [v for v in values if isinstance(v, Node)]
    w = op(*(v.w if isinstance(v, Node) else v for v in values))
    of_floats = jnp.issubdtype(nodes[0].dtype, jnp.floating)
    if jnp.issubdtype(w.dtype, jnp.floating) != of_floats or w.dtype == bool:
        return w
    roots, fn, captured = merged(op, values)
    paths = tuple(dict.fromkeys(p for v in nodes for p in v.paths))
    looked_up = looked_up or any(v.looked_up for v in nodes)
    return Node(w, roots, fn, captured, looked_up, paths, nodes[0].sigma, _spread(eqn, nodes, w))


def _spread(eqn: core.JaxprEqn, nodes: Sequence[Node], w: Array) -> frozenset[int]:
    """Along which axes of an output the parameters do not vary of themselves."""
    name, (first, *rest) = eqn.primitive.name, nodes
    if name == "broadcast_in_dim":
        where = eqn.params["broadcast_dimensions"]
        own = {
            out
            for axis, out in enumerate(where)
            if first.shape[axis] == w.shape[out] and axis not in first.spread
        }
        return frozenset(range(w.ndim)) - own
    if name == "gather":
        return frozenset(range(w.ndim)) - {*eqn.params["dimension_numbers"].offset_dims}
    if name == "squeeze":
        kept = [a for a in range(first.ndim) if a not in eqn.params["dimensions"]]
        return frozenset(i for i, a in enumerate(kept) if a in first.spread)
    if name == "transpose":
        order = eqn.params["permutation"]
        return frozenset(i for i, a in enumerate(order) if a in first.spread)
    if name in SCALES:
        return first.spread.intersection(*(v.spread for v in rest if v.shape == w.shape))
    return frozenset()


def _site(ctx: Context, eqn: core.JaxprEqn, values: list[Any]) -> Array:
    """A product or a sum of a parameter and data."""
    assert ctx.nodes is not None
    at = [i for i, v in enumerate(values) if isinstance(v, Node)]
    nodes = [values[i] for i in at]
    y = bind(eqn, *(v.w if isinstance(v, Node) else v for v in values))
    # A sum's derivative by its parameters does not depend on its data, which need not be kept for it.
    apart = eqn.primitive.name in SUMS
    of = [jnp.zeros_like(v) if apart and not isinstance(v, Node) else v for v in values]
    node = merged(lambda *xs: bind(eqn, *xs), of)
    paths = tuple(dict.fromkeys(p for v in nodes for p in v.paths))
    certain, possible, fan_in = _axes(eqn, values, at[0], y.ndim)
    if eqn.primitive.name in SUMS and len(at) == 1:
        others = [v for v in values if not isinstance(v, Node)]
        if ctx.nodes.share(others[0], y, node):
            return y
    return ctx.nodes.site(ctx.site, y, node, paths, nodes[0].sigma, fan_in, certain, possible)


def _axes(
    eqn: core.JaxprEqn, values: list[Any], at: int, ndim: int
) -> tuple[list[int], list[int], int]:
    """Which axes of an output are data's, which may be, and the number of products in an entry."""
    name, node = eqn.primitive.name, values[at]
    if name == "dot_general":
        (lc, rc), (lb, _) = eqn.params["dimension_numbers"]
        batch, left = len(lb), values[0].ndim - len(lc) - len(lb)
        of_left = list(range(batch, batch + left))
        of_right = list(range(batch + left, ndim))
        fan_in = math.prod(node.shape[a] for a in (lc if at == 0 else rc))
        return (of_right if at == 0 else of_left), list(range(batch)), fan_in
    if name == "conv_general_dilated":
        spec = eqn.params["dimension_numbers"]
        fan_in = node.w.size // node.shape[spec.rhs_spec[0]]
        return [a for a in range(ndim) if a != spec.out_spec[1]], [], fan_in
    if name in PRODUCTS:
        return [0], list(range(1, ndim)), node.shape[-2]
    certain = sorted(node.spread)
    return certain, [a for a in range(ndim) if a not in certain], 1
