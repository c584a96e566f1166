"""Writes into perturbed matrices, and choices between them: nothing is built.

Unless a case says otherwise it runs under ``on_dense="error"``.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import cases, checked_in_float64, data, matrix, normal, run_case

from eggroll.interpret.interpreter import Context, interpret
from eggroll.values import FixedPoint, LowRank


@pytest.fixture(scope="module", autouse=True)
def float64():
    with checked_in_float64():
        yield


W, V, X = matrix(6, 5), matrix(6, 5, path="v", rank=3), data(3, 6)
STACK, OTHER = matrix(4, 6, 5, batch=(0,)), matrix(4, 6, 5, batch=(0,), path="v")
# As the factors of a transposed embedding lie.
TURNED = matrix(6, 5, columns=(0,), path="v")
ROW, COLUMN = data(5, name="row"), data(6, name="column")


def used(write):
    """What a write gives, in a product and in look-ups."""

    def fn(w, *rest):
        *more, x = rest
        out = write(w, *more)
        return x @ out, out[jnp.array([0, 3, 5])], jnp.tanh(out[2])

    return fn


def slice_update(w, u, at=(1, 0)):
    return lax.dynamic_update_slice(w, u, at)


@cases(
    ("a row", used(lambda w: w.at[0].set(0.0)), W, X),
    ("a row of its own numbers", used(lambda w, row: w.at[2].set(row)), W, ROW, X),
    ("the last row", used(lambda w: w.at[-1].set(1.0)), W, X),
    ("rows", used(lambda w: w.at[jnp.array([1, 4])].set(0.5)), W, X),
    ("rows more than once", used(lambda w: w.at[jnp.array([1, 4, 1])].set(0.5)), W, X),
    ("rows beyond the end", used(lambda w: w.at[jnp.array([1, 9])].set(0.5)), W, X),
    ("rows, clipped", used(lambda w: w.at[jnp.array([1, 9])].set(0.5, mode="clip")), W, X),
    ("a range of rows", used(lambda w: w.at[1:4].set(0.0)), W, X),
    ("every second row", used(lambda w: w.at[::2].set(0.0)), W, X),
    ("a column", used(lambda w, column: w.at[:, 1].set(column)), W, COLUMN, X),
    ("columns", used(lambda w: w.at[:, jnp.array([1, 3])].set(0.0)), W, X),
    ("an entry", used(lambda w: w.at[2, 3].set(0.0)), W, X),
    ("an entry beyond the end", used(lambda w: w.at[2, 9].set(0.0)), W, X),
    ("a block", used(lambda w: w.at[1:3, 2:4].set(1.5)), W, X),
    ("part of a row", used(lambda w: w.at[1, 2:].set(1.5)), W, X),
    ("all of it", used(lambda w: w.at[:].set(1.5)), W, X),
    ("by a row of another", used(lambda w, v: w.at[0].set(v[1])), W, V, X),
    ("by rows of another", used(lambda w, v: w.at[jnp.array([0, 2])].set(v[1:3])), W, V, X),
    ("by rows of itself", used(lambda w: w.at[jnp.array([0, 2])].set(w[1:3] * 0.5)), W, X),
    ("by a column of another", used(lambda w, v: w.at[:, 0].set(v[:, 1])), W, V, X),
    ("by rows of another form", used(lambda w, v: w.at[1:3].set(v[1:3])), W, TURNED, X),
    ("by a block of another", used(lambda w, v: w.at[1:3, 1:3].set(v[:2, :2])), W, V, X),
    ("into an array", used(lambda w: jnp.ones((6, 5)).at[1:4].set(w[:3])), W, X),
    ("a slice", used(lambda w: slice_update(w, jnp.zeros((2, 5)))), W, X),
    ("a slice beyond the end", used(lambda w: slice_update(w, jnp.zeros((2, 5)), (7, 1))), W, X),
    ("a slice of columns", used(lambda w: slice_update(w, jnp.ones((6, 2)), (0, 2))), W, X),
    ("a slice of both", used(lambda w: slice_update(w, jnp.ones((2, 2)))), W, X),
    ("a slice by another", used(lambda w, v: slice_update(w, v[:2])), W, V, X),
    ("a slice of an array", used(lambda w: slice_update(jnp.ones((6, 5)), w[:2])), W, X),
    ("a slice at a place that is computed", used(lambda w, x: slice_update(
        w, jnp.zeros((1, 5)), (jnp.argmax(x[0]), 0))), W, X, X),
    ("sums", used(lambda w: w.at[0].add(1.5)), W, X),
    ("sums more than once", used(lambda w, row: w.at[jnp.array([1, 4, 1])].add(row)), W, ROW, X),
    ("sums with another", used(lambda w, v: w.at[jnp.array([1, 4, 1])].add(v[:3])), W, V, X),
    ("differences", used(lambda w, v: w.at[jnp.array([1, 4, 1])].subtract(1.5)), W, V, X),
    ("sums of segments", lambda w, x: x[:, :3] @ jax.ops.segment_sum(w, np.array([0, 2, 1, 0, 2, 2]), 3), W, X),
    ("multiples", used(lambda w: w.at[0].multiply(0.5)), W, X),
    ("multiples more than once", used(lambda w: w.at[jnp.array([1, 1, 2])].multiply(0.5)), W, X),
    ("multiples of an entry's column", used(lambda w, column: w.at[:, 1].multiply(column)), W, COLUMN, X),
    ("into the corner of an array", used(lambda w: jnp.zeros((9, 7)).at[:6, :5].set(w)[:6, :5]), W, X),
    ("into the middle of an array", used(lambda w: jnp.zeros((9, 7)).at[2:8, 1:6].set(w)[1:7, :5]), W, X),
    ("many ranks", used(lambda w: w.at[0].set(0.0)), matrix(6, 5, rank=9), X),
    ("layers", lambda s, x: x @ s.at[1].set(0.0), STACK, X),
    ("a layer by another", lambda s, v, x: x @ s.at[1].set(v[0]), STACK, OTHER, X),
    ("rows of layers", lambda s, x: x @ s.at[:, 1:3].set(0.0), STACK, X),
    ("a row of each layer", lambda s, x: x @ jax.vmap(lambda w, i: w.at[i].set(0.0))(s, jnp.arange(4)), STACK, X),
    ("a row of each layer by a row", lambda s, x: x @ jax.vmap(
        lambda w, i: w.at[0].set(w[i]))(s, jnp.arange(4)), STACK, X),
    ("a row of each member's own", used(lambda w, x: w.at[1].set(jnp.sin(x[0] @ w))), W, X, X),
    ("a column of each member's own", used(lambda w, x: w.at[:, 1].set(jnp.sin(w @ x[0, :5]))), W, X, X),
    ("a number of each member's own", used(lambda w, x: w.at[2, 3].set(jnp.sin(x[0] @ w[:, 0]))), W, X, X),
    ("rows by a number of each member's own", used(
        lambda w, x: w.at[jnp.array([1, 3, 1])].add(jnp.sin(x[0] @ w[:, 0]))), W, X, X),
    ("gradient of what was written", lambda w, x: jax.grad(
        lambda x: jnp.sin(x @ w.at[0].set(0.0)).sum())(x), W, X),
)  # fmt: skip
def test_write(fn, makers):
    run_case(fn, makers)


@cases(
    ("the larger", lambda w, x: x @ w.at[0].max(0.5), W, X),
    ("a function of a row", lambda w, x: x @ w.at[0].apply(jnp.tanh), W, X),
    ("a multiple of another", lambda w, x: x @ w.at[0].multiply(w[1]), W, X),
    ("rows and columns at several places", lambda w, x: x @ w.at[jnp.array([1, 2]), jnp.array([0, 3])].set(0.0), W, X),
    ("rows of each member's own", lambda w, x: x @ w.at[:3].set(jnp.sin(x @ w)), W, X),
)  # fmt: skip
def test_a_write_without_a_thin_form_is_built(fn, makers):
    (primitives,) = run_case(fn, makers, on_dense="ignore").values()
    assert primitives and all(name.startswith("scatter") for name in primitives)


def test_a_write_into_data_is_not_reported():
    fn = lambda e, x: x[:, :4] @ e[jnp.array([3, 1, 3, 0])].at[0].set(0.0)
    assert run_case(fn, (W, X)) == {}


def fixed_point(*shape, name="w"):
    """A perturbed int8 matrix with int8 noise."""
    whole = lambda size, part: jnp.asarray(np.rint(20 * normal(size, name + part)), jnp.int8)
    rows, columns = (2, shape[0], 1), (2, 1, shape[1])
    factors = whole(rows, "a"), whole(columns, "b")
    return LowRank(whole(shape, ""), factors, jnp.int32(1), (name,), arithmetic=FixedPoint(6))


@pytest.mark.parametrize(
    "write",
    [
        lambda w, v: w.at[0].set(0),
        lambda w, v: w.at[jnp.array([0, 2, 0])].set(v[1]),
        lambda w, v: w.at[1:3, 1:4].set(jnp.int8(7)),
        lambda w, v: lax.dynamic_update_slice(w, v[:2], (3, 0)),
        lambda w, v: jnp.where(jnp.arange(6)[:, None] > 2, w, v),
        lambda w, v: jnp.where(jnp.arange(6)[:, None] > 2, w, jnp.zeros_like(w)),
    ],
)
def test_writes_into_perturbed_integers_are_exact(write):
    w, v = fixed_point(6, 5), fixed_point(6, 5, name="v")
    x = jnp.asarray(np.rint(30 * normal((3, 6))), jnp.int8)
    dims = (((1,), (0,)), ((), ()))
    product = lambda m: lax.dot_general(x, m, dims, preferred_element_type=jnp.int32)
    noise = [math.prod(f.astype(jnp.int32) for f in m.factors).sum(0) for m in (w, v)]
    # A write is the sum of what it does to the noise and of what it does to zeros.
    of_noise = write(*noise) - write(*(0 * n for n in noise))
    shifted = (x.astype(jnp.int32) @ of_noise) >> w.arithmetic.shift
    assert jnp.any(shifted != 0)
    for sign in (1, -1):
        signed = [m.replace(scale=jnp.int32(sign)) for m in (w, v)]
        got = interpret(lambda w, v: product(write(w, v)), Context("error"))(*signed)
        np.testing.assert_array_equal(got, product(write(w.w, v.w)) + sign * shifted)


# ---------------------------------------------------------------- choices


def by_row(w, v, x):
    """A matrix for each row of data, chosen by the data."""
    choose = lambda row: lax.cond(row[0] > 0, lambda: w, lambda: v)
    return jax.vmap(lambda row: row @ choose(row))(x)


def switched(s, x):
    branches = [lambda a, i=i: jnp.tanh(a @ s[i]) for i in range(4)]
    return jax.vmap(lambda a, i: lax.switch(i, branches, a))(x, jnp.array([0, 2, 3]))


@cases(
    ("cond by row", lambda w, v, x: jax.vmap(
        lambda a: lax.cond(a.sum() > 0, lambda a: a @ w, lambda a: jnp.sin(a @ v), a))(x), W, V, X),
    ("switch by row", switched, STACK, X),
    ("cond by each member's rows", lambda w, v, x: jax.vmap(
        lambda a: lax.cond((a @ w).sum() > 0, lambda a: a @ w, lambda a: jnp.sin(a @ v), a))(x), W, V, X),
    ("a matrix by row", by_row, W, V, X),
    ("a matrix by row, and transposed", by_row, W, TURNED, X),
    ("a matrix or an array by row", lambda w, x: by_row(w, jnp.ones((6, 5)), x), W, X),
    ("by one predicate", lambda w, v, x: x @ jnp.where(x.sum() > 0, w, v), W, V, X),
    ("by one predicate, of other ranks and forms", lambda w, v, x: x @ jnp.where(x.sum() > 0, w, v), W, TURNED, X),
    ("a layer or another", lambda s, x: x @ jnp.where(x.sum() > 0, s[0], s[1]), STACK, X),
    ("an array or a matrix", lambda w, x: x @ jnp.where(x.sum() > 0, 0.5, w), W, X),
    ("of three", lambda w, v, x: x @ lax.select_n(jnp.argmax(x[0]) % 3, w, v, 0.5 * jnp.ones((6, 5))), W, V, X),
    ("by rows of the matrix", lambda w, v, x: x @ jnp.where(jnp.arange(6)[:, None] > 2, w, v), W, V, X),
    ("by columns of the matrix", lambda w, x: x @ jnp.where(jnp.arange(5) > 2, w, 0.0), W, X),
    ("by layers", lambda s, v, x: x @ jnp.where(jnp.arange(4)[:, None, None] % 2 > 0, s, v), STACK, OTHER, X),
    ("a matrix or itself", lambda w, x: x @ jnp.where(x[0, 0] > 0, w, lax.stop_gradient(w)), W, X),
)  # fmt: skip
def test_choice(fn, makers):
    run_case(fn, makers)


def test_a_choice_by_each_member_is_built():
    fn = lambda w, v, x: x @ jnp.where((x @ w).sum() > 0, w, v)
    assert run_case(fn, (W, V, X), on_dense="ignore") == {"w": ["select_n"], "v": ["select_n"]}


@pytest.mark.parametrize(
    "mode", [jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise")]
)
def test_writes_choices_and_experts_add_no_promotion_of_their_own(mode):
    def fn(w, s, x):
        sizes = jnp.array([2, 0, 1, 0], jnp.int32)
        row = jnp.sin(x[0] @ w)
        written = w.at[1].set(row).at[2:4, 1:3].set(0.5).at[:, 1].multiply(x[1])
        chosen = jnp.where(x.sum() > 0, written, w)
        return x @ chosen, lax.ragged_dot(x, s, sizes)

    args = [v.replace(scale=v.scale.astype(jnp.float64)) for v in (W(), STACK())]
    with mode:
        jax.eval_shape(lambda x: interpret(fn, Context("error"))(*args, x), jnp.asarray(X()))
