"""Kernels of bitsandbytes: right ones are found right, and each made wrong by one per cent is caught and named."""

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorakit.core.doctor import bitsandbytes
from lorakit.core.doctor.finding import Finding, Need
from lorakit.core.environment import no_kernels_from_the_hub

no_kernels_from_the_hub()
bnb = pytest.importorskip("bitsandbytes")

CHECKS: dict[str, Callable[[Need], Finding]] = {
    name: getattr(bitsandbytes, name) for name in ("int8", "nf4", "optimizer")
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
}


@pytest.mark.parametrize("name", WRONG)
def test_a_kernel_that_is_wrong_by_one_per_cent_is_caught_and_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, patch, named = WRONG[name]
    patch(monkeypatch)
    found = CHECKS[check](Need())
    assert found.status == "fail", found
    assert named in found.detail, found.detail
    others = [other for other in CHECKS if other != check]
    assert {CHECKS[other](Need()).status for other in others} == {"ok"}


def test_a_kernel_that_fails_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(bnb.functional, "int8_vectorwise_quant", broken)
    found = bitsandbytes.int8(Need())
    assert (found.status, "no kernel image is available" in found.detail) == ("fail", True)


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
    found = bitsandbytes.bitsandbytes(Need())
    assert (found.status, words in found.detail, fix in found.fix) == ("fail", True, True), found


def test_a_library_for_cpus_beside_a_gpu_is_told(gpu: None) -> None:
    found = bitsandbytes.bitsandbytes(Need())
    assert (found.status, "isn't the one for CUDA" in found.detail) == ("fail", True)
