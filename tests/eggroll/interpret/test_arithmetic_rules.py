"""Sums, squares, norms, masks and multiples of perturbed values: right, and nothing built.

Every case runs with arrays that members share or with arrays of each member's own, and the traced
program is searched for arrays as large as the matrix that each member has.
"""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from support import (
    agree,
    cases,
    checked_in_float64,
    data,
    largest_of_a_member,
    low_rank,
    matrix,
    normal,
    run_case,
)

from eggroll.interpret.interpreter import Context, interpret
from eggroll.values.lowrank import LowRank, Upcast, build


@pytest.fixture(scope="module", autouse=True)
def float64():
    with checked_in_float64():
        yield


# 11 x 13: no other array of these programs has as many entries.
W, V = matrix(11, 13), matrix(11, 13, path="v", rank=3)
X, ROW, COLUMN = data(2, 11), data(13, name="row"), data(11, 1, name="column")
WHOLE = data(11, 13, name="whole")
KERNEL, IMAGE = matrix(3, 3, 4, 6), data(1, 4, 3, 4)
HEADS = matrix(11, 2, 7, columns=(1, 2))
MASK = normal((11, 13), "mask") > 0
ROWS = np.arange(11)[:, None] > 4


def conv(w, x):
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def unit(w, axis, eps=0.0):
    return w / jnp.sqrt((w**2).sum(axis, keepdims=True) + eps)


def standard(w, axis):
    return (w - w.mean(axis, keepdims=True)) / (w.std(axis, keepdims=True) + 1e-5)


NORMS = cases(
    ("sum of squares of columns", lambda w: (w**2).sum(0), W),
    ("of rows", lambda w: jnp.square(w).sum(1), W),
    ("of all", lambda w: jnp.linalg.norm(w), W),
    ("float power", lambda w: (w**2.0).sum(0), W),
    ("times itself", lambda w: (w * w).sum((0, 1)), W),
    ("of many ranks", lambda w: (w * w).sum(0), matrix(11, 13, rank=9)),
    ("two matrices", lambda w, v: (w * v).sum(0), W, V),
    ("two matrices, as a product", lambda w, v: jnp.einsum("ij,ij->j", w, v), W, V),
    ("turned", lambda w, v: jnp.einsum("ij,ji->i", w, v.T), W, V),
    ("vdot", lambda w: jnp.vdot(w, w), W),
    ("vdot of two", lambda w, v: jnp.vdot(w, v), W, V),
    ("vdot with an array", lambda w, y: jnp.vdot(w, y), W, WHOLE),
    ("flat norm", lambda w: jnp.linalg.norm(w.ravel()), W),
    ("flat, and back", lambda w, x: x @ w.ravel().reshape(11, 13), W, X),
    ("mean of squares of a transpose", lambda w: (w**2).T.mean(0), W),
    ("a slice of squares", lambda w: (w**2)[2:5].sum(0), W),
    ("squares of a stack", lambda s: (s**2).sum((1, 2)), matrix(3, 11, 13, batch=(0,))),
    ("norm of each of a stack", lambda s: jax.vmap(jnp.linalg.norm)(s), matrix(3, 11, 13, batch=(0,))),
    ("vdot of each of a stack", lambda s: jax.vmap(jnp.vdot)(s, s), matrix(3, 11, 13, batch=(0,))),
    ("rows' norms by vmap", lambda w: jax.vmap(jnp.linalg.norm)(w), W),
    ("times a row", lambda w, y: ((w * y) ** 2).sum(1), W, ROW),
    ("times a row, over rows", lambda w, y: ((w * y) ** 2).sum(0), W, ROW),
    ("weighted squares", lambda w, y: (w**2 * y).sum(0), W, COLUMN),
    ("negated", lambda w: -(w**2).sum(0) - (-(w**2)).sum(1)[0], W),
    ("difference of two", lambda w, v: (w**2 - v**2).sum(0), W, V),
    ("all parameters", lambda w, v: jnp.sqrt(sum((x.real**2 + x.imag**2).sum() for x in (w, v))), W, V),
    ("squared difference", lambda w, y: ((w - y) ** 2).mean(), W, ROW),
    ("weight norm of columns", lambda w, x: x @ unit(w, 0), W, X),
    ("weight norm of rows", lambda w, x: x @ unit(w, 1, 1e-6), W, X),
    ("weight norm of all", lambda w, x: x @ unit(w, (0, 1)), W, X),
    ("weight norm, with a gain", lambda w, g, x: x @ (g * unit(w, 0)), W, ROW, X),
    ("weight norm by rsqrt", lambda w, x: x @ (w * lax.rsqrt((w * w).sum(0) + 1e-6)), W, X),
    ("weight norm by max", lambda w, x: x @ (w / jnp.maximum(jnp.linalg.norm(w, axis=0), 1e-3)), W, X),
    ("weight norm of a kernel", lambda w, x: conv(unit(w, (0, 1, 2)), x), KERNEL, IMAGE),
    ("weight norm, normed again", lambda w, x: x @ unit(unit(w, 0), 1), W, X),
    ("weight norm of a stack", lambda s, x: lax.scan(lambda c, w: (c @ unit(w, 0), None), x, s)[0],
     matrix(3, 11, 11, batch=(0,)), X),
    ("cosine", lambda w, x: unit(x, 1) @ unit(w, 0), W, X),
)  # fmt: skip


