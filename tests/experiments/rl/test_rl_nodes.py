"""Noise on the outputs of a policy's layers: stretches, a run that learns, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from policies import parts

from experiments.rl import evolution
from experiments.rl.config import PRESETS, Nodes
from experiments.rl.rollout import run_episodes
from experiments.rl.statistics import nothing_seen
from experiments.rl.stretches import play
from experiments.run.cli import main
from experiments.run.fields import changed
from experiments.run.metrics import read_metrics
from experiments.run.train import train

SMALL = changed(
    PRESETS["cartpole"],
    width=16,
    depth=1,
    population=64,
    perturb="nodes",
    sigma=1.0,
    learning_rate=0.05,
    nodes=Nodes(gamma=1.0, steps=60),
    generations=12,
    evaluate_every=4,
)


@pytest.mark.parametrize(("hold", "episodes"), [(1, 1), (4, 2)])
def test_stretches_without_noise_are_the_episodes(hold: int, episodes: int) -> None:
    environment, policy = parts(SMALL)
    params = policy.init(jax.random.key(1))
    seen, keys = nothing_seen(4), jax.random.split(jax.random.key(2), episodes)
    layers = evolution.layers_of(SMALL)
    found = jax.jit(
        lambda: play(environment, policy, layers, params, params, seen, keys, 200, hold, watch=True)
    )()
    right = jax.jit(lambda: run_episodes(environment, policy, params, seen, keys, watch=True))()
    assert int(found.total.steps) == int(right.steps)
    assert float(found.rewards.sum()) == float(right.score) == float(found.total.score)
    assert int((found.rewards > 0).sum()) == -(-int(right.steps) // hold)
    for a, b in zip(found.total.seen, right.seen, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_gradient_points_uphill() -> None:
    """Of an environment whose reward is the action, with credit of own rewards alone."""
    config = changed(
        SMALL, env="Pendulum-v1", perturb="mixed", sigma=0.1, optimizer="sgd",
        nodes=Nodes(gamma=0.0, hold=2, steps=8, scale=2.0),
    )  # fmt: skip
    environment, policy = parts(config)

    upward = copy.copy(environment)

    def step(key: Any, state: Any, action: Any) -> Any:
        observation, state, _, over = environment.step(key, state, action)
        return observation, state, action.sum(), over

    upward.step = step  # type: ignore[method-assign]
    generation = evolution.make_generation(config, policy, upward)
    carry = evolution.start(config, policy, upward, jnp.int32(0))
    bias = lambda c: float(c.learner.params["policy"]["Dense_1"]["bias"][0])
    after, row = jax.jit(generation)(carry)
    assert bias(after) > bias(carry)
    assert int(row["environment_steps"]) == 64 * 8


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nodes") / "run"
    result = train(changed(SMALL, run_dir=folder))
    assert result["held_out_return"] > result["held_out_return_before"] + 50
    return folder


def test_rows_are_those_of_weight_noise(whole: Path) -> None:
    rows = read_metrics(whole / "metrics.jsonl")
    assert len(rows) == SMALL.generations
    before = 0
    for row in rows:
        # In CartPole every step gives a reward of one.
        assert row["environment_steps"] - before == pytest.approx(
            row["fitness_mean"] * SMALL.evolution.population
        )
        before = row["environment_steps"]
        assert row["fitness_worst"] < row["fitness_mean"] < row["fitness_best"] <= 60
        assert row["update_norm"] > 0


def test_continued_runs_are_the_unbroken_run(whole: Path, tmp_path: Path) -> None:
    for generations in (5, SMALL.generations):
        train(changed(SMALL, run_dir=tmp_path, generations=generations))
    untimed = [
        [{**row, "timing": None} for row in read_metrics(path / "metrics.jsonl")]
        for path in (whole, tmp_path)
    ]
    assert untimed[0] == untimed[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--algorithm", "ppo"], "--algorithm ppo has no noise; choose eggroll"),
        (["--env", "gymnasium:CartPole-v1"], "episodes are played twice, by a JAX program"),
        (["--rank", "full"], "--rank full: noise on nodes has no rank"),
        (["--nodes.gamma", "1.5"], "--nodes.gamma 1.5: choose a number from 0 to 1"),
        (["--nodes.hold", "0"], "--nodes.hold 0: choose a whole number of at least 1"),
        (["--nodes.scale", "0"], "--nodes.scale 0.0: choose a positive number"),
    ],
)
def test_mistakes_get_one_sentence(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["rl", "--perturb", "nodes", *words, "--run-dir", str(tmp_path / "run")]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
