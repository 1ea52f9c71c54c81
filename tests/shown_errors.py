"""Every place in lorakit that makes an error, and which of them the suite has reached.

`tests/guard` notes each error that any process of the suite makes, with the lines that made it. After the whole suite
(`pytest` alone) `tests/conftest.py` asks here which places were reached by no test, and whether each error says what
lorakit's errors say: something found, something needed, a hint. What is wrong fails the suite.
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.core import errors

ROOT = Path(__file__).parents[1]
CLASSES = {
    name for name, found in vars(errors).items() if isinstance(found, type) and issubclass(found, errors.LorakitError)
}
MAKERS = CLASSES | {"disk_failed"}


class Place(NamedTuple):
    """A call that makes an error: `Busy(…)`, `Stopped.early(…)`, `disk_failed(…)`."""

    path: str
    first: int
    last: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.first}: {self.text[:140]}"


def places(root: Path = ROOT) -> list[Place]:
    """All of them, in the files of the package."""
    return [
        Place(str(path.relative_to(root)), node.lineno, node.end_lineno or node.lineno, ast.unparse(node))
        for path in sorted((root / "lorakit").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and _name(node.func) in MAKERS
    ]


def _name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        function = function.value
    return function.id if isinstance(function, ast.Name) else ""


def noted(folder: Path, name: str) -> list[dict[str, Any]]:
    """What the processes of the suite have noted."""
    file = folder / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def problems(folder: Path) -> Iterator[str]:
    """What is wrong after the whole suite, a line each."""
    made = noted(folder, "errors")
    there = places()
    known = {(str(ROOT / place.path), line) for place in there for line in range(place.first, place.last + 1)}
    reached = {(path, line) for error in made for path, line in error["places"]}
    for place in there:
        lines = {(str(ROOT / place.path), line) for line in range(place.first, place.last + 1)}
        if not lines & reached:
            yield f"no test shows the error of {place}"
    lacking = {
        f"{error['message']!r} of {error['test']} has no found … need, or no hint"
        for error in made
        if error["places"] and tuple(error["places"][0]) in known  # else a test made it
        if not is_whole(error["message"], error["hint"])
    }
    yield from sorted(lacking)
    for connection in noted(folder, "connections"):
        yield f"{connection['test']} asked for {connection['host']}:\n{''.join(connection['stack'][-20:])}"


def is_whole(message: str, hint: str) -> bool:
    """Whether an error says what it found and what to do; what libraries and other ranks say is in their words."""
    return bool(hint.strip()) and ("found " in message or "stopped " in message or message.startswith("rank "))
