"""torch on GPUs as it fails, and functions that it compiles."""

import sys
import types
from typing import Any

import pytest
import torch

from lorakit.core.doctor import cuda
from lorakit.core.doctor.finding import Need, install_torch


@pytest.mark.parametrize(
    ("said", "why", "fix"),
    [
        ("The NVIDIA driver on your system is too old (found version 11040).", "newer than the driver", "whl/"),
        (
            "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized",
            "NVSwitch",
            "fabricmanager",
        ),
        ("Error 804: forward compatibility was attempted on non supported HW", "compatibility library", "compat"),
        ("Error 803: system has unsupported display driver / cuda driver combination", "another version", "reboot"),
        ("CUDA unknown error - this may be due to an incorrectly set up environment", "stale", "nvidia-modprobe"),
        ("CUDA error: all CUDA-capable devices are busy or unavailable", "another process", "nvidia-smi -c 0"),
        ("something new", "nothing is computed", ""),
    ],
)
def test_what_cuda_says_is_explained(said: str, why: str, fix: str, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    found = cuda.cuda(Need())
    assert (found.status, said in found.detail, why in found.why, fix in found.fix) == ("fail", True, True, True)


@pytest.mark.parametrize(
    ("capability", "built", "words"),
    [
        ((6, 1), ["sm_75", "sm_80", "sm_90", "compute_120"], "whl/cu126"),
        ((12, 0), ["sm_75", "sm_80", "sm_90"], "whl/cu130"),
    ],
)
def test_an_architecture_that_is_not_compiled_in_is_told(
    capability: tuple[int, int], built: list[str], words: str, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    found = cuda.cuda(Need())
    assert (found.status, words in found.fix) == ("fail", True)
    assert f"sm_{capability[0]}{capability[1]}" in found.detail


@pytest.mark.parametrize(
    ("capability", "built", "fits"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 6), ["sm_80"], True),
        ((8, 9), ["sm_80", "sm_86"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80", "sm_86"], False),
        ((9, 0), ["sm_80", "compute_80"], True),
        ((12, 1), ["sm_120"], True),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100a"], False),
        ((7, 0), ["compute_75"], False),
        ((7, 0), [], False),
    ],
)
def test_what_was_compiled_runs_as_cudas_rules_have_it(
    capability: tuple[int, int], built: list[str], fits: bool
) -> None:
    assert cuda._is_built_for(capability, built) is fits


def test_the_build_fits_driver_and_gpu() -> None:
    assert "whl/cu130" in install_torch(13, (9, 0))
    assert "whl/cu126" in install_torch(13, (6, 1))
    assert "whl/cu126" in install_torch(12, (9, 0))
    assert "whl/cu130" in install_torch(None)
    for command in (install_torch(12, (12, 0)), install_torch(11, (8, 0))):
        assert "driver" in command.partition(", then: ")[0]
        assert "whl/cu130" in command


@pytest.mark.parametrize(
    ("reason", "fix"),
    [
        ("Failed to find C compiler. Please specify via CC environment variable.", "apt install gcc"),
        ("fatal error: Python.h: No such file or directory", "python3-dev"),
        ("something new", "--upgrade"),
    ],
)
def test_a_compiler_that_fails_is_told(reason: str, fix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError(reason)

    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    monkeypatch.setattr(torch, "compile", broken)
    found = cuda._compiled(torch.device("cpu"))
    assert (found.status, fix in found.fix) == ("warn", True)


@pytest.mark.parametrize(("factor", "status"), [(1.0, "ok"), (1.01, "fail")])
def test_a_compiled_function_is_compared(factor: float, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = types.ModuleType("triton")
    triton.__version__ = "3.5"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda x: function(x) * factor)
    assert cuda._compiled(torch.device("cpu")).status == status


def test_without_triton_nothing_else_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    found = cuda._compiled(torch.device("cpu"))
    assert (found.status, "install triton" in found.fix) == ("warn", True)
