"""The tokenizer of a GGUF file, as the files of a Hugging Face folder: byte-level BPE."""

from typing import Any, NamedTuple

from experiments.models.config_json import shown
from experiments.models.gguf_file import GGUFFile
from experiments.run.errors import UsageError, suggestion

# How texts are cut before bytes are merged: patterns of the models' own tokenizer.json.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


class Cut(NamedTuple):
    """What a name of a pre-tokenizer stands for.

    Attributes:
        pattern: what texts are cut by; that of GPT-2 where it is None.
        digits: whether each digit stands alone.
        nfc: whether characters are composed first.
        whole: whether a piece that is a token is not merged from its bytes (Llama 3).
        begin: whether texts begin with a token of their own, where the file does not say.
    """

    pattern: str | None = None
    digits: bool = False
    nfc: bool = False
    whole: bool = False
    begin: bool = False


DIGITS, LLAMA = Cut(digits=True), Cut(LLAMA3, whole=True, begin=True)
PRE_TOKENIZERS = {
    "gpt-2": Cut(),
    "gpt2": Cut(),
    "smollm": DIGITS,
    "starcoder": DIGITS,
    "refact": DIGITS,
    "codeshell": DIGITS,
    "qwen2": Cut(QWEN2, nfc=True),
    "deepseek-r1-qwen": Cut(QWEN2),
    "llama-bpe": LLAMA,
    "llama3": LLAMA,
    "llama-v3": LLAMA,
}
# Kinds of tokens, by the codes of the format.
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
# Tokens that end an answer or a text, by their names, whether the file says so or not.
ENDS = frozenset(
    ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>")
)


class TokenizerFiles(NamedTuple):
    """The files of a tokenizer.

    Attributes:
        tokenizer: the text of tokenizer.json.
        config: tokenizer_config.json.
        generation: generation_config.json.
    """

    tokenizer: str
    config: dict[str, Any]
    generation: dict[str, Any]


def check_tokenizer(file: GGUFFile) -> Cut:
    """How the tokenizer cuts texts.

    Raises:
        UsageError: for a tokenizer that is no byte-level BPE, or cuts texts in a way that is not known.
    """
    kind = file.text("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UsageError(
            f"{file.path}: tokenizer.ggml.model {shown(kind)} is not supported; 'gpt2' (byte-level BPE) is"
        )
    if "tokenizer.ggml.pre" not in file.settings:
        raise UsageError(
            f"{file.path} has no setting tokenizer.ggml.pre, which says how texts are cut: it is older "
            "than that; convert the model again by llama.cpp"
        )
    name = file.text("tokenizer.ggml.pre")
    if name not in PRE_TOKENIZERS:
        raise UsageError(
            f"{file.path}: the pre-tokenizer {shown(name)} (tokenizer.ggml.pre) is not supported; "
            f"{', '.join(PRE_TOKENIZERS)} are{suggestion(name, PRE_TOKENIZERS)}"
        )
    return PRE_TOKENIZERS[name]


def tokenizer_of(file: GGUFFile) -> TokenizerFiles:
    """The tokenizer of a file.

    Raises:
        UsageError: for one that is not supported, and for lists that do not fit each other.
    """
    cut = check_tokenizer(file)
    texts = file.several("tokenizer.ggml.tokens", str)
    kinds = file.several("tokenizer.ggml.token_type", int, [1] * len(texts))
    if len(kinds) != len(texts):
        raise UsageError(
            f"{file.path}: tokenizer.ggml.token_type has {len(kinds)} entries; {len(texts)} tokens have one "
            "each"
        )
    # Rows of the embedding that fill it up to a round number are no tokens.
    while kinds and kinds[-1] == UNUSED:
        kinds.pop()
    texts = texts[: len(kinds)]
    vocab = {text: number for number, text in enumerate(texts)}
    if len(vocab) != len(texts):
        twice = next(text for number, text in enumerate(texts) if vocab[text] != number)
        raise UsageError(f"{file.path}: tokenizer.ggml.tokens has {shown(twice)} twice")
    special = {text for text, kind in zip(texts, kinds, strict=True) if kind == CONTROL}
    ids = {name: _token(file, f"tokenizer.ggml.{name}_token_id", texts) for name in _TOKENS}
    named = {_TOKENS[name]: texts[found] for name, found in ids.items() if found is not None}
    begin = file.flag("tokenizer.ggml.add_bos_token", cut.begin) and ids["bos"] is not None
    model = _model(file, cut, vocab, [named["bos_token"]] if begin else [])
    _add(model, texts, kinds)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{name: text for name, text in named.items() if name.endswith("_token")},
    }
    if "tokenizer.chat_template" in file.settings:
        config["chat_template"] = file.text("tokenizer.chat_template")
    said = [ids[name] for name in ("eos", "eot", "eom")]
    others = [vocab[text] for text in texts if text in ENDS and text in special]
    ends = list(dict.fromkeys([*(one for one in said if one is not None), *others]))
    if not ends:
        raise UsageError(
            f"{file.path} names no token that ends a text: tokenizer.ggml.eos_token_id would"
        )
    config.setdefault("eos_token", texts[ends[0]])
    generation = {"bos_token_id": ids["bos"], "eos_token_id": ends, "pad_token_id": ids["padding"]}
    told = {name: found for name, found in generation.items() if found is not None}
    return TokenizerFiles(model.to_str(pretty=True), config, told)


# Settings of single tokens, and what Hugging Face calls them, if at all.
_TOKENS = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
    "eot": "eot",
    "eom": "eom",
}


def _token(file: GGUFFile, key: str, texts: list[str]) -> int | None:
    if key not in file.settings:
        return None
    found = file.whole(key, least=0)
    if found >= len(texts):
        raise UsageError(f"{file.path}: {key} is {found}; there are {len(texts)} tokens")
    return found


def _model(file: GGUFFile, cut: Cut, vocab: dict[str, int], begin: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE

    merges = []
    for line in file.several("tokenizer.ggml.merges", str):
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise UsageError(
                f"{file.path}: an entry of tokenizer.ggml.merges must be two parts with a space between, got "
                f"{shown(line)}"
            )
        merges.append((left, right))
    try:
        model = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=cut.whole))
    # The package raises nothing narrower: a merge of parts that are no tokens.
    except Exception as error:
        raise UsageError(f"{file.path}: the tokenizer's merges do not fit: {error}") from error
    if cut.nfc:
        model.normalizer = normalizers.NFC()
    by_bytes = lambda regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    if cut.pattern is not None:
        split = pre_tokenizers.Split(Regex(cut.pattern), behavior="isolated", invert=False)
        model.pre_tokenizer = pre_tokenizers.Sequence([split, by_bytes(False)])
    elif cut.digits:
        digits = pre_tokenizers.Digits(individual_digits=True)
        model.pre_tokenizer = pre_tokenizers.Sequence([digits, by_bytes(True)])
    else:
        model.pre_tokenizer = by_bytes(True)
    model.decoder = decoders.ByteLevel()
    for text in begin:
        model.post_processor = processors.TemplateProcessing(
            single=f"{text} $A",
            pair=f"{text} $A {text}:1 $B:1",
            special_tokens=[(text, vocab[text])],
        )
    return model


def _add(model: Any, texts: list[str], kinds: list[int]) -> None:
    """Tokens that are found in a text before it is cut."""
    from tokenizers import AddedToken

    for number, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
        if kind in (CONTROL, USER_DEFINED):
            special = kind == CONTROL
            model.add_tokens([AddedToken(text, special=special, normalized=False)])
            assert model.token_to_id(text) == number
