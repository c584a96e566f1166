"""Every rule against the same function on built arrays, under jit and over both signs.

Unless a case says otherwise it runs under ``on_dense="error"``: nothing is built.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jax import lax
from support import agree, cases, checked_in_float64, data, low_rank, matrix, normal, run_case

from eggroll.interpret import convolutions as convolution_rules
from eggroll.interpret.interpreter import interpret
from eggroll.values import contraction, deferred
from eggroll.values.lowrank import LowRank, build


@pytest.fixture(scope="module", autouse=True)
def float64():
    with checked_in_float64():
        yield


W, V = matrix(5, 7), matrix(7, 4, path="v")
SQUARE = matrix(5, 5)
STACK = matrix(6, 5, 5, batch=(0,))
X, Y = data(3, 5), data(3, 7)
IMAGE = data(2, 6, 5, 4)
HEADS, OUT = matrix(5, 2, 3, columns=(1, 2)), matrix(2, 3, 5)


def conv(**changes):
    how = dict(window_strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return lambda w, x: lax.conv_general_dilated(x, w, **{**how, **changes})


# ---------------------------------------------------------------- products

PRODUCTS = cases(
    ("right", lambda w, x: x @ w, W, X),
    ("left", lambda w, x: w.T @ x.T, W, X),
    ("transposed", lambda w, y: y @ w.T, W, Y),
    ("vector", lambda w, x: x[0] @ w, W, X),
    ("many ranks", lambda w, x: x @ w, matrix(5, 7, rank=9), X),
    ("both", lambda w, v, x: x @ (w @ v), W, V, X),
    ("both transposed", lambda w, v, x: x @ (v.T @ w.T).T, W, V, X),
    ("both of many ranks", lambda w, v, x: x @ (w @ v), matrix(5, 7, rank=9), V, X),
    ("three", lambda w, v, u, x: x @ (w @ v @ u), W, V, matrix(4, 3, path="u"), X),
    ("with itself", lambda w, x: x @ (w @ w), matrix(5, 5), X),
    ("Gram matrix", lambda w, y: y @ (w.T @ w), W, Y),
    ("bilinear", lambda w, x, y: jnp.einsum("bi,bj,ij->b", x, y, w), W, X, Y),
    ("heads in", lambda w, x: jnp.einsum("bd,dhk->bhk", x, w), HEADS, X),
    ("heads out", lambda w, x: jnp.einsum("bhk,hkd->bd", x.reshape(-1, 2, 3), w), OUT, data(4, 6)),
    ("some of the rows", lambda w, x: jnp.einsum("hkd,bk->bhd", w, x[:, :3]), OUT, X),
    ("batch axis", lambda w, x: jnp.einsum("lij,li->lj", w, x), STACK, data(6, 5)),
    ("contracted batch axis", lambda w, x: jnp.einsum("lij,li->j", w, x), STACK, data(6, 5)),
    ("broadcast", lambda w, x: jnp.einsum("bi,bij->bj", x, jnp.broadcast_to(w, (3, 5, 7))), W, X),
    ("vmap", lambda w, x: jax.vmap(lambda row: row @ w)(x), W, X),
    ("vmap over a stack", lambda s, x: jax.vmap(lambda w: x @ w)(s), STACK, X),
    ("embedding, then a matrix", lambda e, w: e[np.arange(9) % 6] @ w, matrix(6, 5, path="e"), W),
    ("nothing in the batch", lambda w, x: x[:0] @ w, W, X),
    ("one row", lambda w, x: x[:, :1] @ w, matrix(1, 7), X),
    ("one column", lambda w, x: x @ w, matrix(5, 1), X),
)


@PRODUCTS
def test_product(fn, makers):
    run_case(fn, makers)


def test_contracting_two_matrices_as_a_whole_builds_neither():
    built = agree(
        lambda w, v: jnp.einsum("ij,ij", w, v),
        low_rank((5, 7)),
        low_rank((5, 7), path="v"),
    )
    assert built == {}


def test_data_gives_way_before_a_matrix():
    """Rows that were looked up are built, not the weights, even where there are more of the rows."""
    table, w = low_rank((6, 2), path="table"), low_rank((2, 3))
    assert agree(lambda e, w: e[np.arange(99) % 6] @ w, table, w) == {}


@st.composite
def dot_generals(draw):
    """dot_general of random dimension numbers: (its arguments, lhs, rhs), either or both low-rank."""
    sizes = st.lists(st.integers(1, 3), max_size=2)
    batch, contracted = draw(sizes), draw(sizes)
    numbers, operands = [], []
    which = draw(st.sampled_from([(True, False), (False, True), (True, True)]))
    for side, perturbed in zip("ab", which, strict=True):
        shared = [*batch, *contracted]
        shape = [*shared, *draw(sizes)]
        order = draw(st.permutations(range(len(shape))))
        where = [order.index(i) for i in range(len(shared))]
        numbers.append((where[len(batch) :], where[: len(batch)]))
        shape = [shape[i] for i in order]
        operands.append(draw_matrix(draw, shape, side) if perturbed else data(*shape, name=side))
    (lc, lb), (rc, rb) = numbers
    return ((lc, rc), (lb, rb)), *operands


def draw_matrix(draw, shape, path):
    """What makes a value of any rank and any split of its axes into rows, columns and batch."""
    split = [draw(st.sampled_from("rcb")) for _ in shape]
    columns, batch = ([a for a, s in enumerate(split) if s == side] for side in "cb")
    rank = draw(st.sampled_from([1, 2, 9]))
    return matrix(*shape, columns=columns, batch=batch, rank=rank, path=path)


@given(dot_generals())
def test_any_product(case):
    numbers, *makers = case
    operands = [make() for make in makers]
    # The product of two may be more than low-rank.
    on_dense = "ignore" if all(isinstance(v, LowRank) for v in operands) else "error"
    agree(lambda a, b: lax.dot_general(a, b, numbers), *operands, on_dense=on_dense)


# ---------------------------------------------------------------- shapes

SHAPES = cases(
    ("stop_gradient", lambda w, x: x @ lax.stop_gradient(w), W, X),
    ("copy", lambda w, x: x @ jnp.copy(w), W, X),
    ("neg", lambda w, x: x @ -w, W, X),
    ("reverse", lambda w, x: x @ w[::-1, ::-1], W, X),
    ("roll", lambda w, x: x @ jnp.roll(w, 2, 1), W, X),
    ("slice", lambda w, x: x[:, :2] @ w[1:3, ::2], W, X),
    ("empty slice", lambda w, x: x @ w[:, 3:3], W, X),
    ("split", lambda w, x: [x @ p for p in jnp.split(w, [2, 3], axis=1)], W, X),
    ("split with an empty part", lambda w, x: [x @ p for p in jnp.split(w, [0, 3], axis=1)], W, X),
    ("split one column", lambda w, x: [x @ p for p in jnp.split(w, [0], axis=1)], matrix(5, 1), X),
    ("unstack", lambda s, x: [x @ w for w in s], STACK, X),
    ("unstack rows and layers", lambda s, x: [x @ w for w in s], matrix(6, 5, 5), X),
    ("tile columns", lambda w, x: x @ jnp.tile(w, (1, 3)), matrix(5, 1), X),
    ("tile", lambda w, x: x @ jnp.tile(w, (1, 3)), W, X),
    ("repeat", lambda w, x: x @ jnp.repeat(w, 3, axis=1), W, X),
    ("heads as one", lambda w, x: x @ w.reshape(5, 6), HEADS, X),
    (
        "columns as heads",
        lambda w, x: jnp.einsum("bd,dhk->bhk", x, w.reshape(5, 2, 3)),
        matrix(5, 6),
        X,
    ),
    ("reshape with ones", lambda w, x: x @ w.reshape(1, 5, 1, 7)[0, :, 0], W, X),
    ("pad", lambda w, x: x @ jnp.pad(w, ((0, 0), (1, 2))), W, X),
    (
        "pad, crop and dilate",
        lambda w, x: x[:, :4] @ lax.pad(w, 2.0, ((-1, 0, 0), (2, -1, 1))),
        W,
        X,
    ),
    (
        "pad a new axis",
        lambda w, x: jnp.einsum("bi,lij->lbj", x, jnp.pad(w[None], ((1, 0), (0, 0), (0, 0)))),
        W,
        X,
    ),
    ("add", lambda w, v, x: x @ (w + v), W, matrix(5, 7, rank=3, path="v"), X),
    ("subtract, turned", lambda w, v, x: x @ (w - v.T), W, matrix(7, 5, path="v"), X),
    ("add an array", lambda w, y, x: x @ (w + y), W, data(5, 7), X),
    ("from an array", lambda w, y, x: x @ (y - w), W, data(5, 7), X),
    ("low-rank adapter", lambda a, b, y, x: x @ (y + 0.5 * a @ b), W, V, data(5, 4), X),
    ("times a scalar", lambda w, x: 2.0 * x @ (w * 3.0) / 2, W, X),
    ("sum of rows", lambda w, y: w.sum(0) * y[0], W, Y),
    ("mean of columns", lambda w: w.mean(1), W),
    ("sum of heads", lambda w, x: x @ w.sum(1), HEADS, X),
    ("sum over an axis of no noise", lambda w, x: x @ jnp.broadcast_to(w, (4, 5, 7)).sum(0), W, X),
)


@cases(
    ("scalar", lambda w, x: x @ (w * x[0, 0]), W, X),
    ("columns", lambda w, x, y: x @ (w * y[0]), W, X, Y),
    ("rows", lambda w, x: x @ (x[0][:, None] * w), W, X),
    ("over columns", lambda w, x, y: x @ (w / y[0]), W, X, Y),
    ("both", lambda w, x, y: x @ (w * x[0][:, None] * y[0]), W, X, Y),
    ("turned", lambda w, x, y: y @ (w * x[0][:, None] * y[0]).T, W, X, Y),
    ("heads", lambda w, x: jnp.einsum("bd,dhk->bhk", x, w * x[:2, :3]), HEADS, X),
    ("then one axis", lambda w, x: x @ (w * x[:2, :3]).reshape(5, 6), HEADS, X),
    ("a part", lambda w, x, y: x[:, :4] @ (w * y[0])[1:, ::2], W, X, Y),
    ("columns looked up", lambda w, x, y: x @ (w * y[0])[:, np.array([3, 1])], W, X, Y),
    ("layers", lambda s, x: jnp.einsum("bi,lij->lbj", x, s * x[0, 0]), STACK, X),
    (
        "batch",
        lambda s, x, y: jnp.einsum("lij,li->lj", s * y[:, :1, None], y),
        STACK,
        X,
        data(6, 5),
    ),
    ("cast", lambda w, x, y: x @ (w * y[0]).astype(jnp.float64), W, X, Y),
    ("of a looked-up row", lambda w, y: jnp.sin(w[2] * y[0]), W, Y),
    (
        "in a loop",
        lambda w, x: lax.scan(lambda c, row: (c + x @ (w * row), None), x, x)[0],
        SQUARE,
        X,
    ),
)
def test_gain(fn, makers):
    """A gain that is no constant may be a member's own: it goes to the data, not into the array."""
    run_case(fn, makers)


