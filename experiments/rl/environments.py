"""Environments as a policy sees them: of two kinds, from any library or from a file of one's own.

A JAX environment is an :class:`Environment`: its functions become part of the program that trains. An outside
environment follows the API of Gymnasium, and worker processes step it. The libraries are in
:mod:`experiments.rl.libraries`.
"""

import abc
import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from experiments.rl import libraries
from experiments.rl.libraries import own
from experiments.rl.workers import shape_of
from experiments.run.errors import UsageError
from experiments.run.own_code import Source

State = TypeVar("State")


class Discrete(NamedTuple):
    """One of `n` actions: 0, 1, ..., `n` - 1."""

    n: int


class Continuous:
    """A vector between two bounds.

    Args:
        low: lower bounds, [actions].
        high: upper bounds, [actions].

    Attributes:
        low: lower bounds, float32 [actions].
        high: upper bounds, float32 [actions].

    Raises:
        ValueError: for bounds that are no vectors of one length, not finite, or not in order.

    Example:
        >>> Continuous([-1, -1], [1, 2])
        Continuous(low=[-1.0, -1.0], high=[1.0, 2.0])
    """

    def __init__(
        self, low: Sequence[float | int] | np.ndarray, high: Sequence[float | int] | np.ndarray
    ):
        self.low, self.high = np.asarray(low, np.float32), np.asarray(high, np.float32)
        if self.low.ndim != 1 or self.low.shape != self.high.shape or not self.low.size:
            raise ValueError(
                f"bounds of actions must be two vectors of one length, got {low} and {high}"
            )
        if not (np.isfinite(self.low).all() and np.isfinite(self.high).all()):
            raise ValueError(f"bounds of actions must be finite, got {low} and {high}")
        if not (self.low < self.high).all():
            raise ValueError(f"lower bounds must be below upper bounds, got {low} and {high}")

    def __repr__(self) -> str:
        return f"Continuous(low={self.low.tolist()}, high={self.high.tolist()})"


