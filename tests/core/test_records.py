"""Rows → text and trained spans: what is refused is named by file and line, what is trained is exactly the answer."""

import errno
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lorakit.core import records
from lorakit.core.errors import DiskFailed, InputRefused
from lorakit.core.records import RenderChat, Rendered, Row, detect_format, read_rows, render
from tests.conftest import CHATML

FORGETFUL = CHATML.replace(
    "message['content']",
    "('' if message['role'] == 'assistant' and not loop.last else message['content'])",
)
"""A template that drops what the assistant said earlier, as reasoning models' do with their thoughts."""

BARE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""A template without end tokens."""

END = ["<|im_end|>", "<|im_start|>"]

USER = {"role": "user", "content": "Hello?"}
ANSWER = {"role": "assistant", "content": "Hello!"}
CHAT = [{"role": "system", "content": "Be kind."}, USER, ANSWER, {"role": "user", "content": "Bye"}, ANSWER]


def template(source: str) -> RenderChat:
    """A chat template rendered by jinja2 itself."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def raise_exception(message: str) -> None:
        raise ValueError(message)

    compiled = environment.from_string(source, globals={"raise_exception": raise_exception})

    def render_chat(messages: Sequence[Mapping[str, str]], open_turn: bool) -> str:
        return compiled.render(messages=messages, add_generation_prompt=open_turn)

    return render_chat


def row(**columns: Any) -> Row:
    return Row(columns, "rows.jsonl:7")


def rendered(source: str | None, train_on: Any = "completion", **columns: Any) -> Rendered:
    one = row(**columns)
    return render(one, detect_format(one), template(source) if source else None, END, train_on)


def trained_texts(found: Rendered) -> list[str]:
    return [found.text[start:end] for start, end in found.spans]


