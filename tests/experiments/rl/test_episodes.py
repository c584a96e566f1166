"""Fresh episodes decide nothing before: their keys are those of no other purpose."""

import jax
import numpy as np
import own_environments
import own_gymnasium
import pytest

from experiments.rl import episodes, evolution
from experiments.rl.config import PRESETS
from experiments.rl.outside import held_out_starts, training_starts
from experiments.rl.train import make_trainer
from experiments.run.fields import changed

SMALL = changed(
    PRESETS["own"], env=f"{own_environments.__file__}:point", population=4, width=4, depth=1
)


def bits(keys: jax.Array) -> set[bytes]:
    return {bytes(np.asarray(x).tobytes()) for x in jax.random.key_data(keys).reshape(-1, 2)}


def test_keys_of_fresh_episodes_are_keys_of_nothing_else() -> None:
    init, search, held_out = evolution.keys(jax.numpy.int32(3))
    used = bits(jax.random.split(held_out, 256)) | bits(jax.numpy.stack([init, search, held_out]))
    evaluated = bits(episodes.evaluated_keys(3, 256))
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
    config = changed(SMALL, seeds=2, held_out_episodes=32)
    several, alone = make_trainer(config), make_trainer(changed(config, seeds=1, seed=1))
    found = several.confirm(several.start())["fresh_return"]
    carry = alone.start()
    right = float(alone.confirm(carry)["fresh_return"])
    assert float(found[1]) == pytest.approx(right, rel=1e-5)
    held_out = float(alone.measure(carry)["held_out_return"])
    # As good as held-out episodes, and others.
    assert held_out != pytest.approx(right, rel=1e-6)
    assert held_out == pytest.approx(right, rel=0.3)
    # At another generation they are others again.
    later = alone.confirm(carry._replace(generation=carry.generation + 1))
    assert float(later["fresh_return"]) != right


@pytest.mark.slow
def test_episodes_of_an_outside_environment_are_others_for_every_purpose() -> None:
    config = changed(SMALL, env=f"{own_gymnasium.__file__}:line", workers=1, population=8)
    trainer = make_trainer(changed(config, held_out_episodes=12))
    carry = trainer.start()
    evaluated = trainer.evaluate(carry, 12, config.seed)["seed 0"]
    starts = held_out_starts(config.seed, 12)
    held_out = trainer.outside.returns(carry, starts)  # type: ignore[attr-defined]
    assert not set(evaluated) & set(held_out.tolist())
    fresh = trainer.confirm(carry)
    assert fresh == trainer.confirm(carry)
    assert fresh["fresh_return"] not in (np.mean(evaluated), held_out.mean())
