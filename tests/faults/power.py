"""Power loss, simulated: a command's operations on the disk are logged, and every state that a crash may leave is made.

A kill keeps the page cache and so proves nothing about fsync. Here a write counts as safe only once its file was
fsynced, a name (made, renamed, removed) only once its folder was; in front of each operation the machine loses power,
and what isn't safe by then is there or not: nothing of it, all of it, one of it alone, all but one, halves at random.
Simulated are files and names as POSIX promises them, which is less than ext4 keeps.
"""

import os
import random
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from lorakit.core import artifacts
from lorakit.core.errors import LorakitError
from tests.faults import loop
from tests.faults.server import command, said_by
from tests.faults.tally import Tally

_RANDOM_STATES = 4  # of each prefix, beside those that are listed


@dataclass(eq=False)
class Node:
    """A file's bytes, or a folder's names."""

    names: dict[str, "Node"] | None = None
    content: bytearray = field(default_factory=bytearray)

    @classmethod
    def of(cls, path: Path) -> "Node":
        if path.is_dir():
            return cls({each.name: cls.of(each) for each in path.iterdir()})
        return cls(None, bytearray(path.read_bytes()))

    def copied(self, known: dict[int, "Node"]) -> "Node":
        names = {name: node.copied(known) for name, node in self.names.items()} if self.names is not None else None
        known[id(self)] = node = Node(names, bytearray(self.content))
        return node

    def write_to(self, path: Path) -> None:
        if self.names is None:
            path.write_bytes(self.content)
            return
        path.mkdir(exist_ok=True)
        for name, node in self.names.items():
            node.write_to(path / name)

    def state(self) -> Any:
        """Equal for equal trees."""
        if self.names is None:
            return bytes(self.content)
        return tuple(sorted((name, node.state()) for name, node in self.names.items()))


@dataclass(frozen=True, eq=False)
class Operation:
    """`what` happened to `node`; `into` (and `out_of`) are the folders whose names changed."""

    what: Literal["write", "truncate", "fsync", "name", "remove", "rename", "committed", "removed"]
    node: Node
    into: Node | None = None
    name: str = ""
    out_of: Node | None = None
    old_name: str = ""
    at: int = 0
    data: bytes = b""

    def is_safe_after(self, synced: Collection[int]) -> bool:
        """Whether one of the later fsyncs, by the node's identity, covers it."""
        return id(self.into if self.into is not None else self.node) in synced


