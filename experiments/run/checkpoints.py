"""States on disk, by orbax: the two newest, written beside the training, read back with care.

Several processes save and restore jointly: each writes what its devices hold, into one folder.
"""

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

from experiments.run import agreement, hosts
from experiments.run.errors import RunError

KEPT = 2


class Checkpoints:
    """The checkpoints of a run, one folder a generation.

    Args:
        path: the folder they lie in; `damaged` beside it takes those that cannot be read.
        read_only: change nothing on disk, as beside a run that is still going on.
    """

    def __init__(self, path: Path, read_only: bool = False) -> None:
        import logging

        import orbax.checkpoint as ocp

        # Of every save and restore orbax tells at length.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._ocp = ocp
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
                        max_to_keep=KEPT, read_only=self._read_only
                    ),
                    item_handlers={
                        "state": self._ocp.StandardCheckpointHandler(),
                        "totals": self._ocp.JsonCheckpointHandler(),
                    },
                )
        return self._manager

    def _clear_unfinished(self) -> None:
        """Removes what a killed process was still writing: orbax renames what is whole."""
        if hosts.first():
            for path in self._path.glob(f"*{self._ocp.utils.TMP_DIR_SUFFIX}*"):
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
                    state=args.StandardSave(state), totals=args.JsonSave(dict(totals))
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
        tell = tell or (lambda sentence: print(sentence, file=sys.stderr))
        if not agreement.agreed(self._path.is_dir()):
            return None
        wanted = jax.eval_shape(start)
        if place is None:
            place = SingleDeviceSharding(jax.local_devices()[0])
        shapes = jax.tree.map(_stored, wanted, jax.tree.broadcast(place, wanted))
        if on_host:
            shapes = jax.tree.map(_of_numpy, shapes)
        generations = sorted(self._open().all_steps(), reverse=True)
        agreement.same(max(generations, default=-1), "the newest checkpoint")
        damaged: dict[int, str] = {}
        found = None
        for generation in generations:
            try:
                found = self._read(generation, shapes)
                break
            except RunError:
                raise
            # Orbax, its readers and decoders raise errors of a dozen types for damaged files.
            except Exception as error:
                if hosts.tells_of_loss(error):
                    raise
                damaged[generation] = _first_line(error)
        agreement.same(found[0] if found else -1, "the newest checkpoint that can be read")
        if found is None:
            if damaged:
                raise RunError(
                    f"none of the checkpoints in {self._path} can be read (the newest: "
                    f"{damaged[max(damaged)]}); look at them, or start anew with --overwrite"
                )
            return None
        generation, state, totals = found
        for other, reason in damaged.items():
            where = "" if self._read_only else f"; it now lies in {self._set_aside(other)}"
            tell(
                f"WARNING: the checkpoint of generation {other} cannot be read ({reason}){where}, "
                f"and that of generation {generation} is used."
            )
        state = jax.tree.map(
            lambda x, w: x if w.size else jnp.zeros(w.shape, w.dtype), state, wanted
        )
        return generation, state, totals

    def _read(self, generation: int, shapes: Any) -> tuple[int, Any, dict[str, Any]]:
        wanted = _by_path(shapes)
        saved = _by_path(self._manager.item_metadata(generation)["state"].tree)
        for name in wanted.keys() | saved.keys():
            if wanted.get(name) != saved.get(name):
                raise RunError(
                    f"the checkpoint of generation {generation} does not fit the settings: {name} "
                    f"is {saved.get(name, 'absent')} where {wanted.get(name, 'absent')} is right"
                )
        args = self._ocp.args
        found = self._manager.restore(
            generation,
            args=args.Composite(state=args.StandardRestore(shapes), totals=args.JsonRestore()),
        )
        return generation, found["state"], found["totals"]

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


def _by_path(tree: Any) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


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
