"""The only printer: a command's result on stdout, everything else on stderr.

Text from users is printed without markup, and its control characters as signs. Colour is never the only sign; rich
leaves it out for pipes and NO_COLOR.
On a terminal sentences are wrapped between words; figures, commands and everything in a pipe stay one line, however
long: a path or a command in two pieces can't be copied.
"""

import codecs
import contextlib
import itertools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

from rich.console import Console as RichConsole
from rich.segment import Segment, Segments
from rich.text import Text

from lorakit.core.errors import InputRefused, LorakitError, Stopped
from lorakit.core.events import Notice, Progress
from lorakit.signals import Noted

_SECONDS_BETWEEN_LINES = 10.0
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
"""Control characters as signs that show them, one for one: what strangers wrote (names of tensors, rows, answers)
mustn't command the terminal."""
_WIDE = 60
"""Columns of a terminal from which on there is room for a bar."""


class Console:
    """What a command shows. `json`: one JSON object on stdout. `quiet`: errors and results only. `silent`: nothing.
    `verbose` is for the processes that a command starts."""

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: bool = False, silent: bool = False) -> None:
        self.json, self.quiet, self.verbose = json, quiet or silent, verbose
        self._out = _Stream(highlight=False, soft_wrap=True, quiet=silent)
        self._err = _Stream(stderr=True, highlight=False, soft_wrap=True, quiet=silent)
        self._bar: Any = None
        self._last_line = time.monotonic()
        self._began: dict[str, tuple[float, int]] = {}
        """When each task was first heard of, and how much of it was done."""
        self._in_line = False
        """Whether what was said last has no end of line yet."""

    @staticmethod
    def width() -> int:
        """Columns of the window, also where stdout goes into a pipe."""
        return RichConsole().width

    @property
    def options(self) -> list[str]:
        """The command line's words for how this one prints."""
        given = {"--json": self.json, "--quiet": self.quiet, "--verbose": self.verbose}
        return [name for name, is_given in given.items() if is_given]

    def of_rank(self, rank: int) -> "Console":
        """Of the processes of a parallel run only the first speaks; the others' errors are printed all the same."""
        return self if rank == 0 else Console(json=self.json, silent=True)

    def note(self, text: str) -> None:
        """One line for the person at the keyboard."""
        if not self.quiet:
            self._print(self._err, self._wrapped(self._err, Text(text)))

    def hint(self, text: str) -> None:
        """The next command to run."""
        if not self.quiet and not self.json:
            self._print(self._err, Text("hint: ", style="cyan").append(text, style="default"))

    def error(self, error: LorakitError, who: str = "") -> None:
        """A failure and what to do, in one piece: several processes may write at once. `who`: what stands in front."""
        self.stop_progress()
        text = self._wrapped(self._err, Text(who).append("error: ", style="bold red").append(error.message))
        hint = self._wrapped(self._err, Text(who).append("hint: ", style="cyan").append(error.hint))
        self._print(self._err, text.append("\n").append_text(hint))

    def say(self, text: str, end: str = "\n") -> None:
        """A piece of the command's result, as text on stdout; nothing with --json. A line is wrapped, a part of one
        (`end` is empty) stays what it is, tabs and all; in a pipe control characters too: it's what a model said."""
        if not self.json:
            if end:
                self._print(self._out, self._wrapped(self._out, Text(text)), end=end)
            else:
                shown = text.translate(_VISIBLE) if self._out.is_terminal else text
                self._print(self._out, Segments([Segment(shown)]), end="")
            self._in_line = not (end or text).endswith("\n")

    def result(self, facts: Mapping[str, Any]) -> None:
        """The command's result: the JSON object with --json, else nothing (what was said before is the result)."""
        self.stop_progress()
        if self.json:
            as_it_is = codecs.lookup(self._out.encoding).name.startswith("utf")
            text = json.dumps(facts, ensure_ascii=not as_it_is, default=str)
            text = re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text)  # as JSON writes other controls
            self._print(self._out, Text(text))

    def summary(self, facts: Mapping[str, str]) -> None:
        """A few named figures, on stdout."""
        self.stop_progress()
        if self.json:
            return
        self._rows([[Text(name, style="bold"), Text(value)] for name, value in facts.items()])

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table on stdout."""
        if self.json:
            return
        self.say(title)
        self._rows([[Text(name, style="bold") for name in header], *([Text(cell) for cell in row] for row in rows)])

    def _rows(self, rows: Sequence[Sequence[Text]]) -> None:
        """Aligned columns, a line a row however long it is: a path that is cut or folded can't be copied."""
        widths = [max(cell.cell_len for cell in column) for column in zip(*rows, strict=True)]
        for row in rows:
            line = Text()
            for cell, width in zip(row, widths, strict=True):
                line.append_text(cell).append(" " * (width - cell.cell_len + 2))
            line.rstrip()
            self._print(self._out, line)

    def findings(self, findings: Mapping[str, Any]) -> None:
        """Checks on stdout, a line each: status, name, what was found; below it why that matters and what to do."""
        if self.json:
            return
        colours = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}
        names = max(map(len, findings), default=0)
        for name, found in findings.items():
            line = Text(f"{found.status:<4}  ", style=colours[found.status])
            line.append(f"{name:<{names}}  ", style="bold").append(found.detail, style="default")
            self._print(self._out, self._wrapped(self._out, line, indent=6))
            for label, text in (("why", found.why), ("fix", found.fix)):
                if text and found.status in ("warn", "fail"):
                    line = Text(f"      {label}: ", style="cyan").append(text, style="default")
                    self._print(self._out, self._wrapped(self._out, line, indent=11))

    def preview(self, place: str, runs: Sequence[Any], *, ids: bool) -> None:
        """A row as it is trained: what is trained stands in brackets, in colour."""
        line = Text(f"{place}\n", style="bold")
        for run in runs:
            line.append("[" if run.trained else "", style="bold green")
            line.append(run.text, style="green" if run.trained else "dim")
            line.append("]" if run.trained else "", style="bold green")
            if ids:
                line.append(f" {{{' '.join(map(str, run.ids))}}} ", style="cyan")
        if not self.json:
            self._print(self._out, line)

    def curve(self, title: str, values: Sequence[float], height: int = 8, width: int = 60) -> None:
        """A line of numbers as a small picture on stdout; each column is the mean of its share of the values."""
        if self.json or not values:
            return
        width = min(width, len(values))
        edges = [round(column * len(values) / width) for column in range(width + 1)]
        means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
        low, high = min(means), max(means)
        levels = [round((mean - low) / ((high - low) or 1) * (height - 1)) for mean in means]
        self.say(f"\n{title}, {len(values)} steps")
        for level in range(height - 1, -1, -1):
            label = f"{high:8.3f}" if level == height - 1 else f"{low:8.3f}" if level == 0 else " " * 8
            self.say(f"{label} | " + "".join("*" if found == level else " " for found in levels))

    def bars(self, rows: Sequence[tuple[str, Mapping[str, float], str]], width: int = 48) -> None:
        """A bar a row on stdout: its name, its parts as shares of the whole bar, and a figure. A part is drawn with the
        first letter of its name; what exceeds the bar is cut off with `>`. A narrow terminal gets narrower bars."""
        names = max(len(name) for name, _, _ in rows)
        if self._out.is_terminal:
            width = max(8, min(width, self._out.width - names - max(len(figure) for _, _, figure in rows) - 6))
        for name, parts, figure in rows:
            edges = [min(round(width * edge), width + 1) for edge in itertools.accumulate(parts.values(), initial=0.0)]
            pieces = zip(parts, itertools.pairwise(edges), strict=True)
            drawn = "".join(part[0] * (end - start) for part, (start, end) in pieces)
            drawn = drawn[: width - 1] + ">" if len(drawn) > width else drawn.ljust(width, "·")
            self.say(f"{name:<{names}}  |{drawn}|  {figure}")

    def answers(self, title: str, answers: Sequence[Mapping[str, Any]]) -> None:
        """Questions and what was answered before training, after it, and after merging."""
        self.say(f"\n{title}:")
        for answer in answers:
            self.say(f"\n  {answer['question']}")
            for stage in ("before", "trained", "merged"):
                self.say(f"    {stage:<8} {' '.join(answer[stage].split())}")

    def report(self, event: Progress | Notice) -> None:
        """What a core function tells while it works: a bar on a terminal, else a line every ten seconds."""
        if isinstance(event, Notice):
            self.note(event.text)
        elif not self.quiet:
            self._began.setdefault(event.task, (time.monotonic(), event.done))
            if self._err.is_terminal:
                self._draw(event)
            elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
                self._last_line = time.monotonic()
                of = f"/{event.total}" if event.total is not None else ""
                shown = [f"{event.task}: {event.done}{of} {event.unit}", event.note, self._left(event)]
                self._print(self._err, Text(" ".join(filter(None, shown))))

    def _left(self, event: Progress) -> str:
        """How long the rest of a task takes at the speed since it was first heard of."""
        began, first = self._began[event.task]
        if event.total is None or event.done <= first:
            return ""
        seconds = (time.monotonic() - began) * (event.total - event.done) / (event.done - first)
        return f"({round(seconds)} s left)"

    def _draw(self, event: Progress) -> None:
        if self._bar is None:
            self._bar = _bar(self._err)
            self._bar.start()
        event = replace(event, task=event.task.translate(_VISIBLE), note=event.note.translate(_VISIBLE))
        task = next((task.id for task in self._bar.tasks if task.description == event.task), None)
        if task is None:
            task = self._bar.add_task(
                event.task, total=event.total, completed=event.done, unit=event.unit, note=event.note
            )
        self._bar.update(task, completed=event.done, unit=event.unit, note=event.note)

    def lines(self) -> Iterator[str]:
        """What is typed, or comes through a pipe, line by line, to its end or Ctrl-D; empty ones are passed over. On a
        terminal a line can be edited and earlier ones taken back, and Ctrl-C twice is the end too.

        Raises InputRefused where a line isn't text."""
        with contextlib.suppress(EOFError):
            if self.is_terminal:
                with contextlib.suppress(ImportError):
                    import readline  # noqa: F401  # from now on `input` edits lines
                yield from self._typed()
            while not self.is_terminal:
                if (line := self._line()).strip():
                    yield line
        if self.is_terminal:
            self._print(self._err, Text(""))

    def _typed(self) -> Iterator[str]:
        """Lines until Ctrl-C was pressed twice. Between lines too it is only heard, and told at the next."""
        heard, reading, told = False, False, False

        def hear(which: int, frame: FrameType | None) -> None:
            nonlocal heard
            heard = True
            if reading:
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, hear)
        try:
            while not (heard and told):
                told, heard, line = heard, False, ""  # first: what is pressed while it is told counts
                if told:
                    self._print(self._err, Text("\n(Ctrl-C once more, Ctrl-D or /exit to leave)"))
                with contextlib.suppress(KeyboardInterrupt):
                    reading = True
                    line = self._line() if not heard else ""
                reading = False
                if line.strip() and not heard:
                    told = False
                    yield line
        finally:
            signal.signal(signal.SIGINT, before)

    def _line(self) -> str:
        """The next line of stdin. `input` writes its prompt to stdout, where nothing else may stand beside a result."""
        prompt = "> " if self.is_terminal else ""
        if prompt and (self.json or not sys.stdout.isatty()):
            self._print(self._err, Text(prompt), end="")
            prompt = ""
        try:
            line = input(prompt)
            line.encode()
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            message = f"stdin: found what isn't UTF-8 ({error.reason}), need text"
            raise InputRefused(message, "convert it first: iconv -t UTF-8") from None
        return line

    @property
    def is_terminal(self) -> bool:
        """Whether a person types what the command reads."""
        return sys.stdin.isatty()

    @contextlib.contextmanager
    def answering(self) -> Iterator[Callable[[], bool]]:
        """Where a person types, Ctrl-C ends what is done in here and not the command: the first asks for it by what is
        yielded, a second breaks it off. Raises Stopped after SIGTERM."""
        if not self.is_terminal:
            yield lambda: False
            return
        with Noted() as signals, contextlib.suppress(KeyboardInterrupt):
            yield lambda: signals.asked is not None
        if signals.asked == "terminate":
            raise Stopped.early(interrupted=False)

    def stop_progress(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def close(self) -> None:
        """Leave the terminal as it was, however the command ended: no bar, no half line, the cursor shown (also where a
        process that was killed has hidden it)."""
        self.stop_progress()
        if self._in_line:
            self.say("")
        if self._err.is_terminal:
            self._err.show_cursor(True)

    def _print(self, console: "_Stream", what: Any, end: str = "\n") -> None:
        if console is self._out:  # else it would stand behind the bar, in the bar's line
            self.stop_progress()
        if isinstance(what, Text):
            what.plain = what.plain.translate(_VISIBLE)
        console.print(what, end=end)

    def _wrapped(self, stream: "_Stream", text: Text, indent: int = 0) -> Text:
        """A sentence in lines as wide as the terminal, cut between words and not in a command between backquotes."""
        if not stream.is_terminal:
            return text
        lines: list[Text] = []
        for line in text.split("\n", allow_blank=True):
            lines.append(Text())
            for word in _words(line):
                if lines[-1] and lines[-1].cell_len + len(word.plain.rstrip()) > stream.width:
                    lines[-1].rstrip()
                    lines.append(Text(" " * indent))
                lines[-1].append_text(word)
        return Text("\n").join(lines)


def _words(text: Text) -> Iterator[Text]:
    """Pieces that begin with a word and end with the space behind it; what stands between backquotes is one."""
    ends = [found.end() for found in re.finditer(r"(?:`[^`]*`|\S)+\s*|^\s+", text.plain)]
    return iter(text.divide([end for end in ends if end < len(text)]))


def _bar(stream: "_Stream") -> Any:
    """A live line: what, how far, how long, and of the rest as much as there is room for."""
    from rich import progress as bars
    from rich.constrain import Constrain
    from rich.table import Column

    class Rest(bars.ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")

    class Line(bars.Progress):
        def get_renderables(self) -> Iterator[Any]:
            # a full line and the terminal's ^C would be two, of which one would stay
            yield Constrain(self.make_tasks_table(self.tasks), stream.width - 3)

    whole = Column(no_wrap=True)
    wide = stream.width >= _WIDE
    columns = [
        bars.TextColumn("{task.description}", markup=False),
        bars.MofNCompleteColumn(table_column=whole),
        bars.TextColumn("{task.fields[unit]}", markup=False),
        *([bars.BarColumn(bar_width=16), bars.TimeElapsedColumn(table_column=whole)] if wide else []),
        bars.TimeRemainingColumn(compact=not wide, table_column=whole),
        Rest(),
    ]
    return Line(*columns, console=stream, transient=True)


class _Stream(RichConsole):
    """A stream whose reader may go away (`| head`): that ends no run, and what is printed after it goes nowhere."""

    def on_broken_pipe(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        with contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)
