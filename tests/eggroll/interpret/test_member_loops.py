"""What JAX cannot vmap over the members: loops with a warning, bodies that are entered, experts."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.custom_derivatives import linear_call
from jax.experimental.custom_partitioning import custom_partitioning
from support import built, cases, checked_in_float64, close, data, matrix, normal

from eggroll import EvolutionStrategy
from eggroll.interpret import Context, MemberLoopWarning, grouped, interpret
from eggroll.values import LowRank


@pytest.fixture(scope="module", autouse=True)
def float64():
    with checked_in_float64():
        yield


W, X = matrix(5, 5), data(6, 5)


def run_each(fn, makers, on_dense="error"):
    """As ``run_case``, but what is compared with is not mapped by ``jax.vmap``."""
    args = [make() for make in makers]
    context = Context(on_dense)

    def signed(sign):
        return [a.replace(scale=sign * a.scale) if isinstance(a, LowRank) else a for a in args]

    signs = jnp.array([1.0, -1.0])
    got = jax.jit(jax.vmap(lambda sign: interpret(fn, context)(*signed(sign))))(signs)
    expected = [fn(*map(built, signed(sign))) for sign in signs]
    close(got, jax.tree.map(lambda *x: jnp.stack(x), *expected))
    return context.built


def on_host(x):
    """A function of NumPy that JAX knows nothing of."""
    return jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def folded(x):
    """A window reduction by an operation without a name, from a start of each member's own."""
    return lax.reduce_window(
        x, jnp.sin(x[0, 0]), lambda a, b: a * b + a + b, (2, 2), (1, 1), "VALID"
    )


LOOPED = (
    ("a callback", lambda w, x: on_host(x @ w), W, X),
    ("a callback on noise alone", lambda w, x: on_host(w[0].sum()), W, X),
    ("a callback in a scan", lambda w, x: lax.scan(lambda x, _: (on_host(x @ w), None), x, length=2)[0], W, X),
    ("a callback in a scan of data", lambda w, x: lax.scan(lambda x, _: (on_host(x), None), x @ w, length=2)[0], W, X),
    ("a callback in a branch", lambda w, x: lax.cond(x[0, 0] > 0, on_host, jnp.sin, x @ w), W, X),
    ("a callback in a branch of a loop", lambda w, x: lax.fori_loop(
        0, 2, lambda i, x: lax.cond(i > 0, on_host, jnp.sin, x), x @ w), W, X),
    ("a callback in a while", lambda w, x: lax.while_loop(
        lambda c: c[1] < 2, lambda c: (jax.jit(on_host)(c[0]), c[1] + 1), (x @ w, 0))[0], W, X),
    ("a nameless window reduction", lambda w, x: folded(x @ w), W, X),
)  # fmt: skip


@cases(*LOOPED)
def test_what_jax_cannot_vmap_runs_in_a_loop(fn, makers):
    with pytest.warns(MemberLoopWarning, match="one member of the population after the other"):
        run_each(fn, makers)


def test_the_warning_names_the_primitive_and_the_remedy():
    with pytest.warns(MemberLoopWarning, match="'pure_callback'.*vmap_method") as caught:
        run_each(lambda w, x: on_host(x @ w), (W, X))
    assert len(caught) == 1


def test_a_callback_that_can_be_vmapped_is():
    fn = lambda x: jax.pure_callback(np.tanh, x, x, vmap_method="expand_dims")
    run_each(lambda w, x: fn(x @ w), (W, X))


def test_a_population_runs_what_jax_cannot_vmap():
    params = {"w": jnp.asarray(normal((5, 5)), jnp.float32), "b": jnp.ones(5, jnp.float32)}
    es = EvolutionStrategy(optimizer=optax.sgd(0.1), population=6, sigma=0.1, chunk=4)
    state = es.init(params, 0)
    fn = lambda p, key, x: on_host(x @ p["w"] + p["b"])
    x = jnp.asarray(normal((3, 5)), jnp.float32)
    with pytest.warns(MemberLoopWarning):
        got = es.map(state, fn, x)
    expected = jnp.stack([fn(es.member(state, i), None, x) for i in range(6)])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- bodies


