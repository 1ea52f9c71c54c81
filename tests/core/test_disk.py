"""The disk: small writes whole or not at all, short writes finished, a full disk named as one."""

import errno
import hashlib
import json
import os
import random
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.core import disk
from lorakit.core.errors import Busy, DiskFailed, Mismatch


def test_a_call_that_takes_little_is_called_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, bytes(content)[:3]))
    described = disk.write_new(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"
    assert described == disk.described(tmp_path / "a")


def test_a_new_file_is_never_another_ones(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("theirs")
    with pytest.raises(FileExistsError):
        disk.write_new(tmp_path / "a", b"mine")
    assert (tmp_path / "a").read_text() == "theirs"


def test_a_replaced_file_is_the_old_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.write_file(tmp_path / "a", b"old")
    disk.write_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"

    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(target))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(DiskFailed, match="Input/output error"):
        disk.write_file(tmp_path / "a", b"newer")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


def test_too_little_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    disk.require_free_bytes(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(DiskFailed, match=r"GiB free, need 1048576\.00 GiB") as caught:
        disk.require_free_bytes(tmp_path / "a", 2**50)
    assert "--output" in caught.value.hint
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_named_as_one(tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk; in a child, since it can't be raised again."""
    script = f"""
import resource
from pathlib import Path
from lorakit.core import disk
from lorakit.core.errors import LorakitError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    disk.write_file(Path({str(tmp_path / "a")!r}), b"x" * 2000)
except LorakitError as error:
    print(int(error.exit_code), error.message, error.hint)
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("7 ")
    assert "free some space" in done.stdout
    assert os.listdir(tmp_path) == []


def test_appended_lines_are_there_at_once_and_in_order(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("0\n")
    file = disk.AppendedFile(tmp_path / "a")
    file.append("1")
    file.append("é")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "0\n1\né\n"
    file.sync()
    file.close()
    with pytest.raises(DiskFailed):
        file.append("2")


def test_a_folder_that_cant_be_made_is_a_disk_failure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DiskFailed, match="Not a directory"):
        disk.make_folder(tmp_path / "file" / "b")
    with pytest.raises(DiskFailed, match="Is a directory"):
        disk.AppendedFile(tmp_path)


# Parts of other files


def source_of(folder: Path, size: int) -> Path:
    path = folder / "source"
    path.write_bytes(random.Random(size).randbytes(size))
    return path


@pytest.mark.parametrize("by_kernel", [True, False], ids=["copied by the kernel", "copied by hand"])
@pytest.mark.parametrize(("start", "end"), [(0, 3_000_000), (1, 2), (7, 2_999_999), (4096, 8192), (5, 5)])
def test_a_part_of_another_file_is_copied_and_hashed(
    by_kernel: bool, start: int, end: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object, **__: object) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if not by_kernel:
        monkeypatch.setattr(os, "copy_file_range", refuses, raising=False)
    source = source_of(tmp_path, 3_000_000)
    pieces: list[disk.Piece] = [b"before", disk.FileRange(source, start, end), memoryview(b"after")]
    described = disk.write_new(tmp_path / "new", pieces)
    expected = b"before" + source.read_bytes()[start:end] + b"after"
    assert (tmp_path / "new").read_bytes() == expected
    assert described == {"bytes": len(expected), "sha256": hashlib.sha256(expected).hexdigest()}
    assert disk.described(tmp_path / "new") == described


def test_a_kernel_that_copies_little_or_stops_is_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = os.copy_file_range, [0]

    def hesitant(source: int, target: int, count: int, **given: int) -> int:
        calls[0] += 1
        return 0 if calls[0] % 3 == 0 else right(source, target, min(count, 70_001), **given)

    monkeypatch.setattr(os, "copy_file_range", hesitant)
    source = source_of(tmp_path, 3_000_000)
    described = disk.write_new(tmp_path / "new", [disk.FileRange(source, 3, 2_999_990)])
    assert (tmp_path / "new").read_bytes() == source.read_bytes()[3:2_999_990]
    assert described["sha256"] == hashlib.sha256(source.read_bytes()[3:2_999_990]).hexdigest()


def test_a_source_that_is_too_short_is_an_error(tmp_path: Path) -> None:
    source = source_of(tmp_path, 1000)
    with pytest.raises(OSError, match="ends before byte 1001"):
        disk.write_new(tmp_path / "new", [disk.FileRange(source, 0, 1001)])


def test_a_full_disk_while_the_kernel_copies_is_not_taken_for_one_that_cant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="No space left"):
        disk.write_new(tmp_path / "new", [disk.FileRange(source_of(tmp_path, 10_000), 0, 10_000)])


# Inputs


def test_a_file_that_was_written_to_or_replaced_is_another(tmp_path: Path) -> None:
    for name in ("written", "replaced", "gone", "same"):
        (tmp_path / name).write_bytes(b"before")
        os.utime(tmp_path / name, ns=(1, 1))
    stamps = {path: disk.stamp(path) for path in [*tmp_path.iterdir(), tmp_path / "new"]}
    disk.require_unchanged(stamps)
    (tmp_path / "written").write_bytes(b"after!")
    (tmp_path / "new").write_bytes(b"")
    (tmp_path / "other").write_bytes(b"after!")
    os.utime(tmp_path / "other", ns=(1, 1))
    (tmp_path / "other").rename(tmp_path / "replaced")
    (tmp_path / "gone").unlink()
    for path, before in stamps.items():
        if path.name != "same":
            with pytest.raises(Mismatch, match=f"{path.name}: found that it was changed while it was read"):
                disk.require_unchanged({path: before})
    disk.require_unchanged({tmp_path / "same": stamps[tmp_path / "same"]})


# Locks


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "pipe", "folder"])
def test_a_lock_is_never_written_through_another_file(kind: str, tmp_path: Path) -> None:
    """In a folder that others may write to, its name can be theirs."""
    victim, lock = tmp_path / "victim", tmp_path / ".out.lock"
    victim.write_text("precious")
    if kind == "hard link":
        os.link(victim, lock)
    elif kind == "pipe":
        os.mkfifo(lock)
    elif kind == "folder":
        lock.mkdir()
    else:
        lock.symlink_to(victim if kind == "link" else tmp_path / "new")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(DiskFailed, match=r"\.out\.lock: found a link, or no file"), disk.held(lock):
        pass
    assert victim.read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == before


# Where locks do nothing


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that grants every lock."""
    monkeypatch.setattr(disk.fcntl, "flock", lambda *_: None)


def _owner_of(path: Path, **changed: object) -> Path:
    """What a process leaves that was killed while it held `path`, without locks."""
    owner = path.with_name(f".{path.name.strip('.')}.owner.lock")
    owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "token": "0" * 32, **changed}))
    return owner


