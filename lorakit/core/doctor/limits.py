"""What the machine, a container and the environment allow: memory, shared memory, open files, variables. No torch."""

import os
import platform
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

from lorakit.core import environment
from lorakit.core.doctor.finding import Finding, Need, fail, gib, in_container, is_wsl, ok, skip, together, warn
from lorakit.core.environment import free_ram_bytes, memory_limit, usable_cores
from lorakit.core.errors import EnvironmentUnusable

_SHARED = Path("/dev/shm")
_LEAST_SHARED_BYTES = 256 * 2**20
_LEAST_FILES = 1024
_TIGHT_BYTES = 4 * 2**30


def machine(need: Need) -> Finding:
    """Cores and memory, and the limit of a container."""
    free, limit = free_ram_bytes(), memory_limit()
    of = f", of a container's or service's limit of {gib(limit.bytes)}" if limit else ""
    where = "WSL, " if is_wsl() else "a container, " if in_container() else ""
    said = f"{where}{usable_cores()} of {os.cpu_count()} CPU cores, {gib(free)} memory free{of}"
    bigger = "start the container with more memory (docker run --memory)" if limit else "close other programs"
    if is_wsl():
        bigger = "raise memory= under [wsl2] in the file .wslconfig of your Windows user, then `wsl --shutdown`"
    if free < need.ram_bytes:
        return fail(f"found {said}; need {gib(need.ram_bytes)} free", "the kernel would kill it half-way", bigger)
    if limit and limit.bytes < _TIGHT_BYTES:
        return warn(f"found {said}; most models need more", "the kernel kills what exceeds the limit", bigger)
    return ok(f"{said}; {platform.platform()}")


def limits(need: Need) -> Finding:
    """Shared memory and the limits of a shell (`ulimit`)."""
    found = [_shared_memory()]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _LEAST_FILES:
        how = f"ulimit -n {hard if 0 < hard < 65536 else 65536}"
        few = f"found at most {soft} open files (ulimit -n), need {_LEAST_FILES}"
        found.append(warn(few, "workers and shards open many files at once", how))
    for name, kind, what in (
        ("-v", resource.RLIMIT_AS, "address space"),
        ("-f", resource.RLIMIT_FSIZE, "size of a file"),
        ("-t", resource.RLIMIT_CPU, "seconds of CPU time"),
    ):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            unit = f"{soft:,} s" if kind == resource.RLIMIT_CPU else gib(soft)
            why = "a run ends where it reaches it; CUDA alone maps far more address space than it uses"
            found.append(
                warn(f"found a limit of the {what}: {unit} (ulimit {name}), need none", why, f"ulimit {name} unlimited")
            )
    return together(found)


def _shared_memory() -> Finding:
    try:
        size = shutil.disk_usage(_SHARED).total
    except OSError:
        return skip("no /dev/shm here")
    if size < _LEAST_SHARED_BYTES:
        return warn(
            f"found {size / 2**20:.0f} MiB of shared memory in /dev/shm, need {_LEAST_SHARED_BYTES // 2**20}",
            "NCCL and loading data pass tensors through it, and end with a bus error where it is full",
            "docker run --shm-size 8g (or --ipc host)"
            if in_container()
            else f"sudo mount -o remount,size=8g {_SHARED}",
        )
    return ok(f"/dev/shm holds {gib(size)}")


_ON = {"1", "true", "yes", "on"}


def _is_on(value: str) -> bool:
    return value.lower() in _ON


_TELLING: dict[str, tuple[Callable[[str], bool], str]] = {
    "NVIDIA_TF32_OVERRIDE": (lambda value: True, "it decides over TF32 in every library, whatever is asked for"),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": (_is_on, "fp32 products are computed in TF32, with 10 bits of mantissa"),
    "BNB_CUDA_VERSION": (lambda value: True, "bitsandbytes loads that build of its kernels, whatever torch's CUDA is"),
    "CUDA_LAUNCH_BLOCKING": (_is_on, "every kernel is waited for: slow"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": (_is_on, "every tensor is allocated by CUDA itself: very slow"),
    "TORCHDYNAMO_DISABLE": (_is_on, "nothing is compiled: flex_attention keeps a whole matrix of scores"),
    "TORCH_COMPILE_DISABLE": (_is_on, "nothing is compiled: flex_attention keeps a whole matrix of scores"),
    "PYTORCH_ENABLE_MPS_FALLBACK": (_is_on, "what Apple's GPU can't do is computed on the CPU without a word"),
    "NCCL_P2P_DISABLE": (_is_on, "GPUs reach each other through CPU memory only: slow"),
    "NCCL_SHM_DISABLE": (_is_on, "GPUs without NVLink reach each other through the network only: slow"),
    "PYTHONOPTIMIZE": (lambda value: True, "assertions of all libraries are left out"),
    "LD_PRELOAD": (lambda value: True, "that library comes before those of torch and bitsandbytes"),
    "ACCELERATE_MIXED_PRECISION": (lambda value: value != "no", "accelerate computes in another number type"),
    "ACCELERATE_USE_FSDP": (_is_on, "accelerate shards models where nobody asked for it"),
    "ACCELERATE_USE_DEEPSPEED": (_is_on, "accelerate starts DeepSpeed where nobody asked for it"),
    "MKL_DEBUG_CPU_TYPE": (lambda value: True, "MKL computes for another CPU, with other rounding"),
}
"""Variables that change results or speed without a word, which values do, and what they do."""


def variables(need: Need) -> Finding:
    """Environment variables that silently change results, and a place in a parallel run that is half there."""
    try:
        environment.worker()
    except EnvironmentUnusable as error:
        return fail(error.message, "torch would wait for processes that never come", error.hint)
    found = []
    for name, value in environment.variables(*_TELLING).items():
        matters, why = _TELLING[name]
        if matters(value):
            found.append(warn(f"found {name}={value}, need it unset", why, f"unset {name}"))
    if len(environment.variables("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")) == 2:
        two = "found PYTORCH_CUDA_ALLOC_CONF and PYTORCH_ALLOC_CONF, need one of them"
        found.append(warn(two, "torch takes one of them", "unset PYTORCH_CUDA_ALLOC_CONF"))
    return together(found) if found else ok("none that changes results is set")
