"""A plan as a readable table."""

import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from eggroll.interpret.node_pass import Site
from eggroll.plan.leaf import Leaf, Plan
from eggroll.plan.treatments import Dense, Frozen, Given, Matrix, Nodes

_KINDS = {Dense: "dense", Nodes: "nodes", Given: "given", Frozen: "frozen"}


def describe(plan: Plan, built: Mapping[str, Sequence[str]], sites: Sequence[Site] = ()) -> str:
    """The plan as a table, one line a parameter.

    Args:
      plan: the plan.
      built: for each path, the primitives that build its matrix for every member, from a trace.
      sites: the products that get node noise, from a trace.
    """
    head = ("parameter", "shape", "treatment", "rank", "noise/member", "why")
    rows = [head]
    for leaf in plan.leaves:
        t = leaf.treatment
        if isinstance(t, Matrix):
            kind = f"low rank, rows {_listed(t.rows)}, columns {_listed(t.columns)}"
            kind += f", batch {_listed(t.batch)}" if t.batch else ""
        else:
            kind = _KINDS[type(t)]
        kind += _sigma(leaf) + _subspaces(leaf)
        why = leaf.reason
        if leaf.path in built:
            why += f"; BUILT for every member by {', '.join(built[leaf.path])}"
        rank = str(t.rank) if isinstance(t, Matrix) else "full" if isinstance(t, Dense) else "-"
        shape = "x".join(map(str, leaf.shape)) or "scalar"
        noise = _nodes(leaf.path, sites) if isinstance(t, Nodes) else _size(leaf.noise_bytes)
        rows.append((leaf.path, f"{shape} {leaf.dtype}", kind, rank, noise, why))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    dense = sum(
        math.prod(leaf.shape) * jnp.dtype(leaf.noise_dtype).itemsize
        for leaf in plan.leaves
        if leaf.trainable
    )
    total = (
        f"noise a pair of members: {_size(plan.noise_bytes)}, where dense noise would take "
        f"{_size(dense)}"
    )
    totals = [total] if plan.noise_bytes else []
    if sites:
        totals.append(_gain(plan, sites))
    return "\n".join([lines[0], "-" * len(max(lines, key=len)), *lines[1:], *totals])


def _sigma(leaf: Leaf) -> str:
    """The factor on sigma of a parameter in a row."""
    if leaf.slices is not None:
        return f", sigma x{np.min(leaf.scale):.4g} to x{np.max(leaf.scale):.4g}"
    return f", sigma x{leaf.sigma:g}" if leaf.sigma not in (0, 1) else ""


def _subspaces(leaf: Leaf) -> str:
    """The subspaces of a parameter in a row."""
    if leaf.subspaces == 1:
        return ""
    t = leaf.treatment
    what = "entries"
    if isinstance(t, Matrix):
        what = "columns" if leaf.divided == t.columns else "rows"
    return f", {leaf.subspaces} subspaces of {what}"


def _nodes(path: str, sites: Sequence[Site]) -> str:
    """The nodes of a parameter in a row, and their fan-in."""
    own = [site for site in sites if path in site.paths]
    if not own:
        return "shared" if sites else "-"
    fan_in = "/".join(map(str, sorted({site.fan_in for site in own})))
    per = "row" if any(site.rows for site in own) else "member"
    return f"{_count(own)} nodes/{per}, fan-in {fan_in}"


def _count(sites: Sequence[Site]) -> int:
    """The nodes of sites; of the branches of a ``cond`` those of the largest."""
    return _count_places([(site.place, site.nodes) for site in sites])


def _count_places(places: Sequence[tuple[str, int]]) -> int:
    total = 0
    branches: dict[str, dict[str, list[tuple[str, int]]]] = {}
    for place, nodes in places:
        cond, branch, inner = place.partition("?")
        if not branch:
            total += nodes
        else:
            which, _, rest = inner.partition("/")
            branches.setdefault(cond, {}).setdefault(which, []).append((rest, nodes))
    return total + sum(max(map(_count_places, each.values())) for each in branches.values())


def _gain(plan: Plan, sites: Sequence[Site]) -> str:
    """The law of node noise: its estimate is as good as that of d / D times as many passes."""
    nodes = _count(sites)
    size = sum(math.prod(leaf.shape) for leaf in plan.leaves if isinstance(leaf.treatment, Nodes))
    return (
        f"nodes a row: D = {nodes}, of d = {size} parameters; predicted gain over weight noise at equal "
        f"passes: d / D = {size / nodes:.3g}"
    )


def _listed(axes: tuple[int, ...]) -> str:
    return ",".join(map(str, axes))


def _size(count: int | float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
