"""Environments of gymnax and of one's own, in JAX: policies of both kinds play in them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax import registered_envs
from policies import make_jax_environment, parts

from experiments.rl.config import PPO, PRESETS
from experiments.rl.environments import Continuous, Discrete
from experiments.rl.libraries.gymnax import Gymnax
from experiments.rl.statistics import nothing_seen
from experiments.rl.train import make_trainer
from experiments.run.errors import UsageError
from experiments.run.fields import changed

# MNISTBandit downloads its data.
NAMES = [name for name in registered_envs if name != "MNISTBandit-bsuite"]
SMALL = changed(
    PRESETS["cartpole"], width=4, depth=1, population=4, held_out_episodes=2, normalise=True
)


def test_there_are_25() -> None:
    assert len(NAMES) == 25


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_environment_can_be_played(name: str) -> None:
    environment, policy = parts(changed(SMALL, env=name))
    assert isinstance(environment, Gymnax)
    space = environment.env.action_space(environment.params)

    @jax.jit
    def play(key: Any) -> Any:
        params = policy.init(key)
        first, state = environment.reset(key)

        def step(carry: Any, key: Any) -> Any:
            state, encoded = carry
            action = policy.act(params, nothing_seen(environment.observations), encoded, key)
            seen, state, reward, _ = environment.step(key, state, action)
            allowed = jnp.asarray(space.contains(action)).all()
            return (state, environment.encode(seen)), (encoded, jnp.float32(reward), allowed)

        return jax.lax.scan(step, (state, environment.encode(first)), jax.random.split(key, 4))[1]

    seen, rewards, allowed = play(jax.random.key(0))
    assert seen.shape == (4, environment.observations)
    assert seen.dtype == jnp.float32
    assert np.isfinite(seen).all()
    assert np.isfinite(rewards).all()
    assert allowed.all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    # Each way to be trained beside another kind of observations and actions.
    [
        ("Pendulum-v1", dict(deterministic=False)),
        ("FrozenLake-misc", dict(rank="full", activation="relu", shaping="centered_rank")),
        ("Catch-bsuite", dict(activation="layer_norm_relu", episodes=2, sigma_decay=0.9, learning_rate_decay=0.9)),
        ("PointRobot-misc", dict(algorithm="ppo", optimizer="optim.lion")),
        ("FrozenLake-misc", dict(algorithm="ppo", activation="layer_norm_relu", ppo_anneal=True)),
    ],
)  # fmt: skip
def test_kinds_of_spaces_are_trained(name: str, changes: dict[str, Any]) -> None:
    anneal = changes.pop("ppo_anneal", False)
    ppo = PPO(environments=2, steps=4, epochs=1, minibatches=2, anneal=anneal)
    config = changed(SMALL, env=name, ppo=ppo, **changes)
    trainer = make_trainer(config)
    before = trainer.start()
    after, row = trainer.generation(trainer.start())
    assert int(row["environment_steps"]) >= 4
    assert float(after.own.statistics.seen) == int(row["environment_steps"])
    assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)
    assert np.isfinite(trainer.measure(after)["held_out_return"])
    leaves = jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), before, after))
    assert any(leaves)


def test_spaces_are_understood() -> None:
    assert make_jax_environment("CartPole-v1").actions == Discrete(2)
    assert make_jax_environment("FrozenLake-misc").observations == 16
    assert (
        make_jax_environment("FrozenLake-misc").encode(jnp.int32(3)).tolist()
        == [0] * 3 + [1] + [0] * 12
    )
    assert make_jax_environment("Breakout-MinAtar").observations == 400
    actions = make_jax_environment("PointRobot-misc").actions
    assert isinstance(actions, Continuous)
    np.testing.assert_allclose(actions.high, [0.1, 0.1])


def test_an_environment_that_cannot_be_set_up_is_told() -> None:
    with pytest.raises(
        UsageError, match="no environment 'CartPole-v2'; did you mean 'CartPole-v1'"
    ):
        make_jax_environment("CartPole-v2")
    with pytest.raises(UsageError, match="could not set up MNISTBandit-bsuite"):
        make_jax_environment("MNISTBandit-bsuite")
