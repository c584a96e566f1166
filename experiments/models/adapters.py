"""Adapters (LoRA) as folders of PEFT: adapter_config.json and adapter_model.safetensors, in and out.

An adapter of a matrix ``W [inputs, outputs]`` is a product of two factors that is added to it. PEFT has one
pair of factors for each layer, ``lora_A [rank, inputs]`` and ``lora_B [outputs, rank]``; here those of a
stack of layers are one :class:`Factors`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, PyTree

from experiments.models import config_json as fields
from experiments.models.config_json import read_json
from experiments.run.errors import UsageError
from experiments.run.folder import full_disk_in_one_sentence, write_json, write_whole

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# From this size on, the factors of an update are found in a random subspace, since all singular values of
# a matrix would take minutes.
LARGE = 1536
# What a random subspace has beyond the rank, and how often the update is applied to it.
SPARE, PASSES = 16, 3
# The name of a layer's module in the published layout, such as "self_attn.q_proj", by the path of the stack;
# None for a parameter that is no such matrix.
ModuleOf = Callable[[str], str | None]


class Factors(NamedTuple):
    """The adapter of a stack of matrices: to layer l is added ``(b[l] @ a[l]).T``.

    Attributes:
        a: ``[layers, rank, inputs]``.
        b: ``[layers, outputs, rank]``.
    """

    a: Float[np.ndarray, "layers rank inputs"]
    b: Float[np.ndarray, "layers outputs rank"]


# By the path of a stack in the parameters, such as "layers/q_proj".
Adapter = Mapping[str, Factors]


def llama_module(path: str) -> str | None:
    """The module of a matrix of the Llama family.

    Example:
        >>> llama_module("layers/q_proj"), llama_module("layers/up_proj"), llama_module("lm_head")
        ('self_attn.q_proj', 'mlp.up_proj', None)
    """
    name = path.removeprefix("layers/")
    if name == path or not name.endswith("_proj"):
        return None
    return f"mlp.{name}" if name in ("gate_proj", "up_proj", "down_proj") else f"self_attn.{name}"


def write(folder: Path, adapter: Adapter, module: ModuleOf, base: str) -> None:
    """Writes an adapter as PEFT and servers of language models (vLLM, SGLang) read it.

    Args:
        folder: made if it is not there.
        adapter: all of one rank.
        module: of the family.
        base: the folder or hub id of the model that it is added to.

    Raises:
        RunError: if it cannot be written.
    """
    from safetensors.numpy import save

    tensors: dict[str, np.ndarray] = {}
    for path, (a, b) in adapter.items():
        for layer in range(len(a)):
            name = _name(path, layer, module)
            tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(a[layer], np.float32)
            tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(b[layer], np.float32)
    rank = next(iter(adapter.values())).a.shape[1]
    told: dict[str, Any] = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": rank,  # a factor of 1
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": [str(module(path)).rpartition(".")[2] for path in adapter],
        "task_type": "CAUSAL_LM",
    }
    with full_disk_in_one_sentence(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # It comes last: a folder that was left unfinished has none.
        (folder / CONFIG).unlink(missing_ok=True)
        content = save(tensors, metadata={"format": "pt"})
        write_whole(folder / WEIGHTS, lambda file: file.write(content))
    write_json(folder / CONFIG, told)


def read(folder: Path, params: PyTree, module: ModuleOf) -> dict[str, Factors]:
    """An adapter that :func:`write` or PEFT wrote, its factor lora_alpha / r in `b`.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        params: of the model, or their shapes.
        module: of the family.

    Raises:
        UsageError: where a file is absent or damaged, or the adapter is not of this model.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    told = read_json(folder / CONFIG)
    try:
        scale = fields.number(told, "lora_alpha") / fields.whole(told, "r")
    except UsageError as error:
        raise UsageError(f"{folder}: {error}") from error
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{folder / WEIGHTS} is not a whole safetensors file: {error}") from error
    found: dict[str, Factors] = {}
    for name, leaf in params["layers"].items():
        path, layers = f"layers/{name}", leaf.shape[0]
        if module(path) is None:
            continue
        names = [_name(path, layer, module) for layer in range(layers)]
        pairs = [
            (tensors.pop(f"{one}.lora_A.weight", None), tensors.pop(f"{one}.lora_B.weight", None))
            for one in names
        ]
        if all(a is None and b is None for a, b in pairs):
            continue
        for one, (a, b) in zip(names, pairs, strict=True):
            if a is None or b is None or a.shape[1:] + b.shape[:1] != leaf.shape[1:]:
                raise UsageError(f"{folder}: {one} has no factors of {list(leaf.shape[1:])}")
        try:
            stacks = [np.stack(factor).astype(np.float32) for factor in zip(*pairs, strict=True)]
            found[path] = Factors(stacks[0], np.float32(scale) * stacks[1])
        except ValueError as error:
            raise UsageError(f"{folder}: the layers of {path} differ in their rank") from error
    if tensors:
        raise UsageError(
            f"{folder} has factors that the model does not ({len(tensors)}): {min(tensors)}"
        )
    return found


