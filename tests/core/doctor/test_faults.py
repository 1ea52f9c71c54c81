"""Broken machines, each made where it really breaks: doctor names cause and fix, and no healthy check turns red.

The fast table runs the checks of facts in this process, on a machine whose files, commands and packages are made up;
the slow one runs real child processes beside broken packages and libraries.
"""

import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import lorakit
from lorakit.core import doctor, environment
from lorakit.core.config import DoctorConfig
from lorakit.core.doctor import CHECKS, Finding, Need, devices, finding, limits, storage
from tests.core.test_hub import Hub, point_at

FACTS = [name for name, check in CHECKS.items() if check.group in ("facts", "storage", "network")]


@dataclass
class Machine:
    """A made-up machine: healthy, with one GPU where `gpu` is called."""

    folder: Path
    patch: pytest.MonkeyPatch

    def __post_init__(self) -> None:
        for name in ("dev", "pci", "bin", "site", "cgroup"):
            (self.folder / name).mkdir(parents=True)
        self.patch.setattr(devices, "_DEVICES", self.folder / "dev")
        self.patch.setattr(devices, "_PCI", self.folder / "pci")
        self.patch.setattr(devices, "_DRIVER", self.folder / "version")
        self.patch.setattr(devices, "libcuda_version", lambda: None)
        for room in (devices, limits, finding):  # neither a container nor WSL, whatever runs the tests
            for question in ("in_container", "is_wsl"):
                self.patch.setattr(room, question, lambda: False)
        self.patch.setattr(environment, "_CGROUP", self.folder / "cgroup")
        self.patch.setattr(storage, "_TRIAL_BYTES", 2**20)
        self.patch.setenv("PATH", f"{self.folder / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin")
        self.patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        self.patch.syspath_prepend(self.folder / "site")
        for name in (*limits._TELLING, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LD_LIBRARY_PATH"):
            self.patch.delenv(name, raising=False)

    def package(self, name: str, version: str, *requires: str) -> None:
        """An installed package by its metadata, before the real one."""
        info = self.folder / "site" / f"{name}-{version}.dist-info"
        info.mkdir()
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {one}" for one in requires)]
        (info / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")

    def torch(self, version: str, cuda: str | None) -> None:
        """The build of torch that is installed."""
        folder = self.folder / "site" / "torch"
        folder.mkdir()
        (folder / "__init__.py").write_text("raise ImportError('nobody should import it for facts')\n")
        (folder / "version.py").write_text(f"__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\nhip = None\n")
        self.patch.delitem(sys.modules, "torch", raising=False)

    def card(self) -> None:
        """An NVIDIA card on the PCI bus."""
        device = self.folder / "pci" / "0000:01:00.0"
        device.mkdir()
        (device / "vendor").write_text("0x10de\n")
        (device / "class").write_text("0x030200\n")

    def driver(self, version: str = "580.65.06", cuda: tuple[int, int] | None = (13, 0)) -> None:
        """A driver that is loaded, and its library."""
        words = f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Sun Jul 27 07:23:15 UTC 2025\n"
        (self.folder / "version").write_text(words)
        self.patch.setattr(devices, "libcuda_version", lambda: cuda)

    def smi(self, answers: str) -> None:
        """A `nvidia-smi` that runs these lines of a shell."""
        path = self.folder / "bin" / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{answers}\n")
        path.chmod(0o755)

    def gpu(self, version: str = "580.65.06", cuda: tuple[int, int] | None = (13, 0), **changed: str) -> None:
        """A whole machine with one H100, of which `changed` cells of nvidia-smi's answer are others."""
        self.card()
        self.driver(version, cuda)
        (self.folder / "dev" / "nvidia0").touch()
        holders = changed.pop("holders", "")
        cells = {
            **{"uuid": "GPU-1", "name": "NVIDIA H100 80GB HBM3", "total": "81559", "free": "81000", "limit": "700.00"},
            **{"default": "700.00", "generation": "5", "lanes": "16", "capability": "9.0"},
            **changed,
        }
        self.smi(
            f'case "$1" in *query-gpu=driver*) echo {version};; *query-gpu*) echo "{", ".join(cells.values())}";; '
            f'*compute-apps*) printf "%s" "{holders}";; *) echo fine;; esac'
        )

    def limit(self, size: int, used: int = 2**20) -> None:
        """A container's memory limit."""
        for name, value in (("memory.max", size), ("memory.current", used), ("memory.stat", "inactive_file 0")):
            (self.folder / "cgroup" / name).write_text(f"{value}\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path / "machine", monkeypatch)


def facts(need: Need | None = None, names: list[Any] = FACTS) -> dict[str, Finding]:
    """Every check of facts, in this process, as the child of doctor runs them."""
    return {name: doctor._answer(name, need or Need()) for name in names}


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Small file systems in memory, mounted for a test; root only."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"tmpfs{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting takes root")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


# Healthy machines


def test_a_healthy_machine_without_a_gpu_is_all_right(machine: Machine) -> None:
    found = facts()
    assert {name for name, one in found.items() if one.status in ("fail", "warn")} == set()
    assert {name for name, one in found.items() if one.status == "skip"} == {"driver", "gpus", "hub"}


def test_a_healthy_machine_with_a_gpu_is_all_right(machine: Machine) -> None:
    machine.gpu()
    machine.torch("2.11.0", "13.0")
    found = facts()
    assert {name for name, one in found.items() if one.status != "ok"} == {"hub"}
    assert found["driver"].detail == "driver 580.65.06, CUDA 13.0"
    assert found["torch"].detail == "2.11.0 for CUDA 13.0"
    for words in ("H100", "9.0", "bf16", "fp8", "int8 tensor cores", "79.1 of 79.6 GiB free", "700 W", "PCIe 5.0 x16"):
        assert words.replace("79.1 of", "79.1 GiB of") in found["gpus"].detail


# The table


def _install_missing(m: Machine) -> None:
    project = 'name = "lorakit"\nrequires-python = ">=3.11"\ndependencies = ["notthere>=1.5", "jinja2>=3.1.6"]\n'
    (m.folder / "pyproject.toml").write_text(f"[project]\n{project}")
    m.patch.setattr(lorakit, "__file__", str(m.folder / "lorakit" / "__init__.py"))


def _new_python(m: Machine) -> None:
    (m.folder / "pyproject.toml").write_text(
        '[project]\nname = "lorakit"\nrequires-python = ">=3.99"\ndependencies = []\n'
    )
    m.patch.setattr(lorakit, "__file__", str(m.folder / "lorakit" / "__init__.py"))


def _patched_llama(m: Machine) -> None:
    m.package("transformers", "5.24.0")
    place = m.folder / "site" / "transformers" / "models" / "llama"
    place.mkdir(parents=True)
    (place / "modeling_llama.py").write_text("out = scaled_dot_product_attention(q, k, v)")
    record = "transformers/models/llama/modeling_llama.py,sha256=AAAA,12\n"
    (m.folder / "site" / "transformers-5.24.0.dist-info" / "RECORD").write_text(record)


def _other_pip(m: Machine) -> None:
    (m.folder / "bin" / "pip").write_text("#!/opt/other/bin/python3.12\n")
    (m.folder / "bin" / "pip").chmod(0o755)


def _gpu_and_cpu_torch(m: Machine) -> None:
    m.gpu()
    m.torch("2.13.0+cpu", None)


def _cpu_torch_and_older_driver(m: Machine) -> None:
    m.gpu("535.129.03", (12, 2))
    m.torch("2.13.0+cpu", None)


def _driver_too_old(m: Machine) -> None:
    m.gpu("535.129.03", (12, 2))
    m.torch("2.13.0", "13.0")


def _driver_string_too_old(m: Machine) -> None:
    """A container's libcuda isn't loadable under that name: the driver's own version tells."""
    m.gpu("470.57.02", None)
    m.torch("2.11.0", "12.6")


def _smi_says(words: str, code: int = 9) -> Callable[[Machine], None]:
    def broken(m: Machine) -> None:
        m.gpu()
        m.torch("2.11.0", "13.0")
        m.smi(f"echo '{words}'; exit {code}")

    return broken


def _no_smi(m: Machine) -> None:
    m.gpu()
    m.torch("2.11.0", "13.0")
    (m.folder / "bin" / "nvidia-smi").unlink()


def _no_smi_in_wsl(m: Machine) -> None:
    m.patch.setattr(devices, "is_wsl", lambda: True)
    (m.folder / "dev" / "dxg").touch()
    m.torch("2.11.0", "13.0")
    m.patch.setattr(devices, "libcuda_version", lambda: (13, 0))


def _hanging_smi(m: Machine) -> None:
    m.gpu()
    m.torch("2.11.0", "13.0")
    m.patch.setattr(devices, "_SECONDS", 0.3)
    m.smi("exec sleep 30")


def _no_library(m: Machine) -> None:
    m.gpu(cuda=None)
    m.torch("2.11.0", "13.0")
    m.patch.setattr(devices, "in_container", lambda: True)


def _gpu(**changed: str) -> Callable[[Machine], None]:
    def made(m: Machine) -> None:
        m.gpu(**changed)
        m.torch("2.11.0", "13.0")

    return made


def _card_alone(m: Machine) -> None:
    m.card()


def _container_without_gpus(m: Machine) -> None:
    m.card()
    m.driver(cuda=None)
    m.patch.setattr(devices, "in_container", lambda: True)


def _hidden(m: Machine) -> None:
    m.gpu()
    m.torch("2.13.0+cpu", None)
    m.patch.setenv("CUDA_VISIBLE_DEVICES", "")


def _set(**values: str) -> Callable[[Machine], None]:
    def made(m: Machine) -> None:
        for name, value in values.items():
            m.patch.setenv(name, value)

    return made


def _no_locks(m: Machine) -> None:
    m.patch.setattr(fcntl, "flock", lambda file, how: None)


def _locks_refused(m: Machine) -> None:
    def refused(file: Any, how: int) -> None:
        raise OSError(37, "No locks available")

    m.patch.setattr(fcntl, "flock", refused)


def _slow_disk(m: Machine) -> None:
    import time

    real = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.1)
        real(descriptor)

    m.patch.setattr(os, "fsync", slow)


def _few_files(m: Machine) -> None:
    real = resource.getrlimit
    m.patch.setattr(resource, "getrlimit", lambda kind: (256, 4096) if kind == resource.RLIMIT_NOFILE else real(kind))


def _little_address_space(m: Machine) -> None:
    real = resource.getrlimit
    few = (8 * 2**30, resource.RLIM_INFINITY)
    m.patch.setattr(resource, "getrlimit", lambda kind: few if kind == resource.RLIMIT_AS else real(kind))


def _unlocked_hub(m: Machine) -> None:
    m.patch.delenv("HF_HUB_OFFLINE")
    point_at("http://127.0.0.1:9", m.folder, m.patch)
    for name in ("HTTPS_PROXY", "https_proxy"):
        m.patch.delenv(name, raising=False)


def _proxy(m: Machine) -> None:
    _unlocked_hub(m)
    m.patch.setenv("HTTPS_PROXY", "http://user:word@127.0.0.1:9")


def _own_certificate(m: Machine) -> None:
    _unlocked_hub(m)

    class Session:
        def head(self, *_: Any, **__: Any) -> None:
            raise OSError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate in certificate chain")

    m.patch.setattr(huggingface_hub, "get_session", Session)


@dataclass(frozen=True)
class Fault:
    """What is broken, which checks answer how, and what they have to say."""

    make: Callable[[Machine], None]
    check: str
    status: str
    found: tuple[str, ...]
    fix: tuple[str, ...]
    need: Need = field(default_factory=Need)
    also: tuple[str, ...] = ()
    """Other checks that rightly say something too."""


PLAN = Need(job="train", gpu_bytes={0: 70 * 2**30})
PIP = f"{sys.executable} -m pip install"

FAULTS: Mapping[str, Fault] = {
    # packages
    "package missing": Fault(
        _install_missing, "packages", "fail", ("no package notthere>=1.5",), (PIP, "notthere>=1.5")
    ),
    "Python too old": Fault(_new_python, "python", "fail", ("need >=3.99",), ("newer Python",)),
    "transformers too old": Fault(
        lambda m: m.package("transformers", "4.30.0"),
        "packages",
        "fail",
        ("transformers 4.30.0", "transformers<6,>=5.17"),
        (PIP, "transformers<6,>=5.17"),
        also=("conflicts",),
    ),
    "jinja2 with a hole": Fault(
        lambda m: m.package("jinja2", "3.1.5"),
        "packages",
        "fail",
        ("jinja2 3.1.5", "jinja2>=3.1.6"),
        ("jinja2>=3.1.6",),
    ),
    "datasets that run code": Fault(
        lambda m: m.package("datasets", "3.6.0"),
        "packages",
        "fail",
        ("datasets 3.6.0", "datasets>=4"),
        ("datasets>=4",),
    ),
    "two packages that don't go together": Fault(
        lambda m: m.package("tokenizers", "0.1.0"),
        "conflicts",
        "warn",
        ("tokenizers 0.1.0; transformers needs",),
        (PIP,),
    ),
    "bitsandbytes-windows": Fault(
        lambda m: m.package("bitsandbytes_windows", "0.37.5"),
        "conflicts",
        "fail",
        ("bitsandbytes-windows 0.37.5", "dead"),
        ("uninstall -y bitsandbytes-windows bitsandbytes", PIP),
    ),
    "hand-patched Llama": Fault(
        _patched_llama,
        "transformers",
        "warn",
        ("modeling_llama.py", "calls scaled_dot_product_attention itself"),
        ("--force-reinstall --no-deps transformers==5.24.0",),
    ),
    "another Python's pip": Fault(_other_pip, "python", "warn", ("of another Python",), (f"{sys.executable} -m pip",)),
    # cards, drivers, torch
    "a CPU build beside a GPU": Fault(
        _gpu_and_cpu_torch, "torch", "fail", ("2.13.0+cpu", "a build for CPUs"), (PIP, "whl/cu130", "--force-reinstall")
    ),
    "a CPU build beside an older driver": Fault(
        _cpu_torch_and_older_driver, "torch", "fail", ("a build for CPUs",), ("whl/cu126",)
    ),
    "CUDA newer than the driver": Fault(
        _driver_too_old, "torch", "fail", ("CUDA 13.0", "driver 535.129.03", "12.2"), ("driver", "whl/cu126")
    ),
    "an old driver by its version alone": Fault(
        _driver_string_too_old,
        "torch",
        "fail",
        ("CUDA 12.6", "driver 470.57.02"),
        ("driver",),
        also=("driver",),
    ),
    "a card without a driver": Fault(_card_alone, "driver", "warn", ("1 NVIDIA card and no driver",), ("driver",)),
    "a card without a driver, for a plan": Fault(
        _card_alone, "driver", "fail", ("no driver",), ("driver",), PLAN, also=("gpus",)
    ),
    "a container without its GPUs": Fault(
        _container_without_gpus, "driver", "warn", ("no /dev/nvidia0",), ("docker run --gpus all",)
    ),
    "an updated driver, not loaded": Fault(
        _smi_says("Failed to initialize NVML: Driver/library version mismatch", 18),
        "driver",
        "fail",
        ("version mismatch",),
        ("reboot",),
    ),
    "a card off the bus": Fault(
        _smi_says(
            "NVIDIA-SMI has failed because it couldn t communicate with the NVIDIA driver. No devices were found"
        ),
        "driver",
        "fail",
        ("No devices were found",),
        ("driver",),
    ),
    "no nvidia-smi": Fault(_no_smi, "driver", "warn", ("no nvidia-smi",), ("nvidia-smi",)),
    "no nvidia-smi in WSL": Fault(_no_smi_in_wsl, "driver", "warn", ("no nvidia-smi",), ("/usr/lib/wsl/lib",)),
    "an nvidia-smi that hangs": Fault(_hanging_smi, "driver", "fail", ("no answer in",), ("xid",)),
    "a container that can't compute": Fault(
        _no_library, "driver", "fail", ("no libcuda.so.1",), ("NVIDIA_DRIVER_CAPABILITIES=compute",)
    ),
    "GPUs that are hidden": Fault(
        _hidden, "gpus", "skip", ("CUDA_VISIBLE_DEVICES that hides every GPU",), ("unset CUDA_VISIBLE_DEVICES",)
    ),
    "a GPU that others use": Fault(
        _gpu(free="20000", holders="GPU-1, 4211, /home/bob/bin/python, 61000"),
        "gpus",
        "warn",
        ("19.5 GiB of 79.6 GiB free", "pid 4211 python (59.6 GiB)"),
        ("pid 4211",),
    ),
    "a plan that doesn't fit beside others": Fault(
        _gpu(free="20000", holders="GPU-1, 4211, python, 61000"),
        "gpus",
        "fail",
        ("need 70.0 GiB free",),
        ("pid 4211",),
        PLAN,
    ),
    "a plan for GPUs that aren't there": Fault(
        _gpu(),
        "gpus",
        "fail",
        ("need cuda:1, cuda:2 too",),
        ("lorakit plan-devices",),
        Need(job="train", gpu_bytes={0: 1, 1: 1, 2: 1}),
    ),
    "a plan, and no GPU at all": Fault(
        lambda m: None,
        "gpus",
        "fail",
        ("found no NVIDIA GPU here, need 1 GPU",),
        ("run it where",),
        PLAN,
        also=("driver",),
    ),
    "a GPU that is slowed down": Fault(_gpu(limit="300.00"), "gpus", "warn", ("700 W is usual",), ("-pl 700",)),
    "a GPU that no torch knows": Fault(_gpu(capability="3.7"), "gpus", "fail", ("capability 3.7",), ("newer GPU",)),
    # limits and variables
    "a container of 2 GiB": Fault(
        lambda m: m.limit(2 * 2**30), "machine", "warn", ("limit of 2.0 GiB",), ("--memory",)
    ),
    "too little memory for the plan": Fault(
        lambda m: m.limit(8 * 2**30),
        "machine",
        "fail",
        ("need 64.0 GiB free",),
        ("--memory",),
        Need(job="merge", ram_bytes=64 * 2**30),
    ),
    "few open files": Fault(_few_files, "limits", "warn", ("256 open files",), ("ulimit -n 4096",)),
    "little address space": Fault(
        _little_address_space, "limits", "warn", ("address space: 8.0 GiB",), ("ulimit -v unlimited",)
    ),
    "TF32 from outside": Fault(
        _set(NVIDIA_TF32_OVERRIDE="0"),
        "variables",
        "warn",
        ("NVIDIA_TF32_OVERRIDE=0",),
        ("unset NVIDIA_TF32_OVERRIDE",),
    ),
    "another library for bitsandbytes": Fault(
        _set(BNB_CUDA_VERSION="118"), "variables", "warn", ("BNB_CUDA_VERSION=118",), ("unset BNB_CUDA_VERSION",)
    ),
    "a left-over place in a parallel run": Fault(
        _set(RANK="0", WORLD_SIZE="8"), "variables", "fail", ("RANK=0 WORLD_SIZE=8",), ("env -u RANK -u WORLD_SIZE",)
    ),
    # disks
    "a disk that doesn't lock": Fault(
        _no_locks, "filesystem", "fail", ("locks a file twice",), ("LORAKIT_CACHE", "another disk")
    ),
    "a disk without locks": Fault(_locks_refused, "filesystem", "fail", ("can't lock", "No locks"), ("another disk",)),
    "a slow disk": Fault(_slow_disk, "disk", "warn", ("MB/s written",), ("another disk",)),
    "no room for a merged model": Fault(
        lambda m: None,
        "disk",
        "fail",
        ("the working folder", "need 1048576.0 GiB"),
        ("free some space", "--output"),
        Need(job="merge", disk_bytes=2**50),
    ),
    # the Hub
    "no Hub": Fault(_unlocked_hub, "hub", "skip", ("no answer of 127.0.0.1:9",), ("HF_ENDPOINT",)),
    "a proxy that doesn't answer": Fault(_proxy, "hub", "warn", ("proxy of HTTPS_PROXY",), ("HTTPS_PROXY",)),
    "a proxy that reads along": Fault(
        _own_certificate, "hub", "warn", ("certificate", "isn't trusted"), ("SSL_CERT_FILE",)
    ),
    "a Hub that isn't asked": Fault(lambda m: None, "hub", "skip", ("HF_HUB_OFFLINE=1",), ("unset HF_HUB_OFFLINE",)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_machine_is_told_and_nothing_else_turns_red(name: str, machine: Machine) -> None:
    fault = FAULTS[name]
    fault.make(machine)
    found = facts(fault.need)
    one = found[fault.check]
    assert one.status == fault.status, one
    for words in fault.found:
        assert words in one.detail, one.detail
    for words in fault.fix:
        assert words in one.fix, one.fix
    assert one.why or one.status == "skip"
    red = {check for check, answer in found.items() if answer.status in ("warn", "fail")}
    assert red - {fault.check, *fault.also} == set(), {check: found[check] for check in red}


def test_the_table_is_long_enough() -> None:
    assert len([fault for fault in FAULTS.values() if fault.status in ("warn", "fail")]) >= 25


def test_a_full_disk_is_told_with_the_variable_that_moves_it(
    machine: Machine, tmpfs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = tmpfs("size=4m")
    (full / "ballast").write_bytes(bytes(3_900_000))
    monkeypatch.setenv("LORAKIT_CACHE", str(full / "cache"))
    found = facts()
    assert found["disk"].status == "fail"
    assert "lorakit's cache" in found["disk"].detail
    assert "set LORAKIT_CACHE" in found["disk"].fix
    assert {name for name, one in found.items() if one.status in ("fail", "warn")} == {"disk"}


def test_a_read_only_cache_is_told(
    machine: Machine, tmpfs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmpfs("size=4m,ro")
    monkeypatch.setenv("HF_HOME", str(folder))
    found = facts()
    assert found["filesystem"].status == "fail"
    assert "the Hub's cache" in found["filesystem"].detail
    assert "Read-only file system" in found["filesystem"].detail
    assert "set HF_HOME" in found["filesystem"].fix


def test_little_shared_memory_is_told(
    machine: Machine, tmpfs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_SHARED", tmpfs("size=64m"))
    monkeypatch.setattr(limits, "in_container", lambda: True)
    found = facts()
    assert (found["limits"].status, "64 MiB" in found["limits"].detail) == ("warn", True)
    assert "--shm-size" in found["limits"].fix


@pytest.fixture
def hub(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.delenv("HF_HUB_OFFLINE")
        point_at(f"http://127.0.0.1:{server.server_port}", machine.folder, monkeypatch)
        yield server
        huggingface_hub.close_session()
        server.shutdown()
        thread.join()


def test_a_token_that_the_hub_refuses_is_told_and_never_shown(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.failure = (401, {})
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdefghij")
    found = facts(names=["hub"])["hub"]
    assert (found.status, "refuses the token (401)" in found.detail) == ("fail", True)
    assert "hf auth login" in found.fix
    assert "hf_0123" not in str(found)


def test_a_hub_that_answers_is_all_right_without_a_token(hub: Hub) -> None:
    found = facts(names=["hub"])["hub"]
    assert (found.status, "no token" in found.detail) == ("ok", True)


def test_a_hub_that_is_out_of_order_is_no_fault_of_this_machine(hub: Hub) -> None:
    hub.failure = (503, {})
    assert facts(names=["hub"])["hub"].status == "skip"


# Child processes: broken packages and libraries


def run(*names: str) -> dict[str, Finding]:
    config = DoctorConfig.resolve((None, {"only": names}))
    return dict(doctor.diagnose(config, lambda event: None).findings)


def site_packages() -> Path:
    return Path(sysconfig.get_path("purelib"))


def farm(folder: Path, *without: str) -> Path:
    """The installed packages as links, without some."""
    folder.mkdir(parents=True)
    for path in site_packages().iterdir():
        if not any(path.name == name or path.name.startswith(f"{name}-") for name in without):
            (folder / path.name).symlink_to(path)
    return folder


def instead_of_site_packages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [str(folder) if Path(path) == site_packages() else path for path in sys.path if "__editable__" not in path]
    monkeypatch.setattr(sys, "path", found)


def bitsandbytes_without_its_library(folder: Path) -> Path:
    """The installed bitsandbytes as links, without the library that it loads here."""
    place = folder / "bitsandbytes"
    place.mkdir(parents=True)
    for path in (site_packages() / "bitsandbytes").iterdir():
        if path.name != "libbitsandbytes_cpu.so":
            (place / path.name).symlink_to(path)
    return place


BNB = ("bitsandbytes", "int8", "nf4", "optimizer")


def test_a_machine_without_bitsandbytes_and_datasets_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead_of_site_packages(farm(tmp_path / "site", "bitsandbytes", "datasets"), monkeypatch)
    found = run("packages", "attention", *BNB)
    assert found["packages"].status == "fail"
    assert "bitsandbytes>=0.49, datasets>=4" in found["packages"].detail
    assert found["packages"].fix.endswith("'bitsandbytes>=0.49' 'datasets>=4'")
    assert {found[name].status for name in BNB} == {"skip"}
    assert found["attention"].status == "ok", found["attention"]


def test_asked_alone_a_check_says_itself_that_its_package_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead_of_site_packages(farm(tmp_path / "site", "bitsandbytes"), monkeypatch)
    found = run("nf4")["nf4"]
    assert (found.status, found.detail) == ("fail", "found no bitsandbytes, need it")
    assert found.fix == f"{PIP} 'bitsandbytes>=0.49'"


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "there is no such file"), (b"\x7fELF of nothing", "file too short|invalid ELF header")],
)
def test_a_library_that_does_not_load_is_named_beside_those_that_are_there(
    content: bytes | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = bitsandbytes_without_its_library(tmp_path)
    if content is not None:
        (place / "libbitsandbytes_cpu.so").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/somewhere")
    found = run(*BNB)
    one = found["bitsandbytes"]
    assert one.status == "fail"
    assert any(part in one.detail for part in words.split("|")), one.detail
    assert "libbitsandbytes_cpu.so doesn't load" in one.detail
    assert "LD_LIBRARY_PATH=/opt/somewhere" in one.detail
    assert "--force-reinstall" in one.fix
    assert {found[name].status for name in BNB[1:]} <= {"skip", "ok"}


def library_that(does: str, path: Path) -> None:
    source = path.with_suffix(".c")
    source.write_text(f"#include <stdlib.h>\n__attribute__((constructor)) static void begin(void) {{ {does}; }}\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(path), str(source)], check=True)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="a library is compiled")
@pytest.mark.parametrize(
    ("does", "words"), [("abort()", "an abort"), ("*(volatile int *)0 = 1", "a segmentation fault")]
)
def test_a_crash_of_native_code_is_the_answer_of_its_check_alone(
    does: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library_that(does, bitsandbytes_without_its_library(tmp_path) / "libbitsandbytes_cpu.so")
    monkeypatch.syspath_prepend(tmp_path)
    found = run("python", "variables", "gloo", *BNB)
    assert found["bitsandbytes"].status == "fail"
    assert words in found["bitsandbytes"].detail
    assert "cextension.py" in found["bitsandbytes"].detail or "ctypes" in found["bitsandbytes"].detail
    assert "--force-reinstall 'bitsandbytes>=0.49'" in found["bitsandbytes"].fix
    assert {name: found[name].status for name in BNB[1:]} == dict.fromkeys(BNB[1:], "skip")
    assert {found[name].status for name in ("python", "variables", "gloo")} == {"ok"}


def package_that(does: str, name: str, folder: Path) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(does)


def test_a_check_after_a_crash_is_run_in_a_new_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of a group crashes; the others, which don't use what crashed, have answers of their own."""
    package_that("import ctypes; ctypes.string_at(0)", "huggingface_hub", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(CHECKS, "hub", replace(CHECKS["hub"], group="facts"))
    monkeypatch.setattr(doctor, "_HEAVY_FIRST", ("facts",))
    monkeypatch.setattr(doctor, "CHECKS", {"hub": CHECKS["hub"], **CHECKS})
    found = run("hub", "python", "packages")
    assert "a segmentation fault" in found["hub"].detail
    assert (found["python"].status, found["packages"].status) == ("ok", "ok")


def test_a_check_that_hangs_is_ended_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package_that("import time; time.sleep(60)", "huggingface_hub", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(CHECKS, "hub", replace(CHECKS["hub"], seconds=2))
    found = run("hub", "machine")
    assert (found["hub"].status, found["machine"].status) == ("fail", "ok")
    assert "no end in 2 s" in found["hub"].detail


def test_a_torch_that_cannot_be_imported_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = "libcudnn.so.9: cannot open shared object file: No such file or directory"
    package_that(f"raise ImportError({missing!r})", "torch", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    found = run("cuda", "variables")
    assert (found["cuda"].status, found["variables"].status) == ("fail", "ok")
    assert "libcudnn.so.9" in found["cuda"].detail
    assert "--force-reinstall 'torch<2.14,>=2.11'" in found["cuda"].fix


def test_what_libraries_print_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package_that("print('{}'); import os; os.write(1, b'{}')\nraise ImportError('x')", "huggingface_hub", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert run("hub")["hub"].status in ("skip", "fail")


def test_a_network_that_gloo_cannot_use_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nothere0")
    found = run("gloo")["gloo"]
    assert found.status == "fail"
    assert "GLOO_SOCKET_IFNAME=nothere0" in found.detail
    assert "unset GLOO_SOCKET_IFNAME" in found.fix


@pytest.mark.skipif(shutil.which("gcc") is None, reason="a library is compiled")
def test_the_drivers_library_is_asked_as_programs_load_it(tmp_path: Path) -> None:
    source = tmp_path / "cuda.c"
    source.write_text("int cuDriverGetVersion(int *version) { *version = 12040; return 0; }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(tmp_path / "libcuda.so.1"), str(source)], check=True)
    code = "from lorakit.core.doctor import devices; print(devices.libcuda_version(), devices.driver_cuda())"
    environ = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "(12, 4) 12"


def test_torchs_range_in_commands_is_that_of_the_project() -> None:
    from packaging.requirements import Requirement

    from lorakit.core.doctor.packages import required

    [torch] = [one for one in required().requirements if one.name == "torch"]
    assert Requirement(finding.TORCH).specifier == torch.specifier


def test_the_child_answers_in_json(tmp_path: Path) -> None:
    asked = {"names": ["python"], "path": sys.path}
    need = {**vars(Need()), "gpu_bytes": {}}
    ran = subprocess.run(
        [sys.executable, "-c", doctor._CHILD],
        input=json.dumps({**asked, "need": need}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(ran.stdout)["status"] in ("ok", "warn")
