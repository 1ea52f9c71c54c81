"""What is shown: results on stdout, words on stderr, text as it is, one JSON object, and no harm from a closed pipe."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lorakit.console import Console
from lorakit.core.config import CONFIGS
from lorakit.core.errors import InputRefused
from lorakit.core.events import Notice, Progress
from tests.conftest import Ran, make_tokenizer

MARKUP = "[q_proj] [bold]x[/bold] [/] [red] :smile: 'a' 3.14 https://example.com \\[y]"

Shown = tuple[str, str]


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Callable[[], Shown]:
    """What has been printed since the last time: (stdout, stderr)."""

    def read() -> Shown:
        captured = capsys.readouterr()
        return captured.out, captured.err

    return read


def lorakit(*arguments: object, **more: Any) -> "subprocess.CompletedProcess[str]":
    """`python -m lorakit …` as a process of its own."""
    command = [sys.executable, "-m", "lorakit", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    return subprocess.run(command, text=True, timeout=120, check=False, **pipes)


@pytest.fixture
def dataset(tmp_path: Path) -> list[str]:
    """The arguments of a `prepare` that works."""
    make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "rows.jsonl").write_text('{"text": "abc"}\n')
    return ["prepare", "rows.jsonl", "--tokenizer", "tokenizer", "--block-size", "64"]


# Text


def test_text_is_printed_as_it_is(shown: Callable[[], Shown]) -> None:
    console = Console()
    console.say(MARKUP)
    assert shown() == (MARKUP + "\n", "")
    console.note(MARKUP)
    assert shown() == ("", MARKUP + "\n")
    console.hint(MARKUP)
    assert shown() == ("", f"hint: {MARKUP}\n")
    console.error(InputRefused(MARKUP, MARKUP))
    assert shown() == ("", f"error: {MARKUP}\nhint: {MARKUP}\n")
    console.report(Notice(MARKUP))
    assert shown() == ("", MARKUP + "\n")


def test_no_text_commands_the_terminal(shown: Callable[[], Shown]) -> None:
    """Escape sequences can hide what was printed, set a window's title or ask for what is then typed."""
    hostile = "a\x1b]0;title\x07\x9b2J\x7f\x00b\tc"
    console = Console()
    console.say(hostile)
    console.note(hostile)
    console.hint(hostile)
    console.error(InputRefused(f"found {hostile}", hostile))
    console.summary({hostile: hostile})
    console.table(hostile, [hostile], [[hostile]])
    console.report(Notice(hostile))
    out, err = shown()
    for text in (out, err):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
        assert "a␛]0;title" in text
        assert re.search(r"\ufffd2J␡␀b\s+c", text)


def test_json_keeps_what_it_escapes(shown: Callable[[], Shown]) -> None:
    hostile = "a\x1b[2J\x9b\x7f\x85é"
    Console(json=True).result({"answer": hostile})
    out, _ = shown()
    assert json.loads(out) == {"answer": hostile}
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", out)


def test_a_bar_shows_no_control_characters() -> None:
    script = "from lorakit.console import Console; from lorakit.core.events import Progress; c = Console(); "
    script += "c.report(Progress('x\\x1b[31mY', 1, 2, 'rows', 'n\\x1b]0;t')); c.close()"
    written = on_a_terminal(script)
    assert "x␛[31mY" in written
    assert "\x1b[31mY" not in written
    assert "\x1b]0;t" not in written


def test_tables_hold_text_as_it_is(shown: Callable[[], Shown]) -> None:
    Console().summary({MARKUP: MARKUP})
    out, err = shown()
    assert out.count(MARKUP) == 2
    assert err == ""
    Console().table("[t]", ["[h]"], [[MARKUP]])
    out, _ = shown()
    assert [text for text in ("[t]", "[h]", MARKUP) if text not in out] == []


