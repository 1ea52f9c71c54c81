"""What every Python process of the tests begins with, theirs and those that they start: no network beyond this machine,
and a line in a file for each connection that was tried and each error of lorakit's that was made.

Python imports a module of this name at its start where it finds one; `tests/conftest.py` puts this folder in its way.
"""

import contextlib
import importlib.abc
import importlib.util
import ipaddress
import json
import os
import socket
import sys
import traceback
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

SEEN = "LORAKIT_TESTS_SEEN"
"""The variable that names a folder for what was seen: `connections` and `errors`, an object a line."""
_PACKAGE = f"{os.sep}lorakit{os.sep}"
_open, _write, _close = os.open, os.write, os.close  # tests put others in their place


def _note(name: str, facts: dict[str, Any]) -> None:
    facts = {**facts, "test": os.environ.get("PYTEST_CURRENT_TEST", "")}
    folder = os.environ.get(SEEN)
    if folder is None:
        return
    with contextlib.suppress(OSError):  # a test may have limited the size of files
        file = _open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            _write(file, (json.dumps(facts) + "\n").encode())
        finally:
            _close(file)


def is_near(host: object) -> bool:
    """Whether a host is this machine."""
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost", "::1", "0.0.0.0", "::") or name == socket.gethostname():
        return True
    return isinstance(name, str) and name.removeprefix("::ffff:").startswith("127.")


def _asks_nobody(host: object) -> bool:
    """Whether looking a host up is no question to anyone: it is a number."""
    try:
        ipaddress.ip_address(host.decode() if isinstance(host, bytes) else str(host))
    except ValueError:
        return False
    return True


def _no_network(event: str, arguments: tuple[Any, ...]) -> None:
    if not event.startswith("socket."):
        return
    if event == "socket.connect" and arguments[0].type & socket.SOCK_DGRAM:  # it sends nothing, and finds an interface
        return
    if event in ("socket.connect", "socket.sendto"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None  # a socket of the file system has a path
    elif event in ("socket.getaddrinfo", "socket.gethostbyname") and not _asks_nobody(arguments[0]):
        host = arguments[0]
    else:
        return
    if is_near(host):
        return
    if not str(host).startswith("192.0.2.") and not str(host).endswith(".invalid"):  # nobody's (RFC 5737, RFC 6761)
        _note("connections", {"host": str(host), "stack": traceback.format_stack()})
    raise OSError(101, f"tests reach nothing beyond this machine: {event} {host}")


def _noted(made: Any) -> Any:
    """The constructor of lorakit's errors, which notes what was said and each place of lorakit on the way to it."""

    def make(error: Any, message: str, hint: str) -> None:
        made(error, message, hint)
        frame, places = sys._getframe(1), []
        while frame is not None and len(places) < 6:
            if _PACKAGE in frame.f_code.co_filename:
                places.append([frame.f_code.co_filename, frame.f_lineno])
            frame = frame.f_back  # type: ignore[assignment]
        facts = {"class": type(error).__name__, "message": message, "hint": hint, "places": places}
        _note("errors", facts)

    return make


class _Errors(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `lorakit.core.errors` as others do, and changes it once it is loaded; nothing is imported early."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "lorakit.core.errors":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            module.LorakitError.__init__ = _noted(module.LorakitError.__init__)

        spec.loader.exec_module = load_and_change  # type: ignore[method-assign]
        return spec


def watch() -> None:
    """Guard this process."""
    sys.addaudithook(_no_network)
    sys.meta_path.insert(0, _Errors())


if SEEN in os.environ:
    os.environ["PYTHONPATH"] = os.pathsep.join(
        dict.fromkeys([str(Path(__file__).parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    )
    sys.path.append(str(Path(__file__).parent))  # tests hand on what they find there
    watch()
