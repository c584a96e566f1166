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

from experiments.rl import episodes as played
from experiments.rl import evolution, ppo
from experiments.rl.config import Config
from experiments.rl.environments import Environment, OutsideEnvironment
from experiments.run.axes import ENVIRONMENT_STEPS
from experiments.run.devices import ONE, Layout, layout_of
from experiments.run.learners import Rates
from experiments.run.plots import Curve
from experiments.run.program import Program, ProgramTrainer, many
from experiments.run.seeds import average, each
from experiments.run.tensors import write_tensors
from experiments.run.trainer import Carry, Conclusion, Films, Outcome, Trainer

# How a result is put into words, and what returns are counted in.
SKILLS = {"CartPole-v1": "to balance the pole"}
MEASURES = {"CartPole-v1": "the {who} holds it for {score:.1f} of 500 steps"}
UNITS = {"CartPole-v1": "steps"}
PLAIN_MEASURE = "the return of the {who} is {score:.1f}"


def make_trainer(config: Config) -> Trainer[Config]:
    """The trainer for the kind of environment that the settings name.

    Raises:
        UsageError: for an environment or an optimizer that there is not.
    """
    environment = played.environment_of(config)
    if isinstance(environment, OutsideEnvironment):
        return OutsidePolicy(config, environment)
    return JaxPolicy(config, environment)


class PolicyTrainer(Trainer[Config], Films):
    """What the trainers of policies share: what a run taught, its files, and a film of an episode."""

    measured = ("held_out_return",)
    totals = ("environment_steps",)

    def conclude(self, config: Config, outcome: Outcome) -> Conclusion:
        return conclude(config, outcome)

    def export(self, carry: Carry, to: Path | None) -> str:
        """Writes the policy, and the statistics that it scales observations with."""
        tree = {"params": carry.learner.params}
        if self.config.normalise:
            tree["statistics"] = carry.own.statistics._asdict()
        return write_tensors(self.config, int(np.max(carry.generation)), tree, to)

    def draws(self, config: Config) -> bool:
        return config.render

    def film(self, config: Config, carry: Carry, seed: int) -> str:
        from experiments.rl.render import FILE, render

        return render(config, carry, config.run_dir / FILE, seed)


class JaxPolicy(ProgramTrainer[Config], PolicyTrainer):
    """Trains in an environment that is a part of the program.

    Args:
        config: the settings.
        environment: that is trained in.
    """

    def __init__(self, config: Config, environment: Environment[Any]) -> None:
        self.environment, self.policy = environment, played.policy_of(config, environment)
        self.files = played.files_of(config)
        ppo = config.algorithm != "eggroll"
        super().__init__(
            config, f"--algorithm {config.algorithm} has no population to divide" if ppo else None
        )

    def program(self, config: Config, layout: Layout = ONE, rates: Rates | None = None) -> Program:
        """One run: episodes and an update, by either algorithm."""
        environment, policy = self.environment, self.policy
        method: Any = ppo if config.algorithm == "ppo" else evolution
        sharing = {} if config.algorithm == "ppo" else {"layout": layout, "rates": rates}

        def returns(carry: Carry, keys: Key[Array, "episodes"]) -> Float[Array, ""]:
            return played.play(config, policy, environment, carry, keys).mean()

        def held_out(carry: Carry) -> Mapping[str, Array]:
            _, _, key = evolution.keys(carry.seed)
            keys = jax.random.split(key, config.held_out_episodes)
            return {"held_out_return": returns(carry, keys)}

        def fresh(carry: Carry) -> Mapping[str, Array]:
            keys = played.fresh_keys(carry.seed, carry.generation, config.held_out_episodes)
            return {"fresh_return": returns(carry, keys)}

        return Program(
            start=lambda seed: method.start(config, policy, environment, seed),
            generation=method.make_generation(config, policy, environment, **sharing),
            measure=held_out,
            confirm=fresh,
        )

    def evaluate(self, carry: Carry, episodes: int, seed: int) -> dict[str, list[float]]:
        """Returns of new episodes, by seed of the training; they are those of no training run."""
        config, keys = self.config, played.evaluated_keys(seed, episodes)
        one = lambda carry: played.play(config, self.policy, self.environment, carry, keys)
        returns = np.asarray(jax.jit(many(config.seeds)(one))(carry))
        returns = returns.reshape(config.seeds, episodes)
        return {f"seed {config.seed + i}": row.tolist() for i, row in enumerate(returns)}


class OutsidePolicy(PolicyTrainer):
    """Trains in an environment that other processes step.

    Args:
        config: the settings.
        environment: that is trained in.
    """

    def __init__(self, config: Config, environment: OutsideEnvironment) -> None:
        from experiments.rl.outside import Outside

        super().__init__(config)
        layout_of(config.cluster, alone=f"--env {config.env} is stepped by this process")
        self.files = played.files_of(config)
        self.outside = Outside(config, environment)

    def start(self) -> Carry:
        return self.outside.start()

    def generation(self, carry: Carry) -> tuple[Carry, Mapping[str, Any]]:
        return self.outside.generation(carry)

    def measure(self, carry: Carry) -> Mapping[str, Any]:
        from experiments.rl.outside import held_out_starts

        starts = held_out_starts(self.config.seed, self.config.held_out_episodes)
        return {"held_out_return": float(self.outside.returns(carry, starts).mean())}

    def confirm(self, carry: Carry) -> Mapping[str, Any]:
        config, generation = self.config, int(carry.generation)
        starts = played.fresh_starts(config.seed, generation, config.held_out_episodes)
        return {"fresh_return": float(self.outside.returns(carry, starts).mean())}

    def evaluate(self, carry: Carry, episodes: int, seed: int) -> dict[str, list[float]]:
        """Returns of new episodes; they are those of no training run."""
        returns = self.outside.returns(carry, played.evaluated_starts(seed, episodes))
        return {f"seed {self.config.seed}": returns.tolist()}


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
    name = config.env.removeprefix("gymnasium:")
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


def in_words(config: Config, scores: list[Any]) -> str:
    """The outcome as the beginning of a sentence, plain about a target that was missed.

    Args:
        config: the settings.
        scores: the fresh return of every seed; None for one that is not finite.
    """
    name = config.env.removeprefix("gymnasium:")
    skill, measure = SKILLS.get(name, name), MEASURES.get(name, PLAIN_MEASURE)
    if None in scores:
        return f"Not learned {skill}: the return is no longer finite"
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