def refused(content: bytes, tmp_path: Path) -> str:
    """The message that reading a file of these bytes to its end gives."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputRefused) as caught:
        list(read_rows(path))
    assert caught.value.hint
    return caught.value.message


def read(content: bytes, tmp_path: Path) -> list[Mapping[str, Any]]:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    return [one.columns for one in read_rows(path)]


# The file


def test_each_line_is_a_row_that_knows_its_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "b"}')
    assert [(one.columns["text"], one.place) for one in read_rows(path)] == [("a", f"{path}:1"), ("b", f"{path}:2")]


def test_blank_lines_are_passed_over_and_still_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\n  \t\n{"text": "a"}\n\r\n{"text": "b"}\n\n')
    assert [one.place for one in read_rows(path)] == [f"{path}:3", f"{path}:5"]


def test_windows_line_ends_and_byte_order_mark_are_no_part_of_a_row(tmp_path: Path) -> None:
    assert read(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n', tmp_path) == [{"text": "a"}, {"text": "b"}]


def test_line_separators_of_unicode_end_no_row(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\u0085d\x0be"
    raw = json.dumps({"text": text}, ensure_ascii=False).encode()
    assert read(raw + b"\n", tmp_path) == [{"text": text}]


def test_escaped_characters_beyond_16_bits_are_read(tmp_path: Path) -> None:
    assert read(rb'{"text": "\ud83d\ude00 \\ud83d"}', tmp_path) == [{"text": "😀 \\ud83d"}]


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    assert read(b"", tmp_path) == []


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
    ],
)
def test_a_line_that_isnt_a_row_is_named_by_its_number(line: bytes, words: list[str], tmp_path: Path) -> None:
    message = refused(b'{"text": "a"}\n\n' + line + b'\n{"text": "z"}\n', tmp_path)
    assert message.startswith(f"{tmp_path / 'rows.jsonl'}:3: found ")
    assert [word for word in words if word not in message] == []
    assert len(message) < 300 + len(str(tmp_path))


def test_the_byte_that_isnt_utf_8_is_the_one_that_is_named(tmp_path: Path) -> None:
    assert "found byte 0xff " in refused(b'\xef\xbb\xbf{"text": "ab\xffcdef"}', tmp_path)


def test_rows_before_a_bad_line_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\nnonsense\n')
    rows = read_rows(path)
    assert next(rows).columns == {"text": "a"}
    with pytest.raises(InputRefused, match=r"rows\.jsonl:2"):
        next(rows)


def test_a_row_over_the_limit_is_refused_before_it_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = b'{"text": "' + b"a" * 200 + b'"}\n'
    monkeypatch.setattr(records, "MAX_ROW_BYTES", len(fits))
    assert len(read(fits * 3, tmp_path)) == 3
    assert "rows.jsonl:2: found a row over" in refused(fits + b"x" + fits, tmp_path)


def test_a_file_that_isnt_there_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"missing\.jsonl: found no such file"):
        list(read_rows(tmp_path / "missing.jsonl"))
    with pytest.raises(InputRefused, match="found a folder"):
        list(read_rows(tmp_path))


def test_a_disk_that_doesnt_read_is_a_disk_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, *_: object) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(DiskFailed, match=r"rows\.jsonl: found 'Input/output error'"):
        list(read_rows(tmp_path / "rows.jsonl"))


# Formats


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"messages": []}, "messages"),
        ({"prompt": "", "completion": "a"}, "prompt/completion"),
        ({"text": "a"}, "text"),
        ({"text": "a", "id": 3, "source": None}, "text"),
        ({"completion": "a", "prompt": "b", "text": "c"}, "prompt/completion"),
        ({"text": "c", "messages": []}, "messages"),
    ],
)
def test_the_columns_show_the_format(columns: dict[str, Any], found: str) -> None:
    assert detect_format(row(**columns)) == found


@pytest.mark.parametrize("columns", [{}, {"prompt": "a"}, {"Text": "a"}, {"instruction": "a", "output": "b"}])
def test_unknown_columns_are_listed_beside_the_known_ones(columns: dict[str, Any]) -> None:
    with pytest.raises(InputRefused) as caught:
        detect_format(row(**columns))
    message = caught.value.message
    assert message.startswith("rows.jsonl:7: ")
    assert (", ".join(columns) or "(none)") in message
    assert "messages or prompt + completion or text" in message


@pytest.mark.parametrize(
    ("row_format", "columns"),
    [
        ("text", {"txt": "a"}),
        ("prompt/completion", {"prompt": "a"}),
        ("prompt/completion", {"text": "a"}),
        ("messages", {"prompt": "a", "completion": "b"}),
    ],
)
def test_a_later_row_of_another_format_is_refused(row_format: str, columns: dict[str, Any]) -> None:
    with pytest.raises(InputRefused, match=r"rows\.jsonl:7: found the columns .*; need "):
        render(row(**columns), row_format, template(CHATML), END, "completion")


@pytest.mark.parametrize(
    ("columns", "column"),
    [
        ({"text": None}, "text"),
        ({"text": ""}, "text"),
        ({"text": 3}, "text"),
        ({"text": ["a"]}, "text"),
        ({"prompt": None, "completion": "a"}, "prompt"),
        ({"prompt": 1.5, "completion": "a"}, "prompt"),
        ({"prompt": "a", "completion": None}, "completion"),
        ({"prompt": "a", "completion": ""}, "completion"),
        ({"prompt": "a", "completion": {"text": "b"}}, "completion"),
    ],
)
@pytest.mark.parametrize("source", [None, CHATML], ids=["plain", "chat"])
def test_a_field_that_isnt_text_is_named(columns: dict[str, Any], column: str, source: str | None) -> None:
    with pytest.raises(InputRefused) as caught:
        rendered(source, **columns)
    assert caught.value.message.startswith(f"rows.jsonl:7: {column}: found ")
    assert json.dumps(columns[column]) in caught.value.message


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "Hello",
        {"role": "user", "content": "a"},
        ["Hello"],
        [USER, {"role": "tool", "content": "a"}, ANSWER],
        [USER, {"role": "Assistant", "content": "a"}],
        [USER, {"content": "a"}, ANSWER],
        [USER, {"role": ["assistant"], "content": "a"}],
        [USER, {"role": "assistant"}],
        [USER, {"role": "assistant", "content": None}],
        [USER, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}],
        [USER],
        [USER, {"role": "assistant", "content": ""}],
    ],
)
def test_messages_that_cant_be_trained_on_are_refused(messages: Any) -> None:
    with pytest.raises(InputRefused) as caught:
        rendered(CHATML, messages=messages)
    assert caught.value.message.startswith("rows.jsonl:7: messages: found ")
    assert caught.value.hint


def test_messages_need_a_chat_template() -> None:
    with pytest.raises(InputRefused, match=r"rows\.jsonl:7: .*need a chat template"):
        rendered(None, messages=[USER, ANSWER])


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


def test_fields_beside_role_and_content_dont_reach_the_template() -> None:
    source = "{% for message in messages %}{{ message.keys() | list | join }}{% endfor %}" + BARE
    extra = [{**USER, "name": "Ann"}, {**ANSWER, "weight": 0}]
    assert rendered(source, "all", messages=extra) == rendered(source, "all", messages=[USER, ANSWER])


# Templates that can't be followed


def test_a_template_that_rewrites_history_is_refused_by_row_and_turn() -> None:
    assert trained_texts(rendered(FORGETFUL, messages=[USER, ANSWER])) == ["Hello!<|im_end|>"]
    with pytest.raises(InputRefused) as caught:
        rendered(FORGETFUL, messages=CHAT)
    assert caught.value.message.startswith("rows.jsonl:7: ")
    assert "rewrites earlier turns" in caught.value.message
    assert "assistant turn 3 " in caught.value.message, "the third message is the first that is rewritten"
    assert "--train-on all" in caught.value.hint


def test_what_the_hint_says_helps_with_a_template_that_rewrites_history() -> None:
    found = rendered(FORGETFUL, "all", messages=CHAT)
    assert trained_texts(found) == [found.text]
    assert found.text.count("Hello!") == 1


def test_a_template_that_opens_the_turn_otherwise_than_it_closes_it_is_refused() -> None:
    source = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>'")
    with pytest.raises(InputRefused, match=r"rows\.jsonl:7: .*assistant turn 2 "):
        rendered(source, prompt="Hello?", completion="Hello!")


def test_a_template_that_refuses_the_messages_is_quoted() -> None:
    source = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    assert trained_texts(rendered(source, messages=[USER, ANSWER])) == ["Hello!<|im_end|>"]
    with pytest.raises(InputRefused) as caught:
        rendered(source, messages=CHAT)
    assert caught.value.message.startswith("rows.jsonl:7: ")
    assert "no system role" in caught.value.message
