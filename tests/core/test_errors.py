"""Every failure has its exit code, and an operating-system failure names the path and what to do about it."""

import ast
import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorakit.core import errors
from lorakit.core.errors import ExitCode, LorakitError, Stopped, differences, disk_failed, shown_bytes
from tests.conftest import Ran

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, LorakitError) and kind is not LorakitError
]


def test_exit_codes_are_the_documented_interface() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "DONE": 0,
        "BUG": 1,
        "USAGE": 2,
        "INPUT_REFUSED": 3,
        "ARTIFACT_DAMAGED": 4,
        "MISMATCH": 5,
        "BUSY": 6,
        "DISK": 7,
        "NON_FINITE": 8,
        "OUT_OF_MEMORY": 9,
        "RANK_FAILED": 10,
        "ENVIRONMENT": 11,
        "HUB": 12,
        "STOPPED": 75,
        "INTERRUPTED": 130,
    }


def test_no_two_kinds_of_failure_share_an_exit_code() -> None:
    codes = [kind.exit_code for kind in KINDS]
    assert len(set(codes)) == len(codes)
    assert ExitCode.BUG not in codes
    assert ExitCode.DONE not in codes


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_tree_at_the_top_of_the_file_draws_every_kind_with_its_code(kind: type[LorakitError]) -> None:
    drawn = re.search(rf"─ {kind.__name__} +(\d+)", errors.__doc__ or "")
    assert drawn is not None
    assert int(drawn[1]) == kind.exit_code


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_failure_carries_message_and_hint(kind: type[LorakitError]) -> None:
    error = kind("x: found a, need b", "do c")
    assert (error.message, error.hint, str(error)) == ("x: found a, need b", "do c", "x: found a, need b")


def test_a_number_that_would_fill_the_screen_is_shown_by_its_first_digits() -> None:
    error = errors.UsageError(f"--seed: found '{'9' * 5000}', need a whole number below {2**63}", "h")
    assert error.message == f"--seed: found '{'9' * 20}… (5,000 digits)', need a whole number below {2**63}"


def test_ctrl_c_and_a_termination_have_codes_of_their_own() -> None:
    assert Stopped("m", "h").exit_code == 75
    assert Stopped("m", "h", interrupted=True).exit_code == 130
    assert Stopped.exit_code == 75, "one interrupted run must not change the code of the next"


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EFBIG, "free some space"),
        (errno.EACCES, "--output"),
        (errno.EPERM, "--output"),
        (errno.EROFS, "--output"),
        (errno.EIO, "check the disk"),
    ],
)
def test_the_hint_fits_the_operating_systems_reason(number: int, advice: str) -> None:
    error = disk_failed(OSError(number, os.strerror(number), "/there/file"), Path("/elsewhere"))
    assert error.exit_code == 7
    assert error.message.startswith("/there/file: found ")
    assert os.strerror(number) in error.message
    assert advice in error.hint


def test_a_failure_without_a_file_name_names_the_path_that_was_worked_on() -> None:
    assert disk_failed(OSError(errno.EIO, "broken"), Path("/elsewhere")).message.startswith(
        "/elsewhere: found 'broken'"
    )
    assert "unexplained" in disk_failed(OSError("unexplained"), Path("/elsewhere")).message


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.50 KiB"), (3 * 2**20, "3.00 MiB"), (2**40, "1024.00 GiB")],
)
def test_a_size_has_a_unit_that_it_fills(size: int, shown: str) -> None:
    assert shown_bytes(size) == shown


# As the user sees them

_KINDS = {kind.exit_code: kind for kind in KINDS}


def failures() -> Iterator[tuple[ExitCode, BaseException, str, str]]:
    """For each exit code but 0: what a command fails with, and the message and hint that the user has to see."""
    for code in ExitCode:
        if code in _KINDS:
            yield code, _KINDS[code]("[x]: found a, need b", "do [c]"), "[x]: found a, need b", "do [c]"
    yield ExitCode.INTERRUPTED, Stopped("found Ctrl-C, need time", "again", interrupted=True), "found Ctrl-C", "again"
    yield ExitCode.BUG, RuntimeError("odd"), "found a bug in lorakit: RuntimeError: odd", "report it with "
    full = OSError(errno.ENOSPC, "No space left on device", "/there/file")
    yield ExitCode.DISK, full, "/there/file: found 'No space left on device'", "free some space"
    yield ExitCode.OUT_OF_MEMORY, MemoryError("too much"), "found too much, need more memory", "close other programs"
    yield (
        ExitCode.INTERRUPTED,
        KeyboardInterrupt(),
        "stopped by Ctrl-C before anything was written",
        "run the same command again",
    )


FAILURES = list(failures())


def test_every_exit_code_but_success_is_shown() -> None:
    """A new code without a failure that shows it fails here."""
    assert {code for code, *_ in FAILURES} == set(ExitCode) - {ExitCode.DONE}


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: f"{failure[0].name}-{type(failure[1]).__name__}")
@pytest.mark.parametrize("json", [False, True])
def test_a_failure_is_shown_as_one_error_and_one_hint(
    failure: tuple[ExitCode, BaseException, str, str],
    json: bool,
    cli: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    code, error, message, hint = failure

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("lorakit.core.evaluation.evaluate", fails)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    ran = cli("evaluate", "m", "--blocks", "b", *(["--json"] if json else []))
    assert (ran.code, ran.out) == (code, "")
    first, second = ran.err.splitlines()
    assert first.startswith(f"error: {message}")
    assert second.startswith(f"hint: {hint}")
    assert "Traceback" not in ran.err


SOURCES = sorted((Path(errors.__file__).parents[1]).rglob("*.py"))
_NAMES = {kind.__name__ for kind in KINDS}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """The message of every failure that a file makes, with its line; what is filled in is `{}`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _NAMES and node.args
        ):
            continue
        message = node.args[0]
        if isinstance(message, ast.Constant):
            yield node.lineno, str(message.value)
        elif isinstance(message, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in message.values]
            yield node.lineno, "".join(map(str, parts))


_PASSED_ON = re.compile(r"(--rendezvous |rank )?\{\}: \{\}|[^a-z]*")
_IN_OTHER_WORDS = {"{}: stopped after step {} of {}, which is saved", "{}: the run began with it"}


def test_every_message_says_what_was_found_or_what_is_needed() -> None:
    """`<thing>: found X, need Y`, wherever the message stands in the source itself."""
    found = [(path, line, text) for path in SOURCES for line, text in texts(path) if not _PASSED_ON.fullmatch(text)]
    assert len(found) > 100
    other = [(path.name, line, text) for path, line, text in found if not re.search(r"\b(found|need)\b", text)]
    assert {text for _, _, text in other} <= _IN_OTHER_WORDS, other


def test_every_failure_has_a_hint() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _NAMES:
                starred = any(isinstance(argument, ast.Starred) for argument in node.args)
                assert starred or len(node.args) == 2, f"{path.name}:{node.lineno}"
                assert not (len(node.args) == 2 and isinstance(node.args[1], ast.Constant) and not node.args[1].value)


def test_differences_name_each_setting_with_both_values() -> None:
    assert differences({"a": 1, "b": 2}, {"b": 3, "c": None, "d": 4}) == [
        "a: found 1, asked for None",
        "b: found 2, asked for 3",
        "d: found None, asked for 4",
    ]
