"""NVIDIA GPUs as the machine, the driver and `nvidia-smi` show them, and torch's build beside them. No torch."""

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lorakit.core.doctor.finding import (
    Finding,
    Need,
    fail,
    gib,
    in_container,
    install_torch,
    is_wsl,
    ok,
    skip,
    together,
    update_driver,
    warn,
)
from lorakit.core.environment import gpus_are_hidden, visible_gpus

_PCI = Path("/sys/bus/pci/devices")
_DEVICES = Path("/dev")
_DRIVER = Path("/proc/driver/nvidia/version")
_NVIDIA, _DISPLAYS = "0x10de", ("0x0300", "0x0302")  # PCI's vendor, and classes of graphics and compute cards
_SECONDS = 20
_SEE_DRIVER = "lorakit doctor --only driver"
_CAPABILITIES = "start the container with -e NVIDIA_DRIVER_CAPABILITIES=compute,utility"

_ABILITIES = (
    ("fp16 tensor cores", (7, 0)),
    ("int8 tensor cores", (7, 5)),
    ("bf16", (8, 0)),
    ("flash attention", (8, 0)),
    ("fp8", (8, 9)),
)
"""What a compute capability and all above it can do (CUDA C++ Programming Guide, compute capabilities; flash attention
by torch's kernels)."""

_CUDA_OF_DRIVER = ((580, 13), (525, 12), (450, 11))
"""The first driver of each major version of CUDA (CUDA Toolkit release notes, minor version compatibility)."""


def cards() -> int:
    """NVIDIA cards on the PCI bus, with a driver or without one (Linux)."""
    found = 0
    for device in _PCI.glob("*"):
        try:
            vendor, kind = ((device / name).read_text(encoding="ascii").strip() for name in ("vendor", "class"))
        except (OSError, ValueError):
            continue
        found += vendor == _NVIDIA and kind[:6] in _DISPLAYS
    return found


def has_gpu() -> bool:
    """Whether this process could open an NVIDIA GPU: the files that a driver makes are there. A container without GPUs
    has none of them."""
    files = any(re.fullmatch(r"nvidia\d+", path.name) for path in _DEVICES.glob("nvidia*"))
    return files or ((_DEVICES / "dxg").exists() and libcuda_version() is not None)


def libcuda_version() -> tuple[int, int] | None:
    """The CUDA version of the driver's library, as programs load it; None where none loads. No GPU is touched."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        number = ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return number.value // 1000, number.value % 1000 // 10


def driver_version() -> str | None:
    """The version of the driver that is loaded, such as 580.65.06."""
    try:
        found = re.search(r"Kernel Module\D*? (\d+\.[\d.]+)", _DRIVER.read_text(encoding="utf-8"))
        if found:
            return found[1]
    except OSError:
        pass
    try:
        rows = smi("--query-gpu=driver_version")
    except SmiFailed:
        return None
    return rows[0][0] if rows else None


def driver_cuda() -> int | None:
    """The newest major version of CUDA whose programs this machine's driver runs: as its library says, else by the
    driver's own version."""
    if (version := libcuda_version()) is not None:
        return version[0]
    if (text := driver_version()) is None:
        return None
    number = int(text.split(".")[0])
    return next((cuda for first, cuda in _CUDA_OF_DRIVER if number >= first), 10)


class SmiFailed(Exception):
    """`nvidia-smi` isn't there, or says why it doesn't answer."""


def smi(*query: str) -> list[list[str]]:
    """What `nvidia-smi` answers to a query, as rows of cells; without a query, its words line by line.

    Raises SmiFailed.
    """
    path = shutil.which("nvidia-smi")
    if path is None:
        raise SmiFailed("there is no nvidia-smi")
    is_table = bool(query) and query[0].startswith("--query")
    command = [path, *query, *(["--format=csv,noheader,nounits"] if is_table else [])]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise SmiFailed(f"nvidia-smi gives no answer in {_SECONDS} s") from None
    except OSError as error:
        raise SmiFailed(f"nvidia-smi can't be run ({error.strerror})") from None
    lines = ran.stdout.splitlines()
    if ran.returncode:
        raise SmiFailed(" ".join((ran.stdout + ran.stderr).split()) or f"nvidia-smi ended with code {ran.returncode}")
    return [[cell.strip() for cell in line.split(",")] if is_table else [line] for line in lines if line.strip()]


