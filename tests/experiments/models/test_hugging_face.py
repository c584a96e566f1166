"""Folders of Hugging Face: against transformers, both ways, and what is wrong with a folder is said."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from experiments.models.hugging_face import load, resolve, save
from experiments.models.llama_config import config_of
from experiments.models.quantised import quantise
from experiments.models.transformer import (
    TransformerConfig,
    apply,
    decode,
    init,
    output_axis,
    prefill,
)
from experiments.run.errors import UsageError

SMALL = dict(
    vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=1000.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
# Hugging Face's class, and settings of its own.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", dict(head_dim=6)),
    "llama-tied-stretched": ("Llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "qwen2": ("Qwen2", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e6, factor=2.0))),
    "qwen3-tied": (
        "Qwen3",
        dict(head_dim=10, num_key_value_heads=1, tie_word_embeddings=True),
    ),
}
TEXT = np.random.default_rng(0).integers(0, 23, (2, 9))


def theirs(case: str) -> Any:
    """A model of transformers with random weights, biases and norms."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    family, settings = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **settings})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for one in model.parameters():
            one += 0.3 * torch.randn(one.shape)
    return model.eval()


def logits_of(model: Any, text: np.ndarray) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor(text)).logits.float().numpy()


def reread(folder: Path) -> Any:
    return pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(folder)


def ours(folder: Path) -> tuple[TransformerConfig, Any]:
    """A folder of a small Qwen2, written by `save`."""
    shape = {k: v for k, v in SMALL.items() if k != "max_position_embeddings"}
    config = TransformerConfig(**shape, qkv_bias=True, rope_theta=1e6)
    params = init(jax.random.key(0), config)
    save(folder, config, params)
    return config, params


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    told = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in told.items() if v is not ...}))


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    model = theirs(case)
    model.save_pretrained(tmp_path)
    config, params = load(tmp_path)
    logits = jax.jit(apply, static_argnums=2)(params, TEXT, config)
    np.testing.assert_allclose(logits, logits_of(model, TEXT), atol=1e-4)

    @jax.jit
    def write(prompt: Any) -> Any:
        def one(carry: Any, t: Any) -> Any:
            logits, cache = carry
            return decode(params, cache, logits.argmax(), t, config), logits.argmax()

        begun = prefill(params, prompt, 4, config, slots=6 + 8)
        return jax.lax.scan(one, begun, jnp.arange(8))[1]

    text = TEXT[:1, :4]
    for _ in range(8):
        best = logits_of(model, text)[:, -1:].argmax(-1)
        text = np.concatenate([text, best], axis=1)
    np.testing.assert_array_equal(write(TEXT[0, :6]), text[0, 4:])


@pytest.mark.parametrize("case", ["llama-tied-stretched", "qwen2", "qwen3-tied"])
def test_transformers_reads_what_is_saved(case: str, tmp_path: Path) -> None:
    model = theirs(case)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="4KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    config, params = load(tmp_path / "theirs")
    right = logits_of(model, TEXT)
    for name, limit in (("one", 10**9), ("shards", 4000)):
        save(tmp_path / name, config, params, shard_bytes=limit)
        files = list((tmp_path / name).glob("*.safetensors"))
        assert len(files) == 1 if name == "one" else len(files) > 2
        assert name == "one" or all(file.stat().st_size < 4000 + 2000 for file in files)
        np.testing.assert_allclose(logits_of(reread(tmp_path / name), TEXT), right, atol=1e-6)
        again = load(tmp_path / name)
        assert again[0] == dataclasses.replace(config, head_dim=config.width)
        jax.tree.map(np.testing.assert_array_equal, again[1], params)


