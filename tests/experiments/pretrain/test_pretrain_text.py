"""What is read in pretraining: anchors against brute force, streams, files, and a hub without a network."""

import gzip
import lzma
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.pretrain import hub
from experiments.pretrain.anchors import anchors, ngram_bits
from experiments.pretrain.config import PRESETS
from experiments.pretrain.data import join, load, pieces, windows
from experiments.run.errors import RunError, UsageError
from experiments.run.fields import changed

TINY = PRESETS["tiny"]


def as_array(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8)


# ---------------------------------------------------------------- anchors


def brute_force(train: bytes, context: bytes, byte: int) -> float:
    """The probability of a byte after a context, straight from the definition."""
    if not context:
        return (train.count(byte) + 1) / (len(train) + 256)
    n = len(context)
    followers = Counter(train[i + n] for i in range(len(train) - n) if train[i : i + n] == context)
    shorter = brute_force(train, context[1:], byte)
    if not followers:
        return shorter
    return (followers[byte] + len(followers) * shorter) / (followers.total() + len(followers))


small = st.lists(st.sampled_from(b"ab\0z"), min_size=2, max_size=30).map(bytes)


@given(small, small)
def test_ngrams_are_those_of_the_definition(train: bytes, held_out: bytes) -> None:
    found = ngram_bits(as_array(train), as_array(held_out))
    for order, bits in enumerate(found, 1):
        assert len(bits) == len(held_out) - 1
        for i, cost in enumerate(bits, 1):
            context = held_out[max(0, i - order + 1) : i]
            right = -math.log2(brute_force(train, context, held_out[i]))
            assert cost == pytest.approx(right, rel=1e-12)


@given(small, st.integers(1, 3))
def test_ngram_probabilities_sum_to_one(train: bytes, order: int) -> None:
    # All bytes after the same context, the probabilities of one distribution.
    text = b"".join(train[-2:] + bytes([b]) for b in range(256))
    bits = ngram_bits(as_array(train), as_array(text))[order - 1]
    total = sum(2.0 ** -bits[1::3])
    assert total == pytest.approx(1)


def test_anchors_in_order_on_english() -> None:
    text = join(
        [b"the cat sat on the mat and the dog sat on the log. " * 30, b"a dog is on the mat"]
    )
    found = anchors(text[:1000], text[1000:])
    assert 8 > found.unigram > found.bigram > found.trigram > 0
    predicted = text[1001:].tobytes()
    assert found.gzip == 8 * len(gzip.compress(predicted, 9)) / len(predicted)
    assert lzma.decompress(lzma.compress(predicted)) == predicted
    assert 0 < found.xz < 8


# ---------------------------------------------------------------- streams


@given(st.binary(min_size=7, max_size=60), st.integers(1, 4), st.integers(1, 6))
def test_every_stream_reads_on_and_round(text: bytes, streams: int, tokens: int) -> None:
    read = [windows(as_array(text), streams, tokens, cursor) for cursor in range(12)]
    for s in range(streams):
        start = s * len(text) // streams
        whole = b"".join(one[s, :-1].tobytes() for one in read)
        assert whole == (text * 20)[start : start + 12 * tokens]
        # The byte after a window is the first of the next one: nothing is predicted twice or never.
        assert [one[s, -1] for one in read[:-1]] == [one[s, 0] for one in read[1:]]


