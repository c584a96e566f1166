"""A film of one episode of a trained policy, as a GIF."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree, UInt8
from PIL import Image

from experiments.rl import drawings, libraries
from experiments.rl.config import Config
from experiments.rl.environments import Environment, OutsideEnvironment
from experiments.rl.episodes import environment_of, film_key, policy_of
from experiments.rl.libraries import own
from experiments.rl.policy import Policy
from experiments.rl.rollout import Lane, Lanes
from experiments.rl.statistics import Statistics
from experiments.rl.workers import action_of, encode
from experiments.run.errors import UsageError
from experiments.run.folder import full_disk_in_one_sentence, write_whole
from experiments.run.trainer import Carry

FILE = "episode.gif"  # in the run folder
FRAMES = 150  # of a film at most: of a longer episode every second, third ... step is shown
STEPS = 1000  # of an episode without a time limit
TOGETHER = 128  # steps that are played in one program
MILLISECONDS, LAST = 40, 1000  # that a frame is shown, and the last one
PIXELS = 320  # of the longer side of a frame at most
BYTES = 1_000_000  # of a film at most

Frame = UInt8[np.ndarray, "height width 3"]


class NotDrawn(UsageError):
    """The environment has no pictures, or not here."""


def render(config: Config, state: Carry, path: Path, seed: int = 0) -> str:
    """Writes an episode of the mean policy, of the first seed where there are several.

    Args:
        config: the run's settings.
        state: its state.
        path: of the GIF.
        seed: decides the episode.

    Returns:
        A sentence about it.

    Raises:
        NotDrawn: where the environment cannot be drawn, or raises anything.
    """
    found = frames(config, state, seed)
    write(path, found)
    return f"An episode, in {len(found)} frames, is in {path}."


def frames(config: Config, state: Carry, seed: int = 0, most: int = FRAMES) -> list[Frame]:
    """The pictures of an episode of the mean policy, in equal steps and with the last one.

    Args:
        config: the run's settings.
        state: its state.
        seed: decides the episode.
        most: how many at most.

    Raises:
        NotDrawn: where the environment cannot be drawn, or raises anything.
    """
    # A drawing must not cost a run that has ended: the user's file may be another one by now.
    with _or_not_drawn(config.env, "an episode"):
        found = _frames(config, state, seed, most)
    sizes = sorted({frame.shape for frame in found})
    if len(sizes) > 1:
        one, other = list(sizes[0]), list(sizes[-1])
        raise NotDrawn(
            f"--env {config.env}: pictures of an episode must have one shape, got {one} and {other}"
        )
    return found


@contextlib.contextmanager
def _or_not_drawn(name: str, what: str) -> Iterator[None]:
    """Whatever is raised in the block is the reason why nothing is drawn."""
    try:
        yield
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise NotDrawn(f"--env {name}: {own.told(name, what, error)}") from error


def _frames(config: Config, state: Carry, seed: int, most: int) -> list[Frame]:
    carry = jax.tree.map(lambda leaf: leaf[0], state) if config.seeds > 1 else state
    environment = environment_of(config)
    policy = policy_of(config, environment)
    params, statistics = carry.learner.params, carry.own.statistics
    if isinstance(environment, OutsideEnvironment):
        key = None if config.deterministic else film_key(seed)
        pictures = _outside_pictures(environment, policy, params, statistics, key, seed)
        return _thinned(list(pictures), most)
    lanes = Lanes(environment, film_key(seed)[None], statistics, config.deterministic)
    return [
        _picture(environment, config.env, state)
        for state in _thinned(states(lanes, policy, params), most)
    ]


def states(lanes: Lanes, policy: Policy, params: PyTree) -> list[Any]:
    """The states of the only episode of `lanes`, from its start to its end, as arrays of NumPy."""
    act = lambda observation, key: policy.act(params, lanes.statistics, observation, key)

    def step(lane: Lane, _: None) -> tuple[Lane, Any]:
        after = lanes.step(act, lane)
        plays = lanes.plays(lane)
        return jax.tree.map(lambda new, old: jnp.where(plays, new, old), after, lane), lane.state

    most = lanes.environment.time_limit or STEPS
    # An episode may be far shorter than its limit, so that there is no room for so many states.
    some = jax.jit(lambda lane: jax.lax.scan(step, lane, length=min(TOGETHER, most)))
    found: list[Any] = []
    lane = jax.jit(lambda: lanes.start(watch=False))()
    while lanes.plays(lane) and len(found) < most:
        lane, every = some(lane)
        every, taken = jax.device_get(every), int(lane.total.steps) - len(found)
        found += [jax.tree.map(lambda leaf, i=i: leaf[i], every) for i in range(taken)]
    return [*found, jax.device_get(lane.state)][: most + 1]


def write(path: Path, frames: Sequence[Frame]) -> None:
    """Writes frames as a GIF of at most a megabyte: smaller, and with fewer frames, where that is needed.

    Args:
        path: of the file.
        frames: all of one size.

    Raises:
        RunError: where the file cannot be written.
    """
    side, chosen = PIXELS, list(frames)
    content = _gif(chosen, side)
    while len(content) > BYTES and (side > 80 or len(chosen) > 10):
        side = max(80, side * 3 // 4)
        if side == 80 or len(content) > 4 * BYTES:
            chosen = _thinned(chosen, max(10, len(chosen) // 2))
        content = _gif(chosen, side)
    with full_disk_in_one_sentence(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: file.write(content))


def _gif(frames: Sequence[Frame], side: int) -> bytes:
    images = [Image.fromarray(frame) for frame in frames]
    for image in images:
        image.thumbnail((side, side), Image.Resampling.BOX)
    images = [
        image.quantize(64, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE) for image in images
    ]
    file, speed = io.BytesIO(), MILLISECONDS
    images[0].save(
        file, "GIF", save_all=True, append_images=images[1:], loop=0,
        duration=[speed] * (len(images) - 1) + [LAST],
    )  # fmt: skip
    return file.getvalue()


def _thinned(items: list[Any], most: int) -> list[Any]:
    """Items at equal distances, and the last; at most so many."""
    if len(items) <= most:
        return items
    every = -(-(len(items) - 1) // (most - 1))
    return [*items[:-1:every], items[-1]]


def _picture(environment: Environment[Any], name: str, state: Any) -> Frame:
    """A state, drawn by its environment, and checked."""
    with _or_not_drawn(name, "draw"):
        found = environment.draw(state)
    if found is None:
        raise NotDrawn(f"--env {name} has no pictures: its class must have draw(state)")
    return _checked(found, f"--env {name}: draw")


def _checked(found: Any, where: str) -> Frame:
    picture = np.asarray(found)
    shape = picture.shape
    if picture.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or not picture.size:
        raise NotDrawn(
            f"{where} must give uint8 [height, width, 3], got {picture.dtype} {list(shape)}"
        )
    return picture


def _outside_pictures(
    environment: OutsideEnvironment,
    policy: Policy,
    params: PyTree,
    statistics: Statistics,
    key: Key[Array, ""] | None,
    seed: int,
) -> Iterator[Frame]:
    """The pictures of an episode of an outside environment, which is played in this process."""
    name, settings = environment.name, dict(environment.settings)
    if not own.in_file(name) or own.takes(name, "render_mode"):
        settings["render_mode"] = "rgb_array"
    made = libraries.adapt(libraries.make(name, settings))
    act = jax.jit(policy.act)
    try:
        if made.render_mode != "rgb_array":
            raise NotDrawn(
                f'--env {name} has no pictures: its function must take render_mode="rgb_array"'
            )
        with _or_not_drawn(name, "reset"):
            seen, _ = made.reset(seed=seed)
        over, step = False, 0
        yield _outside_picture(made, name)
        while not over:
            own_key = None if key is None else jax.random.fold_in(key, step)
            encoded = encode(made.observation_space, seen)
            action = np.asarray(act(params, statistics, encoded, own_key))
            with _or_not_drawn(name, "step"):
                seen, _, terminated, truncated, _ = made.step(
                    action_of(action + environment.first_action)
                )
                over, step = bool(terminated or truncated), step + 1
            yield _outside_picture(made, name)
    finally:
        # The pictures are there, or a better reason why they are not.
        with contextlib.suppress(Exception, SystemExit):
            made.close()


def _outside_picture(environment: Any, name: str) -> Frame:
    import gymnasium

    with _or_not_drawn(name, "render"):
        try:
            return _checked(environment.render(), f"--env {name}: render")
        except gymnasium.error.DependencyNotInstalled as error:
            known = environment.spec.id if environment.spec is not None else name
            found = drawings.of_gymnasium(known, getattr(environment.unwrapped, "state", ()))
            if found is None:
                raise NotDrawn(f"--env {name} has no pictures here: {error}") from error
            return found
