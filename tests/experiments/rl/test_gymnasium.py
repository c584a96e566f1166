"""Environments in worker processes: what they give is what Gymnasium gives, and a policy learns."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import own_gymnasium
import pytest

from experiments.rl import episodes
from experiments.rl.config import PRESETS, Config
from experiments.rl.environments import OutsideEnvironment
from experiments.rl.episodes import environment_of
from experiments.rl.outside import Outside, held_out_starts
from experiments.rl.workers import Workers
from experiments.run.errors import RunError, UsageError
from experiments.run.fields import changed
from experiments.run.metrics import read_metrics
from experiments.run.train import train

CONFIG = changed(
    PRESETS["gymnasium-cartpole"], population=12, width=8, held_out_episodes=20, normalise=True
)


@pytest.fixture(scope="module")
def outside():  # type: ignore[no-untyped-def]
    found = trainer(CONFIG)
    yield found
    assert found._workers is not None
    found._workers.close()


def trainer(config: Config) -> Outside:
    environment = environment_of(config)
    assert isinstance(environment, OutsideEnvironment)
    return Outside(config, environment)


def alone(actions: list[int], seed: int) -> tuple[list[float], float]:
    """The same episode in one environment of Gymnasium itself."""
    environment = gymnasium.make("CartPole-v1")
    observation, _ = environment.reset(seed=seed)
    score = 0.0
    for action in actions:
        observation, reward, terminated, truncated, _ = environment.step(action)
        score += float(reward)
        if terminated or truncated:
            break
    return observation.tolist(), score


@pytest.mark.slow
def test_workers_step_as_gymnasium_does() -> None:
    seeds = [3, 1, 4, 1, 5]
    chance = np.random.default_rng(0)
    workers = Workers("gymnasium:CartPole-v1", 5, 2)
    first = workers.reset(seeds)
    assert first.shape == (5, 4)
    np.testing.assert_array_equal(first[1], first[3])
    actions = chance.integers(0, 2, (60, 5))
    scores, over = np.zeros(5), np.zeros(5, bool)
    for step in actions:
        seen, rewards, over = workers.step(step)
        scores += rewards
    assert over.all()
    for i, seed in enumerate(seeds):
        last, score = alone(actions[:, i].tolist(), seed)
        assert score == scores[i]
        np.testing.assert_allclose(seen[i], last, rtol=1e-6)
    workers.close()
    assert not any(process.is_alive() for process in workers.processes)


@pytest.mark.slow
def test_a_generation_is_a_function_of_the_state(outside: Outside) -> None:
    first, row = outside.generation(outside.start())
    second, again = outside.generation(outside.start())
    np.testing.assert_array_equal(first.learner.params["policy"]["Dense_0"]["kernel"], second.learner.params["policy"]["Dense_0"]["kernel"])  # fmt: skip
    assert row["environment_steps"] == again["environment_steps"]
    # CartPole gives a reward of one a step.
    assert row["environment_steps"] == pytest.approx(12 * float(row["fitness_mean"]))
    assert float(first.own.statistics.seen) == row["environment_steps"]
    assert np.abs(first.own.statistics.mean).max() > 0


@pytest.mark.slow
def test_members_of_a_pair_start_alike_and_held_out_episodes_do_not(outside: Outside) -> None:
    starts = []
    play = outside.play
    outside.play = lambda seeds, act: starts.append(seeds) or play(seeds, act)  # type: ignore
    try:
        carry, _ = outside.generation(outside.start())
        outside.generation(carry)
        returns = outside.returns(carry, held_out_starts(0, 20))
    finally:
        del outside.play
    assert (starts[0][::2] == starts[0][1::2]).all()
    assert len(set(starts[0])) == 6
    assert not set(starts[0]) & set(starts[1])
    held_out = np.concatenate(starts[2:])
    assert len(set(held_out[:20])) == 20
    assert not set(held_out) & set(starts[0])
    assert returns.shape == (20,)
    assert (returns >= 8).all()


@pytest.mark.slow
def test_a_dead_worker_is_told() -> None:
    workers = Workers("gymnasium:CartPole-v1", 4, 2)
    workers.reset([0, 1, 2, 3])
    workers.processes[1].kill()
    workers.processes[1].join()
    with pytest.raises(RunError, match=r"a worker process of gymnasium:CartPole-v1 has died"):
        for _ in range(2):
            workers.step(np.zeros(4, int))
    workers.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_do_nothing_in_workers(number: signal.Signals) -> None:
    workers = Workers("gymnasium:CartPole-v1", 2, 2)
    for process in workers.processes:  # while they start, too
        os.kill(process.pid, number)
    workers.reset([0, 1])
    for process in workers.processes:
        os.kill(process.pid, number)
    workers.step(np.zeros(2, int))
    workers.close()
    assert [process.exitcode for process in workers.processes] == [0, 0]


@pytest.mark.slow
def test_workers_that_nobody_closed_end_with_the_program() -> None:
    program = """
import tempfile
folder = tempfile.TemporaryDirectory()  # what weakref ends now comes last of all
from experiments.rl.workers import Workers
if __name__ == "__main__":
    workers = Workers("gymnasium:CartPole-v1", 2, 2)
    workers.reset([0, 1])
    print("ready")