def solve(matvec, b):
    """Richardson's iteration, which is declared as the solver of a linear system."""
    step = lambda mv, x: x + 0.1 * (b - mv(x))
    solver = lambda mv, b: lax.fori_loop(0, 20, lambda _, x: step(mv, x), b * 0)
    return lax.custom_linear_solve(matvec, b, solver, solver)


def partitioned(w, x):
    fn = custom_partitioning(lambda x, w: jnp.tanh(x @ w))
    fn.def_partition(
        partition=lambda *_: None,
        infer_sharding_from_operands=lambda *_: None,
        sharding_rule="i j, j k -> i k",
    )
    return fn(x, w)


def composite(w, x):
    return lax.composite(lambda x, w: jnp.tanh(x @ w), "example.layer", version=1)(x, w)


def transposable(w, x):
    return linear_call(lambda w, x: x @ w, lambda w, ct: ct @ w.T, w, x)


@jax.custom_vjp
def saves_less(x, w):
    return jnp.sin(x @ w)


saves_less.defvjp(
    lambda x, w: (jnp.sin(x @ w), (x, w)),
    lambda kept, g: (g @ kept[1].T, kept[0].T @ g),
    optimize_remat=True,
)


@cases(
    ("a linear solve", lambda w, x: solve(lambda v: w @ v + 5 * v, x[0]), W, X),
    ("a linear solve, vmapped", lambda w, x: jax.vmap(lambda b: solve(lambda v: w @ v + 5 * v, b))(x), W, X),
    ("the gradient of a linear solve", lambda w, x: jax.grad(
        lambda b: jnp.sin(solve(lambda v: w @ v + 5 * v, b)).sum())(x[0]), W, X),
    ("conjugate gradients", lambda w, x: jax.scipy.sparse.linalg.cg(
        lambda v: w.T @ (w @ v) + v, x[0], maxiter=3)[0], W, X),
    ("a composite", composite, W, X),
    ("a composite in a scan of data", lambda w, x: lax.scan(
        lambda x, _: (lax.composite(jnp.tanh, "example.tanh")(x), None), x @ w, length=2)[0], W, X),
    ("a custom partitioning", partitioned, W, X),
    ("a linear call", transposable, W, X),
    ("the gradient of a linear call", lambda w, x: jax.grad(lambda x: jnp.sin(transposable(w, x)).sum())(x), W, X),
    ("a custom gradient that saves less", lambda w, x: saves_less(x, w), W, X),
    ("the gradient of one", lambda w, x: jax.grad(lambda x: saves_less(x, w).sum())(x), W, X),
)  # fmt: skip
def test_bodies_are_entered(fn, makers):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_each(fn, makers)


# ---------------------------------------------------------------- experts

EXPERTS, ROWS = matrix(3, 5, 4, batch=(0,)), data(6, 5)
SIZES = jnp.array([2, 1, 3])


def experts(sizes=SIZES):
    return lambda w, x: lax.ragged_dot(x, w, jnp.asarray(sizes))


def own_sizes(x):
    """How many rows each of three experts gets, by what is in the rows."""
    return jnp.bincount(jnp.argmax(x[:, :3], 1), length=3)


def turned(w, x):
    numbers = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
    return lax.ragged_dot_general(x, jnp.swapaxes(w, 1, 2), SIZES, numbers)


