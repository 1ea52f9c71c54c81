"""This machine and its environment variables. The only file of the core that reads or sets one.

Every command line imports it, Tab and `--help` too: what few functions need is imported by them.
"""

import logging
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lorakit.core.errors import EnvironmentUnusable

_LLAMA = "transformers/models/llama/modeling_llama.py"


def usable_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_thread_for_tokenizers() -> None:
    """Keep the `tokenizers` library to one thread, for one of several worker processes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def one_thread_for_products() -> None:
    """Keep each of numpy's matrix products to one thread, for who computes several at once; before numpy's import."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@dataclass(frozen=True)
class Worker:
    """This process's place in a parallel run: its number among all of them, and among those of this machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_MEETING = ("MASTER_ADDR", "MASTER_PORT")


def worker() -> Worker | None:
    """This process's place in a parallel run, as torchrun, `accelerate launch` and lorakit's own launcher say it in the
    environment; None where nothing of it is there.

    Raises EnvironmentUnusable where only a part is there, or the numbers can't be.
    """
    found = {name: value for name in (*_PLACE, *_MEETING) if (value := os.environ.get(name))}
    if not found.keys() & set(_PLACE):  # where ranks meet says nothing alone: some clusters always set it
        return None
    shown = " ".join(f"{name}={value}" for name, value in found.items())
    without = f"env -u {' -u '.join(found)} lorakit …"
    hint = f"let lorakit itself, torchrun or accelerate launch start it, or start it alone: `{without}`"
    if missing := [name for name in (*_PLACE, *_MEETING) if name not in found]:
        raise EnvironmentUnusable(f"found {shown} in the environment, need {', '.join(missing)} beside it", hint)
    numbers = [int(found[name]) if re.fullmatch(r"[0-9]{1,9}", found[name]) else -1 for name in _PLACE]
    rank, world_size, local_rank, local_world_size = numbers
    if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
        raise EnvironmentUnusable(f"found {shown} in the environment, need ranks below their world sizes", hint)
    return Worker(*numbers)


def ready_for_workers(num_processes: int) -> None:
    """What the processes of a parallel run inherit, unless the user says otherwise. Before torch is imported, which
    reads its log level then."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(usable_cores() // num_processes, 1)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # c10d warns of every attempt to reach another machine
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ""  # none: they are the launcher's