"""
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (told.returncode, told.stdout) == (0, "ready\n"), told.stderr


@pytest.mark.slow
def test_an_environment_that_fails_is_told() -> None:
    workers = Workers("gymnasium:CartPole-v1", 2, 1)
    workers.reset([0, 1])
    with pytest.raises(RunError, match="gymnasium:CartPole-v1 failed in a worker process: .*7"):
        workers.step(np.array([7, 7]))
    workers.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("reset_fails", r"reset: .*own_gymnasium\.py, line \d+ raised KeyError: 'no data'"),
        ("step_fails", r"step: .*own_gymnasium\.py, line \d+ raised KeyError: 'no data'"),
        ("ends_the_process", r"step: .*own_gymnasium\.py, line \d+ raised SystemExit: 3"),
    ],
)
def test_where_a_file_of_ones_own_fails_is_told(function: str, words: str) -> None:
    workers = Workers(f"{own_gymnasium.__file__}:{function}", 1, 1)
    with pytest.raises(RunError, match=f":{function} failed in a worker process: {words}"):
        workers.reset([0])
        workers.step(np.array([0]))
    workers.close()


@pytest.mark.slow
def test_workers_run_the_text_that_the_run_has_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(Path(own_gymnasium.__file__).read_text())
    config = changed(PRESETS["own"], env=f"{file}:line", population=2, workers=2, width=4)
    found = trainer(config)
    file.write_text("raise ValueError('somebody edits it')")
    steps = list(found.play(np.array([0, 0]), lambda seen, step: np.zeros(2, int)))
    assert len(steps) == 15
    assert found._workers is not None
    found._workers.close()
    with pytest.raises(UsageError, match=r"mine\.py, line 1 raised ValueError: somebody edits it"):
        trainer(config)


def test_a_file_that_is_what_it_was_again_is_the_one_that_is_sent(tmp_path: Path) -> None:
    file, text = tmp_path / "mine.py", Path(own_gymnasium.__file__).read_text()
    config = changed(PRESETS["own"], env=f"{file}:line")
    for content in (text, text + "\n# another\n", text):
        file.write_text(content)
        source = environment_of(config).source  # type: ignore[union-attr]
        assert source is not None
        assert source.content == content.encode()


def test_sampled_actions_are_others_in_every_episode() -> None:
    config = changed(CONFIG, deterministic=False, population=256, normalise=False)
    found = trainer(config)
    carry = found.start()
    # Nothing is seen, so that both actions are equally likely.
    seen = np.zeros((256, 4), np.float32)
    starts = [
        held_out_starts(0, 256),
        episodes.fresh_starts(0, 5, 256),
        episodes.fresh_starts(0, 6, 256),
        episodes.evaluated_starts(0, 256),
    ]
    played = [found._mean(carry, one, seen, 0) for one in starts]
    played += [found._members(carry, episode, seen, 0)[::2] for episode in (0, 1)]
    for one, other in itertools.combinations(played, 2):
        one, other = np.asarray(one), np.asarray(other)
        alike = (one[: len(other)] == other[: len(one)]).mean()
        assert 0.3 < alike < 0.7
    np.testing.assert_array_equal(found._mean(carry, starts[0], seen, 0), played[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "observations"),
    # Vectors of numbers as actions; whole numbers as observations.
    [("gymnasium:Pendulum-v1", 3), ("gymnasium:FrozenLake-v1", 16)],
)
def test_other_kinds_of_spaces_are_trained(name: str, observations: int) -> None:
    # More processes than members: one each.
    config = changed(CONFIG, env=name, population=2, held_out_episodes=2, workers=3)
    found = trainer(config)
    after, row = found.generation(found.start())
    assert found._workers is not None
    assert len(found._workers.processes) == 2
    assert after.own.statistics.mean.shape == (observations,)
    assert float(after.own.statistics.seen) == row["environment_steps"] > 2
    if name == "gymnasium:Pendulum-v1":
        assert row["environment_steps"] == 400
        assert -4000 < float(row["fitness_mean"]) < 0
    found._workers.close()


class Unbounded(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,))
    action_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gymnasium:CartPole-v9", "Gymnasium cannot make 'CartPole-v9'"),
        ("gymnasium:Blackjack-v1", "observation_space must be a Box or Discrete, got Tuple"),
        (
            "gymnasium:Unbounded-v0",
            r"bounds of actions must be finite, got \[-inf -inf\] and \[inf inf\]",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_environments_that_do_not_fit_are_refused_in_a_sentence(name: str, words: str) -> None:
    gymnasium.register("Unbounded-v0", Unbounded, max_episode_steps=5)
    with pytest.raises(UsageError, match=words):
        trainer(changed(CONFIG, env=name))


@pytest.mark.slow
def test_a_policy_learns_in_gymnasium(tmp_path: Path) -> None:
    config = changed(CONFIG, run_dir=tmp_path, population=64, generations=6, normalise=False)
    result = train(config)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert len(rows) == 6
    assert result["held_out_return_before"] < 80
    assert result["held_out_return"] > 120
