"""Pretraining small language models on bytes, in integers or floats: `eggroll pretrain`."""

from experiments.pretrain.config import PRESETS, Config
from experiments.run.driver import Column, Driver, Figure

DRIVER = Driver(
    name="pretrain",
    summary="pretrain a language model of bytes, in int8 or in floats",
    config=Config,
    presets=PRESETS,
    # Bits per byte of a small model fall from 8.4 to 5 within hundreds of updates; 0 is out of reach.
    figure=Figure(
        "held_out_bits_per_byte", "fresh_bits_per_byte", better="smaller", best=0.0, way=0.02
    ),
    columns=(Column("held_out_bits_per_byte", " bits/byte held out", ".3f"),),
    measured=("held_out_integer_bits_per_byte",),
    results=("anchors", "tokens", "bytes_read"),
    trainer="experiments.pretrain.train:Pretraining",
)