@cases(
    ("of data", experts(), EXPERTS, ROWS),
    ("with an expert of no rows", experts([2, 0, 4]), EXPERTS, ROWS),
    ("with rows that are left", experts([2, 0, 1]), EXPERTS, ROWS),
    ("of many ranks", experts(), matrix(3, 5, 4, batch=(0,), rank=9), ROWS),
    ("of shared rows", experts(), matrix(3, 5, 4, columns=(2,)), ROWS),
    ("of shared columns", experts(), matrix(3, 5, 4, columns=(0, 2)), ROWS),
    ("of each member's data", lambda w, v, x: experts()(w, jnp.tanh(x @ v)), EXPERTS, W, ROWS),
    ("of each member's groups", lambda w, v, x: experts(own_sizes(x @ v))(w, jnp.sin(x)), EXPERTS, W, ROWS),
    ("of each member's groups, and rows left", lambda w, v, x: experts(own_sizes(x[1:] @ v))(w, x @ v),
     EXPERTS, W, ROWS),
    ("with gains of the experts", lambda w, x: experts()(w * jnp.sin(w[:, :1, :1]), x), EXPERTS, ROWS),
    ("with gains of the rows", lambda w, x: experts()(w * x[0, :, None], x), EXPERTS, ROWS),
    ("with gains of the columns", lambda w, x: experts()(w * x[0, :4], x), EXPERTS, ROWS),
    ("transposed", turned, EXPERTS, ROWS),
    ("looked up", lambda w, x: experts()(w[jnp.array([2, 0, 2])], x), EXPERTS, ROWS),
    ("in a scan", lambda w, x: lax.scan(
        lambda x, _: (jnp.pad(jnp.tanh(experts()(w, x)), ((0, 0), (0, 1))), None), x, length=2)[0], EXPERTS, ROWS),
    ("in a scan, of data alone", lambda v, x: lax.scan(
        lambda x, _: (jnp.tanh(experts()(jnp.ones((3, 5, 5)), x)), None), x @ v, length=2)[0], W, ROWS),
    ("by each member's own arrays", lambda v, x: experts(own_sizes(x[:4] @ v))(
        jnp.sin(v[:3, :, None] * v[:3, None, :4]), x), W, ROWS),
    ("the gradient of data", lambda w, x: jax.grad(lambda x: jnp.sin(experts()(w, x)).sum())(x), EXPERTS, ROWS),
    ("a mixture", lambda w, v, x: mixture(w, v, x), EXPERTS, W, ROWS),
)  # fmt: skip
def test_experts(fn, makers):
    run_each(fn, makers, on_dense="error" if makers[0] is not W else "ignore")


def mixture(w, v, x):
    """Rows go to the expert that the router likes best, and back."""
    scores = jax.nn.softmax(x @ v[:, :3])
    best = jnp.argmax(scores, 1)
    order = jnp.argsort(best)
    y = lax.ragged_dot(x[order], w, jnp.bincount(best, length=3))
    return jnp.zeros_like(y).at[order].set(y) * scores.max(1, keepdims=True)


@pytest.mark.parametrize("mapped", [(x, w, s) for x in (0, 1) for w in (0, 1) for s in (0, 1)])
def test_a_grouped_product_maps_over_any_operands(mapped):
    x, w = jnp.asarray(normal((3, 6, 5))), jnp.asarray(normal((3, 3, 5, 4), "w"))
    sizes = jnp.array([[2, 1, 3], [0, 4, 1], [0, 0, 0]])
    operands = [a if own else a[1] for a, own in zip((x, w, sizes), mapped, strict=True)]
    axes = [0 if own else None for own in mapped]
    fn = lambda x, w, sizes: grouped.product(x, w, sizes, jnp.float64, None)
    got = jax.vmap(fn, axes, axis_size=3)(*operands)
    each = lambda i: [a[i] if own else a for a, own in zip(operands, mapped, strict=True)]
    expected = jnp.stack([lax.ragged_dot(*each(i)) for i in range(3)])
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_experts_runs_in_a_loop():
    fn = lambda w, x: jax.grad(lambda w: jnp.sin(experts()(w, x)).sum())(w)
    with pytest.warns(MemberLoopWarning, match="ragged_dot_general"):
        run_each(fn, (EXPERTS, ROWS), on_dense="ignore")
