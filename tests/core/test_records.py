"""Rows → text and trained spans: what is refused is named by its place, what is trained is exactly the answer."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.core.errors import InputRefused
from lorakit.core.records import FORMATS, Rendered, Renderer, Row, detect_format, parse_row
from lorakit.core.templates import Template, builtin_names, builtin_source
from tests.conftest import CHATML

PROPERTY = settings(deadline=None, database=None, derandomize=True, max_examples=80)

FORGETFUL = CHATML.replace(
    "message['content']",
    "('' if message['role'] == 'assistant' and not loop.last else message['content'])",
)
"""A template that drops what the assistant said earlier."""

BARE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""A template without end tokens."""

# In the manner of the stock templates of the models that they are named after, without generation marks.

LLAMA_3 = (
    "{{- bos_token }}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + strftime_now('%d %b %Y') + '\n\n' }}"
    "{{- system + '<|eot_id|>' }}"
    "{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
QWEN_3 = (
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{%- set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{%- set thought = '' %}"
    "{%- if '</think>' in m.content %}"
    "{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last %}"
    "{{- '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + said }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + said }}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{%- if messages[0].role == 'system' %}{%- set first = messages[0].content + '\n\n' %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set first = '' %}{%- endif %}"
    "{%- for m in messages %}"
    "{%- set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{%- endif %}"
)
MISTRAL = (
    "{{- bos_token }}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' %}{{- '[INST] ' + m.content + '[/INST]' }}"
    "{%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim + eos_token }}{%- endif %}"
    "{%- endfor %}"
)
STOCK = {"llama 3": LLAMA_3, "qwen 3": QWEN_3, "gemma": GEMMA, "mistral": MISTRAL, "template": CHATML}
STOCK |= {name: builtin_source(name) for name in builtin_names()}

END = ["<|im_end|>", "<|im_start|>", "</s>", "<|eot_id|>", "<end_of_turn>"]

USER = {"role": "user", "content": "Hello?"}
ANSWER = {"role": "assistant", "content": "Hello!"}
CHAT = [{"role": "system", "content": "Be kind."}, USER, ANSWER, {"role": "user", "content": "Bye"}, ANSWER]


def row(**columns: Any) -> Row:
    return Row(columns, "rows.jsonl:7")


def template(source: str) -> Template:
    return Template(source, "the template", {"bos_token": "<s>", "eos_token": "</s>"})


def rendered(
    source: str | None,
    train_on: Any = "completion",
    row_format: str = "",
    renamed: Mapping[str, str] | None = None,
    **columns: Any,
) -> Rendered:
    one = row(**columns)
    row_format = row_format or detect_format(one.columns, one.place)
    renderer = Renderer(row_format, renamed or {}, template(source) if source else None, END, train_on)
    return renderer.render(one)


def refused(source: str | None, **columns: Any) -> InputRefused:
    with pytest.raises(InputRefused) as caught:
        rendered(source, **columns)
    assert caught.value.message.startswith("rows.jsonl:7: ")
    assert caught.value.hint
    return caught.value


def trained_texts(found: Rendered) -> list[str]:
    return [found.text[start:end] for start, end in found.spans]


# Reading


@pytest.mark.parametrize(
    ("raw", "columns"),
    [
        (b'{"text": "a"}', {"text": "a"}),
        (b'\xef\xbb\xbf {"text": "a"}\r\n', {"text": "a"}),
        (rb'{"text": "\ud83d\ude00 \\ud83d"}', {"text": "😀 \\ud83d"}),
        ('{"text": "a\u2028b\u2029c\u0085d"}'.encode(), {"text": "a\u2028b\u2029c\u0085d"}),
        (b"{}", {}),
    ],
)
def test_a_line_of_json_is_a_row(raw: bytes, columns: dict[str, str]) -> None:
    assert parse_row(raw, "rows.jsonl:7") == Row(columns, "rows.jsonl:7")


def test_a_row_of_a_table_is_taken_as_it_is() -> None:
    assert parse_row({"text": "a", "n": 1.5}, "t.csv: row 3") == Row({"text": "a", "n": 1.5}, "t.csv: row 3")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"prompt,completion", ["'prompt,completion'", "need a JSON object"]),
        (b'{"text": "cut off', ["cut off", "need a JSON object"]),
        (b'{"text": "a"} {"text": "b"}', ["Extra data"]),
        (b'{"text": "a",}', ["need a JSON object"]),
        (b'["a", "b"]', ['\'["a", "b"]\'', "need a JSON object"]),
        (b'"text"', ["need a JSON object"]),
        (b"null", ["'null'", "need a JSON object"]),
        (b'{"text": "caf\xe9"}', ["0xe9", "UTF-8"]),
        (b'{"text": NaN}', ["NaN, which JSON doesn't have"]),
        (b'{"text": [-Infinity]}', ["-Infinity, which JSON doesn't have"]),
        (b'{"text": "a", "text": "b"}', ["a key twice"]),
        (b'{"text": {"a": 1, "a": 1}}', ["a key twice"]),
        (b"[" * 100_000, ["nesting too deep"]),
        (b'{"a":' * 100_000, ["nesting too deep"]),
        (b'{"text": ' + b"9" * 5000 + b"}", ["need a JSON object"]),
        (rb'{"text": "\ud83d"}', ["surrogate"]),
        (rb'{"messages": [{"role": "user", "content": "\uDE00"}]}', ["surrogate"]),
        (rb'{"\ud83d": 1}', ["surrogate"]),
        (b'{"text": "a\x00"}', ["need a JSON object"]),
        (b'\xef\xbb\xbf{"text": "ab\xffcdef"}', ["found byte 0xff "]),
    ],
)
def test_a_line_that_isnt_a_row_is_refused(line: bytes, words: list[str]) -> None:
    with pytest.raises(InputRefused) as caught:
        parse_row(line, "rows.jsonl:7")
    message = caught.value.message
    assert message.startswith("rows.jsonl:7: found ")
    assert [word for word in words if word not in message] == []
    assert len(message) < 300


