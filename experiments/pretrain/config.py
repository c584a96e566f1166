"""The settings of `eggroll pretrain`, and its presets. Imports nothing heavy."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from experiments.run.errors import UsageError, suggestion
from experiments.run.fields import (
    Role,
    changed,
    count,
    flag,
    from_zero,
    positive,
    setting,
    share,
    within,
)
from experiments.run.paths import exists
from experiments.run.settings import Evolution, Flat, Optimizer, RunSettings

PresetName = Literal[
    "laptop",
    "hour",
    "gru-nodes",
    "egg-nodes",
    "laptop-nodes",
    "hour-nodes",
    "paper",
    "tiny",
    "float-es",
    "gru-sgd",
    "gru-adamw",
    "transformer-sgd",
    "transformer-adamw",
]


# Members whose products of int8, each below 2^14, can be summed in int32.
LARGEST_LOCAL = 2**17


@dataclass(frozen=True, kw_only=True)
class Config(RunSettings):
    """Pretrain a language model of bytes: in int8 without a float, or in floats for comparison."""

    driver: ClassVar[str] = "pretrain"

    preset: PresetName = setting(role=Role.FREE)
    """Where the other settings start from."""
    data: str | None = None
    """File or folder of texts, "minipile", or "hf:OWNER/NAME" for a text data set of the Hugging Face hub;
    by default the help topics and sources that every Python carries."""
    data_bytes: int = count(2**28, most=2**50)
    """Bytes that are fetched of a data set of the hub."""
    held_out: float = within(0.1, open_low=True, open_high=True)
    """Share of the text that is held out, by documents; data sets of the hub have their own."""
    held_out_streams: int = count(128)
    """Streams that the held-out text is read in."""
    held_out_tokens: int = count(512)
    """Bytes of each of them; the anchors are of the same text."""

    model: Literal["egg", "float-egg", "gru", "transformer"] = "egg"
    """"egg" is recurrent in int8 and "float-egg" the same in float32; "gru" has ordinary gates instead, and
    "transformer" is of the Llama family. With the same layers and width all are of the same size."""
    layers: int = count(2, most=1000)
    """Blocks of the model."""
    width: int = count(128, most=2**16)
    """Its width."""
    algorithm: Literal["eggroll", "backprop"] = "eggroll"
    """"eggroll" is evolution strategies."""
    tokens: int = count(100)
    """Bytes that every stream reads in an update."""

    evolution: Flat[Evolution] = Evolution(population=1024, sigma=0.0625)
    """Evolution strategies; in int8 sigma is a power of 1/2."""
    group: int = count(64, least=2, even=True)
    """Members that read the same stream; both members of a pair must."""
    perturb: Literal["weights", "nodes"] = "weights"
    """What the noise of members is on: "weights", or "nodes", which is what comes out of products, anew for
    every byte."""
    gamma: float = within(0.5)
    """With node noise, the weight of the next byte's loss in the credit of a byte, whose own loss weighs 1;
    for int8 models 0 or a power of 1/2."""
    head: Literal["local", "noise"] = "local"
    """With node noise, how the last matrix is trained: "local" by its exact gradient, which needs no noise,
    or "noise" as all others."""
    update: Literal["threshold", "error_feedback", "momentum"] = "threshold"
    """What moves int8 weights by one unit: this generation's evidence alone, what earlier ones left below the
    threshold besides, or a decaying sum of theirs."""
    alpha: float = share(1.0)
    """Share of the int8 weights that chance alone would move in the first generation."""
    alpha_decay: float = from_zero(0.015)
    """Generation t moves alpha / (1 + alpha_decay t) of them."""

    batch: int = count(16)
    """Streams of backpropagation."""
    optimizer: Flat[Optimizer] = Optimizer(name="adamw", learning_rate=0.01)
    """What moves float32 weights."""
    gradient_norm: float = positive(1.0)
    """Gradients of backpropagation are scaled down to this norm."""

    sample_every: int = count(100)
    """Generations from one text of the model's own to the next, in samples.txt."""
    sample_bytes: int = count(400)
    """Bytes of each."""

    @property
    def streams(self) -> int:
        """Streams of text that are read at once in training."""
        return (
            self.batch if self.algorithm == "backprop" else self.evolution.population // self.group
        )

    @property
    def shift(self) -> int:
        """Of the integer noise: sigma is 2^-shift."""
        return round(-math.log2(self.evolution.sigma))

    @property
    def tokens_an_update(self) -> int:
        """Bytes read in an update, by all members."""
        readers = self.batch if self.algorithm == "backprop" else self.evolution.population
        return readers * self.tokens

    def check(self) -> None:
        """Raises UsageError for the first setting that cannot be right."""
        super().check()
        self.optimizer.check()
        even_group(self)
        if self.target is not None and self.held_out_streams < 2:
            raise UsageError(
                f"{flag('held_out_streams')} {self.held_out_streams}: with --target one half of them "
                "confirms it, so choose at least 2"
            )
        if self.target is not None and self.target <= 0:
            raise UsageError(f"--target {self.target}: choose a positive number of bits per byte")
        check_nodes(self) if self.perturb == "nodes" else check_weights(self)
        if self.model == "egg" and self.algorithm == "backprop":
            raise UsageError(
                "--algorithm backprop: an int8 model has no gradient; choose --model float-egg, gru or "
                "transformer"
            )
        if self.model == "egg":
            self._check_integers()

    def check_places(self) -> None:
        """Raises UsageError for the first file, folder or name outside the settings that is not there."""
        super().check_places()
        if self.data is not None:
            check_data(self.data)

    def _check_integers(self) -> None:
        """Raises UsageError for what int8 models cannot have."""
        if self.evolution.rank == "full" or self.evolution.sigma_decay != 1:
            name = "rank" if self.evolution.rank == "full" else "sigma_decay"
            value = getattr(self.evolution, name)
            raise UsageError(f"{flag(name)} {value}: int8 models have none; leave it out")
        if self.evolution.sigma != 2.0**-self.shift or not 0 <= self.shift <= 8:
            raise UsageError(
                f"--sigma {self.evolution.sigma}: the noise of int8 models is shifted, so choose a power of "
                "1/2 from 1 to 1/256, such as 0.0625"
            )


