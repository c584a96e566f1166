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
    for wrong in ("0", True, [1, False], 1.0, -1, 10**30, {"id": 0}, [[0]], float("nan")):
        for name in ("generation_config.json", "config.json"):
            write(folder / name, eos_token_id=wrong)
            with refused(f"{name}: eos_token_id .* must be a token's number, or a list of them"):
                from_folder(folder)
            (folder / name).unlink()
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


# ---------------------------------------------------------------- the environment of templates

TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "2+2 <b>"},
    {"role": "assistant", "content": "é\n4", "calls": [{"name": "f", "arguments": {"b": 1, "a": [None, True]}}]},
    {"role": "user", "content": "3+3"},
    {"role": "assistant", "content": "6"},
]  # fmt: skip
# Each is rendered with TALK, here and by transformers.
ENVIRONMENT = {
    "generation": "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "generation, spaces cut": "{%- for m in messages -%}\n  {%- generation -%}\n  {{ m.content }}\n  {%- endgeneration -%}\n{%- endfor -%}",
    "generation on lines of its own": "{% for m in messages %}\n  {% generation %}\n  {{ m.content }}\n  {% endgeneration %}\n{% endfor %}\n",
    "generation, assignments inside": "{% set x = 1 %}{% generation %}{% set x = x + 1 %}{{ x }}{% endgeneration %}{{ x }}",
    "generation, a namespace inside": "{% set n = namespace(x=1) %}{% generation %}{% set n.x = n.x + 1 %}{% endgeneration %}{{ n.x }}",
    "generation, the loop inside": "{% for m in messages %}{% generation %}{{ loop.index }}{% if loop.last %}.{% endif %}{% endgeneration %}{% endfor %}",
    "generation in a generation": "{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}",
    "generation around a loop": "{% generation %}{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}{% endgeneration %}",
    "generation in a macro": "{% macro say(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}{{ say(messages[1]) | trim }}",
    "generation of nothing": "a{% generation %}{% endgeneration %}b",
    "a name called generation": "{% set generation = 3 %}{{ generation }}",
    "tojson": "{{ messages | tojson }}",
    "tojson, ascii": "{{ messages | tojson(ensure_ascii=True) }}",
    "tojson, no ascii": "{{ messages | tojson(ensure_ascii=False) }}",
    "tojson, indent": "{{ messages | tojson(indent=2) }}",
    "tojson, indent of text": "{{ messages | tojson(indent='\t') }}",
    "tojson, separators": "{{ messages | tojson(separators=(',', ':')) }}",
    "tojson, sorted": "{{ messages | tojson(sort_keys=True, indent=1) }}",
    "tojson by place": "{{ messages | tojson(true, 4, (', ', ' : '), true) }}",
    "break and continue": "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
    "year": "{{ strftime_now('%Y') }}",
    "trimmed blocks": "a\n    {% if true %}\n    b\n    {% endif %}\nc\n",
    "dict": "{{ dict(messages[0], more=1) | tojson }}{{ dict([('a', 1)]) }}{{ dict.fromkeys(['k']) }}{{ dict.fromkeys('ab', 2) }}",
    "namespace": "{% set n = namespace(a=1) %}{% set n.b = 2 %}{{ n.a + n.b }}",
    "namespace of an object": "{% set n = namespace({'a': 1}, b=2) %}{{ n.a + n.b }}",
    "undefined": "[{{ nothing }}]{{ messages[0].nothing is defined }}",
    "joined": "{{ messages | map(attribute='role') | unique | join(',') }}",
}  # fmt: skip


@pytest.mark.parametrize("case", ENVIRONMENT)
def test_templates_render_as_with_transformers(case: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    template = ENVIRONMENT[case]
    (right,), _ = utils.render_jinja_template([TALK], chat_template=template)
    assert bytes_with(template).chat(TALK, add_generation_prompt=False) == right


def test_what_templates_write() -> None:
    render = lambda template: bytes_with(template).chat([{"role": "user", "content": "é"}])
    assert render("{% generation %}a{{ messages[0].content }}{% endgeneration %}b") == "aéb"
    assert render("{{ messages[0] | tojson(ensure_ascii=False) }}") == (
        '{"role": "user", "content": "é"}'
    )
    assert render("{{ [1, 2] | tojson(separators=(',', ':')) }}") == "[1,2]"
    assert render("{{ {'b': 'é', 'a': 1} | tojson(true, none, none, true) }}") == (
        '{"a": 1, "b": "\\u00e9"}'
    )


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% generation %}a", "endgeneration"),
        ("a{% endgeneration %}", "endgeneration"),
        ("{% set n = namespace(__class__=1) %}", "'__class__' in a namespace must not begin"),
        ("{% set n = namespace() %}{% set n._a = 1 %}", "'_a' in a namespace must not begin"),
        ("{{ dict.update(messages[0], content='') }}", "no attribute 'update'|is unsafe"),
        ("{{ messages | tojson(ident=2) }}", "unexpected keyword argument 'ident'"),
        ("{% generation %}{% for i in range(99999) %}{{ 'ab' * 99 }}{% endfor %}{% endgeneration %}", "more than"),
    ],
)  # fmt: skip
def test_mistakes_of_templates_are_told(template: str, words: str) -> None:
    messages = [{"role": "user", "content": "é"}]
    with pytest.raises(UsageError, match=f"the chat_template fails on these messages: .*({words})"):
        bytes_with(template).chat(messages)
    assert messages == [{"role": "user", "content": "é"}]


@pytest.mark.parametrize(
    "found", [5, {"default": "x"}, ["x"], [{"name": "default", "template": 5}]]
)
def test_a_template_that_is_no_text_is_named(folder: Path, found: Any) -> None:
    write(folder / "tokenizer_config.json", eos_token="<|endoftext|>", chat_template=found)
    with pytest.raises(
        UsageError, match=r"tokenizer_config.json: chat_template is .*; it must be a text"
    ):
        from_folder(folder)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(
        UsageError, match=r"chat_template.jinja cannot be read as text in UTF-8: 'utf-8"
    ):
        from_folder(folder)