# Formats


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"messages": []}, "messages"),
        ({"prompt": [USER], "completion": [ANSWER]}, "messages"),
        ({"conversations": []}, "sharegpt"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "preference"),
        ({"prompt": "", "response": "", "chosen": "a", "rejected": "b"}, "preference"),
        ({"chosen": [], "rejected": []}, "preference"),
        ({"prompt": "", "completion": "a"}, "prompt/completion"),
        ({"prompt": "", "response": "a"}, "prompt/completion"),
        ({"question": "", "answer": "a"}, "prompt/completion"),
        ({"query": "", "response": "a"}, "prompt/completion"),
        ({"instruction": "", "response": "a"}, "prompt/completion"),
        ({"instruction": "", "input": "", "output": "a"}, "alpaca"),
        ({"instruction": "", "output": "a"}, "alpaca"),
        ({"text": "a"}, "text"),
        ({"text": "a", "id": 3, "source": None}, "text"),
        ({"content": "a"}, "text"),
        ({"completion": "a", "prompt": "b", "text": "c"}, "prompt/completion"),
        ({"text": "c", "messages": []}, "messages"),
    ],
)
def test_the_columns_show_the_format(columns: dict[str, Any], found: str) -> None:
    assert detect_format(columns, "rows.jsonl:7") == found
    assert found in FORMATS


@pytest.mark.parametrize("columns", [{}, {"prompt": "a"}, {"Text": "a"}, {"instruction": "a", "answer": "b"}])
def test_unknown_columns_are_listed_beside_the_known_ones(columns: dict[str, Any]) -> None:
    with pytest.raises(InputRefused) as caught:
        detect_format(columns, "rows.jsonl:7")
    assert caught.value.message.startswith("rows.jsonl:7: ")
    assert (", ".join(columns) or "(none)") in caught.value.message
    assert "prompt + completion" in caught.value.message
    assert "--columns" in caught.value.hint


@pytest.mark.parametrize(
    ("row_format", "columns"),
    [
        ("text", {"txt": "a"}),
        ("prompt/completion", {"prompt": "a"}),
        ("prompt/completion", {"text": "a"}),
        ("alpaca", {"instruction": "a"}),
        ("preference", {"prompt": "a"}),
    ],
)
def test_a_later_row_of_another_format_is_refused(row_format: str, columns: dict[str, Any]) -> None:
    assert re.search("found the columns .*; need ", refused(CHATML, row_format=row_format, **columns).message)


