"""Which checks a purpose needs, with which sizes; what a command asks first; answers as JSON and as a text to paste."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from lorakit.core import doctor
from lorakit.core.config import CheckName, DoctorConfig
from lorakit.core.doctor import CHECKS, Diagnosis, Finding, Need, chosen, need_of, require_ready
from lorakit.core.doctor.finding import fail, ok, skip, together, warn
from lorakit.core.doctor.report import cleaned
from lorakit.core.environment import memory_limit
from lorakit.core.errors import EnvironmentUnusable, InputRefused, UsageError
from lorakit.core.events import Notice, Progress
from tests.conftest import Ran

Cli = Callable[..., Ran]


def quiet(event: object) -> None:
    """Nobody listens."""


def test_every_check_can_be_named() -> None:
    assert tuple(CHECKS) == get_args(CheckName)
    assert {check.group for check in CHECKS.values()} == set(doctor._HEAVY_FIRST)
    assert all(before in CHECKS for check in CHECKS.values() for before in check.after)


def test_readme_names_every_check() -> None:
    readme = (Path(doctor.__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    page = readme.partition("### What does this machine lack?")[2].partition("\n### ")[0]
    assert f"{len(CHECKS)} checks" in page
    assert all(f"`{name}`" in page for name in CHECKS)


def test_every_check_is_a_function_with_words_about_itself() -> None:
    import importlib

    for name, check in CHECKS.items():
        assert getattr(importlib.import_module(f"lorakit.core.doctor.{check.room}"), name).__doc__


# Answers


def test_together_the_worst_speaks_alone() -> None:
    assert together([ok("a"), ok("b")]) == Finding("ok", "a; b")
    assert together([ok("a"), skip("b")]) == Finding("ok", "a")
    found = together([ok("a"), warn("b", "w", "x"), fail("c", "v", "y"), fail("d", "v", "y")])
    assert found == Finding("fail", "c; d; b", "v; w", "y; x")


def test_what_rests_on_a_check_that_fails_is_not_red_too() -> None:
    broken, other = fail("a", "b", "c"), fail("d", "e", "f")
    assert doctor._after("int8", {"int8": other, "bitsandbytes": broken}).status == "skip"
    assert doctor._after("int8", {"int8": other, "bitsandbytes": ok("a")}) is other
    assert doctor._after("int8", {"int8": other}) is other
    assert doctor._after("int8", {"int8": ok("a"), "bitsandbytes": broken}).status == "ok"


def test_the_first_failure_is_the_error_and_names_the_others() -> None:
    findings = {
        "a": ok("fine"),
        "b": fail("found x, need y", "z", "do it"),
        "c": fail("found v, need w", "z", "do that"),
    }
    diagnosis = Diagnosis(findings)
    assert not diagnosis.ok
    with pytest.raises(EnvironmentUnusable, match=r"b: found x, need y \(c failed too\)$") as caught:
        diagnosis.require_ok()
    assert (caught.value.hint, caught.value.exit_code) == ("do it", 11)
    Diagnosis({"a": ok("fine"), "b": skip("nothing"), "c": warn("a", "b", "c")}).require_ok()


# Purposes


def plan_file(path: Path, **changed: object) -> Path:
    sizes = {"lora": 100, "optimizer": 200}
    device = {"name": "cuda:0", "budget_bytes": 9, "peak_bytes": 7 * 2**30, "bytes": sizes}
    content = {
        **{"format": 1, "shape": {}, "settings": {"quantize": "nf4", "optimizer": "adamw"}, "parallel": "split"},
        **{"fits": True, "peak_bytes": 7 * 2**30, "devices": [device, {**device, "name": "cuda:1"}]},
        **{"device_map": {"model": 0, "head": 1}},
        **changed,
    }
    path.write_text(json.dumps(content))
    return path


def test_a_plan_needs_its_devices_memory_and_kernels(tmp_path: Path) -> None:
    need = need_of(str(plan_file(tmp_path / "plan.json")), quiet)
    assert need.gpu_bytes == {0: 7 * 2**30, 1: 7 * 2**30}
    assert (need.job, need.quantize, need.on_cpu, need.ram_bytes) == ("train", "nf4", False, 0)
    assert need.disk_bytes == 5 * 2 * 300  # each device saves its own layers' LoRA
    names = chosen(need)
    assert {"nf4", "bitsandbytes", "gpus", "attention"} <= set(names)
    assert not {"int8", "optimizer", "gloo", "nccl", "compile"} & set(names)


def test_copies_of_a_plan_save_once(tmp_path: Path) -> None:
    need = need_of(str(plan_file(tmp_path / "plan.json", parallel="ddp", device_map=None)), quiet)
    assert need.disk_bytes == 5 * 300
    assert {"gloo", "nccl"} <= set(chosen(need))


def test_a_plan_for_the_cpu_asks_for_no_gpu(tmp_path: Path) -> None:
    device = {"name": "cpu", "budget_bytes": 9, "peak_bytes": 5, "bytes": {"lora": 1, "optimizer": 2}}
    settings = {"quantize": "none", "optimizer": "adamw_8bit"}
    path = plan_file(tmp_path / "plan.json", devices=[device], device_map={"": "cpu"}, settings=settings)
    need = need_of(str(path), quiet)
    assert (need.on_cpu, need.ram_bytes, need.gpu_bytes) == (True, 5, {})
    names = set(chosen(need))
    assert not {"driver", "gpus", "cuda", "int8", "nf4"} & names
    assert {"optimizer", "bitsandbytes"} <= names


def test_a_plan_of_plan_devices_is_understood(cli: Cli, tmp_path: Path) -> None:
    asked = ("llama-7b", "--gpus", "24GiB", "--cpu", "64GiB", "--output", tmp_path / "plan.json", "--json")
    planned = cli("plan-devices", *asked).json
    need = need_of(str(tmp_path / "plan.json"), quiet)
    sizes = {device["name"]: device["peak_bytes"] for device in planned["devices"]}
    assert need.gpu_bytes == {0: sizes["cuda:0"]}
    assert need.ram_bytes == sizes["cpu"]


@pytest.mark.parametrize("changed", [{"optimizer": 3}, {"quantize": ["nf4"]}, {"optimizer": None}])
def test_a_plan_of_other_settings_than_a_runs_is_refused(changed: dict[str, object], tmp_path: Path) -> None:
    settings = {"quantize": "nf4", "optimizer": "adamw", **changed}
    with pytest.raises(InputRefused, match="found devices or settings that aren't a plan's"):
        need_of(str(plan_file(tmp_path / "plan.json", settings=settings)), quiet)


@pytest.mark.parametrize(
    "devices",
    [
        [{"name": "cpu"}],
        [{"name": "cpu", "peak_bytes": "x", "bytes": {}}],
        [{"name": "cpu", "peak_bytes": 10**400, "bytes": {"lora": 1, "optimizer": 2}}],
        [{"name": "cpu", "peak_bytes": 1, "bytes": {"lora": 10**400, "optimizer": 2}}],
        [{"name": "cpu", "peak_bytes": -1, "bytes": {"lora": 1, "optimizer": 2}}],
    ],
)
def test_half_a_plan_is_refused(devices: list[object], tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="plan"):
        need_of(str(plan_file(tmp_path / "plan.json", devices=devices, device_map=None)), quiet)


def test_jobs_need_what_they_use() -> None:
    assert set(chosen(Need())) == set(CHECKS)
    train, merge = chosen(Need(job="train")), chosen(Need(job="merge"))
    assert {"int8", "nf4", "optimizer", "attention", "gloo"} <= set(train)
    assert "compile" not in train
    assert {"disk", "filesystem", "packages", "machine"} <= set(merge)
    assert not {"int8", "nf4", "optimizer", "attention", "gloo", "driver"} & set(merge)


def test_a_purpose_that_is_nothing_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--for nothing: found no such file or folder, need train, merge, a plan file"):
        need_of("nothing", quiet)


# Before a command begins


def test_a_command_stops_with_doctors_own_words(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = fail("found torch 2.13.0+cpu beside an NVIDIA GPU, need a build for CUDA", "slow", "pip install torch")
    monkeypatch.setattr("lorakit.core.doctor.devices.torch", lambda need: broken)
    told = "error: torch: found torch 2.13.0+cpu beside an NVIDIA GPU, need a build for CUDA\nhint: pip install torch\n"
    for line in (("train", "--model", "m", "--blocks", "b"), ("plan-devices", "llama-7b")):
        ran = cli(*line)
        assert (ran.code, ran.out, ran.err) == (11, "", told)
    assert cli("plan-devices", "llama-7b", "--gpus", "80GiB").code == 0  # which asks for another machine


def test_merge_stops_where_a_package_is_too_old(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = fail("found safetensors 0.1, need safetensors>=0.6", "other interfaces", "pip install safetensors")
    monkeypatch.setattr("lorakit.core.doctor.packages.packages", lambda need: broken)
    ran = cli("merge", "adapter")
    assert (ran.code, ran.err) == (11, f"error: packages: {broken.detail}\nhint: pip install safetensors\n")


def test_a_variable_that_changes_results_is_said_once_and_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    said: list[str] = []
    require_ready("train", lambda event: said.append(event.text if isinstance(event, Notice) else ""))
    [line] = said
    assert "NVIDIA_TF32_OVERRIDE=1" in line
    assert "unset NVIDIA_TF32_OVERRIDE" in line


def test_what_is_asked_first_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, time; started = time.perf_counter(); from lorakit.core.doctor import require_ready\n"
        "for name in ('train', 'merge', 'plan-devices'): require_ready(name, print)\n"
        "print(time.perf_counter() - started, {'torch', 'transformers', 'numpy', 'bitsandbytes'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip().endswith("set()"), ran.stdout


# Text to paste


def test_a_text_to_paste_holds_nobodys_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setenv("MY_API_KEY", "very-secret-key")
    monkeypatch.setattr(socket, "gethostname", lambda: "alices-box.corp.example")
    monkeypatch.setattr("getpass.getuser", lambda: "alice")
    text = cleaned(
        "alice@alices-box.corp.example: /home/alice/x, /home/bob/y, /Users/carol/z, C:\\Users\\dave\\w; "
        "hf_abcdefghij123 very-secret-key http://eve:word@proxy:80 10.1.2.3 127.0.0.1 alices-box 580.65.06 malice"
    )
    for word in ("bob", "carol", "dave", "eve", "word", "hf_", "very-secret", "10.1.2.3", "alices-box", "corp"):
        assert word not in text, (word, text)
    assert "~/x, ~/y, ~/z" in text
    assert "<user>@<host>" in text
    assert "127.0.0.1" in text
    assert "580.65.06" in text
    assert text.endswith("malice")


def test_the_text_has_every_check_and_its_fix() -> None:
    text = Diagnosis({"packages": ok("all"), "torch": fail("found a, need b", "why", "do c")}).text
    assert [line.split()[:2] for line in text.splitlines()[2:]] == [
        ["ok", "packages"],
        ["fail", "torch"],
        ["fix:", "do"],
    ]


# Ends


def test_children_end_with_the_one_who_asked(tmp_path: Path) -> None:
    """A kill of doctor leaves no process behind."""
    (tmp_path / "huggingface_hub").mkdir()
    place = tmp_path / "pid"
    slow = f"import os, time; open({str(place)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    (tmp_path / "huggingface_hub" / "__init__.py").write_text(slow)
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "lorakit", "doctor", "--only", "hub"]
    asked = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (place.exists() and place.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(place.read_text())
    asked.terminate()
    assert asked.wait(30) == 75
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def test_progress_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = []
    config = DoctorConfig.resolve((None, {"only": ["python", "variables"]}))
    found = doctor.diagnose(config, said.append).findings
    assert list(found) == ["python", "variables"]
    done = [event.done for event in said if isinstance(event, Progress)]
    assert (done[0], done[-1]) == (0, 2)


# A container's limit


def test_the_tightest_memory_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.core import environment

    monkeypatch.setattr(environment, "_CGROUP", tmp_path)
    assert memory_limit() is None
    for name, content in (
        ("memory.max", "8589934592"),
        ("memory.current", "1000"),
        ("memory.stat", "inactive_file 400"),
    ):
        (tmp_path / name).write_text(content + "\n")
    assert memory_limit() == (8589934592, 600)
    (tmp_path / "memory").mkdir()
    old = (
        ("memory.limit_in_bytes", "4000"),
        ("memory.usage_in_bytes", "900"),
        ("memory.stat", "total_inactive_file 0"),
    )
    for name, content in old:
        (tmp_path / "memory" / name).write_text(content + "\n")
    assert memory_limit() == (4000, 900)
    assert environment.free_ram_bytes() == 3100
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert memory_limit() is None
