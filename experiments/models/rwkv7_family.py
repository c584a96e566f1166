"""RWKV-7 as a record, in folders that a published .pth was converted to."""

import functools
from pathlib import Path

from experiments.models import rwkv7, rwkv7_weights, tokens, world_tokenizer
from experiments.models.family import Family, Params
from experiments.models.parallel import ShardingRules
from experiments.models.rwkv7 import RWKV7Config
from experiments.models.tokens import AnyTokenizer


def small(vocab_size: int, width: int, layers: int) -> RWKV7Config:
    """A new model with heads of width 64, or one head of less.

    Raises:
        ValueError: for a width above 64 that is no multiple of it.
    """
    narrow = min(64, width)
    if width % narrow:
        raise ValueError("heads are 64 wide, so choose a multiple of 64")
    return RWKV7Config(
        vocab_size=vocab_size, hidden_size=width, num_hidden_layers=layers, head_dim=narrow
    )


# One for a process: its 65,529 lines take a second to read.
_world = functools.cache(world_tokenizer.WorldTokenizer)


def tokenizer(folder: Path) -> AnyTokenizer:
    """That of the folder, where the model was trained here; the published models have theirs in common."""
    return tokens.from_folder(folder) if (folder / "tokenizer.json").exists() else _world()


def save(folder: Path, config: RWKV7Config, params: Params, source: Path | None) -> None:
    """Writes the model, and the tokenizer of the source where it has one of its own."""
    rwkv7_weights.save(folder, config, params)
    if source is not None and (source / "tokenizer.json").exists():
        tokens.from_folder(source).save(folder)


FAMILY = Family(
    name="rwkv7",
    config=RWKV7Config,
    small=small,
    init=rwkv7.init,
    apply=rwkv7.apply,
    prefill=rwkv7.prefill,
    decode=rwkv7.decode,
    plan=rwkv7.plan,
    output_axis=rwkv7.output_axis,
    sharding=ShardingRules(
        by_output=("receptance", "att/key", "att/value", "ffn/key", "head", "emb"),
        by_input=("output", "ffn/value"),
        tables=("emb",),
        caches={"kv": 3, "att_x": 1, "ffn_x": 1},
    ),
    model_types=(rwkv7_weights.MODEL_TYPE,),
    load=rwkv7_weights.load,
    save=save,
    tokenizer=tokenizer,
)
