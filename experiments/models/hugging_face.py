"""Checkpoints in the layout of Hugging Face: a folder with config.json and safetensors, in and out.

`llama_config` reads and writes config.json. Matrices are transposed to ``[inputs, outputs]`` and those of
all layers stacked; `save` goes back. Pickled checkpoints are not read.
"""

import math
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from eggroll.plan import leaf_paths
from experiments.models.config_json import read_json
from experiments.models.importing import (
    SMOLLM2,
    check_gguf,
    folder_of_gguf,
    folder_of_smollm2,
    is_gguf,
)
from experiments.models.llama_config import config_of, settings_of
from experiments.models.names import of_hub
from experiments.models.transformer import Params, TransformerConfig, init
from experiments.run.errors import UsageError
from experiments.run.folder import full_disk_in_one_sentence, write_json, write_whole

# What goes along with a model: its tokenizer's files, and how it wants to be sampled.
COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "added_tokens.json", "generation_config.json"),
)
ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
TYPES = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}


def resolve(name: str) -> Path:
    """The folder of a model: a local one as it is, a copy of a repository of the hub, or that which a GGUF
    file is converted to.

    Args:
        name: a folder, a GGUF file, "smollm2" where it was imported, or "OWNER/NAME" on the Hugging Face hub.

    Raises:
        UsageError: if it is none of these, the hub does not give it, or the file is not supported.
    """
    if Path(name).is_dir():
        return Path(name)
    if is_gguf(name):
        check_gguf(name, name)
        return folder_of_gguf(Path(name))
    if name == SMOLLM2:
        return folder_of_smollm2()
    if not of_hub(name):
        raise UsageError(f"{name} is no folder, nor OWNER/NAME of the Hugging Face hub")
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{name} is no folder, and to fetch it from the hub the package {error.name!r} is missing: "
            "pip install huggingface_hub"
        ) from error
    # Over a network the package, and those under it, raise errors of many types.
    except Exception as error:
        reason = textwrap.shorten(str(error).strip().split("\n")[0], 200, placeholder=" ...")
        raise UsageError(
            f"{name} is no folder, and the Hugging Face hub does not give it ({type(error).__name__}: "
            f"{reason}); connect this machine, or name a folder with config.json and safetensors"
        ) from error


def load(
    folder: Path, dtype: DTypeLike | None = None, on_host: bool = False
) -> tuple[TransformerConfig, Params]:
    """A model of the Llama, Qwen2 or Qwen3 architecture.

    Args:
        folder: with config.json, and model.safetensors or shards with their index.
        dtype: of all parameters; by default that of the file, float32 where layers differ.
        on_host: gives arrays of NumPy; else they lie on the first device.

    Raises:
        UsageError: for a file that is absent or damaged, a setting that is not supported, a tensor that
            is missing, left over or of another shape.
    """
    told = read_json(folder / "config.json")
    try:
        config = config_of(told)
    except UsageError as error:
        raise UsageError(f"{folder}: {error}") from error
    files, wanted = _opened(folder), list(_tensors(config))
    for one in wanted:
        _check(folder, files, one)
    _check_rest(folder, files, {one.name for one in wanted}, config)
    params = _gather(files, wanted, dtype)
    return config, params if on_host else jax.tree.map(jnp.asarray, params)


