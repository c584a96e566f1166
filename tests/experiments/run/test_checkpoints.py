"""Checkpoints come back bit for bit; damaged ones are set aside, loudly."""

import functools
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding

import eggroll
from experiments.run import digests, saving
from experiments.run.checkpoints import Checkpoints
from experiments.run.errors import RunError

PARAMS = {
    "w": jnp.arange(12.0).reshape(3, 4),
    "b": jnp.ones(4, jnp.bfloat16),
    "steps": jnp.int32(3),
}


def start(width: int = 4) -> Any:
    es = eggroll.EvolutionStrategy(optimizer=optax.adam(0.1), population=4, sigma=0.1)
    return {
        "es": es.init({**PARAMS, "w": jnp.ones((3, width))}, 7),
        "seen": jnp.float32(0),
        "empty": jnp.zeros((2, 0), jnp.int32),
        "none": None,
    }


def at(generation: int) -> Any:
    return {**start(), "seen": jnp.float32(generation) / 3}


def save(path: Path, generations: int) -> None:
    with Checkpoints(path) as checkpoints:
        for g in range(1, generations + 1):
            checkpoints.save(g, at(g), {"environment_steps": 10 * g})


def test_states_come_back_bit_for_bit(tmp_path: Path) -> None:
    save(tmp_path / "c", 5)
    with Checkpoints(tmp_path / "c") as checkpoints:
        generation, state, totals = checkpoints.restore(start) or (0, None, {})
    assert (generation, totals) == (5, {"environment_steps": 50})
    assert jax.tree.structure(state) == jax.tree.structure(at(5))
    for found, right in zip(jax.tree.leaves(state), jax.tree.leaves(at(5)), strict=True):
        assert found.dtype == right.dtype
        np.testing.assert_array_equal(np.asarray(found), np.asarray(right))
    kept = {path.name for path in (tmp_path / "c").iterdir()}
    assert kept == {"4", "5"}


def test_nothing_saved_is_nothing_restored(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore(start) is None


def test_a_saved_state_may_be_donated(tmp_path: Path) -> None:
    change = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = at(1)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, state, {})
        change(state)
        checkpoints.wait()
        _, found, _ = checkpoints.restore(start) or (0, None, {})
    np.testing.assert_array_equal(found["es"].params["w"], at(1)["es"].params["w"])


def write_after(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], None]) -> None:
    """Something happens in the background before a checkpoint is whole."""

    class Late:
        def result(self, timeout: float | None = None) -> None:
            happens()

    write = ocp.JsonCheckpointHandler.async_save

    async def async_save(*args: Any, **settings: Any) -> Any:
        return [*(await write(*args, **settings)), Late()]

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "async_save", async_save)


def fail() -> None:
    raise OSError("No space left on device")


class PowerCut(Exception):
    pass


def test_an_error_does_not_leave_a_checkpoint_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_after(monkeypatch, lambda: time.sleep(0.5))
    with pytest.raises(PowerCut) as error, Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, at(1), {})
        raise PowerCut
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"1"}
    assert not hasattr(error.value, "__notes__")
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert (checkpoints.restore(start) or (0,))[0] == 1


def test_a_write_that_fails_in_the_background_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_after(monkeypatch, fail)
    words = r"a checkpoint could not be written to .*: No space left on device; make room"
    with pytest.raises(RunError, match=words), Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, at(1), {})
    # It does not hide what ended the block, and is not lost either.
    with pytest.raises(PowerCut) as error, Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, at(1), {})
        raise PowerCut
    (note,) = error.value.__notes__
    assert re.match(words, note)


