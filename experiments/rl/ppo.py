"""Proximal policy optimization (Schulman et al., arXiv 1707.06347), the baseline with backpropagation.

A generation is one round: `steps` steps of every environment with the sampled policy, then `epochs`
passes over them in minibatches. Episodes that the time limit cuts are continued by the value of their
last observation; those that end are not.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from experiments.models.mlp import MLP
from experiments.rl.config import Config
from experiments.rl.environments import Environment, begin, step_or_restart
from experiments.rl.episodes import round_key
from experiments.rl.evolution import keys
from experiments.rl.policy import Policy
from experiments.rl.statistics import Statistics, Sums, merge, normalise, nothing_seen
from experiments.run.learners import Backprop, Trained
from experiments.run.optimizers import make_optimizer
from experiments.run.trainer import Carry


class Playing(NamedTuple):
    """What a run carries beside parameters and optimizer.

    Attributes:
        statistics: of the observations so far.
        observation: encoded, [environments, observations].
        env_state: of the environments.
        score: sum of the rewards of each running episode, [environments].
    """

    statistics: Statistics
    observation: Float[Array, "..."]
    env_state: Any
    score: Float[Array, "..."]


class Batch(NamedTuple):
    """What is learned from, leaves [steps, environments, ...] and then [minibatch, ...]."""

    observation: Float[Array, "..."]
    action: Array
    log_prob: Float[Array, "..."]
    advantage: Float[Array, "..."]
    target: Float[Array, "..."]


def value_model(config: Config) -> MLP:
    return MLP(1, config.width, config.depth, config.activation)


def learner_of(config: Config) -> Backprop:
    """Clipped gradients into the optimizer that the settings name."""
    rate: Any = config.ppo.learning_rate
    if config.ppo.anneal:
        updates = config.ppo.epochs * config.ppo.minibatches * config.ppo.generations
        rate = optax.linear_schedule(rate, 0.0, updates)
    clip = optax.clip_by_global_norm(config.ppo.gradient_norm)
    return Backprop(optax.chain(clip, make_optimizer(config.optimizer.name, rate)))


def start(
    config: Config, policy: Policy, environment: Environment[Any], seed: Int[Array, ""]
) -> Carry:
    """The state before the first round."""
    init_key, reset_key, _ = keys(seed)
    policy_key, value_key = jax.random.split(init_key)
    params = explorative(policy.init(policy_key), config.depth)
    params["value"] = value_model(config).init(value_key, jnp.zeros(environment.observations))[
        "params"
    ]
    observation, env_state = jax.vmap(lambda key: begin(environment, key))(
        jax.random.split(reset_key, config.ppo.environments)
    )
    playing = Playing(
        nothing_seen(environment.observations),
        jax.vmap(environment.encode)(observation),
        env_state,
        jnp.zeros(config.ppo.environments),
    )
    learner = learner_of(config).start(params)
    return Carry(learner, playing, jnp.int32(0), jnp.asarray(seed, jnp.int32))


def explorative(params: PyTree, depth: int) -> PyTree:
    """A policy that begins with nearly equal chances, or a wide Gaussian around zero.

    It matters more than most settings (Andrychowicz et al., arXiv 2006.05990, section 3.2).
    """
    head = f"Dense_{depth}"
    policy = dict(params["policy"])
    policy[head] = jax.tree.map(lambda x: 0.01 * x, policy[head])
    return {**jax.tree.map(jnp.zeros_like, params), "policy": policy}


def advantages(
    discount: float,
    gae_lambda: float,
    worth: Float[Array, "steps environments"],
    values: Float[Array, "steps environments"],
    over: Array,
    last: Float[Array, "environments"],
) -> Float[Array, "steps environments"]:
    """Generalised advantage estimates (Schulman et al., arXiv 1506.02438, equation 16).

    Args:
        discount: what a reward one step later counts.
        gae_lambda: between one-step estimates (0) and whole returns (1).
        worth: rewards, with what follows an episode that was cut.
        values: of the observations acted upon.
        over: whether the episode ended with the step.
        last: values of the observations after the last step.
    """

    def back(carry: tuple, step: tuple) -> tuple:
        advantage, after = carry
        worth, value, over = step
        on = 1.0 - over
        delta = worth + discount * on * after - value
        advantage = delta + discount * gae_lambda * on * advantage
        return (advantage, value), advantage

    return jax.lax.scan(back, (jnp.zeros_like(last), last), (worth, values, over), reverse=True)[1]


def make_generation(
    config: Config, policy: Policy, environment: Environment[Any]
) -> Callable[[Carry], tuple[Carry, dict[str, Array]]]:
    """carry -> (next carry, metric row)."""
    return Round(config, policy, environment).generation


class Step(NamedTuple):
    """What a step of every environment leaves, leaves [environments, ...].

    Attributes:
        observation: encoded, that was acted upon.
        action: taken.
        log_prob: of the action when it was taken.
        worth: the reward, scaled, with what would have followed an episode that was cut.
        value: of the observation.
        over: whether an episode ended, or was cut.
        score: the return of an episode that is over, 0 elsewhere.
    """

    observation: Float[Array, "..."]
    action: Array
    log_prob: Float[Array, "..."]
    worth: Float[Array, "..."]
    value: Float[Array, "..."]
    over: Array
    score: Float[Array, "..."]


class Round:
    """The parts of a generation, as functions of what the settings fix.

    Args:
        config: the settings.
        policy: that is trained.
        environment: that is played in.
    """

    def __init__(self, config: Config, policy: Policy, environment: Environment[Any]) -> None:
        self.config, self.ppo, self.policy, self.environment = (
            config,
            config.ppo,
            policy,
            environment,
        )
        self.model, self.learner = value_model(config), learner_of(config)

    def value(self, params: PyTree, statistics: Statistics, observation: Array) -> Array:
        """What is expected to follow, by the value function."""
        if self.config.normalise:
            observation = normalise(statistics, observation)
        return cast(Array, self.model.apply({"params": params["value"]}, observation))[..., 0]

    def collect(self, params: PyTree, own: Playing, key: Array) -> tuple[Playing, Step]:
        """One step of every environment."""
        act_key, env_key = jax.random.split(key)
        seen, statistics = own.observation, own.statistics
        environment, ppo = self.environment, self.ppo

        def act(observation: Array, key: Array) -> tuple[Array, Array]:
            d = self.policy.distribution(params, statistics, observation)
            action = d.sample(key)
            return action, d.log_prob(action)

        split = lambda key: jax.random.split(key, ppo.environments)
        action, log_prob = jax.vmap(act)(seen, split(act_key))
        after = jax.vmap(functools.partial(step_or_restart, environment))(
            split(env_key), own.env_state, jax.vmap(self.policy.to_env)(action)
        )
        last = jax.vmap(environment.encode)(after.last)
        over, cut = after.terminated | after.cut, after.cut & ~after.terminated
        score = own.score + after.reward
        # What would have followed a cut episode is worth what the value function says.
        beyond = ppo.discount * cut * self.value(params, statistics, last)
        own = own._replace(
            observation=jax.vmap(environment.encode)(after.observation),
            env_state=after.running,
            score=jnp.where(over, 0.0, score),
        )
        value = self.value(params, statistics, seen)
        worth = ppo.reward_scale * after.reward + beyond
        return own, Step(seen, action, log_prob, worth, value, over, jnp.where(over, score, 0.0))

    def loss(
        self, params: PyTree, statistics: Statistics, batch: Batch
    ) -> tuple[Array, dict[str, Array]]:
        """The clipped objective, to be minimised, and its parts (equation 9 of the paper)."""
        ppo = self.ppo

        def one(observation: Array, action: Array) -> tuple[Array, Array]:
            d = self.policy.distribution(params, statistics, observation)
            return d.log_prob(action), d.entropy

        log_prob, entropy = jax.vmap(one)(batch.observation, batch.action)
        ratio = jnp.exp(log_prob - batch.log_prob)
        a = (batch.advantage - batch.advantage.mean()) / (batch.advantage.std() + 1e-8)
        gain = jnp.minimum(ratio * a, jnp.clip(ratio, 1 - ppo.clip, 1 + ppo.clip) * a).mean()
        value = self.value(params, statistics, batch.observation)
        error = 0.5 * jnp.mean((value - batch.target) ** 2)
        parts = {"entropy": entropy.mean(), "value_error": error, "ratio": ratio.mean()}
        return -gain + ppo.value * error - ppo.entropy * entropy.mean(), parts

    def learn(
        self, state: Trained, statistics: Statistics, batch: Batch, key: Array
    ) -> tuple[Trained, dict[str, Array]]:
        """Passes over a generation's steps, each in an order of its own."""
        size = batch.log_prob.shape[0]

        def minibatch(state: Trained, batch: Batch) -> tuple[Trained, dict[str, Array]]:
            state, _, parts, _ = self.learner.step(state, self.loss, statistics, batch)
            return state, parts

        def epoch(state: Trained, key: Array) -> tuple[Trained, dict[str, Array]]:
            order = jax.random.permutation(key, size).reshape(self.ppo.minibatches, -1)
            return jax.lax.scan(minibatch, state, jax.tree.map(lambda x: x[order], batch))

        parts: dict[str, Array]
        state, parts = jax.lax.scan(epoch, state, jax.random.split(key, self.ppo.epochs))
        return state, jax.tree.map(jnp.mean, parts)

    def generation(self, carry: Carry) -> tuple[Carry, dict[str, Array]]:
        """Steps, advantages, passes over them, statistics."""
        ppo, statistics, params = self.ppo, carry.own.statistics, carry.learner.params
        collect_key, order_key = jax.random.split(round_key(carry.seed, carry.generation))
        steps: Step
        own, steps = jax.lax.scan(
            functools.partial(self.collect, params),
            carry.own,
            jax.random.split(collect_key, ppo.steps),
        )
        last = self.value(params, statistics, own.observation)
        advantage = advantages(
            ppo.discount, ppo.gae_lambda, steps.worth, steps.value, steps.over, last
        )
        size = ppo.steps * ppo.environments
        flat = jax.tree.map(
            lambda x: x.reshape(size, *x.shape[2:]),
            Batch(
                steps.observation, steps.action, steps.log_prob, advantage, advantage + steps.value
            ),
        )
        learner, parts = self.learn(carry.learner, statistics, flat, order_key)
        if self.config.normalise:
            deviation = flat.observation - statistics.mean
            statistics = merge(statistics, Sums(jnp.ones(size), deviation, deviation**2))
        ended = steps.over.sum()
        returns = steps.score.sum() / jnp.maximum(ended, 1)
        row = {
            "episode_return": jnp.where(ended > 0, returns, jnp.nan),
            "episodes": ended,
            "environment_steps": jnp.int32(size),
            **parts,
        }
        own = own._replace(statistics=statistics)
        return Carry(learner, own, carry.generation + 1, carry.seed), row
