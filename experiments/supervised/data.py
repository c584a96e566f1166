"""Images of digits with their labels: scikit-learn's, or files in MNIST's format."""

import gzip
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from experiments.run.errors import UsageError
from experiments.run.paths import check_there, exists

# Of scikit-learn's 1797 digits so many are held out; MNIST's format says for itself.
HELD_OUT = 360
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


class Data(NamedTuple):
    """Images as rows, scaled to mean 0 and standard deviation 1 over the training images.

    Attributes:
        x: training images.
        y: their labels, from 0.
        held_out_x: images that are never trained on.
        held_out_y: their labels.
        classes: how many there are.
    """

    x: Float[np.ndarray, "images pixels"]
    y: Int[np.ndarray, "images"]
    held_out_x: Float[np.ndarray, "held_out pixels"]
    held_out_y: Int[np.ndarray, "held_out"]
    classes: int


def load(folder: Path | None) -> Data:
    """Scikit-learn's digits (1437 to train on, 360 held out), or the four files in `folder`.

    Raises:
        UsageError: for a file that is missing or not what it should be.
    """
    parts = digits() if folder is None else tuple(read_idx(folder, name) for name in FILES)
    x, y, held_out_x, held_out_y = parts
    for images, labels, name in ((x, y, "training"), (held_out_x, held_out_y, "held-out")):
        if len(images) != len(labels):
            raise UsageError(
                f"--data {folder}: {len(images)} {name} images, but {len(labels)} labels"
            )
    flat = [images.reshape(len(images), -1).astype(np.float32) for images in (x, held_out_x)]
    mean, std = flat[0].mean(), flat[0].std()
    x, held_out_x = ((images - mean) / std for images in flat)
    y, held_out_y = y.astype(np.int32), held_out_y.astype(np.int32)
    return Data(x, y, held_out_x, held_out_y, int(max(y.max(), held_out_y.max())) + 1)


def digits() -> tuple[np.ndarray, ...]:
    """Scikit-learn's digits (8 x 8 pixels, from 43 writers), divided by a fixed permutation."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    test, train = order[:HELD_OUT], order[HELD_OUT:]
    return images[train], labels[train], images[test], labels[test]


def check_files(folder: Path) -> None:
    """Raises UsageError for the first of the four files that is not in a folder."""
    check_there(folder, f"--data {folder}")
    for name in FILES:
        file_of(folder, name)


def file_of(folder: Path, name: str) -> Path:
    """A file as it is, or with .gz behind its name.

    Raises:
        UsageError: where there is neither.
    """
    for path in (folder / name, folder / (name + ".gz")):
        if exists(path, f"--data {folder}"):
            return path
    raise UsageError(f"--data {folder}: there is neither {name} nor {name}.gz")


def read_idx(folder: Path, name: str) -> np.ndarray:
    """An array of bytes in the IDX format, as it is or with .gz behind its name.

    Raises:
        UsageError: if it is missing, cut short, or no such file.
    """
    path = file_of(folder, name)
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"--data: {path} cannot be read: {error}") from error
    axes = 3 if "idx3" in name else 1
    head = 4 + 4 * axes
    # Two zero bytes, 8 for unsigned bytes, the number of axes, then their lengths.
    if content[:4] != bytes([0, 0, 8, axes]):
        raise UsageError(f"--data: {path} does not begin as an IDX file of {axes} axes does")
    shape = tuple(int(n) for n in np.frombuffer(content[4:head], ">u4"))
    if len(content) != head + math.prod(shape):
        raise UsageError(
            f"--data: {path} has {len(content) - head} bytes of data where its shape {list(shape)} "
            f"needs {math.prod(shape)}"
        )
    return np.frombuffer(content[head:], np.uint8).reshape(shape)
