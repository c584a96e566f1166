"""A hypothesis strategy of random programs, and the operations that they are made of.

Every operation is continuous, or jumps at thresholds that values computed in another order do not
straddle, so that two correct evaluations in float64 agree to rounding.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from hypothesis import strategies as st
from program import Maker, Program, words


@st.composite
def programs(draw: Callable[..., Any], operations: Any = None, most: int = 6) -> Program:
    """Programs of up to ``most`` operations, all of whose unused values are outputs."""
    maker = Maker(draw)
    table = operations or OPERATIONS
    lines: list[tuple[str, str]] = []
    for _ in range(maker.number(1, most)):
        expression = maker.one(table)(maker)
        if expression is None:
            continue
        if maker.add(expression) is not None:
            lines.append((list(maker.avals)[-1], expression))
    if not lines:
        maker.add("jnp.tanh(w)")
        lines.append(("a0", "jnp.tanh(w)"))
    used = set().union(*(words(expression) for _, expression in lines))
    return Program(tuple(lines), tuple(name for name, _ in lines if name not in used))


# ---------------------------------------------------------------- pieces of expressions

# Of one value, of its shape.
UNARY = (
    "-{a}", "jnp.tanh({a})", "jnp.sin({a})", "jnp.cos({a})", "jnp.exp(jnp.tanh({a}))", "jnp.square({a})",
    "{a} ** 2", "{a} ** 3", "(1.0 + {a} ** 2) ** -1", "jnp.abs({a})", "jnp.sqrt(jnp.abs({a}) + 0.1)",
    "lax.rsqrt({a} * {a} + 0.1)", "jnp.log1p(jnp.abs({a}))", "jnp.expm1(jnp.tanh({a}))",
    "jnp.log(jnp.abs({a}) + 0.3)", "lax.erf({a})", "jax.nn.sigmoid({a})", "jax.nn.relu({a} - 0.123)",
    "jax.nn.gelu({a})", "jax.nn.silu({a})", "jax.nn.softplus({a})", "jax.nn.leaky_relu({a} + 0.217)",
    "jnp.clip({a}, -0.71, 0.93)", "jnp.sign({a} - 0.0371)", "jnp.floor(3.0 * {a} + 0.2137)",
    "jnp.round(2.0 * {a} + 0.1731)", "jnp.where({a} > 0.1373, {a}, 0.0)", "jnp.where({a} < 0.3179, 1.0, {a})",
    "2.0 * {a}", "{a} / 3.0", "{a} + 1.0", "1.0 - {a}", "0.5 / (1.5 + jnp.sin({a}))", "jnp.cbrt({a} + 9.1)",
    "jnp.maximum({a}, 0.0413)", "jnp.minimum({a}, 0.27)", "jnp.arctan2({a}, 1.3)", "jnp.exp2(jnp.sin({a}))",
    "jnp.logaddexp({a}, 0.2)", "jnp.real({a} + 1j * {a})", "jnp.array({a})", "lax.stop_gradient({a})",
    "lax.optimization_barrier({a})", "lax.reduce_precision({a}, 11, 52)", "jnp.nan_to_num({a})",
    "jnp.flip({a})", "jax.jit(lambda t: t * 0.5)({a})", "jax.checkpoint(lambda t: jnp.tanh(t) * t)({a})",
    "own_jvp({a})", "own_vjp({a})", "own_vmap({a})", "jax.grad(lambda t: (jnp.sin(t) * t).sum())({a})",
    "jax.jvp(jnp.tanh, ({a},), ({a},))[1]", "jax.numpy.vectorize(lambda t: t * t)({a})",
    "jax.grad(lambda t: own_vjp(t).sum())({a})", "jax.lax.integer_pow({a}, 4)", "{a} / (1.0 + jnp.abs({a}))",
    "checkpoint_name({a}, 'a')", "lax.cond({a}.sum() > 0.1739, lambda t: t, lambda t: 2 * t, {a})",
)  # fmt: skip

# Of one value with at least one axis, and an axis of it; of its shape. No derivative of a maximum:
# JAX divides by the number of elements equal to it, which is 0 where XLA computes a matrix once for
# the maximum and once more, rounded differently, for the comparison.
ALONG = (
    "{a} - {a}.mean({i}, keepdims=True)", "{a} / ({a}.sum({i}, keepdims=True) ** 2 + 1.1)",
    "({a} - {a}.mean({i}, keepdims=True)) / ({a}.std({i}, keepdims=True) + 0.3)",
    "{a} / (jnp.linalg.norm({a}, axis={i}, keepdims=True) + 0.1)", "{a} * lax.rsqrt(({a} ** 2).sum({i}, keepdims=True) + 0.1)",
    "jax.nn.softmax({a}, {i})", "jax.nn.log_softmax({a}, {i})", "jax.nn.standardize({a}, {i}, epsilon=0.1)",
    "jnp.cumsum({a}, {i})", "jnp.cumprod(jnp.tanh({a}), {i})", "lax.cummax({a}, {i})", "lax.cumlogsumexp({a}, {i}, reverse=True)",
    "jnp.sort({a}, {i})", "jnp.flip({a}, {i})", "jnp.roll({a}, 1, {i})", "{a} - lax.stop_gradient({a}.max({i}, keepdims=True))",
    "lax.associative_scan(jnp.add, {a}, axis={i})", "{a} + jnp.expand_dims({a}.mean({i}), {i})",
    "{a} * {a}.sum({i}, keepdims=True)", "jnp.moveaxis(jax.vmap(lambda t: t * jnp.tanh(t.sum()), {i})({a}), 0, {i})",
    "jax.vmap(lambda t: lax.cond(t.sum() > 0.1739, lambda: t, lambda: -t), {i}, {i})({a})",
    "jnp.take({a}, jnp.array(({a}.shape[{i}] - 1, 0) * {a}.shape[{i}])[:{a}.shape[{i}]], {i})",
)  # fmt: skip

# Of one value and some of its axes or all (None), with or without these in the result.
REDUCTIONS = (
    "{a}.sum({i})", "{a}.mean({i})", "{a}.max({i})", "{a}.min({i})", "{a}.var({i})", "({a} ** 2).sum({i})",
    "jnp.square({a}).mean({i})", "({a} * {a}).sum({i})", "jnp.abs({a}).sum({i})", "jnp.tanh({a}).prod({i})",
    "jax.nn.logsumexp({a}, {i})", "jnp.sqrt(jnp.sum({a} ** 2, {i}) + 0.1)", "({a} > 0.1219).any({i}) * 1.0",
    "jnp.where({a} > 0.0719, 1.0, 0.0).sum({i})", "({a} < 0.917).all({i}) * 0.5", "jnp.sum({a}, {i}, keepdims=True)",
    "jnp.mean({a}, {i}, keepdims=True)", "jnp.sum({a} ** 2, {i}, keepdims=True)", "jnp.sum({a}, {i}, where={a} > 0.0813)",
)  # fmt: skip

# Of two values of which the second broadcasts to the first.
BINARY = (
    "{a} + {b}", "{b} + {a}", "{a} - {b}", "{b} - {a}", "{a} * {b}", "{b} * {a}", "{a} / (2.0 + jnp.sin({b}))",
    "{b} / (2.0 + jnp.cos({a}))", "jnp.maximum({a}, {b} + 0.0173)", "jnp.minimum({b}, {a} - 0.0217)",
    "jnp.where({a} > {b} + 0.0119, {a}, {b})", "jnp.arctan2({a}, 2.0 + jnp.abs({b}))", "{a} + {b}.sum()",
    "{a} * {b}.mean()", "{b}.sum() - {a}", "jnp.arange(7.0) * {b}.sum() + {a}.max()", "{a} * lax.stop_gradient({b})",
    "lax.clamp(-0.7, {a}, 0.9) + {b}", "{a} ** 2 + {b} ** 2", "jnp.where({b}.sum() > 0.1319, {a}, -{a})",
    "lax.select({a} > 0.0917, {a}, jnp.broadcast_to({b}, {a}.shape))", "(1.0 + {a}) * {b} - {a}", "jnp.hypot({a}, {b} + 3.1)",
    "jnp.power(jnp.abs({a}) + 0.5, jnp.tanh({b}))", "lax.cond({b}.sum() > 0.1539, lambda t: t, jnp.zeros_like, {a})",
)  # fmt: skip

MASKS = ("jnp.tril({a})", "jnp.triu({a}, 1)", "{a} * jnp.eye(*{a}.shape[-2:])", "jnp.where(jnp.tri(*{a}.shape[-2:]) > 0, {a}, 0.0)",
         "{a} * np.linspace(-1.0, 2.0, {a}.size).reshape({a}.shape)", "jnp.where(np.arange({a}.shape[-1]) % 2 == 0, {a}, 0.5)",
         "{a} + np.linspace(-1.0, 2.0, {a}.size).reshape({a}.shape)", "jnp.diagonal({a}, axis1=-2, axis2=-1)", "jnp.trace({a}, axis1=-2, axis2=-1)")  # fmt: skip


# ---------------------------------------------------------------- operations

OPERATIONS: list[Callable[[Maker], str | None]] = []


def operation(times: int = 1) -> Callable[[Callable], Callable]:
    """Adds an operation to the table, ``times`` times as likely as others."""

    def register(fn: Callable[[Maker], str | None]) -> Callable[[Maker], str | None]:
        OPERATIONS.extend([fn] * times)
        return fn

    return register


def has_axes(count: int) -> Callable[[tuple[int, ...]], bool]:
    return lambda shape: len(shape) >= count


def elementwise(m: Maker, name: str) -> str:
    """An operation on a name that keeps its shape."""
    if m.shape(name) and m.flag():
        return m.one(ALONG).format(a=name, i=m.axis(name))
    return m.one(UNARY).format(a=name)


@operation(3)
def unary(m: Maker) -> str | None:
    return elementwise(m, m.value())


@operation(2)
def along(m: Maker) -> str | None:
    a = m.value(has_axes(1))
    return m.one(ALONG).format(a=a, i=m.axis(a))


@operation(3)
def reduction(m: Maker) -> str | None:
    a = m.value()
    return m.one(REDUCTIONS).format(a=a, i=m.axes(a))


@operation(3)
def binary(m: Maker) -> str | None:
    a = m.value()
    return m.one(BINARY).format(a=a, b=m.like(a))


@operation()
def mask(m: Maker) -> str | None:
    return m.one(MASKS).format(a=m.value(has_axes(2)))


def fitting(m: Maker, size: int) -> tuple[str, int]:
    """A name and one of its axes that has the size."""
    b = m.value(lambda shape: size in shape)
    return b, m.one([i for i, n in enumerate(m.shape(b)) if n == size])


@operation(3)
def product(m: Maker) -> str | None:
    """A dot_general with some batch axes."""
    a = m.value(has_axes(1))
    i = m.axis(a)
    b, j = fitting(m, m.shape(a)[i])
    pairs = [
        (p, q)
        for p, n in enumerate(m.shape(a))
        for q, k in enumerate(m.shape(b))
        if n == k and p != i and q != j
    ]
    batch = [m.one(pairs)] if pairs and m.number(0, 2) == 0 else []
    lhs, rhs = [p for p, _ in batch], [q for _, q in batch]
    dot = f"lax.dot_general({a}, {b}, ((({i},), ({j},)), ({lhs}, {rhs})))"
    return f"jnp.tanh({dot})" if m.flag() else f"0.3 * {dot}"


@operation(3)
def matmul(m: Maker) -> str | None:
    a = m.value(lambda shape: len(shape) >= 1 and shape[-1] in (4, 6))
    n = m.shape(a)[-1]
    b = m.value(lambda shape: len(shape) == 2 and n in shape)
    right = b if m.shape(b)[0] == n else f"{b}.T"
    return m.one(("{a} @ {b}", "jnp.tanh({a} @ {b})", "({a} * 0.5) @ {b}", "{a} @ ({b} * 0.5)", "jnp.dot({a}, {b})")).format(a=a, b=right)  # fmt: skip


@operation()
def einsum(m: Maker) -> str | None:
    return m.one((
        "jnp.einsum('ij,kj->ik', w, y)", "jnp.einsum('sij,bj->sbi', s, x)", "jnp.einsum('sij,sjk->sik', s, s)",
        "jnp.einsum('ij,kj,k->i', w, v, b)", "jnp.einsum('ij,ij->', y, w)", "jnp.einsum('ij,ij->i', w, w)",
        "jnp.einsum('ij,ij->j', v, jnp.tanh(v))", "jnp.einsum('bi,ij,bj->b', x, v, x)", "jnp.einsum('ii->i', v)",
        "jnp.einsum('sii->s', s)", "jnp.einsum('hij,bi->bhj', s, x)", "jnp.vdot(w, w)", "jnp.vdot(v, x[:4] @ v.T) if 0 else jnp.vdot(w, y)",
        "jnp.tensordot(s, x, ((2,), (1,)))", "jnp.outer(b, z)", "jnp.kron(b, c[None])", "jax.vmap(jnp.matmul, (None, 0))(x, s)",
        "jax.vmap(jnp.vdot)(w, y)", "jax.vmap(lambda t: v @ t)(x)", "jax.vmap(lambda t: t @ w.T, 1, 1)(v)",
        "lax.ragged_dot(x, s, jnp.array([2, 3]))", "lax.ragged_dot(x, s, jnp.array([4, 0]))", "lax.batch_matmul(s, jnp.stack([x.T, x.T]))",
    ))  # fmt: skip


@operation(2)
def convolution(m: Maker) -> str | None:
    """A convolution over one axis, of data or of a value, by the kernel or by a value made one."""
    kernel = m.one(("k", "2.0 * k", "k - k.mean((0, 1), keepdims=True)", "s[:, :, :4]", "jnp.stack([w.T, w.T])",
                    "k / jnp.sqrt((k ** 2).sum((0, 1)) + 0.1)"))  # fmt: skip
    image = m.one(
        ("x[None]", "y[None]", "jnp.tanh(x @ v)[None]", "jnp.stack([y, y + b])", "e[None]")
    )
    padding = m.one(("'SAME'", "'VALID'", "[(1, 0)]"))
    stride, dilation = m.number(1, 2), m.number(1, 2)
    return (
        f"0.3 * lax.conv_general_dilated({image}, {kernel}, ({stride},), {padding}, "
        f"rhs_dilation=({dilation},), dimension_numbers=('NHC', 'HIO', 'NHC'))"
    )


@operation(2)
def lookup(m: Maker) -> str | None:
    a = m.value(has_axes(1))
    i = m.axis(a)
    n = m.shape(a)[i]
    picks = [m.number(0, n - 1) for _ in range(m.number(1, 3))]
    return m.one((
        "{a}[{p}]" if i == 0 else "{a}[..., {q}]", "jnp.take({a}, jnp.array({p}), {i})", "jnp.take({a}, jnp.array([{p}, {p}]), {i})",
        "lax.dynamic_slice_in_dim({a}, {q}, {k}, {i})", "lax.slice_in_dim({a}, {q}, None, axis={i})",
        "lax.dynamic_index_in_dim({a}, {q}, {i}, False)", "jnp.take({a}, jnp.argmax({a}.sum({others}) + 0.0131 * np.arange({n})), {i})",
        "lax.index_in_dim({a}, {q}, {i}, False)", "jnp.take_along_axis({a}, jnp.argsort({a}, {i})[..., :], {i})",
        "jnp.split({a}, [{h}], {i})[0]", "jnp.unstack({a}, axis={i})[{q}]", "jnp.take({a}, jnp.array([0, 99]), {i}, fill_value=0.5)",
        "lax.rev({a}, ({i},))", "jnp.take({a}, np.arange(0, {n}, 2), {i})",
    )).format(a=a, i=i, n=n, p="np.array(" + str(picks) + ")" if m.flag() else picks[0], q=picks[0], k=m.number(1, n), h=max(1, n // 2),
              others=tuple(j for j in range(len(m.shape(a))) if j != i))  # fmt: skip


@operation(2)
def write(m: Maker) -> str | None:
    """A write of rows, columns, entries or slices."""
    a = m.value(has_axes(1))
    i = m.axis(a)
    n = m.shape(a)[i]
    colons = ":, " * i
    where = m.one(("{q}", "np.array([{q}, 0])", "{q}:", "::2", "jnp.array({q})"))
    index = colons + where.format(q=m.number(0, n - 1))
    return m.one((
        "{a}.at[{j}].set(0.0)", "{a}.at[{j}].set({v})", "{a}.at[{j}].add({v})", "{a}.at[{j}].multiply(0.5)", "{a}.at[{j}].multiply({v})",
        "{a}.at[{j}].max({v} - 0.0137)", "{a}.at[{j}].min({v})", "{a}.at[{j}].divide(2.0)", "{a}.at[{j}].apply(jnp.tanh)",
        "{a}.at[{j}].set({a}[{j}] * 0.5)", "{a}.at[{j}].add({a}[{j}])", "{a}.at[{j}].subtract(c)", "lax.dynamic_update_index_in_dim({a}, 0.5 * lax.index_in_dim({a}, 0, {i}), {k}, {i})",
        "lax.dynamic_update_slice_in_dim({a}, jnp.zeros_like(lax.slice_in_dim({a}, 0, 1, axis={i})), {k}, {i})",
        "{a}.at[{j}].set(1.5, mode='drop')", "lax.dynamic_update_slice(jnp.zeros_like({a}), {a}, ({k},) * {a}.ndim)",
        "jnp.zeros_like({a}).at[{j}].add({a}[{j}])", "jnp.ones_like({a}).at[{j}].set({a}[{j}])",
        "jax.ops.segment_sum({a}, np.arange({a}.shape[0]) % 2, 3)", "jnp.zeros((4, *{a}.shape[1:])).at[np.arange({a}.shape[0]) % 4].add({a})",
    )).format(a=a, i=i, j=index, k=m.number(0, n - 1), v=m.one(("c", "c * 0.5", "0.25", "jnp.sin(c)")))  # fmt: skip


@operation(2)
def reshape(m: Maker) -> str | None:
    a = m.value(has_axes(1))
    shape = m.shape(a)
    i = m.axis(a)
    order = tuple(m.draw(st.permutations(range(len(shape)))))
    forms = [
        "{a}.reshape(-1)", "{a}.transpose({o})", "{a}.transpose({o}).reshape(-1)", "jnp.expand_dims({a}, {i})", "{a}[None]", "{a}.T",
        "jnp.swapaxes({a}, 0, {i})", "jnp.broadcast_to({a}, (2, *{a}.shape))", "jnp.tile({a}, 2)", "jnp.repeat({a}, 2, {i})",
        "{a}.reshape(*{a}.shape[:{i}], 2, -1, *{a}.shape[{i} + 1:])", "{a}.reshape({a}.shape[0], -1)", "jnp.squeeze({a}[:1])",
        "jnp.pad({a}, [(int(j == {i}), 0) for j in range({a}.ndim)])", "jnp.pad({a}, 1, constant_values=0.5)", "jnp.pad({a}, 1, mode='edge')",
        "lax.pad({a}, 0.0, [(1, -1, int(j == {i})) for j in range({a}.ndim)])", "lax.collapse({a}, 0)", "jnp.rot90({a}[..., None])",
    ]  # fmt: skip
    form = m.one(forms)
    if "2, -1" in form and shape[i] % 2:
        return None
    if "-1, int" in form and min(shape) < 2:
        return None
    return form.format(a=a, i=i, o=order)


@operation(2)
def joined(m: Maker) -> str | None:
    a = m.value(has_axes(1))
    shape, i = m.shape(a), m.axis(a)
    b = m.value(lambda other: other == shape)
    return m.one((
        "jnp.concatenate([{a}, {b}], {i})", "jnp.stack([{a}, {b}], {i})", "jnp.concatenate([{a}, jnp.zeros_like({a})], {i})",
        "jnp.stack([{b}, jnp.ones_like({a}), {a}], {i})", "jnp.concatenate([{a}, {b}, {a}], {i}).sum({i})", "jnp.hstack([{a}, {b}])",
        "sum(jnp.split(jnp.concatenate([{a}, {b}], {i}), 2, {i}))", "jnp.append({a}, {b})", "jnp.concatenate([{a} * 2.0, {b}], {i})",
        "jnp.where(jnp.stack([{a}, {b}]) > 0.0917, 1.0, jnp.stack([{b}, {a}]))",
    )).format(a=a, b=b, i=i)  # fmt: skip


@operation()
def order(m: Maker) -> str | None:
    """Sorting, the largest, one-hot vectors."""
    a = m.value(has_axes(1))
    return m.one((
        "jnp.sort({a})", "lax.top_k({a}, 1)[0]", "jax.nn.one_hot(jnp.argmax({a} + 0.0113 * np.arange({n}), -1), {n})",
        "jax.nn.one_hot(jnp.argmin({a} + 0.0113 * np.arange({n}), -1), {n}) * {a}", "lax.top_k({a}, {n})[0]", "jnp.median({a})",
        "jnp.quantile({a}, 0.3, -1)", "jnp.searchsorted(jnp.sort({a}.reshape(-1)), 0.0613) * 1.0", "lax.sort([{a}, {a} * 2.0], num_keys=1)[1]",
        "jnp.unique({a}.reshape(-1)[:1], size=2)", "lax.reduce_window({a}, -jnp.inf, lax.max, (2,) * {a}.ndim, (1,) * {a}.ndim, 'SAME')",
        "lax.reduce_window({a}, 0.0, lax.add, (2,) * {a}.ndim, (1,) * {a}.ndim, 'SAME')",
        "lax.reduce_precision({a}, 11, 52)", "jnp.fft.rfft({a}).real", "jnp.cov(jnp.atleast_2d({a}.reshape({a}.shape[0], -1)))",
    )).format(a=a, n=m.shape(a)[-1])  # fmt: skip


@operation()
def linear_algebra(m: Maker) -> str | None:
    a = m.value(lambda shape: len(shape) >= 2 and shape[-1] == shape[-2])
    n = m.shape(a)[-1]
    spd = f"({a} @ jnp.swapaxes({a}, -1, -2) + 2.0 * jnp.eye({n}))"
    return m.one((
        "jnp.linalg.solve({p}, jnp.ones(({n}, 2)))", "jnp.linalg.cholesky({p})", "jnp.linalg.inv({p})", "jnp.linalg.slogdet({p})[1]",
        "jax.scipy.linalg.solve_triangular(jnp.tril({a}) + 3.0 * jnp.eye({n}), jnp.ones({a}.shape[:-1])[..., None], lower=True)[..., 0]",
        "jnp.linalg.eigvalsh({p})", "jnp.linalg.norm({a})", "jnp.linalg.matrix_power(0.3 * {a}, 3)", "jax.scipy.linalg.expm(0.1 * {a})",
        "jnp.linalg.svd({p}, compute_uv=False)", "lax.custom_linear_solve(lambda t: v @ v.T @ t + 2.0 * t, b, lambda f, r: jnp.linalg.solve(v @ v.T + 2.0 * jnp.eye(6), r), symmetric=True)",
        "jax.scipy.sparse.linalg.cg(lambda t: v @ (v.T @ t) + 3.0 * t, b, maxiter=4)[0]",
        "lax.custom_root(lambda t: t ** 3 + t - c, 0.0, lambda f, t: lax.fori_loop(0, 30, lambda _, t: t - f(t) / (3 * t ** 2 + 1), t), lambda g, y: y / g(1.0))",
    )).format(a=a, p=spd, n=n)  # fmt: skip


# ---------------------------------------------------------------- control flow


def body(m: Maker, shape: tuple[int, ...]) -> str:
    """An expression in ``t`` of a shape, which it keeps; it may use other names."""
    m.avals["t"] = jax.ShapeDtypeStruct(shape, jnp.float64)
    try:
        if m.number(0, 2) == 0:
            out = m.one(("jnp.tanh({a} + {b})", "0.5 * {a} * {b}", "jnp.tanh({a}) - {b}")).format(
                a="t", b=m.like("t")
            )
        elif shape[-1:] == (6,) and m.flag():
            out = m.one(("jnp.tanh(t @ v)", "jnp.sin(t @ s[0]) + t", "0.1 * (t @ w.T @ w)", "t @ s[1].T * 0.2", "lax.scan(lambda u, m: (jnp.tanh(u @ m), None), t, s)[0]"))  # fmt: skip
        else:
            out = elementwise(m, "t")
    finally:
        del m.avals["t"]
    return out


@operation(4)
def control(m: Maker) -> str | None:
    a = m.value()
    f, g = body(m, m.shape(a)), body(m, m.shape(a))
    p = m.value()
    forms = [
        "lax.scan(lambda t, _: ({f}, None), {a}, length=2)[0]", "lax.scan(lambda t, _: ({f}, t.sum()), {a}, length=3)[1]",
        "lax.fori_loop(0, 2, lambda _, t: jnp.tanh({f}), {a})", "lax.cond({p}.sum() > 0.1327, lambda t: {f}, lambda t: {g}, {a})",
        "lax.while_loop(lambda u: (u[1] < 3) & (jnp.abs(u[0]).sum() < 99.17), lambda u: ((lambda t: {f})(u[0]), u[1] + 1), ({a}, 0))[0]",
        "lax.switch(jnp.argmax(b + 0.01 * np.arange(6)) % 3, [lambda t: {f}, lambda t: {g}, lambda t: t], {a})",
        "lax.cond({p}.sum() > 0.1327, lambda: {a}, lambda: (lambda t: {g})({a}))", "jax.jit(lambda t: ({f}) * 0.5)({a})",
        "jax.checkpoint(lambda t: {f})({a})", "jax.grad(lambda t: jnp.tanh({f}).sum())({a})", "jax.jvp(lambda t: jnp.tanh({f}), ({a},), ({a},))[1]",
        "jax.vmap(lambda i: lax.switch(i, [lambda t: {f}, lambda t: {g}], {a}))(jnp.array([1, 0]))",
        "jax.grad(lambda t: lax.scan(lambda t, _: (jnp.tanh({f}), None), t, length=2)[0].sum())({a})",
        "lax.scan(lambda u, _: ((u[1], (lambda t: {f})(u[0])), None), ({a}, {a}), length=2)[0][1]",
        "lax.fori_loop(0, lax.select({p}.sum() > 0.1327, 2, 1), lambda _, t: jnp.tanh({f}), {a})",
        "jax.linearize(lambda t: jnp.tanh({f}), {a})[1]({a})", "jax.vmap(lambda q: jnp.tanh(q * ((lambda t: {f})({a}))))(jnp.array([0.5, 2.0]))",
    ]  # fmt: skip
    return m.one(forms).format(a=a, f=f, g=g, p=p)


@operation(3)
def mapped(m: Maker) -> str | None:
    """A scan, map or vmap over an axis of a value."""
    a = m.value(has_axes(1))
    i = m.axis(a)
    rest = tuple(n for j, n in enumerate(m.shape(a)) if j != i)
    f, g = body(m, rest), body(m, rest)
    return m.one((
        "jax.vmap(lambda t: {f}, {i}, {o})({a})", "lax.map(lambda t: {f}, {a})" if i == 0 else "jax.vmap(lambda t: {f}, {i})({a})",
        "lax.scan(lambda u, t: (jnp.tanh(u + ({f})), t.sum()), jnp.zeros({r}), jnp.moveaxis({a}, {i}, 0))[1]",
        "lax.scan(lambda u, t: (jnp.tanh(u + ({f})), None), jnp.zeros({r}), jnp.moveaxis({a}, {i}, 0), reverse=True)[0]",
        "jax.vmap(lambda t: lax.cond(t.sum() > 0.1327, lambda: {f}, lambda: {g}), {i})({a})",
        "jax.vmap(lambda t: lax.switch((t.sum() > 0.1327).astype(int), [lambda: {f}, lambda: {g}]), {i})({a})",
        "jax.vmap(lambda t: lax.while_loop(lambda u: (u[1] < 4) & (jnp.abs(u[0]).sum() > 0.9173), lambda u: (0.3 * jnp.tanh((lambda t: {f})(u[0])), u[1] + 1), (t, 0)), {i})({a})[0]",
        "jax.vmap(lambda t: lax.scan(lambda t, _: (jnp.tanh({f}), None), t, length=2)[0], {i})({a})",
        "jax.vmap(lambda t: lax.fori_loop(0, 2, lambda _, t: jnp.tanh({f}), t), {i})({a})",
        "jax.vmap(jax.grad(lambda t: jnp.tanh({f}).sum()), {i})({a})",
    )).format(a=a, i=i, o=m.number(0, len(rest)), f=f, g=g, r=rest)  # fmt: skip
