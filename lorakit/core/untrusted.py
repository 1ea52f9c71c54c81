"""What strangers wrote: JSON read strictly, patterns and templates run within bounds of time and memory.

Hub repositories, adapters, datasets and folders that someone sent are untrusted; the command line, the environment and
installed packages are not. Nothing here needs torch.
"""

import contextlib
import errno
import gc
import json
import math
import os
import re
import signal
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import yaml

from lorakit.core.errors import InputRefused, disk_failed

if sys.platform != "win32":
    import resource

MAX_DEPTH = 64
"""Of JSON: lists and objects inside one another."""
MAX_SETTINGS_BYTES = 4 * 2**20
"""Of a file of settings: config.json, adapter_config.json, a plan, lorakit.yaml."""
HARD = 3
"""Times of the CPU time that something may take until the process is ended."""

_YAML_SECONDS = 10.0


class TakesTooLong(Exception):
    """More CPU time than what a stranger wrote may take."""


def parse_json(raw: bytes) -> Any:
    """The value in strict JSON (RFC 8259): UTF-8, each key once, finite numbers, nested MAX_DEPTH deep at most.

    Raises UnicodeDecodeError, json.JSONDecodeError, and ValueError with the reason for what else is wrong.
    """
    text = raw.decode("utf-8-sig")
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite, parse_int=_int
        )
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _is_too_deep(value):
        raise ValueError(_TOO_DEEP)
    return value


class NotAFile(ValueError):
    """What a path is instead of a file: a folder, or no file at all."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file to be read, and only a file: a pipe would wait for whoever writes, a device might never end.

    Raises NotAFile, OSError.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise NotAFile("no file") from None
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise NotAFile("a folder" if stat.S_ISDIR(mode) else "no file")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def read_small(path: Path, max_bytes: int, hint: str) -> bytes:
    """The bytes of a file that should be small. Raises InputRefused (none, no file, too large), DiskFailed."""
    try:
        with opened(path) as file:
            raw = file.read(max_bytes + 1)
    except NotAFile as found:
        raise InputRefused(f"{path}: found {found}, need a file", hint) from None
    except FileNotFoundError:
        raise InputRefused(f"{path.parent}: found no {path.name}, need one", hint) from None
    except OSError as error:
        raise disk_failed(error, path) from error
    if len(raw) > max_bytes:
        raise InputRefused(f"{path}: found over {max_bytes / 2**20:g} MiB, need less", hint)
    return raw


def read_json_object(path: Path, hint: str, max_bytes: int = MAX_SETTINGS_BYTES) -> dict[str, Any]:
    """The JSON object in `path`. Raises InputRefused, DiskFailed."""
    raw = read_small(path, max_bytes, hint or "check the path")
    try:
        content = parse_json(raw)
    except ValueError as error:
        raise InputRefused(f"{path}: found {error}, need JSON", hint or "restore the file") from None
    if not isinstance(content, dict):
        raise InputRefused(f"{path}: found {type(content).__name__}, need a JSON object", hint or "restore the file")
    return content


def parse_yaml(raw: bytes, *, version_1_1: bool = False) -> Any:
    """The value in YAML's safe subset: UTF-8, each key once, no aliases, which a few lines make gigabytes of.

    Of what isn't in quotes, true and false, null, decimal numbers and numbers with a point are such; all else is text:
    1:30, 010 and yes too, which are 90, 8 and true in YAML 1.1.

    Raises ValueError with the reason, and the line where there is one.
    """
    try:
        with bounded(_YAML_SECONDS):
            return yaml.load(raw.decode("utf-8-sig"), Loader=_Yaml if version_1_1 else _PlainYaml)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"what isn't UTF-8 in line {line}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(f"{error.problem or error.context}".split())
        raise ValueError(f"{what} in line {mark.line + 1}" if mark is not None else what) from None
    except yaml.reader.ReaderError as error:
        line = raw.decode("utf-8-sig")[: error.position].count("\n") + 1
        raise ValueError(f"the character U+{error.character:04X} in line {line}") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:  # a date like 2020-13-45, a key as a list
        raise ValueError(" ".join(str(error).split())) from None
    except (RecursionError, TakesTooLong):
        raise ValueError("nesting too deep, or too much of it") from None


@contextlib.contextmanager
def bounded(cpu_seconds: float, more_bytes: int | None = None) -> Iterator[None]:
    """What runs inside may take so much CPU time, and so much memory on top of what the process has.

    Raises TakesTooLong and MemoryError. Python looks for the end of the time between its own instructions, and its
    regular expressions do while they match; where one instruction goes on for HARD times that time, the kernel ends the
    process by SIGPROF. In threads but the first there is no bound of time, for signals go to that one; outside of Linux
    there is none of memory.
    """
    timed = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    before = _limit_memory(more_bytes) if more_bytes is not None else None
    handler = signal.signal(signal.SIGVTALRM, _overrun) if timed else None
    try:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, cpu_seconds, cpu_seconds)  # again, where a library swallows one
            signal.setitimer(signal.ITIMER_PROF, HARD * cpu_seconds)
        yield
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, handler if handler is not None else signal.SIG_DFL)
        if before is not None:
            resource.setrlimit(resource.RLIMIT_AS, before)


def keeps_bounds(work: Callable[[], object]) -> bool:
    """Whether `work`, which has bounds itself, keeps them: tried in a forked process, which the kernel may end.

    Nothing of what it does is seen here. It may take no lock, for another thread may have held that one. Where no
    process can be made, the kernel may have to end this one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that there are other threads
        try:
            child = os.fork()
        except OSError:
            return True
    if child == 0:
        gc.disable()  # what this process has is the other's to finish
        status = 0
        try:
            os.closerange(0, os.sysconf("SC_OPEN_MAX"))  # pipes would stay open where the other one is ended first
            work()
        except (TakesTooLong, MemoryError):
            status = 1
        except Exception:  # which is seen again where it isn't tried only
            pass
        finally:
            os._exit(status)
    try:
        # by another signal it ends where forking does, as in Objective-C's libraries: that says nothing of the work
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code not in (1, -signal.SIGPROF, -signal.SIGKILL)
    except ChildProcessError:
        return True  # ended, and nobody is told how where SIGCHLD is ignored
    except BaseException:  # Ctrl-C, which one instruction doesn't hear
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise


