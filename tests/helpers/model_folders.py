"""Folders of models as their makers publish them, with random weights and of a small size."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.models import hugging_face, llama_config, rwkv7, rwkv7_weights, transformer

START, STOP, END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
THOUGHTS = ("<think>", "</think>")
CHAT = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
    "        {{- '<think>\\n\\n</think>\\n\\n' }}\n"
    "    {%- endif %}\n"
    "{%- endif %}"
)
LINES = (
    "Find a way to make 99 using all of these numbers: 61, 23. Each number can only be used once.",
    "Final answer format instructions:\n1. Provide your solution as a arithmetic expression (no '=' sign).",
    "2. Do not include the target number in the expression.\n3. Use '*' for multiplication.",
    "4. Use '/' for division.\n5. Do not include any other text or formatting.",
    "How many apples are there in 12 bags of 7 apples each? There are 12*7 = 84 apples.",
)


def qwen3(
    folder: Path, *, layers: int = 2, hidden: int = 64, sharded: bool = False, scale: float = 0.05
) -> Path:
    """A folder with the files and the keys of Qwen3-0.6B: bfloat16, heads of a width of their own, the
    embedding also as lm_head.weight."""
    folder.mkdir(parents=True)
    ends = _tokenizer(folder)
    size = ends[STOP] + len(THOUGHTS) + 3  # more rows than tokens, as there
    told: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ends[END],
        "eos_token_id": ends[STOP],
        "head_dim": hidden // 2,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": 3 * hidden,
        "max_position_embeddings": 40960,
        "max_window_layers": layers,
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": size,
    }
    config = llama_config.config_of(told)
    params = transformer.init(jax.random.key(0), config)
    chance = np.random.default_rng(0)
    noisy = lambda x: jnp.asarray(x + scale * chance.normal(size=x.shape), jnp.bfloat16)
    hugging_face.save(
        folder, config, jax.tree.map(noisy, params), shard_bytes=100_000 if sharded else 10**9
    )
    if not sharded:
        _with_head(folder / "model.safetensors")
    write(folder / "config.json", **told)
    write(
        folder / "generation_config.json",
        bos_token_id=ends[END],
        do_sample=True,
        eos_token_id=[ends[STOP], ends[END]],
        pad_token_id=ends[END],
        temperature=0.6,
        top_k=20,
        top_p=0.95,
        transformers_version="4.51.0",
    )
    return folder


def rwkv(folder: Path, *, layers: int = 2, hidden: int = 32, vocabulary: int = 65536) -> Path:
    """A random .pth of the published names in bfloat16, converted to a folder where torch is there."""
    config = rwkv7.RWKV7Config(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, head_dim=hidden // 2
    )
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), rwkv7.init(jax.random.key(0), config))
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        rwkv7_weights.save(folder, config, params)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".pth")
    rwkv7_weights.to_pth(path, config, params)
    rwkv7_weights.convert_pth(path, folder)
    path.unlink()
    return folder


def write(path: Path, **content: Any) -> None:
    path.write_text(json.dumps(content))


def _tokenizer(folder: Path) -> dict[str, int]:
    """tokenizer.json and tokenizer_config.json; the numbers of special tokens."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    model = Tokenizer(BPE())
    model.pre_tokenizer = ByteLevel(add_prefix_space=False)
    model.decoder = Decoder()
    trainer = BpeTrainer(vocab_size=600, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    model.train_from_iterator(9 * LINES, trainer)
    model.add_special_tokens([END, START, STOP])
    model.add_tokens([AddedToken(text, special=False) for text in THOUGHTS])
    model.save(str(folder / "tokenizer.json"))
    added = {text: model.token_to_id(text) for text in (END, START, STOP, *THOUGHTS)}
    write(
        folder / "tokenizer_config.json",
        add_bos_token=False,
        add_prefix_space=False,
        added_tokens_decoder={
            str(number): {"content": text, "special": text not in THOUGHTS}
            for text, number in added.items()
        },
        additional_special_tokens=[START, STOP],
        bos_token=None,
        chat_template=CHAT,
        clean_up_tokenization_spaces=False,
        eos_token=STOP,
        errors="replace",
        model_max_length=131072,
        pad_token=END,
        split_special_tokens=False,
        tokenizer_class="Qwen2Tokenizer",
        unk_token=None,
    )
    return added


def _with_head(path: Path) -> None:
    """The tied embedding a second time, as the published file has it."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
