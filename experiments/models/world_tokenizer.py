"""The World tokenizer of RWKV: bytes of text, the longest token first.

A vocabulary is a text file with a line for each token: its number, the token as a Python literal of a
string or of bytes, and how many bytes it has. Number 0 is no text: it stands between documents.
"""

import ast
import importlib.util
from collections.abc import Iterable
from pathlib import Path

from experiments.run.errors import UsageError

VOCABULARY = "rwkv_vocab_v20230424.txt"


class WorldTokenizer:
    """Greedy tokens of a vocabulary file.

    Attributes:
        vocab_size: one more than the highest number; models mostly have some rows more, 65536.
        eos: tokens that end a text.
        pad: the token that fills up batches.

    Raises:
        UsageError: where no file is named and none is installed, or for a line that is no token.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        ...     _ = file.write("1 'a' 1\\n2 'aa' 2\\n3 'b' 1\\n4 b'\\\\xff' 1\\n")
        ...     file.flush()
        ...     tokenizer = WorldTokenizer(Path(file.name))
        >>> tokenizer.encode("aaab"), tokenizer.decode([2, 1, 3, 0]), tokenizer.vocab_size
        ([2, 1, 3], 'aaab', 5)
    """

    def __init__(self, path: Path | None = None) -> None:
        self._tokens = _read(path or installed_vocabulary())
        # A trie as one table: every beginning of a token, with the number of those that are tokens.
        self._trie: dict[bytes, int | None] = {}
        for number, token in self._tokens.items():
            for end in range(1, len(token)):
                self._trie.setdefault(token[:end])
            self._trie[token] = number
        self.vocab_size = max(self._tokens) + 1
        self.eos: tuple[int, ...] = (0,)
        self.pad = 0

    def encode(self, text: str) -> list[int]:
        """The numbers of a text's tokens.

        Raises:
            ValueError: for a byte that no token begins with; the published vocabulary has all.
        """
        data, ids, start = text.encode(), [], 0
        while start < len(data):
            found, stop = None, start
            for end in range(start + 1, len(data) + 1):
                piece = data[start:end]
                if piece not in self._trie:
                    break
                if (number := self._trie[piece]) is not None:
                    found, stop = number, end
            if found is None:
                raise ValueError(
                    f"no token begins the bytes {data[start : start + 8]!r} of the text"
                )
            ids.append(found)
            start = stop
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens; 0 gives none, and what is no text is U+FFFD.

        That is so for bytes that are not UTF-8, and for the numbers that a model has in excess.
        """
        unknown = "\N{REPLACEMENT CHARACTER}".encode()
        pieces = (b"" if i == 0 else self._tokens.get(int(i), unknown) for i in ids)
        return b"".join(pieces).decode(errors="replace")


def installed_vocabulary() -> Path:
    """The vocabulary of the World models, as the package `rwkv` brings it.

    Raises:
        UsageError: if the package is not installed.
    """
    spec = importlib.util.find_spec("rwkv")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / VOCABULARY).is_file():
            return path
    raise UsageError(f"no World vocabulary is installed: pip install rwkv, or name a {VOCABULARY}")


def _read(path: Path) -> dict[int, bytes]:
    try:
        # Not splitlines: other ends of a line than \n are characters of tokens.
        lines = path.read_bytes().decode().rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as a vocabulary: {error}") from error
    tokens: dict[int, bytes] = {}
    seen: dict[bytes, int] = {}
    for count, line in enumerate(lines, 1):
        number, token = _token(line.rstrip("\r"), f"{path}, line {count}")
        if number in tokens or token in seen:
            what = f"number {number}" if number in tokens else f"token {token!r}"
            raise UsageError(f"{path}, line {count}: the {what} was there before")
        tokens[number] = token
        seen[token] = number
    return tokens


def _token(line: str, where: str) -> tuple[int, bytes]:
    number, _, rest = line.partition(" ")
    literal, _, size = rest.rpartition(" ")
    try:
        data = ast.literal_eval(literal)
        data = data.encode() if isinstance(data, str) else data
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        data = None
    if not (isinstance(data, bytes) and number.isdecimal() and size.isdecimal()):
        raise UsageError(
            f"{where} is {line[:60]!r}: a number, a literal of a string or of bytes, and its length in "
            "bytes are right"
        )
    if len(data) != int(size) or not data or int(number) < 1:
        raise UsageError(
            f"{where}: token {number} has {len(data)} bytes and its line says {size}; the same, at least 1, "
            "and a number of at least 1 are right"
        )
    return int(number), data
