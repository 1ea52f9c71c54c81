"""The few ways in which lorakit touches a disk: written and fsynced, locked, appended, counted.

With artifacts.py, which renames and removes, the only place with mutating system calls on an output. Functions that say
so raise OSError for their caller to explain; the rest raise DiskFailed themselves.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.core.errors import Busy, DiskFailed, Mismatch, disk_failed, shown_bytes

MANIFEST = "lorakit.json"
"""The file that makes a folder an artifact, see artifacts.py."""


@dataclass(frozen=True)
class FileRange:
    """The bytes [start, end) of another file."""

    path: Path
    start: int
    end: int


Piece = bytes | memoryview | FileRange
Content = bytes | Iterable[Piece]
"""A file's bytes, at once or in pieces."""

Stamp = tuple[int, int, int, int]
"""A file's device and number, its size, and when it was written to, in nanoseconds."""

_PIECE_BYTES = 16 * 2**20
_READ_BYTES = 2**20
_COPIED_BYTES = 64 * 2**20  # by the kernel at a time; what is read for the hash comes from its cache then
_BLOCK_BYTES = 4096
_CANT_COPY = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}
_SECONDS_BETWEEN_TRIES = 0.1


def sha256(path: Path) -> str:
    """The hash of a file's bytes, in hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def described(path: Path) -> dict[str, Any]:
    """Size and hash of a file, as a manifest lists it. Raises OSError."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def stamp(path: Path) -> Stamp | None:
    """What differs once a file was written to or replaced; None where there is none. Raises DiskFailed."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise disk_failed(error, path) from error
    return there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns


def require_unchanged(stamps: Mapping[Path, Stamp | None]) -> None:
    """Raises Mismatch where a file isn't the one any more that had this stamp: what was read of it may be of two."""
    for path, before in stamps.items():
        if stamp(path) != before:
            raise Mismatch(
                f"{path}: found that it was changed while it was read, need the same bytes from beginning to end",
                "run the same command again once nothing writes to it; nothing was put in place",
            )


def write_new(path: Path, content: Content) -> dict[str, Any]:
    """Write a new file and fsync it; returns size and sha256 of the bytes that were handed over. Raises OSError."""
    digest, size_bytes, begun = hashlib.sha256(), 0, 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for piece in (content,) if isinstance(content, bytes) else content:
            if isinstance(piece, FileRange):
                _copy(piece, descriptor, digest)
                size_bytes += piece.end - piece.start
            else:
                write_all(descriptor, piece)
                digest.update(piece)
                size_bytes += len(piece)
            if size_bytes - begun >= _COPIED_BYTES:
                _begin_writing(descriptor, begun, size_bytes)
                begun = size_bytes
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": size_bytes, "sha256": digest.hexdigest()}


def _begin_writing(descriptor: int, start: int, end: int) -> None:
    """Have the kernel begin to write a part of a file to the disk, so that less is left for fsync: that is what Linux
    does where it is told that these pages aren't needed any more."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)


def _copy(source: FileRange, descriptor: int, digest: "hashlib._Hash") -> None:
    """Append a part of another file: copied by the kernel where it can, which shares the disk's blocks where the file
    system can; and read for the hash. Raises OSError."""
    buffer = memoryview(bytearray(min(_READ_BYTES, source.end - source.start)))
    with source.path.open("rb", buffering=0) as file:
        at = copied = source.start
        while at < source.end:
            if copied == at:
                copied = _copied_by_kernel(file.fileno(), descriptor, at, source.end)
            wanted = min(len(buffer), (copied if copied > at else source.end) - at)
            read = file.readinto(buffer[:wanted]) if file.seek(at) == at else 0
            if not read:
                raise OSError(errno.EIO, f"the file ends before byte {source.end}", str(source.path))
            if copied == at:
                write_all(descriptor, buffer[:read])
                copied += read
            digest.update(buffer[:read])
            at += read


def _copied_by_kernel(source: int, descriptor: int, start: int, end: int) -> int:
    """How far the kernel copied from `start`: not at all where it can't. Raises OSError."""
    if not hasattr(os, "copy_file_range"):
        return start
    to_block = _BLOCK_BYTES - start % _BLOCK_BYTES  # only whole blocks can be shared
    wanted = min(end - start, _COPIED_BYTES if to_block == _BLOCK_BYTES else to_block)
    try:
        return start + os.copy_file_range(source, descriptor, wanted, offset_src=start)
    except OSError as error:
        if error.errno in _CANT_COPY:
            return start
        raise


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """Write all of `content`, however little a call takes. Raises OSError."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view[:_PIECE_BYTES]) :]


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: Content) -> None:
    """Replace one file, whole or not at all. Raises DiskFailed."""
    stage = path.with_name(f".stage-{path.name}-{uuid.uuid4().hex}")
    try:
        try:
            write_new(stage, content)
            os.rename(stage, path)
            fsync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(stage)
            raise
    except OSError as error:
        raise disk_failed(error, path) from error


def make_folder(path: Path) -> None:
    """Make a folder and its parents, their names durable: with them what is inside would be lost. Raises DiskFailed."""
    try:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            fsync_folder(folder.parent)
    except OSError as error:
        raise disk_failed(error, path) from error


@contextlib.contextmanager
def held(path: Path, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock file `path` for one process. Where another one does: raises Busy, or tells `on_wait` why and waits
    for it. Raises DiskFailed."""
    while True:
        try:
            descriptor = _locked(path)
            try:
                owned = None if keeps_out(path) else _owned(path)
            except BaseException:
                os.close(descriptor)
                raise
            break
        except OSError as error:
            raise disk_failed(error, path) from error
        except Busy as error:
            if on_wait is None:
                raise
            on_wait(error.message)
            time.sleep(_SECONDS_BETWEEN_TRIES)
    try:
        try:
            os.ftruncate(descriptor, 0)
            write_all(descriptor, json.dumps(_process()).encode())
        except OSError as error:
            raise disk_failed(error, path) from error
        yield
    finally:
        for file in (owned, path):
            if file is not None:
                with contextlib.suppress(OSError):
                    os.unlink(file)
        os.close(descriptor)


