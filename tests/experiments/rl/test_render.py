"""Films of episodes: frames of the right form, of the episode that is scored, in a GIF that can be read."""

import itertools
from pathlib import Path
from typing import Any

import gymnasium
import jax
import numpy as np
import own_environments
import own_gymnasium
import pytest
from PIL import Image
from policies import make_jax_environment

from experiments.rl import drawings, render
from experiments.rl.config import PRESETS, Config
from experiments.rl.environments import OutsideEnvironment
from experiments.rl.episodes import environment_of, policy_of
from experiments.rl.evolution import start
from experiments.rl.outside import Outside
from experiments.rl.rollout import Lanes, run_episode
from experiments.rl.statistics import nothing_seen
from experiments.run.errors import UsageError
from experiments.run.fields import changed

FILE = own_environments.__file__
CONFIG = changed(
    PRESETS["own"], population=4, width=4, depth=0, normalise=False, env=f"{FILE}:point"
)


def of(env: str) -> tuple[Config, Any]:
    """Settings, and a state before training."""
    config = changed(CONFIG, env=env)
    environment: Any = environment_of(config)
    if isinstance(environment, OutsideEnvironment):
        return config, Outside(config, environment).start()
    return config, start(config, policy_of(config, environment), environment, jax.numpy.int32(0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "count", "shape"),
    [
        ("CartPole-v1", None, (180, 240, 3)),
        ("Pendulum-v1", 101, (180, 240, 3)),  # every second of 200 steps, and the start
        ("Breakout-MinAtar", None, (180, 180, 3)),
        (f"{FILE}:point", 21, (40, 60, 3)),
        (f"{own_gymnasium.__file__}:line", 16, (20, 50, 3)),
        ("gymnasium:MountainCar-v0", 101, None),  # by pygame, where there is
    ],
)
def test_frames_are_pictures_of_an_episode(
    env: str, count: int | None, shape: tuple[int, ...] | None
) -> None:
    found = render.frames(*of(env))
    assert {frame.dtype for frame in found} == {np.dtype(np.uint8)}
    assert {frame.shape for frame in found} == {shape or found[0].shape}
    assert len(found[0].shape) == 3
    assert count is None or len(found) == count
    assert len(found) > 3
    assert any((a != b).any() for a, b in itertools.pairwise(found))


def test_states_are_those_of_the_episode_that_is_scored() -> None:
    config, carry = of("CartPole-v1")
    environment: Any = environment_of(config)
    policy, key, seen = policy_of(config, environment), jax.random.key(3), nothing_seen(4)
    found = render.states(Lanes(environment, key[None], seen, True), policy, carry.learner.params)
    right = run_episode(environment, policy, carry.learner.params, seen, key)
    assert [int(state.time) for state in found] == list(range(int(right.steps) + 1))
    assert abs(found[-1].theta) > 0.2 or abs(found[-1].x) > 2.4  # the one state where it has fallen


def test_room_is_taken_by_the_episode_and_not_by_its_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes, get = [], jax.device_get
    monkeypatch.setattr(
        jax,
        "device_get",
        lambda tree: sizes.extend(map(np.size, jax.tree.leaves(tree))) or get(tree),
    )
    found = render.frames(*of(f"{FILE}:Short"))
    assert 1 < max(sizes) <= render.TOGETHER
    assert [int(frame[0, 0, 0]) for frame in found] == [0, 1, 2, 3]


@pytest.mark.parametrize("limit", [127, 128, 129, 300])
def test_episodes_of_any_length_are_played_to_their_end(limit: int) -> None:
    config, carry = of(f"{FILE}:point")
    environment = own_environments.point(limit)
    policy, key, seen = policy_of(config, environment), jax.random.key(3), nothing_seen(4)
    lanes = Lanes(environment, key[None], seen, True)
    found = render.states(lanes, policy, carry.learner.params)
    assert len(found) == limit + 1
    assert all((a[0] != b[0]).any() for a, b in itertools.pairwise(found))


def test_an_episode_without_a_time_limit_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "STEPS", 200)
    config, carry = of(f"{FILE}:point")
    environment: Any = own_environments.without_limit()
    policy, key, seen = policy_of(config, environment), jax.random.key(3), nothing_seen(4)
    lanes = Lanes(environment, key[None], seen, True)
    assert len(render.states(lanes, policy, carry.learner.params)) == 201


