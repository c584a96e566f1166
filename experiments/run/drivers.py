"""Which drivers there are, and how a finished run of any of them is found, evaluated and exported."""

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from tyro.conf import Positional

from experiments.run.errors import UsageError
from experiments.run.folder import full_disk_in_one_sentence, read_config, write_whole
from experiments.run.settings import RunSettings, from_json


class Driver(NamedTuple):
    """One driver: `config` has the class Config and PRESETS; `train` has job, train, evaluate and
    parameters. Both are imported when they are needed."""

    summary: str
    config: str
    train: str


DRIVERS: Mapping[str, Driver] = {
    "rl": Driver(
        "train a policy in an environment",
        "experiments.rl.config",
        "experiments.rl.train",
    ),
    "pretrain": Driver(
        "pretrain a language model of bytes, in int8 or in floats",
        "experiments.pretrain.config",
        "experiments.pretrain.train",
    ),
    "reasoning": Driver(
        "fine-tune a language model on answers that can be checked",
        "experiments.reasoning.config",
        "experiments.reasoning.train",
    ),
    "supervised": Driver(
        "train a classifier of digits",
        "experiments.supervised.config",
        "experiments.supervised.train",
    ),
    "optimizers": Driver(
        "train by backpropagation, by any optimizer",
        "experiments.optimizers.config",
        "experiments.optimizers.train",
    ),
}


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Measure the newest checkpoint of a run on episodes or data that it was not trained on."""

    run: Positional[Path]
    """The run folder."""
    episodes: int = 256
    """Episodes to play (reinforcement learning)."""
    seed: int = 0
    """Decides the episodes."""
    render: bool = False
    """Also draw an episode, as episode.gif in the run folder (reinforcement learning)."""


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Write the trained parameters of a run as safetensors: one tensor a leaf, named by its path, or (of
    `eggroll reasoning`) a folder that other programs know."""

    run: Positional[Path]
    """The run folder."""
    to: Path | None = None
    """The file, or folder; params.safetensors, or exported, in the run folder by default."""


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Let a language model write: that of a run, or of a folder that one was exported to."""

    run: Positional[Path]
    """The run folder, or a folder with a model."""
    prompt: tuple[str, ...] = ("",)
    """What the model goes on from; several texts are answered one after another."""
    length: int | None = None
    """Tokens (bytes, for those that read bytes) of an answer at most; by default as in training."""
    temperature: float = 1.0
    """Of sampling; 0 takes the likeliest token."""
    chat: bool = False
    """Ask in the chat template of a folder with a model; that of a run is asked as it was in training."""
    seed: int = 0
    """Decides what is drawn."""


class Found(NamedTuple):
    """A run read back: its settings, the module of its driver, and its newest state."""

    config: RunSettings
    module: Any
    generation: int
    state: Any


def read_run(path: Path, on_host: bool = False) -> Found:
    """The newest state of a run.

    Args:
        path: the run folder.
        on_host: gives arrays of NumPy; else the state lies on the first device.

    Raises:
        UsageError: if the folder holds no run, or no checkpoint that can be read.
    """
    from experiments.run.checkpoints import Checkpoints

    content = dict(read_config(path))
    name = content.pop("driver", None)
    if not isinstance(name, str) or name not in DRIVERS:
        raise UsageError(f"{path}/config.json names the driver {name!r}, which there is not")
    try:
        config = from_json(importlib.import_module(DRIVERS[name].config).Config, content)
        # The folder may have been moved, and what is in it is to be read, not replaced.
        config = replace(config.on_one_device(), run_dir=path, overwrite=False)
        config.check()
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    module = importlib.import_module(DRIVERS[name].train)
    with Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
        found = checkpoints.restore(module.job(config).start, on_host=on_host)
    if found is None:
        raise UsageError(f"{path} has no checkpoint yet")
    return Found(config, module, found[0], found[1])


def evaluate(settings: EvalSettings) -> str:
    """A table of what the run's newest state scores, in words."""
    import numpy as np

    if settings.episodes < 1:
        raise UsageError(f"--episodes {settings.episodes}: choose a whole number of at least 1")
    run = read_run(settings.run)
    if settings.render and not hasattr(run.module, "render"):
        raise UsageError(f"--render: {settings.run} is a run without episodes")
    scores = run.module.evaluate(run.config, run.state, settings.episodes, settings.seed)
    lines = [f"{settings.run}, after {run.generation} generations:"]
    for name, values in scores.items():
        x = np.asarray(values, float)
        spread = f" ± {x.std(ddof=1) / np.sqrt(x.size):.3g} (standard error)" if x.size > 1 else ""
        among = f", {x.min():.4g} to {x.max():.4g} in {x.size}" if x.size > 1 else ""
        lines.append(f"  {name}: {x.mean():.6g}{spread}{among}")
    if settings.render:
        path = settings.run / "episode.gif"
        lines.append(run.module.render(run.config, run.state, path, settings.seed))
    return "\n".join(lines)


def sample(settings: SampleSettings) -> str:
    """What the model writes after each prompt.

    Raises:
        UsageError: where there is no language model in the folder, or a setting cannot be right.
    """
    if settings.length is not None and settings.length < 1:
        raise UsageError(f"--length {settings.length}: choose a whole number of at least 1")
    if not (math.isfinite(settings.temperature) and settings.temperature >= 0):
        raise UsageError(f"--temperature {settings.temperature}: choose 0 or a positive number")
    if "driver" in read_config(settings.run):
        run: Any = read_run(settings.run)
    else:
        # A model's folder: the driver that takes such ones has no run of it.
        module, found = (importlib.import_module(m) for m in DRIVERS["reasoning"][:0:-1])
        config = replace(
            found.PRESETS["tiny"],
            model=str(settings.run),
            chat=settings.chat,
            max_new_tokens=64,
        )
        run = Found(config, module, 0, None)
    if not hasattr(run.module, "write"):
        raise UsageError(
            f"{settings.run} is a run without a language model: there is none to sample"
        )
    written = run.module.write(
        *(run.config, run.state, settings.prompt),
        *(settings.length, settings.temperature, settings.seed),
    )
    return "\n\n".join(a + b for a, b in zip(settings.prompt, written, strict=True))


def export(settings: ExportSettings) -> str:
    """Writes the file and says what is in it."""
    import jax
    import numpy as np
    from safetensors.numpy import save

    run = read_run(settings.run, on_host=True)
    if hasattr(run.module, "save"):
        return run.module.save(run.config, run.state, settings.to or settings.run / "exported")
    tree = jax.device_get(run.module.parameters(run.config, run.state))
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    tensors = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.ascontiguousarray(leaf)
        for path, leaf in leaves
    }
    note = {"generation": str(run.generation), "run": settings.run.name}
    path = settings.to or settings.run / "params.safetensors"
    with full_disk_in_one_sentence(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: file.write(save(tensors, metadata=note)))
    numbers = sum(leaf.size for leaf in tensors.values())
    return f"Wrote {len(tensors)} tensors, {numbers:,} numbers, to {path}."
