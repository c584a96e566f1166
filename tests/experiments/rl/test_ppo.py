"""PPO against plain loops in float64, and in an environment that it must learn."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from policies import parts
from scipy import stats

from experiments.rl import ppo
from experiments.rl.config import PPO, PRESETS
from experiments.rl.environments import Continuous, Discrete
from experiments.rl.policy import categorical, gaussian, make_policy
from experiments.run.fields import changed
from experiments.run.metrics import read_metrics
from experiments.run.train import train


def test_categorical_distributions() -> None:
    logits = jnp.array([0.3, -1.0, 2.0])
    d = categorical(logits)
    p = np.exp(logits) / np.exp(logits).sum()
    assert int(d.best) == 2
    np.testing.assert_allclose([d.log_prob(jnp.int32(i)) for i in range(3)], np.log(p), rtol=1e-5)
    np.testing.assert_allclose(d.entropy, stats.entropy(p), rtol=1e-5)
    drawn = jax.vmap(d.sample)(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(np.bincount(drawn) / 4000, p, atol=0.03)


def test_gaussian_distributions() -> None:
    mean, log_std = jnp.array([0.5, -2.0]), jnp.array([0.1, -0.7])
    d, right = gaussian(mean, log_std), stats.norm(mean, np.exp(log_std))
    action = jnp.array([1.0, -1.5])
    np.testing.assert_allclose(d.log_prob(action), right.logpdf(action).sum(), rtol=1e-5)
    np.testing.assert_allclose(d.entropy, right.entropy().sum(), rtol=1e-5)
    np.testing.assert_array_equal(d.best, mean)
    drawn = jax.vmap(d.sample)(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(drawn.std(0), np.exp(log_std), rtol=0.05)


def test_continuous_actions_are_cut_at_the_bounds() -> None:
    actions = Continuous(np.float32([-2, 0]), np.float32([2, 1]))
    policy = make_policy(3, actions)
    assert policy.to_env(jnp.array([0.0, 0.0])).tolist() == [0, 0.5]
    assert policy.to_env(jnp.array([-5.0, 1.0])).tolist() == [-2, 1]
    assert make_policy(3, Discrete(4)).to_env(jnp.int32(3)) == 3


def slow_advantages(worth, values, over, last, discount, gae_lambda):  # type: ignore[no-untyped-def]
    """Sums of discounted one-step errors, term by term."""
    steps = len(worth)
    after = np.append(values[1:], last)
    delta = worth + discount * (1 - over) * after - values
    out = np.zeros(steps)
    for t in range(steps):
        weight = 1.0
        for k in range(t, steps):
            out[t] += weight * delta[k]
            if over[k]:
                break
            weight *= discount * gae_lambda
    return out


def test_advantages_are_the_sums_of_the_paper() -> None:
    chance = np.random.default_rng(0)
    worth, values, last = (
        chance.normal(size=(12, 3)),
        chance.normal(size=(12, 3)),
        chance.normal(size=3),
    )
    over = chance.random((12, 3)) < 0.25
    found = ppo.advantages(0.9, 0.8, *map(jnp.float32, (worth, values, over, last)))
    for i in range(3):
        right = slow_advantages(worth[:, i], values[:, i], over[:, i], last[i], 0.9, 0.8)
        np.testing.assert_allclose(found[:, i], right, rtol=1e-4, atol=1e-5)


CONFIG = changed(
    PRESETS["cartpole"],
    algorithm="ppo",
    optimizer="sgd",
    ppo=PPO(environments=4, steps=16, minibatches=2),
)


def test_the_first_policy_has_nearly_equal_chances() -> None:
    environment, policy = parts(CONFIG)
    carry = ppo.start(CONFIG, policy, environment, jnp.int32(0))
    d = policy.distribution(carry.learner.params, carry.own.statistics, jnp.ones(4))
    np.testing.assert_allclose(d.entropy, np.log(2), rtol=1e-3)


def test_a_generation_counts_steps_and_episodes() -> None:
    environment, policy = parts(CONFIG)
    carry = ppo.start(CONFIG, policy, environment, jnp.int32(0))
    generation = jax.jit(ppo.make_generation(CONFIG, policy, environment))
    returns, episodes = 0.0, 0
    for g in range(6):
        carry, row = generation(carry)
        assert int(carry.generation) == g + 1
        assert int(row["environment_steps"]) == 64
        episodes += int(row["episodes"])
        returns += float(row["episodes"] and row["episodes"] * row["episode_return"])
    # Every step of CartPole is worth one, in an episode that is over or one that is still on.
    assert returns + float(carry.own.score.sum()) == 6 * 64
    assert episodes > 4


@pytest.mark.slow
@pytest.mark.parametrize("normalise", [False, True])
def test_ppo_learns_to_balance(tmp_path: Path, normalise: bool) -> None:
    config = changed(
        PRESETS["cartpole"], algorithm="ppo", normalise=normalise, run_dir=tmp_path, width=16, generations=25,
        max_generations=25, ppo=PPO(environments=16, steps=64, minibatches=4, learning_rate=3e-3),
    )  # fmt: skip
    result = train(config)
    assert result["held_out_return_before"] < 120
    # At this rate returns go up and down later, differently after any change of rounding.
    returns = [row["held_out_return"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert max(returns) > 250