OWN = r"own_gymnasium\.py, line \d+ raised"


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (f"{FILE}:draw_fails", r"draw: .*own_environments\.py, line \d+ raised ZeroDivisionError"),
        (f"{FILE}:pictures_grow", r"must have one shape, got \[4, 4, 3\] and \[5, 4, 3\]"),
        (f"{FILE}:no_pixels", r"draw must give uint8 .*, got uint8 \[0, 4, 3\]"),
        (f"{own_gymnasium.__file__}:reset_fails", f"reset: .*{OWN} KeyError: 'no data'"),
        (f"{own_gymnasium.__file__}:step_fails", f"step: .*{OWN} KeyError: 'no data'"),
        (f"{own_gymnasium.__file__}:render_fails", f"render: .*{OWN} KeyError: 'no data'"),
        (f"{own_gymnasium.__file__}:ends_the_process", f"step: .*{OWN} SystemExit: 3"),
        (f"{own_gymnasium.__file__}:fails_to_be_made_for_a_film", f"{OWN} KeyError: 'no data'"),
    ],
)
def test_whatever_an_environment_raises_is_a_reason_not_to_draw(env: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as told:
        render.frames(*of(env))
    assert str(told.value).startswith(f"--env {env}: ")
    assert "\n" not in str(told.value)


def test_a_film_that_is_there_outlasts_the_end_of_its_environment() -> None:
    found = render.frames(*of(f"{own_gymnasium.__file__}:closes_badly_after_a_film"))
    assert len(found) == 16


def test_a_file_that_has_changed_since_does_not_cost_a_run(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from own_environments import *")
    config, carry = of(f"{file}:point")
    assert len(render.frames(config, carry)) == 21
    file.write_text("from own_environments import *\npoint = Short\nShort.actions = Discrete(3)")
    with pytest.raises(render.NotDrawn, match="an episode: .*mine.py raised"):
        render.frames(config, carry)


@pytest.mark.parametrize("noise", [False, True])
def test_a_film_is_a_small_gif(tmp_path: Path, noise: bool) -> None:
    chance = np.random.default_rng(0)
    picture = lambda i: np.full((400, 600, 3), 2 * i, np.uint8)
    noisy = lambda i: chance.integers(0, 256, (250, 250, 3), np.uint8)
    film = [noisy(i) if noise else picture(i) for i in range(20 if noise else 60)]
    render.write(tmp_path / "film.gif", film)
    assert (tmp_path / "film.gif").stat().st_size <= 1_000_000
    with Image.open(tmp_path / "film.gif") as found:
        assert found.info["duration"] == 40
        assert max(found.size) <= 320
        if not noise:
            assert (found.n_frames, found.size) == (60, (320, 213))
            found.seek(59)
            assert found.info["duration"] == 1000
            assert abs(int(np.asarray(found.convert("RGB"))[50, 50, 0]) - 118) < 4


def test_frames_are_thinned_in_equal_steps_and_keep_the_last() -> None:
    assert render._thinned(list(range(10)), 10) == list(range(10))
    assert render._thinned(list(range(10)), 5) == [0, 3, 6, 9]
    assert render._thinned(list(range(501)), 150)[-2:] == [496, 500]


def test_environments_without_pictures_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(render.NotDrawn, match="--env FrozenLake-misc has no pictures"):
        render.frames(*of("FrozenLake-misc"))
    words = r"draw must give uint8 \[height, width, 3\], got float64 \[4, 4, 3\]"
    with pytest.raises(render.NotDrawn, match=words):
        render.frames(*of(f"{FILE}:float_picture"))
    monkeypatch.delattr(own_environments.PointMass, "draw")
    with pytest.raises(render.NotDrawn, match="its class must have draw"):
        render._picture(own_environments.PointMass(), "x", None)


@pytest.mark.parametrize("name", list(drawings.CLASSIC))
def test_classic_control_is_drawn_alike_from_states_of_both_libraries(name: str) -> None:
    environment: Any = make_jax_environment(name)
    _, state = environment.reset(jax.random.key(0))
    _, fields, places = drawings.CLASSIC[name]
    inner: Any = gymnasium.make(name).unwrapped
    inner.reset(seed=0)
    numbers = np.asarray(inner.state, float).copy()
    for i, field in zip(places, fields, strict=False):
        numbers[i] = float(getattr(state, field))
    found, right = environment.draw(state), drawings.of_gymnasium(name, numbers.tolist())
    assert right is not None
    np.testing.assert_array_equal(found, right)
    assert (found != 255).any()


def test_a_pole_that_leans_right_is_drawn_to_the_right() -> None:
    red = lambda picture: np.argwhere((picture[..., 0] > 180) & (picture[..., 1] < 90))
    rows, columns = red(drawings.cart_pole(0.0, 0.5)).T
    assert columns[rows.argmin()] > 140  # its tip; the middle is at 120
    assert red(drawings.pendulum(0.0))[:, 0].min() < 60  # 0 is up
    assert red(drawings.acrobot(0.0, 0.0))[:, 0].max() > 120  # 0 is down
