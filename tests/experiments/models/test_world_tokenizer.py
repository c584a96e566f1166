"""The World tokenizer against the authors' own, and what it refuses."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.models import world_tokenizer
from experiments.models.world_tokenizer import WorldTokenizer, installed_vocabulary
from experiments.run.errors import UsageError

BYTES = [f"{i + 1} {bytes([i])!r} 1" for i in range(256)]
WORDS = ["the", "ther", "there is", "\n\n", "é", "日本", "'s", '"\\', "\x85", "\u2028"]
LINES = [*BYTES, *(f"{300 + i} {word!r} {len(word.encode())}" for i, word in enumerate(WORDS))]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> WorldTokenizer:
    return made(tmp_path_factory.mktemp("small"), LINES)


def made(folder: Path, lines: list[str]) -> WorldTokenizer:
    path = folder / "vocabulary.txt"
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    return WorldTokenizer(path)


def test_the_longest_token_goes_first(small: WorldTokenizer) -> None:
    assert small.encode("there is") == [302]
    assert small.encode("there it") == [301, *(x + 1 for x in b"e it")]  # back from a dead end
    assert small.encode("th") == [ord("t") + 1, ord("h") + 1]
    assert small.encode("") == []
    assert (small.eos, small.pad, small.vocab_size) == ((0,), 0, 300 + len(WORDS))


@given(st.text() | st.text(alphabet="ther is\né日本'\"\\\x85\u2028"))
def test_texts_come_back(small: WorldTokenizer, text: str) -> None:
    assert small.decode(small.encode(text)) == text


def test_what_is_no_text_is_marked(small: WorldTokenizer) -> None:
    assert small.decode([0, ord("a") + 1, 0]) == "a"
    assert small.decode([65535, 0xE6 + 1, ord("a") + 1, -1]) == "\ufffd\ufffda\ufffd"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("3 'ab' 3", "line 3: token 3 has 2 bytes and its line says 3"),
        ("3 'é' 1", "line 3: token 3 has 2 bytes and its line says 1"),
        ("0 'ab' 2", "a number of at least 1"),
        ("3 '' 0", "line 3: token 3 has 0 bytes"),
        ("3 open('x') 2", "line 3 is \"3 open('x') 2\": a number, a literal"),
        ("3 'ab", 'line 3 is "3 \'ab": a number, a literal'),
        ("3 ['ab'] 2", "a literal of a string or of bytes"),
        ("x 'ab' 2", "line 3 is \"x 'ab' 2\": a number"),
        ("", "line 3 is '': a number"),
        ("2 'ab' 2", "line 3: the number 2 was there before"),
        ("3 'a' 1", "line 3: the token b'a' was there before"),
    ],
)
def test_a_line_that_is_no_token_is_named(line: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        made(tmp_path, ["1 'a' 1", "2 'b' 1", line, "9 'c' 1"])
    assert words in str(caught.value)


def test_a_byte_without_a_token_and_a_missing_file_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="no token begins the bytes b'bc'"):
        made(tmp_path, ["1 'a' 1", "2 'bb' 2"]).encode("abc")
    with pytest.raises(UsageError, match="none.txt cannot be read as a vocabulary"):
        WorldTokenizer(tmp_path / "none.txt")
    monkeypatch.setattr(world_tokenizer, "VOCABULARY", "none.txt")
    with pytest.raises(UsageError, match="no World vocabulary is installed: pip install rwkv"):
        installed_vocabulary()


def test_it_is_the_authors_own() -> None:
    """Over texts in many scripts, and every token of the published vocabulary by itself."""
    theirs = pytest.importorskip("rwkv.rwkv_tokenizer").TRIE_TOKENIZER(str(installed_vocabulary()))
    ours = WorldTokenizer()
    assert ours.vocab_size == 65530
    texts = [
        Path(__file__).read_text(),
        "User: 2 + 2 = ?\n\nAssistant: <think>\n</think>\n\n\\boxed{4}<|endoftext|>",
        "日本語の文章。Ελληνικά, русский текст; עברית العربية हिन्दी 한국어 🙂👩‍👩‍👧",
        "\x00\x01\x85\u2028\u2029\r\n\t   \n\n\n",
        *(token.decode(errors="ignore") for token in theirs.idx2token.values()),
    ]
    for text in texts:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == text
