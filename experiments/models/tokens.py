"""Text as tokens: tokenizer.json of a model's folder, bytes, or byte pairs learned from texts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from experiments.models.chat_templates import environment
from experiments.models.config_json import read_json, shown
from experiments.run.errors import UsageError
from experiments.run.folder import write_json, write_whole

END, PAD = "<|endoftext|>", "<|pad|>"
# A chat template is a program of whoever made the model: its output is cut off in this many characters.
LONGEST_CHAT = 10**6


@runtime_checkable
class AnyTokenizer(Protocol):
    """What every tokenizer has: :class:`Tokenizer`, and that of RWKV's World vocabulary."""

    @property
    def vocab_size(self) -> int:
        """One more than the highest token."""

    @property
    def eos(self) -> tuple[int, ...]:
        """Tokens that end a text, the usual one first."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Text to tokens and back.

    Attributes:
        model: a ``tokenizers.Tokenizer``.
        eos: tokens that end a text, the usual one first.
        pad: the token that fills up batches.
        specials: names of special tokens and their texts, ``{"eos_token": "<|im_end|>"}``: templates of
            chats use them.
        template: of chats, in Jinja, if there is one.
    """

    model: Any
    eos: tuple[int, ...]
    pad: int
    specials: Mapping[str, str] = field(default_factory=dict)
    template: str | None = None

    @property
    def vocab_size(self) -> int:
        """One more than the highest token; a model may have more rows."""
        return max(self.model.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The tokens of a text.

        Args:
            text: special tokens that are spelled out in it become these tokens.
            add_special_tokens: also those that the tokenizer puts around texts, such as a beginning;
                the text of `chat` has them already.
        """
        return self.model.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens; bytes that are no UTF-8 become U+FFFD."""
        return self.model.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """A conversation as the text that the model was trained on.

        Args:
            messages: ``{"role": "user", "content": "..."}``, and so on.
            add_generation_prompt: end with the beginning of an answer.
            **variables: what else the template knows, such as enable_thinking of Qwen3.

        Raises:
            UsageError: without a template, where it fails or refuses the messages, or writes more than
                a million characters. It runs in the sandbox of
                :func:`experiments.models.chat_templates.environment`; a loop that writes nothing may
                take long.
        """
        if self.template is None:
            raise UsageError(
                "the tokenizer has no chat_template: use a plain prompt with this model"
            )
        given = {"tools": None, "documents": None, **self.specials, **variables}
        given |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        return _render(self.template, given)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, for `from_folder` and transformers."""
        folder.mkdir(parents=True, exist_ok=True)
        text = self.model.to_str(pretty=True)
        write_whole(folder / "tokenizer.json", lambda file: file.write(text.encode()))
        told = {"tokenizer_class": "PreTrainedTokenizerFast", **self.specials}
        if self.template is not None:
            told["chat_template"] = self.template
        write_json(folder / "tokenizer_config.json", told)


def from_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a model's folder.

    Reads tokenizer.json, and as far as they are there tokenizer_config.json, special_tokens_map.json,
    chat_template.jinja, and the end tokens of generation_config.json or else config.json.

    Raises:
        UsageError: for a file that is absent or damaged, or where nothing ends a text.
    """
    from tokenizers import Tokenizer as Model

    path = folder / "tokenizer.json"
    if not path.exists():
        raise UsageError(f"{folder} has no tokenizer.json")
    try:
        model = Model.from_file(str(path))
    # The package raises nothing narrower.
    except Exception as error:
        raise UsageError(f"{path} is not a tokenizer: {error}") from error
    model.no_truncation()
    model.no_padding()
    told = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
    specials = {k: _text(v) for k, v in told.items() if k.endswith("_token") and _text(v)}
    eos = list(_end_tokens(folder))
    # The tokenizer's own is what ends an answer; others, such as the end of a document, also stop a model.
    if "eos_token" in specials:
        eos.insert(0, _token(model, path, specials["eos_token"]))
    if not eos:
        raise UsageError(
            f"{folder} names no token that ends a text: eos_token of tokenizer_config.json or "
            "eos_token_id of generation_config.json would"
        )
    pad = _token(model, path, specials["pad_token"]) if "pad_token" in specials else eos[0]
    return Tokenizer(
        model=model,
        eos=tuple(dict.fromkeys(eos)),
        pad=pad,
        specials=specials,
        template=_template(folder, told),
    )


def bytes_tokenizer() -> Tokenizer:
    """Tokens 0 to 255 are bytes, 256 ends a text, 257 pads.

    Example:
        >>> tokenizer = bytes_tokenizer()
        >>> tokenizer.encode("né"), tokenizer.decode([110, 195, 169, 256])
        ([110, 195, 169], 'né')
        >>> tokenizer.eos, tokenizer.pad, tokenizer.vocab_size
        ((256,), 257, 258)
    """
    from tokenizers.models import BPE

    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    return _byte_level(BPE(vocab=vocab, merges=[]), use_regex=False)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte pairs, merged as often as they stand beside each other (Sennrich et al., arXiv 1508.07909).

    Args:
        texts: to learn from; read once.
        vocab_size: tokens at most, the 256 bytes, the end and the padding among them.

    Raises:
        ValueError: for less than 258 tokens.

    Example:
        >>> tokenizer = train_bpe(["low lower lowest " * 10], 270)
        >>> len(tokenizer.encode(" lowest")), tokenizer.decode(tokenizer.encode("slow ü"))
        (1, 'slow ü')
    """
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    if vocab_size < 258:
        raise ValueError(f"vocab_size={vocab_size}; 258 hold the bytes, the end and the padding")
    tokenizer = _byte_level(BPE(), use_regex=True)
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=_byte_characters(),
        special_tokens=[END, PAD],
        show_progress=False,
    )
    tokenizer.model.train_from_iterator(texts, trainer)
    return _ends(tokenizer.model)


# ---------------------------------------------------------------- bytes


def _byte_level(model: Any, use_regex: bool) -> Tokenizer:
    from tokenizers import Tokenizer as Model
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.pre_tokenizers import ByteLevel

    whole = Model(model)
    whole.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=use_regex)
    whole.decoder = Decoder()
    whole.add_special_tokens([END, PAD])
    return _ends(whole)


def _ends(model: Any) -> Tokenizer:
    return Tokenizer(
        model=model,
        eos=(model.token_to_id(END),),
        pad=model.token_to_id(PAD),
        specials={"eos_token": END, "pad_token": PAD},
    )


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies, as in GPT-2's."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


# ---------------------------------------------------------------- the files of a folder


def _json(path: Path) -> dict[str, Any]:
    """Nothing, where the file is not there."""
    return read_json(path) if path.exists() else {}


def _text(token: Any) -> str:
    """A special token is a text, or an object with one."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _token(model: Any, path: Path, text: str) -> int:
    number = model.token_to_id(text)
    if number is None:
        raise UsageError(f"{path} has no token {text!r}, which tokenizer_config.json names")
    return number


def _end_tokens(folder: Path) -> Iterable[int]:
    """One number or several."""
    for name in ("generation_config.json", "config.json"):
        found = _json(folder / name).get("eos_token_id")
        if found is not None:
            several = found if isinstance(found, list) else [found]
            # By type, since True is an int of Python.
            if not all(type(one) is int and 0 <= one < 2**31 for one in several):
                raise UsageError(
                    f"{folder / name}: eos_token_id {shown(found)} must be a token's number, or a list "
                    "of them"
                )
            return several
    return []


def _template(folder: Path, told: Mapping[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").exists():
        try:
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"{folder / 'chat_template.jinja'} cannot be read as text in UTF-8: {error}"
            ) from error
    found = told.get("chat_template")
    if isinstance(found, list) and all(isinstance(one, dict) for one in found):
        # Several, by name.
        found = next((one.get("template") for one in found if one.get("name") == "default"), None)
    if found is not None and not isinstance(found, str):
        raise UsageError(
            f"{folder / 'tokenizer_config.json'}: chat_template is {type(found).__name__}; it must be a "
            'text, or a list of {"name": ..., "template": ...}'
        )
    return found


# ---------------------------------------------------------------- chat templates


def _render(template: str, variables: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError

    parts, length = [], 0
    try:
        for part in environment().from_string(template).generate(**variables):
            parts.append(part)
            length += len(part)
            if length > LONGEST_CHAT:
                raise TemplateError(f"it writes more than {LONGEST_CHAT} characters")
    # What a template raises is its maker's choice.
    except Exception as error:
        raise UsageError(f"the chat_template fails on these messages: {error}") from error
    return "".join(parts)
