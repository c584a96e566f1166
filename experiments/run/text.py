"""Text to train language models on: what every Python carries with it, or files of one's own; as bytes."""

import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from experiments.run.errors import UsageError
from experiments.run.paths import check_there

# Folders of the standard library that are not sources of it: other people's packages, and tests.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "pydoc_data", "__pycache__"}


def documents(path: Path | None, sources: bool = False) -> list[bytes]:
    """Documents, none empty and no two the same, in an order that is always the same.

    Args:
        path: a file, which is one document, or a folder, in which each file is one (hidden ones are left
            out). None stands for the help topics that Python carries as `pydoc_data`, half a megabyte;
            other versions of Python have other ones.
        sources: where `path` is None, also the sources of the standard library, ten megabytes more.

    Raises:
        UsageError: where there is no such path, it cannot be read, or there is nothing in it.

    Example:
        >>> found = documents(None)
        >>> len(found) > 50, b"statement" in b" ".join(found)
        (True, True)
    """
    if path is None:
        from pydoc_data.topics import topics

        found = [text.encode() for _, text in sorted(topics.items())]
        if sources:
            library = Path(sysconfig.get_path("stdlib"))
            found += [file.read_bytes() for file in _files(library, ".py", LEFT_OUT)]
    else:
        check_there(path, f"--data {path}")
        files = _files(path, "", set()) if path.is_dir() else [path]
        try:
            found = [file.read_bytes() for file in files]
        except OSError as error:
            raise UsageError(
                f"--data: {error.filename} cannot be read: {error.strerror}"
            ) from error
        if not any(found):
            what = f"its {len(files)} files are" if path.is_dir() else "the file is"
            raise UsageError(f"--data {path}: {what} empty; choose one with text in it")
    # The same text twice could be trained on and held out at once.
    return [text for text in dict.fromkeys(found) if text]


def _files(folder: Path, ending: str, left_out: set[str]) -> list[Path]:
    """The files below a folder whose name ends so, in order, without hidden ones."""

    def wanted(path: Path) -> bool:
        parts = path.relative_to(folder).parts
        return not any(part in left_out or part.startswith(".") for part in parts)

    return [p for p in sorted(folder.rglob("*" + ending)) if p.is_file() and wanted(p)]


def split(
    documents: Sequence[bytes], held_out: float, at_least: int = 1
) -> tuple[list[bytes], list[bytes]]:
    """Documents to train on, and documents that are never trained on.

    Documents are held out in the order of a hash of what is in them, until they have their share of the
    bytes, so that the division depends on nothing but the documents. One alone is cut in two: its end is
    held out.

    Args:
        documents: of :func:`documents`.
        held_out: the share of all bytes, between 0 and 1.
        at_least: bytes that each part must have, such as the length of a sequence and one more.

    Returns:
        Two lists: to train on, held out.

    Raises:
        UsageError: for a share that is none, or where a part would be too short.

    Example:
        >>> split([b"a short one", b"another", b"a third, longer than both"], 0.2)
        ([b'a short one', b'another'], [b'a third, longer than both'])
    """
    if not 0 < held_out < 1:
        raise UsageError(f"--held-out {held_out}: choose a share between 0 and 1")
    wanted = held_out * sum(map(len, documents))
    if len(documents) == 1:
        cut = len(documents[0]) - max(round(wanted), 1)
        train, test = [documents[0][:cut]], [documents[0][cut:]]
    else:
        order = sorted(documents, key=lambda text: hashlib.sha256(text).digest())
        taken, count = 0, 0
        # One at least is held out, and one left to train on.
        while count < len(order) - 1 and (count == 0 or taken < wanted):
            taken += len(order[count])
            count += 1
        chosen = set(order[:count])
        train = [text for text in documents if text not in chosen]
        test = [text for text in documents if text in chosen]
    for part, name in ((train, "to train on"), (test, "held out")):
        size = sum(map(len, part))
        if size < at_least:
            raise UsageError(
                f"the text is too short: {size:,} bytes {name} where at least {at_least:,} are needed; "
                "name more with --data, or take shorter sequences"
            )
    return train, test