def test_a_long_line_stays_one_line(shown: Callable[[], Shown]) -> None:
    """A path that is cut or broken in two can't be copied, whatever the terminal's width is."""
    path = "/a folder" * 40
    Console().summary({"blocks": f"{path} (made before)", "rows": "3"})
    assert [line.split("  ")[-1].strip() for line in shown()[0].splitlines()] == [f"{path} (made before)", "3"]
    Console().error(InputRefused(path, path))
    assert shown()[1] == f"error: {path}\nhint: {path}\n"


def test_pieces_of_an_answer_follow_each_other(shown: Callable[[], Shown]) -> None:
    console = Console()
    for piece in ("Hel", "lo [you", "]"):
        console.say(piece, end="")
    assert shown()[0] == "Hello [you]"


# --json and --quiet


def test_json_is_one_object_and_nothing_else_on_stdout(shown: Callable[[], Shown]) -> None:
    console = Console(json=True)
    console.say("an answer")
    console.summary({"rows": "3"})
    console.table("t", ["h"], [["c"]])
    console.curve("loss", [1.0, 2.0])
    console.answers("t", [{"question": "q", "before": "a", "trained": "b", "merged": "c"}])
    console.hint("next")
    console.note("a note")
    console.result({"path": Path("/x"), "text": "[é]\n", "none": None, "loss": 0.5})
    out, err = shown()
    assert out.count("\n") == 1
    assert json.loads(out) == {"path": "/x", "text": "[é]\n", "none": None, "loss": 0.5}
    assert err == "a note\n"


def test_without_json_the_result_was_said_before(shown: Callable[[], Shown]) -> None:
    Console().result({"path": "/x"})
    assert shown() == ("", "")


