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
from eggroll.interpret.registry import RuleFn, rule
from eggroll.interpret.structure import dims
from eggroll.values.deferred import Deferred
from eggroll.values.lowrank import LowRank, Upcast, Value, is_lazy, materialize

# What is carried from step to step may come to depend on anything in the loop.
CARRIED = Origin.OWN | Origin.DATA


def control_flow(
    *primitives: str, keeps: str, takes: tuple[type, ...] = (LowRank, Upcast)
) -> Callable[[RuleFn], RuleFn]:
    """Registers a rule that enters the body of an equation; it takes Upcast operands too."""
    return rule(*primitives, keeps=keeps, takes=takes, integers=True)


@control_flow(
    "jit", "pjit", "call", "closed_call", "core_call", "eval_jaxpr", "remat2", "checkpoint", "remat",
    "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call", "remat_opt",
    "linear_call", "composite", "custom_partitioning", "compute_on",
    keeps="what the called function keeps", takes=(LowRank, Upcast, Deferred),
)  # fmt: skip
def inline(context: Context, eqn: core.JaxprEqn, *values: Value) -> list[Value]:
    """Enters a call. Custom derivatives are done with: a gradient inside is already equations.

    What a custom vmap rule would do faster it does not do here: that rule knows arrays alone.
    """
    jaxpr, consts = compat.called_jaxpr(eqn)
    return evaluate(context, jaxpr, consts, list(values), context.origins_of(eqn))


@control_flow("custom_linear_solve", keeps="what its solver keeps")
def linear_solve(context: Context, eqn: core.JaxprEqn, *values: Value) -> list[Value]:
    """Enters the solver. The other bodies serve derivatives, which are equations by now."""
    jaxpr, consts, given = compat.solve_parts(eqn, list(values))
    return evaluate(context, jaxpr, consts, given)


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
    xs = [context.upcast(x, eqn) if isinstance(x, LowRank) and x.gains else x for x in parts.xs]
    pieces = [sliced(context, x) for x in xs]
    slices = jnp.arange(parts.length, dtype=jnp.int32), [x for x, _ in pieces]
    origins = context.origins_of(eqn)
    first = len(parts.consts)
    origins[first : first + n] = [CARRIED] * n

    def run(ctx: Context, carry: list[Value], slices: Any) -> tuple[list[Value], list[Value]]:
        i, own = slices
        xs = [whole(piece, i) for (_, whole), piece in zip(pieces, own, strict=True)]
        args = [*parts.consts, *carry, *xs]
        outs = evaluate(ctx, parts.jaxpr, parts.jaxpr_consts, args, origins)
        return outs[:n], outs[n:]

    def trial(carry: list[Value]) -> list[Value]:
        # For the form alone: nothing that is built here is reported.
        return run(context.inner(quiet=True), carry, jax.tree.map(lambda x: x[0], slices))[0]

    def body(carry: list[Value], slices: Any) -> tuple[list[Value], list[Value]]:
        ctx = context.inner()
        outs, ys = run(ctx, carry, slices)
        return hand_on(ctx, eqn, outs, carry), [ctx.dense(y, eqn) for y in ys]

    carry, ys = lax.scan(
        body,
        settle(context, eqn, parts.carry, trial),
        slices,
        parts.length,
        reverse=parts.reverse,
        unroll=parts.unroll,
    )
    return [*carry, *ys]


def sliced(context: Context, x: Value) -> tuple[Any, Callable[[Any, Array], Value]]:
    """What a scan slices of a scanned input, and how step ``i``'s input comes of a slice."""
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
    test_consts, body_consts, carry = values[:n], values[n : n + m], list(values[n + m :])

    origins = context.origins_of(eqn)
    body_origins = [*origins[n : n + m], *(CARRIED for _ in carry)]
    test_origins = [*origins[:n], *(CARRIED for _ in carry)]

    def run(ctx: Context, carry: list[Value]) -> list[Value]:
        return evaluate(ctx, body.jaxpr, body.consts, [*body_consts, *carry], body_origins)

    # A vmap around the loop leaves one condition for each of its elements: the loop goes on until
    # none holds, and elements whose own does not hold any more stay as they are.
    batched = bool(test.out_avals[0].shape)
    if batched:
        carry = [context.dense(v, eqn) for v in carry]

    def holds(ctx: Context, carry: list[Value]) -> Array:
        args = [*test_consts, *carry]
        (out,) = evaluate(ctx, test.jaxpr, test.consts, args, test_origins)
        return ctx.dense(out, eqn)

    def cond_fun(carry: list[Value]) -> Array:
        return jnp.any(holds(context.inner(), carry))

    def body_fun(carry: list[Value]) -> list[Value]:
        ctx = context.inner()
        outs = hand_on(ctx, eqn, run(ctx, carry), carry)
        if not batched:
            return outs
        on = holds(ctx, carry)

        def chosen(new: Any, old: Any) -> Array:
            mask = on.reshape(*on.shape, *(1,) * (new.ndim - on.ndim))
            return jnp.where(mask, new, old)

        return [chosen(new, old) for new, old in zip(outs, carry, strict=True)]

    def trial(carry: list[Value]) -> list[Value]:
        return run(context.inner(quiet=True), carry)

    return lax.while_loop(cond_fun, body_fun, settle(context, eqn, carry, trial))


@control_flow("cond", keeps="operands, and results of one form in all branches")
def cond(context: Context, eqn: core.JaxprEqn, *values: Value) -> list[Value]:
    index, *operands = values
    branches = eqn.params["branches"]

    origins = context.origins_of(eqn)[1:]

    def run(ctx: Context, branch: Any) -> list[Value]:
        outs = evaluate(ctx, branch.jaxpr, branch.consts, operands, origins)
        return [materialize(v) for v in outs]

    def trial(branch: Any) -> list[Value]:
        return run(context.inner(quiet=True), branch)

    forms = [jax.eval_shape(functools.partial(trial, branch)) for branch in branches]
    keep = [
        is_lazy(first) and all(same_kind(first, other) for other in rest)
        for first, *rest in zip(*forms, strict=True)
    ]

    def branch_fn(branch: Any) -> list[Value]:
        ctx = context.inner()
        outs = run(ctx, branch)
        return [o if k else ctx.dense(o, eqn) for o, k in zip(outs, keep, strict=True)]

    # The operands are closed over: being the same objects, they are not built a second time.
    return lax.switch(index, [functools.partial(branch_fn, branch) for branch in branches])


@control_flow("shard_map", keeps="operands")
def shard_map(context: Context, eqn: core.JaxprEqn, *values: Value) -> list[Value]:
    """Enters a shard_map; factors are sharded as the axes that they vary along are."""
    params = eqn.params

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

    def fn(*values: Value) -> list[Value]:
        ctx = context.inner()
        outs = evaluate(ctx, params["jaxpr"], (), list(values), origins)
        return [ctx.dense(o, eqn) for o in outs]

    in_specs = tuple(spec_of(v, s) for v, s in zip(values, params["in_specs"], strict=True))
    return jax.shard_map(
        fn,
        mesh=params["mesh"],
        in_specs=in_specs,
        out_specs=list(params["out_specs"]),
        axis_names=params["newly_manual_axes"],
        check_vma=params["check_vma"],
    )(*values)
