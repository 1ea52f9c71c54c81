"""What a check is asked and what it answers, and the commands that answers name. No torch."""

import importlib.util
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lorakit.core.errors import EnvironmentUnusable

Status = Literal["ok", "warn", "fail", "skip"]
_WORST_FIRST: tuple[Status, ...] = ("fail", "warn", "ok", "skip")

TORCH = "torch>=2.11,<2.14"
"""What pyproject.toml asks for, in the commands that install another build of it; held equal by a test."""
_WHEELS = "https://download.pytorch.org/whl"


NOT_INSTALLED = "it isn't installed"
"""Why a check fails that `packages` has the right words for."""


@dataclass(frozen=True)
class Finding:
    """The answer of one check. Of what is wrong, `detail` says what was found and what is needed, `why` what it costs,
    and `fix` is the command, or the change, with which it is right."""

    status: Status
    detail: str
    why: str = ""
    fix: str = ""

    def as_error(self, name: str) -> EnvironmentUnusable:
        """The same words as a command's own failure."""
        return EnvironmentUnusable(f"{name}: {self.detail}", self.fix)


def ok(detail: str) -> Finding:
    """Nothing is wrong."""
    return Finding("ok", detail)


def skip(detail: str, fix: str = "") -> Finding:
    """There is nothing to check here; `fix` is what would change that."""
    return Finding("skip", detail, "", fix)


def warn(detail: str, why: str, fix: str) -> Finding:
    """Slow, or not as it looks; lorakit works all the same."""
    return Finding("warn", detail, why, fix)


def fail(detail: str, why: str, fix: str) -> Finding:
    """lorakit, or the part of it that is checked, doesn't work."""
    return Finding("fail", detail, why, fix)


def together(findings: Iterable[Finding]) -> Finding:
    """Several answers as one: the worst status, with the words of all that are wrong, or else of all."""
    found = sorted(findings, key=lambda one: _WORST_FIRST.index(one.status))
    worst = found[0].status
    said = [one for one in found if one.status in ("fail", "warn")] or [one for one in found if one.status == worst]
    words = [dict.fromkeys(filter(None, part)) for part in zip(*((o.detail, o.why, o.fix) for o in said), strict=True)]
    detail, why, fix = ("; ".join(part) for part in words)
    return Finding(worst, detail, why, fix)


@dataclass(frozen=True)
class Need:
    """What a job needs of this machine, as far as it is known beforehand. Empty: all that lorakit can use is checked,
    and nothing has to fit."""

    job: Literal["train", "merge"] | None = None
    on_cpu: bool = False
    """Whether no GPU takes part."""
    quantize: str | None = None
    optimizer: str | None = None
    parallel: str | None = None
    gpu_bytes: Mapping[int, int] = field(default_factory=dict)
    """By a GPU's number, what it must have free."""
    ram_bytes: int = 0
    disk_bytes: int = 0
    """What the output takes, in the working folder."""


def pip_install(*requirements: str, options: str = "") -> str:
    """The command that installs into the environment of this very interpreter, which the `pip` of a shell may not."""
    python = shlex.quote(sys.executable or "python3")
    pip = f"{python} -m pip install" if importlib.util.find_spec("pip") else f"uv pip install --python {python}"
    return " ".join([pip, *([options] if options else []), *map(shlex.quote, requirements)])


def pip_uninstall(*names: str) -> str:
    """The command that removes packages from this very interpreter."""
    python = shlex.quote(sys.executable or "python3")
    pip = f"{python} -m pip uninstall -y" if importlib.util.find_spec("pip") else f"uv pip uninstall --python {python}"
    return " ".join([pip, *names])


def install_torch(driver_cuda: int | None, capability: tuple[int, int] | None = None) -> str:
    """The command that installs the build of torch for a driver's CUDA version and a GPU, or what is needed first.

    By PyTorch's support matrix (RELEASE.md): builds for CUDA 12.6 hold compute capabilities 5.0 to 9.0, those for 13.0
    hold 7.5 to 12.0. A driver runs builds of its own major version of CUDA and of older ones.
    """
    old, new = capability is not None and capability < (7, 5), capability is not None and capability >= (10, 0)
    if driver_cuda is not None and (driver_cuda < 12 or (driver_cuda == 12 and new)):
        return f"{update_driver()}, then: {install_torch(13, capability)}"
    build = "cu126" if old or driver_cuda == 12 else "cu130"
    return pip_install(TORCH, options=f"--force-reinstall --index-url {_WHEELS}/{build}")


def update_driver() -> str:
    """How this platform gets a newer NVIDIA driver."""
    if is_wsl():
        return "update the NVIDIA driver of Windows (nvidia.com/drivers) and run `wsl --shutdown` there; none in WSL"
    if Path("/usr/bin/ubuntu-drivers").exists():
        return "sudo ubuntu-drivers install && sudo reboot"
    return "install NVIDIA's newest driver for your distribution (nvidia.com/drivers) and restart"


def is_wsl() -> bool:
    """Whether this is Linux inside of Windows."""
    try:
        return "microsoft" in Path("/proc/sys/kernel/osrelease").read_text(encoding="utf-8").lower()
    except OSError:
        return False


def in_container() -> bool:
    """Whether this is a container: docker and podman leave a file each."""
    return Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()


def gib(size: float) -> str:
    """Bytes as a person reads them."""
    return f"{size / 2**30:.1f} GiB"
