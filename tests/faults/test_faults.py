"""The table of faults in short: each promise holds, and is seen to fail without what protects it.

In full: `python -m tests.faults`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.promises import PROMISES

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux" or shutil.which("gcc") is None, reason="the shim needs Linux and gcc"),
    pytest.mark.timeout(900),
]


def table(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tests.faults", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def short() -> "subprocess.CompletedProcess[str]":
    return table("--short")


@pytest.mark.parametrize("name", [name for name, promise in PROMISES.items() if promise.in_short])
def test_a_promise_holds_and_its_control_fails(name: str, short: "subprocess.CompletedProcess[str]") -> None:
    line = next((line for line in short.stdout.splitlines() if line.startswith(f"{name}: ")), "")
    assert " 0 failed, red without " in line, short.stdout + short.stderr


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_promise_in_full() -> None:
    full = table()
    assert full.returncode == 0, full.stdout + full.stderr


def test_settings_of_more_digits_than_python_prints_are_compared(tmp_path: Path) -> None:
    from tests.faults.mutating import check_settings

    limit, recipe = sys.get_int_max_str_digits(), tmp_path / "run.yaml"
    for name in ("model", "revision"):  # given again by the command line, and not
        recipe.write_text(f'{{"{name}": {"9" * 5000}}}')
        assert check_settings(tmp_path) is None
    assert sys.get_int_max_str_digits() == limit


def test_what_lies_beside_the_box_is_outside_of_it(tmp_path: Path) -> None:
    from tests.faults.mutating import opened_outside

    box = tmp_path / "box"
    opened = [str(path) for path in (box, box / "base" / "config.json", tmp_path / "box-x" / "secret", tmp_path)]
    assert opened_outside(box, opened) == opened[2:]
