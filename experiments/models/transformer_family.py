"""The Llama family as a record: Llama, Qwen2 and Qwen3, in the layout of Hugging Face."""

from pathlib import Path

from experiments.models import adapters, hugging_face, llama_config, transformer
from experiments.models.family import Family, Params
from experiments.models.parallel import ShardingRules
from experiments.models.transformer import TransformerConfig


def small(vocab_size: int, width: int, layers: int) -> TransformerConfig:
    """A new model with heads of width 32 and an MLP whose three matrices are as large as two of 4 width.

    Raises:
        ValueError: for a width that is no multiple of 32.
    """
    heads = max(1, width // 32)
    if width % (2 * heads):
        raise ValueError(
            f"it is divided among {heads} heads of an even width, so choose a multiple of 32"
        )
    return TransformerConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )


def _save(folder: Path, config: TransformerConfig, params: Params, source: Path | None) -> None:
    hugging_face.save(folder, config, params, source=source)


FAMILY = Family(
    name="transformer",
    config=TransformerConfig,
    small=small,
    init=transformer.init,
    apply=transformer.apply,
    prefill=transformer.prefill,
    decode=transformer.decode,
    plan=transformer.plan,
    output_axis=transformer.output_axis,
    sharding=ShardingRules(
        by_output=(
            *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
            *("lm_head", "embed_tokens"),
        ),
        by_input=("o_proj", "down_proj"),
        tables=("embed_tokens",),
        caches={"keys": 2, "values": 2},
    ),
    architectures=tuple(llama_config.ARCHITECTURES),
    load=hugging_face.load,
    save=_save,
    adapter_module=adapters.llama_module,
)
