"""Runs any traced JAX function on perturbed parameters that are never built.

``jax.make_jaxpr`` turns a function, whatever library its model is written in, into equations over
primitives. :func:`interpret` evaluates those equations again with some inputs replaced by
:class:`~eggroll.lowrank.LowRank` values: an equation that meets none is bound as it is, one that
does goes through its rule in :mod:`eggroll.rules`, control flow is entered, and an operation
without a rule gets the array built, which is reported (:class:`DenseBuildWarning`) or refused.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core

from eggroll import compat
from eggroll.lowrank import LowRank, Spread, Value, Wide, build, is_narrow, is_special
from eggroll.rules import RULES, UNHANDLED, bind, materialize

OnDense = Literal["error", "warn", "ignore"]


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
        """The context of a loop's body or a branch: arrays built in there stay in there."""
        changes: dict[str, Any] = {"on_dense": "ignore", "built": {}} if quiet else {}
        return dataclasses.replace(self, _memo=dict(self._memo), **changes)

    def record(self, role: str, value: LowRank, axis: int) -> None:
        if self.recorder is not None:
            for k, tags in enumerate(value.tags):
                if value.varies(k, axis):
                    for path, original in tags:
                        self.recorder(role, path, original)

    def dense(self, value: Value, eqn: Any) -> Array:
        """The value as one array of its own type, reported where that is a matrix of parameters."""
        value = self.wide(value, eqn)
        return value.value.astype(value.dtype) if isinstance(value, Wide) else value

    def wide(self, value: Value, eqn: Any) -> Value:
        """As :meth:`dense`, but a narrow type stays :class:`Wide`."""
        if not isinstance(value, LowRank):
            return materialize(value)
        if id(value) not in self._memo:
            self._report(value, eqn)
            array = build(value)
            self._memo[id(value)] = (value, Wide(array, value.dtype) if is_narrow(value.dtype) else array)
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
                f"parameter {path!r} is perturbed at low rank, but {name!r} has no rule for that and "
                f"builds its {list(value.shape)} matrix for every member; give it a treatment of its "
                "own (eggroll.Dense or eggroll.Frozen in the plan's overrides, or eggroll.plan.infer)"
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
        outs = evaluate(context, closed.jaxpr, closed.consts, values)
        outs = [context.dense(v, "output") for v in outs]
        return jax.tree.unflatten(jax.tree.structure(shapes), outs)

    return interpreted


def stand_in(value: Value) -> Any:
    """What the function is traced with in a value's place: an array of its shape and type."""
    if isinstance(value, LowRank):
        return value.w
    return value.value.astype(value.dtype) if isinstance(value, Wide) else value


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
    if any(isinstance(v, LowRank | Wide) for v in values):
        if name in CONTROL_FLOW:
            values = [materialize(v) for v in values]
            return CONTROL_FLOW[name](context, eqn, values)
        if any(isinstance(v, LowRank) for v in values) and name in RULES:
            out = RULES[name](context, eqn, *values)
            if out is not UNHANDLED:
                return out if isinstance(out, list) else [out]
        values = [context.wide(v, eqn) for v in values]
        if any(isinstance(v, Wide) for v in values):
            return in_float32(eqn, values)
    elif name == "broadcast_in_dim" and len(values) == 1 and not is_special(values[0]):
        return [put_off(eqn, values[0])]
    out = bind(eqn, *map(materialize, values))
    return list(out) if eqn.primitive.multiple_results else [out]


def put_off(eqn: Any, x: Array) -> Spread:
    shape, where = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    thin = [1] * len(shape)
    for axis, out in enumerate(where):
        thin[out] = jnp.shape(x)[axis]
    return Spread(jnp.reshape(x, thin), tuple(shape))


# Of a Wide operand these give a Wide result: they move numbers and do not round them.
MOVES = frozenset(
    "broadcast_in_dim copy copy_p dynamic_slice expand_dims gather neg pcast pvary reshape rev "
    "reshard sharding_constraint slice squeeze stop_gradient transpose".split()
)
# These are computed in float32 and rounded once, at the end.
ARITHMETIC = frozenset("add sub mul div max min pow integer_pow exp tanh logistic rsqrt sqrt abs".split())


