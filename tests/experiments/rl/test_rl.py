"""Episodes are what a plain loop over gymnax gives; a small run learns and leaves what it promises."""

import json
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from policies import make_jax_environment

from experiments.rl.config import PRESETS
from experiments.rl.environments import Environment
from experiments.rl.libraries.gymnax import Gymnax
from experiments.rl.policy import Policy, make_policy
from experiments.rl.rollout import run_abreast, run_episode, run_episodes
from experiments.rl.statistics import Statistics, add, merge, no_sums, nothing_seen
from experiments.rl.train import in_words, make_trainer
from experiments.run.fields import changed
from experiments.run.metrics import read_metrics
from experiments.run.result import Result
from experiments.run.train import train

SMALL = changed(
    PRESETS["cartpole"], width=16, population=128, learning_rate=0.1, generations=8, seed=3
)
KEYS = jax.random.split(jax.random.key(0), 6)


@pytest.fixture(scope="module")
def cartpole() -> Gymnax:
    found = make_jax_environment("CartPole-v1")
    assert isinstance(found, Gymnax)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("rl") / "run"
    return folder, train(changed(SMALL, run_dir=folder))


def linear_policy(environment: Environment[Any]) -> tuple[Policy, Any]:
    policy = make_policy(environment.observations, environment.actions, depth=0)
    return policy, policy.init(jax.random.key(4))


# ---------------------------------------------------------------- episodes


def loop_over_steps(
    environment: Environment[Any],
    policy: Policy,
    params: Any,
    seen: Statistics,
    key: Any,
    deterministic: bool,
) -> tuple[float, int, list[Any]]:
    """The same episode, step by step in Python."""
    act, step = jax.jit(policy.act), jax.jit(environment.step)
    reset_key, episode_key = jax.random.split(key)
    observation, state = environment.reset(reset_key)
    score, steps, over, observations = 0.0, 0, False, []
    while not over:
        policy_key, env_key = jax.random.split(jax.random.fold_in(episode_key, steps))
        observations.append(environment.encode(observation))
        action = act(params, seen, observations[-1], None if deterministic else policy_key)
        observation, state, reward, terminated = step(env_key, state, action)
        score, steps = score + float(reward), steps + 1
        over = bool(terminated) or bool(environment.is_cut(state, jnp.int32(steps)))
    return score, steps, observations


@pytest.mark.parametrize(
    ("name", "deterministic"),
    [("CartPole-v1", True), ("CartPole-v1", False), ("UmbrellaChain-bsuite", False)],
)
def test_episode_equals_a_loop_over_steps(name: str, deterministic: bool) -> None:
    environment = make_jax_environment(name)
    policy, params = linear_policy(environment)
    before = merge(nothing_seen(environment.observations), no_sums(environment.observations))

    @jax.jit
    def together(keys: Any) -> Any:
        play = lambda key: run_episode(
            environment, policy, params, before, key, deterministic, watch=True
        )
        return jax.vmap(play)(keys)

    found = together(KEYS)
    right = [loop_over_steps(environment, policy, params, before, k, deterministic) for k in KEYS]
    # One loop for all: an episode that is over stays as it is while the others go on.
    assert found.steps.tolist() == [steps for _, steps, _ in right]
    np.testing.assert_allclose(found.score, [score for score, _, _ in right], atol=1e-5)
    if name == "CartPole-v1":
        assert len(set(found.steps.tolist())) > 1
    # Statistics are of live steps alone, the first observation among them, the last one not.
    sums = no_sums(environment.observations)
    for observation in (o for _, _, observations in right for o in observations):
        sums = add(sums, before, observation)
    merged, expected = merge(before, found.seen), merge(before, sums)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), merged, expected
    )


