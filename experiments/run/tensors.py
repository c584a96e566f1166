"""Trees of arrays as safetensors files: one tensor a leaf, named by its path."""

from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from experiments.run.folder import full_disk_in_one_sentence, write_whole
from experiments.run.settings import RunSettings


def write_tensors(settings: RunSettings, generation: int, tree: PyTree, to: Path | None) -> str:
    """Writes arrays of a run; says what was written.

    Args:
        settings: of the run.
        generation: that they are of.
        tree: of arrays.
        to: the file, whose folder is made; params.safetensors in the run folder by default.

    Raises:
        RunError: where the disk is full.
    """
    from safetensors.numpy import save

    leaves = jax.tree_util.tree_flatten_with_path(jax.device_get(tree))[0]
    tensors = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.ascontiguousarray(leaf)
        for path, leaf in leaves
    }
    note = {"generation": str(generation), "run": settings.run_dir.name}
    path = to or settings.run_dir / "params.safetensors"
    with full_disk_in_one_sentence(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: file.write(save(tensors, metadata=note)))
    numbers = sum(leaf.size for leaf in tensors.values())
    return f"Wrote {len(tensors)} tensors, {numbers:,} numbers, to {path}."
