"""Fresh episodes decide nothing before: their keys are those of no other purpose."""

import dataclasses

import jax
import numpy as np
import own_environments
import own_gymnasium
import pytest

from experiments.rl import episodes, evolution
from experiments.rl.config import PRESETS
from experiments.rl.outside import Outside, held_out_starts, training_starts
from experiments.rl.train import job

SMALL = dataclasses.replace(
    PRESETS["own"], env=f"{own_environments.__file__}:point", population=4, width=4, depth=1
)


def bits(keys: jax.Array) -> set[bytes]:
    return {bytes(np.asarray(x).tobytes()) for x in jax.random.key_data(keys).reshape(-1, 2)}


def test_keys_of_fresh_episodes_are_keys_of_nothing_else() -> None:
    init, search, held_out = evolution.keys(jax.numpy.int32(3))
    used = bits(jax.random.split(held_out, 256)) | bits(jax.numpy.stack([init, search, held_out]))
    evaluated = bits(
        jax.random.split(jax.random.fold_in(jax.random.key(3), episodes.EVALUATED), 256)
    )
    fresh = [bits(episodes.fresh_keys(3, generation, 256)) for generation in (0, 1, 50)]
    assert sum(map(len, fresh)) == len(set().union(*fresh)) == 3 * 256
    for one in fresh:
        assert not one & (used | evaluated)
    assert not bits(episodes.fresh_keys(4, 0, 256)) & fresh[0]


def test_starts_of_fresh_episodes_are_starts_of_nothing_else() -> None:
    used = set(held_out_starts(3, 256).tolist())
    for generation in range(20):
        used |= set(training_starts(3, generation, 0, 64).tolist())
    fresh = set(episodes.fresh_starts(3, 20, 256).tolist())
    assert len(fresh) == 256
    assert not fresh & used
    assert not fresh & set(episodes.fresh_starts(3, 21, 256).tolist())


@pytest.mark.slow
def test_fresh_returns_are_of_the_policy_by_seed() -> None:
    config = dataclasses.replace(SMALL, seeds=2)
    carry = job(config).start()
    found = episodes.fresh_returns(config, carry, 0, 32)
    assert found.shape == (2, 32)
    assert len(np.unique(found)) == 64
    alone = dataclasses.replace(SMALL, seed=1)
    right = episodes.fresh_returns(alone, job(alone).start(), 0, 32)
    np.testing.assert_allclose(found[1:], right, rtol=1e-5)
    held_out = float(job(alone).measure(job(alone).start())["held_out_return"])
    # As good as held-out episodes, and others.
    assert held_out != pytest.approx(right.mean(), rel=1e-6)
    assert held_out == pytest.approx(right.mean(), rel=0.3)


@pytest.mark.slow
def test_fresh_returns_of_an_outside_environment() -> None:
    config = dataclasses.replace(
        SMALL, env=f"{own_gymnasium.__file__}:line", workers=1, population=8
    )
    environment = episodes.environment_of(config)
    outside = Outside(config, environment)  # type: ignore[arg-type]
    carry = outside.start()
    found = episodes.fresh_returns(config, carry, 0, 12, outside)
    assert found.shape == (1, 12)
    assert len(np.unique(found)) > 6
    np.testing.assert_array_equal(found, episodes.fresh_returns(config, carry, 0, 12, outside))
    evaluated = episodes.evaluate(config, carry, 12, config.seed)["seed 0"]
    held_out = outside.returns(carry, held_out_starts(config.seed, 12))
    assert not set(evaluated) & set(held_out.tolist())