def test_episode_ends_where_the_environment_says_so(cartpole: Gymnax) -> None:
    policy, params = linear_policy(cartpole)
    nothing = nothing_seen(4)
    for key in KEYS[:3]:
        reset_key, step_key = jax.random.split(key)
        observation, state = cartpole.env.reset(reset_key)
        score, over = 0.0, False
        while not over:
            action = policy.act(params, nothing, observation, None)
            observation, state, reward, terminated, truncated, _ = cartpole.env.step(
                step_key, state, action
            )
            score, over = score + float(reward), bool(terminated | truncated)
        assert float(run_episode(cartpole, policy, params, nothing, key).score) == score


def test_episode_is_cut_at_the_time_limit(cartpole: Gymnax) -> None:
    # No pole falls within seven steps.
    short = make_jax_environment("CartPole-v1", {"max_steps_in_episode": 7})
    policy, params = linear_policy(short)
    play = lambda key: run_episode(short, policy, params, nothing_seen(4), key)
    episodes = jax.vmap(play)(KEYS)
    assert set(episodes.steps.tolist()) == {7}
    assert set(episodes.score.tolist()) == {7.0}


@pytest.mark.parametrize("run", [run_episodes, run_abreast])
def test_several_episodes_are_the_episodes_alone(run: Any, cartpole: Gymnax) -> None:
    policy, params = linear_policy(cartpole)
    seen = merge(nothing_seen(4), no_sums(4))

    @jax.jit
    def both(keys: Any) -> Any:
        several = lambda keys: run(cartpole, policy, params, seen, keys, False, True)
        alone = lambda key: run_episode(cartpole, policy, params, seen, key, False, True)
        return jax.vmap(several)(keys), jax.vmap(jax.vmap(alone))(keys)

    found, right = both(KEYS.reshape(2, 3))
    assert len(set(right.steps.ravel().tolist())) > 3
    np.testing.assert_array_equal(found.steps, right.steps.sum(1))
    np.testing.assert_array_equal(found.score, right.score.sum(1))
    for a, b in zip(found.seen, right.seen, strict=True):
        np.testing.assert_allclose(a, b.sum(1), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- a generation


def test_several_episodes_are_averaged() -> None:
    config = changed(SMALL, population=8, episodes=3, normalise=True)
    trainer = make_trainer(config)
    carry, row = trainer.generation(trainer.start())
    # In CartPole every step gives a reward of one.
    assert int(row["environment_steps"]) == round(float(row["fitness_mean"]) * 8 * 3)
    assert float(carry.own.statistics.seen) == int(row["environment_steps"])


def test_seeds_in_one_program_are_the_runs_one_by_one() -> None:
    config = changed(SMALL, population=8, width=4, normalise=True)

    # One program for both runs alone: everything random is in the state.
    generation = make_trainer(config).generation

    def after(config: Any, generation: Any) -> Any:
        state = make_trainer(config).start()
        for _ in range(2):
            state, row = generation(state)
        return state, row

    several = changed(config, seeds=2)
    together, rows = after(several, make_trainer(several).generation)
    for i in range(2):
        alone, row = after(changed(config, seed=config.seed + i), generation)
        assert int(rows["environment_steps"][i]) == int(row["environment_steps"])
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-3, atol=1e-4)


def test_held_out_episodes_are_the_same_every_time() -> None:
    config = changed(SMALL, env="Pendulum-v1", population=4, width=4)
    trainer = make_trainer(config)
    first, again = (float(trainer.measure(trainer.start())["held_out_return"]) for _ in range(2))
    assert first == again
    other = trainer.start()._replace(seed=jax.numpy.int32(9))
    assert float(trainer.measure(other)["held_out_return"]) != first


# ---------------------------------------------------------------- a run


def test_a_small_run_learns(run: tuple[Path, Result]) -> None:
    _, result = run
    assert result["held_out_return_before"] < 60
    assert result["held_out_return"] > 150
    assert result.generations == SMALL.generations


