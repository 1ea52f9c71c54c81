"""`lorakit doctor`: its JSON, exit code, checks by name and by purpose, and that it is silent on the network."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.core.doctor import CHECKS
from tests.conftest import Ran, make_llama

Cli = Callable[..., Ran]


def test_every_check_is_run_and_answers(cli: Cli) -> None:
    """The whole of it, once; on a machine that can run the tests nothing fails."""
    ran = cli("doctor", "--json")
    assert ran.code == 0, ran
    assert ran.json["ok"] is True
    assert [check["name"] for check in ran.json["checks"]] == list(CHECKS)
    assert all(set(check) == {"name", "status", "detail", "why", "fix"} for check in ran.json["checks"])
    assert {check["status"] for check in ran.json["checks"]} <= {"ok", "warn", "skip"}
    right = {check["name"] for check in ran.json["checks"] if check["status"] == "ok"}
    assert right >= {"packages", "bitsandbytes", "int8", "nf4", "optimizer", "attention", "gloo", "filesystem"}


def test_a_failure_is_exit_code_11_with_its_fix(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    ran = cli("doctor", "--only", "variables", "--only", "python")
    assert ran.code == 11
    assert "fail  variables  found RANK=0" in ran.out
    assert "      fix: let lorakit itself" in ran.out
    assert "error: variables: found RANK=0 in the environment, need" in ran.err
    assert "env -u RANK lorakit" in ran.err.partition("hint: ")[2]
    told = cli("doctor", "--only", "variables", "--json")
    assert (told.code, told.json["ok"], told.json["checks"][0]["status"]) == (11, False, "fail")


def test_a_warning_is_no_failure(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    ran = cli("doctor", "--only", "variables")
    assert (ran.code, "warn  variables  found CUDA_LAUNCH_BLOCKING=1" in ran.out) == (0, True)


def test_a_check_that_is_none_is_refused_with_those_that_are(cli: Cli) -> None:
    ran = cli("doctor", "--only", "pyton")
    assert ran.code == 2
    assert "--only: found" in ran.err
    assert "'pyton'" in ran.err
    assert "python, packages" in ran.err


def test_the_room_for_an_adapters_merged_model_is_checked(cli: Cli, tmp_path: Path, rows_file: Path) -> None:
    base = make_llama(tmp_path / "base")
    blocks, adapter = tmp_path / "blocks", tmp_path / "adapter"
    assert cli("prepare", rows_file, "--tokenizer", base, "--block-size", 128, "--output", blocks).code == 0
    train = ("--model", base, "--blocks", blocks, "--output", adapter, "--max-steps", 1, "--rank", 4)
    assert cli("train", *train).code == 0
    ran = cli("doctor", "--for", adapter, "--json", "--only", "disk")
    assert (ran.code, ran.json["checks"][0]["status"]) == (0, "ok"), ran
    names = [check["name"] for check in cli("doctor", "--for", adapter, "--json").json["checks"]]
    assert "disk" in names
    assert "int8" not in names


def test_a_report_is_one_text(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ran = cli("doctor", "--only", "filesystem", "--report")
    assert ran.out.startswith("lorakit ")
    assert "filesystem" in ran.out
    assert str(tmp_path) not in ran.out
    assert "filesystem" in cli("doctor", "--only", "filesystem", "--report", "--json").json["report"]


def test_nothing_is_fetched_although_kernels_is_installed(tmp_path: Path) -> None:
    """bitsandbytes, and transformers, would take compiled kernels from the Hub."""
    (tmp_path / "kernels").mkdir()
    canary = tmp_path / "imported"
    content = f"open({str(canary)!r}, 'w').close()\ndef get_kernel(*_, **__): raise RuntimeError('asks the Hub')\n"
    (tmp_path / "kernels" / "__init__.py").write_text(content)
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "lorakit", "doctor", "--only", "bitsandbytes", "--only", "nf4", "--json"]
    ran = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert (ran.returncode, json.loads(ran.stdout)["ok"]) == (0, True), ran
    assert "kernels" not in ran.stderr
    assert not canary.exists()


def test_windows_is_told_what_it_needs(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    ran = cli("doctor")
    assert (ran.code, ran.err.startswith("error: found Windows itself, need Linux, macOS or WSL\nhint: run `wsl")) == (
        11,
        True,
    )