@SHAPES
def test_shape(fn, makers):
    run_case(fn, makers)


@cases(
    ("columns", lambda w, x: x @ jnp.concatenate([w, w * 2.0], 1), W, X),
    ("rows", lambda w, x: jnp.concatenate([x, x], 1) @ jnp.concatenate([w, w]), W, X),
    ("with an array", lambda w, x: x @ jnp.concatenate([np.ones((5, 2)), w, np.ones((5, 1))], 1), W, X),
    ("turned", lambda w, v, x: x @ jnp.concatenate([w, v.T], 1), W, matrix(4, 5, path="v", rank=3), X),
    ("query, key, value", lambda a, b, x: x @ jnp.concatenate([a, b, a], 1), W, matrix(5, 2, path="b"), X),
    ("stack", lambda a, b, x: jnp.einsum("bi,lij->lbj", x, jnp.stack([a, b])), W, matrix(5, 7, path="b"), X),
    ("stack of other ranks", lambda a, b, x: jnp.einsum("bi,lij->lbj", x, jnp.stack([a, b])),
     W, matrix(5, 7, path="b", rank=3), X),
    ("stack with an array", lambda a, x: jnp.einsum("bi,lij->lbj", x, jnp.stack([a, np.ones((5, 7))])), W, X),
    ("stack, scanned", lambda a, b, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, jnp.stack([a, b]))[0],
     matrix(5, 5), matrix(5, 5, path="b"), X),
    ("stacks", lambda s, w, x: jnp.einsum("bi,lij->lbj", x, jnp.concatenate([s, w[None]])),
     STACK, matrix(5, 5), X),
    ("stacks of one kind and another", lambda s, t, x: jnp.einsum("bi,lij->lbj", x, jnp.concatenate([s, t])),
     STACK, matrix(2, 5, 5, path="t"), X),
)  # fmt: skip
def test_join(fn, makers):
    run_case(fn, makers)


