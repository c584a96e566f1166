"""The run folder: everything a run leaves behind, in plain files.

- config.json: the settings, resolved
- versions.json: packages, Python, kind of machine
- metrics.jsonl: one row a generation
- params.npz: the trained parameters, one array a leaf, named by its path
- result.json: what the run came to
- curve.png: the learning curve
"""

import dataclasses
import functools
import json
import os
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from experiments.run.errors import UsageError

FILES = ("config.json", "versions.json", "metrics.jsonl", "params.npz", "result.json", "curve.png")
PACKAGES = ("eggroll-jax", "jax", "jaxlib", "numpy", "optax", "flax", "gymnax")


def open_run_folder(path: Path, overwrite: bool) -> Path:
    """Make the folder, or empty it of an earlier run; files that no run writes are left alone.

    Raises:
        UsageError: if it cannot be written to, or holds a run and `overwrite` is False.
    """
    try:
        if not overwrite and any(
            _has_content(path / name) for name in ("metrics.jsonl", "params.npz")
        ):
            raise UsageError(
                f"{path} already holds a run: choose another --run-dir, or replace it with --overwrite"
            )
        path.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (path / name).unlink(missing_ok=True)
        (path / "metrics.jsonl").touch()
    except OSError as error:
        raise UsageError(f"--run-dir {path} cannot be written to: {error.strerror}") from error
    return path


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file so that it is never seen half-written: a neighbour first, then a rename."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented; paths become strings."""
    text = json.dumps(content, indent=2, default=str) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def write_config(folder: Path, config: Any) -> None:
    """Write a configuration dataclass as config.json."""
    write_json(folder / "config.json", dataclasses.asdict(config))


def versions() -> dict[str, Any]:
    """Versions of Python, of the packages that decide results, and the kind of machine."""
    import jax

    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "packages": {name: _package_version(name) for name in PACKAGES},
    }


def _package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def save_params(path: Path, params: Any) -> None:
    """Write a tree of arrays as an .npz file whose keys are the leaf paths, e.g. `Dense_0/kernel`."""
    import jax
    import numpy as np

    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(params))
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    arrays = {name(keys): leaf for keys, leaf in leaves}
    write_whole(path, lambda file: np.savez(file, **arrays))
