"""Evolution strategies over streams of text, in int8 or in float32."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key, PyTree, UInt8

import eggroll
from eggroll import integer
from experiments.pretrain.backprop import repeat
from experiments.pretrain.config import Config
from experiments.pretrain.models import Model
from experiments.run.devices import ONE, Layout
from experiments.run.learners import row_of, strategy
from experiments.run.trainer import Carry


class ByEvolution:
    """A population that reads streams of text; each member keeps its hidden state between generations.

    Args:
        config: the settings.
        model: what is trained.
        layout: the devices.
    """

    def __init__(self, config: Config, model: Model, layout: Layout = ONE) -> None:
        self._config, self._model = config, model
        self._es = self._strategy(layout)
        # Hidden states are where their members are.
        each, members = layout.everywhere, layout.members
        # A tree of shardings, in the place of arrays.
        lies: Any = (each, members, each, each)
        self.sharding: Any = None if each is None else Carry(*lies)
        # One object for all generations, which compiles once.
        self._fitness = self._make_fitness()

    def _strategy(self, layout: Layout) -> eggroll.EvolutionStrategy:
        make = integers if self._config.model == "egg" else floats
        return make(self._config, self._model, layout)

    def _make_fitness(self) -> Any:
        return make_fitness(self._model)

    def start(self, seed: Array) -> Carry:
        """The state before generation 0."""
        init_key, search_key = jax.random.split(jax.random.key(seed))
        state = self._es.init(self._model.init(init_key), search_key)
        hidden = repeat(self._model.state, self._config.evolution.population)
        return Carry(state, hidden, jnp.int32(0), seed)

    def generation(
        self, carry: Carry, tokens: UInt8[Array, "streams tokens"]
    ) -> tuple[Carry, dict[str, Array | None]]:
        """Every member reads its stream's next bytes; members of a group read the same."""
        members = (carry.own, jnp.repeat(tokens, self._config.group, axis=0))
        state, hidden, row = self._update(carry.learner, members)
        row["weights_moved"] = moved(carry.learner.params, state.params)
        return Carry(state, hidden, carry.generation + 1, carry.seed), row

    def _update(self, state: Any, members: Any) -> tuple[Any, PyTree, dict[str, Array | None]]:
        """One update by what members read: the next state, their hidden states, and a row."""
        scores, hidden = self._es.evaluate(state, self._fitness, members=members)
        # Float scores are compared within the members of a stream; of integers only pairs are.
        floats = self._config.model != "egg"
        groups = (
            jnp.arange(self._config.evolution.population) // self._config.group if floats else None
        )
        before = state
        state, metrics = self._es.update(state, scores, groups)
        assert metrics.fitness_mean is not None  # scores were given
        per_byte = self._model.unit * self._config.tokens
        row = row_of(metrics, self._es, before) | {
            "train_bits_per_byte": -metrics.fitness_mean / per_byte
        }
        return state, hidden, row


def make_fitness(model: Model) -> Any:
    """What a member is scored by: minus the loss on what it reads, beside its next hidden state."""

    def fitness(params: PyTree, key: Key[Array, ""], member: Any) -> tuple[Array, PyTree]:
        hidden, loss = model.loss(params, *member)
        return -loss, hidden

    return fitness


def integers(config: Config, model: Model, layout: Layout) -> eggroll.EvolutionStrategy:
    """The strategy for int8 models, whose generations have not one float in them."""
    return integer.strategy(
        population=config.evolution.population,
        optimizer=integer_rule(config),
        shift=config.shift,
        plan=model.plan,
        rank=config.evolution.rank,
        chunk=config.evolution.chunk,
        mesh=layout.mesh,
        deterministic=layout.same_bits,
    )


def integer_rule(config: Config) -> Any:
    """What moves int8 weights by one unit."""
    rule: Any = integer.threshold(lambda t: config.alpha / (1 + config.alpha_decay * t))
    if config.update == "error_feedback":
        rule = integer.error_feedback(rule)
    elif config.update == "momentum":
        rule = optax.chain(integer.momentum(), rule)
    return rule


def floats(config: Config, model: Model, layout: Layout) -> eggroll.EvolutionStrategy:
    """The strategy for float32 models."""
    # Streams differ in how hard they are to predict: members are compared with those of their own.
    shaping = eggroll.shaping.per_task()
    return strategy(config.evolution, config.optimizer, layout, plan=model.plan, shaping=shaping)


def moved(before: PyTree, after: PyTree) -> Array:
    """The share of the parameters that are not what they were."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    count = sum(jnp.sum(a != b) for a, b in pairs)
    return count / sum(leaf.size for leaf in jax.tree.leaves(before))