def test_messages_that_are_missing_are_refused() -> None:
    assert "found the columns text; need messages" in refused(CHATML, row_format="messages", text="a").message
    assert "messages: found 'null'" in refused(CHATML, row_format="messages", messages=None).message


@pytest.mark.parametrize(
    ("encoding", "found", "hint"),
    [
        ("utf-16", "found text in UTF-16, need UTF-8", "iconv -f UTF-16 -t UTF-8 "),
        ("latin-1", "0xe9 that isn't UTF-8 ('é' in Latin-1 and Windows-1252)", "iconv -f WINDOWS-1252 -t UTF-8 "),
        ("cp1252", "0xe9 that isn't UTF-8 ('é' in Latin-1 and Windows-1252)", "iconv -f WINDOWS-1252 -t UTF-8 "),
    ],
)
def test_a_line_in_another_encoding_is_told_with_what_converts_it(encoding: str, found: str, hint: str) -> None:
    with pytest.raises(InputRefused) as caught:
        parse_row('{"text": "café"}\n'.encode(encoding), "rows.jsonl:7")
    assert found in caught.value.message
    assert hint in caught.value.hint


SAME: Sequence[tuple[str, dict[str, Any]]] = [
    ("messages", {"messages": [USER, ANSWER]}),
    ("messages", {"prompt": [USER], "completion": [ANSWER]}),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello?"}]}, ANSWER]}),
    ("sharegpt", {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello!"}]}),
    ("sharegpt", {"conversations": [USER, ANSWER]}),
    ("prompt/completion", {"prompt": "Hello?", "completion": "Hello!"}),
    ("prompt/completion", {"question": "Hello?", "answer": "Hello!", "id": 3}),
    ("alpaca", {"instruction": "Hello?", "input": "", "output": "Hello!"}),
    ("alpaca", {"instruction": "Hello?", "input": None, "output": "Hello!"}),
    ("preference", {"prompt": "Hello?", "chosen": "Hello!", "rejected": "Go away."}),
    ("preference", {"prompt": [USER], "chosen": [ANSWER], "rejected": [USER]}),
    ("preference", {"prompt": "Hello?", "chosen": [ANSWER], "rejected": []}),
    ("preference", {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}),
    ("preference", {"prompt": "\n\nHuman: Hello?\n\nAssistant:", "chosen": " Hello!", "response": "", "rejected": ""}),
    ("preference", {"chosen": "\n\nHuman: Hello?\n\nAssistant: Hello!", "rejected": ""}),
]


@pytest.mark.parametrize(("row_format", "columns"), SAME)
def test_every_format_says_the_same(row_format: str, columns: dict[str, Any]) -> None:
    assert detect_format(columns, "x:1") == row_format
    found = rendered(CHATML, **columns)
    assert found.text == "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    assert trained_texts(found) == ["Hello!<|im_end|>"]
    assert (found.needs_bos, found.needs_eos) == (False, False)


def test_of_a_transcript_only_the_chosen_answer_is_trained() -> None:
    """A row in the form of Dahoas/full-hh-rlhf."""
    prompt = "\n\nHuman: Why?\n\nAssistant: Because.\n\nHuman: And\n\nhow?\n\nAssistant:"
    found = rendered(CHATML, prompt=prompt, response=" So.", chosen=" So.", rejected=" No.")
    assert [part.partition("\n")[2] for part in found.text.split("<|im_start|>")[1:]] == [
        f"{said}<|im_end|>\n" for said in ("Why?", "Because.", "And\n\nhow?", "So.")
    ]
    assert trained_texts(found) == ["So.<|im_end|>"]


def test_a_prompt_that_the_chosen_conversation_begins_with_is_asked_once() -> None:
    alone = rendered(CHATML, prompt=CHAT[:-1], chosen=[ANSWER])
    assert rendered(CHATML, prompt=CHAT[:-1], chosen=CHAT) == alone == rendered(CHATML, chosen=CHAT)
    assert alone.text.count("Bye") == 1
    assert trained_texts(alone) == ["Hello!<|im_end|>"]


def test_of_prompt_and_completion_messages_only_the_completions_are_trained() -> None:
    found = rendered(CHATML, prompt=CHAT[:4], completion=[ANSWER, {"role": "tool", "content": "1"}, ANSWER])
    assert trained_texts(found) == ["Hello!<|im_end|>"] * 2
    assert found.text[: found.spans[0][0]].count("Hello!<|im_end|>") == 1


@pytest.mark.parametrize(
    "chosen",
    [
        "Hello!",
        "\n\nAssistant: Hello!",
        "\n\nHuman: a",
        "\n\nHuman: a\n\nHuman: b\n\nAssistant: c",
        "x\n\nHuman: a\n\nAssistant: b",
        "\n\nHuman: a\n\nAssistant: b\n\nHuman: c",
        "\n\nHuman: a\n\nAssistant:",
    ],
)
def test_a_transcript_that_doesnt_alternate_is_refused(chosen: str) -> None:
    refused(CHATML, chosen=chosen, rejected="")


def test_columns_can_be_renamed() -> None:
    renamed = {"prompt": "asked", "completion": "told"}
    found = rendered(CHATML, "completion", "prompt/completion", renamed, asked="Hello?", told="Hello!", text="x")
    assert trained_texts(found) == ["Hello!<|im_end|>"]
    with pytest.raises(InputRefused, match="found the columns told; need asked"):
        rendered(CHATML, "completion", "prompt/completion", {"prompt": "asked"}, told="a")


@pytest.mark.parametrize(
    ("columns", "column"),
    [
        ({"text": None}, "text"),
        ({"text": ""}, "text"),
        ({"text": 3}, "text"),
        ({"text": ["a"]}, "text"),
        ({"text": "a\0b"}, "text"),
        ({"prompt": None, "completion": "a"}, "prompt"),
        ({"prompt": 1.5, "completion": "a"}, "prompt"),
        ({"prompt": "a", "completion": None}, "completion"),
        ({"prompt": "a", "completion": ""}, "completion"),
        ({"prompt": "a", "completion": {"text": "b"}}, "completion"),
        ({"instruction": "", "output": "a"}, "instruction"),
        ({"instruction": "a", "input": 3, "output": "a"}, "input"),
        ({"prompt": "a", "chosen": ""}, "chosen"),
    ],
)
@pytest.mark.parametrize("source", [None, CHATML], ids=["plain", "chat"])
def test_a_field_that_isnt_text_is_named(columns: dict[str, Any], column: str, source: str | None) -> None:
    message = refused(source, **columns).message
    assert message.startswith(f"rows.jsonl:7: {column}: found {json.dumps(columns[column])!r}, need text")


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "Hello",
        {"role": "user", "content": "a"},
        ["Hello"],
        [USER, {"role": "Assistant", "content": "a"}],
        [USER, {"role": "robot", "content": "a"}, ANSWER],
        [USER, {"content": "a"}, ANSWER],
        [USER, {"role": ["assistant"], "content": "a"}],
        [USER, {"role": "assistant"}],
        [USER, {"role": "assistant", "content": None}],
        [USER, {"role": "assistant", "content": [{"type": "image"}]}],
        [USER, {"role": "assistant", "content": ""}],
        [{"role": "user", "content": 3}, ANSWER],
        [USER, {"role": "assistant", "content": "a\0"}],
        [USER],
        [USER, ANSWER, ANSWER],
        [USER, {"role": "system", "content": "a"}, ANSWER],
    ],
)
def test_messages_that_cant_be_trained_on_are_refused(messages: Any) -> None:
    assert "found " in refused(CHATML, messages=messages).message


