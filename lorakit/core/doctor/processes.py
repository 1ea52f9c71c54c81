"""Two processes that add up a tensor, as those of a parallel run do."""

import multiprocessing
import socket
import tempfile
from datetime import timedelta
from typing import Any

import torch

from lorakit.core.doctor.finding import TORCH, Finding, Need, fail, in_container, ok, pip_install, skip
from lorakit.core.doctor.trials import WRONG_NUMBERS, Trial, cuda_devices
from lorakit.core.environment import variables
from lorakit.core.errors import first_line


def gloo(need: Need) -> Finding:
    """Two processes on the CPU that add up a tensor."""
    return _reduced("gloo")


def nccl(need: Need) -> Finding:
    """Two processes on a GPU each that add up a tensor."""
    count = len(cuda_devices())
    return _reduced("nccl") if count > 1 else skip(f"{count} NVIDIA GPU{'s' * (count != 1)} here, and it takes two")


def _reduced(backend: str) -> Finding:
    if not torch.distributed.is_available():
        return fail("found a torch without torch.distributed, need it", "--parallel needs it", pip_install(TORCH))
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        answers = context.Queue()
        other = context.Process(target=_answer, args=(1, backend, folder, answers), daemon=True)
        other.start()
        first = _rank(0, backend, folder)
        other.join(_MEETING_SECONDS)
        second = answers.get(timeout=1) if not other.exitcode and other.exitcode is not None else "it ended"
    if first is None and second is None:
        return ok(f"two processes add up right by {backend}")
    reason = first or second
    why = "--parallel with several processes sums gradients by it"
    if "off by" in str(reason):
        return fail(f"found that {reason}", WRONG_NUMBERS, pip_install(TORCH, options="--force-reinstall"))
    named = variables("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    said = f"found that two processes don't find together by {backend} ({reason})"
    if named:
        listed = ", ".join(f"{name}={value}" for name, value in named.items())
        return fail(f"{said}, with {listed}", why, f"unset {' '.join(named)}, or name a network that `ip link` shows")
    if backend == "gloo":
        fix = f"export GLOO_SOCKET_IFNAME=lo, or add {socket.gethostname()} to /etc/hosts"
    else:
        fix = "NCCL_DEBUG=INFO lorakit doctor --only nccl says why; NCCL_P2P_DISABLE=1 goes without direct access"
        fix = f"docker run --ipc host …; {fix}" if in_container() else fix
    return fail(said, why, fix)


_MEETING_SECONDS = 20


def _answer(rank: int, backend: str, folder: str, answers: Any) -> None:
    answers.put(_rank(rank, backend, folder))


def _rank(rank: int, backend: str, folder: str) -> str | None:
    """One of two processes: adds its own numbers to the other's. Returns what is wrong."""
    import torch.distributed as dist

    try:
        store = dist.FileStore(f"{folder}/store", 2)  # type: ignore[attr-defined]
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=2, timeout=timedelta(seconds=_MEETING_SECONDS)
        )
        device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        draw = torch.Generator().manual_seed(0)
        both = [torch.randn(1024, generator=draw) for _ in range(2)]
        mine = both[rank].to(device, copy=True)
        dist.all_reduce(mine)
        wrong = Trial(f"{backend}'s sum", mine, both[0].double() + both[1].double()).wrong
        dist.destroy_process_group()
        return wrong
    except Exception as error:  # whatever a network can fail with
        return first_line(error)[:200]