def driver(need: Need) -> Finding:
    """A card, a driver that is loaded and answers, and its library."""
    if (nothing := _without_gpus(need)) is not None:
        return nothing
    why = "without it the GPU computes nothing"
    if not is_wsl() and driver_version() is None and not has_gpu():
        found = f"found {cards()} NVIDIA card{'s' if cards() > 1 else ''} and no driver that is loaded; need one"
        return _lacking(need, found, why, update_driver())
    if not has_gpu():
        if in_container():
            fix = "start the container with its GPUs: docker run --gpus all …, podman run --device nvidia.com/gpu=all …"
        else:
            fix = "sudo nvidia-modprobe -c 0 -u"
        return _lacking(need, f"found driver {driver_version()} and no /dev/nvidia0, need one", why, fix)
    try:
        smi()
    except SmiFailed as error:
        return _smi_failed(str(error))
    if (version := libcuda_version()) is None:
        fix = _CAPABILITIES if in_container() else "sudo ldconfig"
        return fail(f"found driver {driver_version()} and no libcuda.so.1 that loads, need it", "torch opens it", fix)
    return ok(f"driver {driver_version()}, CUDA {version[0]}.{version[1]}")


def _without_gpus(need: Need) -> Finding | None:
    """The answer of every check of GPUs where there are none; None where there are."""
    if gpus_are_hidden():
        found, means, fix = "CUDA_VISIBLE_DEVICES that hides every GPU", "", "unset CUDA_VISIBLE_DEVICES"
    elif has_gpu() or cards() or driver_version() is not None:
        return None
    else:
        found, means, fix = "no NVIDIA GPU here", ": lorakit computes on the CPU", ""
    if need.gpu_bytes:
        where = f"{len(need.gpu_bytes)} GPU{'s' if len(need.gpu_bytes) > 1 else ''}"
        return fail(f"found {found}, need {where}", "the plan was made for them", fix or "run it where they are")
    return skip(f"{found}{means}", fix)


def _lacking(need: Need, detail: str, why: str, fix: str) -> Finding:
    return (fail if need.gpu_bytes else warn)(detail, why, fix)


def _smi_failed(said: str) -> Finding:
    why = "the driver is asked for free memory by it, and plans are made of the answer"
    if "there is no nvidia-smi" in said:
        if is_wsl():
            fix = 'export PATH="$PATH:/usr/lib/wsl/lib"'
        elif in_container():
            fix = _CAPABILITIES
        else:
            fix = "install the package of your driver that holds nvidia-smi (Ubuntu: nvidia-utils)"
        return warn("found a GPU and no nvidia-smi on PATH, need it", why, fix)
    if "version mismatch" in said:
        why, fix = "the driver was updated, and the old one is still loaded", "sudo reboot"
    elif "couldn't communicate" in said or "No devices were found" in said:
        why = "the driver isn't loaded, or the card fell off the bus (`sudo dmesg | grep -i nvrm` says)"
        fix = update_driver()
    elif "gives no answer" in said:
        fix = "sudo dmesg | grep -i xid, and restart the machine"
    else:
        fix = update_driver()
    return fail(f"found {said!r}, need an answer", why, fix)


# torch's build, without importing it


@dataclass(frozen=True)
class Build:
    """A build of torch: its version, and the CUDA or ROCm that it was made for."""

    version: str
    cuda: str | None
    hip: str | None


def torch_build() -> Build | None:
    """The build of the installed torch, read from its version.py; None where there is none."""
    spec = importlib.util.find_spec("torch") if "torch" not in sys.modules else sys.modules["torch"].__spec__
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = dict(re.findall(r"^(__version__|cuda|hip)\b[^=]*=\s*['\"]([^'\"]+)", text, re.MULTILINE))
    return Build(found.get("__version__", "of an unknown version"), found.get("cuda"), found.get("hip"))


