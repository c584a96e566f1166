"""The settings of `eggroll optimizers`, and its presets. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from experiments.run.errors import UsageError, suggestion
from experiments.run.fields import (
    MOST_NUMBER,
    Role,
    changed,
    count,
    flag,
    from_zero,
    positive,
    setting,
    within,
)
from experiments.run.optimizers import check_optimizer, functions_of, signature_of
from experiments.run.paths import check_there
from experiments.run.settings import Flat, RunSettings

PresetName = Literal["lm", "digits", "tiny"]
# A setting of ours, and what it is called in optax or in optim.
ARGUMENTS = {
    "momentum": ("momentum",),
    "b2": ("b2",),
    "density": ("density", "rank", "active"),
    # GaLore knows both, and the first as an old name.
    "gap": ("update_proj_gap", "update_gap"),
    "projector": ("projector",),
    "scale": ("scale",),
    "kappa": ("kappa",),
}
Projector = Literal["columns", "rows", "randk", "random", "svd", "blockwise"]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optimizer, its schedule and what only some optimizers have."""

    name: Annotated[str, tyro.conf.arg(name="optimizer")] = "adamw"
    """An optimizer of optax, or of this project as "optim.NAME"."""
    learning_rate: float = positive(0.003, number=True)
    """The highest learning rate."""
    linear_rate: float = positive(1.0)
    """Text: factor on the steps of the layers' matrices, whichever optimizer makes them."""
    schedule: int = count(1200)
    """Updates in which the learning rate rises and falls; from then on it stays."""
    warmup: float = within(0.1)
    """Share of them in which it rises, from 0."""
    final: float = within(0.1)
    """Share of the highest learning rate that it falls to, by a cosine."""
    weight_decay: float = from_zero(0.0)
    """Decoupled weight decay, times the learning rate; the same for every optimizer."""
    momentum: float | None = within(None, open_high=True)
    """Momentum, of optimizers that have a setting of this name; their default where not given."""
    b2: float | None = within(None, open_high=True)
    """As `momentum`: decay of Adam's second moment."""
    density: float | None = within(None)
    """As `momentum`: share of linear weights that has a state, by FRUGAL in every matrix; by GaLore the rank
    over the width, by BAdam the layers over the depth, one at least of either."""
    gap: int | None = count(None)
    """As `momentum`: updates from one choice of that share to the next."""
    projector: Projector | None = None
    """As `momentum`: how that share is chosen: columns, rows, randk, random, svd or blockwise."""
    scale: float | None = positive(None)
    """As `momentum`: GaLore's factor on the steps of what it projects."""
    kappa: str | None = None
    """As `momentum`: Lion-K's function by its name in optim.kappa, with its number behind a colon:
    l2, nuclear, huber:0.001, ..."""
    also_split: str | None = None
    """A parameter beside linear weights that FRUGAL, GaLore or BAdam treats as it does them, such as
    lm_head; the others are left to Adam."""

    def arguments(self, width: int, depth: int) -> dict[str, Any]:
        """The arguments that the optimizer is called with, by its own names for them.

        Args:
            width: of the model, of which GaLore takes a rank.
            depth: of the model, of which BAdam takes layers.

        Raises:
            UsageError: for a name that is no optimizer, or a setting that it does not have.
        """
        check_optimizer(self.name, scheduled=True)
        takes = signature_of(self.name).names
        if self.kappa is not None:
            check_kappa(self.kappa)
        found: dict[str, Any] = {}
        for field, names in ARGUMENTS.items():
            value = getattr(self, field)
            if value is None:
                continue
            name = next((one for one in names if one in takes), None)
            if name is None:
                raise UsageError(f"{flag(field)} {value}: {self.name} has no such setting")
            # GaLore counts dimensions, and BAdam blocks: layers.
            whole = {"rank": width, "active": depth}.get(name)
            if whole is not None and not value:
                raise UsageError(f"{flag(field)} {value}: {self.name} needs a share above 0")
            found[name] = value if whole is None else max(round(value * whole), 1)
        if "weight_decay" in takes:
            found["weight_decay"] = self.weight_decay
        elif self.weight_decay:
            raise UsageError(f"--weight-decay {self.weight_decay}: {self.name} has no weight decay")
        if self.also_split is not None and "split" not in takes:
            raise UsageError(f"--also-split {self.also_split}: {self.name} has no such setting")
        return found