def test_what_a_killed_process_was_writing_is_cleared_away(tmp_path: Path) -> None:
    save(tmp_path / "c", 1)
    (tmp_path / "c" / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert (checkpoints.restore(start) or (0,))[0] == 1
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"1"}


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "name",
    [
        *("state/manifest.ocdbt", "state/_METADATA", "totals/metadata", "_CHECKPOINT_METADATA"),
        *("digests/process_0.json", "digests/files.json"),
    ],
)
@pytest.mark.parametrize("damage", [shorten, flip, Path.unlink])
# What orbax leaves unawaited when a file that it reads is damaged.
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning"
)
def test_a_damaged_newest_checkpoint_is_passed_over(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    save(tmp_path / "c", 3)
    damage(tmp_path / "c" / "3" / name)
    told: list[str] = []
    with Checkpoints(tmp_path / "c") as checkpoints:
        generation, state, totals = checkpoints.restore(start, told.append) or (0, None, {})
        assert (generation, totals) == (2, {"environment_steps": 20})
        assert float(state["seen"]) == float(at(2)["seen"])
        assert len(told) == 1
        assert "checkpoint of generation 3 is damaged" in told[0]
        assert (tmp_path / "damaged" / "3").is_dir()
        # Its generation is saved again in its time.
        checkpoints.save(3, at(3), {})
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert (checkpoints.restore(start) or (0,))[0] == 3


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning"
)
def test_where_none_can_be_read_nothing_is_moved(tmp_path: Path) -> None:
    save(tmp_path / "c", 3)
    for generation in ("2", "3"):
        shorten(tmp_path / "c" / generation / "state/manifest.ocdbt")
    with (
        Checkpoints(tmp_path / "c") as checkpoints,
        pytest.raises(RunError, match=r"none of the checkpoints in .* can be used .*--overwrite"),
    ):
        checkpoints.restore(start)
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"2", "3"}
    assert not (tmp_path / "damaged").exists()


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning"
)
def test_beside_a_run_that_goes_on_nothing_is_changed(tmp_path: Path) -> None:
    save(tmp_path / "c", 3)
    shorten(tmp_path / "c" / "3" / "state/manifest.ocdbt")
    # What a writer has not finished yet.
    (tmp_path / "c" / "4.orbax-checkpoint-tmp").mkdir()
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    told: list[str] = []
    with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
        assert (checkpoints.restore(start, told.append) or (0,))[0] == 2
    assert "checkpoint of generation 3 is damaged" in told[0]
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_one_that_a_run_removes_beside_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "c", 3)
    read, told = saving.read, list[str]()

    def gone(folder: Path, shapes: Any) -> Any:
        if folder.parent.name == "3":
            folder.parent.rename(folder.parent.parent / "4")
            digests.seal(folder.parent.parent / "4", 4)
        return read(folder, shapes)

    monkeypatch.setattr(saving, "read", gone)
    with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
        assert (checkpoints.restore(start, told.append) or (0,))[0] == 4
    assert not told


def swapped(path: Path, name: str) -> None:
    """The third checkpoint gets what the second has, both are sound by themselves."""
    target = path / "3" / name
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    copy = shutil.copytree if (path / "2" / name).is_dir() else shutil.copy
    copy(path / "2" / name, target)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("state", r"state/\S+ cannot be read: No such file"),
        ("totals", r"totals/\S+ is not what was written"),
        ("digests", "_CHECKPOINT_METADATA is not what was written|it is of generation 2"),
        (".", "it is of generation 2"),
    ],
)
def test_parts_of_another_checkpoint_are_damage(tmp_path: Path, name: str, words: str) -> None:
    save(tmp_path / "c", 3)
    swapped(tmp_path / "c", name)
    told: list[str] = []
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert (checkpoints.restore(start, told.append) or (0,))[0] == 2
    assert re.search(words, told[0])


