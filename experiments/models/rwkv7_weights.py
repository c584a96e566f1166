"""RWKV-7 from and to files: the tensors of a published checkpoint, in safetensors or a .pth.

Names and shapes in files are those of the published .pth files, so that others read them too: a matrix
that is applied as ``x W^T`` is [outputs, inputs], token shifts and the like are [1, 1, hidden], and every
layer has tensors of its own. Layer 0 may have v0, v1 and v2, which nothing uses: they are not kept.
"""

import dataclasses
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from experiments.models import config_json as fields
from experiments.models.config_json import read_json
from experiments.models.rwkv7 import Params, RWKV7Config, init
from experiments.run.errors import UsageError
from experiments.run.folder import write_json, write_whole

MODEL_TYPE = "rwkv7"
UNUSED = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")
LINEAR = ("receptance", "key", "value", "output", "head")


def load(
    path: Path, dtype: DTypeLike | None = None, on_host: bool = False
) -> tuple[RWKV7Config, Params]:
    """A model from a folder that :func:`save` or :func:`convert_pth` wrote.

    Args:
        path: the folder, with config.json and model.safetensors.
        dtype: of the parameters; as in the file by default.
        on_host: gives arrays of NumPy; else they lie on the first device.

    Raises:
        UsageError: where a file is missing or is none of RWKV-7, or a tensor is missing, misshapen or
            one too many.

    Example:
        >>> import tempfile
        >>> config = RWKV7Config(vocab_size=7, hidden_size=16, num_hidden_layers=2, head_dim=8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(Path(folder), config, init(jax.random.key(0), config))
        ...     found, params = load(Path(folder), jnp.bfloat16)
        >>> found == config, params["emb"].dtype.name
        (True, 'bfloat16')
    """
    from safetensors import SafetensorError, safe_open

    config = _read_config(path / "config.json")
    file = path / "model.safetensors"
    try:
        with safe_open(file, "np") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file} cannot be read as safetensors: {error}") from error
    params = _params(file, config, tensors, dtype)
    return config, params if on_host else jax.tree.map(jnp.asarray, params)


def save(folder: Path, config: RWKV7Config, params: Params) -> None:
    """Writes config.json and model.safetensors; the folder is made where it is missing."""
    from safetensors.numpy import save as packed

    folder.mkdir(parents=True, exist_ok=True)
    content = packed(_tensors(config, params), metadata={"format": "pt"})
    write_whole(folder / "model.safetensors", lambda file: file.write(content))
    write_json(folder / "config.json", {"model_type": MODEL_TYPE, **dataclasses.asdict(config)})


def convert_pth(path: Path, folder: Path) -> RWKV7Config:
    """A published .pth as a folder for :func:`load`, in the dtype that it has.

    Args:
        path: the .pth; nothing in it is run.
        folder: what is written.

    Raises:
        UsageError: as :func:`load` does.
    """
    import torch

    try:
        # mmap: a tensor is read when it is converted.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{path} cannot be read as a .pth of weights: {reason}") from error
    if not isinstance(content, dict) or not all(map(torch.is_tensor, content.values())):
        raise UsageError(f"{path} is no RWKV-7 file: it holds more than tensors with names")
    tensors = {name: _from_torch(tensor) for name, tensor in content.items()}
    config = _config_of(path, {name: tensor.shape for name, tensor in tensors.items()})
    save(folder, config, _params(path, config, tensors, None))
    return config


def to_pth(path: Path, config: RWKV7Config, params: Params) -> None:
    """Writes a .pth of the published names and shapes, as other programs read them."""
    import torch

    tensors = {name: _to_torch(x) for name, x in _tensors(config, params).items()}
    write_whole(path, lambda file: torch.save(tensors, file))


# ---------------------------------------------------------------- names and shapes


class _Tensor(NamedTuple):
    """A tensor of a file: its shape there, and where it comes from."""

    name: str
    shape: tuple[int, ...]
    path: str
    layer: int | None
    transposed: bool


def _layout(config: RWKV7Config) -> Iterator[_Tensor]:
    """All tensors of a file."""
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), config))
    for path, leaf in _flat(shapes).items():
        last = path.rsplit("/", 1)[-1]
        linear = last in LINEAR
        ending = ".weight" if linear or last == "emb" else ""
        name = path.replace("/", ".").replace("ln0", "blocks.0.ln0") + ending
        if not path.startswith("blocks/"):
            yield _Tensor(name, leaf.shape[::-1] if linear else leaf.shape, path, None, linear)
            continue
        shape = leaf.shape[:0:-1] if linear else leaf.shape[1:]
        if len(shape) == 1 and last not in ("weight", "bias"):
            shape = (1, 1, *shape)
        for i in range(config.num_hidden_layers):
            own = name.replace("blocks.", f"blocks.{i}.", 1)
            if own not in UNUSED:
                yield _Tensor(own, shape, path, i, linear)


def _flat(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): x for keys, x in leaves}


