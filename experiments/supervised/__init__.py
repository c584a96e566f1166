"""Training a classifier of digits: `eggroll supervised`."""

from experiments.run.driver import Column, Driver, Figure
from experiments.supervised.config import PRESETS, Config

DRIVER = Driver(
    name="supervised",
    summary="train a classifier of digits",
    config=Config,
    presets=PRESETS,
    # Of the way a population of 4 goes 0.03, 16 members 0.38, 256 members 0.7.
    figure=Figure("held_out_accuracy", "fresh_accuracy", best=1.0),
    columns=(
        Column("held_out_accuracy", "held out", ".3f"),
        Column("train_accuracy", "accuracy", ".3f"),
    ),
    measured=("train_accuracy",),
    results=(),
    trainer="experiments.supervised.train:Classifier",
)