def add(params: PyTree, adapter: Adapter) -> PyTree:
    """The parameters with an adapter added: ``W + (b a).T`` in float32, and in the type of W.

    Args:
        params: of the model.
        adapter: by path.

    Example:
        >>> one = Factors(np.ones((1, 1, 2), np.float32), np.ones((1, 3, 1), np.float32))
        >>> add({"layers": {"w": np.zeros((1, 2, 3), np.float32)}}, {"layers/w": one})["layers"]["w"].shape
        (1, 2, 3)
    """
    layers = dict(params["layers"])
    for path, (a, b) in adapter.items():
        name = path.removeprefix("layers/")
        w = np.asarray(layers[name])
        product = np.einsum("lri,lor->lio", a, b)
        layers[name] = (w.astype(np.float32) + product).astype(w.dtype)
    return {**params, "layers": layers}


def joined(first: Adapter, second: Adapter) -> dict[str, Factors]:
    """One adapter in the place of two that are both added; its rank is the sum of theirs.

    Args:
        first: by path.
        second: by path.

    Example:
        >>> one = Factors(np.ones((1, 1, 2), np.float32), np.ones((1, 3, 1), np.float32))
        >>> joined({"layers/w": one}, {"layers/w": one, "layers/v": one})["layers/v"].a.shape
        (1, 2, 2)
    """
    size = max((one.a.shape[1] for one in first.values()), default=0)
    found = {}
    for path, (a, b) in second.items():
        empty = Factors(
            np.zeros((len(a), size, a.shape[2]), a.dtype),
            np.zeros((len(b), b.shape[1], size), b.dtype),
        )
        before = first.get(path, empty)
        found[path] = Factors(np.concatenate([before.a, a], 1), np.concatenate([before.b, b], 2))
    return found


def _name(path: str, layer: int, module: ModuleOf) -> str:
    return f"base_model.model.model.layers.{layer}.{module(path)}"


# ---------------------------------------------------------------- the best adapter of an update


class Cut(NamedTuple):
    """An update of stacks of matrices, cut to a rank.

    Attributes:
        adapter: the factors; empty where nothing has changed.
        rank: of the adapter, at most what was asked for.
        error: the norm of what is left out, relative to that of the update, over all matrices.
        worst: the largest such error of a matrix.
        where: the path and the layer of that matrix.
        needed: the rank for an error of 1%; None where not all singular values are known.
    """

    adapter: dict[str, Factors]
    rank: int
    error: float
    worst: float
    where: tuple[str, int]
    needed: int | None