class Environment(abc.ABC, Generic[State]):
    """A JAX environment: two pure functions that can be traced and mapped over by `jax.vmap`.

    A subclass sets `actions` and `time_limit` and writes `reset` and `step`; `draw` is optional. A state is
    any tree of arrays whose shapes and types stay the same. An observation is an array of any shape.

    Attributes:
        actions: what `step` takes: `Discrete(n)` (an int32 number) or `Continuous(low, high)` (a float32
            vector).
        time_limit: steps after which an episode is cut.

    Example:
        >>> class Walk(Environment[Array]):
        ...     actions, time_limit = Discrete(2), 10
        ...     def reset(self, key):
        ...         position = jax.random.uniform(key, (1,))
        ...         return position, position
        ...     def step(self, key, state, action):
        ...         position = state + jnp.where(action == 1, 0.1, -0.1)
        ...         return position, position, -jnp.abs(position).sum(), False
        >>> Walk().observations
        1
    """

    actions: Discrete | Continuous
    time_limit: int | None

    @abc.abstractmethod
    def reset(self, key: Key[Array, ""]) -> tuple[Array, State]:
        """The first observation and state of an episode.

        Args:
            key: decides where it starts.
        """

    @abc.abstractmethod
    def step(
        self, key: Key[Array, ""], state: State, action: Array
    ) -> tuple[Array, State, Float[Array, ""], Bool[Array, ""]]:
        """The next observation, the next state, the reward, and whether the episode has ended.

        Args:
            key: decides what is random in the step.
            state: before the step.
            action: a number from 0 to n - 1, or a vector within the bounds.
        """

    def draw(self, state: State) -> np.ndarray | None:
        """A picture of a state, uint8 [height, width, 3]; None for an environment that is not drawn.

        Args:
            state: its leaves are arrays of NumPy.
        """
        del state
        return None

    # ------------------------------------------------------------ what adapters of libraries replace

    def encode(self, observation: Array) -> Float[Array, "observations"]:
        """An observation as the policy takes it."""
        return jnp.asarray(observation, jnp.float32).reshape(-1)

    def is_cut(self, state: State, steps: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether the time limit ends an episode.

        Args:
            state: after the newest step.
            steps: taken so far, the newest among them.
        """
        del state
        return jnp.asarray(False) if self.time_limit is None else steps >= self.time_limit

    @functools.cached_property
    def observations(self) -> int:
        """The length of an encoded observation."""
        first = jax.eval_shape(lambda key: self.encode(self.reset(key)[0]), jax.random.key(0))
        return int(first.size)


@dataclass(frozen=True)
class OutsideEnvironment:
    """An environment that worker processes make and step, by the API of Gymnasium.

    Attributes:
        name: as `--env` says it.
        settings: keyword arguments for what makes it.
        observations: the length of an encoded observation.
        actions: what it takes.
        first_action: the number of the first of discrete actions.
        source: the file that it is made in, as this process has read it; None for one of a library.
    """

    name: str
    settings: Mapping[str, Any]
    observations: int
    actions: Discrete | Continuous
    first_action: int
    source: Source | None = None


class Running(NamedTuple):
    """An environment that starts anew by itself: its state, and the steps of its episode."""

    state: Any
    steps: Int[Array, ""]


class Restarted(NamedTuple):
    """What a step came to where a new episode follows the end of one.

    Attributes:
        observation: the next one, of a new episode after the end of one.
        running: the same of the state.
        reward: of the step.
        terminated: whether the episode has ended.
        cut: whether the time limit was reached.
        last: the observation after the step, even where the episode is over.
    """

    observation: Array
    running: Running
    reward: Float[Array, ""]
    terminated: Bool[Array, ""]
    cut: Bool[Array, ""]
    last: Array


def begin(environment: Environment[Any], key: Key[Array, ""]) -> tuple[Array, Running]:
    """The first observation, and an environment for :func:`step_or_restart`."""
    observation, state = environment.reset(key)
    return observation, Running(state, jnp.int32(0))


def step_or_restart(
    environment: Environment[Any], key: Key[Array, ""], running: Running, action: Array
) -> Restarted:
    """A step, and the start of a new episode where one is over."""
    step_key, reset_key = jax.random.split(key)
    last, state, reward, terminated = environment.step(step_key, running.state, action)
    steps = running.steps + 1
    cut = environment.is_cut(state, steps)
    over = terminated | cut
    observation, running = jax.tree.map(
        lambda new, old: jnp.where(over, new, old),
        begin(environment, reset_key),
        (last, Running(state, steps)),
    )
    return Restarted(
        observation, running, jnp.asarray(reward, jnp.float32), jnp.asarray(terminated), cut, last
    )


def make_environment(
    name: str, settings: Mapping[str, Any] | None = None
) -> Environment[Any] | OutsideEnvironment:
    """The environment called `name`, of the kind that its type says.

    Args:
        name: "NAME" of gymnax, "LIBRARY:NAME", or "FILE.py:FUNCTION" of one's own.
        settings: keyword arguments for what makes it.

    Raises:
        UsageError: where it cannot be made, or is no environment that a policy here fits.

    Example:
        >>> make_environment("CartPole-v1").actions
        Discrete(n=2)
        >>> make_environment("FrozenLake-misc").observations
        16
    """
    settings = settings or {}
    found = libraries.make(name, settings)
    with _in_one_sentence(name, "the environment that it gives"):
        adapted = found if isinstance(found, Environment) else libraries.adapt(found)
    if isinstance(adapted, Environment):
        check(adapted, name)
        return adapted
    if adapted is None:
        raise UsageError(
            f"--env {name}: expected an Environment of experiments.rl.environments, an environment of "
            f"gymnax (alone, or in a pair with its parameters) or a gymnasium.Env, got "
            f"{'None' if found is None else f'an object of the type {type(found).__name__}'}"
        )
    outside = _outside(adapted, name, settings)
    with _in_one_sentence(name, "close"):
        adapted.close()
    return outside


@contextlib.contextmanager
def _in_one_sentence(name: str, what: str) -> Iterator[None]:
    """Whatever an environment raises in the block becomes a UsageError: its code is somebody else's."""
    try:
        yield
    except (UsageError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"--env {name}: {own.told(name, what, error)}") from error


def check(environment: Environment[Any], name: str) -> None:
    """Raises UsageError for the first thing about a JAX environment that cannot be right."""
    say = lambda wrong: UsageError(f"--env {name}: {wrong}")
    actions = getattr(environment, "actions", None)
    if not isinstance(actions, Discrete | Continuous):
        raise say(f"actions must be Discrete(n) or Continuous(low, high), got {actions!r}")
    if isinstance(actions, Discrete) and not (_is_whole(actions.n) and actions.n >= 1):
        raise say(f"actions must be Discrete(n) with a whole number n of at least 1, got {actions}")
    limit = getattr(environment, "time_limit", None)
    # Adapters of libraries may say in another way when an episode is cut.
    if limit is None and type(environment).is_cut is not Environment.is_cut:
        limit = 1
    if type(limit) is not int or limit < 1:
        raise say(f"time_limit must be a whole number of at least 1, got {limit!r}")
    key = jax.random.key(0)
    first = _shapes(environment.reset, "reset", 2, name, key)
    if isinstance(actions, Discrete):
        action = jax.ShapeDtypeStruct((), jnp.int32)
    else:
        action = jax.ShapeDtypeStruct(actions.low.shape, jnp.float32)
    after = _shapes(environment.step, "step", 4, name, key, first[1], action)
    if not first[0].size:
        raise say(f"reset must give an observation with numbers in it, got {_in_words(first[0])}")
    _same(("observation", "state"), first, after[:2], say)
    for what, value in zip(("reward", "end"), after[2:], strict=True):
        if getattr(value, "shape", None) != ():
            raise say(
                f"step must give {'a number as the reward' if what == 'reward' else 'a bool as the end'}"
                f", got {_in_words(value)}"
            )
    if after[3].dtype != bool:
        raise say(f"step must give a bool as the end, got {_in_words(after[3])}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _shapes(function: Any, what: str, parts: int, name: str, *args: Any) -> tuple[Any, ...]:
    """Shapes of what a function of a user's gives."""
    say = lambda wrong: UsageError(f"--env {name}: {wrong}")
    with _in_one_sentence(name, what):
        found = jax.eval_shape(function, *args)
    if not isinstance(found, tuple) or len(found) != parts:
        right = "(observation, state)" if parts == 2 else "(observation, state, reward, end)"
        count = len(found) if isinstance(found, tuple | list) else 1
        raise say(f"{what} must give {right}, got {count} value{'s' * (count != 1)}")
    if not hasattr(found[0], "shape"):
        raise say(f"{what} must give one array as the observation, got a {type(found[0]).__name__}")
    return found


def _same(names: tuple[str, str], first: Any, after: Any, say: Any) -> None:
    """Compares what `reset` gives with what `step` gives, leaf by leaf."""
    for name, a, b in zip(names, first, after, strict=True):
        forms = [str(jax.tree.structure(tree)) for tree in (a, b)]
        if forms[0] != forms[1]:
            raise say(
                f"reset and step must give a {name} of one structure, got {forms[0]} and {forms[1]}"
            )
        old, new = jax.tree.leaves_with_path(a), jax.tree.leaves(b)
        for (path, x), y in zip(old, new, strict=True):
            if x.shape != y.shape or x.dtype != y.dtype:
                leaf = name + jax.tree_util.keystr(path)
                raise say(
                    f"reset and step must give a {name} of one shape and type, got {leaf} as "
                    f"{_in_words(x)} and {_in_words(y)}"
                )


def _in_words(value: Any) -> str:
    shape = list(getattr(value, "shape", ()))
    return f"{getattr(value, 'dtype', type(value).__name__)} {shape}"


def _outside(environment: Any, name: str, settings: Mapping[str, Any]) -> OutsideEnvironment:
    """What the program must know of an outside environment."""
    import gymnasium

    say = lambda wrong: UsageError(f"--env {name}: {wrong}")
    with _in_one_sentence(name, "observation_space or action_space"):
        seen = getattr(environment, "observation_space", None)
        takes = getattr(environment, "action_space", None)
    box, discrete = gymnasium.spaces.Box, gymnasium.spaces.Discrete
    if not isinstance(seen, box | discrete):
        raise say(f"observation_space must be a Box or Discrete, got {seen}")
    if not shape_of(seen)[0]:
        raise say(f"observation_space must have numbers in it, got {seen}")
    if not isinstance(takes, discrete) and not (isinstance(takes, box) and len(takes.shape) == 1):
        raise say(f"action_space must be Discrete or a Box of one axis, got {takes}")
    if not _has_time_limit(environment):
        raise say(
            "it must have a time limit, or an episode may never end; give "
            "gymnasium.wrappers.TimeLimit(environment, steps)"
        )
    actions: Discrete | Continuous
    if isinstance(takes, discrete):
        actions = Discrete(int(takes.n))
    else:
        try:
            actions = Continuous(takes.low, takes.high)
        except ValueError as error:
            raise say(f"action_space: {error}") from error
    first_action = int(getattr(takes, "start", 0))
    return OutsideEnvironment(
        name, dict(settings), shape_of(seen)[0], actions, first_action, own.source(name)
    )


def _has_time_limit(environment: Any) -> bool:
    import gymnasium

    spec = getattr(environment, "spec", None)
    if getattr(spec, "max_episode_steps", None) is not None:
        return True
    while isinstance(environment, gymnasium.Wrapper):
        if isinstance(environment, gymnasium.wrappers.TimeLimit):
            return True
        environment = environment.env
    return False