def torch(need: Need) -> Finding:
    """torch's build against this machine's GPU and driver."""
    build = torch_build()
    if build is None:
        return skip("torch isn't installed; see packages")
    if build.hip:
        return warn(
            f"found torch {build.version}, a build for ROCm; lorakit is made for CUDA",
            "nobody has tried lorakit with it",
            "use it at your own risk, or a machine with an NVIDIA GPU",
        )
    if gpus_are_hidden() or not has_gpu():
        return ok(f"{build.version}, {f'for CUDA {build.cuda}' if build.cuda else 'for CPUs'}; no GPU to compute on")
    runs = driver_cuda()
    if build.cuda is None:
        return fail(
            f"found torch {build.version}, a build for CPUs, beside an NVIDIA GPU; need a build for CUDA",
            "everything would run on the CPU, a hundred times slower",
            f"{install_torch(runs)} (to use the CPU all the same: export CUDA_VISIBLE_DEVICES=)",
        )
    if runs is not None and int(build.cuda.split(".")[0]) > runs:
        newest = ".".join(map(str, libcuda_version() or (runs,)))
        return fail(
            f"found torch {build.version} for CUDA {build.cuda} and driver {driver_version()}, which runs CUDA "
            f"{newest}; need the same major version, or an older one",
            "torch would find no GPU",
            f"{update_driver()}; or: {install_torch(runs)}",
        )
    return ok(f"{build.version} for CUDA {build.cuda}")


# What each GPU is and has


@dataclass(frozen=True)
class Gpu:
    """One GPU that CUDA shows, as `nvidia-smi` describes it; None is what it doesn't say."""

    uuid: str
    name: str
    total_bytes: int | None
    free_bytes: int | None
    capability: tuple[int, int] | None
    watts: float | None
    default_watts: float | None
    generation: int | None
    lanes: int | None

    @property
    def abilities(self) -> list[str]:
        return [name for name, first in _ABILITIES if self.capability is not None and self.capability >= first]


_FIELDS = (
    *("uuid", "name", "memory.total", "memory.free", "power.limit", "power.default_limit"),
    *("pcie.link.gen.max", "pcie.link.width.current", "compute_cap"),
)


