"""Episodes of every purpose are others: fresh ones decide nothing before."""

import itertools

import jax
import jax.numpy as jnp
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


def test_no_key_serves_two_purposes() -> None:
    init, search, held_out = evolution.keys(jnp.int32(3))
    rounds = jax.vmap(lambda generation: episodes.round_key(3, generation))(jnp.arange(51))
    halves = jax.vmap(jax.random.split)(
        rounds
    )  # what is collected, and in which order it is learned
    keys = {
        "the parts of a run": jnp.stack([init, search, held_out]),
        "held-out episodes": jax.random.split(held_out, 256),
        "the environments that PPO starts with": jax.random.split(search, 64),
        "rounds of PPO": rounds,
        "parts of a round": halves,
        "steps of a round": jax.vmap(lambda key: jax.random.split(key, 128))(halves[:4, 0]),
        "fresh episodes": episodes.fresh_keys(3, 0, 256),
        "fresh episodes later": episodes.fresh_keys(3, 1, 256),
        "fresh episodes at last": episodes.fresh_keys(3, 50, 256),
        "fresh episodes of another seed": episodes.fresh_keys(4, 0, 256),
        "eggroll eval": episodes.evaluated_keys(3, 256),
        "the film": episodes.film_key(3)[None],
        "actions in held-out episodes": episodes.action_keys(3, held_out_starts(3, 256)),
        "actions in fresh episodes": episodes.action_keys(3, episodes.fresh_starts(3, 1, 256)),
        "actions in eggroll eval": episodes.action_keys(3, episodes.evaluated_starts(3, 256)),
        "actions of the first starts": episodes.action_keys(3, np.arange(256)),
    }
    for purpose, some in keys.items():
        assert len(bits(some)) == some.size, purpose
    for (one, some), (other, more) in itertools.combinations(keys.items(), 2):
        assert not bits(some) & bits(more), f"{one}, {other}"


def test_no_start_serves_two_purposes() -> None:
    training = [training_starts(3, g, e, 64)[::2] for g in range(20) for e in range(2)]
    starts = {
        "training": np.concatenate(training),
        "held-out episodes": held_out_starts(3, 256),
        "fresh episodes": episodes.fresh_starts(3, 20, 256),
        "fresh episodes later": episodes.fresh_starts(3, 21, 256),
        "fresh episodes of another seed": episodes.fresh_starts(4, 20, 256),
        "eggroll eval": episodes.evaluated_starts(3, 256),
        "the film": np.array([0]),
    }
    for purpose, some in starts.items():
        assert len(set(some.tolist())) == some.size, purpose
    for (one, some), (other, more) in itertools.combinations(starts.items(), 2):
        assert not set(some.tolist()) & set(more.tolist()), f"{one}, {other}"


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
