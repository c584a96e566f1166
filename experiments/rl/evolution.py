"""Evolution strategies on a JAX environment, low-rank or dense."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

import eggroll
from experiments.rl.config import Config
from experiments.rl.environments import Environment
from experiments.rl.policy import Policy
from experiments.rl.rollout import run_abreast, run_episodes
from experiments.rl.statistics import Statistics, merge, nothing_seen
from experiments.rl.stretches import count, play
from experiments.run.devices import ONE, Layout
from experiments.run.errors import UsageError
from experiments.run.learners import Rates, row_of, strategy
from experiments.run.trainer import Carry

SHAPINGS = {
    "zscore": eggroll.shaping.zscore,
    "centered_rank": eggroll.shaping.centered_rank,
}


class Seen(NamedTuple):
    """What a run carries beside the strategy's state.

    Attributes:
        statistics: of the observations so far.
    """

    statistics: Statistics


def make_strategy(
    config: Config, layout: Layout = ONE, rates: Rates | None = None
) -> eggroll.EvolutionStrategy:
    """The evolution strategy that the settings describe, at other rates than theirs if any are given."""
    how: dict[str, Any] = {"shaping": SHAPINGS[config.shaping]()}
    if config.perturb != "weights":
        on_outputs = eggroll.Nodes(sigma=config.nodes.scale)
        how = {
            "shaping": None,
            "credit": eggroll.credit.causal(config.nodes.gamma),
            "plan": eggroll.plan.by_shape(
                {f"policy/{name}/*": on_outputs for name in layers_of(config)}
            ),
        }
    return strategy(config.evolution, config.optimizer, layout, rates, **how)


def layers_of(config: Config) -> list[str]:
    """Names of the layers whose outputs have noise; the parameters of all others have."""
    first = config.depth if config.perturb == "mixed" else 0
    return [f"Dense_{i}" for i in range(first, config.depth + 1)]


def keys(seed: Int[Array, ""]) -> tuple[Key[Array, ""], Key[Array, ""], Key[Array, ""]]:
    """For the first parameters, the search, and the held-out episodes."""
    init, search, held_out = jax.random.split(jax.random.key(seed), 3)
    return init, search, held_out


def start(
    config: Config, policy: Policy, environment: Environment[Any], seed: Int[Array, ""]
) -> Carry:
    """The state before generation 0."""
    init_key, search_key, _ = keys(seed)
    state = make_strategy(config).init(policy.init(init_key), search_key)
    seen = Seen(nothing_seen(environment.observations))
    return Carry(state, seen, jnp.int32(0), jnp.asarray(seed, jnp.int32))


def make_generation(
    config: Config,
    policy: Policy,
    environment: Environment[Any],
    layout: Layout = ONE,
    rates: Rates | None = None,
) -> Callable[[Carry], tuple[Carry, dict[str, Array | None]]]:
    """carry -> (next carry, metric row)."""
    es = make_strategy(config, layout, rates)
    run = run_abreast if config.evolution.rank == "full" else run_episodes

    def fitness(
        params: PyTree, key: Key[Array, ""], statistics: Statistics
    ) -> tuple[Float[Array, ""], Any]:
        keys = key[None] if config.episodes == 1 else jax.random.split(key, config.episodes)
        played = run(
            environment,
            policy,
            params,
            statistics,
            keys,
            config.deterministic,
            watch=config.normalise,
        )
        return played.score / config.episodes, (played.steps, played.seen)

    limit = environment.time_limit or 0
    if config.perturb != "weights" and not limit and config.nodes.steps is None:
        raise UsageError(f"--env {config.env}: it has no time limit, so choose --nodes.steps")
    stretches = count(limit, config.episodes, config.nodes.hold, config.nodes.steps)

    def by_stretch(
        params: PyTree, key: Key[Array, ""], statistics: Statistics, plain: PyTree
    ) -> tuple[Float[Array, "stretches"], Any]:
        played = play(
            environment, policy, layers_of(config), params, plain, statistics,
            jax.random.split(key, config.episodes), stretches, config.nodes.hold,
            config.deterministic, watch=config.normalise,
        )  # fmt: skip
        # The mean over stretches is the mean return.
        scores = played.rewards * (stretches / config.episodes)
        return scores, (played.total.steps, played.total.seen)

    # In halves, because `es.step` gives back neither lengths nor observations.
    def generation(carry: Carry) -> tuple[Carry, dict[str, Array | None]]:
        before = carry.own.statistics
        if config.perturb == "weights":
            scores, (steps, seen) = es.evaluate(carry.learner, fitness, before)
            state, metrics = es.update(carry.learner, scores)
        else:
            args = before, carry.learner.params
            scores, (steps, seen) = es.evaluate(carry.learner, by_stretch, *args)
            state, metrics = es.update(carry.learner, scores, by_stretch, *args)
        statistics = before if seen is None else merge(before, layout.gather(seen))
        after = Carry(state, Seen(statistics), carry.generation + 1, carry.seed)
        return after, {**row_of(metrics, es, carry.learner), "environment_steps": steps.sum()}

    return generation
