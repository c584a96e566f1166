"""States on disk, by orbax: the two newest, written beside the training, read back with care.

A checkpoint counts as saved once all of it is synced, its name too; the older ones stay until then. What is
read back is compared with digests of what was saved (:mod:`digests`).

Several processes save and restore jointly: each writes what its devices hold, into one folder, and all use
the same checkpoint.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

from experiments.run import agreement, digests, hosts
from experiments.run.errors import RunError
from experiments.run.folder import sync_folder

KEPT = 2


class _Found(IntEnum):
    """What a process found of a checkpoint."""

    SOUND = 0
    DIFFERS = 1  # from its digests
    UNREAD = 2  # the reader raised an error


class Checkpoints:
    """The checkpoints of a run, one folder a generation.

    Args:
        path: the folder they lie in; `damaged` beside it takes those that cannot be read.
        read_only: change nothing on disk, as beside a run that is still going on.
    """

    def __init__(self, path: Path, read_only: bool = False) -> None:
        import logging

        import orbax.checkpoint as ocp

        from experiments.run import saving

        # Of every save and restore orbax tells at length.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._ocp, self._saving = ocp, saving
        self._path = path.absolute()
        self._read_only = read_only
        self._manager: Any = None

    def _open(self) -> Any:
        if self._manager is None:
            with _in_one_sentence(self._path):
                if not self._read_only:
                    self._clear_unfinished()
                self._manager = self._ocp.CheckpointManager(
                    self._path,
                    options=self._ocp.CheckpointManagerOptions(
                        max_to_keep=KEPT,
                        read_only=self._read_only,
                        temporary_path_class=self._saving.SyncedPath,
                    ),
                    item_handlers={
                        "state": self._ocp.StandardCheckpointHandler(),
                        "totals": self._ocp.JsonCheckpointHandler(),
                        digests.FOLDER: self._saving.DigestHandler(),
                    },
                )
        return self._manager

    def _clear_unfinished(self) -> None:
        """Removes what a killed process was still writing: orbax renames what is whole."""
        if hosts.first():
            for path in self._path.glob(f"*{self._saving.UNFINISHED}*"):
                shutil.rmtree(path)
        agreement.sync("cleared")

    def save(self, generation: int, state: Any, totals: dict[str, Any]) -> None:
        """Save in the background; the state may be donated as soon as this returns.

        Raises:
          RunError: where it cannot be written, of this checkpoint or the one before.
        """
        manager, args = self._open(), self._ocp.args
        if generation == manager.latest_step():
            return
        self._expect_room(state)
        # Copies, since both are written later: on a CPU from the arrays' own memory, which the
        # next step reuses.
        state = _copy(state)
        with _in_one_sentence(self._path):
            manager.save(
                generation,
                args=args.Composite(
                    state=args.StandardSave(state),
                    totals=args.JsonSave(dict(totals)),
                    **{digests.FOLDER: self._saving.DigestSave(state)},
                ),
            )

    def _expect_room(self, state: Any) -> None:
        """Orbax says of a full disk much that nobody can read, so it is not let run into one."""
        needed = 2 * sum(x.nbytes for x in jax.tree.leaves(state)) + 2**20
        free = shutil.disk_usage(self._path).free
        if free < needed:
            raise RunError(
                f"{self._path} has {free / 2**20:,.1f} MiB free, and a checkpoint may take "
                f"{needed / 2**20:,.1f} MiB: make room and run the same command again to continue"
            )

    def restore(
        self,
        start: Callable[[], Any],
        tell: Callable[[str], None] | None = None,
        place: Any = None,
        on_host: bool = False,
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """(generation, state, totals) of the newest checkpoint that can be read, None if there is none.

        Newer ones that cannot be read are set aside.

        Args:
          start: makes the state at generation 0; here it only says what a state looks like.
          tell: gets a sentence for every checkpoint that is damaged and passed over.
          place: shardings to read the state with, a tree of which its own begins, whatever those that it
            was saved with; by default the first device has it.
          on_host: read arrays of NumPy instead.

        Raises:
          RunError: for a checkpoint of a state of other shapes, where there are checkpoints and none can be
            read, or where several processes can read different ones; nothing is moved then.
        """
        tell = tell or hosts.say
        if not agreement.agreed(self._path.is_dir()):
            return None
        wanted = jax.eval_shape(start)
        if place is None:
            place = SingleDeviceSharding(jax.local_devices()[0])
        shapes = jax.tree.map(_stored, wanted, jax.tree.broadcast(place, wanted))
        if on_host:
            shapes = jax.tree.map(_of_numpy, shapes)
        generations = self._generations()
        agreement.same(max(generations, default=-1), "the newest checkpoint")
        damaged: dict[int, str] = {}
        for generation in generations:
            found, reason = self._read(generation, shapes)
            if found is not None:
                break
            if self._read_only and not (self._path / str(generation)).exists():
                # The run beside has saved a newer one and removed this.
                return self.restore(start, tell, place, on_host)
            damaged[generation] = reason
        else:
            if damaged:
                raise RunError(
                    f"none of the checkpoints in {self._path} can be used (the newest: "
                    f"{damaged[max(damaged)]}); look at them, or start anew with --overwrite"
                )
            return None
        state, totals = found
        for other, reason in damaged.items():
            where = "" if self._read_only else f"; it now lies in {self._set_aside(other)}"
            tell(
                f"WARNING: the checkpoint of generation {other} is damaged ({reason}){where}, "
                f"and that of generation {generation} is used."
            )
        state = jax.tree.map(
            lambda x, w: x if w.size else jnp.zeros(w.shape, w.dtype), state, wanted
        )
        return generation, state, totals

    def _generations(self) -> list[int]:
        """The generations that have a checkpoint, the newest first."""
        if not self._read_only:
            self._open()  # clears away what is unfinished
        names = (path.name for path in self._path.iterdir() if path.is_dir())
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def _read(self, generation: int, shapes: Any) -> tuple[tuple[Any, dict[str, Any]] | None, str]:
        """(state, totals), or None and why this checkpoint cannot be used: all processes get the same."""
        folder = self._path / str(generation)
        found, reason, status = None, "", _Found.SOUND
        try:
            leaves = digests.check_files(folder, generation)
            self._expect_shapes(folder, generation, shapes)
            state = self._saving.read(folder / "state", shapes)
            found = state, _totals(folder / "totals" / "metadata")
        except RunError:
            raise
        except digests.Damaged as error:
            status, reason = _Found.DIFFERS, str(error)
        # Orbax, its readers and decoders raise errors of a dozen types for damaged files.
        except Exception as error:
            if hosts.tells_of_loss(error):
                raise
            status, reason = _Found.UNREAD, _first_line(error)
        everywhere = agreement.gathered(np.array(status))
        if _Found.DIFFERS not in everywhere:
            # A file that some can read and some cannot is not damaged.
            agreement.same(generation if found else -1, "the newest checkpoint that can be read")
        if not everywhere.any() and found is not None and leaves is not None:
            try:
                _check_leaves(found[0], leaves)
            except digests.Damaged as error:
                status, reason = _Found.DIFFERS, str(error)
            everywhere = agreement.gathered(np.array(status))
        if not everywhere.any():
            return found, ""
        return None, agreement.first_of(reason)

    def _expect_shapes(self, folder: Path, generation: int, shapes: Any) -> None:
        wanted = _types(shapes)
        saved = _types(self._saving.types_of(folder / "state"))
        for name in wanted.keys() | saved.keys():
            if wanted.get(name) != saved.get(name):
                raise RunError(
                    f"the checkpoint of generation {generation} does not fit the settings: {name} "
                    f"must be {wanted.get(name, 'absent')}, got {saved.get(name, 'absent')}"
                )

    def _set_aside(self, generation: int) -> Path:
        aside = self._path.parent / "damaged"
        target = aside / str(generation)
        while target.exists():
            target = target.with_name(target.name + "_")
        self._close()
        agreement.sync("before setting aside")
        if hosts.first():
            aside.mkdir(exist_ok=True)
            (self._path / str(generation)).rename(target)
            for folder in (aside, self._path, self._path.parent):
                sync_folder(folder)
        agreement.sync("set aside")
        self._open()
        return target

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        if self._manager is not None:
            with _in_one_sentence(self._path):
                self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and hosts.tells_of_loss(error):
            return  # what is unfinished stays so: to end it takes all processes
        # Whatever ends the block, nothing goes on writing after it: the next to open the folder, in
        # this process or another, clears away what looks unfinished.
        try:
            self._close()
        except RunError as own:
            if error is None:
                raise
            error.add_note(str(own))

    def _close(self) -> None:
        manager, self._manager = self._manager, None
        if manager is None:
            return
        with _in_one_sentence(self._path):
            try:
                manager.wait_until_finished()
            except Exception:
                manager.close()  # a failure is raised once, so that this closes
                raise
            manager.close()


def _stored(x: Any, place: Any) -> jax.ShapeDtypeStruct:
    """How an array is stored and read: orbax takes none without entries, so one entry stands for them."""
    if x.size:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, jax.P())
    return jax.ShapeDtypeStruct((1,), x.dtype, sharding=place)


def _of_numpy(x: jax.ShapeDtypeStruct) -> np.ndarray:
    """How orbax is told that such an array is to be NumPy's; takes no memory."""
    return np.broadcast_to(np.zeros((), x.dtype), x.shape)