@cases(
    ("rows and columns run together", lambda w, x: x @ w.reshape(10, 3)[:5], matrix(5, 6), X),
    ("a function of each entry", lambda w, x: x @ jnp.sin(w), W, X),
    (
        "gain along a contracted and a free axis",
        lambda w, x: jnp.einsum("bh,dhk->bdk", x[:, :2], w * x[:2, :3]),
        HEADS,
        X,
    ),
    ("gain, joined", lambda w, x, y: x @ jnp.concatenate([w * y[0], w], 1), W, X, Y),
    (
        "filled in an axis of no noise",
        lambda w: (
            jnp.broadcast_to(w, (4, 5, 7)).at[np.array([1, 9])].get(mode="fill", fill_value=3.0)
        ),
        W,
    ),
    (
        "gain, filled",
        lambda w, x: (w * x[0, 0]).at[np.array([1, 9])].get(mode="fill", fill_value=3.0),
        W,
        X,
    ),
    ("gain, padded", lambda w, y: jnp.pad(w * y[0], 1), W, Y),
    ("gain of two", lambda w, v, y: (w * y[0]) @ v, W, V, Y),
    (
        "gain, scanned",
        lambda s, x: lax.scan(lambda c, w: (c @ w, None), x, s * x[0, 0])[0],
        STACK,
        X,
    ),
    (
        "gain of kernel rows",
        lambda w, x: conv()(w * x[0, 0, 0, :, None], x),
        matrix(3, 3, 4, 6),
        IMAGE,
    ),
    ("divisor", lambda w, x: x @ (1 / (9 + w)), W, X),
    ("join of other forms", lambda a, b: jnp.concatenate([a, b]), HEADS, matrix(5, 2, 3, path="b")),
    ("batched product of two", lambda s, t: s @ t, STACK, matrix(6, 5, 5, batch=(0,), path="t")),
    ("cast to int", lambda w: w.astype(int), W),
)
def test_what_has_no_rule_is_built(fn, makers):
    assert run_case(fn, makers, on_dense="ignore")