def test_numbers_that_differ_from_their_digests_are_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a bit of the file flips and the decoder does not mind."""
    save(tmp_path / "c", 3)
    read = saving.read

    def flipped(folder: Path, shapes: Any) -> Any:
        state = read(folder, shapes)
        if folder.parent.name == "3":
            state["es"].params["w"] = -state["es"].params["w"]
        return state

    monkeypatch.setattr(saving, "read", flipped)
    told: list[str] = []
    with Checkpoints(tmp_path / "c") as checkpoints:
        generation, state, _ = checkpoints.restore(start, told.append) or (0, None, {})
    assert generation == 2
    np.testing.assert_array_equal(state["es"].params["w"], at(2)["es"].params["w"])
    assert "generation 3 is damaged (the leaf es/params/w is not what was saved)" in told[0]


def make_earlier(checkpoint: Path) -> None:
    """What earlier versions wrote: no digests."""
    shutil.rmtree(checkpoint / "digests")
    path = checkpoint / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    del content["item_handlers"]["digests"]
    path.write_text(json.dumps(content))


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    save(tmp_path / "c", 3)
    make_earlier(tmp_path / "c" / "3")
    with Checkpoints(tmp_path / "c") as checkpoints:
        generation, state, totals = checkpoints.restore(start) or (0, None, {})
        assert (generation, totals) == (3, {"environment_steps": 30})
        assert float(state["seen"]) == float(at(3)["seen"])
        # It may be the one before.
        checkpoints.save(4, at(4), {})
        checkpoints.wait()
        flip(tmp_path / "c" / "4" / "totals" / "metadata")
        assert (checkpoints.restore(start, lambda _: None) or (0,))[0] == 3


def test_digests_that_are_gone_are_no_earlier_version(tmp_path: Path) -> None:
    save(tmp_path / "c", 3)
    shutil.rmtree(tmp_path / "c" / "3" / "digests")
    told: list[str] = []
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert (checkpoints.restore(start, told.append) or (0,))[0] == 2
    assert "digests/files.json cannot be read: No such file" in told[0]


@pytest.mark.parametrize("saved", [jax.P(), jax.P("a"), jax.P(None, "a"), jax.P("a", "b")])
@pytest.mark.parametrize("read", [None, jax.P("a"), jax.P("b", "a")])
def test_a_state_over_devices_is_compared_however_it_is_read(
    tmp_path: Path, saved: jax.P, read: jax.P | None
) -> None:
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    state = {"w": jnp.arange(64.0).reshape(8, 8)}
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, jax.device_put(state, NamedSharding(mesh, saved)), {})
        checkpoints.wait()
        place = None if read is None else NamedSharding(mesh, read)
        _, found, _ = checkpoints.restore(lambda: state, place=place) or (0, None, {})
    np.testing.assert_array_equal(found["w"], state["w"])
    # What several devices hold has one digest.
    parts = NamedSharding(mesh, saved).devices_indices_map((8, 8)).values()
    regions = json.loads((tmp_path / "c" / "1" / "digests" / "process_0.json").read_text())["w"]
    assert len(regions) == len(set(map(str, parts)))


def test_a_checkpoint_is_synced_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And before the oldest is removed."""
    events: list[tuple[str, str]] = []
    fsync, rename, rmtree = os.fsync, os.rename, shutil.rmtree

    def note_fsync(number: int) -> None:
        events.append(("fsync", os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    def note_rename(old: Any, new: Any, **where: Any) -> None:
        events.append(("rename", str(new)))
        rename(old, new, **where)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    path = tmp_path / "c"
    removed: list[tuple[bool, bool]] = []

    def note_rmtree(old: Any, *args: Any, **options: Any) -> None:
        if Path(old) == path / "1":
            removed.append(((path / "3").is_dir(), ("fsync", str(path)) in events))
        rmtree(old, *args, **options)

    save(path, 2)
    monkeypatch.setattr(shutil, "rmtree", note_rmtree)
    events.clear()
    with Checkpoints(path) as checkpoints:
        checkpoints.save(3, at(3), {})
    named = events.index(("rename", str(path / "3")))
    before = {name.replace("3.orbax-checkpoint-tmp-whole", "3") for _, name in events[:named]}
    content = {str(one) for one in (path / "3").rglob("*") if one.parent.name != "d"}
    assert content | {str(path / "3")} <= before
    assert events[named + 1 :] == [("fsync", str(path)), ("fsync", str(tmp_path))]
    assert {one.name for one in path.iterdir()} == {"2", "3"}
    assert removed == [(True, True)]


def test_other_shapes_are_an_error_and_no_damage(tmp_path: Path) -> None:
    save(tmp_path / "c", 2)
    with (
        Checkpoints(tmp_path / "c") as checkpoints,
        pytest.raises(
            RunError,
            match=r"does not fit the settings: es/\S*w must be float32\[3, 5\], got float32\[3, 4\]",
        ),
    ):
        checkpoints.restore(functools.partial(start, 5))
    assert not (tmp_path / "damaged").exists()


def test_a_disk_without_room_gets_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "c", 2)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.restore(start)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(RunError, match=r"0.0 MiB free, and a checkpoint may take 1.0 MiB"):
            checkpoints.save(3, at(3), {})
        assert (checkpoints.restore(start) or (0,))[0] == 2


def test_a_place_that_is_no_folder_gets_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        Checkpoints(tmp_path / "file" / "c") as checkpoints,
        pytest.raises(RunError, match="a checkpoint could not be written") as error,
    ):
        checkpoints.save(1, at(1), {})
    assert "\n" not in str(error.value)