def check_data(name: str) -> None:
    """Raises UsageError where a text is neither a file or folder nor a data set of the hub."""
    from experiments.pretrain import hub

    if not hub.is_data_set(name) and not exists(Path(name), f"--data {name}"):
        raise UsageError(
            f"--data {name}: there is no such file or folder, and no data set of this name"
            f"{suggestion(name, hub.NAMES)} (hf:OWNER/NAME is one of the Hugging Face hub)"
        )


def check_weights(config: Config) -> None:
    """Raises UsageError for settings that weight noise does not have."""
    for name, value in (("gamma", config.gamma), ("head", config.head)):
        if value != getattr(Config, name):
            raise UsageError(
                f"{flag(name)} {value}: a setting of --perturb nodes alone; leave it out"
            )


def check_nodes(config: Config) -> None:
    """Raises UsageError for settings that node noise cannot have."""
    if config.algorithm == "backprop":
        raise UsageError(
            "--perturb nodes: backpropagation has no noise; choose --algorithm eggroll"
        )
    if config.evolution.rank != 1:
        raise UsageError(f"--rank {config.evolution.rank}: node noise has no rank; leave it out")
    if config.model != "egg":
        return
    if config.gamma and not math.log2(config.gamma).is_integer():
        raise UsageError(
            f"--gamma {config.gamma}: the credit of int8 models is shifted, so choose 0 or a power of 1/2, "
            "such as 0.5"
        )
    if config.head == "local" and config.evolution.population > LARGEST_LOCAL:
        raise UsageError(
            f"--population {config.evolution.population}: the sum of the head's rule would not fit 32 bits; "
            f"choose at most {LARGEST_LOCAL}, or --head noise"
        )


def even_group(config: Config) -> None:
    """Raises UsageError where streams cannot be given to whole pairs."""
    if config.evolution.population % config.group:
        raise UsageError(
            f"--population {config.evolution.population}: groups of {config.group} members do not divide it; "
            f"choose a multiple, such as {-(-config.evolution.population // config.group) * config.group}"
        )


