"""Every failure has its exit code, and an operating-system failure names the path and what to do about it."""

import errno
import os
import re
from pathlib import Path

import pytest

from lorakit.core import errors
from lorakit.core.errors import ExitCode, LorakitError, Stopped, disk_failed

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, LorakitError) and kind is not LorakitError
]


def test_exit_codes_are_the_documented_interface() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "DONE": 0,
        "BUG": 1,
        "USAGE": 2,
        "INPUT_REFUSED": 3,
        "ARTIFACT_DAMAGED": 4,
        "MISMATCH": 5,
        "BUSY": 6,
        "DISK": 7,
        "NON_FINITE": 8,
        "OUT_OF_MEMORY": 9,
        "RANK_FAILED": 10,
        "ENVIRONMENT": 11,
        "HUB": 12,
        "STOPPED": 75,
        "INTERRUPTED": 130,
    }


def test_no_two_kinds_of_failure_share_an_exit_code() -> None:
    codes = [kind.exit_code for kind in KINDS]
    assert len(set(codes)) == len(codes)
    assert ExitCode.BUG not in codes
    assert ExitCode.DONE not in codes


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_tree_at_the_top_of_the_file_draws_every_kind_with_its_code(kind: type[LorakitError]) -> None:
    drawn = re.search(rf"─ {kind.__name__} +(\d+)", errors.__doc__ or "")
    assert drawn is not None
    assert int(drawn[1]) == kind.exit_code


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_failure_carries_message_and_hint(kind: type[LorakitError]) -> None:
    error = kind("x: found a, need b", "do c")
    assert (error.message, error.hint, str(error)) == ("x: found a, need b", "do c", "x: found a, need b")


def test_ctrl_c_and_a_termination_have_codes_of_their_own() -> None:
    assert Stopped("m", "h").exit_code == 75
    assert Stopped("m", "h", interrupted=True).exit_code == 130
    assert Stopped.exit_code == 75, "one interrupted run must not change the code of the next"


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EFBIG, "free some space"),
        (errno.EACCES, "--output"),
        (errno.EPERM, "--output"),
        (errno.EROFS, "--output"),
        (errno.EIO, "check the disk"),
    ],
)
def test_the_hint_fits_the_operating_systems_reason(number: int, advice: str) -> None:
    error = disk_failed(OSError(number, os.strerror(number), "/there/file"), Path("/elsewhere"))
    assert error.exit_code == 7
    assert error.message.startswith("/there/file: found ")
    assert os.strerror(number) in error.message
    assert advice in error.hint


def test_a_failure_without_a_file_name_names_the_path_that_was_worked_on() -> None:
    assert disk_failed(OSError(errno.EIO, "broken"), Path("/elsewhere")).message.startswith(
        "/elsewhere: found 'broken'"
    )
    assert "unexplained" in disk_failed(OSError("unexplained"), Path("/elsewhere")).message