@st.composite
def reshapings(draw):
    """A chain of structural operations and the shape to start from."""
    shape = start = tuple(draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=3)))
    chain = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(
            st.sampled_from(
                ["turn", "merge", "part", "slice", "join", "flip", "new", "pad", "gain"]
            )
        )
        axis = draw(st.integers(0, len(shape) - 1))
        if kind == "turn":
            op = functools.partial(jnp.transpose, axes=draw(st.permutations(range(len(shape)))))
        elif kind == "merge":
            new = (*shape[:axis], math.prod(shape[axis : axis + 2]), *shape[axis + 2 :])
            op = functools.partial(jnp.reshape, shape=new)
        elif kind == "part":
            factor = draw(st.sampled_from([k for k in range(1, 5) if shape[axis] % k == 0]))
            new = (*shape[:axis], factor, shape[axis] // factor, *shape[axis + 1 :])
            op = functools.partial(jnp.reshape, shape=new)
        elif kind == "slice":
            begin = draw(st.integers(0, shape[axis] - 1))
            by = draw(st.integers(1, 2))
            op = functools.partial(
                lax.slice_in_dim, start_index=begin, limit_index=None, stride=by, axis=axis
            )
        elif kind == "join":
            op = functools.partial(lambda x, axis: jnp.concatenate([x, x * 2.0], axis), axis=axis)
        elif kind == "gain":
            gain = normal([n if a == axis else 1 for a, n in enumerate(shape)], "gain")
            op = functools.partial(jnp.multiply, gain)
        elif kind == "flip":
            op = functools.partial(jnp.flip, axis=axis)
        elif kind == "new":
            op = functools.partial(lambda x, axis, n: jnp.repeat(jnp.expand_dims(x, axis), n, axis),
                                   axis=axis, n=draw(st.integers(1, 2)))  # fmt: skip
        else:
            widths = [(0, 0, 0)] * len(shape)
            widths[axis] = (
                draw(st.integers(0, 1)),
                draw(st.integers(0, 1)),
                draw(st.integers(0, 1)),
            )
            op = functools.partial(lax.pad, padding_value=np.float64(0), padding_config=widths)
        shape = jax.eval_shape(op, jax.ShapeDtypeStruct(shape, jnp.float64)).shape
        assume(math.prod(shape) <= 200 and len(shape) <= 5)
        chain.append(op)
    return draw_matrix(draw, start, "w"), chain


@given(reshapings())
def test_any_chain_of_shapes(case):
    make, chain = case
    agree(lambda w: functools.reduce(lambda x, op: op(x), chain, w), make(), on_dense="ignore")


# ---------------------------------------------------------------- look-ups

LOOK_UPS = cases(
    ("rows", lambda w: jnp.sin(w[np.array([1, 2, 2])]), W),
    ("no rows", lambda w: jnp.sin(w[np.array([], int)]), W),
    ("rows, filled", lambda w: jnp.take(w, np.array([[1, 9], [-6, 0]]), axis=0), W),
    ("filled with a number", lambda w: w.at[np.array([1, 9])].get(mode="fill", fill_value=3.0), W),
    ("filled from one row", lambda w: w.at[np.array([0, 9])].get(mode="fill", fill_value=3.0), matrix(1, 7)),
    ("rows, promised", lambda w: w.at[np.array([4, 0])].get(mode="promise_in_bounds"), W),
    ("rows, clipped", lambda w: jnp.take(w, np.array([1, 9]), axis=0, mode="clip"), W),
    ("columns", lambda w, x: x @ jnp.take(w, np.array([1, 0]), axis=1), W, X),
    ("entries", lambda w: w[np.array([1, 2]), np.array([3, 6])], W),
    ("a row", lambda w, x: jnp.sin(w[jnp.argmax(x[0])]), W, X),
    ("of a stack", lambda s, x: x @ s[jnp.argmax(x[0])], STACK, X),
    ("of a stack with shared columns", lambda s, x: x @ s[jnp.argmax(x[0])], matrix(6, 5, 5), X),
    ("of a stack, static", lambda s, x: x @ s[2], STACK, X),
    ("several of a stack", lambda s, x: jnp.einsum("bi,lij->lbj", x, s[np.array([0, 5, 5])]), STACK, X),
    ("experts", lambda s, x: jax.vmap(lambda row: row @ s[jnp.argmax(row)])(x), STACK, X),
    ("an expert for each of a stack",
     lambda s, x: jax.vmap(lambda w, i: x @ w[i])(s, np.array([0, 2])), matrix(2, 3, 5, 4, batch=(0, 1)), X),
    ("rows of each of a stack",
     lambda s: jnp.sin(jax.vmap(lambda w, i: w[i])(s, np.array([[0, 2], [1, 9]]))), matrix(2, 3, 4, batch=(0,))),
    ("a slice of rows", lambda w, x: x[:, :2] @ lax.dynamic_slice(w, (jnp.argmax(x[0]), 0), (2, 7)), W, X),
    ("a slice of columns", lambda w, x: x @ lax.dynamic_slice(w, (0, 99), (5, 2)), W, X),
    ("windows of a stack",
     lambda s, x: jax.vmap(lambda i: x[:, :2] @ lax.dynamic_slice(s, (i, 1, 0), (1, 2, 5))[0])(np.arange(3)),
     STACK, X),
)  # fmt: skip


@LOOK_UPS
def test_look_up(fn, makers):
    run_case(fn, makers)


@given(st.data())
def test_any_look_up(draws):
    draw = draws.draw
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    value = draw_matrix(draw, shape, "w")()
    axes = draw(st.lists(st.sampled_from(range(len(shape))), min_size=1, max_size=2, unique=True))
    indices = np.array(
        draw(st.lists(st.tuples(*[st.integers(-4, 4) for _ in axes]), max_size=3)), int
    )
    window = [draw(st.integers(1, n)) for n in shape]
    collapsed = [a for a in axes if window[a] == 1 and draw(st.booleans())]
    left = len(shape) - len(collapsed)
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(sorted(draw(st.permutations(range(left + 1)))[:left])),
        collapsed_slice_dims=tuple(sorted(collapsed)),
        start_index_map=tuple(axes),
    )
    mode = draw(st.sampled_from(["fill", "clip"]))
    look_up = functools.partial(lax.gather, dimension_numbers=numbers, slice_sizes=window, mode=mode,
                                fill_value=draw(st.sampled_from([None, 0.0, 2.0])))  # fmt: skip
    agree(lambda w: look_up(w, indices.reshape(-1, len(axes))), value, on_dense="ignore")


