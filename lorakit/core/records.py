"""Rows of a dataset → text and the character spans of it that are trained on."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorakit.core.errors import InputRefused, disk_failed

MAX_ROW_BYTES = 64 * 2**20

FORMATS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The columns that each row format is known by, tried in this order."""

ROLES = ("system", "user", "assistant")

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

RenderChat = Callable[[Sequence[Mapping[str, str]], bool], str]
"""A tokenizer's chat template: (messages, whether to open the assistant's turn) → text."""


@dataclass(frozen=True)
class Rendered:
    """A document before tokenization. `spans` are [start, end) in characters, in order, without overlap."""

    text: str
    spans: tuple[tuple[int, int], ...]
    needs_bos: bool
    """Whether the text lacks the begin token that the tokenizer puts before a text (a chat template writes its own)."""
    needs_eos: bool
    """Whether the text lacks the end token that the model has to learn to stop with."""


@dataclass(frozen=True)
class Row:
    """One line of a dataset file and where it stands."""

    columns: Mapping[str, Any]
    place: str
    """`file:line`, for messages."""


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSONL file; blank lines are passed over.

    Raises InputRefused with file and line number where a line isn't one JSON object in UTF-8.
    """
    hint = "correct that line; JSONL has one JSON object a line"
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_ROW_BYTES + 1):
                number += 1
                place = f"{path}:{number}"
                if len(line) > MAX_ROW_BYTES:
                    raise InputRefused(f"{place}: found a row over {MAX_ROW_BYTES / 2**20:.0f} MiB, need less", hint)
                if line.strip():
                    yield Row(_parse(line, place, hint), place)
    except FileNotFoundError:
        raise InputRefused(f"{path}: found no such file, need a JSONL file", "check the path") from None
    except IsADirectoryError:
        raise InputRefused(f"{path}: found a folder, need a JSONL file", "name one file in it") from None
    except OSError as error:
        raise disk_failed(error, path) from error


def _parse(line: bytes, place: str, hint: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise InputRefused(
            f"{place}: found byte 0x{error.object[error.start]:02x} that isn't UTF-8, need UTF-8", hint
        ) from None
    except json.JSONDecodeError as error:
        raise InputRefused(f"{place}: found {_short(line)} ({error.msg}), need a JSON object", hint) from None
    except (ValueError, RecursionError) as error:
        reason = "nesting too deep" if isinstance(error, RecursionError) else str(error)
        raise InputRefused(f"{place}: found {reason}, need a JSON object", hint) from None
    if not isinstance(row, dict):
        raise InputRefused(f"{place}: found {_short(line)}, need a JSON object", hint)
    if b"\\u" in line and _LONE_SURROGATE.search(json.dumps(row, ensure_ascii=False)):
        raise InputRefused(f"{place}: found half of a surrogate pair (\\ud800 … \\udfff), need whole characters", hint)
    return row


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key twice")
    return row


def _no_constant(name: str) -> None:
    raise ValueError(f"{name}, which JSON doesn't have")


def _short(value: object) -> str:
    text = value.decode(errors="replace").strip() if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False)
    return repr(text if len(text) <= 60 else text[:57] + "...")


def detect_format(row: Row) -> str:
    """The row format that the columns show. Raises InputRefused listing what was found and what is known."""
    for name, columns in FORMATS.items():
        if all(column in row.columns for column in columns):
            return name
    known = " or ".join(" + ".join(columns) for columns in FORMATS.values())
    raise InputRefused(
        f"{row.place}: found the columns {', '.join(row.columns) or '(none)'}; need {known}",
        "rename the columns of the dataset",
    )


def render(
    row: Row,
    row_format: str,
    render_chat: RenderChat | None,
    end_tokens: Sequence[str],
    train_on: Literal["completion", "all"],
) -> Rendered:
    """The text of a row and its trained spans.

    `render_chat` is None where rows become text without a chat template, and raises ValueError; `end_tokens` are the
    texts of the special tokens that can end a turn. Raises InputRefused naming the row where it can't be rendered, or
    an assistant turn can't be located exactly.
    """
    columns = FORMATS[row_format]
    for column in columns:
        if column not in row.columns:
            raise InputRefused(
                f"{row.place}: found the columns {', '.join(row.columns) or '(none)'}; need {' + '.join(columns)}",
                "all rows of a file have the same format",
            )
    if row_format == "messages":
        messages = _checked_messages(row)
        if render_chat is None:
            raise InputRefused(
                f"{row.place}: found rows of messages and a tokenizer without a chat template, need a chat template",
                "choose a --tokenizer that has one (an instruct model's)",
            )
        return _render_messages(messages, row, render_chat, end_tokens, train_on)
    texts = [row.columns[column] for column in columns]
    for column, text in zip(columns, texts, strict=True):
        if not isinstance(text, str) or (not text and column != "prompt"):
            raise InputRefused(f"{row.place}: {column}: found {_short(text)}, need text", "correct or remove that row")
    if row_format == "text":
        return Rendered(texts[0], ((0, len(texts[0])),), needs_bos=True, needs_eos=True)
    prompt, completion = texts
    if render_chat is not None:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return _render_messages(turns, row, render_chat, end_tokens, train_on)
    start = len(prompt) if train_on == "completion" else 0
    spans = ((start, len(prompt) + len(completion)),)
    return Rendered(prompt + completion, spans, needs_bos=True, needs_eos=True)


def _checked_messages(row: Row) -> list[dict[str, str]]:
    messages = row.columns["messages"]
    if not isinstance(messages, list) or not messages:
        raise InputRefused(
            f"{row.place}: messages: found {_short(messages)}, need a list of role + content",
            "correct or remove that row",
        )
    for message in messages:
        if (
            not isinstance(message, dict)
            or message.get("role") not in ROLES
            or not isinstance(message.get("content"), str)
        ):
            raise InputRefused(
                f"{row.place}: messages: found {_short(message)}, need a role of {', '.join(ROLES)} and text",
                "correct or remove that row",
            )
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise InputRefused(
            f"{row.place}: messages: found no assistant turn with content, need one to train on",
            "correct or remove that row",
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _render_messages(
    messages: Sequence[Mapping[str, str]],
    row: Row,
    render_chat: RenderChat,
    end_tokens: Sequence[str],
    train_on: Literal["completion", "all"],
) -> Rendered:
    """Each assistant turn is what the template adds to the conversation before it with the turn opened."""
    try:
        text = render_chat(messages, False)
        spans = []
        for index, message in enumerate(messages if train_on == "completion" else ()):
            if message["role"] != "assistant":
                continue
            opened = render_chat(messages[:index], True)
            closed = text if index + 1 == len(messages) else render_chat(messages[: index + 1], False)
            if not (closed.startswith(opened) and text.startswith(closed)):
                raise InputRefused(
                    f"{row.place}: found that the chat template rewrites earlier turns, so that assistant turn "
                    f"{index + 1} can't be located exactly; need a template whose text only grows",
                    "split the conversation into a row for each assistant turn, or choose --train-on all",
                )
            spans.append((len(opened), _turn_end(closed, len(opened), end_tokens)))
    except ValueError as error:
        raise InputRefused(
            f"{row.place}: found messages that the chat template refuses ({error}), need ones that it can render",
            "correct or remove that row",
        ) from None
    if train_on == "all":
        spans = [(0, len(text))]
    unended = messages[-1]["role"] == "assistant" and not text.rstrip().endswith(tuple(end_tokens))
    return Rendered(text, tuple(spans), needs_bos=False, needs_eos=unended)


def _turn_end(closed: str, start: int, end_tokens: Sequence[str]) -> int:
    """Where the trained part of a turn ends: after its end token; the line break that templates add isn't trained."""
    trimmed = closed.rstrip()
    return len(trimmed) if len(trimmed) > start and trimmed.endswith(tuple(end_tokens)) else len(closed)