def _locked(path: Path) -> int:
    """The descriptor of the lock file, locked; it is the file that `path` still names (its last owner unlinks it)."""
    while True:
        descriptor = _opened_lock(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 4096).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise _busy(path, holder) from None
        except OSError:
            os.close(descriptor)
            raise
        try:
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _opened_lock(path: Path) -> int:
    """The descriptor of the lock file, made where there is none; never of what a link leads to, for it is written to.
    Raises DiskFailed, OSError."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:
            return descriptor
        os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
    raise DiskFailed(f"{path}: found a link, or no file, need lorakit's own lock file or none", "remove it")


def _process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname()}


def _busy(path: Path, holder: str) -> Busy:
    with contextlib.suppress(ValueError, TypeError, KeyError):  # another text is shown as it is
        process = json.loads(holder)
        holder = f"process {process['pid']} on {process['host']}"
    return Busy(
        f"{path}: found the output held by {holder}, need it free", "wait for that process, or choose another --output"
    )


def keeps_out(path: Path) -> bool:
    """Whether the lock file is held and that keeps a second one out: some network disks grant every one. Raises
    OSError."""
    try:
        second = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False  # nobody holds it, or its last owner unlinked it, whom no lock kept apart
    try:
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(second)


def _owned(path: Path) -> Path | None:
    """A file that only one process can make, for where locks keep nobody out; it names its owner, so that a dead one's
    can be taken. None where the disk can't do that either. Raises Busy, OSError."""
    token = uuid.uuid4().hex
    owner, mine = (path.with_name(f".{path.name.strip('.')}.{name}.lock") for name in ("owner", token))
    write_new(mine, json.dumps({**_process(), "token": token}).encode())
    try:
        while True:
            try:
                os.link(mine, owner)
                return owner
            except FileExistsError:
                pass
            except OSError:
                return None
            try:
                found = json.loads(owner.read_bytes())
            except FileNotFoundError:
                continue
            if not _is_dead(found):
                raise _busy(owner, json.dumps(found))
            heir = path.with_name(f".{path.name.strip('.')}.{found['token']}.lock")
            try:
                os.link(mine, heir)  # one heir at a time
            except FileExistsError:
                raise _busy(heir, "another process that takes over") from None
            if owner.exists() and json.loads(owner.read_bytes()) == found:
                os.rename(heir, owner)
                return owner
            os.unlink(heir)
    finally:
        os.unlink(mine)


def _is_dead(process: dict[str, Any]) -> bool:
    """Whether a process of this machine has ended; nobody knows that of another machine's."""
    if process["host"] != socket.gethostname():
        return False
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def require_free_bytes(target: Path, needed_bytes: int) -> None:
    """Raises DiskFailed before anything is written where `needed_bytes` can't fit beside `target`."""
    folder = next(parent for parent in (target, *target.parents) if parent.is_dir())
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DiskFailed(
            f"{target}: found {shown_bytes(free_bytes)} free, need {shown_bytes(needed_bytes)} "
            f"({needed_bytes:,} bytes)",
            "free some space, or choose another folder with --output",
        )


class AppendedFile:
    """A file of lines that grows during a run; each line is one write, so that a kill can tear only the last one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            is_new = not path.exists()
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            if is_new:
                fsync_folder(path.parent)  # else a power loss takes its name, and with it the lines that were synced
        except OSError as error:
            raise disk_failed(error, path) from error

    def append(self, line: str) -> None:
        self._call(write_all, line.encode() + b"\n")

    def sync(self) -> None:
        """On disk when it returns."""
        self._call(os.fsync)

    def close(self) -> None:
        os.close(self._descriptor)

    def _call(self, function: Callable[..., None], *arguments: bytes) -> None:
        try:
            function(self._descriptor, *arguments)
        except OSError as error:
            raise disk_failed(error, self.path) from error
