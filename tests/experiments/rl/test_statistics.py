"""Batches merged one by one give the moments of all observations together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.rl.statistics import Statistics, Sums, add, merge, no_sums, normalise, nothing_seen


def batch_sums(statistics: Statistics, batch: np.ndarray) -> Sums:
    deviation = jnp.asarray(batch, jnp.float32) - statistics.mean
    return Sums(jnp.ones(len(batch)), deviation, deviation**2)


# One size, so that one program is compiled; an empty row is one with weight 0.
merged = jax.jit(merge)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(-50, 50), st.floats(0.1, 30))
def test_moments_are_those_of_everything(
    seed: int, batches: int, shift: float, spread: float
) -> None:
    chance = np.random.default_rng(seed)
    data = [chance.normal(shift * chance.normal(), spread, (7, 3)) for _ in range(batches)]
    statistics = nothing_seen(3)
    for batch in data:
        statistics = merged(statistics, batch_sums(statistics, batch))
    everything = np.concatenate(data)
    assert float(statistics.seen) == len(everything)
    scale = np.abs(everything).max() + spread
    np.testing.assert_allclose(statistics.mean, everything.mean(0), atol=1e-5 * scale)
    variance = np.asarray(statistics.squares) / len(everything)
    np.testing.assert_allclose(variance, everything.var(0), rtol=2e-3, atol=1e-4 * scale)


def test_one_by_one_is_all_at_once() -> None:
    data = np.random.default_rng(0).normal(2, 3, (9, 4))
    before = merge(nothing_seen(4), batch_sums(nothing_seen(4), data[:4]))
    sums = no_sums(4)
    for row in data[4:]:
        sums = add(sums, before, jnp.asarray(row, jnp.float32))
    one, all_ = merge(before, sums), merge(before, batch_sums(before, data[4:]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, all_)


def test_nothing_new_changes_nothing() -> None:
    before = merge(nothing_seen(4), batch_sums(nothing_seen(4), np.ones((3, 4))))
    after = merge(before, no_sums(4))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_normalised_observations_have_mean_0_and_deviation_1() -> None:
    data = np.random.default_rng(1).normal([5, -2, 100], [2, 0.1, 30], (500, 3))
    statistics = merge(nothing_seen(3), batch_sums(nothing_seen(3), data))
    scaled = np.asarray(normalise(statistics, jnp.asarray(data, jnp.float32)))
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(scaled.std(0), 1, rtol=1e-3)


@pytest.mark.parametrize("value", [3.0, 3.5, 1e6])
def test_an_entry_that_never_moved_says_nothing(value: float) -> None:
    statistics = merge(nothing_seen(1), batch_sums(nothing_seen(1), np.full((5, 1), 3.0)))
    scaled = float(normalise(statistics, jnp.array([value]))[0])
    assert abs(scaled) <= min(10, abs(value - 3))


def test_before_anything_is_seen_observations_stay_as_they_are() -> None:
    assert normalise(nothing_seen(2), jnp.array([3.0, -40.0])).tolist() == [3.0, -40.0]
