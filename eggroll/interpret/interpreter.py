"""Runs any traced JAX function on perturbed parameters that are never built.

``jax.make_jaxpr`` turns a function, whatever library its model is written in, into equations over
primitives. :func:`interpret` evaluates those equations again with some inputs replaced by
:class:`~eggroll.values.lowrank.LowRank` values: an equation that meets none is bound as it is, one that
does goes through its rule in :mod:`eggroll.interpret.rules`, control flow is entered, and an operation
without a rule gets the array built, which is reported (:class:`DenseBuildWarning`) or refused.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core

from eggroll import _compat as compat
from eggroll.interpret import joins, products  # noqa: F401  (joins and products register rules)
from eggroll.interpret.rules import NOT_OF_INTEGERS, RULES, TAKE_SPREAD, UNHANDLED, dims, results
from eggroll.interpret.wide import MOVES, in_float32
from eggroll.values.lowrank import (
    LowRank,
    Spread,
    Value,
    Wide,
    build,
    is_narrow,
    is_quantised,
    is_special,
    materialize,
    narrow,
)

OnDense = Literal["error", "warn", "ignore"]

# These move one array's numbers, of whatever type.
MOVES_ALONE = (MOVES | {"broadcast_in_dim"}) - {
    "concatenate", "dynamic_update_slice", "neg", "pad", "select_n", "stack"
}  # fmt: skip


class DenseBuildWarning(UserWarning):
    """A perturbed matrix had to be built for every member: slow, and large."""


class DenseBuildError(ValueError):
    """The same under ``on_dense="error"``."""


@dataclasses.dataclass
class Context:
    """What one interpretation collects while it traces.

    Attributes:
      on_dense: what to do where a perturbed matrix must be built.
      built: for each parameter path the primitives that it was built for.
      recorder: called with (role, path, axis of the parameter) where plan inference listens.
    """

    on_dense: OnDense = "warn"
    built: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    recorder: Callable[[str, str, int], None] | None = None
    # Built arrays by the identity of their value, so that several uses share one. The value is
    # kept beside it: an identity is only good while its object lives.
    _memo: dict[int, tuple[LowRank, Value]] = dataclasses.field(default_factory=dict)

    def inner(self, *, quiet: bool = False) -> "Context":
        """The context of a trace of its own, as of a loop's body: what it builds stays in there."""
        changes: dict[str, Any] = {"on_dense": "ignore", "built": {}} if quiet else {}
        return dataclasses.replace(self, _memo=dict(self._memo), **changes)

    def record(self, role: str, value: LowRank, axis: int) -> None:
        if self.recorder is not None:
            for k, tags in enumerate(value.tags):
                if value.varies(k, axis):
                    for path, original in tags:
                        self.recorder(role, path, original)

    def dense(self, value: Value, eqn: Any) -> Any:
        """The value as one array of its own type, reported where that is a matrix of parameters."""
        if is_quantised(value):
            refuse_quantised(value, eqn if isinstance(eqn, str) else eqn.primitive.name)
        return narrow(self.wide(value, eqn))

    def wide(self, value: Value, eqn: Any) -> Value:
        """As :meth:`dense`, but a narrow type stays :class:`Wide`."""
        if not isinstance(value, LowRank):
            return materialize(value)
        if id(value) not in self._memo:
            self._report(value, eqn)
            array = build(value)
            wide = is_narrow(value.dtype) or is_quantised(value)
            built = Wide(array, value.dtype) if wide else array
            self._memo[id(value)] = (value, built)
        return self._memo[id(value)][1]

    def _report(self, value: LowRank, eqn: Any) -> None:
        thin = value.w.size <= max(factor[0].size for factor in value.factors)
        if value.activation or thin:
            return
        name = eqn if isinstance(eqn, str) else eqn.primitive.name
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


def interpret(fn: Callable[..., Any], context: Context | None = None) -> Callable[..., Any]:
    """Returns ``fn`` such that its arguments may hold LowRank and Wide values.

    Args:
      fn: any traceable function of pytrees of arrays.
      context: how to treat, and where to note, what has to be built.

    Returns:
      A function of the same arguments; its outputs are ordinary arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> w = LowRank(jnp.eye(2), (jnp.ones((1, 2, 1)), jnp.ones((1, 1, 2))), jnp.float32(0.1))
      >>> interpret(lambda w, x: x @ w)(w, jnp.ones(2)).tolist()
      [1.2000000476837158, 1.2000000476837158]
    """
    context = context or Context()

    def interpreted(*args: Any) -> Any:
        values, tree = jax.tree.flatten(args, is_leaf=is_special)
        stand_ins = jax.tree.unflatten(tree, [stand_in(v) for v in values])
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*stand_ins)
        ctx = context.inner()
        outs = evaluate(ctx, closed.jaxpr, closed.consts, values)
        outs = [ctx.dense(v, "output") for v in outs]
        return jax.tree.unflatten(jax.tree.structure(shapes), outs)

    return interpreted


