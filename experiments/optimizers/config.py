"""The settings of `eggroll optimizers`, and its presets. Imports nothing heavy."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments.run.errors import UsageError
from experiments.run.settings import RunSettings, at_least_one, flag, positive

PresetName = Literal["lm", "digits", "tiny"]
PROJECTORS = ("columns", "rows", "randk", "random", "svd", "blockwise")


@dataclass(frozen=True, kw_only=True)
class Config(RunSettings):
    """Train a language model of bytes, or a network whose weights have no scale, by any optimizer."""

    preset: PresetName
    """Where the other settings start from."""
    task: Literal["text", "digits"] = "text"
    """A Llama-style model of bytes, or scikit-learn's digits by a weight-normalised perceptron."""
    data: Path | None = None
    """Text: a file or a folder of files; the help topics that Python carries where it is not given."""
    held_out: float = 0.1
    """Text: share of its bytes, by documents, that is never trained on."""
    held_out_sequences: int = 256
    """Text: so many stretches of what is held out are measured, evenly spread over it."""

    width: int = 128
    """Width of the model."""
    depth: int = 4
    """Layers (hidden ones, of the perceptron)."""
    inner: int = 384
    """Text: width inside of the MLP of a layer."""
    heads: int = 4
    """Text: attention heads."""
    length: int = 64
    """Text: bytes of a sequence."""
    batch: int = 8
    """Sequences or images of an update."""

    optimizer: str = "adamw"
    """An optimizer of optax, or of this project as "optim.NAME"."""
    learning_rate: float = 0.003
    """The highest learning rate."""
    linear_rate: float = 1.0
    """Text: factor on the steps of the layers' matrices, whichever optimizer makes them."""
    schedule: int
    """Updates in which the learning rate rises and falls; from then on it stays."""
    warmup: float = 0.1
    """Share of them in which it rises, from 0."""
    final: float = 0.1
    """Share of the highest learning rate that it falls to, by a cosine."""
    weight_decay: float = 0.0
    """Decoupled weight decay, times the learning rate; the same for every optimizer."""
    momentum: float | None = None
    """Momentum, of optimizers that have a setting of this name; their default where not given."""
    b2: float | None = None
    """As `momentum`: decay of Adam's second moment."""
    density: float | None = None
    """As `momentum`: share of linear weights that has a state, by FRUGAL in every matrix; by GaLore the rank
    over the width, by BAdam the layers over the depth."""
    gap: int | None = None
    """As `momentum`: updates from one choice of that share to the next."""
    projector: str | None = None
    """As `momentum`: how that share is chosen: columns, rows, randk, random, svd or blockwise."""
    scale: float | None = None
    """As `momentum`: GaLore's factor on the steps of what it projects."""
    kappa: str | None = None
    """As `momentum`: Lion-K's function by its name in optim.kappa, with its number behind a colon:
    l2, nuclear, huber:0.001, ..."""
    also_split: str | None = None
    """A parameter beside linear weights that FRUGAL, GaLore or BAdam treats as it does them, such as
    lm_head; the others are left to Adam."""

    def check(self) -> None:
        """Raises UsageError for the first setting that cannot be right."""
        self.check_run()
        at_least_one(
            self,
            "width",
            "inner",
            "heads",
            "length",
            "batch",
            "gap",
            "schedule",
            "held_out_sequences",
        )
        positive(self, "learning_rate", "linear_rate")
        if self.depth < 1:
            raise UsageError(f"--depth {self.depth}: choose a whole number of at least 1")
        for name in ("warmup", "final"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UsageError(f"{flag(name)} {value}: choose a number from 0 to 1")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise UsageError(f"--weight-decay {self.weight_decay}: choose 0 or a positive number")
        if self.task == "text" and (self.width % self.heads or self.width // self.heads % 2):
            raise UsageError(
                f"--heads {self.heads}: {self.width} units are not so many heads of an even width"
            )
        if self.task == "digits" and self.data is not None:
            raise UsageError(f"--data {self.data}: digits are scikit-learn's; leave it out")
        if self.projector is not None and self.projector not in PROJECTORS:
            raise UsageError(f"--projector {self.projector}: choose {', '.join(PROJECTORS)}")


PRESETS: dict[str, Config] = {
    # 0.9 million parameters; of 417 KB of text, each byte is trained on about once and a half.
    "lm": Config(
        preset="lm",
        run_dir=Path("runs/lm"),
        max_generations=1200,
        schedule=1200,
        evaluate_every=200,
    ),
    "digits": Config(
        preset="digits",
        run_dir=Path("runs/digits-optimizers"),
        task="digits",
        max_generations=600,
        schedule=600,
        evaluate_every=100,
        depth=2,
        batch=128,
        learning_rate=0.01,
    ),
    "tiny": Config(
        preset="tiny",
        run_dir=Path("runs/tiny"),
        max_generations=30,
        schedule=30,
        evaluate_every=10,
        width=16,
        depth=2,
        inner=32,
        heads=2,
        length=32,
        batch=8,
        learning_rate=0.01,
    ),
}
