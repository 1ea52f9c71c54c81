"""What ran is what torch says that ran, and why not another kernel."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lorakit.core.profiling import median_seconds, profiled, why_math

STATES = [torch.randn(1, 2, 16, 8) for _ in range(3)]


def fused() -> Any:
    return scaled_dot_product_attention(*STATES, is_causal=True)


def test_the_kernel_is_the_one_that_ran() -> None:
    seen = profiled(fused, on_gpu=False)
    assert (seen.kernel, seen.fell_to_math, seen.host_syncs) == ("CPU flash", False, None)
    by_hand = profiled(lambda: (STATES[0] @ STATES[1].mT).softmax(-1) @ STATES[2], on_gpu=False)
    assert (by_hand.kernel, by_hand.fell_to_math) == ("matmul + softmax", False)
    with sdpa_kernel([SDPBackend.MATH]):
        forced = profiled(fused, on_gpu=False)
    assert (forced.kernel, forced.fell_to_math) == ("math", True)


def test_profiling_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    profiled(fused, on_gpu=False)
    assert capfd.readouterr() == ("", "")


def test_math_has_its_reason() -> None:
    with sdpa_kernel([SDPBackend.MATH]):
        assert "every other kernel is turned off" in why_math({}, 64, torch.bfloat16)
    assert why_math({"flash": "no masks"}, 64, torch.bfloat16) == "flash: no masks"
    assert "heads of 320" in why_math({}, 320, torch.bfloat16)


def test_a_median_is_of_several_runs() -> None:
    runs: list[int] = []
    assert median_seconds(lambda: runs.append(1), on_gpu=False) >= 0
    assert len(runs) >= 3