def test_messages_need_a_chat_template() -> None:
    error = refused(None, messages=[USER, ANSWER])
    assert "no chat template" in error.message
    assert "--template" in error.hint


def test_tools_and_calls_reach_the_template() -> None:
    source = (
        "{% for tool in tools or [] %}{{ tool.name }};{% endfor %}"
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.name }}({{ call.arguments | tojson }}){% endfor %}"
        "{{ m.tool_call_id or '' }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}
    answered = {"role": "function", "content": "2", "tool_call_id": "c1"}
    messages = [USER, called, answered, ANSWER]
    for tools in ([{"name": "add"}], '[{"name": "add"}]'):
        found = rendered(source, messages=messages, tools=tools)
        assert found.text == (
            'add;user:Hello?<|im_end|>assistant:add({"a": 1})<|im_end|>tool:2c1<|im_end|>assistant:Hello!<|im_end|>'
        )
        assert trained_texts(found) == ['add({"a": 1})<|im_end|>', "Hello!<|im_end|>"]
    for bad in ("{", '{"name": 1}', 3):
        assert "tools: found" in refused(source, messages=messages, tools=bad).message


# Spans


def test_without_a_template_the_completion_follows_the_prompt() -> None:
    found = rendered(None, prompt="Two plus two is ", completion="four.")
    assert found.text == "Two plus two is four."
    assert trained_texts(found) == ["four."]
    assert (found.needs_bos, found.needs_eos) == (True, True)


