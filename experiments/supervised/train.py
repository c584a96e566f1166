"""`eggroll supervised`: from settings to a trained classifier, its curve and a sentence about it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

import eggroll
from experiments.models.mlp import MLP
from experiments.run.devices import ONE, Layout, layout_of
from experiments.run.folder import open_run_folder, write_json
from experiments.run.loop import Job, Outcome, run
from experiments.run.metrics import Row
from experiments.run.optimizers import Rates, make_optimizer, rates_of
from experiments.run.plots import learning_curve
from experiments.run.seeds import average, each, many
from experiments.run.sizes import sizes
from experiments.run.stopwatch import Stopwatch
from experiments.run.together import Pieces, run_together
from experiments.supervised.config import Config
from experiments.supervised.data import Data, load


class Carry(NamedTuple):
    """All that a run carries; with several seeds every leaf has a leading axis [seeds].

    Attributes:
        state: of the evolution strategy, or (params, optimizer state) of backpropagation.
        generation: updates done.
        seed: what everything random comes from.
    """

    state: Any
    generation: Int[Array, "..."]
    seed: Int[Array, "..."]


class Result(NamedTuple):
    """What a run came to; figures of the seeds are averaged.

    Attributes:
        held_out_accuracy: of the final parameters.
        held_out_accuracy_before: the same before training.
        by_seed: the held-out accuracy of every seed; None where there is one.
        generations: updates made.
        sentence: the result in words.
        timing: seconds of every phase.
    """

    held_out_accuracy: float
    held_out_accuracy_before: float
    by_seed: list[float] | None
    generations: int
    sentence: str
    timing: dict[str, float]


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


def make_model(config: Config, data: Data) -> MLP:
    return MLP(data.classes, config.width, config.depth, config.activation)


def logits_of(model: MLP, params: PyTree, x: Float[Array, "images pixels"]) -> Array:
    return cast(Array, model.apply({"params": params}, x))


def job(config: Config) -> Job:
    """The run as the loop takes it.

    Raises:
        UsageError: for data or an optimizer that there is not.
    """
    every = many(config.seeds)
    seeds = config.seed + jnp.arange(config.seeds)
    layout = layout_of(config, config.population, why_alone(config))
    begin, generation, measure = pieces(config, load(config.data), layout=layout)
    return Job(
        start=layout.jit(lambda: every(begin)(seeds if config.seeds > 1 else seeds[0])),
        generation=layout.jit(every(generation), donate_argnums=0),
        measure=layout.jit(every(lambda carry: measure(carry, carry.seed))),
        reached=lambda row: (
            config.target is not None and min(each(row["held_out_accuracy"])) >= config.target
        ),
        tell=tell,
        measured=("held_out_accuracy", "train_accuracy"),
        sharding=layout.everywhere,
    )


def why_alone(config: Config) -> str | None:
    """Why a run has one device, if it has."""
    if config.algorithm != "eggroll":
        return f"--algorithm {config.algorithm} has no population to divide"
    return f"--seeds {config.seeds} are one program" if config.seeds > 1 else None


def pieces(config: Config, data: Data, rates: Rates | None = None, layout: Layout = ONE) -> Pieces:
    """What a run with one seed is made of, at other rates than the settings' if any are given."""
    model = make_model(config, data)
    rates = rates or rates_of(config)
    optimizer = make_optimizer(config.optimizer, rates.step)
    size, nodes = min(config.batch, len(data.y)), config.perturb == "nodes"
    # An image does not act on the scores of the others. What products receive is kept for the second
    # pass, which saves a third of the time.
    of_nodes: dict[str, Any] = dict(credit=eggroll.credit.own(), rows=size, factor_memory=2**28)
    es = eggroll.EvolutionStrategy(
        optimizer=optimizer,
        population=config.population,
        sigma=rates.noise,
        rank=config.rank,
        perturb=config.perturb,
        on_dense="error",
        mesh=layout.mesh,
        deterministic=layout.same_bits,
        **(of_nodes if nodes else {}),
    )
    x, y = jnp.asarray(data.x), jnp.asarray(data.y)

    def begin(seed: Int[Array, ""]) -> Carry:
        init_key, search_key = jax.random.split(jax.random.key(seed))
        params = model.init(init_key, x[:1])["params"]
        state: Any = (params, optimizer.init(params))
        if config.algorithm == "eggroll":
            state = es.init(params, search_key)
        return Carry(state, jnp.int32(0), jnp.asarray(seed, jnp.int32))

    def batch_of(carry: Carry) -> tuple[Array, Array]:
        """Every pass over the data has an order of its own."""
        # Their own stream: the key of begin, folded.
        key = jax.random.fold_in(jax.random.key(carry.seed), 1)
        at = carry.generation * size
        ahead = jnp.arange(size) + at
        turns = at // len(data.y) + jnp.arange(2)
        orders = jax.vmap(
            lambda turn: jax.random.permutation(jax.random.fold_in(key, turn), len(data.y))
        )(turns)
        rows = orders[ahead // len(data.y) - turns[0], ahead % len(data.y)]
        return x[rows], y[rows]

    def fitness(params: PyTree, key: Key[Array, ""], x: Array, y: Array) -> Float[Array, "..."]:
        logits = logits_of(model, params, x)
        scores = right(logits, y) if config.fitness == "accuracy" else -cross_entropy(logits, y)
        return scores if nodes else scores.mean()

    def by_evolution(carry: Carry) -> tuple[Carry, dict[str, Array]]:
        state, metrics = es.step(carry.state, fitness, *batch_of(carry))
        row = metrics._asdict() | sizes(es, carry.state)
        del row["generation"]  # the loop's own
        return Carry(state, carry.generation + 1, carry.seed), row

    def by_backprop(carry: Carry) -> tuple[Carry, dict[str, Array]]:
        x, y = batch_of(carry)
        params, state = carry.state
        mean_loss = lambda p: cross_entropy(logits_of(model, p, x), y).mean()
        loss, grads = jax.value_and_grad(mean_loss)(params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return Carry((params, state), carry.generation + 1, carry.seed), {"loss": loss}

    def measure(carry: Carry, seed: Int[Array, ""]) -> dict[str, Array]:
        seen = logits_of(model, trained(config, carry), x)
        unseen = logits_of(model, trained(config, carry), jnp.asarray(data.held_out_x))
        return {
            "held_out_accuracy": accuracy(unseen, jnp.asarray(data.held_out_y)),
            "train_accuracy": accuracy(seen, y),
        }

    generation = by_evolution if config.algorithm == "eggroll" else by_backprop
    return Pieces(begin, generation, measure)


def trained(config: Config, carry: Carry) -> PyTree:
    """The parameters in a state."""
    return carry.state.params if config.algorithm == "eggroll" else carry.state[0]


def tell(row: Row) -> str:
    """A row in a few words."""
    if row["held_out_accuracy"] is None:
        return ""
    return f"accuracy {average(row['train_accuracy']):.3f}, held out {average(row['held_out_accuracy']):.3f}"


def evaluate(config: Config, state: Carry, episodes: int, seed: int) -> dict[str, list[float]]:
    """Held-out accuracy, by seed of the training; `episodes` and `seed` are for other drivers."""
    found = job(config).measure(state)["held_out_accuracy"]
    return {
        f"held-out accuracy, seed {config.seed + i}": [value]
        for i, value in enumerate(each(found.tolist()))
    }


def parameters(config: Config, state: Carry) -> PyTree:
    """What `eggroll export` writes."""
    return {"params": trained(config, state)}


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
    with open_run_folder("supervised", config) as folder:
        watch.finish("setup")
        outcome = run(task_job, config, folder, watch)
        watch.finish("training")
        return finish(config, folder, outcome, watch)


def train_many(configs: Sequence[Config], started: float | None = None) -> list[Result | Exception]:
    """Several runs of the same `config.together`, in one program; each fills its own folder.

    A run's result is that of :func:`train` to rounding; what stops one run alone stands in its place.

    Raises:
        UsageError: for settings that cannot be right, or that do not fit into one program.
        Interrupted: after SIGTERM or Ctrl-C.
    """
    watch = Stopwatch(started)
    watch.finish("imports")
    data = load(configs[0].data)
    # The runs are mapped, not their members divided.
    alone = configs[0].on_one_device()
    one = lambda config, rates: pieces(config, data, rates)
    return run_together("supervised", configs, job(alone), one, finish, watch)


def finish(config: Config, folder: Path, outcome: Outcome, watch: Stopwatch) -> Result:
    """Writes what was learned into the folder."""
    after, n = outcome.after["held_out_accuracy"], outcome.generations
    score = average(after)
    seeds = f", mean of {config.seeds} seeds" if config.seeds > 1 else ""
    lesson = f"Learned to tell digits apart: {score:.1%} of held-out images are right{seeds}"
    if score < 0.5:
        lesson = f"Not learned to tell digits apart: only {score:.1%} of held-out images are right{seeds}"
    learning_curve(
        folder / "curve.png",
        outcome.rows,
        title=lesson,
        measure="accuracy on held-out images",
        final=(n, after),
        target=config.target,
        name="held_out_accuracy",
        population=False,
        who="classifier",
    )
    watch.finish("results")
    how = (
        config.optimizer
        if config.algorithm == "backprop"
        else f"a population of {config.population}"
    )
    result = Result(
        held_out_accuracy=score,
        held_out_accuracy_before=average(outcome.before["held_out_accuracy"]),
        by_seed=after if isinstance(after, list) else None,
        generations=n,
        sentence=f"{lesson}, after {n} updates by {how}, {watch.total():.1f} s from start.",
        timing=watch.phases,
    )
    write_json(folder / "result.json", result._asdict())
    return result