@given(st.data())
def test_any_dynamic_slice(draws):
    draw = draws.draw
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    starts = [draw(st.integers(-2, 5)) for _ in shape]
    sizes = [draw(st.integers(0, n)) for n in shape]
    value = draw_matrix(draw, shape, "w")()
    # What is left may be data, or the output: either way an array.
    agree(lambda w, at: lax.dynamic_slice(w, at, sizes), value, np.array(starts), on_dense="ignore")


# ---------------------------------------------------------------- convolutions


def conv_transposed(**how):
    layout = ("NHWC", "HWIO", "NHWC")
    return lambda w, x: lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=layout, **how)


def conv_gradient(w, x):
    """Of the input: a convolution with the kernel turned."""
    return jax.grad(lambda x: (conv(window_strides=(2, 1))(w, x) ** 2).sum())(x)


KERNEL = matrix(3, 3, 4, 6)

CONVOLUTIONS = cases(
    ("plain", conv(), KERNEL, IMAGE),
    ("of many ranks", conv(), matrix(3, 3, 4, 6, rank=9), IMAGE),
    ("strided, dilated", conv(window_strides=(2, 1), padding=((1, 2), (0, 1)), rhs_dilation=(2, 1)), KERNEL, IMAGE),
    ("cropped", conv(padding=((-1, 2), (3, -1))), KERNEL, IMAGE),
    ("without output", conv(padding=((0, 0), (-4, 0))), KERNEL, IMAGE),
    ("transposed", conv_transposed(), KERNEL, IMAGE),
    ("transposed, kernel turned", conv_transposed(transpose_kernel=True), matrix(3, 3, 6, 4), IMAGE),
    ("two groups", conv(feature_group_count=2), matrix(3, 3, 2, 6), IMAGE),
    ("each channel", conv(feature_group_count=4), matrix(3, 3, 1, 4), IMAGE),
    ("each channel twice", conv(feature_group_count=4), matrix(3, 3, 1, 8), IMAGE),
    ("positions against channels", conv(), matrix(3, 3, 4, 6, columns=(2, 3)), IMAGE),
    ("noise of its own at every position", conv(), matrix(3, 3, 4, 6, batch=(0, 1)), IMAGE),
    ("noise of its own at every position, many ranks", conv(), matrix(3, 3, 4, 6, batch=(0, 1), rank=9), IMAGE),
    ("inputs against the rest", conv(), matrix(3, 3, 4, 6, columns=(0, 1, 3)), IMAGE),
    ("large", conv(), matrix(9, 9, 4, 6), IMAGE),
    ("large, in groups, of many ranks", conv(feature_group_count=2), matrix(9, 9, 2, 6, rank=9), IMAGE),
    ("large, another split", conv(), matrix(9, 9, 4, 2, columns=(0, 3), rank=1), IMAGE),
    ("one output channel", conv(), matrix(3, 3, 4, 1), IMAGE),
    ("gain", lambda w, x: conv()(w * x[0, 0, :3, 0], x), matrix(3, 3, 4, 3), IMAGE),
    ("1 x 1", conv(), matrix(1, 1, 4, 6), IMAGE),
    ("channels first", lambda w, x: lax.conv_general_dilated(x.transpose(0, 3, 1, 2), w.transpose(3, 2, 0, 1),
                                                             (1, 1), "SAME"), KERNEL, IMAGE),
    ("batch in the last axis", lambda w, x: lax.conv_general_dilated(
        x.transpose(1, 2, 3, 0), w, (1, 1), "SAME", dimension_numbers=("HWCN", "HWIO", "CNHW")), KERNEL, IMAGE),
    ("gradient of the input", conv_gradient, KERNEL, IMAGE),
)  # fmt: skip