class _Yaml(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "an alias", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for at, key in [(key.start_mark, self.construct_object(key)) for key, _ in node.value]:
            if repr(key) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} twice", at)
            seen.add(repr(key))
        return super().construct_mapping(node, deep)


def _whole(read: Callable[[Any, Any], int]) -> Callable[[Any, Any], int]:
    def construct(loader: Any, node: Any) -> int:
        try:
            return read(loader, node)
        except ValueError:  # of a tag on what is none, and of thousands of digits
            raise yaml.constructor.ConstructorError(
                None, None, "what can't be read as a whole number", node.start_mark
            ) from None

    return construct


_Yaml.add_constructor("tag:yaml.org,2002:int", _whole(yaml.SafeLoader.construct_yaml_int))


class _PlainYaml(_Yaml):
    """Each of these is the same in YAML 1.1, so that what PyYAML writes without quotes comes back as it was."""


_PlainYaml.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9]{0,99})", "-+0123456789"),  # what is longer is no number that a setting takes
    ("float", r"(?:[-+]?[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+][0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
):
    _PlainYaml.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list(_first))
_PlainYaml.add_constructor("tag:yaml.org,2002:int", _whole(lambda _, node: int(node.value)))  # decimal also if tagged


_TOO_DEEP = f"nesting too deep, over {MAX_DEPTH}"
_PAGES = Path("/proc/self/statm")


def _overrun(number: int, frame: FrameType | None) -> None:
    raise TakesTooLong


def _limit_memory(more_bytes: int) -> tuple[int, int] | None:
    """Lower this process's limit of memory; returns the limits before, None where there is nothing to lower."""
    if not _PAGES.exists():
        return None
    before = resource.getrlimit(resource.RLIMIT_AS)
    wanted = int(_PAGES.read_text().split()[0]) * resource.getpagesize() + more_bytes
    if before[0] != resource.RLIM_INFINITY and before[0] <= wanted:
        return None
    resource.setrlimit(resource.RLIMIT_AS, (wanted, before[1]))
    return before


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key twice")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name}, which JSON doesn't have")


def _int(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # more than Python reads, and than it prints
        raise ValueError(f"a whole number of over {sys.get_int_max_str_digits():,} digits") from None


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]}, which no number type holds")
    return number


def _is_too_deep(value: Any) -> bool:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            return True
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each if isinstance(each, list) else ())
            if isinstance(inner, dict | list)
        ]
    return False
