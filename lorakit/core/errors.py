"""Every way a command fails on purpose: what was found, what was needed, what to do, and the exit code.

LorakitError ─┬─ UsageError            2   an option, argument or settings file
              ├─ InputRefused          3   data, a model or a folder that can't be used
              ├─ ArtifactDamaged       4   a file that isn't what its manifest says
              ├─ Mismatch              5   made from other data, another base or other settings
              ├─ Busy                  6   another process holds the output
              ├─ DiskFailed            7   full, read-only or failing storage
              ├─ NonFinite             8   NaN or infinity where a number belongs
              ├─ OutOfMemory           9
              ├─ RankFailed           10   another process of a parallel run
              ├─ EnvironmentUnusable  11   a package or device that the command can't do without
              ├─ HubFailed            12   the model hub or the network
              └─ Stopped           75/130  stopped by a signal; the same command goes on
"""

import errno
import os
import re
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path


class ExitCode(IntEnum):
    """What a command's exit status means; an interface, listed in README."""

    DONE = 0
    BUG = 1
    USAGE = 2
    INPUT_REFUSED = 3
    ARTIFACT_DAMAGED = 4
    MISMATCH = 5
    BUSY = 6
    DISK = 7
    NON_FINITE = 8
    OUT_OF_MEMORY = 9
    RANK_FAILED = 10
    ENVIRONMENT = 11
    HUB = 12
    STOPPED = 75
    INTERRUPTED = 130


class LorakitError(Exception):
    """A failure that the user can act on: `message` says what was found and needed, `hint` what to do. A number that
    would fill the screen is shown by its first digits."""

    exit_code = ExitCode.BUG
    shared = False
    """Whether every rank of a parallel run raises it together: then only rank 0 prints it."""
    heard = False
    """Whether the other ranks have been told of it."""

    def __init__(self, message: str, hint: str) -> None:
        message = re.sub(r"\d{100,}", lambda digits: f"{digits[0][:20]}… ({len(digits[0]):,} digits)", message)
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type["LorakitError"], tuple[str, str]]:
        return type(self), (self.message, self.hint)  # so that it comes whole from a worker process


class UsageError(LorakitError):
    exit_code = ExitCode.USAGE
    shared = True  # all ranks have the same command line


class InputRefused(LorakitError):
    exit_code = ExitCode.INPUT_REFUSED


class ArtifactDamaged(LorakitError):
    exit_code = ExitCode.ARTIFACT_DAMAGED


class Mismatch(LorakitError):
    exit_code = ExitCode.MISMATCH


class Busy(LorakitError):
    exit_code = ExitCode.BUSY


class DiskFailed(LorakitError):
    exit_code = ExitCode.DISK


class NonFinite(LorakitError):
    exit_code = ExitCode.NON_FINITE


class OutOfMemory(LorakitError):
    exit_code = ExitCode.OUT_OF_MEMORY


class RankFailed(LorakitError):
    exit_code = ExitCode.RANK_FAILED


class EnvironmentUnusable(LorakitError):
    exit_code = ExitCode.ENVIRONMENT


WINDOWS = (
    "found Windows itself, need Linux, macOS or WSL",
    "run `wsl --install` in PowerShell, restart, and install lorakit in that Ubuntu: the NVIDIA driver of Windows "
    "serves it too, and today's bitsandbytes needs no patched DLL there",
)
"""Message and hint for the platform that has no calls to lock and rename files as lorakit does."""


class HubFailed(LorakitError):
    exit_code = ExitCode.HUB


class Stopped(LorakitError):
    """Stopped by a signal after a safe point: 75 for SIGTERM, 130 for Ctrl-C."""

    exit_code = ExitCode.STOPPED
    shared = True  # a signal to the launcher goes to every rank

    def __init__(self, message: str, hint: str, *, interrupted: bool = False) -> None:
        super().__init__(message, hint)
        if interrupted:
            self.exit_code = ExitCode.INTERRUPTED

    @classmethod
    def early(cls, *, interrupted: bool) -> "Stopped":
        """Stopped before there is anything to save."""
        found = "Ctrl-C" if interrupted else "SIGTERM"
        message = f"stopped by {found} before anything was written"
        return cls(message, "run the same command again", interrupted=interrupted)


def first_line(error: BaseException) -> str:
    """What an error of another library says, short enough for ours."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def shown_bytes(size_bytes: int) -> str:
    """A size in the largest unit that it has one of."""
    units = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
    unit = next((unit for unit, size in units.items() if size_bytes >= size), "bytes")
    return f"{size_bytes / units[unit]:.2f} {unit}" if unit in units else f"{size_bytes} {unit}"


def differences(found: Mapping[str, object], wanted: Mapping[str, object]) -> list[str]:
    """`name: found X, asked for Y` for every key that differs between two flat mappings."""
    return [
        f"{name}: found {found.get(name)!r}, asked for {wanted.get(name)!r}"
        for name in dict.fromkeys((*found, *wanted))
        if found.get(name) != wanted.get(name)
    ]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: Python's, the GPU's, or torch's on the CPU, which has no class of its own."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def base_gives_no_numbers(found: str, dtype: str) -> NonFinite:
    """The error where nothing was learned yet, so that it is the base, in this number type, that gives none."""
    other = "--dtype bf16 or fp32, for fp16 ends at 65,504; or " if dtype == "fp16" else ""
    return NonFinite(
        f"{found} before anything was learned, need numbers from the base",
        f"{other}check the files of the model, whose weights may hold NaN: download it again, or choose another",
    )


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def disk_failed(error: OSError, path: Path) -> DiskFailed:
    """The error for an operating-system failure on `path`, with the hint that fits its errno."""
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        hint = "free some space or choose another folder with --output, then run the same command again"
    elif error.errno in _FORBIDDEN:
        hint = "use a path that you may read and write (for an output: --output)"
    else:
        hint = "check the disk, then run the same command again"
    name = os.fsdecode(error.filename) if error.filename is not None else str(path)
    return DiskFailed(f"{name}: found {reason!r}, need a folder that can be read and written", hint)