@jax.jit
def _copy(state: Any) -> Any:
    return jax.tree.map(lambda x: jnp.copy(x) if x.size else jnp.zeros(1, x.dtype), state)


def _types(tree: Any) -> dict[str, str]:
    from experiments.run.saving import by_path

    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in by_path(tree).items()}


def _totals(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text("utf-8"))
    if not isinstance(found, dict) or not all(map(_is_total, found.values())):
        raise digests.Damaged("totals/metadata has something else than numbers by name")
    return found


def _is_total(value: Any) -> bool:
    return all(map(_is_total, value)) if isinstance(value, list) else type(value) in (int, float)


def _check_leaves(state: Any, leaves: digests.Leaves) -> None:
    """Compares what this process has of a state with the digests; all processes have to come here."""
    from experiments.run.saving import by_path

    problem: digests.Damaged | None = None
    for name, leaf in by_path(state).items():
        part = _parts(leaf, leaves.get(name, {}))
        try:
            digests.check_leaf(name, leaf.shape, leaves.get(name, {}), part)
        except digests.Damaged as error:
            problem = problem or error  # what is gathered for later leaves takes all processes
    if problem is not None:
        raise problem


def _parts(leaf: Any, regions: Iterable[str]) -> Callable[[tuple[slice, ...]], np.ndarray | None]:
    """How a process gets a part of a leaf: from what its own devices hold, where those of the run hold every
    region as a whole; otherwise from the whole leaf, which is gathered."""
    if isinstance(leaf, np.ndarray) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        whole = np.asarray(leaf)
        return lambda index: whole[index]
    held = [
        tuple(slice(*one.indices(size)[:2]) for one, size in zip(index, leaf.shape, strict=True))
        for index in leaf.sharding.devices_indices_map(leaf.shape).values()
    ]
    wanted = [digests.index_of(region, leaf.shape) for region in regions]
    if not all(any(_within(index, one) for one in held) for index in wanted):
        from jax.experimental import multihost_utils

        whole = np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return lambda index: whole[index]

    def own(index: tuple[slice, ...]) -> np.ndarray | None:
        for shard in leaf.addressable_shards:
            begins = [
                one.indices(size)[0] for one, size in zip(shard.index, leaf.shape, strict=True)
            ]
            ends = [begin + size for begin, size in zip(begins, shard.data.shape, strict=True)]
            if _within(index, tuple(map(slice, begins, ends))):
                moved = (
                    slice(one.start - begin, one.stop - begin)
                    for one, begin in zip(index, begins, strict=True)
                )
                return np.asarray(shard.data)[tuple(moved)]
        return None

    return own


def _within(inner: tuple[slice, ...], outer: tuple[slice, ...]) -> bool:
    return all(a.start <= b.start and b.stop <= a.stop for a, b in zip(outer, inner, strict=True))


@contextlib.contextmanager
def _in_one_sentence(path: Path) -> Iterator[None]:
    try:
        yield
    # While writing, too, orbax raises errors of many types.
    except Exception as error:
        if hosts.tells_of_loss(error):
            raise
        raise RunError(
            f"a checkpoint could not be written to {path}: {_first_line(error)}; make room and run the "
            "same command again to continue"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
