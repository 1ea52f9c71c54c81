"""The fault loop: killed or failing at each mutating call, nothing half looks whole and the same command finishes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None, reason="the shim needs Linux and gcc"
)


def loop(tmp_path: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    shim = tmp_path / "shim.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", shim, HERE / "shim.c", "-ldl"], check=True)
    command = [sys.executable, "-m", "tests.faults.loop", *arguments]
    environment = {**os.environ, "LD_PRELOAD": str(shim)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("command", "every"), [("prepare", "4"), ("train", "15"), ("merge", "9")])
def test_no_fault_leaves_half_an_artifact(command: str, every: str, tmp_path: Path) -> None:
    ran = loop(tmp_path, command, "--mode", "kill", "enospc", "--every", every, "--jobs", "2", "--variant", "new")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count(", 0 bad") == 2


@pytest.mark.slow
def test_the_loop_sees_a_protection_that_is_missing(tmp_path: Path) -> None:
    arguments = ("prepare", "--mode", "kill", "--every", "2", "--jobs", "2", "--variant", "new", "--without", "sweep")
    ran = loop(tmp_path, *arguments)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert ", 0 bad" not in ran.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command", ["prepare", "train", "merge"])
def test_no_fault_at_any_call_leaves_half_an_artifact(tmp_path: Path, command: str) -> None:
    ran = loop(tmp_path, command, "--mode", "kill", "torn", "enospc", "eio", "full", "--jobs", "2")
    assert ran.returncode == 0, ran.stdout + ran.stderr
