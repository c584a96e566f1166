"""`eggroll pretrain`: language models of bytes, in int8 without a float, or in float32.

    eggroll pretrain --preset egg-nodes    # 40 seconds on two cores: 3.43 bits per byte of held-out text
    eggroll pretrain --preset laptop       # four minutes: 3.94

An update is the `generation` of a method: :mod:`~experiments.pretrain.evolution` (noise on weights),
:mod:`~experiments.pretrain.nodes` (noise on what comes out of products) or
:mod:`~experiments.pretrain.backprop`.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8

from experiments.pretrain.anchors import Anchors, anchors
from experiments.pretrain.backprop import ByBackprop
from experiments.pretrain.config import Config
from experiments.pretrain.data import Text, load, pieces, windows
from experiments.pretrain.evolution import ByEvolution
from experiments.pretrain.models import Model, make_model, sample
from experiments.pretrain.nodes import ByNodeNoise
from experiments.run.axes import BYTES_READ
from experiments.run.devices import ONE, Layout, layout_of
from experiments.run.folder import write_json
from experiments.run.plots import Curve
from experiments.run.seeds import average
from experiments.run.trainer import Carry, Conclusion, LanguageTrainer, Outcome


class Pretraining(LanguageTrainer[Config]):
    """Trains on a text; `Carry.own` is the hidden state of every reader.

    Args:
        config: the settings.
        text: that the settings name, where it is loaded already.

    Raises:
        UsageError: for a text or an optimizer that there is not.
    """

    totals = ("bytes_read",)

    def __init__(self, config: Config, text: Text | None = None) -> None:
        super().__init__(config)
        self.text, self.model = text or load(config), make_model(config)
        backprop = config.algorithm == "backprop"
        alone = "--algorithm backprop has no population to divide" if backprop else None
        layout = layout_of(config.cluster, config.evolution.population, alone)
        method = make_method(config, self.model, layout)
        self.sharding = method.sharding
        self.sample_every = config.sample_every
        self.measured = tuple(f"held_out_{name}" for name in figures(self.model))
        self._start = layout.jit(lambda: method.start(jnp.int32(config.seed)), self.sharding)
        self._update = layout.jit(
            method.generation, (self.sharding, layout.everywhere), donate_argnums=0
        )
        bits = lambda params, text: jax.vmap(self.model.bits, (None, 0))(params, text)
        self._bits = layout.jit(bits)
        # Inside of a program, which several processes run as one.
        self._means = layout.jit(
            lambda params, text: {name: x.mean() for name, x in bits(params, text).items()}
        )
        self.known = anchors(self.text.train, self.text.held_out)
        self.notes = (describe(self.text, self.known),)

    def prepare(self, folder: Path) -> None:
        """Writes anchors.json."""
        write_json(folder / "anchors.json", self.known._asdict())

    def start(self) -> Carry:
        return self._start()

    def generation(self, carry: Carry) -> tuple[Carry, Mapping[str, Any]]:
        """Every stream's next bytes, and an update by them."""
        config, began = self.config, time.perf_counter()
        at = int(carry.generation)
        tokens = windows(self.text.train, config.streams, config.tokens, at)
        carry, row = jax.block_until_ready(self._update(carry, tokens))
        rate = config.tokens_an_update / (time.perf_counter() - began)
        row = {**row, "bytes_read": config.tokens_an_update}
        return carry, {**row, "timing": {"tokens_per_second": rate}}

    def measure(self, carry: Carry) -> Mapping[str, Array]:
        found = self._means(carry.learner.params, self.held_out(fresh=False))
        return {f"held_out_{name}": mean for name, mean in found.items()}

    def confirm(self, carry: Carry) -> Mapping[str, Array]:
        found = self._means(carry.learner.params, self.held_out(fresh=True))
        return {"fresh_bits_per_byte": found["bits_per_byte"]}

    def held_out(self, fresh: bool) -> UInt8[Array, "streams length"]:
        """Streams of held-out text: all; with a target every other one, or if fresh the rest."""
        found = jnp.asarray(pieces(self.text.held_out, self.config.held_out_streams))
        return found if self.config.target is None else found[int(fresh) :: 2]

    def sample(self, carry: Carry) -> bytes:
        key = jax.random.fold_in(jax.random.key(self.config.seed), carry.generation)
        return sample(self.model, carry.learner.params, key, self.config.sample_bytes)

    def write(
        self,
        carry: Carry | None,
        prompts: Sequence[str],
        length: int | None,
        temperature: float,
        seed: int,
    ) -> list[str]:
        params = (carry or self.start()).learner.params
        key, count = jax.random.key(seed), length or self.config.sample_bytes
        texts = [sample(self.model, params, key, count, p.encode(), temperature) for p in prompts]
        return [text.decode(errors="replace") for text in texts]

    def evaluate(self, carry: Carry, episodes: int, seed: int) -> dict[str, list[float]]:
        """Held-out bits per byte, by stream."""
        text = jnp.asarray(pieces(self.text.held_out, self.config.held_out_streams))
        found = self._bits(carry.learner.params, text)
        return {
            f"held-out {name.replace('_', ' ')}": x.mean(1).tolist() for name, x in found.items()
        }

    def conclude(self, config: Config, outcome: Outcome) -> Conclusion:
        """The bits per byte, in words and beside those of n-grams."""
        lesson = in_words(average(outcome.fresh["fresh_bits_per_byte"]), self.known)
        tokens = outcome.generations * config.tokens_an_update
        count = sum(leaf.size for leaf in jax.tree.leaves(outcome.state.learner.params))
        path = (
            f"after {outcome.generations} updates of {count:,} weights {how(config)}, "
            f"{tokens:,} bytes read"
        )
        curve = Curve(
            name="held_out_bits_per_byte",
            words="bits per byte of held-out text",
            who="model",
            target=config.target,
            x=BYTES_READ,
            marks=self.known._asdict(),
        )
        results = {"anchors": self.known._asdict(), "tokens": tokens}
        return Conclusion(lesson, path, curve, results)


def make_method(config: Config, model: Model, layout: Layout = ONE) -> ByEvolution | ByBackprop:
    """How the model is trained."""
    if config.algorithm == "backprop":
        return ByBackprop(config, model)
    make = ByNodeNoise if config.perturb == "nodes" else ByEvolution
    return make(config, model, layout)


def figures(model: Model) -> tuple[str, ...]:
    """The names of what is measured."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    return tuple(jax.eval_shape(model.bits, params, jax.ShapeDtypeStruct((3,), jnp.uint8)))


def describe(text: Text, known: Anchors) -> str:
    """The text and its anchors, for a reader to compare with."""
    costs = ", ".join(f"{name} {bits:.3f}" for name, bits in known._asdict().items())
    return (
        f"{len(text.train):,} bytes to train on, {len(text.held_out):,} held out, "
        f"where bits per byte are: {costs}."
    )


def in_words(bits: float, known: Anchors) -> str:
    """What was learned, by the anchors that it lies between; NaN bits are those that are not finite."""
    if math.isnan(bits):
        return "Not learned: the bits per byte of held-out text are no longer finite"
    n_grams = {"unigram": known.unigram, "bigram": known.bigram, "trigram": known.trigram}
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
        return f"by backpropagation and {config.optimizer.name}"
    kind = "int8" if config.model == "egg" else "float32"
    noise = "by node noise " if config.perturb == "nodes" else ""
    return f"{noise}in {kind} by a population of {config.evolution.population}"
