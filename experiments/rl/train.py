"""`eggroll rl`: policies by evolution strategies, or by PPO for comparison.

    eggroll rl --preset cartpole     # ten seconds on two cores: 500 of 500 steps
    eggroll rl --preset pendulum     # five minutes: a return of about -180

A generation is `generation` in :mod:`experiments.rl.evolution` (whole episodes of every member, then an
update) or in :mod:`experiments.rl.ppo`; :mod:`experiments.rl.outside` steps environments that are not JAX.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from experiments.rl import evolution, ppo
from experiments.rl.config import GYMNASIUM, Config
from experiments.rl.environments import Task, make_task
from experiments.rl.policy import Policy, make_policy
from experiments.rl.rollout import run_episode
from experiments.run.axes import ENVIRONMENT_STEPS
from experiments.run.devices import ONE, Layout, layout_of
from experiments.run.plots import Curve
from experiments.run.program import Program, ProgramTrainer
from experiments.run.seeds import average, each, many
from experiments.run.tensors import write_tensors
from experiments.run.trainer import Carry, Conclusion, Outcome, Trainer

# How a result is put into words, and what returns are counted in.
SKILLS = {"CartPole-v1": "to balance the pole"}
MEASURES = {"CartPole-v1": "the {who} holds it for {score:.1f} of 500 steps"}
UNITS = {"CartPole-v1": "steps"}
PLAIN_MEASURE = "the return of the {who} is {score:.1f}"
# Streams of the keys of episodes: for `eggroll eval`, and to confirm a target.
EVALUATED, FRESH = 0x5EED, 0xF2E5


def make_trainer(config: Config) -> Trainer[Config]:
    """The trainer for the kind of environment that the settings name.

    Raises:
        UsageError: for an environment or an optimizer that there is not.
    """
    return OutsidePolicy(config) if config.env.startswith(GYMNASIUM) else JaxPolicy(config)


class JaxPolicy(ProgramTrainer[Config]):
    """Trains in an environment that is a part of the program.

    Args:
        config: the settings.
    """

    measured = ("held_out_return",)
    totals = ("environment_steps",)

    def __init__(self, config: Config) -> None:
        self.task, self.policy = parts(config)
        ppo = config.algorithm != "eggroll"
        super().__init__(
            config, f"--algorithm {config.algorithm} has no population to divide" if ppo else None
        )

    def program(self, config: Config, layout: Layout = ONE) -> Program:
        """One run: episodes and an update, by either algorithm."""
        task, policy = self.task, self.policy
        method: Any = ppo if config.algorithm == "ppo" else evolution
        sharing = {} if config.algorithm == "ppo" else {"layout": layout}

        def held_out(carry: Carry) -> Mapping[str, Array]:
            _, _, key = evolution.keys(carry.seed)
            return {"held_out_return": self._mean_return(carry, key)}

        def fresh(carry: Carry) -> Mapping[str, Array]:
            _, _, key = evolution.keys(carry.seed)
            key = jax.random.fold_in(jax.random.fold_in(key, FRESH), carry.generation)
            return {"fresh_return": self._mean_return(carry, key)}

        return Program(
            start=lambda seed: method.start(config, policy, task, seed),
            generation=method.make_generation(config, policy, task, **sharing),
            measure=held_out,
            confirm=fresh,
        )

    def _mean_return(self, carry: Carry, key: Key[Array, ""]) -> Float[Array, ""]:
        keys = jax.random.split(key, self.config.held_out_episodes)
        return play(self.config, self.policy, self.task, carry, keys).mean()

    def evaluate(self, carry: Carry, episodes: int, seed: int) -> dict[str, list[float]]:
        """Returns of new episodes, by seed of the training; they are those of no training run."""
        config = self.config
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), EVALUATED), episodes)
        one = lambda carry: play(config, self.policy, self.task, carry, keys)
        returns = np.asarray(jax.jit(many(config.seeds)(one))(carry))
        returns = returns.reshape(config.seeds, episodes)
        return {f"seed {config.seed + i}": row.tolist() for i, row in enumerate(returns)}

    def conclude(self, config: Config, outcome: Outcome) -> Conclusion:
        return conclude(config, outcome)

    def export(self, carry: Carry, to: Path | None) -> str:
        return export(self.config, carry, to)


class OutsidePolicy(Trainer[Config]):
    """Trains in an environment that other processes step.

    Args:
        config: the settings.
    """

    measured = ("held_out_return",)
    totals = ("environment_steps",)

    def __init__(self, config: Config) -> None:
        from experiments.rl.outside import Outside

        super().__init__(config)
        layout_of(config.cluster, alone=f"--env {config.env} is stepped by this process")
        self.outside = Outside(config)

    def start(self) -> Carry:
        return self.outside.start()

    def generation(self, carry: Carry) -> tuple[Carry, Mapping[str, Any]]:
        return self.outside.generation(carry)

    def measure(self, carry: Carry) -> Mapping[str, Any]:
        seed, count = self.config.seed, self.config.held_out_episodes
        return {"held_out_return": float(self.outside.returns(carry, count, seed, 1).mean())}

    def confirm(self, carry: Carry) -> Mapping[str, Any]:
        stream = self.config.seed, FRESH, int(carry.generation)
        returns = self.outside.returns(carry, self.config.held_out_episodes, *stream)
        return {"fresh_return": float(returns.mean())}

    def evaluate(self, carry: Carry, episodes: int, seed: int) -> dict[str, list[float]]:
        """Returns of new episodes."""
        returns = self.outside.returns(carry, episodes, seed, EVALUATED)
        return {f"seed {self.config.seed}": returns.tolist()}

    def conclude(self, config: Config, outcome: Outcome) -> Conclusion:
        return conclude(config, outcome)

    def export(self, carry: Carry, to: Path | None) -> str:
        return export(self.config, carry, to)


def parts(config: Config) -> tuple[Task, Policy]:
    """The environment and the policy that the settings describe."""
    task = make_task(config.env)
    policy = make_policy(
        task.observations, task.actions,
        config.width, config.depth, config.activation, config.normalise,
    )  # fmt: skip
    return task, policy


def play(
    config: Config, policy: Policy, task: Task, carry: Carry, keys: Array
) -> Float[Array, "episodes"]:
    """Returns of the policy, an episode a key."""
    params, statistics = carry.learner.params, carry.own.statistics
    one = lambda key: run_episode(task, policy, params, statistics, key, config.deterministic)
    return jax.vmap(lambda key: one(key).score)(keys)


def export(config: Config, carry: Carry, to: Path | None) -> str:
    """Writes the policy, and the statistics that it scales observations with."""
    tree = {"params": carry.learner.params}
    if config.normalise:
        tree["statistics"] = carry.own.statistics._asdict()
    return write_tensors(config, int(np.max(carry.generation)), tree, to)


def conclude(config: Config, outcome: Outcome) -> Conclusion:
    """The return, in words and as a curve."""
    steps = sum(each(outcome.totals.get("environment_steps", 0)))
    n, seeds = outcome.generations, config.seeds
    several = f"mean of {seeds} seeds, " if seeds > 1 else ""
    lesson = in_words(config, each(outcome.fresh["fresh_return"]))
    path = (
        f"on {several}{config.held_out_episodes} fresh episodes, after {n} "
        f"generation{'s' * (n != 1)} and {steps:,} environment steps"
    )
    name = config.env.removeprefix(GYMNASIUM)
    curve = Curve(
        name="held_out_return",
        words=f"return of a {name} episode ({UNITS.get(name, 'sum of rewards')})",
        who=who(config),
        target=config.target,
        x=ENVIRONMENT_STEPS,
        population=config.algorithm == "eggroll",
        training=("episode_return", "training episodes") if config.algorithm == "ppo" else None,
    )
    return Conclusion(lesson, path, curve)


def who(config: Config) -> str:
    """What is trained: a population has a mean policy."""
    return "mean policy" if config.algorithm == "eggroll" else "policy"


def in_words(config: Config, scores: list[float]) -> str:
    """The outcome as the beginning of a sentence, plain about a target that was missed.

    Args:
        config: the settings.
        scores: the fresh return of every seed.
    """
    name = config.env.removeprefix(GYMNASIUM)
    skill, measure = SKILLS.get(name, name), MEASURES.get(name, PLAIN_MEASURE)
    good = sum(config.target is not None and score >= config.target for score in scores)
    if config.target is None:
        verdict = f"Trained on {name}"
    elif good == len(scores):
        verdict = f"Learned {skill}"
    elif good:
        verdict = f"{good} of {len(scores)} seeds learned {skill} (target {config.target:g})"
    else:
        verdict = f"Not yet learned {skill} (target {config.target:g})"
    # Cut, not rounded: 499.97 is not 500.
    shown = math.floor(average(scores) * 10) / 10
    return f"{verdict}: {measure.format(score=shown, who=who(config))}"