def cut(before: Mapping[str, Any], after: Mapping[str, Any], rank: int) -> Cut:
    """The adapter of a rank that comes closest to an update, by singular values.

    A singular value counts where it is above what rounding has left in the parameters: an update of a
    smaller rank gets an adapter of that rank.

    Args:
        before: stacks of matrices ``[layers, inputs, outputs]`` by path.
        after: the same after training.
        rank: of the adapter, at most.

    Example:
        >>> u, v = np.arange(1.0, 31).reshape(30, 1), np.ones((1, 20))
        >>> found = cut({"w": np.zeros((1, 30, 20))}, {"w": (u @ v)[None]}, 16)
        >>> found.rank, found.error < 1e-6, found.adapter["w"].a.shape
        (1, True, (1, 1, 30))
    """
    parts: dict[tuple[str, int], _Part] = {}
    for path in before:
        eps = float(np.finfo(np.float32).eps)
        for layer, (w, new) in enumerate(zip(before[path], after[path], strict=True)):
            w = np.asarray(w, np.float64)
            parts[path, layer] = _part(np.asarray(new, np.float64) - w, rank, eps * _norm(w))
    changed = [path for path in before if any(p.total for (q, _), p in parts.items() if q == path)]
    parts = {where: part for where, part in parts.items() if where[0] in changed}
    if not parts:
        return Cut({}, 0, 0.0, 0.0, ("", 0), 0)
    size = max(1, max(part.rank for part in parts.values()))
    adapter = {
        path: Factors(
            *(
                np.stack([part[k] for (q, _), part in parts.items() if q == path])
                for k in (0, 1)
            )
        )
        for path in changed
    }  # fmt: skip
    adapter = {path: Factors(a[:, :size], b[:, :, :size]) for path, (a, b) in adapter.items()}
    total = sum(part.total for part in parts.values())
    left = {where: part.left(size) for where, part in parts.items()}
    errors = {
        where: np.sqrt(left[where] / part.total) for where, part in parts.items() if part.total
    }
    where = max(errors, key=lambda one: errors[one])
    needed = None
    if all(part.whole for part in parts.values()):
        longest = max(len(part.energies) for part in parts.values())
        enough = (
            r for r in range(longest + 1) if sum(p.left(r) for p in parts.values()) <= 1e-4 * total
        )
        needed = next(enough)
    return Cut(
        adapter,
        size,
        float(np.sqrt(sum(left.values()) / total)),
        float(errors[where]),
        where,
        needed,
    )


class _Part(NamedTuple):
    """One matrix: factors of the rank that was asked for, and the energies of its singular values."""

    a: np.ndarray
    b: np.ndarray
    energies: np.ndarray  # the squares of the singular values, falling
    total: float
    rank: int
    whole: bool  # whether these are all of them

    def left(self, rank: int) -> float:
        """The energy beyond a rank."""
        return max(0.0, self.total - float(self.energies[:rank].sum()))


def _part(update: np.ndarray, rank: int, rounding: float) -> _Part:
    """The factors of one matrix.

    Args:
        update: ``[inputs, outputs]``.
        rank: of the factors; padded with zeros where the matrix has less.
        rounding: the norm of what rounding may have left in it.
    """
    tall = update if update.shape[0] <= update.shape[1] else update.T
    size = min(tall.shape)
    whole = size <= LARGE
    total = float(np.square(tall).sum())
    if whole:
        values, vectors = np.linalg.eigh(tall @ tall.T)
        energies, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1][:, :rank]
    else:
        chance = np.random.default_rng(0)
        sample = tall @ chance.normal(size=(tall.shape[1], min(size, rank + SPARE)))
        for _ in range(PASSES):
            basis = np.linalg.qr(sample)[0]
            sample = tall @ (tall.T @ basis)
        basis = np.linalg.qr(sample)[0]
        inner = basis.T @ tall
        values, turn = np.linalg.eigh(inner @ inner.T)
        energies, vectors = np.maximum(values[::-1], 0), (basis @ turn[:, ::-1])[:, :rank]
    beyond = np.maximum(0, total - np.cumsum([0.0, *energies]))
    enough = np.flatnonzero(beyond <= max(rounding**2, 1e-14 * total))
    own = int(enough[0]) if enough.size else len(energies)
    # Both factors get the root of a singular value.
    roots = np.sqrt(np.sqrt(energies[: vectors.shape[1]]))
    inverse = np.divide(1, roots, out=np.zeros_like(roots), where=roots > 0)
    left, right = vectors * roots, (tall.T @ vectors) * inverse
    inputs, outputs = (left, right) if tall is update else (right, left)
    pad = lambda x: np.pad(x, [(0, 0), (0, rank - x.shape[1])])
    return _Part(pad(inputs).T, pad(outputs), energies, total, min(own, rank), whole)


def _norm(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x).sum()))
