"""The folders that lorakit writes: room, speed, and whether the file system does what whole artifacts rest on.
No torch."""

import contextlib
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from lorakit.core import disk as files
from lorakit.core import environment
from lorakit.core.doctor.finding import Finding, Need, fail, gib, ok, together, warn
from lorakit.core.errors import first_line

_LITTLE_BYTES = 2 * 2**30
_TRIAL_BYTES = 32 * 2**20
_SLOW_BYTES_PER_SECOND = 20e6


def folders() -> dict[str, Path]:
    """What is written where, by the variable or place that decides it."""
    set_to = environment.variables("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
    home = Path(set_to.get("HF_HOME") or Path(set_to.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface")
    return {
        "the Hub's cache": Path(set_to.get("HF_HUB_CACHE") or home / "hub").expanduser().absolute(),
        "lorakit's cache": environment.cache_folder(),
        "the working folder": Path.cwd(),
    }


_MOVED_BY = {
    "the Hub's cache": "set HF_HOME to a folder on another disk",
    "lorakit's cache": "set LORAKIT_CACHE to a folder on another disk",
    "the working folder": "work in a folder on another disk, or give --output",
}


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above that is there."""
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())


@contextlib.contextmanager
def _own_folder(inside: Path) -> Iterator[Path]:
    """A new folder that goes away again; what had to be made above it too, unless others put something there meanwhile.
    Raises OSError."""
    made = [parent for parent in (inside, *inside.parents) if not parent.exists()]
    folder = inside / f".lorakit-doctor-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # one that isn't empty stays
                parent.rmdir()


def disk(need: Need) -> Finding:
    """Free room and speed of each folder that is written to."""
    found = []
    for name, folder in folders().items():
        usage = shutil.disk_usage(_nearest(folder))
        wanted = need.disk_bytes if name == "the working folder" else 0
        fix = f"free some space, or {_MOVED_BY[name]}"
        said = f"{name} ({folder}): {gib(usage.free)} of {gib(usage.total)} free"
        if usage.free < max(wanted, _TRIAL_BYTES):
            lacks = f"found {said}; need {gib(wanted) if wanted else 'room'}"
            found.append(fail(lacks, "what is written is lost where the disk is full", fix))
            continue
        if usage.free < _LITTLE_BYTES:
            found.append(warn(f"found {said}", "a model or a run's checkpoints take more", fix))
            continue
        try:
            with _own_folder(folder) as own:
                speed = _bytes_per_second(own)
        except OSError:
            found.append(ok(said))  # `filesystem` says why
            continue
        said += f", {speed / 1e6:,.0f} MB/s written"
        if speed < _SLOW_BYTES_PER_SECOND:
            slow = "checkpoints and downloads are written there"
            found.append(
                warn(f"found {said}; {_SLOW_BYTES_PER_SECOND / 1e6:.0f} is slow already", slow, _MOVED_BY[name])
            )
        else:
            found.append(ok(said))
    return together(found)


def _bytes_per_second(folder: Path) -> float:
    """How fast a file is written and fsynced."""
    piece = os.urandom(2**20)  # what can't be compressed
    started = time.perf_counter()
    files.write_new(folder / "speed", [piece] * (_TRIAL_BYTES // len(piece)))
    return _TRIAL_BYTES / (time.perf_counter() - started)


def filesystem(need: Need) -> Finding:
    """Whether each folder can be written to, and its file system locks, renames and syncs as artifacts need it."""
    return together(_file_system(name, folder) for name, folder in folders().items())


def _file_system(name: str, folder: Path) -> Finding:
    place = f"{name} ({folder})"
    try:
        with _own_folder(folder) as own:
            return _trial(name, place, own)
    except OSError as error:
        reason = error.strerror or first_line(error)
        fix = f"make it writable (ls -ld {_nearest(folder)}), or {_MOVED_BY[name]}"
        return fail(
            f"found that {place} can't be written to ({reason}), need it", "every output lies in one of these", fix
        )


def _trial(name: str, place: str, folder: Path) -> Finding:
    move = _MOVED_BY[name]
    files.write_new(folder / "first", b"first")
    files.write_new(folder / "second", b"second")
    files.fsync_folder(folder)
    with contextlib.ExitStack() as open_files:
        one, other = (open_files.enter_context((folder / "first").open("rb")) for _ in range(2))
        try:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            why = "two runs could write the same output"
            return fail(f"found that {place} can't lock files ({error.strerror}), need flock", why, move)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pass  # as it should be
        else:
            why = "two runs could write the same output; network disks are mounted so (nolock)"
            return fail(f"found that {place} locks a file twice, need flock", why, move)
    os.rename(folder / "second", folder / "first")
    if (folder / "first").read_bytes() != b"second" or (folder / "second").exists():
        why = "an artifact could be there in part"
        return fail(f"found that {place} doesn't rename over a file, need it", why, move)
    (folder / "whole").mkdir()
    os.rename(folder / "whole", folder / "there")
    files.fsync_folder(folder)
    return ok(f"{place}: locks, renames and syncs")
