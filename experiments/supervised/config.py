"""The settings of `eggroll supervised`, and its presets. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from experiments.run.errors import UsageError
from experiments.run.fields import Role, changed, count, setting
from experiments.run.settings import (
    Evolution,
    Flat,
    Optimizer,
    RunSettings,
    program_of,
    target_is_share,
)

PresetName = Literal[
    "digits", "digits-nodes", "digits-accuracy", "digits-dense", "digits-sgd", "digits-adamw"
]


@dataclass(frozen=True, kw_only=True)
class Config(RunSettings):
    """Train a classifier by evolution strategies, or by backpropagation for comparison."""

    driver: ClassVar[str] = "supervised"

    preset: PresetName = setting(role=Role.FREE)
    """Where the other settings start from."""
    data: Path | None = None
    """Folder with data in MNIST's format; scikit-learn's digits where it is not given."""
    algorithm: Literal["eggroll", "backprop"] = "eggroll"
    """"eggroll" is evolution strategies; with `rank full` dense ones."""
    fitness: Literal["cross_entropy", "accuracy"] = "cross_entropy"
    """What the evolution strategy maximises: minus the cross-entropy, or the accuracy itself."""

    width: int = count(64, most=2**16)
    """Units of each hidden layer."""
    depth: int = count(1, least=0, most=1000)
    """Hidden layers; 0 is a linear classifier."""
    activation: Literal["relu", "tanh", "layer_norm_relu"] = "relu"
    """What follows each hidden layer."""
    batch: int = count(256)
    """Images that all members are scored on in a generation, or that a gradient is taken of."""

    evolution: Flat[Evolution] = Evolution(population=1024, sigma=0.1)
    """Evolution strategies."""
    perturb: Literal["weights", "nodes"] = "weights"
    """What noise is added to: the parameters, one score a member; or the outputs of every layer, anew for
    every image, one score an image. Nodes need two passes over the images, weights one."""
    optimizer: Flat[Optimizer] = Optimizer(learning_rate=0.03)
    """What moves the parameters."""

    seeds: int = count(1, most=10_000)
    """Train so many times at once, with seeds `seed`, `seed` + 1, ... in one program."""

    @property
    def together(self) -> str | None:
        """Runs of which this is the same can be one program; None for one that cannot be with others."""
        return program_of(self) if self.seeds == 1 else None

    def check(self) -> None:
        """Raises UsageError for the first setting that cannot be right."""
        super().check()
        self.optimizer.check()
        target_is_share(self, "an accuracy")
        if self.perturb == "nodes":
            self._check_nodes()

    def check_places(self) -> None:
        """Raises UsageError for the first file, folder or name outside the settings that is not there."""
        super().check_places()
        if self.data is not None:
            from experiments.supervised.data import check_files

            check_files(self.data)

    def _check_nodes(self) -> None:
        """Raises UsageError for the first setting that node noise has no use for."""
        if self.algorithm != "eggroll":
            raise UsageError(
                f"--perturb nodes: --algorithm {self.algorithm} has no noise; choose eggroll"
            )
        if self.evolution.rank != 1:
            raise UsageError(
                f"--rank {self.evolution.rank}: noise on nodes has no rank; leave it out, or choose "
                "--perturb weights"
            )


# Reasons: at a population of 1024 a generation costs a tenth of a second on two cores; 256 learns to a
# few points less. A sigma of 0.1 and Adam at 0.03 are in the middle of what works (why-not-learning.md).
DIGITS = Config(preset="digits", run_dir=Path("runs/digits"), max_generations=300)

PRESETS: dict[str, Config] = {
    "digits": DIGITS,
    # The noise of an image says little about 64 + 10 outputs and much less about 4,810 weights: few pairs of
    # members and all images, instead of many members and few images. 98.1% after 60 to 100 generations.
    "digits-nodes": changed(
        DIGITS,
        preset="digits-nodes",
        run_dir=Path("runs/digits-nodes"),
        perturb="nodes",
        population=32,  # 8 end at 97.0 to 97.9%, 64 no higher than 32 (three seeds)
        batch=1437,  # all; 128 members on 256 images end as high, with less steady curves
        sigma=0.2,  # 0.1 and 0.4 end 0.3 points lower
        learning_rate=0.04,  # 0.02 is as good and slower, 0.1 loses 1.5 points
        max_generations=100,
    ),
    "digits-accuracy": changed(
        DIGITS,
        preset="digits-accuracy",
        run_dir=Path("runs/digits-accuracy"),
        fitness="accuracy",
        # With 0.1 one or two digits are never named: no member comes to name them, so that nothing
        # is learned of them (88 percent right instead of 98).
        sigma=0.2,
    ),
    "digits-dense": changed(
        DIGITS, preset="digits-dense", run_dir=Path("runs/digits-dense"), rank="full"
    ),
    "digits-sgd": changed(
        DIGITS,
        preset="digits-sgd",
        run_dir=Path("runs/digits-sgd"),
        algorithm="backprop",
        optimizer="sgd",
        learning_rate=0.3,
        max_generations=600,
    ),
    "digits-adamw": changed(
        DIGITS,
        preset="digits-adamw",
        run_dir=Path("runs/digits-adamw"),
        algorithm="backprop",
        optimizer="adamw",
        learning_rate=0.003,
        max_generations=600,
    ),
}
