"""`eggroll supervised`: classifiers of digits, by evolution strategies or backpropagation.

    eggroll supervised --preset digits          # half a minute on two cores: 97% of held-out images right
    eggroll supervised --preset digits-nodes    # ten seconds: 98%

A generation is :meth:`Classifier.program`: a batch of images, then `es.step` or a step along a gradient.
"""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

import eggroll
from experiments.models.mlp import MLP
from experiments.run.axes import UPDATES
from experiments.run.devices import ONE, Layout
from experiments.run.learners import Backprop, Rates, Trained, optimizer_of, row_of, strategy
from experiments.run.plots import Curve
from experiments.run.program import Program, ProgramTrainer
from experiments.run.seeds import average, each
from experiments.run.trainer import Carry, Conclusion, Outcome
from experiments.supervised.config import Config
from experiments.supervised.data import Data, load


class Classifier(ProgramTrainer[Config]):
    """Trains a multilayer perceptron to tell images apart.

    Args:
        config: the settings.

    Raises:
        UsageError: for data or an optimizer that there is not.
    """

    measured = ("held_out_accuracy", "train_accuracy")

    def __init__(self, config: Config) -> None:
        self.data = load(config.data)
        self.model = make_model(config, self.data)
        backprop = config.algorithm != "eggroll"
        why = f"--algorithm {config.algorithm} has no population to divide" if backprop else None
        super().__init__(config, alone=why)

    def program(self, config: Config, layout: Layout = ONE, rates: Rates | None = None) -> Program:
        """One run: a batch, a score of every member or a gradient, a step."""
        data, model, nodes = self.data, self.model, config.perturb == "nodes"
        x, y = jnp.asarray(data.x), jnp.asarray(data.y)
        size = min(config.batch, len(y))
        # An image does not act on the scores of the others. What products receive is kept for the second
        # pass, which saves a third of the time.
        of_nodes: dict[str, Any] = dict(
            perturb="nodes", credit=eggroll.credit.own(), rows=size, factor_memory=2**28
        )
        own = of_nodes if nodes else {}
        es = strategy(config.evolution, config.optimizer, layout, rates, **own)
        backprop = Backprop(optimizer_of(config.optimizer, rates))

        def start(seed: Int[Array, ""]) -> Carry:
            init_key, search_key = jax.random.split(jax.random.key(seed))
            params = model.init(init_key, x[:1])["params"]
            by_es = config.algorithm == "eggroll"
            learner = es.init(params, search_key) if by_es else backprop.start(params)
            return Carry(learner, None, jnp.int32(0), jnp.asarray(seed, jnp.int32))

        def batch_of(carry: Carry) -> tuple[Array, Array]:
            """Images and labels; every pass over the data has an order of its own."""
            # Their own stream: the key of start, folded.
            key = jax.random.fold_in(jax.random.key(carry.seed), 1)
            at = carry.generation * size
            ahead = jnp.arange(size) + at
            turns = at // len(y) + jnp.arange(2)
            orders = jax.vmap(
                lambda turn: jax.random.permutation(jax.random.fold_in(key, turn), len(y))
            )(turns)
            rows = orders[ahead // len(y) - turns[0], ahead % len(y)]
            return x[rows], y[rows]

        def fitness(params: PyTree, key: Key[Array, ""], x: Array, y: Array) -> Float[Array, "..."]:
            logits = logits_of(model, params, x)
            scores = right(logits, y) if config.fitness == "accuracy" else -cross_entropy(logits, y)
            return scores if nodes else scores.mean()

        def loss(params: PyTree, x: Array, y: Array) -> tuple[Float[Array, ""], None]:
            return cross_entropy(logits_of(model, params, x), y).mean(), None

        def generation(carry: Carry) -> tuple[Carry, Mapping[str, Array | None]]:
            row: dict[str, Array | None]
            learner: eggroll.State | Trained
            if config.algorithm == "eggroll":
                learner, metrics = es.step(carry.learner, fitness, *batch_of(carry))
                row = row_of(metrics, es, carry.learner)
            else:
                learner, value, *_ = backprop.step(carry.learner, loss, *batch_of(carry))
                row = {"loss": value}
            return carry._replace(learner=learner, generation=carry.generation + 1), row

        measured, fresh = halves(data, config.target is not None)

        def measure(carry: Carry) -> Mapping[str, Array]:
            params = carry.learner.params
            return {
                "held_out_accuracy": accuracy(logits_of(model, params, measured[0]), measured[1]),
                "train_accuracy": accuracy(logits_of(model, params, x), y),
            }

        def confirm(carry: Carry) -> Mapping[str, Array]:
            params = carry.learner.params
            return {"fresh_accuracy": accuracy(logits_of(model, params, fresh[0]), fresh[1])}

        return Program(start, generation, measure, confirm)

    def evaluate(self, carry: Carry, episodes: int, seed: int) -> dict[str, list[float]]:
        """Held-out accuracy, by seed of the training."""
        found = each(self.measure(carry)["held_out_accuracy"].tolist())
        first = self.config.seed
        return {f"held-out accuracy, seed {first + i}": [value] for i, value in enumerate(found)}

    def conclude(self, config: Config, outcome: Outcome) -> Conclusion:
        """The accuracy, in words and as a curve."""
        score = average(outcome.fresh["fresh_accuracy"])
        seeds = f", mean of {config.seeds} seeds" if config.seeds > 1 else ""
        verb = "Learned" if score >= 0.5 else "Not learned"
        only = "only " if score < 0.5 else ""
        lesson = (
            f"{verb} to tell digits apart: {only}{score:.1%} of held-out images are right{seeds}"
        )
        by = config.optimizer.name
        if config.algorithm == "eggroll":
            by = f"a population of {config.evolution.population}"
        curve = Curve(
            name="held_out_accuracy",
            words="accuracy on held-out images",
            who="classifier",
            x=UPDATES,
            target=config.target,
            of=len(halves(self.data, config.target is not None)[0][1]),
        )
        return Conclusion(lesson, f"after {outcome.generations} updates by {by}", curve)


def halves(data: Data, two: bool) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Held-out images and labels that are measured on, and those that confirm a target.

    They are the same where nothing is decided by them, without a target; else half of the images each.
    """
    x, y = jnp.asarray(data.held_out_x), jnp.asarray(data.held_out_y)
    if not two:
        return (x, y), (x, y)
    return (x[0::2], y[0::2]), (x[1::2], y[1::2])


def make_model(config: Config, data: Data) -> MLP:
    """The classifier that the settings describe."""
    return MLP(data.classes, config.width, config.depth, config.activation)


def logits_of(model: MLP, params: PyTree, x: Float[Array, "images pixels"]) -> Array:
    """Logits of images, [images, classes]."""
    return cast(Array, model.apply({"params": params}, x))


def cross_entropy(
    logits: Float[Array, "images classes"], y: Int[Array, "images"]
) -> Float[Array, "images"]:
    """Cross-entropy of every image in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def right(
    logits: Float[Array, "images classes"], y: Int[Array, "images"]
) -> Float[Array, "images"]:
    """1 for every image whose label has the largest logit, else 0. (It has no gradient to speak of.)"""
    return (logits.argmax(-1) == y).astype(jnp.float32)


def accuracy(logits: Float[Array, "images classes"], y: Int[Array, "images"]) -> Float[Array, ""]:
    """Share of images whose label has the largest logit."""
    return right(logits, y).mean()