@NORMS
@pytest.mark.parametrize("own", [False, True])
def test_norms(fn, makers, own):
    run_case(fn, makers, own=own)


OWN_REDUCTIONS = cases(
    ("less its column means", lambda w, x: x @ (w - w.mean(0)), W, X),
    ("less its row means", lambda w, x: x @ (w - w.mean(1, keepdims=True)), W, X),
    ("less both", lambda w, x: x @ (w - w.mean(0) - w.mean(1, keepdims=True) + w.mean()), W, X),
    ("its means less it", lambda w, x: x @ (w.mean(0) - w), W, X),
    ("plus its own sum", lambda w, x: x @ (w + w.sum()), W, X),
    ("over its own sum", lambda w, x: x @ (w / w.sum()), W, X),
    ("times its own mean", lambda w, x: x @ (w * w.mean(0)), W, X),
    ("standardised", lambda w, x: x @ standard(w, 0), W, X),
    ("standardised rows", lambda w, x: x @ standard(w, 1), W, X),
    ("standardised kernel", lambda w, x: conv(standard(w, (0, 1, 2)), x), KERNEL, IMAGE),
    ("standardised, with a gain", lambda w, g, x: x @ (standard(w, 0) * g), W, ROW, X),
    ("plus the mean of another", lambda w, v, x: x @ (w + v.mean(0)), W, V, X),
    ("sum of its scaled rows", lambda w, g: (w * g).sum(0), W, COLUMN),
    ("sum of its scaled columns", lambda w, g: (w * g).sum(0), W, ROW),
    ("sum of its scaled columns, over them", lambda w, g: (w * g).sum(1), W, ROW),
    ("sum of heads", lambda w, x: x @ w.sum(2), HEADS, X),
    ("sum of a stack", lambda s, x: x @ s.sum(0), matrix(2, 11, 13, batch=(0,), rank=1), X),
)  # fmt: skip


@OWN_REDUCTIONS
@pytest.mark.parametrize("own", [False, True])
def test_a_value_and_its_own_reduction(fn, makers, own):
    run_case(fn, makers, own=own)


TERMS = cases(
    ("plus a row", lambda w, y, x: x @ (w + y), W, ROW, X),
    ("plus a column", lambda w, y, x: x @ (w + y), W, COLUMN, X),
    ("a row less it", lambda w, y, x: x @ (y - w), W, ROW, X),
    ("plus a row, twice, scaled", lambda w, y, x: x @ ((w + y) * 2.0 + y), W, ROW, X),
    ("plus a row, joined", lambda w, y, x: x @ jnp.concatenate([w + y, w], 1), W, ROW, X),
    ("plus a number", lambda w, x: x @ (w + x[0, 0]), W, X),
    ("times a row, plus a row", lambda w, x: x @ (w * np.arange(13.0) + np.ones(13)), W, X),
    ("heads plus a row", lambda w, y, x: jnp.einsum("bd,dhk->bhk", x, w + y), HEADS, data(2, 7), X),
    ("sum with columns against rows", lambda w, v, x: x @ (w + v.T), W, matrix(13, 11, path="v"), X),
    ("sum of other splits", lambda w, v, x: jnp.einsum("bd,dhk->bhk", x, w + v),
     matrix(11, 4, 7, columns=(1, 2)), matrix(11, 4, 7, path="v", rank=1), X),
    ("sum with a broadcast", lambda w, v, x: x @ (w + v), W, matrix(1, 13, path="v"), X),
)  # fmt: skip


