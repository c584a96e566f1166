"""What is handed in: one sentence for what is wrong, also where its type is that of nothing expected."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eggroll import EvolutionStrategy, Frozen
from eggroll import _checks as checks
from eggroll._settings import check


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("population", 8.0, "population=8.0: must be an even number .* members form pairs"),
        ("population", True, "population=True.*even number"),
        ("sigma", "0.1", "sigma='0.1'.*positive number or a schedule"),
        ("sigma", None, "sigma=None.*positive"),
        ("sigma", jnp.ones(2), "sigma=.*positive"),
        ("rank", 1.5, "rank=1.5.*an integer of at least 1"),
        ("chunk", 2.0, "chunk=2.0.*even number"),
        ("factor_memory", "1 GiB", "factor_memory='1 GiB'.*bytes"),
        ("mesh", 8, "mesh=8: must be a jax.sharding.Mesh or None"),
        ("shaping", "zscore", r"shaping='zscore'.*such as eggroll\.shaping\.zscore\(\)"),
        ("plan", {"w": Frozen()}, r"plan=.*by_shape\(overrides\)"),
        ("noise", "gaussian", r"noise='gaussian'.*such as eggroll\.noise\.counter\(\)"),
        ("optimizer", optax.adam, "optimizer=.*an optax transform"),
    ],
)
def test_settings_of_any_type(field, value, message):
    es = EvolutionStrategy(optimizer=optax.sgd(0.1), population=8, sigma=0.1)
    object.__setattr__(es, field, value)  # the constructor's types would refuse it here
    with pytest.raises(ValueError, match=message):
        check(es)


def test_numbers_of_any_type_are_numbers():
    for number in (1, 0.5, np.float32(0.1), np.array(3), jnp.bfloat16(0.1)):
        assert checks.is_number(number) and checks.is_positive(number)
    for other in (0, -1.0, np.inf, jnp.nan, "1", None, [1.0], 1j, jnp.ones(1), jnp.complex64(1)):
        assert not checks.is_positive(other)


@pytest.mark.parametrize(
    ("given", "axes", "message"),
    [
        (8, 0, "member 8: must be from 0 to 7 in a population of 8"),
        (-1, 0, "member -1: must be from 0 to 7"),
        (0.5, 0, "member 0.5: must be an integer from 0 to 7"),
        ([1], 0, r"member \[1\]: must be an integer from"),
        (3, 1, "member 3: must be a list of integers from 0 to 7"),
        ([0, 9, 10], 1, "member 9: must be from 0 to 7"),
        ([0.5], 1, r"member \[0.5\]: must be a list of integers"),
    ],
)
def test_members(given, axes, message):
    with pytest.raises(ValueError, match=message):
        checks.members(given, 8, axes)


@pytest.mark.parametrize(
    ("given", "axes", "message"),
    [
        (jnp.arange(2), 0, r"member: must be an integer from 0 to 7, got traced int32\[2\]"),
        (jnp.int32(0), 1, r"member: must be a list of integers from 0 to 7, got traced int32\[\]"),
        (jnp.float32(0), 0, r"member: must be an integer from 0 to 7, got traced float32\[\]"),
        ([jnp.arange(2)], 1, r"member: must be a list of integers .*, got traced int32\[1, 2\]"),
    ],
)
def test_traced_members(given, axes, message):
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda given: checks.members(given, 8, axes))(given)


def test_traced_pairs_without_an_axis():
    with pytest.raises(
        ValueError, match=r"pair: must be a list .* from 0 to 3, got traced int32\[\]"
    ):
        jax.jit(lambda given: checks.pairs(given, 8))(2)


def test_members_in_every_form():
    for given in (range(3), [0, 1, 2], np.arange(3), jnp.arange(3), (np.int8(0), 1, jnp.int32(2))):
        found = checks.members(given, 8, axes=1)
        assert found.dtype == jnp.int32 and found.tolist() == [0, 1, 2]
    assert checks.members([], 8, axes=1).shape == (0,)
    assert jax.jit(lambda i: checks.members([i, i + 1], 8, axes=1))(3).tolist() == [3, 4]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (2.5, "2.5"),
        (-1, "-1"),
        ("3", "'3'"),
        (None, "None"),
        (jnp.ones((3, 6)), r"float32\[3, 6\]"),
    ],
)
def test_generations(given, message):
    with pytest.raises(
        ValueError, match=f"generations={message}: must be an integer of at least 0"
    ):
        checks.generations(given)


@pytest.mark.parametrize("given", [0, 3, np.int64(3), np.array(3), jnp.int32(3)])
def test_generations_in_every_form(given):
    checks.generations(given)


def test_a_fitness_that_is_no_function():
    with pytest.raises(ValueError, match="fitness=3: must be a function of"):
        checks.fitness({}, 3)


@pytest.mark.parametrize(
    "values",
    [
        [1, None, 3.5, np.float32(4)],
        (1, np.nan, jnp.float32(3.5), True + 3),
        np.array([1, None, 3.5, 4], object),
        jnp.array([1, jnp.nan, 3.5, 4]),
    ],
)
def test_scores_in_every_form(values):
    found = checks.scores(values, 4, integer=False)
    np.testing.assert_array_equal(found, np.array([1, np.nan, 3.5, 4], np.float32))


def test_whole_scores_stay_integers_for_integer_noise():
    large = 2**24 + 1  # no float32
    assert checks.scores([large, 0], 2, integer=True).tolist() == [large, 0]
    assert checks.scores([large, None], 2, integer=True).dtype == jnp.float32