@CONVOLUTIONS
def test_convolution(fn, makers):
    run_case(fn, makers)


@st.composite
def convolutions(draw):
    """Parameters, kernel and input of a convolution over 1 to 3 dimensions."""
    n = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 2))
    each = lambda low, high: [draw(st.integers(low, high)) for _ in range(n)]
    kernel = [
        draw(st.integers(1, 2)) * groups,
        draw(st.integers(1, 2)),
        *each(1, 3 if n < 3 else 2),
    ]
    image = [draw(st.integers(1, 2)), kernel[1] * groups, *each(2, 4)]
    layouts = []
    for first in ("NC", "OI", "NC"):
        layouts.append("".join(draw(st.permutations(first + "XYZ"[:n]))))
    params = dict(
        window_strides=each(1, 2),
        padding=[(draw(st.integers(-1, 2)), draw(st.integers(0, 2))) for _ in range(n)],
        lhs_dilation=each(1, 2),
        rhs_dilation=each(1, 2),
        feature_group_count=groups,
        dimension_numbers=tuple(layouts),
    )
    turn = lambda shape, names, layout: [shape[names.index(c)] for c in layout]
    kernel = turn(kernel, "OIXYZ", layouts[1])
    image = turn(image, "NCXYZ", layouts[0])
    return params, draw_matrix(draw, kernel, "w"), data(*image)


