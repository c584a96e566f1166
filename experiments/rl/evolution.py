"""Evolution strategies on a JAX environment, low-rank or dense, as a job for the loop."""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int, Key, PyTree

import eggroll
from experiments.rl.config import Config
from experiments.rl.environments import Environment
from experiments.rl.policy import Policy
from experiments.rl.rollout import run_episodes
from experiments.rl.statistics import Statistics, merge, nothing_seen
from experiments.rl.stretches import count, play
from experiments.run.devices import ONE, Layout
from experiments.run.errors import UsageError
from experiments.run.optimizers import Rates, make_optimizer, rates_of


class Carry(NamedTuple):
    """All that a run carries; with several seeds every leaf has a leading axis [seeds].

    Attributes:
        es: the strategy's state.
        statistics: of the observations so far.
    """

    es: eggroll.State
    statistics: Statistics


def make_strategy(
    config: Config, rates: Rates | None = None, layout: Layout = ONE
) -> eggroll.EvolutionStrategy:
    """The evolution strategy that the settings describe, at other rates than theirs if any are given."""
    rates = rates or rates_of(config)
    how: dict[str, Any] = {"shaping": getattr(eggroll.shaping, config.shaping)()}
    if config.perturb != "weights":
        on_outputs = eggroll.Nodes(sigma=config.nodes.scale)
        how = {
            "shaping": None,
            "credit": eggroll.credit.causal(config.nodes.gamma),
            "plan": eggroll.plan.by_shape(
                {f"policy/{name}/*": on_outputs for name in layers_of(config)}
            ),
        }
    return eggroll.EvolutionStrategy(
        optimizer=make_optimizer(config.optimizer, rates.step),
        population=config.population,
        sigma=rates.noise,
        rank=config.rank,
        on_dense="error",
        mesh=layout.mesh,
        deterministic=layout.same_bits,
        **how,
    )


def layers_of(config: Config) -> list[str]:
    """Names of the layers whose outputs have noise; the parameters of all others have."""
    first = config.depth if config.perturb == "mixed" else 0
    return [f"Dense_{i}" for i in range(first, config.depth + 1)]


def keys(seed: Int[Array, ""]) -> tuple[Key[Array, ""], Key[Array, ""], Key[Array, ""]]:
    """For the first parameters, the search, and the held-out episodes."""
    init, search, held_out = jax.random.split(jax.random.key(seed), 3)
    return init, search, held_out


def start(
    config: Config,
    policy: Policy,
    task: Environment[Any],
    seed: Int[Array, ""],
    rates: Rates | None = None,
) -> Carry:
    """The state before generation 0."""
    init_key, search_key, _ = keys(seed)
    state = make_strategy(config, rates).init(policy.init(init_key), search_key)
    return Carry(state, nothing_seen(task.observations))


def make_generation(
    config: Config,
    policy: Policy,
    task: Environment[Any],
    rates: Rates | None = None,
    layout: Layout = ONE,
) -> Any:
    """carry -> (next carry, metric row)."""
    es = make_strategy(config, rates, layout)

    def fitness(
        params: PyTree, key: Key[Array, ""], statistics: Statistics
    ) -> tuple[Float[Array, ""], Any]:
        keys = key[None] if config.episodes == 1 else jax.random.split(key, config.episodes)
        played = run_episodes(
            task, policy, params, statistics, keys, config.deterministic, watch=config.normalise
        )
        return played.score / config.episodes, (played.steps, played.seen)

    limit = task.time_limit or 0
    if config.perturb != "weights" and not limit and config.nodes.steps is None:
        raise UsageError(f"--env {config.env}: it has no time limit, so choose --nodes.steps")
    stretches = count(limit, config.episodes, config.nodes.hold, config.nodes.steps)

    def by_stretch(
        params: PyTree, key: Key[Array, ""], statistics: Statistics, plain: PyTree
    ) -> tuple[Float[Array, "stretches"], Any]:
        played = play(
            task, policy, layers_of(config), params, plain, statistics,
            jax.random.split(key, config.episodes), stretches, config.nodes.hold,
            config.deterministic, watch=config.normalise,
        )  # fmt: skip
        # The mean over stretches is the mean return.
        scores = played.rewards * (stretches / config.episodes)
        return scores, (played.total.steps, played.total.seen)

    # In halves, because `es.step` gives back neither lengths nor observations.
    def generation(carry: Carry) -> tuple[Carry, dict[str, Array]]:
        if config.perturb == "weights":
            scores, (steps, seen) = es.evaluate(carry.es, fitness, carry.statistics)
            state, metrics = es.update(carry.es, scores)
        else:
            args = carry.statistics, carry.es.params
            scores, (steps, seen) = es.evaluate(carry.es, by_stretch, *args)
            state, metrics = es.update(carry.es, scores, by_stretch, *args)
        statistics = (
            carry.statistics if seen is None else merge(carry.statistics, layout.gather(seen))
        )
        row = metrics._asdict()
        del row["generation"]  # the loop's own
        return Carry(state, statistics), {**row, "environment_steps": steps.sum()}

    return generation
