"""Sums over members of what products received, against JAX's vjp."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from eggroll.values.pullback import for_any_member, sum_type, summed, transposed


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def data(shape, name, like):
    """Small whole numbers in the type of ``like``, which int8 products and floats hold exactly."""
    seed = sum(map(ord, name)) + 7 * len(shape)
    return jnp.asarray(np.random.default_rng(seed).integers(-3, 4, shape), like.dtype)


def product(v, name, dims, other):
    """A product with data of the shape ``other``."""
    kind = None if jnp.issubdtype(v.dtype, jnp.floating) else jnp.int32
    x = data(other, name, v)
    left, right = (v, x) if name.startswith("left") else (x, v)
    return lax.dot_general(left, right, dims, preferred_element_type=kind)


def dot_right(v):
    return product(v, "right", (((1,), (v.ndim - 1,)), ((), ())), (3, v.shape[-1]))


def dot_left(v):
    return product(v, "left", (((0,), (0,)), ((), ())), (v.shape[0], 2))


def dot_of_two_axes(v):
    if v.ndim < 2:
        return v
    return product(v, "left two", (((1, 0), (0, 2)), ((), ())), (v.shape[1], 2, v.shape[0]))


def dot_batched(v):
    return product(v, "batched", (((2,), (v.ndim - 1,)), ((0,), (0,))), (v.shape[0], 2, v.shape[-1])) if v.ndim > 1 else v  # fmt: skip


def cut(v):
    return v[tuple(slice(1 if n > 2 else 0, n, 2) for n in v.shape)]


def dynamic(v):
    return lax.dynamic_slice(v, [jnp.int32(n - 1) for n in v.shape], [-(-n // 2) for n in v.shape])


def wider(v):
    floating = jnp.issubdtype(v.dtype, jnp.floating)
    return v.astype(jnp.float64 if floating else jnp.int32)


# Linear functions of an array of one axis or more, of any type.
LINEAR = {
    "turned": lambda v: v.T,
    "turned twice": lambda v: jnp.moveaxis(v, 0, -1),
    "cut": cut,
    "dynamic slice": dynamic,
    "reversed": lambda v: lax.rev(v, [0]),
    "flat": lambda v: v.reshape(-1),
    "grown": lambda v: v[None],
    "squeezed": lambda v: v.squeeze(),
    "rows": lambda v: v[jnp.array([0, -1, 0])],
    "rows of rows": lambda v: v[jnp.array([[0, -1], [-1, 0]])],
    "columns": lambda v: jnp.take(v, jnp.array([0, 0]), axis=-1, mode="clip"),
    "joined": lambda v: jnp.concatenate([v, data(v.shape, "joined", v), v]),
    "broadcast": lambda v: jnp.broadcast_to(v, (2, *v.shape)),
    "broadcast along": lambda v: jnp.broadcast_to(v[:1], v.shape),
    "scaled": lambda v: v * data(v.shape, "scaled", v),
    "scaled by rows": lambda v: data(v.shape[-1:], "scaled", v) * v,
    "twice": lambda v: v + v,
    "from data": lambda v: data(v.shape, "from", v) - v,
    "less data": lambda v: v - data(v.shape[-1:], "less", v),
    "negated": lambda v: -v,
    "shifted": lambda v: v << 3 if jnp.issubdtype(v.dtype, jnp.integer) else v * 8,
    "wider": wider,
    "product": dot_right,
    "left product": dot_left,
    "product of two axes": dot_of_two_axes,
    "batched product": dot_batched,
    "jit": jax.jit(lambda v: v[:1] * 2),
}
# Linear in floats, by JAX's own transposes.
BEYOND = {
    "sum": lambda v: v.sum(0, keepdims=True),
    "padded": lambda v: jnp.pad(v, 1),
    "cumulated": lambda v: jnp.cumsum(v, 0),
    "chosen": lambda v: jnp.where(data(v.shape, "chosen", v) > 0, v, 0),
    "over": lambda v: v / 4,
    "softmax": lambda v: jax.nn.softmax(v, axis=-1),
    "looped": lambda v: lax.scan(lambda c, _: (c * 2, None), v, length=2)[0],
}


def chain(names, v):
    for name in names:
        out = {**LINEAR, **BEYOND}[name](v) if v.ndim else v
        v = out if out.size and out.ndim < 5 else v
    return v


def roots(dtype):
    rng = np.random.default_rng(3)
    return tuple(jnp.asarray(rng.integers(-5, 6, shape), dtype) for shape in ((4, 6), (6,)))


def of_roots(names, given, captured):
    """A chain of operations on both roots, of which one is scaled by data."""
    w, b = given
    return chain(names, w * captured + b)


def cotangent_of(fn, *args, dtype=None):
    out = jax.eval_shape(fn, *args)
    rng = np.random.default_rng(len(out.shape))
    return jnp.asarray(rng.integers(-9, 10, out.shape), dtype or out.dtype)


def by_vjp(names, given, captured, ct):
    out, pull = jax.vjp(lambda g: of_roots(names, g, captured), given)
    return pull(ct.astype(out.dtype))[0]


CHAINS = functools.partial(st.lists, min_size=1, max_size=5)


@given(CHAINS(st.sampled_from([*LINEAR, *BEYOND])))
def test_chains_of_floats_are_transposed_as_jax_does(names):
    given, captured = roots(jnp.float64), data((4, 6), "captured", jnp.zeros(()))
    fn = functools.partial(of_roots, names)
    ct = cotangent_of(fn, given, captured)
    got = jax.jit(lambda ct: transposed(fn, given, captured, ct))(ct)
    for a, b in zip(got, by_vjp(names, given, captured, ct), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@given(CHAINS(st.sampled_from(list(LINEAR))), st.sampled_from([jnp.int8, jnp.int32]))
def test_chains_of_integers_are_transposed_exactly(names, dtype):
    ints, floats = roots(jnp.int8), roots(jnp.float64)
    captured = data((4, 6), "captured", jnp.zeros(()))
    narrow = captured.astype(jnp.int8)
    fn = functools.partial(of_roots, names)
    ct = cotangent_of(fn, ints, narrow, dtype=dtype)
    got = jax.jit(lambda ct: transposed(fn, ints, narrow, ct))(ct)
    for a, b in zip(got, by_vjp(names, floats, captured, ct.astype(jnp.float64)), strict=True):
        assert a.dtype == jnp.int32
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", [*LINEAR, *BEYOND])
def test_one_operation(name):
    """Each by itself, so that a failure names it."""
    with jax.disable_jit(False):
        test_chains_of_floats_are_transposed_as_jax_does.hypothesis.inner_test([name])
        if name in LINEAR:
            test_chains_of_integers_are_transposed_exactly.hypothesis.inner_test([name], jnp.int8)


def test_integers_without_a_transpose_are_named():
    ints = roots(jnp.int8)
    with pytest.raises(ValueError, match="an int8 parameter with node noise enters 'cumsum'"):
        transposed(lambda r, c: jnp.cumsum(r[0], 0), ints, (), jnp.ones((4, 6), jnp.int8))


# ---------------------------------------------------------------- sums over members


def members(dtype=np.float64, pairs=3):
    """Inputs ``[pairs, 2, 5, 4]`` and cotangents ``[pairs, 5, 3]``, and a parameter ``[4, 3]``."""
    rng = np.random.default_rng(0)
    whole = lambda *shape: jnp.asarray(rng.integers(-9, 10, shape), dtype)
    return whole(pairs, 2, 5, 4), whole(pairs, 5, 3), whole(4, 3)


def over_pairs(op, w, x, ct, sign_type):
    signs = jnp.array([1, -1], sign_type)

    def of_pair(pair, x, ct):
        one = lambda sign, x: summed(op, (w,), x, ct, sign, pair)[0]
        return jax.vmap(one, out_axes=None)(signs, x)

    return jax.vmap(of_pair, out_axes=None)(jnp.arange(x.shape[0]), x, ct)


def dot(roots, x):
    kind = jnp.int32 if x.dtype == jnp.int8 else None
    return jnp.matmul(x, roots[0], preferred_element_type=kind)


def test_members_are_summed_over_pairs_and_averaged_within_one():
    x, ct, w = members()
    got = jax.jit(functools.partial(over_pairs, dot, sign_type=jnp.float32))(w, x, ct)
    expected = sum(x[p].mean(0).T @ ct[p] for p in range(3))
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_integers_are_averaged_to_the_even_number_and_summed_exactly():
    x, ct, w = members(np.int8)
    got = jax.jit(functools.partial(over_pairs, dot, sign_type=jnp.int32))(w, x, ct)
    assert got.dtype == jnp.int32
    x, ct = np.asarray(x, int), np.asarray(ct, int)
    mean = np.rint((x[:, 0] + x[:, 1]) / 2).astype(int)  # to the even number too
    np.testing.assert_array_equal(got, sum(mean[p].T @ ct[p] for p in range(3)))


def test_indices_are_not_averaged():
    """Each member's own row has half of the cotangent."""
    w, ct = jnp.zeros((7, 3)), jnp.arange(1.0, 4.0)[None]
    rows = jnp.array([[[2, 5]]]).reshape(1, 2)
    got = over_pairs(lambda r, i: r[0][i], w, rows, ct, jnp.float32)
    expected = np.zeros((7, 3))
    expected[[2, 5]] = np.arange(1.0, 4.0) / 2
    np.testing.assert_array_equal(got, expected)


