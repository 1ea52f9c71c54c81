"""What this machine lacks for lorakit, and the command that fixes it: independent checks, each with one answer.

finding    what a check is asked and answers, and the commands that answers name
packages   Python, versions, conflicts
devices    cards, driver, torch's build, each GPU
limits     memory, shared memory, open files, variables
storage    room, speed and what the file systems can do
network    the Hub
report     findings as a text to paste

What a run computes with is run and compared with plain torch:

trials        what a kernel gave beside what it should have given
cuda          torch on each GPU, a compiled function
bitsandbytes  its library, layers in 8 and 4 bits, optimizers
attention     its implementations on packed documents
processes     two processes that add up a tensor

Checks run in child processes, those that load the same libraries in one of them, so that a crash of native code, or a
call that never ends, is the answer of one check and takes no other down: the child starts again for those after it.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from lorakit.core.adapters import open_adapter
from lorakit.core.config import CheckName, DoctorConfig
from lorakit.core.doctor.finding import NOT_INSTALLED, Finding, Need, fail, pip_install, skip
from lorakit.core.doctor.packages import required
from lorakit.core.doctor.report import report_text
from lorakit.core.environment import no_kernels_from_the_hub, stop_with_parent, usable_cores
from lorakit.core.errors import EnvironmentUnusable, InputRefused, LorakitError, UsageError, first_line
from lorakit.core.events import Notice, Progress, Report
from lorakit.core.placement import read_plan
from lorakit.core.weights import open_weights

__all__ = ["CHECKS", "Check", "Diagnosis", "Finding", "Need", "diagnose", "need_of", "require_ready", "serve"]


@dataclass(frozen=True)
class Check:
    """A check: a function of its room that has its name."""

    room: str
    group: str
    """Checks of one group run in one process, one after the other."""
    seconds: float
    """The longest that it may take, what it imports included."""
    package: str = "torch"
    """Whose code it runs: what is installed again where that can't be imported, or crashes."""
    jobs: tuple[str, ...] = ("train", "merge")
    after: tuple[str, ...] = ()
    """The checks whose failure is this one's too, and that say it better."""


_TRAIN = ("train",)
CHECKS: Mapping[CheckName, Check] = {
    "python": Check("packages", "facts", 20, "lorakit"),
    "packages": Check("packages", "facts", 20, "lorakit"),
    "conflicts": Check("packages", "facts", 20, "lorakit"),
    "transformers": Check("packages", "facts", 20, "lorakit"),
    "driver": Check("devices", "facts", 60, "torch", _TRAIN),
    "torch": Check("devices", "facts", 60, "torch", _TRAIN),
    "gpus": Check("devices", "facts", 90, "torch", _TRAIN),
    "machine": Check("limits", "facts", 20, "lorakit"),
    "limits": Check("limits", "facts", 20, "lorakit", _TRAIN),
    "variables": Check("limits", "facts", 20, "lorakit"),
    "disk": Check("storage", "storage", 60, "lorakit"),
    "filesystem": Check("storage", "storage", 60, "lorakit"),
    "hub": Check("network", "network", 30, "huggingface_hub"),
    "cuda": Check("cuda", "cuda", 120, "torch", after=("driver", "torch")),
    "bitsandbytes": Check("bitsandbytes", "bitsandbytes", 120, "bitsandbytes", _TRAIN),
    "int8": Check("bitsandbytes", "bitsandbytes", 120, "bitsandbytes", _TRAIN, after=("bitsandbytes",)),
    "nf4": Check("bitsandbytes", "bitsandbytes", 120, "bitsandbytes", _TRAIN, after=("bitsandbytes",)),
    "optimizer": Check("bitsandbytes", "bitsandbytes", 120, "bitsandbytes", _TRAIN, after=("bitsandbytes",)),
    "attention": Check("attention", "attention", 180, "transformers", _TRAIN),
    "compile": Check("cuda", "cuda", 180, "torch", ()),
    "gloo": Check("processes", "processes", 120, "torch", _TRAIN),
    "nccl": Check("processes", "processes", 120, "torch", _TRAIN),
}
"""Every check, in the order in which answers are shown."""

_HEAVY_FIRST = ("attention", "bitsandbytes", "processes", "cuda", "network", "storage", "facts")
_QUICK: Mapping[str, tuple[CheckName, ...]] = {
    "train": ("python", "packages", "torch", "variables"),
    "merge": ("python", "packages", "variables"),
    "plan-devices": ("python", "torch"),
}
"""What a command asks before it begins: checks that import nothing heavy, together under a second."""

_PURPOSES = "train, merge, a plan file, or an adapter that is to be merged"