def save(
    folder: Path,
    config: TransformerConfig,
    params: Params,
    *,
    source: Path | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a model so that `load` and transformers read it.

    A model that is there already is replaced. config.json goes first and comes last: a folder that was
    left unfinished has none, and is not read.

    Args:
        folder: made if it is not there.
        config: of the parameters.
        params: in float32, bfloat16 or float16.
        source: the folder that the model was loaded from: its tokenizer, and settings that say nothing
            about shapes (end tokens, context), go along.
        shard_bytes: size of a file from which on another is begun.

    Raises:
        UsageError: for parameters that are not of the config, or are quantised, and for a config that
            no architecture has.
        RunError: if it cannot be written.

    Example:
        >>> import tempfile
        >>> config = TransformerConfig(vocab_size=7, hidden_size=8, intermediate_size=12,
        ...                            num_hidden_layers=2, num_attention_heads=2)
        >>> params = init(jax.random.key(0), config)
        >>> with tempfile.TemporaryDirectory() as name:
        ...     save(Path(name), config, params)
        ...     again, loaded = load(Path(name))
        >>> again.hidden_size, bool((loaded["lm_head"] == params["lm_head"]).all())
        (8, True)
    """
    told = {} if source is None else read_json(source / "config.json")
    told = settings_of(config, _check_params(config, params), told)
    shards = _shards(config, params, shard_bytes)
    names = [ONE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    with full_disk_in_one_sentence(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
        for old in (folder / INDEX, *folder.glob("model*.safetensors")):
            if old.name not in names:
                old.unlink(missing_ok=True)
        for name, shard in zip(names, shards, strict=True):
            _write_shard(folder / name, shard, params)
        if len(shards) > 1:
            files = zip(names, shards, strict=True)
            weight_map = {one.name: name for name, shard in files for one in shard}
            total = sum(one.bytes_in(params) for shard in shards for one in shard)
            write_json(
                folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
            )
        for name in COMPANIONS:
            if source is not None and source != folder and (source / name).exists():
                shutil.copyfile(source / name, folder / name)
    write_json(folder / "config.json", told)


# ---------------------------------------------------------------- the layout of tensors


class _Tensor(NamedTuple):
    """One tensor of a file: its name and shape there, and where it is in the parameters."""

    name: str
    shape: tuple[int, ...]
    key: str
    layer: int | None
    transposed: bool

    def leaf(self, params: Params) -> Any:
        return (params if self.layer is None else params["layers"])[self.key]

    def bytes_in(self, params: Params) -> int:
        return math.prod(self.shape) * self.leaf(params).dtype.itemsize


def _tensors(config: TransformerConfig) -> Iterator[_Tensor]:
    """All tensors of a model, layer by layer."""
    shapes = _shapes(config)

    def tensor(name: str, key: str, layer: int | None = None) -> _Tensor:
        one = _Tensor(name, (), key, layer, False)
        shape = one.leaf(shapes).shape[0 if layer is None else 1 :]
        transposed = len(shape) == 2 and key != "embed_tokens"
        return one._replace(shape=shape[::-1] if transposed else shape, transposed=transposed)

    yield tensor("model.embed_tokens.weight", "embed_tokens")
    for layer in range(config.num_hidden_layers):
        for key in shapes["layers"]:
            yield tensor(f"model.layers.{layer}.{_module(key)}", key, layer)
    yield tensor("model.norm.weight", "norm")
    if not config.tie_word_embeddings:
        yield tensor("lm_head.weight", "lm_head")


def _module(name: str) -> str:
    """``q_bias`` is ``self_attn.q_proj.bias``, and so on."""
    if name.endswith("layernorm"):
        return f"{name}.weight"
    part = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    if name.endswith("_bias"):
        return f"{part}.{name.removesuffix('_bias')}_proj.bias"
    return f"{part}.{name}.weight"


def _shapes(config: TransformerConfig) -> Params:
    return jax.eval_shape(lambda: init(jax.random.key(0), config))


# ---------------------------------------------------------------- reading


class _Files:
    """Safetensors files, and in which of them each tensor is."""

    def __init__(self, paths: list[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self.where: dict[str, Any] = {}
        for path in paths:
            try:
                file = safe_open(path, framework="np")
            except (OSError, SafetensorError) as error:
                raise UsageError(f"{path} is not a whole safetensors file: {error}") from error
            self.where |= dict.fromkeys(file.keys(), file)

    def read(self, name: str) -> np.ndarray:
        return self.where[name].get_tensor(name)

    def facts(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and type of a tensor, which is not read."""
        part = self.where[name].get_slice(name)
        return tuple(part.get_shape()), part.get_dtype()


def _opened(folder: Path) -> _Files:
    if (folder / ONE).exists():
        return _Files([folder / ONE])
    if not (folder / INDEX).exists():
        pickled = ", only pickled weights, which are not read" * any(folder.glob("*.bin"))
        raise UsageError(f"{folder} has no {ONE} and no {INDEX}{pickled}")
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UsageError(f"{folder / INDEX} has no weight_map from tensors to files")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise UsageError(f"{folder / INDEX} must name files of its folder, got {name!r}")
        if not (folder / name).exists():
            raise UsageError(f"{folder / INDEX} names {name}, which is absent")
    return _Files([folder / name for name in sorted(set(names.values()))])


def _check(folder: Path, files: _Files, one: _Tensor) -> None:
    if one.name not in files.where:
        raise UsageError(f"{folder} has no tensor {one.name}")
    shape, kind = files.facts(one.name)
    if shape != one.shape:
        raise UsageError(
            f"{folder}: {one.name} must have the shape {list(one.shape)} by config.json, got {list(shape)}"
        )
    if kind not in TYPES:
        raise UsageError(f"{folder}: {one.name} is of type {kind}; {', '.join(TYPES)} are read")


def _check_rest(folder: Path, files: _Files, wanted: set[str], config: TransformerConfig) -> None:
    # Tables of rotary frequencies, which older versions stored, follow from the config.
    rest = {k for k in files.where if k not in wanted and not k.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and "lm_head.weight" in rest:
        table, head = files.read("model.embed_tokens.weight"), files.read("lm_head.weight")
        if not np.array_equal(table, head):
            raise UsageError(
                f"{folder}: lm_head.weight differs from the embedding; they are one by "
                "tie_word_embeddings of config.json"
            )
        rest.remove("lm_head.weight")
    if rest:
        named = ", ".join(sorted(rest)[:5]) + ", ..." * (len(rest) > 5)
        raise UsageError(f"{folder} has tensors that the model does not ({len(rest)}): {named}")


def _gather(files: _Files, wanted: list[_Tensor], dtype: DTypeLike | None) -> Params:
    """The parameters, each stack filled layer by layer."""
    groups: dict[str, list[_Tensor]] = {}
    for one in wanted:
        groups.setdefault(one.key, []).append(one)
    params: Params = {"layers": {}}
    for key, parts in groups.items():
        kinds = {files.facts(one.name)[1] for one in parts}
        stored = TYPES[kinds.pop()] if len(kinds) == 1 else jnp.float32
        kind = stored if dtype is None else dtype
        stack = np.empty((len(parts), *parts[0].shape[:: -1 if parts[0].transposed else 1]), kind)
        for i, one in enumerate(parts):
            x = files.read(one.name)
            stack[i] = x.T if one.transposed else x
        if parts[0].layer is None:
            params[key] = stack[0]
        else:
            params["layers"][key] = stack
    return params


# ---------------------------------------------------------------- writing


def _check_params(config: TransformerConfig, params: Params) -> str:
    """The dtype of parameters that are the config's; of several, float32."""
    given, right = dict(leaf_paths(params)), dict(leaf_paths(_shapes(config)))
    if any(path.endswith("/int8") for path in given):
        raise UsageError("quantised parameters cannot be saved: this layout has floats alone")
    if given.keys() != right.keys():
        odd = ", ".join(sorted(given.keys() ^ right.keys()))
        raise UsageError(f"parameters and config do not fit: one of them alone has {odd}")
    kinds = {jnp.dtype(kind).name for kind in TYPES.values()}
    for path, leaf in right.items():
        shape, dtype = given[path].shape, given[path].dtype.name
        if shape != leaf.shape:
            raise UsageError(
                f"parameter {path} must have the shape {list(leaf.shape)} by the config, got {list(shape)}"
            )
        if dtype not in kinds:
            raise UsageError(
                f"parameter {path} must be one of {', '.join(sorted(kinds))}, got {dtype}"
            )
    found = {leaf.dtype.name for leaf in given.values()}
    return found.pop() if len(found) == 1 else "float32"


def _shards(config: TransformerConfig, params: Params, limit: int) -> list[list[_Tensor]]:
    """The tensors, in files of up to so many bytes, or of one tensor."""
    shards: list[list[_Tensor]] = [[]]
    room = limit
    for one in _tensors(config):
        size = one.bytes_in(params)
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(one)
        room -= size
    return shards


def _write_shard(path: Path, shard: list[_Tensor], params: Params) -> None:
    from safetensors.numpy import save as serialise

    def array(one: _Tensor) -> np.ndarray:
        leaf = one.leaf(params)
        x = np.asarray(leaf if one.layer is None else leaf[one.layer])
        return np.ascontiguousarray(x.T if one.transposed else x)

    # transformers reads no file that does not say whose layout it has.
    content = serialise({one.name: array(one) for one in shard}, metadata={"format": "pt"})
    write_whole(path, lambda file: file.write(content))
