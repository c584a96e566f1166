"""Text is the same every time, divided by documents, or refused in a sentence."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.run.errors import UsageError
from experiments.run.text import documents, split


def test_every_python_carries_text() -> None:
    topics = documents(None)
    assert sum(map(len, topics)) > 300_000
    assert topics == documents(None)
    with_sources = documents(None, sources=True)
    assert with_sources[: len(topics)] == topics
    assert sum(map(len, with_sources)) > 10 * sum(map(len, topics))
    assert (Path(pytest.__file__)).read_bytes() not in with_sources  # of other people


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, text in {"b/2": b"two", "a": b"one", "c": b"", "d": b"two", ".git": b"no"}.items():
        (tmp_path / name).write_bytes(text)
    assert documents(tmp_path) == [b"one", b"two"]
    # The path is what counts; sources are for where there is none.
    assert documents(tmp_path / "a", sources=True) == [b"one"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere", "nowhere: there is no such file or folder"),
        ("empty", "empty: the file is empty"),
        ("folder", "folder: its 1 files are empty"),
    ],
)
def test_what_holds_no_text_is_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "one").touch()
    with pytest.raises(UsageError, match=words):
        documents(tmp_path / name)


texts = st.lists(st.binary(min_size=1, max_size=50), min_size=2, max_size=20, unique=True)


@given(texts, st.floats(0.01, 0.99), st.randoms())
def test_documents_are_divided_by_what_is_in_them(found, share, chance) -> None:
    train, test = split(found, share)
    assert train
    assert test
    assert sorted(train + test) == sorted(found)
    # Enough is held out, unless all but one document are, and no more than the last one made it.
    taken, whole = sum(map(len, test)), sum(map(len, found))
    assert taken >= share * whole or len(train) == 1
    assert len(test) == 1 or taken - max(map(len, test)) < share * whole
    # The order in which they come changes nothing.
    mixed = chance.sample(found, len(found))
    assert set(split(mixed, share)[1]) == set(test)


def test_one_document_is_cut() -> None:
    assert split([b"0123456789"], 0.25) == ([b"01234567"], [b"89"])


@pytest.mark.parametrize(
    ("found", "share", "least", "words"),
    [
        ([b"abc", b"def"], 0.0, 1, "--held-out 0.0: choose a share between 0 and 1"),
        ([b"abc", b"def"], 1.0, 1, "--held-out 1.0: choose"),
        ([b"a"], 0.5, 1, "0 bytes to train on where at least 1 are needed"),
        ([b"abc" * 20, b"de"], 0.5, 5, "2 bytes .* where at least 5 are needed"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    found: list[bytes], share: float, least: int, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        split(found, share, least)