def in_float32(eqn: Any, values: list[Value]) -> list[Value]:
    """An equation on narrow parameters held in float32."""
    name = eqn.primitive.name
    dtypes = [var.aval.dtype for var in eqn.outvars]
    if name in MOVES and isinstance(values[0], Wide):
        wide, *others = values
        return [Wide(bind(eqn, wide.value, *map(narrow, others)), wide.dtype)]
    if name == "convert_element_type":
        return [values[0].value.astype(dtypes[0])]
    if name in (*ARITHMETIC, "dot_general"):
        params = {"preferred_element_type": jnp.float32} if name == "dot_general" else {}
        operands = [v.value if isinstance(v, Wide) else jnp.asarray(v).astype(jnp.float32) for v in values]
        return [bind(eqn, *operands, **params).astype(dtypes[0])]
    out = bind(eqn, *map(narrow, values))
    return list(out) if eqn.primitive.multiple_results else [out]


def narrow(value: Value) -> Array:
    return value.value.astype(value.dtype) if isinstance(value, Wide) else value


# ---------------------------------------------------------------- control flow

CONTROL_FLOW: dict[str, Callable[[Context, Any, list[Value]], list[Value]]] = {}


def control_flow(*names: str) -> Callable[[Callable], Callable]:
    def register(fn: Callable) -> Callable:
        CONTROL_FLOW.update(dict.fromkeys(names, fn))
        return fn

    return register


@control_flow(
    "jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "remat",
    "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr",
)  # fmt: skip
def inline(context: Context, eqn: Any, values: list[Value]) -> list[Value]:
    """Enters a call. Custom derivatives are done with: a gradient inside is already equations."""
    jaxpr, consts = compat.called_jaxpr(eqn)
    return evaluate(context, jaxpr, consts, values)


def same_kind(a: Any, b: Any) -> bool:
    """Whether two (abstract) values have one structure, with the same shapes and types."""
    leaves_a, tree_a = jax.tree.flatten(a)
    leaves_b, tree_b = jax.tree.flatten(b)
    return tree_a == tree_b and all(
        (x.shape, x.dtype) == (y.shape, y.dtype) for x, y in zip(leaves_a, leaves_b, strict=True)
    )


def settle(
    context: Context, eqn: Any, carry: list[Value], body: Callable[[list[Value]], list[Value]]
) -> list[Value]:
    """Builds those loop carries that the body does not hand on in the form that it got them in."""
    carry = [v if isinstance(v, LowRank) else context.dense(v, eqn) for v in carry]
    while any(isinstance(v, LowRank) for v in carry):
        outs = jax.eval_shape(body, carry)
        changed = [
            isinstance(v, LowRank) and not same_kind(jax.eval_shape(lambda x: x, v), out)
            for v, out in zip(carry, outs, strict=True)
        ]
        if not any(changed):
            break
        carry = [context.dense(v, eqn) if c else v for v, c in zip(carry, changed, strict=True)]
    return carry


def hand_on(context: Context, eqn: Any, outs: list[Value], carry: list[Value]) -> list[Value]:
    """The outputs of a loop's body in the form of its carry."""
    return [
        out if isinstance(c, LowRank) and isinstance(out, LowRank) else context.dense(out, eqn)
        for out, c in zip(outs, carry, strict=True)
    ]


@control_flow("scan")
def scan(context: Context, eqn: Any, values: list[Value]) -> list[Value]:
    parts = compat.scan_parts(eqn, values)
    slices, fixed = [], []
    for x in parts.xs:
        x = x if isinstance(x, LowRank) else narrow(x)
        if isinstance(x, LowRank):
            context.record("scanned", x, 0)
            # Only what varies along the stack is sliced; the rest is the same at every step.
            sliced = tuple(f.shape[1] > 1 or x.shape[0] == 1 for f in x.factors)
            moved = [jnp.moveaxis(f, 1, 0) for f, s in zip(x.factors, sliced, strict=True) if s]
            slices.append((x.w, moved))
            fixed.append((x, sliced))
        else:
            slices.append(x)
            fixed.append(None)

    def whole(piece: Any, rest: Any) -> Value:
        if rest is None:
            return piece
        x, sliced = rest
        w, moved = piece
        moved = iter(moved)
        factors = tuple(
            next(moved) if s else jnp.squeeze(f, 1) for f, s in zip(x.factors, sliced, strict=True)
        )
        return x.replace(w=w, factors=factors)

    def body(carry: list[Value], pieces: list[Any]) -> tuple[list[Value], list[Array]]:
        ctx, n = context.inner(), len(carry)
        xs = [whole(piece, rest) for piece, rest in zip(pieces, fixed, strict=True)]
        outs = evaluate(ctx, parts.jaxpr, parts.jaxpr_consts, [*parts.consts, *carry, *xs])
        return hand_on(ctx, eqn, outs[:n], carry), [ctx.dense(y, eqn) for y in outs[n:]]

    def trial(carry: list[Value]) -> list[Value]:
        first = jax.tree.map(lambda x: x[0], slices) if parts.length else slices
        return evaluate_trial(context, parts, carry, [whole(*p) for p in zip(first, fixed, strict=True)])

    init = settle(context, eqn, parts.carry, trial)
    carry, ys = lax.scan(
        body, init, slices, parts.length, reverse=parts.reverse, unroll=parts.unroll
    )
    return [*carry, *ys]


