"""`eggroll pretrain`: from settings to a trained language model, its curve, its texts and a sentence."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from experiments.pretrain.anchors import Anchors, anchors
from experiments.pretrain.backprop import Backprop
from experiments.pretrain.carry import Carry
from experiments.pretrain.config import Config
from experiments.pretrain.data import Text, load, pieces, windows
from experiments.pretrain.evolution import Evolution
from experiments.pretrain.models import Model, make_model, sample
from experiments.pretrain.nodes import NodeNoise
from experiments.run import hosts
from experiments.run.devices import ONE, Layout, layout_of
from experiments.run.folder import open_run_folder, write_json
from experiments.run.loop import Job, run
from experiments.run.metrics import Row
from experiments.run.plots import learning_curve
from experiments.run.samples import add_sample
from experiments.run.stopwatch import Stopwatch


class Result(NamedTuple):
    """What a run came to.

    Attributes:
        held_out_bits_per_byte: of the final parameters on the held-out text, by the exact softmax.
        held_out_bits_per_byte_before: the same before training.
        anchors: what the same text costs without a model.
        parameters: numbers that were trained.
        generations: updates made.
        tokens: bytes read in training, by all members.
        sentence: the result in words.
        timing: seconds of every phase.
    """

    held_out_bits_per_byte: float
    held_out_bits_per_byte_before: float
    anchors: dict[str, float]
    parameters: int
    generations: int
    tokens: int
    sentence: str
    timing: dict[str, float]


def job(config: Config, text: Text | None = None) -> Job:
    """The run as the loop takes it.

    Args:
        config: the settings.
        text: that the settings name, where it is loaded already.

    Raises:
        UsageError: for a text or an optimizer that there is not.
    """
    text = text or load(config)
    model = make_model(config)
    backprop = config.algorithm == "backprop"
    alone = "--algorithm backprop has no population to divide" if backprop else None
    layout = layout_of(config, config.population, alone)
    method = make_method(config, model, layout)
    lies = None if isinstance(method, Backprop) else method.sharding
    update = layout.jit(method.generation, (lies, layout.everywhere), donate_argnums=0)
    held_out = jnp.asarray(pieces(text.held_out, config.held_out_streams))

    def generation(carry: Carry) -> tuple[Carry, dict[str, Any]]:
        tokens = windows(text.train, config.streams, config.tokens, int(carry.cursor))
        began = time.perf_counter()
        carry, row = jax.block_until_ready(update(carry, tokens))
        rate = config.tokens_an_update / (time.perf_counter() - began)
        count = {"bytes_read": config.tokens_an_update}
        return carry, {**row, **count, "timing": {"tokens_per_second": rate}}

    @layout.jit
    def measure(carry: Carry) -> dict[str, Array]:
        found = jax.vmap(model.bits, (None, 0))(method.params(carry), held_out)
        return {f"held_out_{name}": bits.mean() for name, bits in found.items()}

    return Job(
        start=layout.jit(lambda: method.start(jnp.int32(config.seed)), lies),
        generation=generation,
        measure=measure,
        reached=lambda row: (
            config.target is not None and row["held_out_bits_per_byte"] <= config.target
        ),
        tell=tell,
        measured=tuple(f"held_out_{name}" for name in figures(model)),
        totals=("bytes_read",),
        sharding=lies,
    )


def make_method(config: Config, model: Model, layout: Layout = ONE) -> Evolution | Backprop:
    """How the model is trained."""
    if config.algorithm == "backprop":
        return Backprop(config, model)
    make = NodeNoise if config.perturb == "nodes" else Evolution
    return make(config, model, layout)


def figures(model: Model) -> tuple[str, ...]:
    """The names of what is measured."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    return tuple(jax.eval_shape(model.bits, params, jax.ShapeDtypeStruct((3,), jnp.uint8)))


def tell(row: Row) -> str:
    """A row in a few words."""
    if row.get("held_out_bits_per_byte") is None:
        return ""
    return f"{row['held_out_bits_per_byte']:.3f} bits/byte held out"


