"""Rules of calls, loops, branches and shard_map: their bodies are interpreted in turn."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core

from eggroll import _compat as compat
from eggroll.interpret.context import Context, Origin
from eggroll.interpret.interpreter import evaluate
from eggroll.interpret.node_pass import Loop
from eggroll.interpret.nodes import realise
from eggroll.interpret.registry import RuleFn, rule
from eggroll.interpret.structure import dims
from eggroll.values.deferred import Deferred
from eggroll.values.lowrank import LowRank, Upcast, Value, is_lazy, materialize
from eggroll.values.node import Node
from eggroll.values.pullback import for_any_member, sum_type

# What is carried from step to step may come to depend on anything in the loop.
CARRIED = Origin.OWN | Origin.DATA


def control_flow(
    *primitives: str, keeps: str, takes: tuple[type, ...] = (LowRank, Upcast, Node)
) -> Callable[[RuleFn], RuleFn]:
    """Registers a rule that enters the body of an equation; it takes Upcast operands too."""
    return rule(*primitives, keeps=keeps, takes=takes, integers=True)


@control_flow(
    "jit", "pjit", "call", "closed_call", "core_call", "eval_jaxpr", "remat2", "checkpoint", "remat",
    "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call", "remat_opt",
    "linear_call", "composite", "custom_partitioning", "compute_on",
    keeps="what the called function keeps", takes=(LowRank, Upcast, Deferred, Node),
)  # fmt: skip
def inline(context: Context, eqn: core.JaxprEqn, *values: Value) -> list[Value]:
    """Enters a call. Custom derivatives are done with: a gradient inside is already equations.

    What a custom vmap rule would do faster it does not do here: that rule knows arrays alone.
    """
    jaxpr, consts = compat.called_jaxpr(eqn)
    follow = context.nodes.follow if context.nodes is not None else lambda value: None
    for value in values:
        follow(value)
    outs = evaluate(context, jaxpr, consts, list(values), context.origins_of(eqn))
    for out in outs:
        follow(out)
    return outs


@control_flow("custom_linear_solve", keeps="what its solver keeps")
def linear_solve(context: Context, eqn: core.JaxprEqn, *values: Value) -> list[Value]:
    """Enters the solver. The other bodies serve derivatives, which are equations by now."""
    jaxpr, consts, given = compat.solve_parts(eqn, list(values))
    *_, origins = compat.solve_parts(eqn, context.origins_of(eqn))
    return evaluate(context, jaxpr, consts, given, origins)


def same_kind(a: Any, b: Any) -> bool:
    """Whether two (abstract) values have one structure, with the same shapes and types."""
    leaves_a, leaves_b = jax.tree.leaves(a), jax.tree.leaves(b)
    trees: list[Any] = [jax.tree.structure(a), jax.tree.structure(b)]
    return trees[0] == trees[1] and all(
        (x.shape, x.dtype) == (y.shape, y.dtype) for x, y in zip(leaves_a, leaves_b, strict=True)
    )


def settle(
    context: Context,
    eqn: core.JaxprEqn,
    carry: list[Value],
    body: Callable[[list[Value]], list[Value]],
) -> list[Value]:
    """Builds those loop carries that the body does not hand on in the form that it got them in."""
    while any(isinstance(v, LowRank | Upcast) for v in carry):
        before, after = jax.eval_shape(lambda x: x, carry), jax.eval_shape(body, carry)
        stays = [is_lazy(a) and same_kind(a, b) for a, b in zip(before, after, strict=True)]
        if all(s or not is_lazy(v) for s, v in zip(stays, carry, strict=True)):
            break
        carry = [v if s else context.dense(v, eqn) for s, v in zip(stays, carry, strict=True)]
    return carry


def hand_on(
    context: Context, eqn: core.JaxprEqn, outs: list[Value], carry: list[Value]
) -> list[Value]:
    """The outputs of a loop's body in the form of its carry."""
    pairs = zip(outs, carry, strict=True)
    return [out if is_lazy(c) else context.dense(out, eqn) for out, c in pairs]