def test_settings_of_transformers_4_are_those_of_5(tmp_path: Path) -> None:
    model = theirs("llama-tied-stretched")
    model.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    assert "rope_theta" not in told  # it is in the form of version 5
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    older = {k: v for k, v in told.items() if k not in ("rope_parameters", "dtype")}
    older |= {"rope_theta": 1000.0, "rope_scaling": scaling, "torch_dtype": "float32"}
    assert config_of(older) == config_of(told)
    assert config_of(told).rope_theta == 1000 and config_of(told).rope_scaling.factor == 4
    # Still older ones say "type".
    linear = {**older, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert config_of(linear).rope_scaling.rope_type == "linear"


def test_a_narrow_type_is_kept_or_widened(tmp_path: Path) -> None:
    config, params = ours(tmp_path)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    save(tmp_path, config, half)
    again, wide = load(tmp_path)[1], load(tmp_path, jnp.float32)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(again)} == {np.dtype(ml_dtypes.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {np.dtype("float32")}
    jax.tree.map(np.testing.assert_array_equal, again, half)
    jax.tree.map(np.testing.assert_array_equal, wide, half)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_saving_replaces_a_model_and_takes_companions_along(tmp_path: Path) -> None:
    config, params = ours(tmp_path / "base")
    edit(tmp_path / "base", eos_token_id=7, rope_parameters={"rope_theta": 5.0})
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    target = tmp_path / "tuned"
    save(target, config, params, shard_bytes=4000)
    doubled = jax.tree.map(lambda x: 2 * x, params)
    save(target, config, doubled, source=tmp_path / "base")
    names = {file.name for file in target.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}
    again, loaded = load(target)
    assert again.rope_theta == 1e6
    jax.tree.map(np.testing.assert_array_equal, loaded, doubled)
    assert json.loads((target / "config.json").read_text())["eos_token_id"] == 7


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(architectures=["MistralForCausalLM"]), "Mistral.* is not supported; one of LlamaForCausalLM,"),
        (dict(hidden_size=...), "hidden_size is missing; it must be a whole number from 1"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu' is not supported; 'silu' is"),
        (dict(mlp_bias=True), "mlp_bias True is not supported; False is"),
        (dict(attention_bias=True), "attention_bias True is not supported"),
        (dict(use_sliding_window=True), "use_sliding_window True is not supported"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types .* must all be"),
        (dict(quantization_config={"bits": 4}), "quantization_config {'bits': 4} is not supported"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5 is not supported; 1 is"),
        (dict(rope_scaling={"partial_rotary_factor": 0.5}), "partial_rotary_factor 0.5 is not"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope_type 'yarn' is not supported"),
        (dict(rope_scaling="linear"), "rope_scaling 'linear' must be an object or null"),
        (dict(rope_scaling={"rope_type": "linear"}), "rope_scaling.factor is missing; it must be a number"),
        (dict(num_key_value_heads=3), "num_attention_heads 4 is no multiple of num_key_value"),
        (dict(intermediate_size=25), r"layers.0.mlp.down_proj.weight must have the shape \[16, 25\] by config.json, got \[16, 24\]"),
        (dict(num_hidden_layers=3), "has no tensor model.layers.2."),
        (dict(num_hidden_layers=1), r"tensors that the model does not \(12\): model.layers.1.input"),
        (dict(architectures=["LlamaForCausalLM"]), r"\(6\): model.layers.0.self_attn.k_proj.bias, "),
        (dict(tie_word_embeddings=True), "lm_head.weight differs from the embedding"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_named(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    ours(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(UsageError, match=words):
        load(tmp_path)


LISTED = float("nan"), float("inf"), -1, 10**400, "1", True, [1], {"a": 1}
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
WHOLE = (*LISTED, 0, 2.0, 2**40)
LINEAR, STRETCHED = {"rope_type": "linear", "factor": 2.0}, {**LLAMA3}
# A field, and values that JSON may hold there and that are not right.
FIELDS: list[tuple[str, tuple[Any, ...]]] = [
    *((name, (*WHOLE, None)) for name in SIZES),
    ("num_key_value_heads", WHOLE),
    ("head_dim", WHOLE),
    ("rms_norm_eps", (*LISTED, 0, 2.0, None)),
    ("rope_theta", (*LISTED, 0, 0.5, 1e40, None)),
    ("initializer_range", (*LISTED, 1e40, None)),
    ("tie_word_embeddings", (0, 1, "true", None, [True], {})),
    ("architectures", ("LlamaForCausalLM", None, [], [1], [["LlamaForCausalLM"]], {}, 5, True)),
    ("layer_types", ("full_attention", [], [1], [["full_attention"]], {}, 5, True)),
    ("hidden_act", (None, 1, ["silu"], {}, True)),
    ("attention_bias", (0, 1, "false", [], {})),
    ("mlp_bias", (0, 1, "false", [], {})),
    ("use_sliding_window", (0, 1, "false", [], {})),
    ("quantization_config", ({}, [], False, "")),
    ("partial_rotary_factor", (*LISTED[:-3], True, [1], 0.5)),
    ("rope_scaling", (0, 1, "", "linear", [], [LINEAR], False, True, float("nan"))),
    ("rope_parameters", (0, 1, "", "linear", [], [LINEAR], False, True, float("nan"))),
]  # fmt: skip
NESTED: list[tuple[str, dict[str, Any], tuple[Any, ...]]] = [
    ("rope_theta", LINEAR, (*LISTED, 0, 0.5, None)),
    ("factor", LINEAR, (*LISTED, 0, None, ...)),
    ("rope_type", LINEAR, (None, 1, ["linear"], {}, True, "yarn")),
    ("type", {"factor": 2.0}, (None, 1, ["linear"], {}, True, "yarn")),
    ("partial_rotary_factor", LINEAR, (*LISTED[:-3], True, [1], 0.5)),
    ("low_freq_factor", STRETCHED, (*LISTED, 0, None, 5.0)),
    ("high_freq_factor", STRETCHED, (*LISTED, 0, None, 0.5)),
    ("original_max_position_embeddings", STRETCHED, (*WHOLE, None)),
]


def llama() -> dict[str, Any]:
    """Settings that are right."""
    return {**SMALL, "architectures": ["LlamaForCausalLM"]}


def refused(name: str, told: dict[str, Any]) -> str:
    """The sentence about config.json, after it went through a file."""
    with pytest.raises(UsageError) as error:
        config_of(json.loads(json.dumps(told)))
    sentence = str(error.value)
    assert sentence.startswith("config.json: ")
    assert name in sentence and len(sentence) < 400
    assert "not supported between" not in sentence
    return sentence


@pytest.mark.parametrize(("name", "values"), FIELDS, ids=[name for name, _ in FIELDS])
def test_fields_of_config_json_are_checked(name: str, values: tuple[Any, ...]) -> None:
    told = llama()
    config_of(told)
    for value in values:
        refused(name, {**told, name: value})


@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(("name", "right", "values"), NESTED, ids=[name for name, *_ in NESTED])
def test_fields_within_rope_scaling_are_checked(
    name: str, right: dict[str, Any], values: tuple[Any, ...], form: str
) -> None:
    told = llama()
    for value in values:
        inner = {k: v for k, v in {**right, name: value}.items() if v is not ...}
        sentence = refused(name, {**told, form: inner})
        assert form in sentence
    without = {k: v for k, v in STRETCHED.items() if k != "original_max_position_embeddings"}
    for value in (*WHOLE, None):
        wrong = {**told, "max_position_embeddings": value, form: without}
        refused("max_position_embeddings", wrong)


def test_a_sentence_has_the_field_the_value_and_what_is_right() -> None:
    told = llama()
    cases: list[tuple[dict[str, Any], str]] = [
        (dict(rms_norm_eps="1e-5"), "rms_norm_eps '1e-5' must be a number from 1e-18 to 1"),
        (dict(head_dim=10**400), "head_dim (a number of 1329 bits) must be a whole number from 1 to 4096"),
        (dict(tie_word_embeddings="no"), "tie_word_embeddings 'no' must be true or false"),
        (dict(rope_scaling={**LINEAR, "factor": "2"}), "rope_scaling.factor '2' must be a number from 1e-18 to 1e+18"),
        (dict(rope_theta=[1e4]), "rope_theta [10000.0] must be a number from 1 to 1e+18"),
    ]  # fmt: skip
    for changes, sentence in cases:
        assert refused("", {**told, **changes}) == f"config.json: {sentence}"


def test_what_config_json_may_hold_is_taken() -> None:
    told = llama()
    taken: list[dict[str, Any]] = [
        dict(rms_norm_eps=1e-6, rope_theta=500000, tie_word_embeddings=True, initializer_range=0),
        dict(head_dim=None, num_key_value_heads=None, rope_scaling=None, rope_parameters=None),
        dict(
            rope_scaling={}, layer_types=None, partial_rotary_factor=1.0, quantization_config=None
        ),
        dict(attention_bias=None, layer_types=["full_attention"] * 2, use_sliding_window=False),
    ]
    for changes in taken:
        config_of({**told, **changes})


@pytest.mark.slow
def test_the_largest_sizes_end_in_a_sentence(tmp_path: Path) -> None:
    ours(tmp_path)
    edit(
        tmp_path, vocab_size=2**24, hidden_size=2**24, intermediate_size=2**24, head_dim=2**12,
        num_attention_heads=2**12, num_key_value_heads=2**12, num_hidden_layers=10_000,
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"embed_tokens.weight must have the shape \[16777"):
        load(tmp_path)


def test_config_json_that_is_no_json_is_named(tmp_path: Path) -> None:
    ours(tmp_path)
    for content in (b"\xff\xfe{", b"[" * 10**5, b'{"a": ' + b"9" * 5000 + b"}", b"", b"\0"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(UsageError, match="config.json cannot be read as JSON"):
            load(tmp_path)
    for text in ("[]", "5", "null", '"x"', "NaN"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UsageError, match="config.json must hold a JSON object, got"):
            load(tmp_path)


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    refused = lambda words: pytest.raises(UsageError, match=words)
    with refused("is not a folder of a model: it has no config.json"):
        load(tmp_path)
    config, params = ours(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for part in (whole[:-1], whole[:100], b""):
        file.write_bytes(part)
        with refused("model.safetensors is not a whole safetensors file"):
            load(tmp_path)
    file.rename(tmp_path / "pytorch_model.bin")
    with refused("has no model.safetensors and no .*, only pickled weights, which are not read"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with refused("config.json cannot be read as JSON"):
        load(tmp_path)

    shards = tmp_path / "shards"
    save(shards, config, params, shard_bytes=4000)
    second = sorted(shards.glob("*.safetensors"))[1]
    second.unlink()
    with refused(f"names {second.name}, which is absent"):
        load(shards)
    index = {"weight_map": {"norm": "../elsewhere.safetensors"}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused("must name files of its folder, got '../elsewhere.safetensors'"):
        load(shards)


def test_rotary_tables_and_a_copy_of_a_tied_embedding_are_no_harm(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    ours(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    save_file(tensors, file)
    edit(tmp_path, tie_word_embeddings=True)
    assert "lm_head" not in load(tmp_path)[1]
    tensors["model.norm.weight"] = np.ones(16, np.int32)
    save_file(tensors, file)
    with pytest.raises(UsageError, match="model.norm.weight is of type I32; F32, F16, BF16 are"):
        load(tmp_path)


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    config, params = ours(tmp_path)
    before = sorted((file.name, file.read_bytes()) for file in tmp_path.iterdir())
    both = TransformerConfig(hidden_size=16, num_attention_heads=4, qkv_bias=True, qk_norm=True)
    small = {**params, "norm": jnp.ones(3)}
    few = {k: v for k, v in params.items() if k != "norm"}
    for wrong, words in [
        ((config, quantise(params, output_axis)), "quantised parameters cannot be saved"),
        ((config, small), r"parameter norm must have the shape \[16\] by the config, got \[3\]"),
        ((config, few), "one of them alone has norm"),
        (
            (config, {**params, "norm": jnp.ones(16, int)}),
            "parameter norm must be one of bfloat16, float16, float32, got int32",
        ),
    ]:
        with pytest.raises(UsageError, match=words):
            save(tmp_path, *wrong)
    with pytest.raises(UsageError, match="both qkv_bias and qk_norm is that of no architecture"):
        save(tmp_path, both, jax.eval_shape(lambda: init(jax.random.key(0), both)))
    assert before == sorted((file.name, file.read_bytes()) for file in tmp_path.iterdir())


def test_names_are_folders_first_then_repositories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name == "a/b":
            return str(tmp_path)
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert resolve(str(tmp_path)) == tmp_path and not asked
    assert resolve("a/b") == tmp_path
    assert asked == [("a/b", ["*.json", "*.safetensors", "*.jinja"])]
    with pytest.raises(
        UsageError, match=r"the Hugging Face hub does not give it \(ConnectionError: no"
    ):
        resolve("a/c")
    with pytest.raises(UsageError, match="/nowhere is no folder, nor OWNER/NAME"):
        resolve("/nowhere")