def test_a_row_without_a_prompt_is_trained_whole() -> None:
    assert trained_texts(rendered(None, prompt="", completion="four.")) == ["four."]


def test_a_row_of_text_is_trained_whole_even_where_there_is_a_template() -> None:
    found = rendered(CHATML, text="Once upon a time")
    assert (found.text, trained_texts(found)) == ("Once upon a time", ["Once upon a time"])
    assert (found.needs_bos, found.needs_eos) == (True, True)


def test_with_a_template_the_answer_and_its_end_are_trained_and_nothing_else() -> None:
    found = rendered(CHATML, prompt="Hello?", completion="Hello!")
    assert found.text == "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    assert trained_texts(found) == ["Hello!<|im_end|>"]
    assert (found.needs_bos, found.needs_eos) == (False, False)


def test_a_prompt_and_its_completion_are_one_user_turn_and_one_assistant_turn() -> None:
    assert rendered(CHATML, prompt="Hello?", completion="Hello!") == rendered(CHATML, messages=[USER, ANSWER])


def test_every_assistant_turn_is_trained_with_its_end_and_without_the_line_break_after_it() -> None:
    found = rendered(CHATML, messages=CHAT)
    assert trained_texts(found) == ["Hello!<|im_end|>", "Hello!<|im_end|>"]
    for start, end in found.spans:
        assert found.text[:start].endswith("<|im_start|>assistant\n")
        assert found.text[end] == "\n"


def test_an_answer_that_quotes_the_prompt_is_found_at_its_place() -> None:
    found = rendered(CHATML, prompt="a", completion="a")
    assert found.spans == ((found.text.rindex("a<|im_end|>"), len(found.text) - 1),)


def test_line_breaks_at_the_end_of_an_answer_are_part_of_it() -> None:
    assert trained_texts(rendered(CHATML, prompt="a", completion="b\n\n")) == ["b\n\n<|im_end|>"]


def test_a_conversation_may_end_with_the_user() -> None:
    found = rendered(CHATML, messages=[USER, ANSWER, USER])
    assert trained_texts(found) == ["Hello!<|im_end|>"]
    assert not found.needs_eos, "what ends is the user's turn, which isn't trained"


def test_a_template_without_end_tokens_is_ended_by_the_tokenizers() -> None:
    found = rendered(BARE, prompt="Hello?", completion="Hello!")
    assert trained_texts(found) == ["Hello!\n"]
    assert found.needs_eos


@pytest.mark.parametrize("columns", [{"messages": CHAT}, {"prompt": "Hello?", "completion": "Hello!"}, {"text": "a"}])
@pytest.mark.parametrize("source", [CHATML, BARE])
def test_all_means_every_character(columns: dict[str, Any], source: str) -> None:
    found = rendered(source, "all", **columns)
    assert trained_texts(found) == [found.text]


def test_all_means_the_prompt_too_without_a_template() -> None:
    assert trained_texts(rendered(None, "all", prompt="ab", completion="cd")) == ["abcd"]


PRIVATE = "\ue000"


