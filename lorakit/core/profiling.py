"""What a piece of work costs and which of torch's attention kernels it runs: timed, profiled, and asked of torch."""

import contextlib
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from lorakit.core.environment import quiet_profiler

Work = Callable[[], object]

_BUSY_CYCLES = 100_000_000  # of a GPU's clock: about 60 ms


@dataclass(frozen=True)
class Profile:
    """What the profiler saw."""

    kernel: str
    """The attention kernels in words; on a GPU also, after a colon, the names of those that took longest."""
    fell_to_math: bool
    """Whether torch's sdpa ran its unfused reference."""
    host_syncs: int | None
    """How often the CPU waited for the GPU; None on a CPU."""


def median_seconds(work: Work, on_gpu: bool) -> float:
    """The median of a few runs, after a warm-up on a GPU; there it is the GPU's own time."""
    if not on_gpu:
        times = []
        for _ in range(3):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return statistics.median(times)
    for _ in range(3):
        work()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(10)]
    # The GPU is kept busy while all calls are queued: in a model, other layers' work hides what a launch costs the CPU.
    torch.cuda._sleep(_BUSY_CYCLES)
    for begin, end in events:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1000


_KERNELS = (
    ("_attention_math", "math"),
    ("flash_attention_for_cpu", "CPU flash"),
    ("cudnn_attention", "cuDNN"),
    ("efficient_attention", "efficient"),
    ("flash_attention", "flash"),
    ("flex_attention", "flex"),
)
"""Parts of the names of torch's operators, and the kernels that they stand for."""
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def profiled(work: Work, on_gpu: bool) -> Profile:
    """Run a piece of work under torch's profiler."""
    quiet_profiler()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    if on_gpu:
        torch.cuda.synchronize()
    with profile(activities=activities) as profiled:
        work()
    events = list(profiled.events() or [])
    ops = {event.name for event in events if event.device_type == DeviceType.CPU}
    found = {words for op in ops if (words := _kernel_of(op)) is not None}
    kernel, math = " + ".join(sorted(found)) or "matmul + softmax", "math" in found
    if not on_gpu:
        return Profile(kernel, math, None)
    on_device: dict[str, float] = {}
    for event in events:
        if event.device_type == DeviceType.CUDA:
            on_device[event.name] = on_device.get(event.name, 0.0) + event.device_time_total
    longest = sorted(on_device, key=lambda name: -on_device[name])[:2]
    # leaving the profiler waits once itself
    waits = sum(event.name in _WAITS for event in events) - 1
    return Profile(f"{kernel}: {', '.join(filter(None, map(_short, longest)))}", math, max(waits, 0))


def _kernel_of(op: str) -> str | None:
    """The attention kernel that one of torch's operators stands for, None for other operators."""
    return next((words for part, words in _KERNELS if part in op), None)


def _short(kernel: str) -> str:
    """The name of a CUDA kernel without its namespace and parameters."""
    name = re.sub(r"^(void|at::native::)\s*", "", re.split(r"[<(]", kernel)[0])
    return name.split("::")[-1][:60]


class _Watched(TorchFunctionMode):
    """Keeps what scaled_dot_product_attention is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is scaled_dot_product_attention:
            self.calls.append((args, dict(kwargs or {})))
        return function(*args, **(kwargs or {}))


def refused_kernels(work: Work) -> Mapping[str, str]:
    """Which of sdpa's kernels torch says that it can't use for the first call of a piece of work, in its own words;
    on a GPU."""
    with _Watched() as watched:
        work()
    if not watched.calls:
        return {}
    (q, k, v, *_), named = watched.calls[0]
    parameters = torch.backends.cuda.SDPAParams(
        q, k, v, named.get("attn_mask"), 0.0, bool(named.get("is_causal")), bool(named.get("enable_gqa"))
    )
    can = {
        "flash": torch.backends.cuda.can_use_flash_attention,
        "efficient": torch.backends.cuda.can_use_efficient_attention,
        "cuDNN": torch.backends.cuda.can_use_cudnn_attention,
    }
    refused = {}
    for name, usable in can.items():
        with _stderr() as said:
            possible = usable(parameters, debug=True)
        if not possible:
            lines = [re.sub(r"^\[W.*?\] (Warning: )?|\s*\((function|Triggered).*$", "", line) for line in said]
            refused[name] = " ".join(line for line in lines if "not used because" not in line)
    return refused


@contextlib.contextmanager
def _stderr() -> Iterator[list[str]]:
    """The lines that torch's C++ code writes on stderr meanwhile, kept off the screen."""
    lines: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            lines += caught.read().decode(errors="replace").splitlines()


def why_math(refused: Mapping[str, str], head_dim: int, dtype: torch.dtype) -> str:
    """Why sdpa used no fused kernel."""
    fused = {SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION}
    if not fused & set(_cur_sdpa_kernel_backends()):
        return "every other kernel is turned off (torch.nn.attention.sdpa_kernel, torch.backends.cuda.enable_…_sdp)"
    if refused:
        return "; ".join(f"{kernel}: {why}" for kernel, why in refused.items())
    return f"torch has no fused kernel for heads of {head_dim} in {dtype} on this device"
