"""GGUF files, of llama.cpp: their settings, and their tensors as floats.

The header is read here, with every length checked against the file; the package `gguf` turns quantised
blocks into floats.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.models.config_json import shown
from experiments.run.errors import UsageError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
TEXT, ARRAY = 8, 9
# Types of numbers, by the codes of the format.
NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"), 1: np.dtype("i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"),
    5: np.dtype("<i4"), 6: np.dtype("<f4"), 7: np.dtype("?"), 10: np.dtype("<u8"), 11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}  # fmt: skip
MOST_DIMENSIONS = 4


class Tensor(NamedTuple):
    """Where a tensor is in a file.

    Attributes:
        shape: rows first, as in NumPy.
        kind: the code of its type.
        start: its first byte.
        size: its bytes.
    """

    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


@dataclass(frozen=True, kw_only=True)
class GGUFFile:
    """What the header of a file says.

    Attributes:
        path: of the file.
        settings: by their keys, such as "llama.block_count".
        tensors: by their names.
    """

    path: Path
    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32.

        Raises:
            UsageError: for a type that the package `gguf` does not turn into floats, or without it.
        """
        tensor = self.tensors[name]
        package = _package()
        rows = math.prod(tensor.shape[:-1])
        try:
            with self.path.open("rb") as file:
                file.seek(tensor.start)
                raw = np.frombuffer(file.read(tensor.size), np.uint8)
        except OSError as error:
            raise UsageError(f"{self.path} cannot be read: {error.strerror or error}") from error
        if raw.size != tensor.size:
            raise UsageError(f"{self.path} was cut off while it was read")
        kind = package.GGMLQuantizationType(tensor.kind)
        try:
            # Blocks of any bytes are numbers, some of which are not finite.
            with np.errstate(all="ignore"):
                found = package.dequantize(raw.reshape(rows, -1), kind)
        except NotImplementedError as error:
            raise UsageError(
                f"{self.path}: {name} is of type {kind.name}, which the package gguf does not turn into "
                "floats; take a file with another quantisation"
            ) from error
        return np.asarray(found, np.float32).reshape(tensor.shape)

    def text(self, key: str, default: str | None = None) -> str:
        """A setting that is a text."""
        return self._setting(key, default, str, "a text")

    def flag(self, key: str, default: bool | None = None) -> bool:
        """A setting that is true or false."""
        return self._setting(key, default, bool, "true or false")

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A setting that is a whole number of at least so many."""
        right = f"a whole number of at least {least}"
        found = self._setting(key, default, int, right)
        if found < least:
            raise self._wrong(key, right)
        return found

    def number(self, key: str, default: float | None = None) -> float:
        """A setting that is a positive number; one in float32 as it is written in decimals."""
        found = self._setting(key, default, (int, float), "a positive number")
        if not 0 < found < math.inf:
            raise self._wrong(key, "a positive number")
        return float(found)

    def several(self, key: str, kind: type, default: list[Any] | None = None) -> list[Any]:
        """A setting that is a list of texts (``str``) or whole numbers (``int``)."""
        right = "a list of texts" if kind is str else "a list of whole numbers"
        found = self._setting(key, default, list, right)
        if any(type(one) is not kind for one in found):
            raise self._wrong(key, right)
        return found

    def _setting(self, key: str, default: Any, kind: Any, right: str) -> Any:
        """A setting of a type.

        Raises:
            UsageError: where it is absent and has no default, or is something else.
        """
        if key not in self.settings:
            if default is None:
                raise UsageError(f"{self.path} has no setting {key}; it must be {right}")
            return default
        found = self.settings[key]
        # True is an int of Python.
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            raise self._wrong(key, right)
        return found

    def _wrong(self, key: str, right: str) -> UsageError:
        return UsageError(f"{self.path}: {key} must be {right}, got {shown(self.settings[key])}")


def open_gguf(path: Path) -> GGUFFile:
    """The header of a file.

    Raises:
        UsageError: for a file that is absent, of another format or version, cut off or damaged, and
            without the package `gguf`.

    Example:
        >>> open_gguf(Path(__file__))
        Traceback (most recent call last):
        ...
        experiments.run.errors.UsageError: ...gguf_file.py is no GGUF file: it does not begin with GGUF
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise UsageError(f"{path} is no GGUF file: it does not begin with GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                reader = _Reader(path, content)
                try:
                    return reader.file()
                finally:
                    reader.view.release()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error


class _Reader:
    """Reads a header from its beginning to its end."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path = path
        self.view = memoryview(content)
        self.at = 4

    def file(self) -> GGUFFile:
        version = self.integer("<I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "is of a big-endian machine" if swapped in VERSIONS else f"has version {version}"
            raise UsageError(
                f"{self.path} {what}; versions 2 and 3 of GGUF, little-endian, are read: convert the "
                "model again by llama.cpp"
            )
        tensors, count = self.integer("<Q"), self.integer("<Q")
        settings = {}
        for _ in range(count):
            key = self.text()
            settings[key] = self.value(self.integer("<I"))
        places = [self.place() for _ in range(tensors)]
        alignment = settings.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 2**20:
            raise self.damaged(f"general.alignment {shown(alignment)}")
        data = -(-self.at // alignment) * alignment
        found = {}
        for name, shape, kind, offset in places:
            start, size = data + offset, self.size(name, shape, kind)
            if start + size > len(self.view):
                raise UsageError(
                    f"{self.path} is cut off: {name} ends at byte {start + size}, the file has "
                    f"{len(self.view)}; fetch it again"
                )
            found[name] = Tensor(shape, kind, start, size)
        return GGUFFile(path=self.path, settings=settings, tensors=found)

    def place(self) -> tuple[str, tuple[int, ...], int, int]:
        """A tensor's name, shape, type and offset."""
        name, dimensions = self.text(), self.integer("<I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self.damaged(f"{name} with {dimensions} dimensions")
        shape = tuple(self.integer("<Q") for _ in range(dimensions))[::-1]
        if 0 in shape:
            raise self.damaged(f"{name} of shape {list(shape)}")
        return name, shape, self.integer("<I"), self.integer("<Q")

    def size(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        """The bytes of a tensor."""
        package = _package()
        try:
            block, size = package.GGML_QUANT_SIZES[package.GGMLQuantizationType(kind)]
        except (ValueError, KeyError) as error:
            raise UsageError(
                f"{self.path}: {name} is of type {kind}, which the package gguf does not know; a newer "
                "one may (pip install -U gguf)"
            ) from error
        if shape[-1] % block:
            raise self.damaged(f"{name} with rows of {shape[-1]} in blocks of {block}")
        return math.prod(shape) // block * size

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind == ARRAY:
            kind, length = self.integer("<I"), self.integer("<Q")
            if kind == TEXT:
                return self.texts(length)
            return self.numbers(kind, length)
        return self.numbers(kind, 1)[0]

    def numbers(self, kind: int, length: int) -> list[Any]:
        if kind not in NUMBERS:
            raise self.damaged(f"a setting of type {kind}")
        dtype = NUMBERS[kind]
        found = np.frombuffer(self.take(length * dtype.itemsize), dtype)
        if dtype == np.dtype("<f4"):
            # The shortest decimal that is the same in float32: 1e-05, not 9.999999747378752e-06.
            return [float(str(one)) for one in found]
        return found.tolist()

    def text(self) -> str:
        return self.texts(1)[0]

    def texts(self, count: int) -> list[str]:
        """Texts after their lengths: those of a tokenizer are a hundred thousand, hence one loop."""
        view, at, end = self.view, self.at, len(self.view)
        found = []
        try:
            for _ in range(count):
                begin = at + 8
                at = begin + int.from_bytes(view[at:begin], "little")
                if begin > end or at > end:
                    raise self.cut_off()
                found.append(str(view[begin:at], "utf-8"))
        except UnicodeDecodeError as error:
            raise self.damaged("a text that is not UTF-8") from error
        self.at = at
        return found

    def integer(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def take(self, size: int) -> bytes:
        if size > len(self.view) - self.at:
            raise self.cut_off()
        self.at += size
        return bytes(self.view[self.at - size : self.at])

    def cut_off(self) -> UsageError:
        return UsageError(
            f"{self.path} is cut off or damaged within its header (byte {self.at} of {len(self.view)}); "
            "fetch it again"
        )

    def damaged(self, what: str) -> UsageError:
        return UsageError(f"{self.path} is damaged: its header has {what}")


def _package() -> Any:
    """The package that knows types of tensors.

    Raises:
        UsageError: if it is missing.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise UsageError(
            "to read a GGUF file the package 'gguf' is missing: pip install 'eggroll-jax[gguf]'"
        ) from error
    return gguf