def followed(source: str, messages: Sequence[Mapping[str, str]]) -> list[str]:
    """A slow reference that knows nothing of prefixes: every character of an answer is made private in turn, and where
    it comes out is where that character is; the end token that follows belongs to the answer."""
    whole = template(source).chat(messages, open_turn=False).text
    found = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        places = []
        for at in range(len(message["content"])):
            changed = [dict(one) for one in messages]
            changed[index]["content"] = message["content"][:at] + PRIVATE + message["content"][at + 1 :]
            text = template(source).chat(changed, open_turn=False).text
            if len(text) == len(whole) and text.count(PRIVATE) == 1:
                places.append(text.index(PRIVATE))
        ending = next((token for token in END if whole.startswith(token, max(places) + 1)), "")
        found.append(whole[min(places) : max(places) + 1] + ending)
    return found


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("system", [False, True])
def test_each_answer_is_trained_where_a_slow_reference_finds_it(name: str, turns: int, system: bool) -> None:
    messages = [{"role": "system", "content": "Be kind."}] * system
    for turn in range(turns):
        messages += [{"role": "user", "content": f"Why {turn}?"}, {"role": "assistant", "content": f"So: {turn}!"}]
    opening = {"vicuna": " ", "llama2": " ", "mistral": " "}.get(name, "")  # what stands between prompt and answer
    closing = {"llama2": " </s>"}.get(name, "")
    expected = [opening + text + closing for text in followed(STOCK[name], messages)]
    expected[-1] = ("<think>\n\n</think>\n\n" if name == "qwen 3" else "") + expected[-1]
    assert trained_texts(rendered(STOCK[name], messages=messages)) == expected


said = st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"], exclude_characters="\ufdd0\ufdd1<>|"), min_size=1)


@PROPERTY
@given(
    name=st.sampled_from(["llama 3", "gemma", "chatml", "qwen 3", "alpaca"]),
    texts=st.lists(st.tuples(said, said), min_size=1, max_size=3),
)
def test_whatever_is_said_is_what_is_trained(name: str, texts: list[tuple[str, str]]) -> None:
    roles = ("user", "assistant")
    messages = [{"role": role, "content": text} for pair in texts for role, text in zip(roles, pair, strict=True)]
    ends = {"llama 3": "<|eot_id|>", "gemma": "<end_of_turn>", "alpaca": "</s>"}
    found = trained_texts(rendered(STOCK[name], messages=messages))
    assert [text.removeprefix("<think>\n\n</think>\n\n") for text in found] == [
        answer + ends.get(name, "<|im_end|>") for _, answer in texts
    ]


def test_marks_of_a_template_are_believed() -> None:
    source = (
        "{% for m in messages %}{{ m.role }}: "
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    )
    assert trained_texts(rendered(source, messages=CHAT)) == ["Hello!</s>"] * 2


def test_a_template_of_rows_trains_what_it_marks() -> None:
    source = "Q: {{ q }}\nA: {% generation %}{{ a }}{{ eos_token }}{% endgeneration %}"
    found = rendered(source, row_format="columns", q="1+1?", a="2")
    assert (found.text, trained_texts(found), found.needs_eos) == ("Q: 1+1?\nA: 2</s>", ["2</s>"], False)
    assert trained_texts(rendered("Q: {{ q }}", "all", row_format="columns", q="1+1?")) == ["Q: 1+1?"]
    assert "{% generation %}" in refused("Q: {{ q }}", row_format="columns", q="1+1?").message


# Templates that can't be followed


def test_a_template_that_drops_what_is_trained_is_refused_by_row_and_turn() -> None:
    assert trained_texts(rendered(FORGETFUL, messages=[USER, ANSWER])) == ["Hello!<|im_end|>"]
    error = refused(FORGETFUL, messages=CHAT)
    assert "the template rewrites earlier turns" in error.message
    assert "assistant turn 3 " in error.message, "the third message is the first that is rewritten"
    assert "--train-on all" in error.hint
    assert trained_texts(rendered(FORGETFUL, "all", messages=CHAT))[0].count("Hello!") == 1


def test_thoughts_that_a_template_drops_from_history_are_not_trained_there() -> None:
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}
    assert trained_texts(rendered(QWEN_3, messages=[USER, thought])) == ["<think>\nhm\n</think>\n\nYes.<|im_end|>"]
    found = trained_texts(rendered(QWEN_3, messages=[USER, thought, USER, thought]))
    assert found == ["Yes.<|im_end|>", "<think>\nhm\n</think>\n\nYes.<|im_end|>"]