@control_flow("scan", keeps="constants, scanned stacks, carries that stay of one form")
def scan(context: Context, eqn: core.JaxprEqn, *values: Value) -> list[Value]:
    parts = compat.scan_parts(eqn, list(values))
    n = len(parts.carry)
    first = [entering(context, v) for v in parts.carry]
    xs = [context.upcast(x, eqn) if isinstance(x, LowRank) and x.gains else x for x in parts.xs]
    consts, xs = [handed(context, v) for v in parts.consts], [handed(context, x) for x in xs]
    of_consts = [v for v in consts if isinstance(v, Node)]
    of_xs = [v for v in xs if isinstance(v, Node)]
    pieces = [sliced(context, x) for x in xs]
    slices = jnp.arange(parts.length, dtype=jnp.int32), [x for x, _ in pieces]
    origins = context.origins_of(eqn)
    start = len(parts.consts)
    origins[start : start + n] = [CARRIED] * n

    def run(ctx: Context, carry: list[Value], slices: Any) -> tuple[list[Value], list[Value]]:
        i, own = slices
        ctx.enter_loop(Loop(i, parts.length, bool(of_xs)))
        args = [ctx.adopt(v) for v in consts]
        args += carry
        args += [
            ctx.adopt(x, piece) if isinstance(x, Node) else whole(piece, i)
            for x, (_, whole), piece in zip(xs, pieces, own, strict=True)
        ]
        outs = evaluate(ctx, parts.jaxpr, parts.jaxpr_consts, args, origins)
        return outs[:n], outs[n:]

    def trial(carry: list[Value]) -> list[Value]:
        # For the form alone: nothing that is built here is reported.
        ctx = context.inner(quiet=True)
        outs, _ = run(ctx, carry, jax.tree.map(lambda x: x[0], slices))
        return [v for v in plain(ctx, outs)]

    def body(carry: Any, slices: Any) -> tuple[Any, Any]:
        ctx, (carry, totals) = context.inner(), carry
        outs, ys = run(ctx, carry, slices)
        outs = hand_on(ctx, eqn, plain(ctx, outs), carry)
        ys = [ctx.dense(y, eqn) for y in plain(ctx, ys)]
        sums = ctx.sums()
        totals = jax.tree.map(jnp.add, totals, sums[: len(totals)])
        return (outs, totals), (ys, sums[len(totals) :])

    totals = [jnp.zeros(v.shape, sum_type(v.dtype)) for v in of_consts] if context.summing else []
    (carry, totals), (ys, stacks) = lax.scan(
        body,
        (settle(context, eqn, first, trial), totals),
        slices,
        parts.length,
        reverse=parts.reverse,
        unroll=parts.unroll,
    )
    context.take(of_consts, totals)
    context.take(of_xs, stacks)
    return [*carry, *ys]


def entering(context: Context, value: Value) -> Value:
    """A parameter under node noise that becomes data: a carry, or rows that were looked up."""
    return realise(context, value) if isinstance(value, Node) else value


def handed(context: Context, value: Value) -> Value:
    """What a body is handed: rows that were looked up as data, parameters as they are."""
    return entering(context, value) if isinstance(value, Node) and value.looked_up else value


def plain(context: Context, values: list[Value]) -> list[Value]:
    """What a body returns: parameters under node noise as data."""
    return [entering(context, v) for v in values]


def sliced(context: Context, x: Value) -> tuple[Any, Callable[[Any, Array], Value]]:
    """What a scan slices of a scanned input, and how step ``i``'s input comes of a slice."""
    if isinstance(x, Node):
        return x.w, lambda piece, i: piece
    if not isinstance(x, LowRank):
        return x, lambda piece, i: piece
    context.record("scanned", x, 0)

    def of_step(f: Array, i: Array) -> Array:
        # Looked up and not scanned: under a vmap over pairs the axis of the pairs comes first, and a
        # scan would move the stack's before it. Inside another loop that copies all factors at
        # every step (a fifth of the time of a recurrent model of stacked layers).
        if f.shape[1] == 1:
            return f[:, 0]
        return lax.dynamic_index_in_dim(f, i, 1, keepdims=False)

    def whole(w: Array, i: Array) -> LowRank:
        return x.replace(w=w, factors=tuple(of_step(f, i) for f in x.factors))

    return x.w, whole


