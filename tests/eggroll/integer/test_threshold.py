"""The transforms of int8 parameters against NumPy, and what they do to noise without any signal."""

from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eggroll import integer

PAIRS = 400
WEIGHTS = 20_000


def noise(steps, seed=0):
    """``Z`` of scores that know nothing of the noise."""
    return np.random.default_rng(seed).normal(size=(steps, WEIGHTS)) * 256 * PAIRS**0.5


def run(rule, zs, params=None, pairs=PAIRS):
    params = jnp.zeros(zs.shape[1], jnp.int8) if params is None else params
    update = jax.jit(rule.update)
    state, moves = rule.init(params), []
    for z in np.asarray(zs).round().astype(np.int32):
        step, state = update(-jnp.asarray(z), state, params, pairs=jnp.int32(pairs))
        moves.append(np.asarray(step, int))
        params = optax.apply_updates(params, step)
    return np.stack(moves), params, state


@pytest.mark.parametrize("pairs", [1, 2, 400, 2**20])
def test_a_weight_moves_where_z_is_significant(pairs):
    alphas = np.array([1.0, 0.5, 0.05, 1e-6])
    rule = integer.threshold(lambda t: jnp.asarray(alphas)[jnp.minimum(t, 3)], steps=4)
    level = [int(-16 * NormalDist().inv_cdf(a / 2)) * 16 for a in alphas]
    for t, c in enumerate(level):
        least = int(c * int(16 * pairs**0.5) // 16)
        zs = np.zeros((t + 1, 8), int)
        zs[t] = [0, 1, -1, least, least - 1, -least, 1 - least, 10 * least + 5]
        moves, *_ = run(rule, zs, pairs=pairs)
        expected = np.where(np.abs(zs[t]) >= least, np.sign(zs[t]), 0)
        np.testing.assert_array_equal(moves[t], expected)


def test_the_last_step_of_the_table_holds():
    rule = integer.threshold(integer.inverse_decay(1.0), steps=3)
    moves, _, state = run(rule, np.full((6, 1), 0.8 * 256 * PAIRS**0.5))
    # alpha 1, 1/2, 1/3, 1/3, ...: 0, .67 and .97 standard deviations.
    assert moves[:, 0].tolist() == [1, 1, 0, 0, 0, 0]
    assert state.count == 6


@pytest.mark.parametrize("alpha", [0.02, 0.2, 0.6])
def test_alpha_is_the_fraction_that_moves_by_chance(alpha):
    moves, *_ = run(integer.threshold(alpha), noise(2))
    # The level is rounded down to 1/16, so a little more moves.
    level = int(-16 * NormalDist().inv_cdf(alpha / 2)) / 16
    expected = 2 * (1 - NormalDist().cdf(level))
    assert np.mean(moves != 0) == pytest.approx(expected, abs=0.01)
    assert alpha <= expected < alpha + 0.05


def test_weights_stay_in_range():
    params = jnp.array([127, -127, 126, -126], jnp.int8)
    rules = [integer.threshold(1.0), integer.error_feedback(integer.threshold(1.0))]
    for rule in rules:
        _, after, _ = run(rule, np.tile([9e4, -9e4, 9e4, -9e4], (5, 1)), params)
        assert after.tolist() == [127, -127, 127, -127]
        # What pushed against the end does not delay the way back.
        _, after, state = run(rule, np.tile([9e4, -9e4, 9e4, -9e4], (5, 1)), params)
        step, _ = rule.update(jnp.int32([90000, -90000, 90000, -90000]), state, after, pairs=PAIRS)
        assert step.tolist() == [-1, 1, -1, 1]


@pytest.mark.parametrize("dtype", [jnp.int16, jnp.int8])
@pytest.mark.parametrize("shift", [1, 3, 5])
def test_momentum_keeps_the_spread_of_noise_and_raises_a_signal(shift, dtype):
    rule = integer.momentum(shift, dtype)
    steps = 8 * 2**shift
    update = jax.jit(rule.update)
    params = jnp.zeros(WEIGHTS, jnp.int8)
    state = rule.init(params)
    signal = 0.3 * 256 * PAIRS**0.5 * (np.arange(WEIGHTS) % 2)
    for z in noise(steps):
        grads = -jnp.asarray(z + signal, jnp.int32)
        out, state = update(grads, state, params, pairs=jnp.int32(PAIRS))
    z = -np.asarray(out, float) / (256 * PAIRS**0.5)
    assert out.dtype == jnp.int32 and jax.tree.leaves(state)[0].dtype == dtype
    coarse = dtype == jnp.int8
    assert z[0::2].std() == pytest.approx(1, abs=0.1 if coarse else 0.03)
    gain = (2 ** (shift + 1) - 1) ** 0.5
    assert z[1::2].mean() == pytest.approx(0.3 * gain, rel=0.15 if coarse else 0.05)
    assert abs(z[0::2].mean()) < 0.03


def test_momentum_is_odd():
    rule = integer.momentum(2)
    zs = noise(12)
    params, update = jnp.zeros(WEIGHTS, jnp.int8), jax.jit(rule.update)
    outs = []
    for sign in (1, -1):
        state = rule.init(params)
        for z in zs:
            out, state = update(jnp.asarray(sign * z, jnp.int32), state, params, pairs=PAIRS)
        outs.append(np.asarray(out))
    np.testing.assert_array_equal(outs[0], -outs[1])


@pytest.mark.parametrize("dtype", [jnp.int16, jnp.int8])
def test_error_feedback_is_a_sum_that_starts_again_where_it_led_to_a_step(dtype):
    rule = integer.error_feedback(integer.threshold(0.05), dtype)
    unit = 64 if dtype == jnp.int16 else 8
    zs = noise(10)
    moves, _, state = run(rule, zs)
    # The same in NumPy: sums in units, rounded to the nearest; the threshold is 31/16 deviations.
    root = int(16 * PAIRS**0.5)
    total = np.zeros(WEIGHTS, int)
    for z, move in zip(zs.round().astype(int), moves, strict=True):
        total += (np.sign(z) * ((np.abs(z) * unit // 16 + root // 2) // root) if unit == 64 else
                  np.sign(z) * ((np.abs(z) + root) // (2 * root)))  # fmt: skip
        passed = np.abs(total) >= 31 / 16 * unit
        np.testing.assert_array_equal(move, np.where(passed, np.sign(total), 0))
        total[passed] = 0
    np.testing.assert_array_equal(state.residual, -total)  # it sums gradients
    # More move than the memoryless 5%.
    assert 0.1 < np.mean(moves[3:] != 0) < 0.3


def test_error_feedback_finds_a_signal_that_never_passes_by_itself():
    signal = np.full((12, 3), 0.4 * 256 * PAIRS**0.5) * [1, -1, 0]
    memoryless, *_ = run(integer.threshold(0.05), signal)
    assert not memoryless.any()
    moves, *_ = run(integer.error_feedback(integer.threshold(0.05)), signal)
    assert moves.sum(0).tolist() == [2, -2, 0]


def test_they_chain_and_carry_integers_alone():
    rule = optax.chain(
        integer.momentum(2), integer.error_feedback(integer.threshold(0.1), jnp.int8)
    )
    moves, params, state = run(rule, noise(3))
    assert set(np.unique(moves)) == {-1, 0, 1} and params.dtype == jnp.int8
    assert all(jnp.issubdtype(x.dtype, jnp.integer) for x in jax.tree.leaves(state))
    frozen = {"a": jnp.zeros(3, jnp.int8), "b": None}
    grads = {"a": jnp.full(3, -90000), "b": None}
    step, _ = rule.update(grads, rule.init(frozen), frozen, pairs=PAIRS)
    assert step["b"] is None and step["a"].dtype == jnp.int8


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.5, float("nan"), lambda t: 1 - t])
def test_an_alpha_that_is_no_fraction_is_named(alpha):
    with pytest.raises(
        ValueError, match="threshold: alpha=.* must be a fraction of weights above 0 and up to 1"
    ):
        integer.threshold(alpha)


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="momentum: shift=0"):
        integer.momentum(0)
    with pytest.raises(ValueError, match="momentum: dtype=int32: must be int16 or int8"):
        integer.momentum(dtype=jnp.int32)
    with pytest.raises(ValueError, match="error_feedback: dtype=float32"):
        integer.error_feedback(integer.threshold(0.1), jnp.float32)
    rule, params = integer.threshold(0.1), jnp.zeros(2, jnp.int8)
    with pytest.raises(
        ValueError, match="expected the parameters and the number of pairs without a tie"
    ):
        rule.update(jnp.zeros(2, jnp.int32), rule.init(params), params)
