"""What a checkpoint of orbax has here beside: digests of its leaves, and synced files, folders and rename."""

import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from experiments.run import digests
from experiments.run.folder import sync_file, sync_folder

UNFINISHED = ocp.utils.TMP_DIR_SUFFIX
# Disks take several syncs at once, and one after another they take longer.
SYNCS_AT_ONCE = 8


class DigestHandler(ocp.AsyncCheckpointHandler):
    """An item of a checkpoint: digests of what this process holds of a state, computed beside its writing."""

    async def async_save(
        self, directory: Path, args: "DigestSave"
    ) -> Sequence[ocp.future.Future] | None:
        """What is to be waited for before the checkpoint is whole."""
        write = _write(directory, args.item)
        return [ocp.future.CommitFutureAwaitingContractedSignals(write, name="digests")]

    def save(self, directory: Path, args: "DigestSave") -> None:
        """Nothing saves in the foreground."""
        raise NotImplementedError

    def restore(self, directory: Path, args: Any = None) -> None:
        """Nothing is restored by orbax: :mod:`digests` reads them."""
        raise NotImplementedError


@ocp.args.register_with_handler(DigestHandler, for_save=True, for_restore=True)
@dataclass
class DigestSave(ocp.args.CheckpointArgs):
    """Attributes: item: the state, a tree of arrays; it must not be donated before it is on disk."""

    item: Any


async def _write(directory: Path, state: Any) -> None:
    path = Path(directory) / f"process_{jax.process_index()}.json"
    path.write_text(json.dumps(own_digests(state)))
    # The first process syncs the folder, which may not push out what another host wrote.
    sync_file(path)


def own_digests(state: Any) -> digests.Leaves:
    """The digests of the regions that this process writes: of copies that several devices hold, one.

    Example:
        >>> import jax.numpy as jnp
        >>> {name: list(regions) for name, regions in own_digests({"w": jnp.ones((2, 3))}).items()}
        {'w': ['0:2,0:3']}
    """
    found: digests.Leaves = {}
    for name, leaf in by_path(state).items():
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                region = digests.region_of(shard.index, leaf.shape)
                found.setdefault(name, {})[region] = digests.of_array(np.asarray(shard.data))
    return found


def types_of(folder: Path) -> Any:
    """What kind of arrays a state on disk has, as a tree."""
    return ocp.StandardCheckpointHandler().metadata(epath.Path(folder)).tree


def read(folder: Path, shapes: Any) -> Any:
    """A state on disk, by orbax's handler itself: its manager has all processes wait for each other, without
    an end where one cannot read its part.

    Args:
        folder: "state" in that of a checkpoint.
        shapes: shapes, types and shardings to read it with, of the same structure.
    """
    args = ocp.args.StandardRestore(shapes)
    return ocp.StandardCheckpointHandler().restore(epath.Path(folder), args=args)


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths.

    Example:
        >>> by_path({"a": [1, 2]})
        {'a/0': 1, 'a/1': 2}
    """
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


class SyncedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """The folder that a checkpoint is written to: sealed and synced before it gets its name.

    Orbax removes older checkpoints after that.
    """

    async def finalize(self) -> None:
        """Ends the writing; on the first process alone."""
        final = Path(self.get_final())
        if UNFINISHED in final.parent.name:
            # An item of a checkpoint, which is synced with the others.
            await super().finalize()
            return
        # Orbax writes its last files and renames in one go: to a name that nobody looks for.
        whole = final.with_name(f"{final.name}{UNFINISHED}-whole")
        shutil.rmtree(whole, ignore_errors=True)
        self._final_path = epath.Path(whole)
        try:
            await super().finalize()
        finally:
            self._final_path = epath.Path(final)
        digests.seal(whole, int(final.name))
        sync_tree(whole)
        os.rename(whole, final)
        sync_folder(final.parent)
        # Of the first checkpoint the folder is new too.
        sync_folder(final.parent.parent)


def sync_tree(folder: Path) -> None:
    """Returns when all below a folder, and its own entries, would survive a loss of power."""
    folders = [Path(top) for top, _, _ in os.walk(folder, topdown=False)]
    with ThreadPoolExecutor(SYNCS_AT_ONCE) as pool:
        list(pool.map(sync_file, digests.files_in(folder)))
        list(pool.map(sync_folder, folders))