@TERMS
@pytest.mark.parametrize("own", [False, True])
def test_added_terms(fn, makers, own):
    run_case(fn, makers, own=own)


MASKS = cases(
    ("mask", lambda w, x: x @ (w * MASK), W, X),
    ("mask, transposed", lambda w, y: y @ (w * MASK).T, W, data(2, 13)),
    ("mask of many ranks", lambda w, x: x[:1] @ (w * MASK), matrix(11, 13, rank=9), X),
    ("divided by an array", lambda w, x: x @ (w / np.where(MASK, 2.0, 3.0)), W, X),
    ("masked twice", lambda w, x: x @ ((w * MASK) * MASK[::-1]), W, X),
    ("mask, then a gain", lambda w, x: x @ (w * MASK * x[0][:, None]), W, X),
    ("mask, sliced", lambda w, x: x[:, :4] @ (w * MASK)[2:6, ::2], W, X),
    ("mask, looked up", lambda w, x: x @ (w * MASK)[:, np.array([3, 1, 1])], W, X),
    ("mask, padded and joined", lambda w, x: x @ jnp.concatenate([jnp.pad(w * MASK, ((0, 0), (1, 0))),
                                                                  w * MASK], 1), W, X),
    ("mask, plus", lambda w, v, x: x @ (w * MASK + v), W, matrix(11, 13, path="v"), X),
    ("mask, column means", lambda w, x: x @ (w * MASK - (w * MASK).mean(0)), W, X),
    ("mask, normed", lambda w, x: x @ unit(w * MASK, 0), W, X),
    ("lower triangle", lambda w, x: x @ jnp.tril(w), W, X),
    ("upper triangle of a stack", lambda s, x: jax.vmap(lambda w: x @ jnp.triu(w, 1))(s),
     matrix(3, 11, 13, batch=(0,)), X),
    ("where", lambda w, x: x @ jnp.where(MASK, w, 0.0), W, X),
    ("where not", lambda w, x: x @ jnp.where(MASK, 0.0, w), W, X),
    ("where, otherwise a number", lambda w, x: x @ jnp.where(MASK, w, -2.0), W, X),
    ("where, otherwise an array", lambda w, x: x @ jnp.where(MASK, w, np.cos(MASK)), W, X),
    ("where by row", lambda w, x: x @ jnp.where(ROWS, w, 0.0), W, X),
    ("where by column", lambda w, x: x @ jnp.where(np.arange(13) > 5, w, 1.0), W, X),
    ("where of a scaled one", lambda w, x: x @ jnp.where(ROWS, w * np.arange(13.0), 0.0), W, X),
    ("kernel", lambda w, x: conv(w * (normal((3, 3, 4, 6)) > 0), x), KERNEL, IMAGE),
    ("large kernel", lambda w, x: conv(w * (normal((9, 9, 4, 6)) > 0), x), matrix(9, 9, 4, 6), IMAGE),
    ("in a loop", lambda w, x: lax.scan(lambda c, _: (c @ jnp.tril(w), None), x, length=2)[0],
     matrix(11, 11), X),
)  # fmt: skip


@MASKS
def test_masks_that_members_share(fn, makers):
    run_case(fn, makers)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("table", [NORMS, OWN_REDUCTIONS, TERMS, MASKS])
def test_no_member_has_an_array_as_large_as_the_matrix(table, own):
    for case in table.args[1]:
        fn, makers = case.values
        if own and table is MASKS:
            continue
        size = makers[0]().w.size
        if own and any(
            isinstance(arg, np.ndarray) and arg.size >= size for arg in (make() for make in makers)
        ):
            continue  # data as large as the matrix, which each member has
        assert largest_of_a_member(fn, makers, own) < size, case.id


