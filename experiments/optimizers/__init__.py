"""Training by backpropagation, by any optimizer: `eggroll optimizers`, and `eggroll study` of many."""

from experiments.optimizers.config import PRESETS, Config
from experiments.run.driver import Column, Driver, Figure

DRIVER = Driver(
    name="optimizers",
    summary="train by backpropagation, by any optimizer",
    config=Config,
    presets=PRESETS,
    figure=Figure("held_out_loss", "fresh_loss", better="smaller", best=0.0, way=0.1),
    columns=(Column("held_out_loss", "held out", ".3f"), Column("loss", "loss", ".3f")),
    measured=("held_out_accuracy", "weight_norm"),
    results=("state_bytes",),
    trainer="experiments.optimizers.train:OptimizerRun",
)