def evaluate(config: Config, state: Carry, episodes: int, seed: int) -> dict[str, list[float]]:
    """Held-out bits per byte, by stream; `episodes` and `seed` are for other drivers."""
    text, model = load(config), make_model(config)
    params = make_method(config, model).params(state)
    found = jax.jit(jax.vmap(model.bits, (None, 0)))(
        params, jnp.asarray(pieces(text.held_out, config.held_out_streams))
    )
    return {f"held-out {name.replace('_', ' ')}": x.mean(1).tolist() for name, x in found.items()}


def parameters(config: Config, state: Carry) -> PyTree:
    """The trained parameters, for export."""
    return make_method(config, make_model(config)).params(state)


def write(
    config: Config,
    state: Carry,
    prompts: Sequence[str],
    length: int | None,
    temperature: float,
    seed: int,
) -> list[str]:
    """What the model writes after prompts, for `eggroll sample`."""
    model = make_model(config)
    params, key = make_method(config, model).params(state), jax.random.key(seed)
    count = length or config.sample_bytes
    texts = [sample(model, params, key, count, text.encode(), temperature) for text in prompts]
    return [text.decode(errors="replace") for text in texts]


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
    text = load(config)
    task_job = job(config, text)
    model = make_model(config)
    method = make_method(config, model)
    known = anchors(text.train, text.held_out)
    hosts.say(describe(text, known))

    def write_sample(folder: Path, carry: Carry) -> None:
        key = jax.random.fold_in(jax.random.key(config.seed), carry.cursor)
        words = sample(model, method.params(carry), key, config.sample_bytes)
        add_sample(folder / "samples.txt", int(carry.cursor), words)

    with open_run_folder("pretrain", config) as folder:
        write_json(folder / "anchors.json", known._asdict())

        def generation(carry: Carry) -> tuple[Carry, Any]:
            if int(carry.cursor) % config.sample_every == 0:
                write_sample(folder, carry)
            return task_job.generation(carry)

        watch.finish("setup")
        outcome = run(task_job._replace(generation=generation), config, folder, watch)
        write_sample(folder, outcome.state)
        watch.finish("training")

        bits = outcome.after["held_out_bits_per_byte"]
        lesson = in_words(bits, known)
        learning_curve(
            folder / "curve.png",
            outcome.rows,
            title=lesson,
            measure="bits per byte of held-out text",
            final=(outcome.generations, bits),
            target=config.target,
            name="held_out_bits_per_byte",
            population=False,
            who="model",
            marks=known._asdict(),
        )
        watch.finish("results")
        count = sum(leaf.size for leaf in jax.tree.leaves(method.params(outcome.state)))
        tokens = outcome.generations * config.tokens_an_update
        result = Result(
            held_out_bits_per_byte=bits,
            held_out_bits_per_byte_before=outcome.before["held_out_bits_per_byte"],
            anchors=known._asdict(),
            parameters=count,
            generations=outcome.generations,
            tokens=tokens,
            sentence=f"{lesson}, after {outcome.generations} updates of {count:,} weights {how(config)}, "
            f"{tokens:,} bytes read, {watch.total():.1f} s from start.",
            timing=watch.phases,
        )
        write_json(folder / "result.json", result._asdict())
    return result


def describe(text: Text, known: Anchors) -> str:
    """The text and its anchors, for a reader to compare with."""
    costs = ", ".join(f"{name} {bits:.3f}" for name, bits in known._asdict().items())
    return (
        f"{len(text.train):,} bytes to train on, {len(text.held_out):,} held out, "
        f"where bits per byte are: {costs}."
    )


def in_words(bits: float, known: Anchors) -> str:
    """What was learned, by the anchors that it lies between."""
    n_grams = {name: getattr(known, name) for name in ("unigram", "bigram", "trigram")}
    below = [name for name, anchor in n_grams.items() if bits < anchor]
    if not below:
        return (
            f"Learned less than how often each byte comes: {bits:.3f} bits per byte of held-out text, "
            f"where unigrams have {known.unigram:.3f}"
        )
    name = below[-1]
    return (
        f"Predicts held-out text at {bits:.3f} bits per byte, below {name}s ({n_grams[name]:.3f})"
    )


def how(config: Config) -> str:
    """The method in a few words."""
    if config.algorithm == "backprop":
        return f"by backpropagation and {config.optimizer}"
    kind = "int8" if config.model == "egg" else "float32"
    noise = "by node noise " if config.perturb == "nodes" else ""
    return f"{noise}in {kind} by a population of {config.population}"
