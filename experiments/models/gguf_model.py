"""A GGUF file as a Hugging Face folder: config.json, model.safetensors and the tokenizer's files."""

import contextlib
import json
import math
import os
import re
import secrets
import shutil
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np

from experiments.models.config_json import shown
from experiments.models.gguf_file import GGUFFile, open_gguf
from experiments.models.gguf_tokenizer import TokenizerFiles, check_tokenizer, tokenizer_of
from experiments.run.errors import UsageError, suggestion
from experiments.run.folder import (
    full_disk_in_one_sentence,
    make_folder,
    sync_folder,
    write_json,
    write_whole,
)

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
FILES = (
    *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    "generation_config.json",
)
Kind = Literal["float32", "bfloat16"]
# What the names of safetensors and the bytes of a number are.
KINDS: dict[str, tuple[str, int]] = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}
# Settings of models with more than Llama has; after the name of the architecture.
UNSUPPORTED = (
    *("expert_count", "logit_scale", "embedding_scale", "residual_scale", "attention.scale"),
    *("attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window"),
    *("attention.clamp_kqv", "attention.max_alibi_bias"),
)
# Llama 3 stretches rotary positions by these, of which a file has the factors of each frequency alone.
LOW, HIGH, LENGTH = 1.0, 4.0, 8192
FREQUENCIES = "rope_freqs.weight"
# Seconds without a write after which an unfinished folder belongs to no process any more.
STALE = 24 * 3600


class _Part(NamedTuple):
    """A tensor: its name in a file, its name and shape in a folder, and the heads of a matrix whose rows
    stand in the order of llama.cpp."""

    source: str
    name: str
    shape: tuple[int, ...]
    heads: int | None = None


def check_file(path: Path) -> GGUFFile:
    """A file whose model can be converted, as far as its header says.

    Raises:
        UsageError: for one that is absent or damaged, of another architecture or tokenizer, or that lacks
            a tensor or a setting.
    """
    file = open_gguf(path)
    config = _config(file)
    check_tokenizer(file)
    _parts(file, config)
    return file


def convert(path: Path, folder: Path, dtype: Kind = "float32", overwrite: bool = False) -> None:
    """Writes the model of a file as a folder.

    The folder is complete or not there: it is written beside its place, and renamed.

    Args:
        path: the file.
        folder: what is written; those above it are made where they are missing.
        dtype: of the weights.
        overwrite: replaces a folder that holds a model, and nothing else.

    Raises:
        UsageError: for a file that `check_file` refuses, a tokenizer that is damaged, and a folder that is
            there already.
        RunError: if it cannot be written.
    """
    check_place(folder, overwrite)
    file = check_file(path)
    config = _config(file)
    parts, tokenizer = _parts(file, config), tokenizer_of(file)
    rows = len(json.loads(tokenizer.tokenizer)["model"]["vocab"])
    if rows > config["vocab_size"]:
        raise UsageError(
            f"{path}: token_embd.weight has {config['vocab_size']} rows; the tokenizer has {rows} tokens"
        )
    # What the loader would refuse is not written.
    from experiments.models.llama_config import config_of

    try:
        config_of(config)
    except UsageError as error:
        raise UsageError(f"{path}: as a folder, {error}") from error
    with _beside(folder, overwrite) as part:
        name, content = part / "model.safetensors", _Weights(file, parts, dtype)
        write_whole(name, content.write)
        _write_tokenizer(part, tokenizer)
        write_json(part / "config.json", config | tokenizer.generation | {"torch_dtype": dtype})


def check_place(folder: Path, overwrite: bool = False) -> None:
    """Raises UsageError for a folder that is there already and may not be replaced."""
    if not folder.is_dir():
        if folder.exists():
            raise UsageError(f"{folder} is there already, and is no folder; name another")
        return
    there = sorted(one.name for one in folder.iterdir())
    if there and not overwrite:
        raise UsageError(f"{folder} is there already; --overwrite replaces it")
    if others := [name for name in there if name not in FILES]:
        raise UsageError(
            f"{folder} holds {others[0]}, which is not of a model that was imported; name another folder"
        )


