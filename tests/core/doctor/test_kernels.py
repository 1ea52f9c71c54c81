"""Kernels that a run uses: right ones are found right, and each made wrong by one per cent is caught and named."""

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorakit.core.doctor import kernels
from lorakit.core.doctor.finding import Finding, Need, install_torch
from lorakit.core.environment import no_kernels_from_the_hub

no_kernels_from_the_hub()
bnb = pytest.importorskip("bitsandbytes")

CHECKS: dict[str, Callable[[Need], Finding]] = {
    name: getattr(kernels, name) for name in ("int8", "nf4", "optimizer", "attention", "gloo")
}


@pytest.mark.parametrize("name", CHECKS)
def test_kernels_that_are_right_are_found_right(name: str) -> None:
    found = CHECKS[name](Need())
    assert found.status == "ok", found


def larger(value: Any) -> Any:
    """By one per cent."""
    if isinstance(value, torch.Tensor):
        return value * 1.01 if value.is_floating_point() else value
    return type(value)(map(larger, value)) if isinstance(value, tuple) else value


def wrong_result(owner: Any, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A function whose floating-point results are one per cent too large."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **named: larger(real(*given, **named)))

    return patch


def wrong_static(owner: Any, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """The same of a pass of an autograd function."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, staticmethod(lambda *given, **named: larger(real(*given, **named))))

    return patch


def wrong_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four bits of which every hundredth pair is another."""
    real = bnb.functional.quantize_4bit

    def quantize(*given: Any, **named: Any) -> Any:
        packed, state = real(*given, **named)
        packed.view(-1)[::100] ^= 0x77
        return packed, state

    monkeypatch.setattr(bnb.functional, "quantize_4bit", quantize)


def wrong_step(of: Any, when: int, what: str = "parameter") -> Callable[[pytest.MonkeyPatch], None]:
    """An optimizer whose step number `when` goes one per cent too far, or leaves such a state behind."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        real = of.step

        def step(self: Any, *given: Any, **named: Any) -> Any:
            [parameter] = self.param_groups[0]["params"]
            before = parameter.detach().clone()
            result = real(self, *given, **named)
            state = self.state[parameter]
            self.steps_taken = getattr(self, "steps_taken", 0) + 1
            if self.steps_taken == when and what == "parameter":
                parameter.data += 0.01 * (parameter.data - before)
            elif self.steps_taken == when:
                state[what] = state[what] * 1.01
            return result

        monkeypatch.setattr(of, "step", step)

    return patch


def sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own attention, wherever it is called."""
    from transformers.integrations import sdpa_attention

    from lorakit.core.attention import implementations

    real = torch.nn.functional.scaled_dot_product_attention

    def wrong(*given: Any, **named: Any) -> Any:
        return real(*given, **named) * 1.01

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", wrong)
    monkeypatch.setattr(implementations, "scaled_dot_product_attention", wrong)
    assert sdpa_attention.torch is torch


def _autograd(name: str) -> Any:
    return getattr(bnb.autograd._functions, name)


WRONG: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None], str]] = {
    "int8 scales": ("int8", wrong_result(bnb.functional, "int8_vectorwise_quant"), "int8 quantizing"),
    "int8 forward": ("int8", wrong_static(_autograd("MatMul8bitFp"), "forward"), "int8 forward"),
    "int8 backward": ("int8", wrong_static(_autograd("MatMul8bitFp"), "backward"), "int8 backward"),
    "4 bits": ("nf4", wrong_codes, "nf4 quantizing"),
    "4 bits dequantized": ("nf4", wrong_result(bnb.functional, "dequantize_4bit"), "nf4 dequantizing"),
    "4-bit forward": ("nf4", wrong_static(_autograd("MatMul4Bit"), "forward"), "nf4 forward"),
    "4-bit backward": ("nf4", wrong_static(_autograd("MatMul4Bit"), "backward"), "nf4 backward"),
    "AdamW's first step": ("optimizer", wrong_step(bnb.optim.AdamW8bit, 1), "adamw_8bit's step 1"),
    "AdamW's later steps": ("optimizer", wrong_step(bnb.optim.AdamW8bit, 2), "adamw_8bit's step 2"),
    "AdamW's momentum": ("optimizer", wrong_step(bnb.optim.AdamW8bit, 2, "absmax1"), "adamw_8bit's first state"),
    "AdamW's variance": ("optimizer", wrong_step(bnb.optim.AdamW8bit, 2, "absmax2"), "adamw_8bit's second state"),
    "Lion's step": ("optimizer", wrong_step(bnb.optim.Lion8bit, 1), "lion_8bit's step 1"),
    "Lion's momentum": ("optimizer", wrong_step(bnb.optim.Lion8bit, 2, "absmax1"), "lion_8bit's first state"),
    "attention": ("attention", sdpa, "sdpa"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_kernel_that_is_wrong_by_one_per_cent_is_caught_and_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, patch, named = WRONG[name]
    patch(monkeypatch)
    found = CHECKS[check](Need())
    assert found.status == "fail", found
    assert named in found.detail, found.detail
    others = [other for other in ("int8", "nf4", "optimizer") if other != check]
    assert {CHECKS[other](Need()).status for other in others} == {"ok"}


def test_a_sum_over_processes_that_is_wrong_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    real = dist.all_reduce

    def wrong(tensor: torch.Tensor) -> None:
        real(tensor)
        tensor *= 1.01

    monkeypatch.setattr(dist, "all_reduce", wrong)  # in this process, which is the first of two
    found = kernels.gloo(Need())
    assert (found.status, "gloo's sum is off by 1.00%" in found.detail) == ("fail", True)


def test_a_kernel_that_fails_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(bnb.functional, "int8_vectorwise_quant", broken)
    found = kernels.int8(Need())
    assert (found.status, "no kernel image is available" in found.detail) == ("fail", True)


def test_what_is_wrong_on_the_cpu_costs_nothing_beside_a_gpu() -> None:
    one = torch.ones(3)
    right, wrong = kernels._Trial("a", one, one), kernels._Trial("a", one * 1.01, one)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert kernels._judged("a is", [(gpu, [right]), (cpu, [wrong])], "fix").status == "warn"
    assert kernels._judged("a is", [(gpu, [wrong]), (cpu, [right])], "fix").status == "fail"
    assert kernels._judged("a is", [(cpu, [wrong])], "fix").status == "fail"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number_is_wrong(value: float) -> None:
    assert "NaN or infinity" in str(kernels._Trial("a", torch.tensor([value]), torch.ones(1)).wrong)


# torch on GPUs, as it fails


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch for CUDA that sees one GPU."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(kernels, "has_gpu", lambda: True)
    monkeypatch.setattr(kernels, "driver_cuda", lambda: 13)


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
    found = kernels.cuda(Need())
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
    found = kernels.cuda(Need())
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
    assert kernels._is_built_for(capability, built) is fits


def test_the_build_fits_driver_and_gpu() -> None:
    assert "whl/cu130" in install_torch(13, (9, 0))
    assert "whl/cu126" in install_torch(13, (6, 1))
    assert "whl/cu126" in install_torch(12, (9, 0))
    assert "whl/cu130" in install_torch(None)
    for command in (install_torch(12, (12, 0)), install_torch(11, (8, 0))):
        assert "driver" in command.partition(", then: ")[0]
        assert "whl/cu130" in command


@pytest.mark.parametrize(
    ("variables", "message", "words", "fix"),
    [
        ({}, "libcudart.so.13: cannot open shared object file: No such file", "libcudart.so.13", "its packages hold"),
        ({"BNB_CUDA_VERSION": "118"}, "No compatible CUDA binary found", "libbitsandbytes_cuda118", "unset BNB_CUDA"),
        (
            {},
            "No compatible CUDA binary found at libbitsandbytes_cuda999.so",
            "libbitsandbytes_cuda130.so",
            "--upgrade",
        ),
    ],
)
def test_a_library_for_cuda_that_does_not_load_is_told(
    variables: dict[str, str], message: str, words: str, fix: str, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes import cextension

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    tuple_of = (99, 9) if "999" in message else (13, 0)
    specs = types.SimpleNamespace(cuda_version_tuple=tuple_of, cuda_version_string="".join(map(str, tuple_of)))
    monkeypatch.setattr(cextension, "get_cuda_specs", lambda: specs)
    monkeypatch.setattr(cextension, "lib", cextension.ErrorHandlerMockBNBNativeLibrary(message))
    found = kernels.bitsandbytes(Need())
    assert (found.status, words in found.detail, fix in found.fix) == ("fail", True, True), found


def test_a_library_for_cpus_beside_a_gpu_is_told(gpu: None) -> None:
    found = kernels.bitsandbytes(Need())
    assert (found.status, "isn't the one for CUDA" in found.detail) == ("fail", True)


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
    found = kernels._compiled(torch.device("cpu"))
    assert (found.status, fix in found.fix) == ("warn", True)


@pytest.mark.parametrize(("factor", "status"), [(1.0, "ok"), (1.01, "fail")])
def test_a_compiled_function_is_compared(factor: float, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = types.ModuleType("triton")
    triton.__version__ = "3.5"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda x: function(x) * factor)
    assert kernels._compiled(torch.device("cpu")).status == status


def test_without_triton_nothing_else_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    found = kernels._compiled(torch.device("cpu"))
    assert (found.status, "install triton" in found.fix) == ("warn", True)
