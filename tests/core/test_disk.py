"""The disk: small writes whole or not at all, short writes finished, a full disk named as one."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.core import disk
from lorakit.core.errors import DiskFailed


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