def test_no_member_has_a_matrix_of_its_own():
    x, ct, w = members(pairs=11)
    jaxpr = jax.make_jaxpr(functools.partial(over_pairs, dot, sign_type=jnp.float32))(w, x, ct)
    shapes = [v.aval.shape for eqn in jaxpr.jaxpr.eqns for v in eqn.outvars]
    assert (4, 3) in shapes and not any(11 in s and s[-2:] in ((4, 3), (3, 4)) for s in shapes)


def test_a_parameter_that_differs_between_members_is_refused():
    x, ct, w = members()
    with pytest.raises(ValueError, match="differs between members: it must be shared by all"):
        one = lambda w, sign: summed(dot, (w,), x[0, 0], ct[0], sign, jnp.int32(0))[0]
        jax.vmap(one)(jnp.stack([w, w]), jnp.array([1.0, -1.0]))


def test_a_condition_holds_if_it_does_for_any_member():
    holds = jnp.array([[False, False], [False, True]])
    over = jax.vmap(jax.vmap(for_any_member, out_axes=None), out_axes=None)
    assert over(holds) and not over(holds & False)


def test_the_types_of_sums():
    types = {jnp.int8: jnp.int32, jnp.bfloat16: jnp.float32, jnp.float64: jnp.float64}
    for dtype, expected in types.items():
        assert sum_type(jnp.dtype(dtype)) == expected
