"""The watch over errors and the network itself: it sees what it should see, in this process and in those it starts."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import conftest, shown_errors
from tests.shown_errors import CLASSES, is_whole, noted, places, problems

FOREIGN = "198.51.100.7"  # of documentation, RFC 5737

MAKES = """
from lorakit.core.disk import require_free_bytes
from pathlib import Path
try:
    require_free_bytes(Path('x'), 2**60)
except Exception as error:
    print(type(error).__name__)
"""

ASKS = """
import socket
for ask in (
    lambda: socket.create_connection(("127.0.0.1", 9), timeout=1),
    lambda: socket.getaddrinfo("example.com", 80),
    lambda: socket.socket().connect_ex(("198.51.100.7", 80)),
    lambda: socket.create_connection(("198.51.100.7", 80)),
    lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"", ("198.51.100.7", 80)),
):
    try:
        ask()
    except OSError as error:
        print("refused by the tests" if "tests reach" in str(error) else "nobody there")
"""


def python(script: str, seen: Path) -> str:
    seen.mkdir(exist_ok=True)
    environ = {**os.environ, "LORAKIT_TESTS_SEEN": str(seen)}
    return subprocess.run(
        [sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=True
    ).stdout


def test_an_error_of_another_process_is_noted_with_the_place_that_made_it(tmp_path: Path) -> None:
    assert python(MAKES, tmp_path / "seen") == "DiskFailed\n"
    [error] = noted(tmp_path / "seen", "errors")
    assert error["class"] == "DiskFailed"
    assert " free, need " in error["message"]
    path, line = error["places"][0]
    assert any(
        path.endswith(place.path) and place.first <= line <= place.last and "} free, need " in place.text
        for place in places()
    )


def test_a_process_reaches_this_machine_alone_and_what_else_it_asked_for_is_noted(tmp_path: Path) -> None:
    said = python(ASKS, tmp_path / "seen").splitlines()
    assert said == ["nobody there", *["refused by the tests"] * 4]
    asked = [connection["host"] for connection in noted(tmp_path / "seen", "connections")]
    assert asked == ["example.com", FOREIGN, FOREIGN, FOREIGN]


def test_this_process_is_watched_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_TESTS_SEEN", str(tmp_path))
    with pytest.raises(OSError, match="tests reach nothing"):
        socket.getaddrinfo("example.com", 80)
    assert [connection["host"] for connection in noted(tmp_path, "connections")] == ["example.com"]


def test_a_place_that_no_test_reaches_is_a_problem(tmp_path: Path) -> None:
    everywhere = places()
    (tmp_path / "errors").write_text("")
    assert len(list(problems(tmp_path))) == len(everywhere)
    first, *rest = everywhere
    facts = {"class": "X", "message": "found a, need b", "hint": "do c", "test": "t"}
    (tmp_path / "errors").write_text(
        "".join(
            json.dumps({**facts, "places": [[str(shown_errors.ROOT / p.path), p.last]]}) + "\n"
            for p in rest
            if not (p.path == first.path and p.first <= first.last)
        )
    )
    assert f"no test shows the error of {first}" in list(problems(tmp_path))


def test_an_error_without_a_hint_is_a_problem(tmp_path: Path) -> None:
    at = [[str(shown_errors.ROOT / places()[0].path), places()[0].first]]
    facts = {"class": "X", "message": "bad", "hint": "", "test": "t", "places": at}
    (tmp_path / "errors").write_text(json.dumps(facts) + "\n")
    assert any(line.startswith("'bad' of t") for line in problems(tmp_path))
    assert not is_whole("found a, need b", " ")
    assert not is_whole("something failed", "do c")


def test_places_of_every_class_are_found() -> None:
    found = places()
    assert len(found) > 250
    assert {name for name in CLASSES if any(place.text.startswith(name) for place in found)} >= CLASSES - {
        "LorakitError"
    }


def judged(monkeypatch: pytest.MonkeyPatch, seen: Path, **asked: object) -> tuple[int, list[str]]:
    """The exit status of a green session whose processes noted this, and what is told at its end."""
    monkeypatch.setenv("LORAKIT_TESTS_SEEN", str(seen))
    monkeypatch.setattr(conftest, "_SEEN", {})
    monkeypatch.setattr(conftest, "_PROBLEMS", told := [])
    source = asked.pop("args_source", pytest.Config.ArgsSource.TESTPATHS)
    config = SimpleNamespace(args_source=source, option=SimpleNamespace(**{"markexpr": "not slow", **asked}))
    session: Any = SimpleNamespace(config=config, exitstatus=pytest.ExitCode.OK)
    conftest.pytest_sessionfinish(session)
    return int(session.exitstatus), told


def test_the_whole_suite_fails_where_one_place_is_reached_by_no_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"class": "X", "message": "found a, need b", "hint": "do c", "test": "t"}
    lines = [
        json.dumps({**facts, "places": [[str(shown_errors.ROOT / place.path), place.first]]}) + "\n"
        for place in places()
    ]
    (tmp_path / "errors").write_text("".join(lines))
    assert judged(monkeypatch, tmp_path) == (0, [])
    last = places()[-1]
    (tmp_path / "errors").write_text("".join(line for line in lines if line != lines[-1]))
    assert judged(monkeypatch, tmp_path) == (1, [f"no test shows the error of {last}"])


@pytest.mark.parametrize(
    "asked",
    [
        {"args_source": pytest.Config.ArgsSource.ARGS},
        {"keyword": "x"},
        {"markexpr": "slow"},
        {"deselect": ["tests/test_tree.py"]},
    ],
)
def test_a_part_of_the_suite_is_not_judged(
    asked: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert judged(monkeypatch, tmp_path, **asked) == (0, [])