def _tensors(config: RWKV7Config, params: Params) -> dict[str, np.ndarray]:
    leaves = {path: np.asarray(leaf) for path, leaf in _flat(params).items()}
    tensors = {}
    for name, shape, path, layer, transposed in _layout(config):
        x = leaves[path] if layer is None else leaves[path][layer]
        tensors[name] = np.ascontiguousarray(x.T if transposed else x).reshape(shape)
    return tensors


def _params(
    file: Path, config: RWKV7Config, tensors: Mapping[str, np.ndarray], dtype: DTypeLike | None
) -> Params:
    tensors = {name: x for name, x in tensors.items() if name not in UNUSED}
    layout = list(_layout(config))
    missing = [t.name for t in layout if t.name not in tensors]
    if missing:
        raise UsageError(f"{file} lacks the tensor {missing[0]}{_others(missing)}")
    over = sorted(set(tensors) - {t.name for t in layout})
    if over:
        raise UsageError(
            f"{file} has the tensor {over[0]}{_others(over)}, which RWKV-7 with "
            f"{config.num_hidden_layers} layers does not"
        )
    parts: dict[str, list[np.ndarray]] = {}
    for name, shape, path, _, transposed in layout:
        x = tensors[name]
        # Some write [hidden] for [1, 1, hidden].
        if x.shape not in (shape, shape[2:] if shape[:2] == (1, 1) else shape):
            raise UsageError(
                f"{file}: the tensor {name} must have the shape {list(shape)}, got {list(x.shape)}"
            )
        x = x.reshape(shape[2:] if shape[:2] == (1, 1) else shape)
        parts.setdefault(path, []).append(x.T if transposed else x)

    def leaf(keys: Any, shape: Any) -> np.ndarray:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        found = parts.get(path, [])
        if not path.startswith("blocks/"):
            return np.asarray(found[0], dtype)
        if len(found) < config.num_hidden_layers:  # v0, v1 and v2 of layer 0
            like = found[0].dtype if found else tensors["emb.weight"].dtype
            found = [np.zeros(shape.shape[1:], like), *found]
        return np.asarray(np.stack(found), dtype)

    shapes = jax.eval_shape(lambda: init(jax.random.key(0), config))
    return jax.tree_util.tree_map_with_path(leaf, shapes)


def _others(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


# ---------------------------------------------------------------- settings and other libraries


def _config_of(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> RWKV7Config:
    """The settings of a file that holds tensors alone."""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        found = shapes.get(name)
        if found is None or len(found) != axes:
            what = "it has no tensor" if found is None else f"not {axes} axes but {list(found)} has"
            raise UsageError(f"{file} is no RWKV-7 file: {what} {name}")
        return found

    heads, width = shape("blocks.0.att.r_k", 2)
    vocab, hidden = shape("emb.weight", 2)
    if heads * width != hidden:
        raise UsageError(
            f"{file} is no RWKV-7 file: blocks.0.att.r_k is [{heads}, {width}] and emb.weight has "
            f"{hidden} columns, not {heads * width}"
        )
    layers = len({m[1] for name in shapes if (m := re.match(r"blocks\.(\d+)\.", name))})
    rank = lambda name, layer=0: shape(f"blocks.{layer}.att.{name}", 2)[1]
    return RWKV7Config(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        head_dim=width,
        intermediate_size=shape("blocks.0.ffn.key.weight", 2)[0],
        decay_low_rank_dim=rank("w1"),
        a_low_rank_dim=rank("a1"),
        v_low_rank_dim=rank("v1", 1) if layers > 1 else 0,
        gate_low_rank_dim=rank("g1"),
    )


def _read_config(file: Path) -> RWKV7Config:
    content = read_json(file)
    kind = content.pop("model_type", None)
    if kind != MODEL_TYPE:
        raise UsageError(f"{file}: model_type must be {MODEL_TYPE!r}, got {fields.shown(kind)}")
    names = [field.name for field in dataclasses.fields(RWKV7Config)]
    extra = sorted(set(content) - set(names))
    if extra:
        raise UsageError(
            f"{file}: {extra[0]} is no setting of RWKV-7; {', '.join(sorted(names))} are"
        )
    most = {"num_hidden_layers": fields.MOST_LAYERS, "head_dim": fields.MOST_HEADS}
    try:
        return RWKV7Config(
            **{
                name: fields.whole(content, name, most=most.get(name, fields.MOST))
                for name in names
            }
        )
    except ValueError as error:
        raise UsageError(f"{file.parent}: {_in_file(error)}") from error


def _in_file(error: ValueError) -> str:
    """Errors of single fields name config.json already."""
    return str(error) if isinstance(error, UsageError) else f"config.json: {error}"


def _from_torch(tensor: Any) -> np.ndarray:
    """NumPy has no bfloat16 of its own: its bits go over as whole numbers."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def _to_torch(x: np.ndarray) -> Any:
    import torch

    x = np.array(x)  # JAX's may not be written to, which torch warns of
    if x.dtype == jnp.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)
