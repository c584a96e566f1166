"""`eggroll optimizers`: from settings to a trained model, its curve and a sentence about it."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from experiments.optimizers.config import Config
from experiments.optimizers.settings import optimizer_of
from experiments.optimizers.tasks import Task, make_task
from experiments.run.devices import layout_of
from experiments.run.errors import UsageError
from experiments.run.folder import open_run_folder, write_json
from experiments.run.loop import Job, run
from experiments.run.metrics import Row
from experiments.run.plots import learning_curve
from experiments.run.stopwatch import Stopwatch


class Carry(NamedTuple):
    """All that a run carries.

    Attributes:
        params: the model's.
        state: the optimizer's.
        rate: the highest learning rate; here, so that runs at all rates are one program.
        generation: updates done.
        seed: what everything random comes from.
    """

    params: Any
    state: Any
    rate: Float[Array, ""]
    generation: Int[Array, ""]
    seed: Int[Array, ""]


class Result(NamedTuple):
    """What a run came to.

    Attributes:
        held_out_loss: of the final parameters, nats; None where it is not finite.
        held_out_loss_before: the same before training.
        measured: all held-out figures of the final parameters.
        generations: updates made.
        parameters: numbers that were trained.
        state_bytes: size of the optimizer's state.
        sentence: the result in words.
        timing: seconds of every phase.
    """

    held_out_loss: float | None
    held_out_loss_before: float
    measured: dict[str, float | None]
    generations: int
    parameters: int
    state_bytes: int
    sentence: str
    timing: dict[str, float]


def curve(config: Config) -> Callable[[Any], Array]:
    """The learning rate over the highest one: linear from 0, then by a cosine to `final`."""
    warm = round(config.warmup * config.schedule)
    return optax.warmup_cosine_decay_schedule(
        # The first update is not of rate 0.
        1 / (warm + 1), 1.0, warm, config.schedule, end_value=config.final,
    )  # fmt: skip


def optimizer_at(config: Config, task: Task, rate: Any) -> optax.GradientTransformation:
    """The optimizer with its schedule, whose highest rate may be traced."""
    stacked = task.stacked(jax.eval_shape(task.init, jax.random.key(0)))
    over = curve(config)
    return optimizer_of(config, lambda count: rate * over(count), stacked)


def check_optimizer(config: Config, task: Task) -> None:
    """Raises UsageError for what is wrong with the optimizer or a setting of it."""
    try:
        optimizer = optimizer_at(config, task, config.learning_rate)
        jax.eval_shape(optimizer.init, jax.eval_shape(task.init, jax.random.key(0)))
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"--optimizer {config.optimizer}: {error}") from error


class Programs(NamedTuple):
    """Compiled functions of the runs of all seeds and learning rates.

    Attributes:
        start: (seed, rate) -> Carry.
        generation: Carry -> (Carry, row).
        measure: Carry -> held-out figures.
        measured: their names.
    """

    start: Callable[[int, float], Carry]
    generation: Callable[[Carry], tuple[Carry, dict[str, Array]]]
    measure: Callable[[Carry], dict[str, Array]]
    measured: tuple[str, ...]


# One, since a comparison makes all runs of an optimizer one after the other.
@functools.lru_cache(maxsize=1)
def programs(config: Config) -> Programs:
    """What :func:`job` runs."""
    task = make_task(config)
    check_optimizer(config, task)

    def start(seed: Int[Array, ""], rate: Float[Array, ""]) -> Carry:
        params = task.init(jax.random.key(seed))
        state = optimizer_at(config, task, rate).init(params)
        return Carry(params, state, rate, jnp.int32(0), seed)

    def generation(carry: Carry) -> tuple[Carry, dict[str, Array]]:
        # Their own stream: the key of start, folded.
        batch = task.batch(jax.random.fold_in(jax.random.key(carry.seed), 1), carry.generation)
        loss, grads = jax.value_and_grad(task.loss)(carry.params, batch)
        optimizer = optimizer_at(config, task, carry.rate)
        updates, state = optimizer.update(grads, carry.state, carry.params)
        if config.linear_rate != 1:
            scaled = lambda u, linear: config.linear_rate * u if linear else u
            updates = jax.tree.map(scaled, updates, task.stacked(carry.params))
        params = optax.apply_updates(carry.params, updates)
        after = carry._replace(params=params, state=state, generation=carry.generation + 1)
        return after, {"loss": loss}

    compiled = jax.jit(start)
    return Programs(
        start=lambda seed, rate: compiled(jnp.int32(seed), jnp.float32(rate)),
        generation=jax.jit(generation, donate_argnums=0),
        measure=jax.jit(lambda carry: task.measure(carry.params)),
        measured=task.measured,
    )


def job(config: Config) -> Job:
    """The run as the loop takes it.

    Raises:
        UsageError: for data, an optimizer or a setting of it that there is not.
    """
    free: dict[str, Any] = {"run_dir": Path(), "seed": 0, "learning_rate": 1.0}
    shared = programs(replace(config, **free, generations=None, max_generations=1))
    layout_of(config, alone="backpropagation here has no population to divide")
    return Job(
        start=lambda: shared.start(config.seed, config.learning_rate),
        generation=shared.generation,
        measure=shared.measure,
        reached=lambda row: False,
        tell=tell,
        measured=shared.measured,
    )


def tell(row: Row) -> str:
    """A row in a few words."""
    loss, held_out = row["loss"], row["held_out_loss"]
    parts = (
        f"held out {held_out:.3f}" if held_out else "",
        f"loss {loss:.3f}" if loss is not None else "",
    )
    return ", ".join(filter(None, parts))


def evaluate(config: Config, state: Carry, episodes: int, seed: int) -> dict[str, list[float]]:
    """Held-out figures; `episodes` and `seed` are for other drivers."""
    found = job(config).measure(state)
    return {name.replace("_", " "): [float(value)] for name, value in found.items()}


def parameters(config: Config, state: Carry) -> PyTree:
    """What `eggroll export` writes."""
    return {"params": state.params}


def train(config: Config, started: float | None = None) -> Result:
    """Train as `config` says, or go on where its run folder stands, and fill the folder.

    Raises:
        UsageError: for settings that cannot be right, or a run folder that cannot be used.
        Interrupted: after SIGTERM or Ctrl-C.
        RunError: where a file cannot be written.
    """
    watch = Stopwatch(started)
    watch.finish("imports")
    config.check()
    task_job = job(config)
    with open_run_folder("optimizers", config) as folder:
        watch.finish("setup")
        outcome = run(task_job, config, folder, watch)
        watch.finish("training")

        after, n = outcome.after, outcome.generations
        lesson = in_words(config, after, outcome.before)
        learning_curve(
            folder / "curve.png",
            outcome.rows,
            title=lesson,
            measure="held-out loss (nats)",
            final=(n, after["held_out_loss"]),
            name="held_out_loss",
            population=False,
            who="model",
        )
        watch.finish("results")
        carry = outcome.state
        result = Result(
            held_out_loss=after["held_out_loss"],
            held_out_loss_before=outcome.before["held_out_loss"],
            measured=after,
            generations=n,
            parameters=sum(x.size for x in jax.tree.leaves(carry.params)),
            state_bytes=sum(x.nbytes for x in jax.tree.leaves(carry.state)),
            sentence=f"{lesson}, after {n} updates by {config.optimizer}, {watch.total():.1f} s from start.",
            timing=watch.phases,
        )
        write_json(folder / "result.json", result._asdict())
    return result


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
