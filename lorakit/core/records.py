"""Rows of a dataset → text and the character spans of it that are trained on."""

import codecs
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lorakit.core import untrusted
from lorakit.core.errors import InputRefused
from lorakit.core.templates import Marked, Template, TemplateRefused

MAX_ROW_BYTES = 64 * 2**20

FORMATS = ("messages", "sharegpt", "preference", "prompt/completion", "alpaca", "text")

_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("instruction", "response"),
)
"""Columns that hold a prompt and its completion."""
_TEXT = ("text", "content")
COLUMNS = (
    *("messages", "tools", "conversations", "prompt", "chosen", "rejected"),
    *("completion", "response", "question", "answer", "query", "instruction", "input", "output", *_TEXT),
)
"""The names that formats know columns by."""
_ROLES: Mapping[str, str] = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"},
    **{"function": "tool", "observation": "tool", "function_call": "assistant"},
}
"""The roles that rows have, and what chat templates call them."""

_CORRECT = "correct or remove that row, or --on-bad-row skip"
_JSON_LINE = "correct that line; JSONL has one JSON object a line (or --on-bad-row skip)"
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_MAYBE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_MOST_FRAMES = 256
_SENTINELS = ("q7Zk4vXw9Rt2Lp8N", "Jd5Hs1Yc6Bm3Gf0TuEo7")  # what no row says, of two lengths


@dataclass(frozen=True)
class Row:
    """The columns of one row and where it stands."""

    columns: Mapping[str, Any]
    place: str
    """`file:line` or `file: row N`, for messages."""


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
class _Conversation:
    """Messages as a template takes them; assistant turns before the `trained_from`-th message are not trained."""

    messages: Sequence[Mapping[str, Any]]
    trained_from: int = 0
    tools: Sequence[Any] | None = None


class _Frame(NamedTuple):
    """What a template writes around the contents of a conversation, the same for all conversations of these roles."""

    pieces: tuple[str, ...]
    """The text before, between and after the contents."""
    spans: tuple[tuple[int, int, int], ...]
    """For each trained turn: its index, and how many characters before and after its content are in its span."""


# Reading


def parse_json(raw: bytes, place: str) -> Any:
    """Strict JSON. Raises InputRefused: not UTF-8, a key twice, NaN, nesting too deep, half a surrogate pair."""
    try:
        value = untrusted.parse_json(raw)
    except UnicodeDecodeError as error:
        raise not_utf8(place, error) from None
    except json.JSONDecodeError as error:
        raise InputRefused(f"{place}: found {_short(raw)} ({error.msg}), need a JSON object", _JSON_LINE) from None
    except ValueError as error:
        raise InputRefused(f"{place}: found {error}, need a JSON object", _JSON_LINE) from None
    if _MAYBE_SURROGATE.search(raw) and _LONE_SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        found = "half of a surrogate pair (\\ud800 … \\udfff)"
        raise InputRefused(f"{place}: found {found}, need whole characters", _JSON_LINE)
    return value


def not_utf8(place: str, error: UnicodeDecodeError) -> InputRefused:
    """The refusal of bytes from the beginning of a file or line, with the encoding that they are likely in."""
    byte = error.object[error.start : error.start + 1]
    if error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        encoding, found = "UTF-16", "text in UTF-16"
    else:
        encoding = "WINDOWS-1252"  # which has Latin-1's letters
        letter = byte.decode("cp1252", errors="replace")
        found = f"byte 0x{byte.hex()} that isn't UTF-8 ({letter!r} in Latin-1 and Windows-1252)"
    return InputRefused(
        f"{place}: found {found}, need UTF-8",
        f"convert it: iconv -f {encoding} -t UTF-8 FILE > NEW (or correct that byte)",
    )


def parse_row(raw: bytes | Mapping[str, Any], place: str) -> Row:
    """A row from a line of JSON or from a table. Raises InputRefused."""
    if not isinstance(raw, bytes):
        return Row(raw, place)
    columns = parse_json(raw, place)
    if not isinstance(columns, dict):
        raise InputRefused(f"{place}: found {_short(raw)}, need a JSON object", _JSON_LINE)
    return Row(columns, place)


def _short(value: object) -> str:
    if isinstance(value, bytes):
        text = value[:400].decode(errors="replace").strip()
    else:
        text = json.dumps(value, ensure_ascii=False, default=str)
    return repr(text if len(text) <= 60 else text[:57] + "...")


# Formats