@control_flow("while", keeps="constants, carries that stay of one form")
def while_(context: Context, eqn: core.JaxprEqn, *values: Value) -> list[Value]:
    params = eqn.params
    n, m = params["cond_nconsts"], params["body_nconsts"]
    test, body = params["cond_jaxpr"], params["body_jaxpr"]
    test_consts = [entering(context, v) for v in values[:n]]
    body_consts = [handed(context, v) for v in values[n : n + m]]
    carry = [entering(context, v) for v in values[n + m :]]
    of_consts = [v for v in body_consts if isinstance(v, Node)]

    origins = context.origins_of(eqn)
    body_origins = [*origins[n : n + m], *(CARRIED for _ in carry)]
    test_origins = [*origins[:n], *(CARRIED for _ in carry)]

    def run(ctx: Context, i: Array, carry: list[Value], on: Array | None = None) -> list[Value]:
        ctx.enter_loop(Loop(i, None, False), on)
        args = [*(ctx.adopt(v) for v in body_consts), *carry]
        return plain(ctx, evaluate(ctx, body.jaxpr, body.consts, args, body_origins))

    # A vmap around the loop leaves one condition for each of its elements: the loop goes on until
    # none holds, and elements whose own does not hold any more stay as they are. Sums over members
    # ask for the same: the loop is one for all members.
    summing = context.summing and bool(of_consts)
    batched = bool(test.out_avals[0].shape)
    if batched and summing:
        raise ValueError(
            f"parameter {of_consts[0].paths[0]!r} has node noise and is used in a while loop under "
            "vmap: must be a loop of a fixed number of steps (lax.scan, or fori_loop with constants)"
        )
    if batched or summing:
        carry = [context.dense(v, eqn) for v in carry]

    def holds(ctx: Context, carry: list[Value]) -> Array:
        args = [*test_consts, *carry]
        (out,) = evaluate(ctx, test.jaxpr, test.consts, args, test_origins)
        return ctx.dense(out, eqn)

    def cond_fun(state: Any) -> Array:
        on = jnp.any(holds(context.inner(), state[1]))
        return for_any_member(on) if summing else on

    def body_fun(state: Any) -> Any:
        i, carry, totals = state
        ctx = context.inner()
        on = holds(ctx, carry) if batched or summing else None
        outs = hand_on(ctx, eqn, run(ctx, i, carry, on if summing else None), carry)
        totals = jax.tree.map(jnp.add, totals, ctx.sums()) if summing else []
        if on is None:
            return i + 1, outs, totals

        def chosen(new: Any, old: Any) -> Array:
            mask = on.reshape(*on.shape, *(1,) * (new.ndim - on.ndim))
            return jnp.where(mask, new, old)

        return i + 1, [chosen(new, old) for new, old in zip(outs, carry, strict=True)], totals

    def trial(carry: list[Value]) -> list[Value]:
        return run(context.inner(quiet=True), jnp.int32(0), carry)

    totals = [jnp.zeros(v.shape, sum_type(v.dtype)) for v in of_consts] if summing else []
    start = jnp.int32(0), settle(context, eqn, carry, trial), totals
    _, carry, totals = lax.while_loop(cond_fun, body_fun, start)
    context.take(of_consts, totals)
    return carry


def reads(jaxpr: core.Jaxpr) -> list[bool]:
    """Which of its arguments a body reads, looking into branches and calls."""
    seen: set[Any] = {atom for atom in jaxpr.outvars if not isinstance(atom, core.Literal)}
    for eqn in jaxpr.eqns:
        used = [True] * len(eqn.invars)
        if eqn.primitive.name == "cond":
            inner = zip(*(reads(branch.jaxpr) for branch in eqn.params["branches"]), strict=True)
            used = [True, *map(any, inner)]
        elif eqn.primitive.name in ("jit", "pjit"):
            used = reads(eqn.params["jaxpr"].jaxpr)
        seen.update(
            atom
            for atom, is_used in zip(eqn.invars, used, strict=True)
            if is_used and not isinstance(atom, core.Literal)
        )
    return [v in seen for v in jaxpr.invars]


