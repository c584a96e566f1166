"""Training policies in environments: `eggroll rl`."""

from experiments.rl.config import PRESETS, Config
from experiments.run.driver import Column, Driver, Figure

DRIVER = Driver(
    name="rl",
    summary="train a policy in an environment; --list-envs names those of gymnax and Gymnasium",
    config=Config,
    presets=PRESETS,
    figure=Figure("held_out_return", "fresh_return"),
    columns=(
        Column("held_out_return", "held out", ".1f"),
        Column("fitness_mean", "return", ".1f"),
        Column("episode_return", "return", ".1f"),
    ),
    results=("environment_steps",),
    trainer="experiments.rl.train:make_trainer",
)