def test_the_cursor_may_be_beyond_32_bits() -> None:
    text = as_array(bytes(range(251)))
    far = windows(text, 2, 100, 2**31 - 1)
    assert far[0, 0] == 100 * (2**31 - 1) % 251
    assert far[1, 0] == (251 // 2 + 100 * (2**31 - 1)) % 251


@given(st.integers(1, 5), st.integers(1, 9))
def test_held_out_bytes_are_predicted_once(streams: int, tokens: int) -> None:
    text = as_array(bytes(range(streams * tokens + 1)))
    found = pieces(text, streams)
    assert found.shape == (streams, tokens + 1)
    assert found[:, 1:].ravel().tolist() == list(text[1:])
    assert found[:, 0].tolist() == list(text[:-1][::tokens])


# ---------------------------------------------------------------- files


def test_the_default_is_what_every_python_carries() -> None:
    text = load(PRESETS["laptop"])
    assert len(text.train) > 5_000_000
    config = PRESETS["laptop"]
    assert len(text.held_out) == config.held_out_streams * config.held_out_tokens + 1
    assert text.train[0] == text.held_out[0] == 0
    # Nothing that is trained on is held out.
    train = text.train.tobytes()
    first = text.held_out.tobytes().split(b"\0")[1]
    assert len(first) > 100
    assert b"\0" + first + b"\0" not in train


def test_documents_begin_with_a_zero(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i:02}").write_bytes(bytes([97 + i]) * 200)
    text = load(changed(TINY, data=str(tmp_path), held_out=0.3))
    whole = text.train.tobytes()
    assert whole.startswith(b"\0")
    assert {len(set(part)) for part in whole.split(b"\0")[1:]} == {1}
    assert not set(whole) & set(text.held_out.tobytes()) - {0}


def test_one_file_is_cut_in_two(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(bytes(range(1, 255)) * 50)
    text = load(changed(TINY, data=str(path)))
    assert (
        text.train.tobytes()[1:] + text.held_out.tobytes()[1:]
        == path.read_bytes()[: len(text.train) + 511]
    )


@pytest.mark.parametrize(
    ("content", "changes", "words"),
    [
        (b"", {}, "the file is empty"),
        (b"x" * 3000, {}, "301 bytes are held out, and 8 streams of 64 need 513"),
        (b"x" * 6000, {"population": 4096}, "5,401 bytes are trained on, and 512 streams of 16 need 8,193"),
        (None, {}, "there is no such file or folder, and no data set of this name"),
        (None, {"data": "minipil"}, "did you mean 'minipile'.*hf:OWNER/NAME"),
    ],
)  # fmt: skip
def test_text_that_will_not_do_is_refused(
    tmp_path: Path, content: bytes | None, changes: dict[str, Any], words: str
) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=words) as error:
        load(changed(TINY, {"data": str(path), **changes}))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- the hub


class FakeHub:
    """A hub of one data set, which counts how often it is asked."""

    def __init__(
        self, parts: Mapping[str, list[str]], column: str = "text", breaks: int = -1
    ) -> None:
        self.parts, self.column, self.breaks, self.asked = parts, column, breaks, 0

    def splits(self, name: str) -> list[str]:
        self.asked += 1
        return list(self.parts)

    def rows(self, name: str, split: str) -> Iterable[Mapping[str, Any]]:
        for number, text in enumerate(self.parts[split]):
            if number == self.breaks:
                raise ConnectionError("the line is dead\nat length")
            yield {self.column: text, "id": number}


TEXTS = [f"text number {i}, " + "on and on " * 10 for i in range(300)]


def from_hub(source: hub.Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return load(changed(TINY, data="hf:someone/some", **changes), source)


def test_a_data_set_is_streamed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FakeHub({"train": TEXTS, "validation": [text.upper() for text in TEXTS]})
    text = from_hub(source, tmp_path, monkeypatch)
    assert text.train.tobytes() == b"".join(b"\0" + one.encode() for one in TEXTS)
    assert isinstance(text.train, np.memmap)
    assert text.held_out.tobytes().startswith(b"\0TEXT NUMBER 0, ON")
    again = from_hub(source, tmp_path, monkeypatch)
    assert source.asked == 1
    np.testing.assert_array_equal(text.train, again.train)
    np.testing.assert_array_equal(text.held_out, again.held_out)
    # No more than asked for, to whole documents.
    less = from_hub(source, tmp_path, monkeypatch, data_bytes=5000)
    assert 5000 <= len(less.train) < 5000 + len(TEXTS[-1]) + 1


def test_without_a_validation_split_documents_are_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FakeHub({"train": [text * 3 for text in TEXTS]})
    text = from_hub(source, tmp_path, monkeypatch)
    assert text.held_out.tobytes().startswith(b"\0text number 0, ")
    train = text.train.tobytes()
    for i in range(300):
        assert (f"\0text number {i}, ".encode() in train) == (i % hub.ONE_IN != 0)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (FakeHub({"train": TEXTS}, breaks=0), r"does not give it \(ConnectionError: the line is dead\); connect"),
        (FakeHub({"train": TEXTS}, column="words"), "the columns 'words', 'id'; one of texts, called 'text'"),
        (FakeHub({"train": []}), "the text is too short: 0 bytes are held out"),
        (FakeHub({"validation": TEXTS}), r"does not give it \(KeyError"),
    ],
)  # fmt: skip
def test_a_hub_that_gives_no_text_is_told(
    source: FakeHub, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=words) as error:
        from_hub(source, tmp_path, monkeypatch)
    assert "\n" not in str(error.value)


def test_what_was_cut_off_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = FakeHub({"train": TEXTS, "validation": TEXTS}, breaks=200)
    with pytest.raises(UsageError, match="ConnectionError"):
        from_hub(broken, tmp_path, monkeypatch)
    text = from_hub(FakeHub(broken.parts), tmp_path, monkeypatch)
    assert text.train.tobytes() == b"".join(b"\0" + one.encode() for one in TEXTS)


def test_the_package_of_the_hub_may_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UsageError, match="--data minipile: the package 'datasets' is missing"):
        load(changed(TINY, data="minipile"))


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="could not be written"):
        from_hub(FakeHub({"train": TEXTS}), tmp_path / "file", monkeypatch)