def _ended() -> int:
    """The pid of a process that is no more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.usefixtures("no_locks")
def test_where_locks_do_nothing_a_file_keeps_others_out(tmp_path: Path) -> None:
    path = tmp_path / ".out.lock"
    with disk.held(path):
        for _ in range(3):
            with pytest.raises(Busy) as caught, disk.held(path):
                pass
            assert str(os.getpid()) in caught.value.message
    assert os.listdir(tmp_path) == []
    with disk.held(path):
        pass


@pytest.mark.usefixtures("no_locks")
def test_where_locks_do_nothing_a_dead_owner_is_followed_and_a_far_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / ".out.lock"
    _owner_of(path, pid=_ended())
    with disk.held(path), pytest.raises(Busy), disk.held(path):
        pass
    assert os.listdir(tmp_path) == []
    for changed in ({}, {"host": "another", "pid": _ended()}):
        _owner_of(path, **changed)
        with pytest.raises(Busy, match="owner"), disk.held(path):
            pass


def test_where_locks_work_there_is_no_other_file(tmp_path: Path) -> None:
    with disk.held(tmp_path / ".out.lock"):
        assert os.listdir(tmp_path) == [".out.lock"]


def test_the_name_of_a_growing_file_is_fsynced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(disk, "fsync_folder", synced.append)
    for _ in range(2):
        disk.AppendedFile(tmp_path / "metrics.jsonl").close()
    assert synced == [tmp_path]


def test_names_of_new_folders_are_fsynced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(disk, "fsync_folder", synced.append)
    disk.make_folder(tmp_path / "a" / "b")
    disk.make_folder(tmp_path / "a" / "b")
    assert set(synced) == {tmp_path, tmp_path / "a"}