def test_quiet_leaves_results_and_errors(shown: Callable[[], Shown], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.console._SECONDS_BETWEEN_LINES", -1.0)
    console = Console(quiet=True)
    console.note("a note")
    console.hint("next")
    console.report(Notice("a notice"))
    console.report(Progress("training", 1, 2, "steps"))
    assert shown() == ("", "")
    console.say("an answer")
    console.error(InputRefused("m", "h"))
    assert shown() == ("an answer\n", "error: m\nhint: h\n")


def test_a_command_with_json_prints_one_object(cli: Callable[..., Ran], dataset: list[str]) -> None:
    ran = cli(*dataset, "--json")
    assert ran.code == 0
    assert ran.out.count("\n") == 1
    keys = {"path", "blocks", "tokens", "trained_tokens", "fill", "rows", "dropped", "seconds", "cached"}
    assert keys <= set(ran.json)
    assert "read as text rows" in ran.err
    assert "{" not in ran.err
    assert "hint:" not in ran.err


def test_a_command_without_json_prints_its_figures_and_the_next_command(
    cli: Callable[..., Ran], dataset: list[str], tmp_path: Path
) -> None:
    ran = cli(*dataset)
    assert ran.code == 0
    names = [line.partition("  ")[0] for line in ran.out.splitlines()]
    assert names == ["blocks", "rows", "tokens", "trained tokens", "lengths", "longest", "ends trained"]
    assert str(tmp_path / "cache") in ran.out.splitlines()[0]
    assert ran.err.splitlines()[-1].startswith("hint: lorakit train --model ")


def test_a_quiet_command_prints_only_its_result(cli: Callable[..., Ran], dataset: list[str]) -> None:
    ran = cli(*dataset, "--json", "--quiet")
    assert (ran.code, ran.err) == (0, "")
    assert ran.json["rows"] == 1


def test_a_failed_command_prints_nothing_on_stdout(cli: Callable[..., Ran]) -> None:
    ran = cli("prepare", "[missing].jsonl", "--tokenizer", "./nothing", "--json")
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.startswith("error: ./nothing: found ")


def test_markup_in_a_users_text_survives_the_whole_way(cli: Callable[..., Ran], tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "[bold]rows.jsonl").write_text('{"[red]": 1}\n')
    ran = cli("prepare", "[bold]rows.jsonl", "--tokenizer", "tokenizer")
    assert ran.code == 3
    assert "[bold]rows.jsonl:1: found the columns [red]; need" in ran.err


# Terminals


def on_a_terminal(script: str, **variables: str) -> str:
    """What a Python script writes to a terminal of 80 columns."""
    leader, follower = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", "COLUMNS": "80", **variables}
    with subprocess.Popen([sys.executable, "-c", script], stdout=follower, stderr=follower, env=environment) as running:
        os.close(follower)
        written = b""
        while True:
            try:
                piece = os.read(leader, 65536)
            except OSError:  # what Linux says at the end of a terminal
                break
            if not piece:
                break
            written += piece
    os.close(leader)
    assert running.returncode == 0, written.decode()
    return written.decode()


ERROR = """
from lorakit.console import Console
from lorakit.core.errors import InputRefused
Console().error(InputRefused("found [a], need b", "do c"))
"""

TRAINING = """
from lorakit.console import Console
from lorakit.core.events import Progress
console = Console()
for step in range(1, 4):
    console.report(Progress("training", step, 3, "steps", "loss [1.5]"))
console.summary({"done": "yes"})
"""


def test_a_terminal_gets_colour() -> None:
    assert "\x1b[1;31m" in on_a_terminal(ERROR)


def test_no_color_is_honoured() -> None:
    written = on_a_terminal(ERROR, NO_COLOR="1")
    assert "\x1b[1;31m" not in written
    assert not any(f"\x1b[{code}m" in written for code in range(30, 50))


def test_a_terminal_gets_a_progress_bar_that_goes_away() -> None:
    written = on_a_terminal(TRAINING)
    assert "training" in written
    assert "3/3" in written
    assert "loss [1.5]" in written
    assert written.index("3/3") < written.index("done")
    assert "\x1b[?25h" in written, "the cursor is shown again"


def test_a_result_never_stands_behind_the_bar() -> None:
    script = """
from lorakit.console import Console
from lorakit.core.events import Progress
console = Console()
console.report(Progress("training", 1, 3, "steps"))
console.say("a result")
"""
    written = plain(on_a_terminal(script))
    assert re.search(r"\x1b\[1A\x1b\[2K(\x1b\[\?25h)?a result", written)


def test_a_pipe_gets_no_escape_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for script in (ERROR, TRAINING):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize("columns", ["40", "80"])
def test_sentences_are_wrapped_between_words_and_commands_stay_whole(columns: str) -> None:
    script = """
from lorakit.console import Console
from lorakit.core.errors import InputRefused
console = Console()
console.say("It fits: " + "the fullest device needs much less than it has, " * 3)
path = "/a/very/long/path/that/is/never/cut/whatever/happens.jsonl: "
console.error(InputRefused(path + "found a, need b; " * 6, "run `lorakit train --model m --blocks b` again"))
console.hint("lorakit train " + "--option value " * 9)
"""
    lines = plain(on_a_terminal(script, COLUMNS=columns)).splitlines()
    *sentences, command = lines
    assert command.strip() == ("hint: lorakit train " + "--option value " * 9).strip()
    assert any("`lorakit train --model m --blocks b`" in line for line in sentences)
    assert any("/a/very/long/path/that/is/never/cut/whatever/happens.jsonl:" in line for line in sentences)
    long = [line for line in sentences if len(line) > int(columns)]
    assert all("`lorakit" in line or "/a/very" in line for line in long)
    words = "It fits: " + "the fullest device needs much less than it has, " * 3
    assert " ".join(" ".join(sentences).split()).startswith(" ".join(words.split()))


def test_each_problem_of_several_has_its_line() -> None:
    script = """
from lorakit.console import Console
from lorakit.core.errors import UsageError
problems = ["--quantize: found 'nf5', need one of none, int8, nf4, fp4", "--rank: found '0', need 1"]
Console().error(UsageError("\\n".join(problems), "h"))
"""
    first, second, *_ = plain(on_a_terminal(script)).splitlines()
    assert first == "error: --quantize: found 'nf5', need one of none, int8, nf4, fp4"
    assert second == "--rank: found '0', need 1"


def plain(written: str) -> str:
    """Without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", written).replace("\r\n", "\n")


FAILS = """
import sys
from lorakit import cli
from lorakit.core.errors import InputRefused
from lorakit.core.events import Progress
def run(config, console):
    console.report(Progress("training", 1, 3, "steps"))
    console.stop_progress() if {stops} else None
    console.say("half a li", end="")
    raise {raised}
run.__doc__ = "Example: x"
cli.COMMANDS["demo"] = run
code = cli.main(["demo"])
sys.exit(0 if code == {code} else 99)
"""


@pytest.mark.parametrize(
    ("raised", "code"), [("InputRefused('m', 'h')", 3), ("KeyboardInterrupt", 130), ("cli.Terminated", 75)]
)
def test_a_command_that_fails_takes_its_bar_away_and_shows_the_cursor(raised: str, code: int) -> None:
    written = on_a_terminal(FAILS.format(raised=raised, code=code, stops=False))
    assert "\x1b[?25l" in written
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l"), "the cursor is shown again"
    assert written.rindex("\x1b[2K") < written.rindex("error: "), "the bar is gone"
    lines = plain(on_a_terminal(FAILS.format(raised=raised, code=code, stops=True))).splitlines()
    assert lines[-2].lstrip("\x1b[?25h").startswith("error: "), "no half line before it"
    assert lines[-1].startswith("hint: ")


# Encodings


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "cp1252", "utf-8"])
def test_what_a_code_page_lacks_is_written_in_ascii(encoding: str) -> None:
    script = """
from lorakit.console import Console
from lorakit.streams import write_everywhere
from lorakit.core.errors import InputRefused
write_everywhere()
Console().say("1 × 2 → ≥ 3 …")
Console().say("日")
Console(json=True).result({"x": "日→é"})
Console().error(InputRefused("日", "→"))
"""
    environ = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, env=environ)
    signs, kanji, result = done.stdout.decode(encoding).splitlines()
    whole = "1 × 2 → ≥ 3 …"
    can = {"ascii": "", "cp437": "≥", "cp1252": "×…", "utf-8": "×→≥…"}[encoding]
    for sign, in_ascii in {"×": "x", "→": "->", "≥": ">=", "…": "..."}.items():
        whole = whole if sign in can else whole.replace(sign, in_ascii)
    assert signs == whole
    assert kanji == ("日" if encoding == "utf-8" else "\\u65e5")
    assert json.loads(result) == {"x": "日→é"}
    assert "Traceback" not in done.stderr.decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "cp1252"])
@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["plan-devices", "llama-7b", "--gpus", "24GiB"]]
)
def test_commands_print_on_any_code_page(encoding: str, arguments: list[str]) -> None:
    done = lorakit(*arguments, env={**os.environ, "PYTHONIOENCODING": encoding}, encoding=encoding)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert done.stdout


# Windows of any width


@pytest.mark.parametrize("columns", [40, 80, 160])
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["doctor", "--help"]])
def test_help_fits_its_window(columns: int, arguments: list[str]) -> None:
    done = lorakit(*arguments, env={**os.environ, "COLUMNS": str(columns), "TERMINAL_WIDTH": str(columns)})
    assert done.returncode == 0
    long = [line for line in done.stdout.splitlines() if len(line.rstrip()) > columns]
    assert [line for line in long if "  lorakit " not in line] == [], "only commands are longer"
    assert "<bool>" not in done.stdout
    shown = set(re.findall(r"--[a-z0-9-]+", done.stdout))
    if arguments[0] in CONFIGS:
        knobs = CONFIGS[arguments[0]].settings().values()
        assert {knob.label for knob in knobs if knob.label.startswith("--") and knob.field.default is not True} <= shown


def test_bars_are_as_wide_as_there_is_room() -> None:
    script = "from lorakit.console import Console; Console().bars([('cuda:0', {'w': 0.5, 'L': 0.1}, '1 of 2 GiB')])"
    for columns, width in (("40", 18), ("80", 48)):
        line = on_a_terminal(script, COLUMNS=columns).splitlines()[0]
        assert len(line) <= int(columns)
        assert len(line.split("|")[1]) == width


def test_quiet_and_verbose_contradict_each_other(cli: Callable[..., Ran]) -> None:
    ran = cli("evaluate", "m", "--blocks", "b", "--quiet", "--verbose")
    assert ran.code == 2
    assert "error: found both --quiet and --verbose, need one of them" in ran.err


def test_verbose_shows_what_libraries_say_and_where_a_bug_is() -> None:
    script = (
        "import sys, logging; from lorakit import cli\n"
        "def run(config, console): logging.getLogger('library').info('asked for x'); raise RuntimeError('oh')\n"
        "run.__doc__ = 'Example: x'; cli.COMMANDS['demo'] = run\n"
        "sys.exit(cli.main(['demo', *sys.argv[1:]]))"
    )
    for options, shown in (([], False), (["--verbose"], True)):
        done = subprocess.run([sys.executable, "-c", script, *options], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert ("library: asked for x" in done.stderr) == shown
        assert ("Traceback" in done.stderr) == shown


def test_one_of_many_that_fails_doesnt_take_python_down() -> None:
    script = (
        "import atexit, sys; from lorakit import cli\n"
        "class Threads:\n"
        "    def __del__(self): print('torn down', file=sys.__stderr__)\n"
        "group = Threads(); atexit.register(print, 'cleaned up')\n"
        "sys.exit(cli.main())"
    )
    place = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "x", "MASTER_PORT": 1}
    for more, torn_down in (({}, True), (place, False)):
        environ = os.environ | {name: str(value) for name, value in more.items()}
        command = [sys.executable, "-c", script, "merge", "--wrong"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
        assert (done.returncode, done.stdout) == (2, "cleaned up\n")
        assert "error: found the unknown option --wrong" in done.stderr
        assert ("torn down" in done.stderr) == torn_down


def test_processes_that_a_command_starts_print_alike() -> None:
    assert Console().options == []
    assert Console(json=True, quiet=True).options == ["--json", "--quiet"]
    assert Console(verbose=True).options == ["--verbose"]


# Progress without a terminal


def test_progress_without_a_terminal_is_a_line_now_and_then(
    shown: Callable[[], Shown], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    console = Console()
    for second in range(60):
        now = 1000.0 + second
        console.report(Progress("training", second, 60, "steps", "loss [2.5]"))
    out, err = shown()
    assert out == ""
    expected = [f"training: {s}/60 steps loss [2.5] ({60 - s} s left)" for s in (11, 22, 33, 44, 55)]
    assert err.splitlines() == expected, "a step a second"


def test_progress_without_an_end_is_a_count(shown: Callable[[], Shown], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.console._SECONDS_BETWEEN_LINES", -1.0)
    Console().report(Progress("preparing", 5, None, "rows"))
    assert shown()[1] == "preparing: 5 rows\n"


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0, 2.0], [3.0, 1.0], [float(v) for v in range(500, 0, -1)]])
def test_a_curve_shows_highest_and_lowest_and_a_point_a_column(
    values: Sequence[float], shown: Callable[[], Shown]
) -> None:
    Console().curve("loss", values, height=8, width=60)
    lines = shown()[0].splitlines()[1:]
    assert lines[0] == f"loss, {len(values)} steps"
    points = [line.partition("| ")[2] for line in lines[1:]]
    columns = min(60, len(values))
    assert [sum(row[column : column + 1] == "*" for row in points) for column in range(columns)] == [1] * columns
    if len(set(values)) > 1:
        means = [sum(part) / len(part) for part in even_parts(values, columns)]
        assert lines[1].startswith(f"{max(means):8.3f} | *")
        assert lines[8].startswith(f"{min(means):8.3f} | ")
        assert points[-1].rstrip().endswith("*")


def even_parts(values: Sequence[float], parts: int) -> list[Sequence[float]]:
    """Cut where the running share of values passes each column's end."""
    ends = [round((part + 1) * len(values) / parts) for part in range(parts)]
    return [values[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def test_no_values_no_curve(shown: Callable[[], Shown]) -> None:
    Console().curve("loss", [])
    assert shown() == ("", "")


def test_a_pipe_is_read_line_by_line_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n  And how? \n\n \nasked too\n"))
    assert list(Console().lines()) == ["Why?", "  And how? ", "asked too"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?"))
    assert list(Console().lines()) == ["Why?"]


@pytest.mark.parametrize("line", [b"caf\xe9\n", "half \ud83d\n".encode("utf-8", "surrogatepass")])
def test_a_pipe_of_what_is_no_text_is_refused(line: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    for errors in ("strict", "surrogateescape"):  # Python's own in the C locale
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(line), "utf-8", errors))
        with pytest.raises(InputRefused, match="stdin: found what isn't UTF-8"):
            list(Console().lines())


def test_an_answer_stays_what_it_is_in_a_pipe(shown: Callable[[], Shown]) -> None:
    Console().say("if x:\r\n\treturn\t1", end="")
    Console().say("\x0c\n", end="")
    assert shown() == ("if x:\r\n\treturn\t1\x0c\n", "")


def test_an_answer_commands_no_terminal() -> None:
    written = on_a_terminal(r"from lorakit.console import Console; Console().say('a\x1b]0;t\x07\tb', end='')")
    assert "a␛]0;t␇\tb" in written
    assert "\x1b]0;t" not in written


# Closed pipes


def closed_pipe() -> int:
    """The end to write to of a pipe that nobody reads, as after `| head -c0`."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


RESULT = """
from lorakit.console import Console
console = Console(json={json})
for number in range(5000):
    console.note("words")
    console.say("an answer", end="")
console.summary({{"rows": "3"}})
console.result({{"rows": 3}})
console.hint("next")
print("still here", file=open("end", "w"))
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_reader_that_went_away_stops_nothing_and_silences_only_its_stream(
    stream: str, as_json: bool, tmp_path: Path
) -> None:
    writer = closed_pipe()
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writer}
    script = RESULT.format(json=as_json)
    done = subprocess.run([sys.executable, "-c", script], text=True, timeout=60, check=False, **streams)
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "end").read_text() == "still here\n"
    if stream == "stdout":
        assert done.stderr.count("words\n") == 5000
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
    else:
        assert done.stdout.count("an answer") == (0 if as_json else 5000)
        assert done.stdout.endswith('{"rows": 3}\n' if as_json else "3\n")


def test_a_command_whose_log_is_closed_does_its_work_and_says_its_result(dataset: list[str], tmp_path: Path) -> None:
    writer = closed_pipe()
    done = lorakit(*dataset, "--output", "out", "--json", stderr=writer)
    os.close(writer)
    assert done.returncode == 0
    assert json.loads(done.stdout)["rows"] == 1
    assert (tmp_path / "out" / "lorakit.json").is_file()


def test_a_command_whose_reader_went_away_does_its_work(dataset: list[str], tmp_path: Path) -> None:
    writer = closed_pipe()
    done = lorakit(*dataset, "--output", "out", stdout=writer)
    os.close(writer)
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1].startswith("hint: lorakit train")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert (tmp_path / "out" / "lorakit.json").is_file()


def test_a_closed_log_keeps_an_errors_exit_code() -> None:
    writer = closed_pipe()
    done = lorakit("prepare", "rows.jsonl", stderr=writer)
    os.close(writer)
    assert done.returncode == 2


@pytest.mark.parametrize("arguments", [["--version"], ["prepare", "--help"]])
def test_help_into_a_closed_pipe_is_no_traceback(arguments: list[str]) -> None:
    writer = closed_pipe()
    done = lorakit(*arguments, stdout=writer)
    os.close(writer)
    assert "Traceback" not in done.stderr
    assert "error:" not in done.stderr
