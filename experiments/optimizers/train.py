"""`eggroll optimizers`: a language model or a classifier by backpropagation, by any optimizer.

    eggroll optimizers --optimizer optim.lion --learning-rate 0.003     # four minutes on two cores

An update is `update` in :func:`programs`: a batch, a gradient, a step. The learning rate is a number of the
program, so that the runs of a study at all rates compile once.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from experiments.optimizers.config import Config
from experiments.optimizers.settings import optimizer_of
from experiments.optimizers.tasks import Task, make_task
from experiments.run.axes import UPDATES
from experiments.run.devices import layout_of
from experiments.run.errors import UsageError
from experiments.run.fields import changed
from experiments.run.learners import Backprop
from experiments.run.metrics import Row
from experiments.run.plots import Curve
from experiments.run.trainer import Carry, Conclusion, Outcome, Trainer


class OptimizerRun(Trainer[Config]):
    """Trains by one optimizer at one learning rate; `Carry.own` is the highest learning rate.

    Args:
        config: the settings.

    Raises:
        UsageError: for data, an optimizer or a setting of it that there is not.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        layout_of(config.cluster, alone="backpropagation here has no population to divide")
        # What is an argument of the programs, or nothing to them: runs that differ in it share them.
        shared: dict[str, Any] = {"run_dir": Path(), "seed": 0, "learning_rate": 1.0}
        self._programs = programs(changed(config, shared, generations=None, max_generations=1))
        self.measured = self._programs.task.measured

    def start(self) -> Carry:
        rate = jnp.float32(self.config.optimizer.learning_rate)
        return self._programs.start(jnp.int32(self.config.seed), rate)

    def generation(self, carry: Carry) -> tuple[Carry, Mapping[str, Array]]:
        return self._programs.update(carry)

    def measure(self, carry: Carry) -> Mapping[str, Array]:
        return self._programs.measure(carry, False)

    def confirm(self, carry: Carry) -> Mapping[str, Array]:
        return {"fresh_loss": self._programs.measure(carry, True)["held_out_loss"]}

    def evaluate(self, carry: Carry, episodes: int, seed: int) -> dict[str, list[float]]:
        """Held-out figures."""
        found = self.measure(carry)
        return {name.replace("_", " "): [float(value)] for name, value in found.items()}

    def conclude(self, config: Config, outcome: Outcome) -> Conclusion:
        """The loss, in words and as a curve."""
        curve = Curve(
            name="held_out_loss",
            words="held-out loss (nats)",
            who="model",
            x=UPDATES,
            target=config.target,
        )
        results = {
            "state_bytes": sum(x.nbytes for x in jax.tree.leaves(outcome.state.learner.optimizer)),
        }
        by = f"after {outcome.generations} updates by {config.optimizer.name}"
        return Conclusion(in_words(config, outcome.after, outcome.before), by, curve, results)


class Programs(NamedTuple):
    """Compiled functions of the runs of all seeds and learning rates.

    Attributes:
        task: what is trained.
        start: (seed, rate) -> state.
        update: state -> (next state, row).
        measure: (state, fresh) -> held-out figures.
    """

    task: Task
    start: Callable[[Int[Array, ""], Float[Array, ""]], Carry]
    update: Callable[[Carry], tuple[Carry, dict[str, Array]]]
    measure: Callable[[Carry, bool], dict[str, Array]]


# One, since a study makes all runs of an optimizer one after the other.
@functools.lru_cache(maxsize=1)
def programs(config: Config) -> Programs:
    """What runs with these settings are made of.

    Raises:
        UsageError: for data, an optimizer or a setting of it that there is not.
    """
    task = make_task(config)
    check_optimizer(config, task)

    def start(seed: Int[Array, ""], rate: Float[Array, ""]) -> Carry:
        learner = Backprop(optimizer_at(config, task, rate))
        return Carry(learner.start(task.init(jax.random.key(seed))), rate, jnp.int32(0), seed)

    def update(carry: Carry) -> tuple[Carry, dict[str, Array]]:
        # Their own stream: the key of start, folded.
        batch = task.batch(jax.random.fold_in(jax.random.key(carry.seed), 1), carry.generation)
        loss, grads = jax.value_and_grad(task.loss)(carry.learner.params, batch)
        learner = Backprop(optimizer_at(config, task, carry.own)).apply(carry.learner, grads)
        return carry._replace(learner=learner, generation=carry.generation + 1), {"loss": loss}

    def measure(carry: Carry, fresh: bool) -> dict[str, Array]:
        return task.measure(carry.learner.params, fresh)

    return Programs(
        task, jax.jit(start), jax.jit(update, donate_argnums=0), jax.jit(measure, static_argnums=1)
    )


def optimizer_at(config: Config, task: Task, rate: Any) -> optax.GradientTransformation:
    """The optimizer with its schedule, whose highest rate may be traced."""
    stacked = task.stacked(jax.eval_shape(task.init, jax.random.key(0)))
    over = schedule(config)
    optimizer = optimizer_of(config, lambda count: rate * over(count), stacked)
    factor = config.optimizer.linear_rate
    if factor == 1:
        return optimizer
    scaled = lambda u, linear: factor * u if linear else u
    scale = optax.stateless(lambda updates, _: jax.tree.map(scaled, updates, stacked))
    return optax.chain(optimizer, scale)


def schedule(config: Config) -> Callable[[Any], Array]:
    """The learning rate over the highest one: linear from 0, then by a cosine to `final`."""
    own = config.optimizer
    warm = round(own.warmup * own.schedule)
    return optax.warmup_cosine_decay_schedule(
        # The first update is not of rate 0.
        1 / (warm + 1), 1.0, warm, own.schedule, end_value=own.final,
    )  # fmt: skip


def check_optimizer(config: Config, task: Task) -> None:
    """Raises UsageError for what is wrong with the optimizer or a setting of it."""
    try:
        optimizer = optimizer_at(config, task, config.optimizer.learning_rate)
        step = lambda params: optimizer.update(params, optimizer.init(params), params)
        jax.eval_shape(step, jax.eval_shape(task.init, jax.random.key(0)))
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"--optimizer {config.optimizer.name}: {error}") from error


def in_words(config: Config, after: Row, before: Row) -> str:
    """What was learned, from the held-out figures."""
    first, loss = before["held_out_loss"], after["held_out_loss"]
    if loss is None or loss >= first:
        end = "is no longer finite" if loss is None else f"ends at {loss:.3f}"
        return f"Not learned: the held-out loss began at {first:.3f} nats and {end}"
    if config.task == "digits":
        right = after["held_out_accuracy"]
        return f"Learned to tell digits apart: {right:.1%} of held-out images are right, loss {loss:.3f}"
    return f"Learned to write: held-out text costs {loss:.3f} nats a byte, {first:.3f} at first"
