"""A family of language models in one file, as CONTRIBUTING.md has it: a decoder with learned positions."""

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from eggroll.plan import Planner
from experiments.models import plain_files, plans, tokens
from experiments.models.decoder_parts import attend, rms_norm
from experiments.models.family import Family, Params
from experiments.models.parallel import ShardingRules
from experiments.models.quantised import linear, look_up

NAME = "toy"
EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """The shape of a decoder.

    Attributes:
        vocab_size: tokens that there are.
        width: of the residual stream.
        layers: blocks of attention and MLP.
        heads: of attention; a divisor of width.
        context: tokens of a text at most.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int = 2
    context: int = 256

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")


def small(vocab_size: int, width: int, layers: int) -> ToyConfig:
    """A new model."""
    if width % 2:
        raise ValueError("it is divided among 2 heads, so choose an even width")
    return ToyConfig(vocab_size=vocab_size, width=width, layers=layers)


class Cache(NamedTuple):
    """What is kept of a sequence.

    Attributes:
        keys: [layers, slots, heads, head width].
        values: of the same shape.
        length: tokens of the prompt.
    """

    keys: Array
    values: Array
    length: Array


def init(key: Key[Array, ""], config: ToyConfig) -> Params:
    """Normal matrices and norms of 1, in float32."""
    width, depth = config.width, config.layers
    matrices = {
        **{name: (width, width) for name in ("query", "key", "value", "out")},
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    keys = iter(jax.random.split(key, len(matrices) + 3))
    normal = lambda *shape: 0.02 * jax.random.normal(next(keys), shape)
    layers = {name: normal(depth, *shape) for name, shape in matrices.items()}
    return {
        "tokens": normal(config.vocab_size, width),
        "positions": normal(config.context, width),
        "layers": {**layers, **{name: jnp.ones((depth, width)) for name in ("norm_1", "norm_2")}},
        "norm": jnp.ones(width),
        "head": normal(width, config.vocab_size),
    }


def apply(
    params: Params,
    tokens: Int[Array, "length"],
    config: ToyConfig,
    at: Int[Array, "kept"] | None = None,
    remat: bool = False,
) -> Float[Array, "kept vocab"]:
    """Logits of the token after each, or after those at some places."""
    cache = _empty(params, tokens.size, config)
    x, _ = _read(params, tokens, jnp.int32(0), cache, config, remat)
    return _logits(params, x if at is None else x[at])


def prefill(
    params: Params,
    tokens: Int[Array, "prompt_slots"],
    length: int | Int[Array, ""],
    config: ToyConfig,
    slots: int,
    prefix: Cache | None = None,
) -> tuple[Float[Array, "vocab"], Cache]:
    """Reads a prompt. What is written after it takes the slots of its padding first."""
    cache, before = _empty(params, slots, config), jnp.int32(0)
    if prefix is not None:
        # Every sequence has a copy of what they share.
        cache = jax.tree.map(
            lambda p, x: jnp.concatenate([p, x], 1) if x.ndim else p, prefix, cache
        )
        before = prefix.length
    x, cache = _read(params, tokens, before, cache, config)
    return _logits(params, x[length - 1]), cache._replace(
        length=before + jnp.asarray(length, jnp.int32)
    )


def decode(
    params: Params,
    cache: Cache,
    token: Int[Array, ""],
    t: int | Int[Array, ""],
    config: ToyConfig,
    prefix: Cache | None = None,
) -> tuple[Float[Array, "vocab"], Cache]:
    """Reads one token; what comes before the prompt is in the cache."""
    x, cache = _read(params, token[None], cache.length + t, cache, config)
    return _logits(params, x[0]), cache


def _empty(params: Params, slots: int, config: ToyConfig) -> Cache:
    if slots > config.context:
        raise ValueError(f"a text of {slots} tokens is longer than the context {config.context}")
    shape = (config.layers, slots, config.heads, config.width // config.heads)
    zeros = jnp.zeros(shape, params["norm"].dtype)
    return Cache(zeros, zeros, jnp.int32(0))


def _read(
    params: Params,
    tokens: Int[Array, "new"],
    start: Array,
    cache: Cache,
    config: ToyConfig,
    remat: bool = False,
) -> tuple[Float[Array, "new width"], Cache]:
    """Reads tokens into the slots of a cache from ``start`` on; what the last layer says of each."""
    dtype, places = params["norm"].dtype, start + jnp.arange(tokens.size)
    visible: Bool[Array, "new slots"] = jnp.arange(cache.keys.shape[1]) <= places[:, None]

    def block(x: Array, scanned: tuple[Params, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        layer, keys, values = scanned
        y = rms_norm(x, layer["norm_1"], EPS)
        heads = lambda name: linear(y, layer[name]).reshape(len(y), config.heads, -1)
        keys = lax.dynamic_update_slice(keys, heads("key"), (start, 0, 0))
        values = lax.dynamic_update_slice(values, heads("value"), (start, 0, 0))
        seen = attend(heads("query"), keys, values, visible)
        x = x + linear(seen.reshape(x.shape), layer["out"])
        y = rms_norm(x, layer["norm_2"], EPS)
        return x + linear(jax.nn.gelu(linear(y, layer["up"])), layer["down"]), (keys, values)

    x = look_up(params["tokens"], tokens, dtype) + look_up(params["positions"], places, dtype)
    block = jax.checkpoint(block, prevent_cse=False) if remat else block
    x, (keys, values) = lax.scan(block, x, (params["layers"], cache.keys, cache.values))
    return x, cache._replace(keys=keys, values=values)


def _logits(params: Params, x: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
    return linear(rms_norm(x, params["norm"], EPS), params["head"])


def _group(path: str) -> plans.Group:
    if path in ("tokens", "positions"):
        return "embeddings"
    if path == "head":
        return "head"
    return "vectors" if "norm" in path else "matrices"


def plan(train: Collection[str], steps: Mapping[str, float] | None) -> Planner:
    """Which parameters are trained, and by which noise."""
    return plans.by_group(_group, train, steps)


def output_axis(path: str) -> int | None:
    """Matrices have a scale for each output, the table of tokens one for each row."""
    if path == "tokens":
        return -1
    return -2 if path == "head" or _group(path) == "matrices" else None


def save(folder: Path, config: ToyConfig, params: Params, source: Path | None) -> None:
    """Writes the model, with the tokenizer of the source."""
    plain_files.save(folder, NAME, config, params)
    if source is not None:
        tokens.from_folder(source).save(folder)


FAMILY = Family(
    name=NAME,
    config=ToyConfig,
    small=small,
    init=init,
    apply=apply,
    prefill=prefill,
    decode=decode,
    plan=plan,
    output_axis=output_axis,
    sharding=ShardingRules(
        by_output=("query", "key", "value", "up", "head", "tokens", "positions"),
        by_input=("out", "down"),
        tables=("tokens",),
        caches={"keys": 2, "values": 2},
    ),
    model_types=(NAME,),
    load=functools.partial(plain_files.load, NAME, ToyConfig, init),
    save=save,
)
