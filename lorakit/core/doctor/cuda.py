"""torch on each GPU: CUDA starts, a product is right, and so is a function that torch compiles."""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from lorakit.core.doctor.devices import driver_cuda, has_gpu
from lorakit.core.doctor.finding import (
    TORCH,
    Finding,
    Need,
    fail,
    in_container,
    install_torch,
    pip_install,
    skip,
    together,
    warn,
)
from lorakit.core.doctor.trials import Trial, cuda_devices, judged, run_dtype
from lorakit.core.errors import first_line

_CUDA_FAILS = (
    (
        r"driver on your system is too old|driver version is insufficient",
        "torch's CUDA is newer than the driver's",
        None,
    ),
    (
        r"Error 802|system not yet initialized",
        "GPUs behind an NVSwitch wait for NVIDIA's fabric manager",
        "sudo systemctl enable --now nvidia-fabricmanager (of the driver's own version)",
    ),
    (
        r"Error 804|forward compatibility was attempted",
        "a CUDA compatibility library is loaded that this kind of GPU doesn't take",
        "remove CUDA's compat folder from LD_LIBRARY_PATH (a container's /usr/local/cuda/compat)",
    ),
    (
        r"Error 803|unsupported display driver",
        "the driver's library is of another version than its kernel module",
        "sudo reboot",
    ),
    (
        r"Error 46|busy or unavailable",
        "another process holds the GPU alone",
        "sudo nvidia-smi -c 0, or end that process",
    ),
    (
        r"unknown error|Error 999",
        "the driver's device files are stale, often after a suspend",
        "sudo nvidia-modprobe -u -c 0, or sudo reboot",
    ),
)
"""What CUDA says, what it means, and what helps; without a fix another build of torch does."""


def cuda(need: Need) -> Finding:
    """torch on each GPU: CUDA starts, the GPU's architecture is compiled in, a product is right."""
    if torch.version.cuda is None:
        return skip("torch is a build for CPUs; see torch")
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
            reason = "torch.cuda.is_available() is False"
        except Exception as error:  # whatever a driver can fail with
            reason = first_line(error)
        return _cuda_failed(reason) if has_gpu() else skip("no NVIDIA GPU here")
    built = torch.cuda.get_arch_list()
    found = []
    for device in cuda_devices():
        capability = torch.cuda.get_device_capability(device)
        if not _is_built_for(capability, built):
            older = capability < (7, 5)
            found.append(
                fail(
                    f"found {device} of sm_{capability[0]}{capability[1]} and torch {torch.__version__} for "
                    f"{', '.join(built)}; need it compiled in",
                    "torch left old GPUs out" if older else "this GPU is newer than that build",
                    install_torch(driver_cuda(), capability),
                )
            )
            continue
        draw, dtype = torch.Generator().manual_seed(0), run_dtype(device)
        a, b = (torch.randn(128, 128, generator=draw).to(dtype) for _ in range(2))
        try:
            trials = [Trial("a matrix product", a.to(device) @ b.to(device), a.double() @ b.double())]
        except RuntimeError as error:
            found.append(_cuda_failed(f"{device}: {first_line(error)}"))
            continue
        memory = "sudo nvidia-smi -q -d ECC, and let that GPU be exchanged"
        found.append(judged(f"a matrix product in {str(dtype).removeprefix('torch.')} is", [(device, trials)], memory))
    return together(found)


def _is_built_for(capability: tuple[int, int], built: Iterable[str]) -> bool:
    """Binary code runs on the same major version with the same minor one or a higher; PTX on all later ones."""
    for name in built:
        if found := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name):
            major, minor = int(found[2]), int(found[3])
            if found[4] == "a":
                fits = (major, minor) == capability
            elif found[1] == "sm":
                fits = major == capability[0] and minor <= capability[1]
            else:
                fits = (major, minor) <= capability
            if fits:
                return True
    return False


def _cuda_failed(reason: str) -> Finding:
    for pattern, why, fix in _CUDA_FAILS:
        if re.search(pattern, reason):
            return fail(f"found that CUDA doesn't start ({reason}), need it", why, fix or install_torch(driver_cuda()))
    fix = "sudo reboot" if not in_container() else "start the container again, with --gpus all"
    return fail(f"found that CUDA doesn't start ({reason}), need it", "nothing is computed on the GPU", fix)


def compile(need: Need) -> Finding:
    """triton, and a function that torch.compile makes of a Python one, forward and backward, on a GPU."""
    gpus = cuda_devices()
    if not gpus:
        return skip("no NVIDIA GPU here, and nothing is compiled for a CPU")
    return _compiled(gpus[0])


def _compiled(device: torch.device) -> Finding:
    why = "flex_attention and the fast engine are compiled; all else works without"
    try:
        import triton  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return warn("found no triton, need it", why, pip_install("triton"))

    def function(x: Tensor) -> Tensor:
        return torch.nn.functional.silu(x) * x.square().mean(-1, keepdim=True)

    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 128, generator=draw).to(device)
    results = []
    try:
        for one in (torch.compile(function, dynamic=False), lambda y: function(y.double())):
            y = x.clone().requires_grad_()
            out = one(y)
            out.sum().backward()
            assert y.grad is not None
            results.append((out, y.grad))
    except Exception as error:  # whatever a compiler can fail with
        reason = " ".join(str(error).split())
        if "C compiler" in reason or "gcc" in reason:
            return warn("found no C compiler, need one", why, "sudo apt install gcc (or set CC to a compiler)")
        if "Python.h" in reason:
            return warn("found no Python.h, need it", why, "sudo apt install python3-dev")
        return warn(
            f"found that compiling fails ({first_line(error)[:200]})",
            why,
            pip_install(TORCH, "triton", options="--upgrade"),
        )
    (out, gradient), (exact, exact_gradient) = results
    trials = [Trial("a compiled function", out, exact), Trial("its gradient", gradient, exact_gradient)]
    return judged(
        f"triton {triton.__version__}, a compiled function is", [(device, trials)], pip_install(TORCH, "triton")
    )
