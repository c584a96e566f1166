"""The credit of rows, against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eggroll import EvolutionStrategy, credit, integer
from eggroll.arithmetic import INTEGERS

DIFFERENCES = np.random.default_rng(0).normal(size=(3, 7))


def by_loops(differences, decayed):
    out = differences.copy()
    for p in range(out.shape[0]):
        for t in reversed(range(out.shape[1] - 1)):
            out[p, t] = differences[p, t] + decayed(out[p, t + 1])
    return out


@pytest.mark.parametrize("gamma", [0, 0.3, 0.5, 0.9, 1])
def test_causal_credit_is_the_discounted_sum_of_later_differences(gamma):
    with jax.enable_x64(True):
        got = credit.causal(gamma)(jnp.asarray(DIFFERENCES))
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, by_loops(DIFFERENCES, lambda c: gamma * c), rtol=1e-12)
    powers = gamma ** np.arange(7.0) if gamma else np.eye(7)[0]
    first = [np.dot(powers, d) for d in DIFFERENCES]
    np.testing.assert_allclose(got[:, 0], first, rtol=1e-12)


def test_own_credit_and_that_of_an_episode():
    d = jnp.asarray(DIFFERENCES, jnp.float32)
    np.testing.assert_array_equal(credit.own()(d), d)
    whole = np.repeat(d.sum(1, keepdims=True), 7, 1)
    np.testing.assert_allclose(credit.episode()(d), whole, rtol=1e-6)
    one = d[:, :1]
    for how in (credit.own(), credit.causal(0.5), credit.causal(), credit.episode()):
        np.testing.assert_array_equal(how(one), one)


@pytest.mark.parametrize("gamma", [0, 1 / 8, 0.25, 0.5, 1])
def test_integers_are_shifted_towards_zero(gamma):
    d = np.random.default_rng(1).integers(-50, 51, (4, 9)).astype(np.int32)
    got = credit.causal(gamma)(jnp.asarray(d))
    assert got.dtype == np.int32
    expected = by_loops(d, lambda c: int(np.sign(c)) * int(abs(int(c)) * gamma))
    np.testing.assert_array_equal(got, expected)
    # The members of a pair that change places change the sign of the credit and nothing else.
    np.testing.assert_array_equal(credit.causal(gamma)(jnp.asarray(-d)), -expected)


def test_the_credit_of_integers_is_cut_to_int8():
    d = jnp.array([[100, -3, 5], [-1, 1, -40]], jnp.int32)
    rows, whole = INTEGERS.credit(credit.causal(0.5), d)
    assert rows.dtype == whole.dtype == jnp.int8
    np.testing.assert_array_equal(rows, [[16, -1, 5], [-10, -16, -16]])
    np.testing.assert_array_equal(whole, [16, -16])


def test_members_that_tie_have_no_credit():
    for how in (credit.own(), credit.causal(0.7), credit.episode()):
        assert not how(jnp.zeros((2, 5))).any()


@pytest.mark.parametrize("gamma", [-0.1, 1.5, "0.5", None, float("nan")])
def test_a_wrong_gamma_is_named(gamma):
    with pytest.raises(ValueError, match=r"credit: gamma=.*: must be a number from 0 to 1"):
        credit.causal(gamma)


def test_integers_need_a_power_of_two():
    for how in (credit.own(), credit.causal(0.5), credit.causal(1), credit.episode()):
        how.check_integers()
    with pytest.raises(
        ValueError, match=r"credit=causal\(0.3\): for int8 parameters gamma must be 0 or"
    ):
        INTEGERS.credit(credit.causal(0.3), jnp.zeros((1, 2), jnp.int32))


def test_credits_are_settings_and_print_as_they_are_made():
    assert credit.causal(0.5) == credit.causal(0.5) != credit.causal(0.25)
    assert credit.causal(0) == credit.own()
    shown = [repr(c) for c in (credit.own(), credit.causal(0.5), credit.episode())]
    assert shown == ["own()", "causal(0.5)", "episode()"]
    assert integer.strategy(
        population=2, optimizer=integer.threshold(0.1), perturb="nodes", credit=credit.own()
    ).credit == credit.causal(0)


def test_one_credit_for_all_rows_needs_no_rows_in_the_program():
    """Scores of seven tasks, where nothing in the program has seven rows: as their mean alone."""
    params, x = {"w": jnp.ones((4, 5)) / 3}, jnp.linspace(-1, 1, 12).reshape(3, 4)
    tasks = lambda p, key, x: jnp.arange(7.0) * jnp.tanh(x @ p["w"]).sum()
    mean = lambda p, key, x: tasks(p, key, x).mean()
    found = []
    for fitness in (tasks, mean):
        es = EvolutionStrategy(
            optimizer=optax.sgd(0.1),
            population=8,
            sigma=0.1,
            perturb="nodes",
            credit=credit.episode(),
        )
        state = es.init(params, 0)
        found.append(es.gradient(state, es.evaluate(state, fitness, x), fitness, x)["w"])
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_integers_move_by_rows_that_cancel_in_the_vote_of_their_pair():
    """Each pair is ahead in one row and behind in the other: no vote, but two rows that say something."""
    es = integer.strategy(
        population=4,
        optimizer=optax.chain(integer.by_rows(), integer.threshold(0.9)),
        perturb="nodes",
        credit=credit.own(),
    )
    fitness = lambda p, key, x: jax.lax.dot(x, p["w"], preferred_element_type=jnp.int32).sum(1)
    params, x = {"w": jnp.ones((4, 3), jnp.int8)}, jnp.array([[3] * 4, [-3] * 4], jnp.int8)
    state = es.init(params, 0)
    values = jnp.array([[5, -5], [-5, 5]] * 2, jnp.int32)
    new, metrics = es.update(state, values, fitness, x)
    assert metrics.updated and jnp.any(new.params["w"] != params["w"])