@dataclass(frozen=True)
class Diagnosis:
    """The answers of all checks that were asked."""

    findings: Mapping[str, Finding]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(found.status != "fail" for found in self.findings.values())

    @property
    def text(self) -> str:
        """All of it, to paste into an issue."""
        return report_text(self.findings)

    def as_json(self) -> dict[str, Any]:
        """What `--json` shows."""
        return {"ok": self.ok, "checks": [{"name": name, **asdict(found)} for name, found in self.findings.items()]}

    def require_ok(self) -> None:
        """Raises EnvironmentUnusable, with the words of the first check that failed."""
        failed = [(name, found) for name, found in self.findings.items() if found.status == "fail"]
        if failed:
            name, found = failed[0]
            error = found.as_error(name)
            more = f" ({', '.join(name for name, _ in failed[1:])} failed too)" if len(failed) > 1 else ""
            raise EnvironmentUnusable(f"{error.message}{more}", error.hint)


def diagnose(config: DoctorConfig, report: Report) -> Diagnosis:
    """Run the checks that `--only` names or the purpose needs, a few at a time.

    Raises UsageError, InputRefused, DiskFailed, ArtifactDamaged, where what `--for` names can't be used.
    """
    need = need_of(config.doctor.for_, report)
    names = list(config.doctor.only) or chosen(need)
    return Diagnosis(_run(list(dict.fromkeys(names)), need, report))


def chosen(need: Need) -> list[CheckName]:
    """The checks that a job needs; all where it is none in particular."""
    if need.job is None:
        return list(CHECKS)
    unused: set[str] = set()
    if need.on_cpu:
        unused |= {"driver", "torch", "gpus", "cuda", "nccl"}
    if need.quantize is not None:
        unused |= {"int8"} if need.quantize != "int8" else set()
        unused |= {"nf4"} if need.quantize not in ("nf4", "fp4") else set()
    if need.optimizer is not None and not need.optimizer.endswith("8bit") and not need.optimizer.startswith("paged"):
        unused |= {"optimizer"}
    if {"int8", "nf4", "optimizer"} <= unused:
        unused |= {"bitsandbytes"}
    if need.parallel == "split":
        unused |= {"gloo", "nccl"}
    return [name for name, check in CHECKS.items() if need.job in check.jobs and name not in unused]


def need_of(purpose: str | None, report: Report) -> Need:
    """What `--for` names: a job, a plan file, or an adapter to merge."""
    if purpose is None:
        return Need()
    if purpose == "train":
        return Need(job="train")
    if purpose == "merge":
        return Need(job="merge")
    path = Path(purpose).expanduser()
    if path.is_file():
        return _need_of_plan(read_plan(path), path)
    if path.is_dir():
        return _need_of_merge(path, report)
    raise UsageError(f"--for {purpose}: found no such file or folder, need {_PURPOSES}", "check the path")


def _need_of_plan(plan: Mapping[str, Any], path: Path) -> Need:
    settings, loads = plan["settings"], plan["devices"]
    try:
        sizes = {str(load["name"]): int(load["peak_bytes"]) for load in loads}
        lora = [int(load["bytes"]["lora"]) + int(load["bytes"]["optimizer"]) for load in loads]
        if not all(0 <= size < _MOST_BYTES for size in (*sizes.values(), *lora)):
            raise ValueError("no sizes")
        if not all(isinstance(settings.get(name, ""), str) for name in ("quantize", "optimizer")):
            raise ValueError("no settings of a run")
    except (KeyError, TypeError, ValueError, OverflowError):  # the last of Infinity as a whole number
        hint = "`lorakit plan-devices MODEL --output FILE` writes plans"
        raise InputRefused(f"{path}: found devices or settings that aren't a plan's, need a whole plan", hint) from None
    gpu_bytes = {int(name[5:]): size for name, size in sizes.items() if name != "cpu"}
    saved = sum(lora) if plan["parallel"] == "split" else max(lora)
    return Need(
        job="train",
        on_cpu=not gpu_bytes,
        quantize=settings.get("quantize"),
        optimizer=settings.get("optimizer"),
        parallel=plan["parallel"],
        gpu_bytes=gpu_bytes,
        ram_bytes=sizes.get("cpu", 0),
        disk_bytes=_CHECKPOINTS * saved,
    )


_MERGE_BYTES = 2**28  # twice what the bench of merging measured for a shape of 70B
_MOST_BYTES = 2**62
_CHECKPOINTS = 5
"""Three that are kept by default, the best one, and the one that is written."""


