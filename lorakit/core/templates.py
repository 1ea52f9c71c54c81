"""Jinja prompt templates: sandboxed, compiled once, and able to say which of their characters are trained.

The environment is that of transformers' chat templates (docs: "Chat templates", "Writing a chat template"), with two
differences. Whatever `{% generation %}` encloses is found again in the text. And `strftime_now` knows one date only, so
that the same rows give the same bytes on every day.
A template can't reach files, modules or attributes of Python's own, and has bounds of time and memory.
"""

import datetime
import importlib.resources
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from lorakit.core.untrusted import TakesTooLong, bounded, keeps_bounds

MAX_SOURCE_BYTES = 64 * 2**10
MAX_TEXT_CHARACTERS = 16 * 2**20

_CPU_SECONDS = 5.0  # of one text: a conversation of 16 MiB takes two
_MORE_BYTES = 2**30
_MAX_IN_POWER = 1000

_OUT_OF_BOUNDS = f"over {_CPU_SECONDS:.0f} s of CPU time or {_MORE_BYTES / 2**30:.0f} GiB of memory for one text"

_FOLDER = importlib.resources.files("lorakit.data") / "templates"
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # noncharacters: Unicode keeps them for such inner use
_TODAY = datetime.datetime(2024, 7, 26)  # the date that Llama 3's own templates fall back on


class TemplateRefused(ValueError):
    """A template that can't be compiled, or that can't or won't render what it got; the text says why."""


class Marked(NamedTuple):
    """A rendered text and the characters [start, end) that the template itself marks as trained."""

    text: str
    spans: tuple[tuple[int, int], ...]


class Template:
    """One template. `variables` are the tokenizer's special tokens by name (`bos_token`, `eos_token`, …)."""

    def __init__(self, source: str, name: str, variables: Mapping[str, Any]) -> None:
        """Raises TemplateRefused where `source` is no template."""
        self.source, self.name, self._variables = source, name, dict(variables)
        if len(source.encode()) > MAX_SOURCE_BYTES:
            raise TemplateRefused(f"{len(source.encode())} bytes, where {MAX_SOURCE_BYTES} is the most")
        try:
            with bounded(_CPU_SECONDS, _MORE_BYTES):
                self._compiled = _ENVIRONMENT.from_string(source)
        except (TemplateError, RecursionError, ValueError, ArithmeticError, SyntaxError) as error:
            raise TemplateRefused(_reason(error)) from None
        except (TakesTooLong, MemoryError):
            raise TemplateRefused(_OUT_OF_BOUNDS) from None
        self.marks = re.search(r"{%-?\+?\s*generation\b", source) is not None
        """Whether it says itself what is trained."""

    @cached_property
    def of_rows(self) -> bool:
        """Whether it takes the columns of a row instead of messages."""
        return "messages" not in meta.find_undeclared_variables(_ENVIRONMENT.parse(self.source))

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, open_turn: bool, tools: Sequence[Any] | None = None
    ) -> Marked:
        """The text of a conversation; `open_turn` adds what the assistant's next turn begins with.

        Raises TemplateRefused.
        """
        return self._rendered({"messages": messages, "tools": tools, "add_generation_prompt": open_turn})

    def row(self, columns: Mapping[str, Any]) -> Marked:
        """The text of a row. Raises TemplateRefused."""
        return self._rendered(columns)

    def _rendered(self, values: Mapping[str, Any]) -> Marked:
        try:
            text = self._text(values)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise TemplateRefused(_reason(error)) from None
        except (TakesTooLong, MemoryError):
            raise TemplateRefused(_OUT_OF_BOUNDS) from None
        except RecursionError as error:
            raise TemplateRefused(_reason(error)) from None
        if len(text) > MAX_TEXT_CHARACTERS:
            raise TemplateRefused(f"a text of {len(text)} characters, where {MAX_TEXT_CHARACTERS} is the most")
        return _without_marks(text) if self.marks else Marked(text, ())

    def _text(self, values: Mapping[str, Any]) -> str:
        """A template's first text is tried in a process that can be ended: comparing lists of lists of lists, for one,
        is one instruction for Python, which neither the bound of time nor Ctrl-C interrupts."""

        def render() -> str:
            with bounded(_CPU_SECONDS, _MORE_BYTES):
                return self._compiled.render(self._variables, **values)

        if self.source not in _tried:
            if not keeps_bounds(render):
                raise TakesTooLong
            _tried.add(self.source)
        return render()


_tried: set[str] = set()
"""The sources of templates that have kept their bounds once in this process."""


def builtin_source(name: str) -> str:
    """The source of one of lorakit's own templates."""
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def builtin_names() -> tuple[str, ...]:
    """lorakit's own templates."""
    return tuple(sorted(file.name.removesuffix(".jinja") for file in _FOLDER.iterdir()))


def _reason(error: BaseException) -> str:
    where = f" in line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
    return " ".join(str(error).split())[:300] + where or type(error).__name__


def _without_marks(marked: str) -> Marked:
    pieces, spans, at, start = [], [], 0, None
    for piece in re.split(f"([{_OPEN}{_CLOSE}])", marked):
        if piece == _OPEN and start is None:
            start = at
        elif piece == _CLOSE and start is not None:
            spans.append((start, at))
            start = None
        elif piece in (_OPEN, _CLOSE):
            raise TemplateRefused("the character U+FDD0 or U+FDD1, which no text may hold")
        else:
            pieces.append(piece)
            at += len(piece)
    if start is not None:
        raise TemplateRefused("the character U+FDD0 or U+FDD1, which no text may hold")
    return Marked("".join(pieces), tuple(span for span in spans if span[0] < span[1]))


class _Generation(Extension):
    """{% generation %} … {% endgeneration %} around what the model is to say."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        before, after = (nodes.Output([nodes.TemplateData(mark)]).set_lineno(line) for mark in (_OPEN, _CLOSE))
        return nodes.Scope([before, *body, after]).set_lineno(line)


class _Dict:
    """`dict`, without the attributes of Python's own."""

    def __call__(self, *pairs: Any, **named: Any) -> dict[Any, Any]:
        return dict(*pairs, **named)


class _Namespace(Namespace):
    """`namespace`, whose names don't begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise TemplateError(f"the name {name} in a namespace")
        super().__setitem__(name, value)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, where a power is no way to keep Python busy inside of one instruction, which nothing interrupts."""

    intercepted_binops = frozenset(["**"])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if any(abs(side) > _MAX_IN_POWER for side in (left, right)):
            raise TemplateError(f"a power of numbers over {_MAX_IN_POWER}")
        return super().call_binop(context, operator, left, right)


_ENVIRONMENT = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
_ENVIRONMENT.filters["tojson"] = _tojson
_ENVIRONMENT.globals |= {
    "raise_exception": _raise_exception,
    "strftime_now": _TODAY.strftime,
    "dict": _Dict(),
    "namespace": _Namespace,
}
