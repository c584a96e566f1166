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
from experiments.rl.episodes import environment_of, policy_of
from experiments.rl.evolution import start
from experiments.rl.outside import Outside
from experiments.rl.rollout import Lanes, run_episode
from experiments.rl.statistics import nothing_seen
from experiments.run.fields import changed

FILE = own_environments.__file__
CONFIG = changed(
    PRESETS["own"], population=4, width=4, depth=0, normalise=False, env=f"{FILE}:point"
)


def of(env: str) -> tuple[Config, Any]:
    """Settings, and a state before training."""
    config = changed(CONFIG, env=env)
    environment: Any = environment_of(config)
    if env.startswith("gymnasium") or env.endswith(":line"):
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
