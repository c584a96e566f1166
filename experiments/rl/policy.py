"""Policies: a multilayer perceptron from observations to actions of either kind."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from experiments.models.mlp import MLP, Activation
from experiments.rl.environments import Continuous, Discrete
from experiments.rl.statistics import Statistics, normalise


class Distribution(NamedTuple):
    """What a policy thinks of the actions in one state.

    Attributes:
        best: the most likely action.
        sample: key -> an action drawn.
        log_prob: action -> the logarithm of its probability (density).
        entropy: in nats.
    """

    best: Array
    sample: Callable[[Key[Array, ""]], Array]
    log_prob: Callable[[Array], Float[Array, ""]]
    entropy: Float[Array, ""]


class Policy(NamedTuple):
    """Functions of one architecture.

    Attributes:
        init: key -> parameters.
        distribution: (parameters, statistics, encoded observation) -> Distribution. Actions are in
            units of their own: whole numbers, or vectors whose bounds are -1 and 1.
        to_env: such an action as the environment takes it.
    """

    init: Callable[[Key[Array, ""]], PyTree]
    distribution: Callable[[PyTree, Statistics, Float[Array, "observations"]], Distribution]
    to_env: Callable[[Array], Array]

    def act(
        self,
        params: PyTree,
        statistics: Statistics,
        observation: Float[Array, "observations"],
        key: Key[Array, ""] | None,
    ) -> Array:
        """The action for an encoded observation: the best one without a key, a drawn one with."""
        d = self.distribution(params, statistics, observation)
        return self.to_env(d.best if key is None else d.sample(key))


def make_policy(
    observations: int,
    actions: Discrete | Continuous,
    width: int = 32,
    depth: int = 2,
    activation: Activation = "tanh",
    normalised: bool = False,
) -> Policy:
    """A policy whose parameters are {"policy": of the MLP, "log_std": [actions]}, the latter only for
    continuous actions: a diagonal Gaussian, cut at the bounds by the environment's side.

    Example:
        >>> policy = make_policy(4, Discrete(2), width=8)
        >>> params = policy.init(jax.random.key(0))
        >>> params["policy"]["Dense_0"]["kernel"].shape
        (4, 8)
    """
    size = actions.n if isinstance(actions, Discrete) else actions.low.size
    model = MLP(size, width, depth, activation)

    def init(key: Key[Array, ""]) -> PyTree:
        params: dict[str, Any] = {"policy": model.init(key, jnp.zeros(observations))["params"]}
        if isinstance(actions, Continuous):
            params["log_std"] = jnp.full(size, -0.5, jnp.float32)
        return params

    def distribution(
        params: PyTree, statistics: Statistics, observation: Float[Array, "observations"]
    ) -> Distribution:
        if normalised:
            observation = normalise(statistics, observation)
        out = cast(Array, model.apply({"params": params["policy"]}, observation))
        return (
            categorical(out) if isinstance(actions, Discrete) else gaussian(out, params["log_std"])
        )

    def to_env(action: Array) -> Array:
        if isinstance(actions, Discrete):
            return action
        low, high = jnp.asarray(actions.low), jnp.asarray(actions.high)
        middle, half = (high + low) / 2, (high - low) / 2
        return middle + half * jnp.clip(action, -1, 1)

    return Policy(init, distribution, to_env)


def categorical(logits: Float[Array, "actions"]) -> Distribution:
    """One of several actions, by unnormalised log-probabilities."""
    logs = jax.nn.log_softmax(logits)
    return Distribution(
        best=jnp.argmax(logits),
        sample=lambda key: jax.random.categorical(key, logits),
        log_prob=lambda action: logs[action],
        entropy=-jnp.sum(jnp.exp(logs) * logs),
    )


def gaussian(mean: Float[Array, "actions"], log_std: Float[Array, "actions"]) -> Distribution:
    """Independent normal distributions."""
    half_log_2pi = 0.5 * jnp.log(2 * jnp.pi)

    def log_prob(action: Float[Array, "actions"]) -> Float[Array, ""]:
        z = (action - mean) * jnp.exp(-log_std)
        return jnp.sum(-0.5 * z**2 - log_std - half_log_2pi)

    return Distribution(
        best=mean,
        sample=lambda key: mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape),
        log_prob=log_prob,
        entropy=jnp.sum(log_std + half_log_2pi + 0.5),
    )