def evaluate_trial(context: Context, parts: Any, carry: list[Value], xs: list[Value]) -> list[Value]:
    """A loop body's carry as it comes out, for its form alone: nothing built here is reported."""
    quiet = context.inner(quiet=True)
    outs = evaluate(quiet, parts.jaxpr, parts.jaxpr_consts, [*parts.consts, *carry, *xs])
    return outs[: len(carry)]


@control_flow("while")
def while_(context: Context, eqn: Any, values: list[Value]) -> list[Value]:
    params = eqn.params
    n, m = params["cond_nconsts"], params["body_nconsts"]
    test, body = params["cond_jaxpr"], params["body_jaxpr"]
    test_consts, body_consts, carry = values[:n], values[n : n + m], values[n + m :]

    def run(ctx: Context, carry: list[Value]) -> list[Value]:
        return evaluate(ctx, body.jaxpr, body.consts, [*body_consts, *carry])

    init = settle(context, eqn, carry, lambda c: run(context.inner(quiet=True), c))

    def cond_fun(carry: list[Value]) -> Array:
        ctx = context.inner()
        (out,) = evaluate(ctx, test.jaxpr, test.consts, [*test_consts, *carry])
        return ctx.dense(out, eqn)

    def body_fun(carry: list[Value]) -> list[Value]:
        ctx = context.inner()
        return hand_on(ctx, eqn, run(ctx, carry), carry)

    return lax.while_loop(cond_fun, body_fun, init)


@control_flow("cond")
def cond(context: Context, eqn: Any, values: list[Value]) -> list[Value]:
    index, *operands = values
    branches = eqn.params["branches"]

    def run(ctx: Context, branch: Any, operands: list[Value]) -> list[Value]:
        return evaluate(ctx, branch.jaxpr, branch.consts, operands)

    shapes = [jax.eval_shape(lambda ops, b=b: run(context.inner(quiet=True), b, ops), operands) for b in branches]
    keep = [
        isinstance(first, LowRank) and all(same_kind(first, other) for other in rest)
        for first, *rest in zip(*shapes, strict=True)
    ]

    def branch_fn(branch: Any) -> Callable[..., list[Value]]:
        def fn(*operands: Value) -> list[Value]:
            ctx = context.inner()
            outs = run(ctx, branch, list(operands))
            return [o if k else ctx.dense(o, eqn) for o, k in zip(outs, keep, strict=True)]

        return fn

    return lax.switch(context.dense(index, eqn), [branch_fn(b) for b in branches], *operands)


@control_flow("shard_map")
def shard_map(context: Context, eqn: Any, values: list[Value]) -> list[Value]:
    """Enters a shard_map; factors are sharded as the axes that they vary along are."""
    params = eqn.params

    def spec_of(value: Value, spec: Any) -> Any:
        if not isinstance(value, LowRank):
            return jax.tree.map(lambda _: spec, value)
        names = (*spec, *(None,) * (value.ndim - len(spec)))
        factors = tuple(
            jax.P(None, *(name if n > 1 else None for name, n in zip(names, f.shape[1:], strict=True)))
            for f in value.factors
        )
        return value.replace(w=spec, factors=factors, scale=jax.P())

    def fn(*values: Value) -> list[Array]:
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
