"""config.json of the Llama, Qwen2 and Qwen3 architectures: to a configuration, and back.

Settings are read as versions 4 and 5 of transformers write them. What would change results and is not
supported here is refused by name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.models import config_json as fields
from experiments.models.decoder_parts import RopeScaling
from experiments.models.transformer import TransformerConfig
from experiments.run.errors import UsageError, suggestion

# Architectures, and the settings whose defaults are not those of Llama.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "Qwen2ForCausalLM": {"num_key_value_heads": 32},
    "Qwen3ForCausalLM": {"num_key_value_heads": 32, "head_dim": 128},
}
ROPE_TYPES = ("linear", "llama3")
MOST_POSITIONS = 2**31 - 1
# Settings that other models have: any value but these would change what the model computes.
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, 1.0, None),
}


def config_of(told: Mapping[str, Any]) -> TransformerConfig:
    """The shape of a model from its config.json.

    Args:
        told: the settings as transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters) has them.

    Raises:
        UsageError: for an architecture or a setting that is not supported, a size that is missing, and a
            field of a wrong type or out of its range; in one sentence with the field and its value.

    Example:
        >>> told = dict(architectures=["Qwen2ForCausalLM"], vocab_size=7, hidden_size=8,
        ...             intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        ...             num_key_value_heads=2, rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
        >>> config = config_of(told)
        >>> config.qkv_bias, config.kv_heads, config.rope_theta
        (True, 2, 1000000.0)
    """
    names = fields.texts(told, "architectures")
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        raise UsageError(
            f"config.json: architectures {fields.shown(names)} is not supported; "
            f"one of {', '.join(ARCHITECTURES)} is" + suggestion(names[0], ARCHITECTURES)
        )
    told = {**ARCHITECTURES[names[0]], **told}
    _check_only(told)
    if told.get("layer_types") is not None:
        layers = fields.texts(told, "layer_types")
        if set(layers) != {"full_attention"}:
            raise UsageError(
                f"config.json: layer_types {fields.shown(layers)} must all be 'full_attention'"
            )
    theta, scaling = _rope(told)
    size = lambda name, most=fields.MOST: fields.whole(told, name, most=most)
    heads = fields.MOST_HEADS
    found: dict[str, Any] = {
        "vocab_size": size("vocab_size"),
        "hidden_size": size("hidden_size"),
        "intermediate_size": size("intermediate_size"),
        "num_hidden_layers": size("num_hidden_layers", fields.MOST_LAYERS),
        "num_attention_heads": size("num_attention_heads", heads),
    }
    most = {
        "num_key_value_heads": heads,
        "head_dim": heads,
        "max_position_embeddings": MOST_POSITIONS,
    }
    for name, limit in most.items():
        if told.get(name) is not None:
            found[name] = size(name, limit)
    # A mean square is of the order of 1.
    if "rms_norm_eps" in told:
        found["rms_norm_eps"] = fields.number(told, "rms_norm_eps", most=1.0)
    if "initializer_range" in told:
        found["initializer_range"] = fields.number(told, "initializer_range", least=0.0)
    if "tie_word_embeddings" in told:
        found["tie_word_embeddings"] = fields.flag(told, "tie_word_embeddings")
    try:
        return TransformerConfig(
            **found,
            rope_theta=theta,
            rope_scaling=scaling,
            qkv_bias=names[0] == "Qwen2ForCausalLM",
            qk_norm=names[0] == "Qwen3ForCausalLM",
        )
    except ValueError as error:
        raise UsageError(f"config.json: {error}") from error


def _check_only(told: Mapping[str, Any], within: str = "") -> None:
    """Refuses what would change the model and is not supported."""
    for name, right in ONLY.items():
        # By type too: 1 equals True, which is no factor.
        if name in told and not any(
            told[name] == one and type(told[name]) is type(one) for one in right
        ):
            field = f"{within}.{name}" if within else name
            raise UsageError(
                f"config.json: {field} {fields.shown(told[name])} is not supported; {right[0]!r} is"
            )


def _rope(told: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """The base of rotary positions and how they are stretched, from either form."""
    forms = {name: fields.nested(told, name) for name in ("rope_scaling", "rope_parameters")}
    within = "rope_scaling" if forms["rope_scaling"] else "rope_parameters"
    form = forms[within]
    theta = 10000.0
    if "rope_theta" in form:
        theta = fields.number(form, "rope_theta", least=1.0, within=within)
    elif "rope_theta" in told:
        theta = fields.number(told, "rope_theta", least=1.0)
    factor = {name: form[name] for name in ("partial_rotary_factor",) if name in form}
    _check_only(factor, within)
    kind = "default"
    for name in ("rope_type", "type"):  # the second is the older
        if name in form:
            kind = fields.text(form, name, within)
            break
    if kind == "default":
        return theta, None
    if kind not in ROPE_TYPES:
        raise UsageError(
            f"config.json: {within}.{name} {fields.shown(kind)} is not supported; 'default', "
            f"{' and '.join(map(repr, ROPE_TYPES))} are"
        )
    found: dict[str, Any] = {"factor": fields.number(form, "factor", within=within)}
    for name in ("low_freq_factor", "high_freq_factor"):
        if name in form:
            found[name] = fields.number(form, name, within=within)
    name = "original_max_position_embeddings"
    if name in form:
        found[name] = fields.whole(form, name, most=MOST_POSITIONS, within=within)
    elif kind == "llama3" and "max_position_embeddings" in told:
        found[name] = fields.whole(told, "max_position_embeddings", most=MOST_POSITIONS)
    try:
        return theta, RopeScaling(rope_type=kind, **found)
    except ValueError as error:
        raise UsageError(f"config.json: {within}: {error}") from error


def settings_of(config: TransformerConfig, dtype: str, source: Mapping[str, Any]) -> dict[str, Any]:
    """config.json in the form of transformers 4, which version 5 reads too."""
    if config.qkv_bias and config.qk_norm:
        raise UsageError(
            "a config with both qkv_bias and qk_norm is that of no architecture of Hugging Face: "
            f"{', '.join(ARCHITECTURES)} are supported"
        )
    family = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"
    dropped = ("rope_parameters", "dtype", "torch_dtype")
    told = {k: v for k, v in source.items() if k not in dropped}
    told |= dataclasses.asdict(config)
    del told["qkv_bias"], told["qk_norm"]
    if config.max_position_embeddings is None:
        del told["max_position_embeddings"]
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type == "linear":
        told["rope_scaling"] = {"rope_type": "linear", "factor": scaling.factor}
    architecture = f"{family.capitalize()}ForCausalLM"
    return told | {
        "architectures": [architecture],
        "model_type": family,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.width,
        "hidden_act": "silu",
        "torch_dtype": dtype,
    }
