"""What a kernel gave beside what it should have given, on every device, and the answer that a check makes of it.

What is compared with is computed in float64 by the formulas of the papers, from the same codes and scales: a kernel
that is wrong by one per cent is found, although the formats themselves are coarser than that.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.core.doctor.finding import Finding, fail, ok, together, warn
from lorakit.core.errors import first_line

_ALLOWED = 0.006
"""Root-mean-square error, as a share of the result's size: rounding to bf16 and nested scales of 4 bits make 0.3 %."""
_ALLOWED_SLOPE = 0.004
"""How far the size of what is coarse by itself may be off on average: states of 8 bits are 1.5 % off each, not all."""


def cuda_devices() -> list[torch.device]:
    """The GPUs that torch computes on."""
    return (
        [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )


def _devices() -> list[torch.device]:
    return [*cuda_devices(), torch.device("cpu")]


def run_dtype(device: torch.device) -> torch.dtype:
    """The number type that a run has there by default."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


@dataclass(frozen=True)
class Trial:
    """What a kernel gave and what it should have given."""

    name: str
    got: Tensor
    wanted: Tensor

    @property
    def wrong(self) -> str | None:
        """How it is wrong; None where it is right."""
        got, wanted = self.got.detach().double().cpu(), self.wanted.detach().double().cpu()
        if got.shape != wanted.shape:
            return f"{self.name} gives {tuple(got.shape)}, need {tuple(wanted.shape)}"
        if not bool(torch.isfinite(got).all()):
            return f"{self.name} gives NaN or infinity"
        off = float((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
        return f"{self.name} is off by {off:.2%}, need ≤ {_ALLOWED:.1%}" if off > _ALLOWED else None


@dataclass(frozen=True)
class Slope(Trial):
    """The same for what is coarse by itself: only its size on average is judged."""

    @property
    def wrong(self) -> str | None:
        got, wanted = self.got.detach().double().cpu(), self.wanted.detach().double().cpu()
        off = float((got * wanted).sum() / wanted.square().sum()) - 1
        if abs(off) <= _ALLOWED_SLOPE:
            return None
        return f"{self.name} is off by {off:+.2%} on average, need ≤ {_ALLOWED_SLOPE:.1%}"


WRONG_NUMBERS = "a run would learn from wrong numbers, and nothing would say so"


def judged(what: str, answers: Iterable[tuple[torch.device, Sequence[Trial] | str]], fix: str) -> Finding:
    """The answer over all devices: which of its trials are wrong, or why they can't be run. Where there is a GPU, what
    is wrong on the CPU costs nothing."""
    right, found = [], []
    answered = list(answers)
    has_gpus = any(device.type == "cuda" for device, _ in answered)
    for device, trials in answered:
        wrong = [trials] if isinstance(trials, str) else [words for one in trials if (words := one.wrong)]
        judge = warn if has_gpus and device.type == "cpu" else fail
        if wrong:
            found.append(judge(f"found on {device} that {' and '.join(wrong)}", WRONG_NUMBERS, fix))
        else:
            right.append(str(device))
    return together([*found, *([ok(f"{what} right on {', '.join(right)}")] if right else [])])


def on_each(run: Callable[[torch.device], Sequence[Trial]]) -> Iterator[tuple[torch.device, Sequence[Trial] | str]]:
    """A check's trials on every device, or what its kernels fail with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for device in _devices():
            try:
                yield device, run(device)
            except Exception as error:  # whatever a native kernel can fail with
                yield device, f"its kernels fail: {first_line(error)[:200]}"