def visible() -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES shows, in its order. Raises SmiFailed."""
    fields: tuple[str, ...] = _FIELDS
    try:
        rows = smi(f"--query-gpu={','.join(fields)}")
    except SmiFailed as error:
        if "compute_cap" not in str(error):
            raise
        fields = _FIELDS[:-1]  # drivers before 510 don't know the last
        rows = smi(f"--query-gpu={','.join(fields)}")
    found = [_gpu(dict(zip(fields, row, strict=False))) for row in rows]
    return [found[number] for number in visible_gpus(len(found))]


def _gpu(cells: dict[str, str]) -> Gpu:
    def number(name: str) -> float | None:
        try:
            return float(cells.get(name, ""))
        except ValueError:  # "[N/A]"
            return None

    def whole(name: str, unit: int = 1) -> int | None:
        found = number(name)
        return None if found is None else int(found * unit)

    parts = re.fullmatch(r"(\d+)\.(\d+)", cells.get("compute_cap", ""))
    return Gpu(
        uuid=cells.get("uuid", ""),
        name=cells.get("name", ""),
        total_bytes=whole("memory.total", 2**20),
        free_bytes=whole("memory.free", 2**20),
        capability=(int(parts[1]), int(parts[2])) if parts else None,
        watts=number("power.limit"),
        default_watts=number("power.default_limit"),
        generation=whole("pcie.link.gen.max"),
        lanes=whole("pcie.link.width.current"),
    )


def gpus(need: Need) -> Finding:
    """Each GPU: what it is, what it can do, how much of its memory is free and who holds the rest, how it is fed and
    linked; with a plan, whether that fits."""
    if (nothing := _without_gpus(need)) is not None:
        return nothing
    try:
        found, holders = visible(), _holders()
    except SmiFailed as error:
        said = f"nvidia-smi doesn't answer ({error}); see driver"
        return fail(f"found that {said}", "the plan was made for GPUs", _SEE_DRIVER) if need.gpu_bytes else skip(said)
    if not found:
        return _lacking(need, "found no GPU that nvidia-smi shows, need one", "all else is slow", _SEE_DRIVER)
    answers = [_judged(number, gpu, holders.get(gpu.uuid, []), need) for number, gpu in enumerate(found)]
    if (lacking := [number for number in need.gpu_bytes if number >= len(found)]) != []:
        names = ", ".join(f"cuda:{number}" for number in lacking)
        plan = "the plan was made for more GPUs"
        answers.append(fail(f"found {len(found)} GPUs, need {names} too", plan, "plan for these: lorakit plan-devices"))
    answer = together(answers)
    links = _links(len(found))
    return Finding(answer.status, "; ".join(filter(None, [answer.detail, links])), answer.why, answer.fix)


def _judged(number: int, gpu: Gpu, holders: list[str], need: Need) -> Finding:
    free, total, wanted = gpu.free_bytes, gpu.total_bytes, need.gpu_bytes.get(number, 0)
    held = f", held by {', '.join(holders)}" if holders else ""
    memory = f", {gib(free)} of {gib(total)} free{held}" if free is not None and total is not None else ""
    cap = f", compute capability {gpu.capability[0]}.{gpu.capability[1]}" if gpu.capability else ""
    able = f" ({', '.join(gpu.abilities) or 'no tensor cores'})" if gpu.capability else ""
    fed = f", {gpu.watts:.0f} W" if gpu.watts is not None else ""
    bus = f", PCIe {gpu.generation}.0 x{gpu.lanes}" if gpu.generation and gpu.lanes else ""
    name = f"cuda:{number} {gpu.name}"
    said = f"{name}{cap}{able}{memory}{fed}{bus}"
    fix = f"end what holds it: {', '.join(holders)}" if holders else "plan for what is free: lorakit plan-devices"
    if free is not None and free < wanted:
        return fail(f"found {said}; need {gib(wanted)} free", "the plan doesn't fit beside that", fix)
    if gpu.capability is not None and gpu.capability < (5, 0):
        return fail(f"found {said}; need compute capability 5.0", "no build of torch runs on it", "use a newer GPU")
    if free is not None and total is not None and free < total * 0.8 and holders:
        return warn(f"found {said}", "only what is free can be used", fix)
    if gpu.watts is not None and gpu.default_watts is not None and gpu.watts < gpu.default_watts * 0.95:
        usual = f"{gpu.default_watts:.0f} W"
        return warn(
            f"found {said}; {usual} is usual",
            "it is slowed down",
            f"sudo nvidia-smi -i {number} -pl {gpu.default_watts:.0f}",
        )
    return ok(said)


def _holders() -> dict[str, list[str]]:
    """Which processes hold memory, by a GPU's uuid."""
    found: dict[str, list[str]] = {}
    for row in smi("--query-compute-apps=gpu_uuid,pid,process_name,used_memory"):
        if len(row) >= 4:
            size = f" ({int(row[-1]) / 1024:.1f} GiB)" if row[-1].isdigit() else ""
            found.setdefault(row[0], []).append(f"pid {row[1]} {Path(row[2]).name}{size}")
    return found


def _links(count: int) -> str:
    """How the GPUs reach each other, by `nvidia-smi topo -m`; nothing where one is alone or it doesn't say."""
    if count < 2:
        return ""
    try:
        lines = [line for (line,) in smi("topo", "-m")]
    except (SmiFailed, ValueError):
        return ""
    rows = [re.sub(r"\x1b\[\d*m", "", line).split() for line in lines]
    kinds = {cell for row in rows if row and re.fullmatch(r"GPU\d+", row[0]) for cell in row[1 : 1 + count]} - {"X"}
    return f"linked by {' and '.join(_link_words(kinds))}" if kinds else ""


def _link_words(kinds: Iterable[str]) -> list[str]:
    nvlinks = {kind for kind in kinds if re.fullmatch(r"NV\d+", kind)}
    others = {"PIX": "PCIe", "PXB": "PCIe", "PHB": "PCIe", "NODE": "PCIe through the CPU", "SYS": "PCIe across CPUs"}
    words = [f"NVLink ({', '.join(sorted(nvlinks))})"] if nvlinks else []
    return words + sorted({others.get(kind, kind) for kind in kinds if kind not in nvlinks})