CALLING = QWEN_3.replace(
    "{{- '<|im_end|>\n' }}{%- else %}",
    "{%- for call in m.tool_calls or [] %}{{- '\n<tool_call>' + call.name + '</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- else %}",
).replace("loop.index0 > ns.last ", "loop.index0 > ns.last and (loop.last or m.reasoning) ")
"""As Qwen 3 writes calls of tools: a thought stands before the last turn alone, or before one that has it."""


@pytest.mark.parametrize("content", ["Let me see.", None])
@pytest.mark.parametrize("more", [{}, {"reasoning": True}])
def test_calls_of_tools_and_ends_are_trained_in_turns_that_a_template_rewrites(content: Any, more: Any) -> None:
    called = {"role": "assistant", "content": content, "tool_calls": [{"name": "sun"}], **more}
    messages = [USER, called, {"role": "tool", "content": "2"}, ANSWER]
    found = rendered(CALLING, messages=messages)
    turns = re.findall(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", found.text, re.DOTALL)
    assert trained_texts(found) == turns
    assert (
        turns[0]
        == ("<think>\n\n</think>\n\n" if more else "") + f"{content or ''}\n<tool_call>sun</tool_call><|im_end|>"
    )


def test_an_end_that_doesnt_touch_the_answer_is_trained_in_turns_that_a_template_rewrites() -> None:
    spaced = QWEN_3.replace("{{- '<|im_end|>\n' }}{%- else", "{{- ' <|im_end|>\n' }}{%- else")
    found = rendered(spaced, messages=[USER, ANSWER, USER, ANSWER])
    assert trained_texts(found) == ["Hello! <|im_end|>", "<think>\n\n</think>\n\nHello! <|im_end|>"]
    only_last = QWEN_3.replace(
        "{{- '<|im_end|>\n' }}{%- else", "{{- '\n' if not loop.last }}{{- '</s>' if loop.last }}{%- else"
    )
    assert trained_texts(rendered(only_last, messages=[USER, ANSWER]))[0].endswith("Hello!</s>")
    assert "can't be located exactly" in refused(only_last, messages=[USER, ANSWER, USER, ANSWER]).message


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages | length }}{% for m in messages %}{{ m.content | length }}{{ m.content }}<|im_end|>{% endfor %}",
        "{% for m in messages | reverse %}{{ m.content | truncate(3) }}<|im_end|>{% endfor %}",
    ],
)
def test_an_answer_that_a_template_changes_is_never_guessed(source: str) -> None:
    assert "can't be located exactly" in refused(source, messages=CHAT).message


def test_a_template_that_refuses_the_messages_is_quoted() -> None:
    source = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    assert trained_texts(rendered(source, messages=[USER, ANSWER])) == ["Hello!<|im_end|>"]
    assert "the template refuses (no system role)" in refused(source, messages=CHAT).message


# Anything at all


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.sampled_from(["", "a", "assistant"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "text", "tool_calls"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
COLUMNS = ["messages", "conversations", "prompt", "completion", "response", "chosen", "rejected", "text", "tools"]
columns_at_random = st.dictionaries(
    st.sampled_from([*COLUMNS, "instruction", "input", "output"]),
    json_values
    | st.lists(st.sampled_from([USER, ANSWER, CHAT[0]]), max_size=4)
    | st.just("\n\nHuman: a\n\nAssistant: b"),
    max_size=4,
)


@settings(PROPERTY, max_examples=600)
@given(columns=columns_at_random, source=st.sampled_from([None, *STOCK.values()]), forced=st.sampled_from(FORMATS))
def test_whatever_a_row_holds_it_is_rendered_or_refused(
    columns: dict[str, Any], source: str | None, forced: str
) -> None:
    for row_format in ("", forced):
        try:
            found = rendered(source, "completion", row_format, **columns)
        except InputRefused:
            continue
        assert found.spans
        assert all(0 <= start <= end <= len(found.text) for start, end in found.spans)


@pytest.mark.parametrize("chosen", [["a"], [[]], [None], [{}], [3], {}])
@pytest.mark.parametrize("prompt", ["a", None, [], ["a"], [USER]])
def test_a_preference_of_odd_things_is_refused(chosen: Any, prompt: Any) -> None:
    refused(CHATML, prompt=prompt, chosen=chosen)