@contextlib.contextmanager
def _beside(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write to, which takes the place of another at the end of the block."""
    folder = Path(os.path.realpath(folder))
    part, old = (
        folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.{end}") for end in ("part", "old")
    )
    with full_disk_in_one_sentence(folder):
        make_folder(folder.parent)
        _remove_stale(folder)
        try:
            part.mkdir()
            yield part
            if overwrite and folder.exists():
                folder.rename(old)
            part.rename(folder)
            sync_folder(folder.parent)
        finally:
            # After any error between the two renames, such as Ctrl-C, the old folder alone has a model.
            if old.exists() and not folder.exists():
                old.rename(folder)
            for one in (part, old):
                shutil.rmtree(one, ignore_errors=True)


def _remove_stale(folder: Path) -> None:
    """Removes what killed conversions to this folder have left beside it.

    Another process may be converting to the same folder, so only folders without a write for
    `STALE` seconds are removed.
    """
    name = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}\.part")
    for one in folder.parent.iterdir():
        if name.fullmatch(one.name) is None:
            continue
        # It may be renamed or removed at any time.
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in (one, *one.iterdir()))
            if time.time() - newest > STALE:
                shutil.rmtree(one, ignore_errors=True)


# ---------------------------------------------------------------- settings


def _config(file: GGUFFile) -> dict[str, Any]:
    """config.json of a file."""
    family = file.text("general.architecture")
    if family not in ARCHITECTURES:
        raise UsageError(
            f"{file.path}: general.architecture {shown(family)} is not supported; "
            f"{', '.join(ARCHITECTURES)} are{suggestion(family, ARCHITECTURES)}"
        )
    if (count := file.whole("split.count", 1, least=0)) > 1:
        raise UsageError(
            f"{file.path} is one of {count} parts of a model; join them first: llama-gguf-split --merge"
        )
    for name in UNSUPPORTED:
        if file.settings.get(f"{family}.{name}"):
            raise UsageError(
                f"{file.path}: {family}.{name} {shown(file.settings[f'{family}.{name}'])} is not supported"
            )
    size = lambda name, default=None: file.whole(f"{family}.{name}", default)
    hidden, heads = size("embedding_length"), size("attention.head_count")
    if f"{family}.attention.key_length" not in file.settings and hidden % heads:
        raise UsageError(
            f"{file.path}: {family}.embedding_length {hidden} is no multiple of its {heads} heads"
        )
    width = size("attention.key_length", hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if (found := size(name, width)) != width:
            raise UsageError(
                f"{file.path}: {family}.{name} {found} is not supported; {width}, the width of a head, is"
            )
    config = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": _table(file)[0],
        "hidden_size": hidden,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "head_dim": width,
        "hidden_act": "silu",
        "max_position_embeddings": size("context_length"),
        "rms_norm_eps": file.number(f"{family}.attention.layer_norm_rms_epsilon"),
        "rope_theta": file.number(f"{family}.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if (scaling := _scaling(file, family, config)) is not None:
        config["rope_scaling"] = scaling
    return config


def _table(file: GGUFFile) -> tuple[int, ...]:
    if "token_embd.weight" not in file.tensors:
        raise UsageError(f"{file.path} has no tensor token_embd.weight")
    return file.tensors["token_embd.weight"].shape


def _scaling(file: GGUFFile, family: str, config: dict[str, Any]) -> dict[str, Any] | None:
    """How rotary positions are stretched."""
    # Before there were types.
    factor = file.settings.get(f"{family}.rope.scale_linear")
    kind = file.text(f"{family}.rope.scaling.type", "none" if factor is None else "linear")
    if kind not in ("none", "linear"):
        raise UsageError(
            f"{file.path}: {family}.rope.scaling.type {shown(kind)} is not supported; 'none' and 'linear' are"
        )
    if FREQUENCIES in file.tensors:
        if kind != "none":
            raise UsageError(
                f"{file.path}: both {family}.rope.scaling.type {kind!r} and {FREQUENCIES} stretch positions; "
                "one of them is supported"
            )
        return _llama3(file, config)
    if kind == "none":
        return None
    name = "rope.scale_linear" if factor is not None else "rope.scaling.factor"
    factor = file.number(f"{family}.{name}")
    return None if factor == 1 else {"rope_type": "linear", "factor": factor}


def _llama3(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    """The settings of Llama 3 that give the factors of a file."""
    found = file.read(FREQUENCIES).reshape(-1).astype(np.float64)
    half = config["head_dim"] // 2
    factor = float(found.max())
    waves = 2 * math.pi * config["rope_theta"] ** (np.arange(half) / half)
    share = np.clip((LENGTH / waves - LOW) / (HIGH - LOW), 0, 1)
    right = 1 / ((1 - share) / factor + share)
    if found.shape != right.shape or not np.allclose(found, right, rtol=1e-4, atol=0):
        raise UsageError(
            f"{file.path}: the factors of rotary frequencies ({FREQUENCIES}) are not those of Llama 3, "
            "which alone are supported"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LOW,
        "high_freq_factor": HIGH,
        "original_max_position_embeddings": LENGTH,
    }


# ---------------------------------------------------------------- tensors


def _parts(file: GGUFFile, config: dict[str, Any]) -> list[_Part]:
    """All tensors of a model, checked against those of the file."""
    parts = list(_layout(config))
    for part in parts:
        if part.source not in file.tensors:
            raise UsageError(f"{file.path} has no tensor {part.source}")
        shape = file.tensors[part.source].shape
        if shape != part.shape:
            raise UsageError(
                f"{file.path}: {part.source} must have the shape {list(part.shape)} by the settings, got "
                f"{list(shape)}"
            )
    rest = sorted(file.tensors.keys() - {part.source for part in parts} - {FREQUENCIES})
    if rest:
        named = ", ".join(rest[:5]) + ", ..." * (len(rest) > 5)
        raise UsageError(
            f"{file.path} has tensors that a {config['model_type']} does not have ({len(rest)}): {named}"
        )
    return parts


def _layout(config: dict[str, Any]) -> Iterator[_Part]:
    family, hidden, inner = (
        config[name] for name in ("model_type", "hidden_size", "intermediate_size")
    )
    heads, pairs = config["num_attention_heads"], config["num_key_value_heads"]
    width, rows = config["head_dim"], config["vocab_size"]
    yield _Part("token_embd.weight", "model.embed_tokens.weight", (rows, hidden))
    for layer in range(config["num_hidden_layers"]):
        old, new = f"blk.{layer}.", f"model.layers.{layer}."
        yield _Part(f"{old}attn_norm.weight", f"{new}input_layernorm.weight", (hidden,))
        for name, count in (("q", heads), ("k", pairs), ("v", pairs)):
            # Llama alone was given rotary positions of neighbours.
            order = count if family == "llama" and name != "v" else None
            module = f"{new}self_attn.{name}_proj"
            shape = (count * width, hidden)
            yield _Part(f"{old}attn_{name}.weight", f"{module}.weight", shape, order)
            if family == "qwen2":
                yield _Part(f"{old}attn_{name}.bias", f"{module}.bias", shape[:1])
            if family == "qwen3" and name != "v":
                norm = f"{new}self_attn.{name}_norm.weight"
                yield _Part(f"{old}attn_{name}_norm.weight", norm, (width,))
        shape = (hidden, heads * width)
        yield _Part(f"{old}attn_output.weight", f"{new}self_attn.o_proj.weight", shape)
        yield _Part(f"{old}ffn_norm.weight", f"{new}post_attention_layernorm.weight", (hidden,))
        for name, shape in (
            ("gate", (inner, hidden)),
            ("up", (inner, hidden)),
            ("down", (hidden, inner)),
        ):
            yield _Part(f"{old}ffn_{name}.weight", f"{new}mlp.{name}_proj.weight", shape)
    yield _Part("output_norm.weight", "model.norm.weight", (hidden,))
    if not config["tie_word_embeddings"]:
        yield _Part("output.weight", "lm_head.weight", (rows, hidden))


class _Weights:
    """The file model.safetensors, which is written tensor by tensor."""

    def __init__(self, file: GGUFFile, parts: Sequence[_Part], dtype: Kind) -> None:
        self.file, self.parts, self.dtype = file, parts, dtype

    def write(self, target: IO[bytes]) -> None:
        name, size = KINDS[self.dtype]
        # transformers reads no file that does not say whose layout it has.
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for part in self.parts:
            start, end = end, end + math.prod(part.shape) * size
            offsets = [start, end]
            header[part.name] = {"dtype": name, "shape": part.shape, "data_offsets": offsets}
        told = json.dumps(header, separators=(",", ":")).encode()
        told += b" " * (-len(told) % 8)
        target.write(struct.pack("<Q", len(told)) + told)
        for part in self.parts:
            target.write(self.bytes_of(part))

    def bytes_of(self, part: _Part) -> bytes:
        x = self.file.read(part.source)
        if part.heads is not None:
            # Rows of a head: pairs of rotary positions beside each other, to halves.
            x = x.reshape(part.heads, -1, 2, x.shape[-1]).swapaxes(1, 2).reshape(part.shape)
        if self.dtype == "bfloat16":
            import ml_dtypes

            with np.errstate(all="ignore"):
                x = x.astype(ml_dtypes.bfloat16)
        return x.tobytes()


def _write_tokenizer(folder: Path, files: TokenizerFiles) -> None:
    content = files.tokenizer.encode()
    write_whole(folder / "tokenizer.json", lambda file: file.write(content))
    write_json(folder / "tokenizer_config.json", files.config)
    write_json(folder / "generation_config.json", files.generation)
