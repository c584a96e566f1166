"""Fine-tuning language models on answers that can be checked: `eggroll reasoning`."""

from experiments.reasoning.config import PRESETS, Config
from experiments.run.driver import Column, Driver, Figure

DRIVER = Driver(
    name="reasoning",
    summary="fine-tune a language model on answers that can be checked",
    config=Config,
    presets=PRESETS,
    figure=Figure("held_out_accuracy", "fresh_accuracy", best=1.0, way=0.1),
    columns=(
        Column("held_out_accuracy", " of held-out questions right", ".1%"),
        Column("reward_mean", "reward", ".3f"),
        Column("loss", "loss", ".3f"),
    ),
    measured=("held_out_reward", "held_out_length"),
    results=("prompt_tokens", "generated_tokens"),
    trainer="experiments.reasoning.train:Reasoning",
)
