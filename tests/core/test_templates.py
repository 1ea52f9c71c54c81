"""Templates: the text that transformers renders, what is marked as trained, and nothing else of Python's."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.core import templates
from lorakit.core.templates import Marked, Template, TemplateRefused, builtin_names, builtin_source
from tests.conftest import CHATML, make_tokenizer

PROPERTY = settings(deadline=None, database=None, derandomize=True, max_examples=60)

TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": "<int> & 'é'"}}}]

CONVERSATIONS: Mapping[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": "Hi"}],
    "answered": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Hello\n<b> 'x' é "}],
    "system": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "Bye"},
    ],
}

TEMPLATES = {
    "chatml": CHATML,
    "tools": "{% if tools %}{{ tools | tojson }}\n{% endif %}" + CHATML,
    "indented tools": "{% for tool in tools or [] %}{{ tool | tojson(indent=2) }}{% endfor %}" + CHATML,
    "blocks and lines": "{% for message in messages %}\n  {% if loop.first %}\n    {{ bos_token }}\n  {% endif %}\n"
    "{{ message.role | upper }}: {{ message.content | trim }}\n{% endfor %}\n",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}"
    "{{ m.content }}{% endfor %}{{ eos_token }}",
    "break": "{% for m in messages %}{% if m.role == 'assistant' %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "dict": "{% set d = dict(a=1) %}{{ d.a }}{{ messages[0].content }}",
    "marks": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}|{% endfor %}",
    "undefined": "{{ nothing }}{{ messages[0].nothing }}{{ messages[0]['content'] }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("said", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_the_text_is_the_one_that_transformers_renders(name: str, said: str, tools: Any, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "t", TEMPLATES[name])
    template = Template(TEMPLATES[name], name, tokenizer.special_tokens_map)
    for open_turn in (False, True):
        expected = tokenizer.apply_chat_template(
            CONVERSATIONS[said], tools=tools, tokenize=False, add_generation_prompt=open_turn
        )
        assert template.chat(CONVERSATIONS[said], open_turn=open_turn, tools=tools).text == expected


@pytest.mark.parametrize("name", builtin_names())
def test_each_of_our_templates_is_rendered_so_by_transformers_too(name: str, tmp_path: Path) -> None:
    """What an adapter's tokenizer carries means the same to whoever loads it."""
    tokenizer = make_tokenizer(tmp_path / "t", builtin_source(name))
    template = Template(builtin_source(name), name, tokenizer.special_tokens_map)
    for messages in CONVERSATIONS.values():
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert template.chat(messages, open_turn=True).text == expected


ASKED = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "V"},
]

BUILT_IN = {
    "alpaca": "S\n\n### Instruction:\nU\n\n### Response:\nA</s>\n\n### Instruction:\nV\n\n### Response:\n",
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A </s><s>[INST] V [/INST]",
    "vicuna": "<s>S USER: U ASSISTANT: A</s>USER: V ASSISTANT:",
}


@pytest.mark.parametrize("name", builtin_names())
def test_our_templates_are_those_of_their_makers(name: str) -> None:
    """As Stanford's Alpaca, OpenAI's ChatML, Meta's Llama 2 and LMSYS's Vicuna 1.1 write them."""
    template = Template(builtin_source(name), name, {"bos_token": "<s>", "eos_token": "</s>"})
    assert template.chat(ASKED, open_turn=True).text == BUILT_IN[name]
    assert not template.of_rows


def test_alpaca_shows_an_input_of_its_own() -> None:
    template = Template(builtin_source("alpaca"), "alpaca", {"eos_token": "</s>"})
    asked = {"role": "user", "content": "Add.\n\n1 2", "instruction": "Add.", "input": "1 2"}
    text = template.chat([asked], open_turn=True).text
    assert "paired with an input that provides further context" in text
    assert text.endswith("\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")


said = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0\ufdd1"), min_size=1, max_size=20)