def stop_with_parent() -> None:
    """Have the kernel send this process SIGTERM when the one that started it dies, however it does (Linux only)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, prctl(2)


def no_kernels_from_the_hub() -> None:
    """Keep bitsandbytes and transformers from downloading compiled kernels, as they do where the package `kernels` is
    installed, and bitsandbytes from advising to install it. At the start of every process of lorakit's, before either
    is imported: peft and accelerate import bitsandbytes too."""
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # as if it weren't installed
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def be_verbose() -> None:
    """Have libraries say what they do, on stderr, and a bug be shown where it is; processes that this one starts say so
    too where they are told."""
    os.environ["LORAKIT_DEBUG"] = "1"
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")


def variables(*names: str) -> dict[str, str]:
    """Those of these environment variables that are set."""
    return {name: value for name in names if (value := os.environ.get(name))}


def secrets() -> list[str]:
    """The values of environment variables that are secrets by their names."""
    secret = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|(^|_)API_?KEY|(^|_)KEY$", re.IGNORECASE)
    return [value for name, value in os.environ.items() if secret.search(name) and len(value) >= 8]


def gpus_are_hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES shows no GPU at all."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and re.match(r"\s*(\d|GPU-|MIG-)", visible) is None


def quiet_profiler() -> None:
    """Keep torch's profiler from printing a line of its own at every start and stop."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def patched_transformers() -> str | None:
    """Whether someone has edited the Llama source of the installed transformers by hand (an old recipe for flash
    attention), and how to undo it: the file's hash beside the one that was recorded when it was installed."""
    import base64
    import hashlib
    import importlib.metadata

    try:
        distribution = importlib.metadata.distribution("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None
    recorded = next((file for file in distribution.files or () if file.as_posix() == _LLAMA), None)
    if recorded is None or recorded.hash is None or recorded.hash.mode != "sha256":
        return None
    path = Path(str(recorded.locate()))
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    if digest == recorded.hash.value:
        return None
    how = "calls scaled_dot_product_attention itself" if b"scaled_dot_product_attention(" in content else "was edited"
    return (
        f"{path} isn't the file that was installed: it {how}; attention in it may lose the KV cache or the fast "
        f"kernel. To undo it: pip install --force-reinstall --no-deps transformers=={distribution.version}"
    )


def let_gpu_memory_grow() -> None:
    """Have torch grow its pieces of GPU memory instead of rounding large ones up, unless the user says otherwise: what
    is allocated is then what was asked for, and less lies idle. Before torch's first allocation on a GPU."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # cuda:0 is then the first that nvidia-smi shows
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name, which torch asks for too
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def make_cublas_deterministic() -> None:
    """Have cuBLAS use workspaces by which its sums always run in the same order. Before its first call."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def cache_folder() -> Path:
    """Where everything cached lies: `$LORAKIT_CACHE`, else the platform's cache folder."""
    if own := os.environ.get("LORAKIT_CACHE"):
        return Path(own).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lorakit"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "lorakit"


def tracking_project(tracker: str) -> str:
    """The project that a tracker's runs belong to: `$WANDB_PROJECT`, `$TRACKIO_PROJECT`, else lorakit."""
    return os.environ.get(f"{tracker.upper()}_PROJECT") or "lorakit"


def free_gpu_bytes() -> list[int]:
    """The free memory of each NVIDIA GPU that CUDA_VISIBLE_DEVICES shows, as the driver says; none where there is no
    driver. No torch."""
    import subprocess

    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        found = [int(line) * 2**20 for line in answer.split()]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
    return [found[number] for number in visible_gpus(len(found))]


def visible_gpus(count: int) -> list[int]:
    """Which of the driver's GPUs CUDA_VISIBLE_DEVICES shows, in its order; all where it names them otherwise."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or re.match(r"\s*(GPU|MIG)-", visible):
        return list(range(count))
    shown = []
    for part in visible.split(","):  # as CUDA reads it: up to the first that is none
        if not part.strip().isdigit() or int(part) >= count:
            break
        shown.append(int(part))
    return shown


def free_ram_bytes() -> int:
    """The memory that a new process may take without swapping: of the machine, or of a container with a limit; where
    only the whole is known, that."""
    limit = memory_limit()
    room = limit.bytes - limit.used_bytes if limit is not None else sys.maxsize
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return min(int(lines["MemAvailable"].split()[0]) * 1024, room)
    except (OSError, KeyError, ValueError):
        return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), room)


class MemoryLimit(NamedTuple):
    """What a control group may take, and what it takes of it without what the kernel gives back."""

    bytes: int
    used_bytes: int


_CGROUP = Path("/sys/fs/cgroup")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
_UNLIMITED_BYTES = 2**60  # version 1 says almost 2**63 where there is none


def memory_limit() -> MemoryLimit | None:
    """The memory limit of the container or service that this process runs in (Linux control groups, version 2, else 1);
    None where there is none. Of nested ones, the tightest."""
    found = []
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()]
    except OSError:
        groups = []
    paths = {name: path for _, names, path in groups for name in names.split(",")}
    # inside of a container the own group is mounted as the root, and the path may name one outside
    for root, path, names in (
        (_CGROUP, paths.get("", "/"), _VERSION_2),
        (_CGROUP / "memory", paths.get("memory", "/"), _VERSION_1),
    ):
        own = root / path.lstrip("/")
        for group in (own, *own.parents):
            if group.is_relative_to(root) and (limit := _limit_of(group, *names)) is not None:
                found.append(limit)
    return min(found, key=lambda limit: limit.bytes - limit.used_bytes, default=None)


def _limit_of(group: Path, most: str, used: str, given_back: str) -> MemoryLimit | None:
    try:
        limit_bytes = int((group / most).read_text(encoding="ascii"))
        used_bytes = int((group / used).read_text(encoding="ascii"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        used_bytes -= int(stat.get(given_back, 0))
    except (OSError, ValueError):  # "max" where there is no limit
        return None
    return MemoryLimit(limit_bytes, max(used_bytes, 0)) if limit_bytes < _UNLIMITED_BYTES else None