@pytest.mark.parametrize("most_shifts", [convolution_rules.MAX_SHIFTS, 0])
@given(case=convolutions())
def test_any_convolution(most_shifts, case):
    params, *makers = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution_rules, "MAX_SHIFTS", most_shifts)
        run_case(lambda w, x: lax.conv_general_dilated(x, w, **params), makers)


# ---------------------------------------------------------------- the parts


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((6, 4), (2, 3, 4)),
        ((1, 6), (6,)),
        ((6, 1), (6,)),
        ((2, 1, 3), (2, 3)),
        ((), (1, 1)),
        ((4, 6), (8, 3)),
    ],
)
def test_common_groups_are_of_equal_size_and_cover_both_shapes(old, new):
    groups = deferred.common_groups(old, new)
    for mine, theirs in groups:
        assert math.prod(old[a] for a in mine) == math.prod(new[a] for a in theirs)
    assert [a for mine, _ in groups for a in mine] == list(range(len(old)))
    assert [a for _, theirs in groups for a in theirs] == list(range(len(new)))


@pytest.mark.parametrize(
    "rank", [1, contraction.MAX_UNROLLED_RANK, contraction.MAX_UNROLLED_RANK + 1]
)
def test_the_perturbation_is_the_same_summed_or_contracted_over_the_rank(rank):
    w = low_rank((5, 7), rank=rank)
    x = jnp.asarray(normal((3, 5)))
    noise = w.arithmetic.perturbation(x, "bi", w, "ij", "bj", jnp.float64)
    np.testing.assert_allclose(noise, x @ (build(w) - w.w), rtol=1e-12, atol=1e-12)


def test_an_output_that_is_a_matrix_is_built():
    assert agree(lambda w: w, low_rank((5, 7)), on_dense="ignore") == {"w": ["output"]}


def test_python_numbers_among_the_arguments():
    w = low_rank((5, 7))
    got = interpret(lambda w, a, i: w[i] * a)(w, 2.0, 3)
    np.testing.assert_allclose(got, build(w)[3] * 2)