@control_flow("cond", keeps="operands, and results of one form in all branches")
def cond(context: Context, eqn: core.JaxprEqn, *values: Value) -> list[Value]:
    index, *operands = values
    index = entering(context, index)
    branches = eqn.params["branches"]
    # A parameter that no branch reads has no sum: not one of zeros for every branch.
    read = map(any, zip(*(reads(branch.jaxpr) for branch in branches), strict=True))
    operands = [
        v.w if isinstance(v, Node) and not used else handed(context, v)
        for v, used in zip(operands, read, strict=True)
    ]
    of_parameters = [v for v in operands if isinstance(v, Node)]

    of_index, *origins = context.origins_of(eqn)
    # Where members may take different branches, sums over members need all of them.
    all_of_them = context.summing and bool(of_parameters) and of_index is not Origin.SHARED

    def run(ctx: Context, k: int, on: Array | None = None) -> list[Value]:
        ctx.site += f"?{k}"
        ctx.enter_branch(on)
        branch = branches[k]
        args = [ctx.adopt(v) for v in operands]
        outs = evaluate(ctx, branch.jaxpr, branch.consts, args, origins)
        return [materialize(v) for v in plain(ctx, outs)]

    def trial(k: int) -> list[Value]:
        return run(context.inner(quiet=True), k)

    count = range(len(branches))
    forms = [jax.eval_shape(functools.partial(trial, k)) for k in count]
    keep = [
        not all_of_them and is_lazy(first) and all(same_kind(first, other) for other in rest)
        for first, *rest in zip(*forms, strict=True)
    ]

    def branch_fn(k: int, on: Array | None = None) -> tuple[list[Value], list[Array]]:
        ctx = context.inner()
        outs = run(ctx, k, on)
        dense = [o if k else ctx.dense(o, eqn) for o, k in zip(outs, keep, strict=True)]
        return dense, ctx.sums()

    if all_of_them:
        at = jnp.clip(index.astype(jnp.int32), 0, len(branches) - 1)
        done = [branch_fn(k, at == k) for k in count]
        outs = [lax.select_n(at, *each) for each in zip(*(o for o, _ in done), strict=True)]
        for _, sums in done:
            context.take(of_parameters, sums)
        return outs
    # The operands are closed over: being the same objects, they are not built a second time.
    outs, sums = lax.switch(index, [functools.partial(branch_fn, k) for k in count])
    context.take(of_parameters, sums)
    return outs


@control_flow("shard_map", keeps="operands")
def shard_map(context: Context, eqn: core.JaxprEqn, *values: Value) -> list[Value]:
    """Enters a shard_map; factors are sharded as the axes that they vary along are.

    The sums of a parameter under node noise are sharded as it is, and added up over the axes of the
    mesh that it is not sharded over but its data are.
    """
    params = eqn.params
    values = tuple(handed(context, v) for v in values)
    nodes = [v for v in values if isinstance(v, Node)]
    own_axes = frozenset(params["newly_manual_axes"])
    if nodes and not params["check_vma"]:
        raise ValueError(
            f"parameter {nodes[0].paths[0]!r} has node noise and enters a shard_map with check_vma=False: "
            "must have check_vma=True, which tells over which axes data differ"
        )

    origins = context.origins_of(eqn)

    def spec_of(value: Value, spec: Any) -> Any:
        if not isinstance(value, LowRank):
            return jax.tree.map(lambda _: spec, value)
        names = (*spec, *(None,) * (value.ndim - len(spec)))

        def own(sizes: tuple[int, ...]) -> list[Any]:
            return [name if n > 1 else None for name, n in zip(names, sizes, strict=True)]

        factors = [jax.P(None, *own(dims(f))) for f in value.factors]
        gains = [jax.P(*own(g.shape)) for g in value.gains]
        return jax.tree.unflatten(jax.tree.structure(value), [spec, *factors, jax.P(), *gains])

    of_nodes = [
        spec for v, spec in zip(values, params["in_specs"], strict=True) if isinstance(v, Node)
    ]

    def added_up(total: Array, spec: Any) -> Array:
        named = {
            name for part in spec if part for name in (part if isinstance(part, tuple) else (part,))
        }
        over = (compat.varying_axes(total) & own_axes) - named
        total = lax.psum(total, tuple(sorted(over))) if over else total
        missing = named - compat.varying_axes(total)
        return lax.pcast(total, tuple(sorted(missing)), to="varying") if missing else total

    def fn(*arrays: Value) -> tuple[list[Value], list[Array]]:
        ctx = context.inner()
        ctx.enter_shards(own_axes)
        given = [
            ctx.adopt(v, x) if isinstance(v, Node) else x
            for v, x in zip(values, arrays, strict=True)
        ]
        outs = plain(ctx, evaluate(ctx, params["jaxpr"], (), given, origins))
        sums = ctx.sums() if nodes else []
        return [ctx.dense(o, eqn) for o in outs], list(map(added_up, sums, of_nodes))

    in_specs = tuple(
        spec if isinstance(v, Node) else spec_of(v, spec)
        for v, spec in zip(values, params["in_specs"], strict=True)
    )
    summed = of_nodes if context.summing else []
    outs, sums = jax.shard_map(
        fn,
        mesh=params["mesh"],
        in_specs=in_specs,
        out_specs=(list(params["out_specs"]), summed),
        axis_names=params["newly_manual_axes"],
        check_vma=params["check_vma"],
    )(*(v.w if isinstance(v, Node) else v for v in values))
    context.take(nodes, sums)
    return outs
