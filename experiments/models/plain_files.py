"""Folders of families without a published layout: config.json, and a tensor a parameter, named by its path.

A family with a published layout has its own `load` and `save`, as in `hugging_face` and `rwkv7_weights`.
"""

import dataclasses
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Key

from eggroll.plan import leaf_paths
from experiments.models import config_json as fields
from experiments.models.family import Params
from experiments.run.errors import UsageError
from experiments.run.folder import write_json, write_whole

# An instance of a dataclass whose fields are whole numbers, numbers, flags and texts.
C = TypeVar("C", bound=Any)

FILE = "model.safetensors"
READERS: dict[type, Callable[[fields.Settings, str], Any]] = {
    int: fields.whole,
    float: fields.number,
    bool: fields.flag,
    str: fields.text,
}


def save(folder: Path, model_type: str, config: Any, params: Params) -> None:
    """Writes config.json and model.safetensors; the folder is made where it is missing.

    Args:
        folder: what is written.
        model_type: what config.json names the family.
        config: a dataclass whose fields are whole numbers, numbers, flags and texts.
        params: in floats.

    Example:
        >>> import tempfile
        >>> from experiments.models import rwkv7
        >>> config = rwkv7.RWKV7Config(vocab_size=7, hidden_size=16, num_hidden_layers=2, head_dim=8)
        >>> params = rwkv7.init(jax.random.key(0), config)
        >>> with tempfile.TemporaryDirectory() as name:
        ...     save(Path(name), "mine", config, params)
        ...     again, loaded = load("mine", rwkv7.RWKV7Config, rwkv7.init, Path(name))
        >>> again == config, bool((loaded["head"] == params["head"]).all())
        (True, True)
    """
    from safetensors.numpy import save as serialise

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {path: np.asarray(leaf, order="C") for path, leaf in leaf_paths(params)}
    content = serialise(tensors)
    write_whole(folder / FILE, lambda file: file.write(content))
    write_json(folder / "config.json", {"model_type": model_type, **dataclasses.asdict(config)})


def load(
    model_type: str,
    config_class: type[C],
    init: Callable[[Key[Array, ""], C], Params],
    folder: Path,
    dtype: DTypeLike | None = None,
    on_host: bool = False,
) -> tuple[C, Params]:
    """A model from a folder that :func:`save` wrote; the first three arguments are the family's.

    Args:
        model_type: what config.json must name the family.
        config_class: the class of the configuration.
        init: ``(key, config) -> params``; says the paths and shapes that are right.
        folder: with config.json and model.safetensors.
        dtype: of the parameters; as in the file by default.
        on_host: gives arrays of NumPy; else they lie on the first device.

    Raises:
        UsageError: for a file that is absent or damaged, a field of config.json that is missing, left over
            or of a wrong type, and a tensor that is missing, left over or of another shape.
    """
    from safetensors import SafetensorError, safe_open

    config = _config(folder / "config.json", model_type, config_class)
    file = folder / FILE
    try:
        with safe_open(file, "np") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file} is not a whole safetensors file: {error}") from error
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), config))
    right = dict(leaf_paths(shapes))
    if odd := sorted(right.keys() ^ tensors.keys()):
        if odd[0] in right:
            raise UsageError(f"{file} has no tensor {odd[0]}, which config.json asks for")
        raise UsageError(f"{file} has the tensor {odd[0]}, which a {model_type} does not have")
    for path, leaf in right.items():
        if tensors[path].shape != leaf.shape:
            raise UsageError(
                f"{file}: {path} has the shape {list(tensors[path].shape)}; it must be {list(leaf.shape)} "
                "by config.json"
            )
    leaves = [np.asarray(tensors[path], dtype) for path in right]
    params = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    return config, params if on_host else jax.tree.map(jnp.asarray, params)


def _config(file: Path, model_type: str, config_class: type[C]) -> C:
    told = fields.read_json(file)
    if told.get("model_type") != model_type:
        raise UsageError(
            f"{file} has the model_type {fields.shown(told.get('model_type'))}; it must be {model_type!r}"
        )
    kinds = typing.get_type_hints(config_class)
    names = [field.name for field in dataclasses.fields(config_class)]
    if extra := sorted(told.keys() - {"model_type", *names}):
        raise UsageError(
            f"{file}: {extra[0]} is no setting of {model_type}; the settings are {', '.join(sorted(names))}"
        )
    try:
        return config_class(**{name: READERS[kinds[name]](told, name) for name in names})
    except UsageError as error:
        raise UsageError(f"{file.parent}: {error}") from error
    except ValueError as error:
        raise UsageError(f"{file.parent}: config.json: {error}") from error