def _need_of_merge(folder: Path, report: Report) -> Need:
    """A merged model is as large as its base, and is computed row by row in the memory of a few rows."""
    adapter = open_adapter(folder, report)
    base = Path(adapter.base_name)
    if not base.is_dir():
        report(Notice(f"{adapter.base_name}: isn't a folder here, so that the sizes of this merge aren't known"))
        return Need(job="merge")
    weights = open_weights(base)
    return Need(job="merge", ram_bytes=_MERGE_BYTES, disk_bytes=weights.size_bytes)


# Before a command begins


def require_ready(command: str, report: Report) -> None:
    """The few checks that concern a command, run here: no child, no heavy import. Warnings are reported.

    Raises EnvironmentUnusable with the words that doctor has for what fails.
    """
    need = Need(job="merge" if command == "merge" else "train")
    for name in _QUICK[command]:
        found = _answer(name, need)
        if found.status == "fail":
            raise found.as_error(name)
        if found.status == "warn" and name == "variables":
            report(Notice(f"{name}: {found.detail}: {found.why}; {found.fix}"))


def _answer(name: CheckName, need: Need) -> Finding:
    """A check's answer; what it fails with is one too."""
    check = CHECKS[name]
    try:
        found = getattr(importlib.import_module(f"lorakit.core.doctor.{check.room}"), name)(need)
        assert isinstance(found, Finding)
        return found
    except LorakitError as error:
        return fail(error.message, "", error.hint)
    except ImportError as error:
        return _not_imported(error, check.package)
    except Exception as error:  # a check that fails is an answer, not the end of the others
        return fail(
            f"found {type(error).__name__}: {first_line(error)[:200]}, need the check to end",
            "what it checks doesn't work as it should",
            f"LORAKIT_DEBUG=1 lorakit doctor --only {name}",
        )


def _not_imported(error: ImportError, package: str) -> Finding:
    """The answer of a check whose package isn't there, or can't be imported as it is."""
    missing = (error.name or package).partition(".")[0]
    if importlib.util.find_spec(missing) is None:
        return fail(f"found no {missing}, need it", NOT_INSTALLED, pip_install(_requirement(missing)))
    return fail(
        f"found that {missing} can't be imported ({first_line(error)[:200]}), need it",
        "nothing that uses it works",
        pip_install(_requirement(package), options="--force-reinstall"),
    )


def _requirement(package: str) -> str:
    """A package in the range that lorakit asks for."""
    try:
        return next(str(one) for one in required().requirements if one.name == package)
    except (StopIteration, ImportError, importlib.metadata.PackageNotFoundError):
        return package


# In child processes


_CHILD = (
    "import json, sys; asked = json.load(sys.stdin); sys.path[:] = asked['path']; "
    "from lorakit.core.doctor import serve; serve(asked)"
)
_POLL_SECONDS = 0.2


def serve(asked: Mapping[str, Any]) -> None:
    """The child's work: answers on stdout, a line each; whatever libraries print goes to stderr."""
    stop_with_parent()
    no_kernels_from_the_hub()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sizes = {int(number): size for number, size in asked["need"].pop("gpu_bytes").items()}
    need = Need(**asked["need"], gpu_bytes=sizes)
    for name in asked["names"]:
        answers.write(json.dumps(asdict(_answer(name, need))) + "\n")
        answers.flush()
    os._exit(0)  # what libraries do at their end is no check


def _run(names: Sequence[CheckName], need: Need, report: Report) -> dict[str, Finding]:
    """The answers, in the order of CHECKS; groups run beside each other, no more of them than there are cores."""
    groups = [[name for name in CHECKS if name in names and CHECKS[name].group == group] for group in _HEAVY_FIRST]
    groups = [group for group in groups if group]
    found: dict[str, Finding] = {}
    children = _Children(need)
    with ThreadPoolExecutor(max(2, min(usable_cores(), len(groups) or 1))) as pool:
        try:
            tasks = [pool.submit(children.answers, group) for group in groups]
            report(Progress("checking", 0, len(names), "checks"))
            for task in as_completed(tasks):
                found |= task.result()
                report(Progress("checking", len(found), len(names), "checks"))
        except BaseException:
            children.end()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {name: _after(name, found) for name in CHECKS if name in found}


def _after(name: CheckName, found: Mapping[str, Finding]) -> Finding:
    """The answer of a check, or why it doesn't count: what it rests on failed, and says why."""
    failed = {one for one, answer in found.items() if answer.status == "fail"}
    if name not in failed:
        return found[name]
    if found[name].why == NOT_INSTALLED and "packages" in failed:
        return skip("needs a package that isn't installed; see packages")
    before = [one for one in CHECKS[name].after if one in failed]
    return skip(f"needs {before[0]}, which fails") if before else found[name]