def test_metrics_have_a_row_a_generation(run: tuple[Path, Result]) -> None:
    folder, result = run
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["generation"] for row in rows] == list(range(SMALL.generations))
    assert rows[0]["held_out_return"] == result["held_out_return_before"]
    assert rows[-1]["environment_steps"] == result["environment_steps"]
    for before, row in zip([{"environment_steps": 0}, *rows], rows, strict=False):
        # In CartPole every step gives a reward of one.
        taken = row["environment_steps"] - before["environment_steps"]
        assert taken == pytest.approx(row["fitness_mean"] * SMALL.evolution.population)
        assert row["fitness_worst"] <= row["fitness_mean"] <= row["fitness_best"]
        assert row["invalid"] == 0
        assert row["timing"]["seconds"] > 0


def test_the_same_seed_gives_the_same_rows(run: tuple[Path, Result], tmp_path: Path) -> None:
    folder, result = run
    again = train(changed(SMALL, run_dir=tmp_path))

    def untimed(path: Path) -> list[dict[str, Any]]:
        return [{**row, "timing": None} for row in read_metrics(path / "metrics.jsonl")]

    assert untimed(folder) == untimed(tmp_path)
    assert again["held_out_return"] == result["held_out_return"]


def test_run_folder_holds_what_it_promises(run: tuple[Path, Result]) -> None:
    folder, result = run
    config = json.loads((folder / "config.json").read_text())
    assert config["evolution"]["population"] == SMALL.evolution.population
    assert config["generations"] == SMALL.generations
    packages = json.loads((folder / "versions.json").read_text())["packages"]
    assert packages["jax"] == jax.__version__
    assert json.loads((folder / "result.json").read_text())["sentence"] == result.sentence
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"8"}
    assert not list(folder.glob("*.part"))


def test_curve_is_a_picture(run: tuple[Path, Result]) -> None:
    folder, _ = run
    data = (folder / "curve.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert 800 <= width <= 2000
    assert 500 <= height <= 1500
    assert len(data) > 20_000


def test_a_missed_target_is_admitted(run: tuple[Path, Result]) -> None:
    _, result = run
    assert result.learned is (result["fresh_return"] >= 500)
    assert result.sentence.startswith("Learned to" if result.learned else "Not yet learned to")
    assert "of 500 steps, on 64 fresh episodes, after" in result.sentence


@pytest.mark.parametrize(
    ("target", "score", "words"),
    [
        (500.0, 500.0, "Learned to balance the pole: the mean policy holds it for 500.0 of 500"),
        (
            500.0,
            499.98,
            "Not yet learned to balance the pole (target 500): the mean policy holds it for 499.9",
        ),
        (500.0, None, "Not learned to balance the pole: the return is no longer finite"),
        (None, None, "Not learned to balance the pole: the return is no longer finite"),
        (None, 20.0, "Trained on CartPole-v1: the mean policy holds it for 20.0 of 500"),
    ],
)
def test_results_in_words(target: float | None, score: float | None, words: str) -> None:
    config = changed(SMALL, target=target)
    assert in_words(config, [score]).startswith(words)


def test_seeds_that_learned_are_counted() -> None:
    words = (
        "2 of 3 seeds learned to balance the pole (target 450): the mean policy holds it for 454.0"
    )
    assert in_words(changed(SMALL, target=450.0), [500.0, 462.0, 400.0]).startswith(words)


def test_a_return_that_is_not_finite_is_told_in_all_seeds() -> None:
    config = changed(SMALL, env="Pendulum-v1", target=-150.0)
    words = "Not learned Pendulum-v1: the return is no longer finite"
    assert in_words(config, [-140.0, None, -145.0]) == words


def test_a_reached_target_stops_early(tmp_path: Path) -> None:
    # Every episode of CartPole is longer than one step, so even the first policy will do.
    easy = changed(SMALL, run_dir=tmp_path, generations=None, target=1.0)
    result = train(easy)
    assert result.learned
    assert (result.generations, result["environment_steps"]) == (0, 0)
    assert (tmp_path / "curve.png").exists()
    assert read_metrics(tmp_path / "metrics.jsonl") == []