def preset(name: PresetName, **settings: object) -> Config:
    config = Config(
        preset=name, run_dir=Path("runs/pretrain") / name, max_generations=1000, evaluate_every=10
    )
    return changed(config, settings)


# What it is compared with: backpropagation through 16 streams of 100 bytes, about as long as "laptop" takes.
BACKPROP: dict[str, object] = dict(
    algorithm="backprop", batch=16, tokens=100, max_generations=10_000, evaluate_every=200
)
BASELINES: dict[PresetName, dict[str, object]] = {
    "float-es": dict(
        model="float-egg",
        optimizer="adam",
        learning_rate=0.06,  # a unit of the integers' weights
        learning_rate_decay=0.998,
        max_generations=640,
    ),
    "gru-sgd": dict(**BACKPROP, model="gru", optimizer="sgd", learning_rate=3.0),
    "gru-adamw": dict(**BACKPROP, model="gru", learning_rate=0.03),
    "transformer-sgd": dict(**BACKPROP, model="transformer", optimizer="sgd", learning_rate=1.0),
    "transformer-adamw": dict(**BACKPROP, model="transformer", learning_rate=0.003),
}

# The default text and the model of the laptop's presets. Every pair reads a stream of its own: bytes read
# twice teach less than other ones, and cost as much. Of as many bytes in as many updates, 10 or 25 for each
# of many members teach more than 100 for each of few.
LAPTOP: dict[str, object] = dict(layers=1, width=64, population=8192, group=2, tokens=25)

# 512 pairs, and many updates of them: every byte is a trial, and votes are remembered until they make a
# step. The share of the weights that move falls with the length of a run.
NODES: dict[str, object] = dict(
    perturb="nodes", population=1024, sigma=0.125, update="error_feedback", alpha=0.3
)

PRESETS: dict[str, Config] = {
    "laptop": preset(
        "laptop",
        **LAPTOP,
        # As in the paper every weight moves at first; a quarter of them still do at the end.
        alpha_decay=0.005,
        max_generations=640,  # 131 million bytes read, three or four minutes on two cores
    ),
    # Six times as many bytes: twice the population, three times the generations.
    "hour": preset(
        "hour",
        **{**LAPTOP, "population": 16384},
        alpha_decay=0.005,
        max_generations=2000,
    ),
    # 3.1 million bytes read.
    "egg-nodes": preset(
        "egg-nodes",
        **{**LAPTOP, **NODES},
        alpha_decay=0.1,
        max_generations=120,
    ),
    # As many bytes as "laptop" and "hour".
    "laptop-nodes": preset(
        "laptop-nodes",
        **{**LAPTOP, **NODES},
        alpha_decay=2.0,
        max_generations=5120,
    ),
    "hour-nodes": preset(
        "hour-nodes",
        **{**LAPTOP, **NODES, "population": 2048},
        alpha_decay=2.0,
        max_generations=16000,
    ),
    # 8.2 million bytes read.
    "gru-nodes": preset(
        "gru-nodes",
        **{**LAPTOP, "population": 2048, "tokens": 20},
        model="gru",
        perturb="nodes",
        sigma=0.1,
        optimizer="adam",
        learning_rate=0.2,
        learning_rate_decay=0.985,  # a twentieth at the end
        max_generations=200,
    ),
    # arXiv 2511.16652, integer pretraining: one H100 or more.
    "paper": preset(
        "paper",
        data="minipile",
        layers=6,
        width=256,
        population=2**18,
        group=2**14,  # 16 streams
        chunk=2**14,  # hidden states and factors of more at a time do not fit
        held_out_streams=1024,
    ),
    "tiny": preset(
        "tiny",
        layers=1,
        width=16,
        tokens=16,
        population=64,
        group=8,
        batch=8,
        held_out_streams=8,
        held_out_tokens=64,
        max_generations=60,
        sample_bytes=40,
    ),
    **{
        # As large as the model of "laptop", and on the same text.
        name: preset(name, **{**LAPTOP, **settings})
        for name, settings in BASELINES.items()
    },
}