class _Children:
    """The processes that check; all of them end when this one gives up."""

    def __init__(self, need: Need) -> None:
        self._need = need
        self._running: set[subprocess.Popen[bytes]] = set()
        self._ended = False

    def end(self) -> None:
        self._ended = True
        for child in list(self._running):
            _kill(child)

    def answers(self, names: Sequence[CheckName]) -> dict[str, Finding]:
        """The answers of one group: from one child, or from as many as checks crash."""
        found: dict[str, Finding] = {}
        while len(found) < len(names) and not self._ended:
            found |= self._from_one(names[len(found) :])
        return found

    def _from_one(self, names: Sequence[CheckName]) -> dict[str, Finding]:
        with _said_on_stderr() as stderr:
            command = [sys.executable, "-P", "-X", "faulthandler", "-c", _CHILD]
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True
            )
            self._running.add(child)
            try:
                assert child.stdin is not None
                asked = {"names": names, "need": asdict(self._need), "path": sys.path}
                with contextlib.suppress(BrokenPipeError), child.stdin:
                    child.stdin.write(json.dumps(asked).encode())
                return self._read(child, names, stderr)
            finally:
                _kill(child)
                self._running.discard(child)

    def _read(
        self, child: "subprocess.Popen[bytes]", names: Sequence[CheckName], stderr: IO[bytes]
    ) -> dict[str, Finding]:
        assert child.stdout is not None
        found: dict[str, Finding] = {}
        lines = _Lines(child.stdout.fileno())
        for name in names:
            line = lines.next_within(CHECKS[name].seconds, lambda: self._ended)
            if line is None:
                found[name] = _without_an_end(name, CHECKS[name].seconds)
                break
            try:
                found[name] = Finding(**json.loads(line))
            except (ValueError, TypeError):  # it ended, perhaps within a line
                found[name] = _crashed(name, child.wait(), _tail(stderr))
                break
        return found


class _Lines:
    """Lines of a pipe, each waited for no longer than it may take."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._read = b""

    def next_within(self, seconds: float, given_up: Any) -> bytes | None:
        """The next line; what is left, perhaps nothing, at the end of the pipe; None where it takes too long."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._read:
            if given_up() or time.monotonic() > deadline:
                return None
            if not select.select([self._descriptor], [], [], _POLL_SECONDS)[0]:
                continue
            piece = os.read(self._descriptor, 65536)
            if not piece:
                return self._read
            self._read += piece
        line, self._read = self._read.split(b"\n", 1)
        return line


@contextlib.contextmanager
def _said_on_stderr() -> Iterator[IO[bytes]]:
    """A file for what a child says; where /tmp is full, for nothing."""
    try:
        file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
    except OSError:
        file = open(os.devnull, "w+b")  # noqa: SIM115
    with file:
        yield file


def _tail(file: IO[bytes]) -> str:
    with contextlib.suppress(OSError):
        file.seek(max(file.seek(0, os.SEEK_END) - 16384, 0))
        return file.read().decode(errors="replace")
    return ""


def _kill(child: "subprocess.Popen[bytes]") -> None:
    """End a child and all that it started."""
    with contextlib.suppress(OSError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if child.stdout is not None:
        child.stdout.close()


def _without_an_end(name: CheckName, seconds: float) -> Finding:
    return fail(
        f"found no end in {seconds:.0f} s, need one",
        "a driver, a disk or a network that hangs stops a run too",
        f"lorakit doctor --only {name}, once nothing else runs; if it hangs again: sudo reboot",
    )


_SIGNALS: Mapping[int, tuple[str, str]] = {
    signal.SIGSEGV: ("a segmentation fault", "native code that doesn't fit its other libraries"),
    signal.SIGABRT: ("an abort", "native code that gave up"),
    signal.SIGILL: ("an illegal instruction", "built for a newer CPU than this one"),
    signal.SIGBUS: ("a bus error", "a file that shrank under it, often a full /dev/shm"),
    signal.SIGFPE: ("an arithmetic error", "native code that doesn't fit its other libraries"),
    signal.SIGKILL: ("SIGKILL", "the kernel kills what takes too much memory (`dmesg` tells)"),
}


def _crashed(name: CheckName, code: int, said: str) -> Finding:
    """A child that ended without an answer: by which signal, and where Python was (faulthandler's words)."""
    how, why = _SIGNALS.get(-code, (f"exit code {code}" if code >= 0 else f"signal {-code}", "native code ended it"))
    place = re.search(r'most recent call first\):\s*File "([^"]+)", line (\d+)', said)
    where = f" in {place[1]}, line {place[2]}" if place else ""
    if -code == signal.SIGKILL:
        return fail(f"found {how}{where}, need the check to end", why, "close other programs, then check again")
    fix = pip_install(_requirement(CHECKS[name].package), options="--force-reinstall")
    return fail(f"found {how}{where}, need the check to end", why, fix)