class Log:
    """The operations below `root` while a command runs, seen where Python calls the operating system."""

    def __init__(self, root: Path, lost: str | None = None) -> None:
        self.root, self.before = root.resolve(), Node.of(root)
        self.operations: list[Operation] = []
        self.num_calls = 0
        self._lost = lost
        self._now = self.before.copied({})
        self._begin = self._now.copied({})
        self._open: dict[int, tuple[Node, bool]] = {}
        known: dict[int, Node] = {}
        self.before = self._now.copied(known)
        self._origin = {id(node): known[key] for key, node in self._walk(self._now)}

    def _walk(self, node: Node) -> Iterator[tuple[int, Node]]:
        yield id(node), node
        for each in (node.names or {}).values():
            yield from self._walk(each)

    @property
    def origin(self) -> Mapping[int, Node]:
        """What a node of the log was at the beginning, for those that were there."""
        return self._origin

    def _place(self, path: Any, dir_fd: int | None = None) -> tuple[Node, str] | None:
        """The folder and the name of a path below the root."""
        whole = os.fsdecode(path)
        if dir_fd is not None:
            whole = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), whole)
        absolute = Path(os.path.abspath(whole))
        folder = absolute.parent.resolve()
        if folder != self.root and not folder.is_relative_to(self.root):
            return None
        node = self._now
        for part in folder.relative_to(self.root).parts:
            if part not in (node.names or {}):
                return None  # no such folder: the call is going to fail, and the shim doesn't count it
            node = node.names[part]  # type: ignore[index]
        return node, absolute.name

    def _at(self, path: Any) -> Node | None:
        if Path(path).resolve() == self.root:
            return self._now
        place = self._place(path)
        return (place[0].names or {}).get(place[1]) if place else None

    def _say(self, what: Any, node: Node, **more: Any) -> None:
        self.operations.append(Operation(what, node, **more))

    @contextmanager
    def watching(self) -> Iterator[None]:
        real = {name: getattr(os, name) for name in ("open", "close", "write", "fsync", "ftruncate", "copy_file_range")}
        real |= {name: getattr(os, name) for name in ("rename", "mkdir", "unlink", "rmdir")}
        commit, remove = artifacts.commit, artifacts.remove

        def open_(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            writes = flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR)
            place = self._place(path, dir_fd) if writes else None
            self.num_calls += place is not None
            descriptor = real["open"](path, flags, mode, dir_fd=dir_fd)
            if place:
                folder, name = place
                if name not in folder.names:  # type: ignore[operator]
                    folder.names[name] = Node()  # type: ignore[index]
                    self._say("name", folder.names[name], into=folder, name=name)  # type: ignore[index]
                self._open[descriptor] = folder.names[name], bool(flags & os.O_APPEND)  # type: ignore[index]
            elif flags & os.O_DIRECTORY and dir_fd is None and (node := self._at(path)) is not None:
                self._open[descriptor] = node, False
            return int(descriptor)

        def close(descriptor: int) -> None:
            self._open.pop(descriptor, None)
            real["close"](descriptor)

        def write(descriptor: int, data: Any) -> int:
            found = self._open.get(descriptor)
            self.num_calls += found is not None
            at = (
                os.lseek(descriptor, 0, os.SEEK_CUR)
                if found and not found[1]
                else len(found[0].content)
                if found
                else 0
            )
            size = real["write"](descriptor, data)
            if found:
                self._written(found[0], at, bytes(data[:size]))
            return int(size)

        def copy_file_range(source: int, target: int, count: int, offset_src: int | None = None) -> int:
            found = self._open.get(target)
            self.num_calls += found is not None
            at = os.lseek(target, 0, os.SEEK_CUR)
            size = real["copy_file_range"](source, target, count, offset_src)
            if found:
                self._written(found[0], at, os.pread(source, size, offset_src or 0))
            return int(size)

        def ftruncate(descriptor: int, size: int) -> None:
            real["ftruncate"](descriptor, size)
            if found := self._open.get(descriptor):
                self.num_calls += 1
                del found[0].content[size:]
                self._say("truncate", found[0], at=size)

        def fsync(descriptor: int) -> None:
            found = self._open.get(descriptor)
            self.num_calls += found is not None
            real["fsync"](descriptor)
            if found and self._lost != ("folders" if found[0].names is not None else "files"):
                self._say("fsync", found[0])

        def mkdir(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
            place = self._place(path, dir_fd)
            self.num_calls += place is not None or Path(path) == self.root
            real["mkdir"](path, mode, dir_fd=dir_fd)
            if place:
                place[0].names[place[1]] = Node({})  # type: ignore[index]
                self._say("name", place[0].names[place[1]], into=place[0], name=place[1])  # type: ignore[index]

        def gone(call: str) -> Callable[..., None]:
            def remove(path: Any, *, dir_fd: int | None = None) -> None:
                place = self._place(path, dir_fd)
                self.num_calls += place is not None
                real[call](path, dir_fd=dir_fd)
                if place:
                    self._say("remove", place[0].names.pop(place[1]), into=place[0], name=place[1])  # type: ignore[union-attr]

            return remove

        def rename(source: Any, target: Any, **rest: Any) -> None:
            one, other = self._place(source), self._place(target)
            self.num_calls += one is not None or other is not None
            real["rename"](source, target, **rest)
            if one and other:
                node = one[0].names.pop(one[1])  # type: ignore[union-attr]
                other[0].names[other[1]] = node  # type: ignore[index]
                self._say("rename", node, into=other[0], name=other[1], out_of=one[0], old_name=one[1])

        def committed(target: Path, *arguments: Any, **more: Any) -> Any:
            artifact = commit(target, *arguments, **more)
            if (node := self._at(target)) is not None:
                self._say("committed", node, name=str(target.resolve().relative_to(self.root)))
            return artifact

        def removed(folder: Path) -> None:
            if (node := self._at(folder)) is not None:
                self._say("removed", node, name=str(folder.resolve().relative_to(self.root)))
            remove(folder)

        seen = {"open": open_, "close": close, "write": write, "copy_file_range": copy_file_range}
        seen |= {"ftruncate": ftruncate, "fsync": fsync, "mkdir": mkdir, "rename": rename}
        seen |= {"unlink": gone("unlink"), "rmdir": gone("rmdir")}
        with (
            mock.patch.multiple(os, **seen),
            mock.patch.object(artifacts, "commit", committed),
            mock.patch.object(artifacts, "remove", removed),
        ):
            yield

    def _written(self, node: Node, at: int, data: bytes) -> None:
        node.content[at : at + len(data)] = data
        self._say("write", node, at=at, data=data)


def crashed(log: Log, upto: int, kept: Callable[[Operation], bool]) -> Node | None:
    """What is on the disk where power goes before operation `upto`; None for what no file system could leave."""
    known: dict[int, Node] = {}
    root = log.before.copied(known)
    nodes: dict[int, Node] = {key: known[id(node)] for key, node in log.origin.items()}

    def now(node: Node) -> Node:
        if id(node) not in nodes:
            nodes[id(node)] = Node({} if node.names is not None else None)
        return nodes[id(node)]

    synced: list[set[int]] = [set()]
    for operation in reversed(log.operations[:upto]):
        synced.append(synced[-1] | {id(operation.node)} if operation.what == "fsync" else synced[-1])
    for operation, later in zip(log.operations[:upto], synced[-2::-1] if upto else [], strict=True):
        if operation.what in ("fsync", "committed", "removed"):
            continue
        if not operation.is_safe_after(later) and not kept(operation):
            continue
        node = now(operation.node)
        if operation.what == "write":
            node.content.extend(b"\0" * (operation.at - len(node.content)))
            node.content[operation.at : operation.at + len(operation.data)] = operation.data
        elif operation.what == "truncate":
            del node.content[operation.at :]
        else:
            folder = now(operation.into).names  # type: ignore[arg-type]
            assert folder is not None
            if operation.what == "remove":
                if folder.get(operation.name) is node:
                    if node.names:
                        return None  # a folder that isn't empty
                    del folder[operation.name]
                continue
            if operation.what == "rename":
                source = now(operation.out_of).names  # type: ignore[arg-type]
                assert source is not None
                there = folder.get(operation.name)
                if there is not None and there is not node and there.names:
                    return None
                if source.get(operation.old_name) is node:
                    del source[operation.old_name]
            folder[operation.name] = node
    return root


def states(log: Log, upto: int, chance: random.Random) -> Iterator[Node]:
    """The states that are looked at of one moment, each once."""
    synced: set[int] = set()
    loose: list[Operation] = []
    for operation in reversed(log.operations[:upto]):
        if operation.what == "fsync":
            synced.add(id(operation.node))
        elif operation.what not in ("committed", "removed") and not operation.is_safe_after(synced):
            loose.append(operation)
    choices: list[Collection[Operation]] = [(), loose]
    choices += [[operation] for operation in loose[:6]]
    choices += [[operation for operation in loose if operation is not lost] for lost in loose[:6]]
    choices += [[operation for operation in loose if chance.random() < 0.5] for _ in range(_RANDOM_STATES)]
    seen = set()
    for choice in choices:
        chosen = set(map(id, choice))
        state = crashed(log, upto, lambda operation, chosen=chosen: id(operation) in chosen)  # type: ignore[misc]
        if state is not None and (key := state.state()) not in seen:
            seen.add(key)
            yield state


def promised(log: Log, upto: int) -> set[str]:
    """Artifacts that a command had reported as made by then, and not begun to remove."""
    there: set[str] = set()
    for operation in log.operations[:upto]:
        if operation.what == "committed":
            there.add(operation.name)
        elif operation.what == "removed":
            there.discard(operation.name)
    for operation in log.operations[:upto]:  # as --overwrite does: another name for the whole
        if operation.what == "rename":
            there = {
                name for name in there if name != operation.old_name and not name.startswith(f"{operation.old_name}/")
            }
    return there


def problems_of(case: loop.Case, box: Path, reference: loop.Reference, there: Collection[str]) -> Iterator[str]:
    """What is wrong with a state before anyone repairs it."""
    kind = loop.KINDS[case.command]
    for folder in [path.parent for path in box.rglob(artifacts.MANIFEST)]:
        parts = folder.relative_to(box).parts
        if any(part.startswith((".stage-", ".trash-")) for part in parts):
            continue
        try:
            found = loop.weights_of(folder, "checkpoint" if "checkpoints" in parts else kind)
        except LorakitError as error:
            yield error.message
            continue
        if "checkpoints" not in parts and found not in (reference.new, reference.old):
            yield f"{folder.relative_to(box)}: other bytes"
    for name in there:
        if not artifacts.is_artifact(box / name):
            yield f"{name} was reported as made and isn't there"


def replayed(case: loop.Case, every: int, recovered_every: int, lost: str | None) -> Any:
    """Log one run of a command, then look at what power losses would have left of it. In a child of its own."""
    tally, chance, recovered = Tally(), random.Random(0), 0
    reference = loop.undisturbed(case)
    with case.box() as box:
        log = Log(box, lost)
        with log.watching():
            code = command(case.arguments(case.output(box)))
        assert code == 0
        number = 0
        for upto in range(0, len(log.operations) + 1):
            if upto % every and upto != len(log.operations):
                continue
            for state in states(log, upto, chance):
                number += 1
                shutil.rmtree(box)
                state.write_to(box)
                problems = list(problems_of(case, box, reference, promised(log, upto)))
                if number % recovered_every == 0:
                    recovered += 1
                    problems += loop.problems_at_end(case, box, case.run(box), reference)
                tally.add(f"{case.command} {case.variant}, power lost before operation {upto}", problems)
    return [tally.count, tally.failures[:20], recovered, log.num_calls - reference.calls["kill"]]


def prove(work: Path, *, short: bool, jobs: int, without: str | None = None) -> Tally:
    """Of prepare, train and merge."""
    tally, runs_again = Tally(), 0
    chosen = {"prepare": ("new",), "merge": ("overwrite",)} if short or without else loop.VARIANTS
    for name, variants in chosen.items():
        for variant in variants:
            if variant in ("mount", "overwrite-again"):
                continue
            case = loop.Case(work, name, variant)
            steps = (7, 60) if short else (1 if name != "train" else 2, 40 if name != "train" else 80)
            answer = said_by(lambda case=case, steps=steps: replayed(case, *steps, without), work / "power.log", 600)  # type: ignore[misc]
            count, failures, recovered, missed = answer
            tally += Tally(count, failures)
            runs_again += recovered
            if missed:
                tally.failures.append(f"{name} {variant}: {missed} calls more or fewer than the shim saw")
    tally.note = f"{runs_again} of them run again"
    return tally