@PROPERTY
@given(name=st.sampled_from(builtin_names()), texts=st.lists(said, min_size=2, max_size=7), system=st.booleans())
def test_our_templates_only_grow(name: str, texts: list[str], system: bool) -> None:
    roles = ["system"] * system + ["user", "assistant"] * 4
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    template = Template(builtin_source(name), name, TOKENS)
    whole = template.chat(messages, open_turn=False).text
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            opened = template.chat(messages[:index], open_turn=True).text
            closed = template.chat(messages[: index + 1], open_turn=False).text
            assert closed.startswith(opened)
            assert whole.startswith(closed)
            assert message["content"] in closed[len(opened) :]


# Marks


def test_marks_are_found_where_they_stand() -> None:
    template = Template(TEMPLATES["marks"], "t", {})
    messages = [{"role": r, "content": c} for r, c in (("user", "ab"), ("assistant", "cde"), ("assistant", "f"))]
    text, spans = template.chat(messages, open_turn=False)
    assert text == "ab|cde|f|"
    assert [text[start:end] for start, end in spans] == ["cde", "f"]


def test_a_template_of_rows_takes_columns() -> None:
    template = Template("Q: {{ q }}\nA: {%- generation %} {{ a }}{{ eos_token }}{% endgeneration %}", "t", TOKENS)
    assert template.of_rows
    assert template.row({"q": "1+1?", "a": "2"}) == Marked("Q: 1+1?\nA: 2<|im_end|>", ((10, 22),))


@pytest.mark.parametrize("sign", ["\ufdd0", "\ufdd1"])
def test_a_row_with_the_signs_of_marks_is_refused(sign: str) -> None:
    template = Template("{{ q }}{% generation %}{{ a }}{% endgeneration %}", "t", {})
    for row in ({"q": sign, "a": "b"}, {"q": "a", "a": f"b{sign}c"}):
        with pytest.raises(TemplateRefused, match="U\\+FDD0"):
            template.row(row)


def test_a_conditional_expression_named_generation_is_no_mark() -> None:
    assert not Template("{{ generation }}", "t", {}).marks


# Refused


@pytest.mark.parametrize(
    "source",
    ["{% for %}", "{{ messages", "{% endif %}", "{% include 'x' %}{% nonsense %}", "{{ messages | nothing_known }}"],
)
def test_what_is_no_template_is_refused(source: str) -> None:
    with pytest.raises(TemplateRefused):
        Template(source, "t", {})


def test_a_template_that_is_too_long_is_refused() -> None:
    with pytest.raises(TemplateRefused, match="65537 bytes, where 65536 is the most"):
        Template("x" * 65537, "t", {})


def test_a_text_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MAX_TEXT_CHARACTERS", 10)
    with pytest.raises(TemplateRefused, match="11 characters, where 10"):
        Template("{{ q }}", "t", {}).row({"q": "x" * 11})


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''|attr('__class__') }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ dict.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__self__.__class__ }}",
    "{{ ('{0.__class__}').format(messages) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% for i in range(999999999) %}x{% endfor %}",
    "{{ raise_exception('no system turns') }}",
    "{{ 1 / 0 }}",
    "{{ messages['x' ~ 1].y }}",
    "{{ 'a' + 1 }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_what_reaches_out_of_a_template_is_refused_or_gives_nothing(source: str) -> None:
    try:
        template = Template(source, "t", {})
        text = template.chat([{"role": "user", "content": "Hi"}], open_turn=False).text
    except TemplateRefused:
        return
    assert text == ""


def test_what_a_template_says_is_the_reason() -> None:
    with pytest.raises(TemplateRefused, match="no system turns"):
        Template("{{ raise_exception('no system turns') }}", "t", {}).chat([], open_turn=False)


def test_every_day_is_the_same_day() -> None:
    """A date of today would give other blocks every day."""
    assert Template("{{ strftime_now('%d %b %Y') }}", "t", {}).chat([], open_turn=False).text == "26 Jul 2024"


def test_json_in_templates_is_as_it_is() -> None:
    text = Template("{{ x | tojson }}", "t", {}).row({"x": {"a": "<é> & '"}}).text
    assert text == '{"a": "<é> & \'"}'
    assert json.loads(text) == {"a": "<é> & '"}
