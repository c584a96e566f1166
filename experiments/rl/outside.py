"""Evolution strategies on environments that are not JAX: stepped by worker processes, by Gymnasium's API.

The policies of the whole population act in one program, which builds no member's matrices
(`EvolutionStrategy.map` with each member's own observation); the scores come back by `tell`.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from experiments.rl.config import Config
from experiments.rl.environments import OutsideEnvironment
from experiments.rl.episodes import action_keys, policy_of
from experiments.rl.evolution import Seen, keys, make_strategy
from experiments.rl.statistics import Statistics, Sums, merge, nothing_seen
from experiments.rl.workers import Workers
from experiments.run.learners import row_of
from experiments.run.progress import part
from experiments.run.trainer import Carry

Row = dict[str, Any]
# (observations [environments, ...], number of the step) -> actions [environments, ...]
Act = Callable[[np.ndarray, int], Any]


def training_starts(seed: int, generation: int, episode: int, pairs: int) -> np.ndarray:
    """The seeds of an episode of every member; both members of a pair have one, [2 * pairs]."""
    stream = np.random.SeedSequence([seed, 0, generation, episode])
    return np.repeat(stream.generate_state(pairs) // 2, 2)


def held_out_starts(seed: int, episodes: int) -> np.ndarray:
    """The seeds of the episodes that measure a run while it trains, [episodes]."""
    return np.random.SeedSequence([seed, 1]).generate_state(episodes) // 2


class Outside:
    """What `eggroll rl` needs of an outside environment.

    Args:
        config: the settings.
        environment: that is trained in.

    Raises:
        UsageError: for settings that are not for outside environments.
    """

    def __init__(self, config: Config, environment: OutsideEnvironment) -> None:
        config.check_outside()
        self.config, self.environment = config, environment
        self.observations = environment.observations
        self.policy = policy_of(config, environment)
        self.es = make_strategy(config)
        self._workers: Workers | None = None
        self._members = jax.jit(self._members_act)
        self._mean = jax.jit(self._mean_acts)
        self._tell = jax.jit(self.es.tell)
        self._row = jax.jit(lambda metrics, state: row_of(metrics, self.es, state))

    # ------------------------------------------------------------ what the loop calls

    def start(self) -> Carry:
        """The state before generation 0."""
        init_key, search_key, _ = keys(jnp.int32(self.config.seed))
        state = self.es.init(self.policy.init(init_key), search_key)
        seen = Seen(nothing_seen(self.observations))
        return Carry(state, seen, jnp.int32(0), jnp.int32(self.config.seed))

    def generation(self, carry: Carry) -> tuple[Carry, Row]:
        """Every member plays its episodes, both members of a pair from the same starts."""
        config, done = self.config, int(carry.generation)
        population, before = config.evolution.population, carry.own.statistics
        mean = np.asarray(before.mean)
        scores, taken = np.zeros(population, np.float32), 0
        first, second = np.zeros_like(mean), np.zeros_like(mean)
        for episode in range(config.episodes):
            starts = training_starts(config.seed, done, episode, population // 2)
            act: Act = functools.partial(self._members, carry, episode)
            for seen, live, rewards in self.play(starts, act):
                deviation = seen[live] - mean
                first, second = first + deviation.sum(0), second + (deviation**2).sum(0)
                scores, taken = scores + rewards, taken + int(live.sum())
        state, metrics = self._tell(carry.learner, scores / config.episodes)
        statistics = before
        if config.normalise:
            sums = Sums(jnp.float32(taken), jnp.asarray(first), jnp.asarray(second))
            statistics = merge(statistics, sums)
        row = self._row(metrics, carry.learner)
        after = Carry(state, Seen(statistics), carry.generation + 1, carry.seed)
        return after, {**row, "environment_steps": taken}

    def returns(self, carry: Carry, starts: np.ndarray) -> np.ndarray:
        """Returns of the mean policy, an episode a start."""
        population, episodes = self.config.evolution.population, len(starts)
        out = []
        for at in range(0, episodes, population):
            some = starts[at : at + population]
            total = np.zeros(population, np.float32)
            # Environments that are too many play along, and do not count.
            padded = np.resize(some, population)
            act: Act = functools.partial(self._mean, carry, padded)
            for _, _, rewards in self.play(padded, act):
                total += rewards
            out.append(total[: len(some)])
        return np.concatenate(out)

    # ------------------------------------------------------------ parts

    def play(
        self, starts: np.ndarray, act: Act
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Plays one episode in every environment, step by step.

        Args:
            starts: the seed of every environment.
            act: chooses the actions.

        Yields:
            The observations that were acted upon, which episodes were still on, and the rewards
            (0 where an episode was over).
        """
        if self._workers is None:
            self._workers = Workers(
                self.environment.name,
                self.config.evolution.population,
                self.config.workers,
                self.environment.settings,
                self.environment.source,
            )
        seen, over, step = self._workers.reset(starts.tolist()), np.zeros(len(starts), bool), 0
        while not over.all():
            live, before = ~over, seen
            actions = np.asarray(act(seen, step)) + self.environment.first_action
            seen, rewards, over = self._workers.step(actions)
            part(int(over.sum()), len(over), "episodes")
            yield before, live, rewards
            step += 1

    def _members_act(self, carry: Carry, episode: Array, seen: Array, step: Array) -> Array:
        def act(
            params: PyTree,
            key: Array,
            seen: Array,
            statistics: Statistics,
            episode: Array,
            step: Array,
        ) -> Array:
            # A member has one key in a generation, which its episodes must not share.
            return self._act(params, jax.random.fold_in(key, episode), seen, statistics, step)

        args = carry.own.statistics, episode, step
        return self.es.map(carry.learner, act, *args, members=seen)

    def _mean_acts(self, carry: Carry, starts: Array, seen: Array, step: Array) -> Array:
        act = lambda key, seen: self._act(
            carry.learner.params, key, seen, carry.own.statistics, step
        )
        return jax.vmap(act)(action_keys(self.config.seed, starts), seen)

    def _act(
        self, params: PyTree, key: Array, seen: Array, statistics: Statistics, step: Array
    ) -> Array:
        own = None if self.config.deterministic else jax.random.fold_in(key, step)
        return self.policy.act(params, statistics, seen, own)
