"""Small GGUF files: weights in the layout of Hugging Face, written as llama.cpp's converter writes them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from experiments.models.tokens import train_bpe

Q = gguf.GGMLQuantizationType
HIDDEN, INNER, HEADS, PAIRS, WIDTH, LAYERS, ROWS = 64, 96, 4, 2, 32, 2, 320
TEXTS = ["to be or not to be, that is the question of 1984 things", "Ünïcode's größte 漢字"] * 9
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Tokens, their types and merges: bytes and pairs, control tokens, one that a user defined, and rows that
    are unused."""
    told = json.loads(train_bpe(TEXTS, 300).model.to_str())["model"]
    texts = [text for text, _ in sorted(told["vocab"].items(), key=lambda item: item[1])][2:]
    every = [*SPECIALS, *texts, "<tool>"]
    unused = [f"[PAD{i}]" for i in range(len(every), ROWS)]
    kinds = [3] * 3 + [1] * len(texts) + [4] + [5] * len(unused)
    return [*every, *unused], kinds, [" ".join(pair) for pair in told["merges"]]


def weights(family: str, tied: bool, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights by their names in a folder of Hugging Face."""
    rng = np.random.default_rng(seed)
    matrix = lambda *shape: (rng.normal(size=shape) / 8).astype(np.float32)
    norm = lambda size: (1 + rng.normal(size=size) / 4).astype(np.float32)
    found = {"model.embed_tokens.weight": matrix(ROWS, HIDDEN)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        found[f"{name}.input_layernorm.weight"] = norm(HIDDEN)
        found[f"{name}.post_attention_layernorm.weight"] = norm(HIDDEN)
        for part, count in (("q", HEADS), ("k", PAIRS), ("v", PAIRS)):
            found[f"{name}.self_attn.{part}_proj.weight"] = matrix(count * WIDTH, HIDDEN)
            if family == "qwen2":
                found[f"{name}.self_attn.{part}_proj.bias"] = matrix(count * WIDTH)
            if family == "qwen3" and part != "v":
                found[f"{name}.self_attn.{part}_norm.weight"] = norm(WIDTH)
        found[f"{name}.self_attn.o_proj.weight"] = matrix(HIDDEN, HEADS * WIDTH)
        found[f"{name}.mlp.gate_proj.weight"] = matrix(INNER, HIDDEN)
        found[f"{name}.mlp.up_proj.weight"] = matrix(INNER, HIDDEN)
        found[f"{name}.mlp.down_proj.weight"] = matrix(HIDDEN, INNER)
    found["model.norm.weight"] = norm(HIDDEN)
    if not tied:
        found["lm_head.weight"] = matrix(ROWS, HIDDEN)
    return found


PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def their_name(name: str) -> str:
    """The name of a tensor in a GGUF file."""
    stem, _, end = name.rpartition(".")
    if stem in WHOLE:
        return f"{WHOLE[stem]}.{end}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{PARTS[part]}.{end}"


def in_their_order(name: str, x: np.ndarray, family: str) -> np.ndarray:
    """Rows of q and k of a Llama as llama.cpp has them: the two halves of a head interleaved."""
    if family != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return x
    heads = x.reshape(-1, WIDTH, x.shape[-1])
    out = np.empty_like(heads)
    out[:, 0::2], out[:, 1::2] = heads[:, : WIDTH // 2], heads[:, WIDTH // 2 :]
    return out.reshape(x.shape)


def write_gguf(
    path: Path,
    family: str = "llama",
    *,
    tied: bool = False,
    kind: Any = Q.F32,
    pre: str = "smollm",
    edit: Callable[[dict[str, Any], dict[str, np.ndarray]], object] | None = None,
) -> dict[str, np.ndarray]:
    """Writes a file, and gives the weights that it stands for, by their names in a folder.

    Args:
        path: of the file.
        family: the architecture.
        tied: whether there is no head.
        kind: of all matrices.
        pre: the pre-tokenizer.
        edit: changes settings and tensors before they are written; a setting of None is left out.
    """
    told: dict[str, np.ndarray] = weights(family, tied)
    texts, kinds, merges = vocabulary()
    settings: dict[str, Any] = {
        f"{family}.block_count": LAYERS,
        f"{family}.context_length": 128,
        f"{family}.embedding_length": HIDDEN,
        f"{family}.feed_forward_length": INNER,
        f"{family}.attention.head_count": HEADS,
        f"{family}.attention.head_count_kv": PAIRS,
        f"{family}.attention.key_length": WIDTH,
        f"{family}.attention.value_length": WIDTH,
        f"{family}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{family}.rope.freq_base": 5000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }
    tensors = {their_name(name): in_their_order(name, x, family) for name, x in told.items()}
    if edit is not None:
        edit(settings, tensors)
    writer = gguf.GGUFWriter(path, settings.pop("general.architecture", family))
    for key, value in settings.items():
        if value is not None:
            writer.add_key_value(key, value, *_kind(value))
    for name, x in tensors.items():
        if x.ndim == 2 and kind not in (Q.F32,):
            writer.add_tensor(name, gguf.quantize(x, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def stored(x: np.ndarray) -> np.ndarray:
        return gguf.dequantize(gguf.quantize(x, kind), kind) if x.ndim == 2 else x

    return {name: stored(x).reshape(x.shape) for name, x in told.items()}


def _kind(value: Any) -> tuple[Any, ...]:
    types = gguf.GGUFValueType
    single = lambda one: (
        types.STRING if isinstance(one, str)
        else types.BOOL if isinstance(one, bool)
        else types.UINT32 if isinstance(one, int)
        else types.FLOAT32
    )  # fmt: skip
    return (types.ARRAY, single(value[0])) if isinstance(value, list) else (single(value),)
