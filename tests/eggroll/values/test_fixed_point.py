"""Integer arithmetic against Python's own integers, at the ends of the ranges above all."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eggroll.values import fixed_point
from eggroll.values.fixed_point import INT32_MAX, LARGEST

SIGNED = st.integers(-(2**30), 2**30)


@given(st.lists(SIGNED, min_size=4, max_size=4), st.sampled_from([0, 1, 4, 8, 13, 31]))
def test_shift_round_rounds_halves_away_from_zero(xs, shift):
    got = fixed_point.shift_round(jnp.array(xs, jnp.int32), shift).tolist()
    assert got == [(1 if x > 0 else -1) * ((2 * abs(x) + 2**shift) // 2 ** (shift + 1)) for x in xs]


@given(
    st.lists(st.integers(-(2**31), INT32_MAX), min_size=4, max_size=4),
    st.sampled_from([1, 3, 16, 256, 352, 2**20, INT32_MAX]),
)
def test_floor_divide_is_pythons(xs, by):
    got = fixed_point.floor_divide(jnp.array(xs, jnp.int32), by).tolist()
    assert got == [x // by for x in xs]


@given(st.lists(st.integers(0, INT32_MAX), min_size=4, max_size=4))
def test_isqrt_is_pythons(xs):
    edges = [0, 1, 46340**2 - 1, 46340**2, INT32_MAX]
    assert fixed_point.isqrt(jnp.array(xs + edges, jnp.int32)).tolist() == [
        math.isqrt(x) for x in xs + edges
    ]


@pytest.mark.parametrize(("sigma", "shift"), [(2.0**-4, 8), (1.0, 4), (16.0, 0), (2.0**-12, 16)])
def test_a_power_of_two_is_a_shift(sigma, shift):
    assert fixed_point.shift_of(sigma) == shift


@pytest.mark.parametrize("sigma", [0.05, 3.0, 32.0, 2.0**-13, 0.0, -0.5, math.inf, math.nan])
def test_other_sigmas_are_named(sigma):
    with pytest.raises(ValueError, match="sigma=.* a power of two from 2..-12 to 16"):
        fixed_point.shift_of(sigma)


@pytest.mark.parametrize("rank", [1, 2, 7, 64])
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16])
@pytest.mark.parametrize("shift", [0, 4, 8, 16])
def test_every_intermediate_number_of_a_perturbed_product_fits(rank, dtype, shift):
    info = jnp.iinfo(dtype)
    largest = max(-info.min, info.max)
    forms = set()
    for fan_in in (1, 5, 64, 520, 1040, 1041, 4096, 60_000):
        form = fixed_point.fits(fan_in, dtype, rank, shift)
        forms.add(form)
        t = fan_in * largest * LARGEST
        noise = t * rank * LARGEST
        if form == "whole":
            assert noise <= INT32_MAX
        elif form == "split":
            assert noise > INT32_MAX
            assert (2**shift - 1) * rank * LARGEST <= INT32_MAX
            # The product with the matrix has the bound of t.
            assert t + (noise >> shift) + 1 <= INT32_MAX
    assert "whole" in forms or rank * largest > 2**17


def test_built_at_the_extremes():
    # 127 + noise of 127 * 127 * 3: saturated on either side, never -128.
    factors = (jnp.full((3, 2, 1), 127, jnp.int8), jnp.full((3, 1, 2), 127, jnp.int8))
    w = jnp.array([[127, -127], [0, 5]], jnp.int8)
    for sign in (1, -1):
        got = fixed_point.built(w, factors, jnp.int32(sign), 0)
        assert got.dtype == jnp.int8
        assert (np.asarray(got) == sign * 127).all()
        small = np.asarray(fixed_point.built(w, factors, jnp.int32(sign), 12), int)
        assert (small == np.clip(np.asarray(w, int) + sign * 12, -127, 127)).all()


@given(st.lists(SIGNED, min_size=1, max_size=20))
def test_limbs_add_up_like_one_number(xs):
    high, low = fixed_point.to_limbs(jnp.array(xs, jnp.int32))
    got = int(fixed_point.from_limbs(high.sum(dtype=jnp.int32), low.sum(dtype=jnp.int32)))
    total = sum(xs)
    inside = abs(total) < INT32_MAX - 2**16
    assert got == total if inside else got in (total, math.copysign(INT32_MAX, total))


def test_the_largest_sum_over_pairs_fits():
    for rank in (1, 4):
        pairs = fixed_point.pairs_in_int32(rank)
        assert pairs * rank * LARGEST**2 <= INT32_MAX < (pairs + 1) * rank * LARGEST**2
    # Limbs of 2^15 - 1 chunks at their largest.
    high, low = fixed_point.to_limbs(jnp.array([INT32_MAX, -INT32_MAX], jnp.int32))
    chunks = 2**15 - 1
    assert np.asarray(low, np.int64).max() * chunks <= INT32_MAX
    got = fixed_point.from_limbs(high * chunks, low * chunks)
    assert got.tolist() == [INT32_MAX, -INT32_MAX]
    assert jax.eval_shape(fixed_point.from_limbs, high, low).dtype == jnp.int32