# ---------------------------------------------------------------- models


def linen_model(key, x):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.WeightNorm(nn.Dense(13))(x)
            return nn.WeightNorm(nn.Dense(5), use_scale=False, feature_axes=None)(jnp.tanh(x))

    params = Model().init(key, x)
    return params, lambda params, x: Model().apply(params, x)


def nnx_model(key, x):
    model = nnx.WeightNorm(nnx.Linear(11, 13, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return params, lambda params, x: nnx.merge(graph, params, rest)(x)


def equinox_model(key, x):
    model = eqx.nn.WeightNorm(eqx.nn.Linear(11, 13, key=key))
    params, rest = eqx.partition(model, eqx.is_array)
    return params, lambda params, x: jax.vmap(eqx.combine(params, rest))(x)


def equinox_convolution(key, x):
    model = eqx.nn.WeightNorm(eqx.nn.Conv1d(4, 7, 3, key=key))
    params, rest = eqx.partition(model, eqx.is_array)
    return params, lambda params, x: eqx.combine(params, rest)(x.reshape(-1)[:20].reshape(4, 5))


@pytest.mark.parametrize("model", [linen_model, nnx_model, equinox_model, equinox_convolution])
def test_weight_norm_of_libraries_builds_nothing(model):
    x = jnp.asarray(X())
    params, fn = model(jax.random.key(0), x)

    def perturbed(path, leaf):
        name = jax.tree_util.keystr(path)
        return low_rank(leaf.shape, path=name) if leaf.ndim > 1 else leaf.astype(float)

    params = jax.tree_util.tree_map_with_path(perturbed, params)
    leaves, tree = jax.tree.flatten(params, is_leaf=lambda v: isinstance(v, LowRank))
    run = lambda *args: fn(jax.tree.unflatten(tree, args[:-1]), args[-1])
    assert agree(run, *leaves, x) == {}


# ---------------------------------------------------------------- reductions of any kind


REDUCTIONS = {
    "sum": jnp.sum,
    "mean": jnp.mean,
    "var": jnp.var,
    "norm": lambda x, axis: jnp.sqrt((x * x).sum(axis)),
    "max": jnp.max,
    "prod": jnp.prod,
    "any": lambda x, axis: (x > 0).any(axis),
    "argmin": lambda x, axis: x.argmin(axis[0] if axis else None),
    "cumsum": lambda x, axis: jnp.cumsum(x, axis[0] if axis else None),
}
COMBINATIONS = {
    "add": jnp.add,
    "from": lambda a, b: b - a,
    "mul": jnp.multiply,
    "over": lambda a, b: a / (3 + b**2),
    "under": lambda a, b: b / (3 + a * a),
    "max": jnp.maximum,
    "where": lambda a, b: jnp.where(b > 0, a, 0.5),
    "product": lambda a, b: jnp.tensordot(jnp.asarray(a, b.dtype), b, 0),
}


@st.composite
def reductions(draw):
    """A reduction of a value of any form, before it a gain or a look-up, and after it an array."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    split = [draw(st.sampled_from("rcb")) for _ in shape]
    columns, batch = ([a for a, s in enumerate(split) if s == side] for side in "cb")
    value = matrix(*shape, columns=columns, batch=batch, rank=draw(st.sampled_from([1, 2, 9])))
    axes = tuple(draw(st.lists(st.integers(0, len(shape) - 1), unique=True, min_size=1)))
    before = draw(st.sampled_from(["nothing", "gain", "rows", "mask"]))
    reduce, combine = (
        draw(st.sampled_from(list(REDUCTIONS))),
        draw(st.sampled_from(list(COMBINATIONS))),
    )
    gain = normal([n if draw(st.booleans()) else 1 for n in shape], "gain")
    other = draw(st.sampled_from([(), (7,)]))

    def fn(w, gain, y):
        if before == "gain":
            w = w * gain
        if before == "rows":
            w = w[np.array([0, shape[0] - 1, 0])]
        if before == "mask":
            w = w * normal(shape, "mask")
        out = REDUCTIONS[reduce](w, axis=axes)
        out = out if out.ndim == 0 or not other else out.reshape(-1)[:1]
        return COMBINATIONS[combine](out, y)

    return fn, value, gain, normal(other, "y")


@given(reductions(), st.booleans())
def test_any_reduction_combined_with_anything(case, own):
    fn, make, gain, y = case
    agree(fn, make(), gain, y, on_dense="ignore", own=own)


@pytest.mark.parametrize("reduce", [jnp.sum, jnp.mean, lambda w: (w * w).sum(), lambda w: w[0, 0]])
@pytest.mark.parametrize("combine", list(COMBINATIONS))
def test_a_number_made_of_a_matrix_combines_with_any_array(reduce, combine):
    w = low_rank((11, 13))
    fn = lambda w, y: COMBINATIONS[combine](reduce(w), y)
    assert agree(fn, w, np.arange(7.0)) == {}


# ---------------------------------------------------------------- tables added to data


@cases(
    ("positions", lambda e, x: jnp.sin(x + e), matrix(5, 8), data(3, 5, 8)),
    ("positions of one sequence", lambda e, x: jnp.sin(x + e), matrix(5, 8), data(5, 8)),
    ("times data", lambda e, x: jnp.sin(x * e), matrix(5, 8), data(3, 5, 8)),
    ("less data", lambda e, x: jnp.sin(e - x) @ np.ones((8, 2)), matrix(5, 8), data(3, 5, 8)),
    ("prototypes", lambda e, x: jnp.exp(-((x[:, None] - e) ** 2).sum(-1)), matrix(20, 8), data(5, 8)),
    ("prototypes, nearest", lambda e, x: jnp.abs(x[:, None] - e).max(-1), matrix(20, 8), data(5, 8)),
    ("bias of heads", lambda e, w, x: jnp.tanh(jnp.einsum("bi,ihd->bhd", x, w) + e),
     matrix(2, 7, path="e"), HEADS, X),
    ("in a loop", lambda e, x: lax.scan(lambda c, _: (jnp.sin(c + e), None), x, length=2)[0],
     matrix(5, 8), data(5, 8)),
    ("positions of rows looked up", lambda e, p: jnp.sin(e[np.array([1, 0, 1])] + p),
     matrix(9, 8, path="e"), matrix(3, 8, path="p")),
)  # fmt: skip
@pytest.mark.parametrize("own", [False, True])
def test_a_table_that_is_added_to_data_is_data(fn, makers, own):
    assert run_case(fn, makers, own=own) == {}


def test_a_matrix_plus_a_frozen_one_is_no_data():
    """What an adapter is added to is a parameter too: a function of the sum is reported."""
    w, frozen = low_rank((11, 13)), jnp.asarray(WHOLE())
    context = Context("ignore")
    interpret(lambda p: jnp.sin(p["w"] + p["frozen"]), context)({"w": w, "frozen": frozen})
    assert context.built == {"w": ["sin"]}


# ---------------------------------------------------------------- narrow types


def test_norms_of_narrow_weights_are_rounded_as_the_program_says():
    w = low_rank((11, 13), dtype=jnp.bfloat16)
    got = interpret(lambda w: jnp.sqrt((w * w).sum(0)).astype(jnp.float32), Context("error"))(w)
    np.testing.assert_allclose(got, jnp.sqrt((build(w) ** 2).sum(0)), rtol=2**-7)


def test_a_row_with_dense_noise_is_not_rounded_into_a_narrow_matrix():
    w, size = low_rank((11, 13), dtype=jnp.bfloat16), 1e-3
    row = Upcast(1 + size * jnp.asarray(ROW(), jnp.float32), jnp.dtype(jnp.bfloat16))
    x = jnp.eye(11, dtype=jnp.bfloat16)
    fn = lambda w, row: jnp.matmul(x, w + row, preferred_element_type=jnp.float32)
    got = interpret(fn, Context("error"))(w, row)
    np.testing.assert_allclose(got, build(w) + row.value, atol=size / 10)