def check_kappa(words: str) -> None:
    """Raises UsageError for a name that is no function of optim.kappa, or a number that is none.

    Example:
        >>> check_kappa("huber:0.5")
        >>> check_kappa("hubert:0.5")
        Traceback (most recent call last):
        experiments.run.errors.UsageError: --kappa hubert:0.5: there is no such function; did you mean ...
    """
    name, colon, number = words.partition(":")
    known = functions_of("optim.kappa")
    if name not in known:
        raise UsageError(f"--kappa {words}: there is no such function{suggestion(name, known)}")
    if not colon and known[name].needed:
        raise UsageError(f"--kappa {words}: it needs a number, as {name}:0.5 has one")
    if colon and (not known[name].needed or not is_positive(number)):
        right = "a positive number" if known[name].needed else "none; leave it out"
        raise UsageError(f"--kappa {words}: the number behind the colon must be {right}")


def is_positive(number: str) -> bool:
    """Whether a text is a number above 0.

    Example:
        >>> is_positive("3"), is_positive("0"), is_positive("x"), is_positive("nan")
        (True, False, False, False)
    """
    try:
        return 0 < float(number) <= MOST_NUMBER
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class Config(RunSettings):
    """Train a language model of bytes, or a network whose weights have no scale, by any optimizer."""

    driver: ClassVar[str] = "optimizers"

    preset: PresetName = setting(role=Role.FREE)
    """Where the other settings start from."""
    task: Literal["text", "digits"] = "text"
    """A Llama-style model of bytes, or scikit-learn's digits by a weight-normalised perceptron."""
    data: Path | None = None
    """Text: a file or a folder of files; the help topics that Python carries where it is not given."""
    held_out: float = within(0.1, open_low=True, open_high=True)
    """Text: share of its bytes, by documents, that is never trained on."""
    held_out_sequences: int = count(256)
    """Text: so many stretches of what is held out are measured, evenly spread over it."""

    width: int = count(128, most=65536)
    """Width of the model."""
    depth: int = count(4, most=1000)
    """Layers (hidden ones, of the perceptron)."""
    inner: int = count(384, most=262144)
    """Text: width inside of the MLP of a layer."""
    heads: int = count(4, most=1024)
    """Text: attention heads."""
    length: int = count(64, most=1048576)
    """Text: bytes of a sequence."""
    batch: int = count(8, most=1048576)
    """Sequences or images of an update."""

    optimizer: Flat[Optimizer] = Optimizer()
    """What moves the parameters."""

    def check(self) -> None:
        """Raises UsageError for the first setting that cannot be right."""
        super().check()
        self.optimizer.arguments(self.width, self.depth)
        if self.task == "text" and (self.width % self.heads or self.width // self.heads % 2):
            raise UsageError(
                f"--heads {self.heads}: {self.width} units are not so many heads of an even width"
            )
        if self.task == "text" and self.target is not None and self.held_out_sequences < 2:
            raise UsageError(
                f"--held-out-sequences {self.held_out_sequences}: with --target one half of them "
                "confirms it: choose at least 2"
            )
        if self.task == "digits" and self.data is not None:
            raise UsageError(f"--data {self.data}: digits are scikit-learn's; leave it out")

    def check_places(self) -> None:
        """Raises UsageError for the first file, folder or name outside the settings that is not there."""
        super().check_places()
        if self.data is not None:
            check_there(self.data, f"--data {self.data}")


def preset(name: PresetName, run_dir: Path, max_generations: int, **settings: object) -> Config:
    config = Config(preset=name, run_dir=run_dir, max_generations=max_generations)
    return changed(config, schedule=max_generations, **settings)


PRESETS: dict[str, Config] = {
    # 0.9 million parameters; of 417 KB of text, each byte is trained on about once and a half.
    "lm": preset(
        "lm",
        run_dir=Path("runs/lm"),
        max_generations=1200,
        evaluate_every=200,
    ),
    "digits": preset(
        "digits",
        run_dir=Path("runs/digits-optimizers"),
        task="digits",
        max_generations=600,
        evaluate_every=100,
        depth=2,
        batch=128,
        learning_rate=0.01,
    ),
    "tiny": preset(
        "tiny",
        run_dir=Path("runs/tiny"),
        max_generations=30,
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