def stand_in(value: Value) -> Any:
    """What the function is traced with in a value's place: an array of its shape and type."""
    return compat.inside_mesh(value.w if isinstance(value, LowRank) else narrow(value))


def evaluate(
    context: Context, jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Value]
) -> list[Value]:
    """Evaluates a jaxpr on arrays and special values."""
    env: dict[Any, Value] = {}

    def read(atom: Any) -> Value:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        with eqn.ctx.manager:
            outs = step(context, eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def step(context: Context, eqn: Any, values: list[Value]) -> list[Value]:
    """Evaluates one equation."""
    name = eqn.primitive.name
    check_quantised(eqn, values)
    if name == "broadcast_in_dim" and len(values) == 1 and not isinstance(values[0], LowRank):
        return [put_off(eqn, values[0])]
    if name not in TAKE_SPREAD or not any(isinstance(v, LowRank) for v in values):
        values = [materialize(v) for v in values]
    if any(isinstance(v, LowRank | Wide) for v in values) and name in CONTROL_FLOW:
        return CONTROL_FLOW[name](context, eqn, values)
    if any(isinstance(v, LowRank) for v in values):
        out = rule_of(name, values)(context, eqn, *values)
        if out is not UNHANDLED:
            outs = out if isinstance(out, list) else [out]
            return [v.w if isinstance(v, LowRank) and v.w.size == 0 else v for v in outs]
        values = [context.wide(v, eqn) for v in values]
    if any(isinstance(v, Wide) for v in values):
        return in_float32(eqn, values)
    return results(eqn, values)


def check_quantised(eqn: Any, values: list[Value]) -> None:
    """Raises ValueError for what would treat float noise on an int8 parameter as integers."""
    name = eqn.primitive.name
    to_float = name == "convert_element_type" and jnp.issubdtype(
        eqn.params["new_dtype"], jnp.floating
    )
    if name not in MOVES_ALONE and name not in CONTROL_FLOW and not to_float:
        for value in filter(is_quantised, values):
            refuse_quantised(value, name)


def refuse_quantised(value: Value, where: str) -> None:
    path = f" {value.paths[0]!r}" if isinstance(value, LowRank) and value.paths else ""
    raise ValueError(
        f"the int8 parameter{path} has noise of floats and enters {where!r} in int8; cast it to a float type "
        "before that, or freeze it by eggroll.Frozen()"
    )


def rule_of(name: str, values: list[Value]) -> Callable[..., Any]:
    integer = any(isinstance(v, LowRank) and v.integer for v in values)
    if name not in RULES or (integer and name in NOT_OF_INTEGERS):
        return lambda *_: UNHANDLED
    return RULES[name]


def put_off(eqn: Any, x: Any) -> Spread:
    """A broadcast that is carried out where its result is used."""
    x = materialize(x)
    shape, where = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    thin = [1] * len(shape)
    for axis, out in enumerate(where):
        thin[out] = jnp.shape(x)[axis]
    if isinstance(x, Wide):
        return Spread(Wide(x.value.reshape(thin), x.dtype), tuple(shape))
    return Spread(jnp.reshape(x, thin), tuple(shape))


# ---------------------------------------------------------------- control flow

CONTROL_FLOW: dict[str, Callable[[Context, Any, list[Value]], list[Value]]] = {}


def control_flow(*names: str) -> Callable[[Callable], Callable]:
    def register(fn: Callable) -> Callable:
        CONTROL_FLOW.update(dict.fromkeys(names, fn))
        return fn

    return register


@control_flow(
    "jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "remat",
    "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call",
)  # fmt: skip
def inline(context: Context, eqn: Any, values: list[Value]) -> list[Value]:
    """Enters a call. Custom derivatives are done with: a gradient inside is already equations.

    What a custom vmap rule would do faster it does not do here: that rule knows arrays alone.
    """
    jaxpr, consts = compat.called_jaxpr(eqn)
    return evaluate(context, jaxpr, consts, values)


def same_kind(a: Any, b: Any) -> bool:
    """Whether two (abstract) values have one structure, with the same shapes and types."""
    leaves_a, leaves_b = jax.tree.leaves(a), jax.tree.leaves(b)
    trees: list[Any] = [jax.tree.structure(a), jax.tree.structure(b)]
    return trees[0] == trees[1] and all(
        (x.shape, x.dtype) == (y.shape, y.dtype) for x, y in zip(leaves_a, leaves_b, strict=True)
    )


def settle(
    context: Context, eqn: Any, carry: list[Value], body: Callable[[list[Value]], list[Value]]
) -> list[Value]:
    """Builds those loop carries that the body does not hand on in the form that it got them in."""
    while any(isinstance(v, LowRank | Wide) for v in carry):
        before, after = jax.eval_shape(lambda x: x, carry), jax.eval_shape(body, carry)
        stays = [is_special(a) and same_kind(a, b) for a, b in zip(before, after, strict=True)]
        if all(s or not is_special(v) for s, v in zip(stays, carry, strict=True)):
            break
        carry = [v if s else context.dense(v, eqn) for s, v in zip(stays, carry, strict=True)]
    return carry


def hand_on(context: Context, eqn: Any, outs: list[Value], carry: list[Value]) -> list[Value]:
    """The outputs of a loop's body in the form of its carry."""
    pairs = zip(outs, carry, strict=True)
    return [out if is_special(c) else context.dense(out, eqn) for out, c in pairs]


@control_flow("scan")
def scan(context: Context, eqn: Any, values: list[Value]) -> list[Value]:
    parts = compat.scan_parts(eqn, values)
    n = len(parts.carry)
    xs = [context.wide(x, eqn) if isinstance(x, LowRank) and x.gains else x for x in parts.xs]
    pieces = [sliced(context, x) for x in xs]
    slices = jnp.arange(parts.length, dtype=jnp.int32), [x for x, _ in pieces]

    def run(ctx: Context, carry: list[Value], slices: Any) -> tuple[list[Value], list[Value]]:
        i, own = slices
        xs = [whole(piece, i) for (_, whole), piece in zip(pieces, own, strict=True)]
        outs = evaluate(ctx, parts.jaxpr, parts.jaxpr_consts, [*parts.consts, *carry, *xs])
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


@control_flow("while")
def while_(context: Context, eqn: Any, values: list[Value]) -> list[Value]:
    params = eqn.params
    n, m = params["cond_nconsts"], params["body_nconsts"]
    test, body = params["cond_jaxpr"], params["body_jaxpr"]
    test_consts, body_consts, carry = values[:n], values[n : n + m], values[n + m :]

    def run(ctx: Context, carry: list[Value]) -> list[Value]:
        return evaluate(ctx, body.jaxpr, body.consts, [*body_consts, *carry])

    # A vmap around the loop leaves one condition for each of its elements: the loop goes on until
    # none holds, and elements whose own does not hold any more stay as they are.
    batched = bool(test.out_avals[0].shape)
    if batched:
        carry = [context.dense(v, eqn) for v in carry]

    def holds(ctx: Context, carry: list[Value]) -> Array:
        (out,) = evaluate(ctx, test.jaxpr, test.consts, [*test_consts, *carry])
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


@control_flow("cond")
def cond(context: Context, eqn: Any, values: list[Value]) -> list[Value]:
    index, *operands = values
    branches = eqn.params["branches"]

    def run(ctx: Context, branch: Any) -> list[Value]:
        return [materialize(v) for v in evaluate(ctx, branch.jaxpr, branch.consts, operands)]

    def trial(branch: Any) -> list[Value]:
        return run(context.inner(quiet=True), branch)

    forms = [jax.eval_shape(functools.partial(trial, branch)) for branch in branches]
    keep = [
        is_special(first) and all(same_kind(first, other) for other in rest)
        for first, *rest in zip(*forms, strict=True)
    ]

    def branch_fn(branch: Any) -> list[Value]:
        ctx = context.inner()
        outs = run(ctx, branch)
        return [o if k else ctx.dense(o, eqn) for o, k in zip(outs, keep, strict=True)]

    # The operands are closed over: being the same objects, they are not built a second time.
    return lax.switch(index, [functools.partial(branch_fn, branch) for branch in branches])


@control_flow("shard_map")
def shard_map(context: Context, eqn: Any, values: list[Value]) -> list[Value]:
    """Enters a shard_map; factors are sharded as the axes that they vary along are."""
    params = eqn.params

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
        outs = evaluate(ctx, params["jaxpr"], (), list(values))
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
