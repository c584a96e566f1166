"""Text data sets of the Hugging Face hub, streamed once into files of bytes that are memory-mapped."""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from experiments.run.errors import RunError, UsageError

# Short names, and where they are on the hub; any other data set is named by PREFIX.
NAMES = {"minipile": "JeanKaddour/minipile"}
PREFIX = "hf:"
# Of a data set without a validation split, one document in so many is held out.
ONE_IN = 100
HELD_OUT_BYTES = 2**24


@runtime_checkable
class Hub(Protocol):
    """Where data sets come from; the tests have one that needs no network."""

    def splits(self, name: str) -> list[str]:
        """The names of the parts of a data set."""
        ...

    def rows(self, name: str, split: str) -> Iterable[Mapping[str, Any]]:
        """The documents of a part, one after the other."""
        ...


class HuggingFace:
    """The hub itself, by its package `datasets`; NAME or NAME:CONFIGURATION."""

    def splits(self, name: str) -> list[str]:
        from datasets import get_dataset_split_names

        return list(get_dataset_split_names(*name.split(":", 1)))

    def rows(self, name: str, split: str) -> Iterable[Mapping[str, Any]]:
        from datasets import load_dataset

        return load_dataset(*name.split(":", 1), split=split, streaming=True)


class Parts(NamedTuple):
    """Documents to train on and held-out ones, each with a byte 0 before it."""

    train: UInt8[np.ndarray, "train"]
    held_out: UInt8[np.ndarray, "held_out"]


def is_data_set(name: str) -> bool:
    """Whether a name is that of a data set of the hub."""
    return name in NAMES or name.startswith(PREFIX)


def fetch(name: str, limit: int, hub: Hub | None = None, folder: Path | None = None) -> Parts:
    """A data set as memory-mapped bytes; from the hub the first time, from the cache after that.

    Args:
        name: one of `NAMES`, or "hf:OWNER/NAME" with ":CONFIGURATION" after it where it has several.
        limit: bytes of the part to train on, rounded up to whole documents.
        hub: the Hugging Face hub by default.
        folder: the cache; `eggroll/text` in the user's cache folder by default.

    Raises:
        UsageError: where the data set cannot be reached, or is not one of texts.
        RunError: where the cache cannot be written.
    """
    repository = NAMES.get(name) or name.removeprefix(PREFIX)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = (folder or home / "eggroll" / "text") / repository.replace("/", "--").replace(
        ":", "--"
    )
    train, held_out = folder / f"train-{limit}.bin", folder / f"held-out-{limit}.bin"
    # The first is renamed last: where it is, both are whole.
    if not train.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            parts = [path.with_name(path.name + ".part") for path in (train, held_out)]
            with parts[0].open("wb") as a, parts[1].open("wb") as b:
                _download(name, repository, limit, hub or HuggingFace(), a, b)
            parts[1].replace(held_out)
            parts[0].replace(train)
        except OSError as error:
            raise RunError(
                f"{error.filename or folder} could not be written: {error.strerror or error}"
            ) from error
    # What is empty cannot be mapped.
    mapped = [
        np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
        for path in (train, held_out)
    ]
    return Parts(*mapped)


def _download(
    name: str, repository: str, limit: int, hub: Hub, train: BinaryIO, held_out: BinaryIO
) -> None:
    """Writes both files, as far as their limits."""
    splits = _reached(name, lambda: iter(hub.splits(repository)))
    validation = next((split for split in splits if split in ("validation", "valid", "test")), None)
    if validation is not None:
        _write(_texts(name, hub, repository, validation), held_out, HELD_OUT_BYTES)
        _write(_texts(name, hub, repository, "train"), train, limit)
        return
    for number, text in enumerate(_texts(name, hub, repository, "train")):
        if number % ONE_IN == 0 and held_out.tell() < HELD_OUT_BYTES:
            held_out.write(text)
        else:
            train.write(text)
        if train.tell() >= limit:
            break


def _write(texts: Iterator[bytes], file: BinaryIO, limit: int) -> None:
    for text in texts:
        file.write(text)
        if file.tell() >= limit:
            break


def _texts(name: str, hub: Hub, repository: str, split: str) -> Iterator[bytes]:
    """The documents, each with a byte 0 before it."""
    for row in _reached(name, lambda: iter(hub.rows(repository, split))):
        if not isinstance(row.get("text"), str):
            raise UsageError(
                f"--data {name}: its rows have the columns {', '.join(map(repr, row))}; one of texts, "
                "called 'text', is needed"
            )
        yield b"\0" + row["text"].encode()


def _reached(name: str, begin: Any) -> Iterator[Any]:
    """What an iterator of the hub gives, its errors as one sentence."""
    try:
        yield from begin()
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--data {name}: the package {error.name!r} is missing: pip install datasets"
        ) from error
    # Over a network the package, and those under it, raise errors of many types.
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UsageError(
            f"--data {name}: the Hugging Face hub does not give it ({type(error).__name__}: {reason}); "
            "connect this machine, or name a file or folder of texts"
        ) from error
