"""Digests of a checkpoint: of every leaf of its state, and of its small files; SHA-256 throughout.

In the folder of a checkpoint, beside what orbax writes:

- digests/process_N.json: of each leaf that process N wrote, by path, one digest a region of the leaf
- digests/files.json: of every other file, those of the processes too; of the files with the leaves' numbers
  the sizes; the generation. Its first line is the digest of the rest.

A region is the part of a leaf that one device holds, so that the same state is checked wherever it is read.
Imports neither JAX nor orbax.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

FOLDER, FILES = "digests", "files.json"
# Where orbax writes which items there are; a checkpoint of an earlier version has no digests among them.
ITEMS = "_CHECKPOINT_METADATA"
# Folders of the files that hold the leaves' numbers.
DATA = "d"

Leaves = dict[str, dict[str, str]]


class Damaged(Exception):
    """A checkpoint is not what was saved; the message says where it differs."""


def of_array(values: np.ndarray) -> str:
    """The digest of an array's bytes, in C order; its shape and type are not part of it.

    Example:
        >>> of_array(np.zeros(2, np.uint8)) == of_array(np.zeros((1, 1), np.uint16))
        True
    """
    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return hashlib.sha256(flat.data).hexdigest()


def region_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """The part of an array that an index names, as the key of its digest.

    Example:
        >>> region_of((slice(None), slice(2, 4)), (3, 8))
        '0:3,2:4'
    """
    bounds = (one.indices(size) for one, size in zip(index, shape, strict=True))
    return ",".join(f"{begin}:{end}" for begin, end, _ in bounds)


def index_of(region: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The index of :func:`region_of`.

    Raises:
        Damaged: where it is none of an array of this shape.

    Example:
        >>> index_of("0:3,2:4", (3, 8))
        (slice(0, 3, None), slice(2, 4, None))
    """
    parts = [part.split(":") for part in region.split(",")] if region else []
    bounds = [(int(part[0]), int(part[-1])) for part in parts]
    if len(bounds) != len(shape) or any(
        not 0 <= begin <= end <= size for (begin, end), size in zip(bounds, shape, strict=True)
    ):
        raise Damaged(f"a digest is of the region {region!r}, of an array of shape {list(shape)}")
    return tuple(slice(begin, end) for begin, end in bounds)


def seal(checkpoint: Path, generation: int) -> None:
    """Writes digests/files.json of a checkpoint that is otherwise whole."""
    digests: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for path in files_in(checkpoint):
        name = path.relative_to(checkpoint).as_posix()
        if name == f"{FOLDER}/{FILES}":
            continue
        if path.parent.name == DATA:
            sizes[name] = path.stat().st_size
        else:
            digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    content = json.dumps({"generation": generation, "files": digests, "sizes": sizes}, indent=1)
    own = hashlib.sha256(content.encode()).hexdigest()
    (checkpoint / FOLDER).mkdir(exist_ok=True)
    (checkpoint / FOLDER / FILES).write_text(f"{own}\n{content}")


def check_files(checkpoint: Path, generation: int) -> Leaves | None:
    """Compares the files of a checkpoint with their digests.

    Args:
        checkpoint: its folder.
        generation: that it is of.

    Returns:
        The digests of its leaves; None for a checkpoint of an earlier version, which has none.

    Raises:
        Damaged: where a file is missing or is not what was written.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "totals").write_text("{}")
        >>> seal(folder, 3)
        >>> check_files(folder, 3)
        {}
        >>> _ = (folder / "totals").write_text("[]")
        >>> check_files(folder, 3)
        Traceback (most recent call last):
        experiments.run.digests.Damaged: totals is not what was written
    """
    if not (checkpoint / FOLDER).exists() and _is_earlier(checkpoint / ITEMS):
        return None
    try:
        own, _, content = (checkpoint / FOLDER / FILES).read_bytes().partition(b"\n")
    except OSError as error:
        raise Damaged(f"{FOLDER}/{FILES} cannot be read: {error.strerror}") from error
    if own != hashlib.sha256(content).hexdigest().encode():
        raise Damaged(f"{FOLDER}/{FILES} is not what was written")
    # From here on it is known to be what `seal` wrote.
    found = json.loads(content)
    if found["generation"] != generation:
        raise Damaged(f"it is of generation {found['generation']}")
    for name, size in found["sizes"].items():
        if _read(checkpoint, name, lambda path: path.stat().st_size) != size:
            raise Damaged(f"{name} has not the {size:,} bytes that were written")
    leaves: Leaves = {}
    for name, digest in found["files"].items():
        text = _read(checkpoint, name, Path.read_bytes)
        if hashlib.sha256(text).hexdigest() != digest:
            raise Damaged(f"{name} is not what was written")
        if name.startswith(f"{FOLDER}/") and name.endswith(".json"):
            for leaf, regions in json.loads(text).items():
                leaves.setdefault(leaf, {}).update(regions)
    return leaves


def check_leaf(
    name: str, shape: tuple[int, ...], regions: Mapping[str, str], part: Callable[..., Any]
) -> None:
    """Compares a leaf with its digests.

    Args:
        name: its path.
        shape: of the whole leaf.
        regions: digests, by region.
        part: gives the array at an index; None where another process has it.

    Raises:
        Damaged: where a region differs, or the regions are not the whole leaf.

    Example:
        >>> x = np.arange(6).reshape(2, 3)
        >>> check_leaf("x", x.shape, {"0:2,0:3": of_array(x)}, lambda index: x[index])
        >>> check_leaf("x", x.shape, {"0:2,0:3": of_array(x)}, lambda index: x[index] + 1)
        Traceback (most recent call last):
        experiments.run.digests.Damaged: the leaf x is not what was saved
    """
    indices = [index_of(region, shape) for region in regions]
    covered = sum(math.prod(one.stop - one.start for one in index) for index in indices)
    if covered != math.prod(shape):
        raise Damaged(
            f"the leaf {name} has digests of {covered:,} of its {math.prod(shape):,} numbers"
        )
    for index, digest in zip(indices, regions.values(), strict=True):
        values = part(index)
        if values is not None and of_array(np.asarray(values)) != digest:
            raise Damaged(f"the leaf {name} is not what was saved")


def files_in(folder: Path) -> Iterator[Path]:
    """All files below a folder, in order."""
    for top, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(top) / name for name in sorted(names))


def _read(checkpoint: Path, name: str, read: Callable[[Path], Any]) -> Any:
    try:
        return read(checkpoint / name)
    except OSError as error:
        raise Damaged(f"{name} cannot be read: {error.strerror}") from error


def _is_earlier(items: Path) -> bool:
    try:
        return f'"{FOLDER}"'.encode() not in items.read_bytes()
    except OSError as error:
        raise Damaged(f"{items.name} cannot be read: {error.strerror}") from error