def detect_format(columns: Mapping[str, Any], place: str) -> str:
    """The row format that the columns show. Raises InputRefused listing what was found and what is known."""
    if "messages" in columns or _are_messages(columns.get("prompt")):
        return "messages" if "chosen" not in columns else "preference"
    if "conversations" in columns:
        return "sharegpt"
    if "chosen" in columns:
        return "preference"
    if "instruction" in columns and "output" in columns:
        return "alpaca"
    if _answer_columns(columns) is not None:
        return "prompt/completion"
    if any(name in columns for name in _TEXT):
        return "text"
    known = (
        "messages, conversations, chosen, instruction + output, prompt + completion (or response), "
        "question + answer, or text"
    )
    raise InputRefused(
        f"{place}: found the columns {', '.join(map(str, columns)) or '(none)'}; need {known}",
        "name them with --columns prompt=COLUMN,completion=COLUMN, or write the text with --template FILE.jinja",
    )


def _are_messages(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _answer_columns(columns: Mapping[str, Any]) -> tuple[str, str] | None:
    """The columns of prompt and completion."""
    return next((pair for pair in _PAIRS if pair[0] in columns and pair[1] in columns), None)


class Renderer:
    """Rows of one format → text."""

    def __init__(
        self,
        row_format: str,
        columns: Mapping[str, str],
        template: Template | None,
        end_tokens: Sequence[str],
        train_on: Literal["completion", "all"],
    ) -> None:
        """`columns`: the name that the format knows a column by → the dataset's. Without a template a prompt and its
        completion are joined as they are. `end_tokens`: the special tokens that can end a turn."""
        self._format, self._columns, self._template = row_format, columns, template
        self._end_tokens, self._train_on = tuple(end_tokens), train_on
        self._frames: dict[tuple[str | int, ...], _Frame | None] = {}

    def render(self, row: Row) -> Rendered:
        """The text of a row and its trained spans.

        Raises InputRefused naming the row where it can't be rendered, or an assistant turn can't be located exactly.
        """
        if self._columns:
            row = self._renamed(row)
        if self._template is not None and self._template.of_rows:
            return self._by_columns(row, self._template)
        if self._format == "text":
            text = self._text(row, next((name for name in _TEXT if name in row.columns), "text"))
            return Rendered(text, ((0, len(text)),), needs_bos=True, needs_eos=True)
        if self._template is None and self._format in ("prompt/completion", "alpaca"):
            pair = self._pair(row)
            if pair is not None:
                return self._joined(*pair)
        conversation = self._conversation(row)
        if self._template is None:
            if self._format == "preference" and len(conversation.messages) == 2:
                return self._joined(*(message["content"] for message in conversation.messages))
            raise InputRefused(
                f"{row.place}: found rows of messages and no chat template, need one",
                "add --template chatml, or choose a model whose tokenizer has a chat template (an instruct model)",
            )
        return self._by_messages(conversation, row, self._template)

    def _renamed(self, row: Row) -> Row:
        lacking = [column for column in self._columns.values() if column not in row.columns]
        if lacking:
            raise InputRefused(
                f"{row.place}: found the columns {', '.join(map(str, row.columns))}; need {', '.join(lacking)}",
                "correct --columns NAME=COLUMN, where COLUMN is one that the rows have",
            )
        taken = {name: row.columns[column] for name, column in self._columns.items()}
        rest = {name: value for name, value in row.columns.items() if name not in self._columns.values()}
        return Row({**rest, **taken}, row.place)

    def _value(self, row: Row, column: str) -> Any:
        if column not in row.columns:
            raise InputRefused(
                f"{row.place}: found the columns {', '.join(map(str, row.columns)) or '(none)'}; need {column}",
                "all rows have the same format; see --format and --columns",
            )
        return row.columns[column]

    def _text(self, row: Row, column: str, *, empty: bool = False) -> str:
        text = self._value(row, column)
        if not isinstance(text, str) or not (text or empty) or "\0" in text:
            raise InputRefused(f"{row.place}: {column}: found {_short(text)}, need text", _CORRECT)
        return text

    def _pair(self, row: Row) -> tuple[str, str] | None:
        """Prompt and completion, or None where they are lists of messages."""
        if self._format == "alpaca":
            prompt, given = self._text(row, "instruction"), row.columns.get("input") or ""
            if not isinstance(given, str):
                raise InputRefused(f"{row.place}: input: found {_short(given)}, need text", _CORRECT)
            return f"{prompt}\n\n{given}" if given else prompt, self._text(row, "output")
        prompt_column, answer_column = _answer_columns(row.columns) or ("prompt", "completion")
        if _are_messages(row.columns.get(prompt_column)):
            return None
        return self._text(row, prompt_column, empty=True), self._text(row, answer_column)

    def _joined(self, prompt: str, completion: str) -> Rendered:
        start = len(prompt) if self._train_on == "completion" else 0
        return Rendered(prompt + completion, ((start, len(prompt) + len(completion)),), needs_bos=True, needs_eos=True)

    def _by_columns(self, row: Row, template: Template) -> Rendered:
        try:
            marked = template.row(row.columns)
        except TemplateRefused as error:
            raise _template_refused(row, template, error) from None
        if self._train_on == "completion" and not marked.spans:
            raise InputRefused(
                f"{row.place}: found nothing between {{% generation %}} and {{% endgeneration %}} in {template.name}, "
                "need what is trained on there",
                "mark the answer in the template, or choose --train-on all",
            )
        answered = bool(marked.spans) and not marked.text[marked.spans[-1][1] :].strip()
        return self._finished(marked.text, marked.spans, answered)

    # Conversations

    def _conversation(self, row: Row) -> _Conversation:
        columns = row.columns
        tools = columns.get("tools")
        if isinstance(tools, str):
            tools = parse_json(tools.encode(errors="surrogatepass"), f"{row.place}: tools")
        if tools is not None and not isinstance(tools, list):
            raise InputRefused(f"{row.place}: tools: found {_short(tools)}, need a list", _CORRECT)
        if self._format == "preference":
            raw, trained_from = self._preference(row)
        elif self._format in ("prompt/completion", "alpaca") or ("messages" not in columns and "prompt" in columns):
            pair = self._pair(row)
            if pair is not None:
                asked = {"role": "user", "content": pair[0]}
                if self._format == "alpaca":  # whose own template shows the two apart
                    asked |= {"instruction": columns["instruction"], "input": columns.get("input") or ""}
                return _Conversation([asked, {"role": "assistant", "content": pair[1]}], 0, tools or None)
            prompt, answer = _answer_columns(columns) or ("prompt", "completion")
            raw, trained_from = self._list(row, prompt) + self._list(row, answer), len(columns[prompt])
        else:
            raw, trained_from = self._list(row, "conversations" if self._format == "sharegpt" else "messages"), 0
        messages = [self._message(row, message) for message in raw]
        self._check_turns(row, messages, trained_from)
        return _Conversation(messages, trained_from, tools or None)

    def _list(self, row: Row, column: str) -> list[Any]:
        found = self._value(row, column)
        if not isinstance(found, list) or not found:
            raise InputRefused(f"{row.place}: {column}: found {_short(found)}, need a list of role + content", _CORRECT)
        return found

    def _message(self, row: Row, message: Any) -> Mapping[str, Any]:
        """A message as templates take it: role and content, and whatever else it has."""
        if not isinstance(message, Mapping):
            raise InputRefused(f"{row.place}: messages: found {_short(message)}, need role and content", _CORRECT)
        named = message.get("role", message.get("from"))
        role = _ROLES.get(named) if isinstance(named, str) else None
        if role is None:
            known = ", ".join(dict.fromkeys(_ROLES.values()))
            raise InputRefused(f"{row.place}: messages: found the role {_short(named)}, need one of {known}", _CORRECT)
        content = message.get("content", message.get("value"))
        calls = role == "assistant" and bool(message.get("tool_calls"))
        if isinstance(content, list):
            texts = [
                part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)
            ]
            content = "".join(texts) if len(texts) == len(content) else content
        if content is None and calls:
            content = ""
        if not isinstance(content, str) or "\0" in content or (role == "assistant" and not content and not calls):
            raise InputRefused(f"{row.place}: {role}: found {_short(content)}, need text", _CORRECT)
        more = {key: value for key, value in message.items() if key not in ("from", "value") and value is not None}
        return {**more, "role": role, "content": content}

    def _check_turns(self, row: Row, messages: Sequence[Mapping[str, Any]], trained_from: int) -> None:
        roles = [message["role"] for message in messages]
        if "assistant" not in roles[trained_from:]:
            raise InputRefused(f"{row.place}: found no assistant turn, need one to train on", _CORRECT)
        for index, role in enumerate(roles):
            if index and role in ("system", "developer") and roles[index - 1] not in ("system", "developer"):
                raise InputRefused(
                    f"{row.place}: found a {role} turn after others, need it first: templates disagree about it",
                    _CORRECT,
                )
            if index and role == roles[index - 1] == "assistant":
                raise InputRefused(f"{row.place}: found two assistant turns in a row, need another's between", _CORRECT)

    def _preference(self, row: Row) -> tuple[list[Any], int]:
        """The conversation that ends with the chosen answer, and the place of that answer."""
        chosen, prompt = row.columns.get("chosen"), row.columns.get("prompt")
        if isinstance(chosen, list):
            before = self._list(row, "prompt") if isinstance(prompt, list) else []
            if isinstance(prompt, str) and _are_messages(chosen) and chosen[0].get("role") == "assistant":
                before = [{"role": "user", "content": prompt}]
            whole = self._list(row, "chosen")
            if whole[: len(before)] != before:  # as some sets have it: the answer alone
                whole = before + whole
            return whole, len(whole) - 1
        text = self._text(row, "chosen")
        if prompt is not None:
            before_text = self._text(row, "prompt")
            if _TURN.match(before_text) is None:
                return [{"role": "user", "content": before_text}, {"role": "assistant", "content": text}], 1
            text = before_text + text
        turns = self._transcript(row, text)
        return turns, len(turns) - 1

    def _transcript(self, row: Row, text: str) -> list[dict[str, str]]:
        """The turns of "\\n\\nHuman: …\\n\\nAssistant: …", as in Anthropic's hh-rlhf."""
        _, *parts = _TURN.split(text)
        roles = ["user" if speaker == "Human" else "assistant" for speaker in parts[::2]]
        expected = ["user", "assistant"] * (len(roles) // 2)
        if not roles or roles != expected or text[: _TURN.search(text).start()].strip():  # type: ignore[union-attr]
            found = ", ".join(parts[::2]) or "no turns"
            raise InputRefused(
                f"{row.place}: found a transcript of {found}; need Human and Assistant in turn, to the chosen answer",
                _CORRECT,
            )
        return [{"role": role, "content": content.strip()} for role, content in zip(roles, parts[1::2], strict=True)]

    # Locating what is trained

    def _by_messages(self, conversation: _Conversation, row: Row, template: Template) -> Rendered:
        answered = conversation.messages[-1]["role"] == "assistant"
        try:
            whole = template.chat(conversation.messages, open_turn=False, tools=conversation.tools)
            if self._train_on == "all":
                return self._finished(whole.text, (), answered)
            known = self._known_spans(conversation, whole, row, template)
            spans = known if known is not None else self._located(conversation, whole, row, template)
        except TemplateRefused as error:
            raise _template_refused(row, template, error) from None
        return self._finished(whole.text, spans, answered)

    def _known_spans(
        self, conversation: _Conversation, whole: Marked, row: Row, template: Template
    ) -> tuple[tuple[int, int], ...] | None:
        """The spans where the text is what another conversation with the same roles has shown, with these contents in
        their places: found without rendering every turn again. None where it isn't."""
        messages = conversation.messages
        if template.marks or conversation.tools or any(len(message) != 2 for message in messages):
            return None
        key = (*(message["role"] for message in messages), conversation.trained_from)
        if key not in self._frames and len(self._frames) < _MOST_FRAMES:
            self._frames[key] = self._frame(conversation, row, template)
        frame = self._frames.get(key)
        if frame is None:
            return None
        at = 0
        edges: list[tuple[int, int]] = []
        text: list[str] = []
        for piece, message in zip(frame.pieces, messages, strict=False):
            at += len(piece)
            edges.append((at, at + len(message["content"])))
            at += len(message["content"])
            text += (piece, message["content"])
        if "".join((*text, frame.pieces[-1])) != whole.text:
            return None
        return tuple((edges[index][0] - before, edges[index][1] + after) for index, before, after in frame.spans)

    def _frame(self, conversation: _Conversation, row: Row, template: Template) -> "_Frame | None":
        """What a template writes around the contents of a conversation with these roles."""
        signs = [f"{_SENTINELS[0]}{index:04d}" for index in range(len(conversation.messages))]
        signed = [
            {"role": message["role"], "content": sign}
            for message, sign in zip(conversation.messages, signs, strict=True)
        ]
        example = _Conversation(signed, conversation.trained_from)
        try:
            whole = template.chat(signed, open_turn=False)
            spans = self._located(example, whole, row, template)
        except (TemplateRefused, InputRefused):
            return None
        pieces = re.split("|".join(signs), whole.text)
        starts = [whole.text.find(sign) for sign in signs]
        if len(pieces) != len(signs) + 1 or -1 in starts or starts != sorted(starts):
            return None
        turns = [
            index for index in range(conversation.trained_from, len(signed)) if signed[index]["role"] == "assistant"
        ]
        around = [
            (index, starts[index] - start, end - starts[index] - len(signs[index]))
            for index, (start, end) in zip(turns, spans, strict=True)
        ]
        return _Frame(tuple(pieces), tuple(around)) if all(min(turn[1:]) >= 0 for turn in around) else None

    def _located(
        self, conversation: _Conversation, whole: Marked, row: Row, template: Template
    ) -> tuple[tuple[int, int], ...]:
        """The span of every assistant turn that is trained, each found by rendering the conversation again."""
        spans = tuple(
            self._turn(conversation, index, whole, row, template)
            for index, message in enumerate(conversation.messages)
            if message["role"] == "assistant" and index >= conversation.trained_from
        )
        if any(before[1] > after[0] for before, after in itertools.pairwise(spans)):
            raise _not_located(row, template, len(conversation.messages))
        return spans

    def _turn(
        self, conversation: _Conversation, index: int, whole: Marked, row: Row, template: Template
    ) -> tuple[int, int]:
        """The span of one assistant turn: what the template marks, or what it adds to the conversation before."""
        messages, tools = conversation.messages, conversation.tools
        turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if len(whole.spans) == len(turns):
            return whole.spans[turns.index(index)]
        opened = template.chat(messages[:index], open_turn=True, tools=tools).text if index else ""
        last = index + 1 == len(messages)
        closed = whole.text if last else template.chat(messages[: index + 1], open_turn=False, tools=tools).text
        if index and closed.startswith(opened) and whole.text.startswith(closed):
            return len(opened), self._turn_end(closed, len(opened))
        return self._by_exchange(conversation, index, whole.text, row, template)

    def _by_exchange(
        self, conversation: _Conversation, index: int, text: str, row: Row, template: Template
    ) -> tuple[int, int]:
        """The span of a turn in a text whose template rewrites what came earlier: the part that changes with it.

        The conversation is rendered with a plain message in its place, twice; what stands before and after what that
        says has to be the text's own beginning and end. So whatever the turn says is in its span, its calls of tools
        too; and what ends a turn, as it stands where the conversation ends with that message.
        """
        edges = set()
        for sentinel in _SENTINELS:
            plain = {"role": "assistant", "content": sentinel}
            shown = [*conversation.messages[:index], plain, *conversation.messages[index + 1 :]]
            try:
                before, after = self._around(sentinel, shown, conversation.tools, template)
                _, ending = self._around(sentinel, shown[: index + 1], conversation.tools, template)
            except ValueError:  # a template that refuses it, or shows it not once
                raise _not_located(row, template, index) from None
            ending = ending[: self._turn_end(ending, 0)]
            if not after.startswith(ending):  # what only the last turn ends with
                ending = next((token for token in self._end_tokens if after.startswith(token)), "")
                if not ending:
                    raise _not_located(row, template, index)
            if not (text.startswith(before) and text.endswith(after)):
                raise _not_located(row, template, index)
            edges.add((len(before), len(text) - len(after), len(ending)))
        start, end, ending_length = edges.pop()
        if edges or end < start:
            raise _not_located(row, template, index)
        return start, end + ending_length

    def _around(
        self, sign: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, template: Template
    ) -> tuple[str, str]:
        """What a template writes before and after `sign`. Raises ValueError where it isn't there once."""
        before, after = template.chat(messages, open_turn=False, tools=tools).text.split(sign)
        return before, after

    def _turn_end(self, closed: str, start: int) -> int:
        """Where the trained part of a turn ends: after its end token; a line break that follows isn't trained."""
        trimmed = closed.rstrip()
        return len(trimmed) if len(trimmed) > start and trimmed.endswith(self._end_tokens) else len(closed)

    def _finished(self, text: str, spans: tuple[tuple[int, int], ...], answered: bool) -> Rendered:
        """`answered`: whether the text ends with what the model is to say."""
        if self._train_on == "all":
            spans = ((0, len(text)),)
        ended = text.rstrip().endswith(self._end_tokens)
        return Rendered(text, spans, needs_bos=False, needs_eos=answered and not ended)


def _template_refused(row: Row, template: Template, error: TemplateRefused) -> InputRefused:
    return InputRefused(
        f"{row.place}: found a row that {template.name} refuses ({error}), need one that it can render", _CORRECT
    )


def _not_located(row: Row, template: Template, index: int) -> InputRefused:
    return InputRefused(
        f"{row.place}: found that {template.name} rewrites earlier turns, so that assistant turn {index + 1} can't be "
        "located exactly; need a template whose text only grows, or one with {% generation %} marks",
        "split the conversation into a row for each assistant turn, or choose --train-on all",
    )
