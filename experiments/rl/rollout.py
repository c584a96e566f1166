"""One episode of a gymnax environment as a function of a policy's parameters and a key.

An evolution strategy scores a member by whole episodes, so the environment's own ``step``, which
starts a new episode by itself, is passed over: ``step_env`` is looped until the first end. Under
``vmap`` the loop runs until the last member is done, and members that are done stay as they are.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from gymnax import make as make_gymnax
from gymnax import registered_envs
from gymnax.environments import spaces
from gymnax.environments.environment import Environment, EnvParams
from jaxtyping import Array, Float, Int, Key, PyTree

from experiments.run.errors import UsageError, suggestion

Policy = Callable[[PyTree, Float[Array, "observations"], Key[Array, ""]], Int[Array, ""]]


class Task(NamedTuple):
    """An environment together with the sizes a policy needs.

    Attributes:
        env: the gymnax environment.
        env_params: its parameters, the time limit among them.
        observations: length of its flat observation.
        actions: number of its discrete actions.
        max_steps: steps after which an episode is cut.
    """

    env: Environment
    env_params: EnvParams
    observations: int
    actions: int
    max_steps: int


class Episode(NamedTuple):
    """What one episode came to.

    Attributes:
        score: sum of the rewards up to and including the last step.
        steps: number of steps taken.
    """

    score: Float[Array, ""]
    steps: Int[Array, ""]


def make_task(name: str) -> Task:
    """The gymnax environment called `name`, with its default parameters.

    Raises:
        UsageError: if gymnax does not know `name`, or if its observations are not a flat vector or
            its actions not discrete.

    Example:
        >>> make_task("CartPole-v1").actions
        2
    """
    if name not in registered_envs:
        raise UsageError(f"gymnax has no environment {name!r}{suggestion(name, registered_envs)}")
    try:
        env, env_params = make_gymnax(name)
    except OSError as error:  # some environments download their data
        raise UsageError(f"gymnax could not set up {name}: {error}") from error
    actions = env.action_space(env_params)
    if not isinstance(actions, spaces.Discrete):
        raise UsageError(
            f"{name} takes continuous actions of shape {actions.shape}; "
            "this driver trains policies over discrete actions"
        )
    observation, _ = jax.eval_shape(env.reset, jax.random.key(0), env_params)
    if observation.ndim != 1:
        raise UsageError(
            f"{name} gives observations of shape {observation.shape}; "
            "this driver trains policies that read a flat vector"
        )
    return Task(env, env_params, observation.size, actions.n, int(env_params.max_steps_in_episode))


def make_policy(model: nn.Module, deterministic: bool) -> Policy:
    """A policy `act(params, observation, key) -> action` over the logits of `model`.

    Args:
        model: a Flax module from an observation to one logit an action.
        deterministic: take the most likely action; otherwise sample from the softmax.
    """

    def act(
        params: PyTree, observation: Float[Array, "observations"], key: Key[Array, ""]
    ) -> Int[Array, ""]:
        logits = cast(Array, model.apply({"params": params}, observation))
        return jnp.argmax(logits) if deterministic else jax.random.categorical(key, logits)

    return act


def run_episode(task: Task, policy: Policy, params: PyTree, key: Key[Array, ""]) -> Episode:
    """Plays one episode from reset until it terminates or reaches the time limit.

    Args:
        task: the environment.
        policy: chooses an action for every observation.
        params: the policy's parameters.
        key: decides the start, the environment's chance and the sampled actions.
    """
    reset_key, episode_key = jax.random.split(key)
    observation, state = task.env.reset(reset_key, task.env_params)

    def step(carry: tuple) -> tuple:
        observation, state, episode, _ = carry
        policy_key, env_key = jax.random.split(jax.random.fold_in(episode_key, episode.steps))
        action = policy(params, observation.astype(jnp.float32), policy_key)
        observation, state, reward, terminated, _ = task.env.step_env(
            env_key, state, action, task.env_params
        )
        episode = Episode(episode.score + reward, episode.steps + 1)
        over = terminated | task.env.is_truncated(state, task.env_params)
        return observation, state, episode, over

    start = Episode(jnp.float32(0), jnp.int32(0))
    carry = (observation, state, start, jnp.array(False))
    return jax.lax.while_loop(lambda carry: ~carry[-1], step, carry)[2]
