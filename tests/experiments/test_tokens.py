"""Tokenizers: of a folder against transformers, bytes, learned byte pairs, and hostile templates."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from experiments.models import tokens
from experiments.models.tokens import Tokenizer, bytes_tokenizer, from_folder, train_bpe
from experiments.run.errors import UsageError

TEMPLATE = """{%- for message in messages %}
    {%- if message.role not in ["system", "user", "assistant"] %}
        {{- raise_exception("no role " + message.role) }}
    {%- endif %}
    {{- "<|" + message['role'] + "|>\n" + message['content'] | trim + eos_token + "\n" }}
{%- endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{% if add_generation_prompt %}
<|assistant|>
    {% if thinking is defined and not thinking %}<think></think>{% endif %}
{% endif %}"""
MESSAGES = [{"role": "system", "content": " Über & <b> "}, {"role": "user", "content": "1 + 1?"}]


def bytes_with(template: str) -> Tokenizer:
    return Tokenizer(model=bytes_tokenizer().model, eos=(256,), pad=257, template=template)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train_bpe(["to be or not to be, that is the question"] * 9, 300).save(tmp_path)
    return tmp_path


def write(path: Path, **content: Any) -> None:
    path.write_text(json.dumps(content))


def test_bytes_are_their_own_numbers() -> None:
    tokenizer = bytes_tokenizer()
    for byte in range(256):
        assert tokenizer.encode(bytes([byte]).decode("latin-1"))[-1] == (
            byte if byte < 128 else 0x80 | byte & 0x3F
        )
    text = "naïve 漢字 \n\t\0 🥚  spaces"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([97, 0xFF, 98]) == "a\ufffdb"
    assert tokenizer.encode("a<|endoftext|>") == [97, 256]
    assert tokenizer.decode([97, 256, 257]) == "a"
    assert tokenizer.decode([97, 256], skip_special_tokens=False) == "a<|endoftext|>"


def test_byte_pairs_are_learned_and_reread(folder: Path) -> None:
    tokenizer = from_folder(folder)
    text = "to be or not to be: naïve 🥚"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("the question")) < 6
    assert tokenizer.vocab_size <= 300
    assert tokenizer.decode([*tokenizer.encode("be"), *tokenizer.eos, tokenizer.pad]) == "be"
    assert (tokenizer.eos, tokenizer.pad) == ((0,), 1)
    with pytest.raises(ValueError, match="vocab_size=257; 258 hold the bytes"):
        train_bpe(["a"], 257)


def test_end_tokens_are_those_of_all_files(folder: Path) -> None:
    write(folder / "config.json", eos_token_id=9)
    assert from_folder(folder).eos == (0, 9)
    write(folder / "generation_config.json", eos_token_id=[7, 0, 8])
    assert from_folder(folder).eos == (0, 7, 8)
    write(folder / "tokenizer_config.json", eos_token={"content": "<|pad|>"}, bos_token=None)
    tokenizer = from_folder(folder)
    assert (tokenizer.eos, tokenizer.pad) == ((1, 7, 0, 8), 1)
    assert tokenizer.specials == {"eos_token": "<|pad|>"}


def test_a_folder_says_what_is_wrong_with_it(folder: Path) -> None:
    refused = lambda words: pytest.raises(UsageError, match=words)
    write(folder / "tokenizer_config.json", eos_token="<|none|>")
    with refused("tokenizer.json has no token '<|none|>', which tokenizer_config.json names"):
        from_folder(folder)
    write(folder / "tokenizer_config.json")
    with refused("names no token that ends a text"):
        from_folder(folder)
    write(folder / "generation_config.json", eos_token_id="0")
    with refused("eos_token_id '0' must be whole numbers"):
        from_folder(folder)
    (folder / "tokenizer.json").write_text("{}")
    with refused("tokenizer.json is not a tokenizer"):
        from_folder(folder)
    (folder / "tokenizer.json").unlink()
    with refused("has no tokenizer.json"):
        from_folder(folder)


@pytest.mark.parametrize("where", ["file", "config", "list"])
def test_chats_are_those_of_transformers(folder: Path, where: str) -> None:
    transformers = pytest.importorskip("transformers")
    told = json.loads((folder / "tokenizer_config.json").read_text())
    if where == "file":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        told["chat_template"] = "not this one"
    elif where == "config":
        told["chat_template"] = TEMPLATE
    else:
        several = {"tool_use": "not this one", "default": TEMPLATE}
        told["chat_template"] = [dict(name=k, template=v) for k, v in several.items()]
    write(folder / "tokenizer_config.json", **told)
    tokenizer = from_folder(folder)
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        eos_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )
    for variables in ({}, dict(add_generation_prompt=True), dict(thinking=False)):
        given = {"add_generation_prompt": False, **variables}
        right = reference.apply_chat_template(MESSAGES, tokenize=False, **given)
        text = tokenizer.chat(MESSAGES, **given)
        assert text == right
        assert tokenizer.encode(text) == reference.encode(right, add_special_tokens=False)
    # What follows is JSON as it stands, without escapes for HTML.
    assert '[{"name": "ü<"}]' in tokenizer.chat(MESSAGES, tools=[{"name": "ü<"}])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for", ""),
        ("{{ messages.nothing.at_all }}", "has no attribute"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "attribute .__class__. .* unsafe"),
        ("{{ messages.append(1) }}", "access to attribute .append. of .list. object is unsafe"),
        ("{% for i in range(1000) %}{% for j in range(1000) %}{{ 'ab' }}{% endfor %}{% endfor %}", "more than 1000"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    ],
    ids=["refuses", "syntax", "undefined", "escape", "changes", "long", "range"],
)  # fmt: skip
def test_hostile_templates_end_in_a_sentence(
    template: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "LONGEST_CHAT", 1000)
    with pytest.raises(UsageError, match=f"the chat_template fails on these messages: .*{words}"):
        bytes_with(template).chat(MESSAGES)


def test_without_a_template_there_is_no_chat() -> None:
    with pytest.raises(UsageError, match="has no chat_template: use a plain prompt"):
        bytes_tokenizer().chat(MESSAGES)
