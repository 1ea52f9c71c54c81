"""A command struck at each of its mutating calls, then run again: nothing half may look whole, nothing may be lost.

A fork server: torch and lorakit are imported once, and every run is a forked child with the preloaded shim armed on the
folder around its output. A trial is one fault, for a third of them a second kill while recovering, and the same command
again. What must hold after every run:

    whole or not there    a folder with lorakit.json opens, and its bytes are those of the undisturbed run (or the old
                          ones that it overwrites); so does every checkpoint
    nothing is lost       until the new artifact is whole, the old one is, or lies where the next run puts it back
    the failure is named  a failing disk is exit code 7 and one `error:` line, or the command did without that call
    the way back          the same command again: exit code 0, the bytes of the undisturbed run, nothing left over
"""

import ctypes
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lorakit.core import artifacts, disk
from lorakit.core.errors import ExitCode, LorakitError
from tests.conftest import ROWS, make_llama
from tests.faults.server import forked, spread
from tests.faults.tally import Tally

KILL, TORN, ONCE, FROM = 1, 2, 3, 4  # enum mode of shim.c
MODES = {
    "kill": (KILL, 0),
    "torn": (TORN, 0),
    "enospc": (ONCE, errno.ENOSPC),
    "eio": (ONCE, errno.EIO),
    "full": (FROM, errno.ENOSPC),
}
"""What happens at the call. torn: of the writes only; full: at every call from there on."""

VARIANTS = {
    "prepare": ("new", "empty", "overwrite", "mount"),
    "train": ("new", "empty", "overwrite", "overwrite-again"),
    "merge": ("new", "empty", "overwrite"),
}
"""What lies at the output before: nothing, an empty folder, an older artifact of other settings (with `--overwrite`),
that one on a mount point, or that one with what a killed `--overwrite` of yet other settings left beside it."""

KINDS = {"prepare": "blocks", "train": "adapter", "merge": "merged model"}

_LEFTOVER = re.compile(r"\.(stage|trash)-.*|\..*\.lock")
_SHARE_KILLED_TWICE = 1 / 3


class Shim:
    """The preloaded shim.c."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self._library.fault_count.restype = ctypes.c_long

    def arm(self, folder: Path, call: int = 0, mode: int = KILL, error: int = 0) -> None:
        """Count from here on, below `folder`; strike at `call`, or never where that is 0."""
        if self._library.fault_arm(os.fsencode(folder), ctypes.c_long(call), mode, error):
            raise FileNotFoundError(folder)

    @property
    def calls(self) -> int:
        return int(self._library.fault_count())


# Protections, each taken away in the child that runs the command


def _sweep_nothing(target: Path) -> None:
    pass


def _move_in_manifest_first(stage: Path, target: Path) -> None:
    for name in sorted(os.listdir(stage), key=lambda name: (name != artifacts.MANIFEST, name)):
        os.rename(stage / name, target / name)
    os.rmdir(stage)


def _remove_before_replacing(stage: Path, target: Path, trash: Path, own: Collection[str]) -> None:
    if target.exists():
        shutil.rmtree(target)
    os.rename(stage, target)


def _write_what_fits(descriptor: int, content: bytes) -> None:
    with suppress(OSError):
        os.write(descriptor, content)


def _complete_any_stage(stage: Path, target: Path) -> bool:
    return True


PROTECTIONS: Mapping[str, tuple[Any, str, Callable[..., Any]]] = {
    "sweep": (artifacts, "_sweep", _sweep_nothing),
    "manifest-last": (artifacts, "_move_in", _move_in_manifest_first),
    "replace-by-rename": (artifacts, "_replace", _remove_before_replacing),
    "whole-stages-only": (artifacts, "_was_moving_in", _complete_any_stage),
    "write-errors": (disk, "write_all", _write_what_fits),
    "remove-by-rename": (artifacts, "remove", shutil.rmtree),
}
"""What `--without` takes away, and what stands in its place."""


# Running


@dataclass(frozen=True)
class Fault:
    """Where and how a run is struck; at call 0 it isn't."""

    call: int
    mode: str


UNDISTURBED = Fault(0, "kill")


@dataclass(frozen=True)
class Ran:
    """How a run ended: the exit code (negative: a signal), all that it printed, and its mutating calls if it lived."""

    code: int
    printed: str
    calls: int


@dataclass(frozen=True)
class Case:
    """One command line with one thing at its output before."""

    work: Path
    command: str
    variant: str
    without: str | None = None

    @property
    def inputs(self) -> Path:
        return self.work / "inputs"

    def output(self, box: Path) -> Path:
        return box / "output"

    def arguments(self, output: Path) -> list[str]:
        inputs = self.inputs
        overwrite = ["--overwrite"] if self.variant not in ("new", "empty") else []
        return [*command_line(self.command, inputs), "--output", str(output), *overwrite]

    @contextmanager
    def box(self) -> Iterator[Path]:
        """A folder around an output, as it is before the command."""
        box = Path(tempfile.mkdtemp(prefix=f"{self.command}-", dir=self.work))
        output, older = self.output(box), self.work / "older" / self.command
        with mounted(output) if self.variant == "mount" else nullcontext():
            if self.variant == "empty":
                output.mkdir()
            elif self.variant == "overwrite-again":
                shutil.copytree(self.work / "killed" / self.command, box, dirs_exist_ok=True)
            elif self.variant != "new":
                shutil.copytree(older, output, dirs_exist_ok=True)
            yield box
        shutil.rmtree(box)

    def run(self, box: Path, fault: Fault = UNDISTURBED) -> Ran:
        """Run the command in a child."""
        log, count = self.work / f"{box.name}.log", self.work / f"{box.name}.calls"
        count.write_text("0")

        def body() -> int:
            from lorakit.cli import main

            if self.without is not None:
                module, name, stand_in = PROTECTIONS[self.without]
                setattr(module, name, stand_in)
            shim = Shim()
            shim.arm(box, fault.call, *MODES[fault.mode])
            code = main(self.arguments(self.output(box)))
            count.write_text(str(shim.calls))
            return int(code)

        code = forked(body, log)
        ran = Ran(code, log.read_text(errors="replace"), int(count.read_text()))
        log.unlink()
        count.unlink()
        return ran


def command_line(command: str, inputs: Path, *changed: str) -> list[str]:
    """The command that every trial runs; `changed` makes it another one's work."""
    if command == "prepare":
        line = ["prepare", str(inputs / "rows.jsonl"), "--tokenizer", str(inputs / "tiny"), "--block-size", "64"]
    elif command == "train":
        line = ["train", "--model", str(inputs / "tiny"), "--blocks", str(inputs / "blocks"), "--max-steps", "6"]
        line += ["--save-steps", "2", "--keep-checkpoints", "1", "--no-gradient-checkpointing"]
    else:
        line = ["merge", str(inputs / "adapter")] if not changed else ["merge"]
    return [*line, *changed]


@contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """A small file system of its own at `folder`. Needs root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


# What must hold


def weights_of(folder: Path, kind: str) -> dict[str, str] | None:
    """The hashes of an artifact's tensors; None where there is no manifest. Raises LorakitError where not whole."""
    if not artifacts.is_artifact(folder):
        return None
    files = artifacts.open_artifact(folder, kind).manifest["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


@dataclass(frozen=True)
class Reference:
    """The undisturbed run: its tensors, those of the artifact that it overwrites, and its calls by mode."""

    new: Mapping[str, str]
    old: Mapping[str, str] | None
    calls: Mapping[str, int]


def problems_after(case: Case, box: Path, fault: Fault, ran: Ran, reference: Reference) -> Iterator[str]:
    """What a struck run did that it mustn't."""
    if MODES[fault.mode][0] in (KILL, TORN):
        if ran.code not in (-signal.SIGKILL, ExitCode.DONE):
            yield f"exit code {ran.code} before the kill"
    elif ran.code not in (ExitCode.DONE, ExitCode.DISK):
        yield f"exit code {ran.code}"
    elif (ran.code == ExitCode.DISK) != (ran.printed.count("error: ") == 1) or "Traceback" in ran.printed:
        yield f"exit code {ran.code} with {ran.printed.count('error: ')} error lines"
    found, kind = None, KINDS[case.command]
    try:
        found = weights_of(case.output(box), kind)
        for folder in [folder for folder in box.iterdir() if not _LEFTOVER.fullmatch(folder.name)]:
            weights_of(folder, kind)
            for checkpoint in folder.glob("checkpoints/step-*"):
                if weights_of(checkpoint, "checkpoint") is None:
                    yield f"{checkpoint.relative_to(box)} without a manifest"
    except LorakitError as error:
        yield error.message
    if found not in (None, reference.new, reference.old):
        yield "an artifact of other bytes"
    if ran.code == ExitCode.DONE and found != reference.new:
        yield "exit code 0 without the artifact"
    if reference.old is not None and case.variant != "mount" and found is None:
        # Between two renames the old one bears no name; who lives on gives it back, unless the disk refuses that too.
        trash = [path for path in box.glob(".trash-*") if weights_of(path, kind) == reference.old]
        if MODES[fault.mode][0] == ONCE or not trash:
            yield "neither the old artifact nor the new one"


def problems_at_end(case: Case, box: Path, ran: Ran, reference: Reference) -> Iterator[str]:
    """What isn't as after an undisturbed run."""
    output = case.output(box)
    if ran.code != ExitCode.DONE:
        yield f"run again: exit code {ran.code}"
        return
    try:
        found = weights_of(output, KINDS[case.command])
        if found != reference.new:
            yield "run again: an artifact of other bytes" if found else "run again: no artifact"
            return
    except LorakitError as error:
        yield f"run again: {error.message}"
        return
    expected = {output, output / artifacts.MANIFEST}
    expected |= {output / name for name in artifacts.read_manifest(output)["files"]}
    if case.command == "train":
        checkpoint = output / "checkpoints" / "step-00000006"
        expected |= {checkpoint.parent, checkpoint, checkpoint / artifacts.MANIFEST}
        expected |= {checkpoint / name for name in artifacts.read_manifest(checkpoint)["files"]}
        steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
        if steps != list(range(1, 7)):
            yield f"run again: metrics of the steps {steps}"
    there = set(box.rglob("*"))
    if there != expected:
        yield "run again: found " + ", ".join(sorted(str(path.relative_to(box)) for path in there ^ expected))


def trial(case: Case, reference: Reference, fault: Fault) -> list[str]:
    """One fault, perhaps a kill while recovering, the same command again: what was wrong."""
    chance = random.Random(repr((case.command, case.variant, fault)))
    with case.box() as box:
        ran = case.run(box, fault)
        problems = list(problems_after(case, box, fault, ran, reference))
        if MODES[fault.mode][0] in (KILL, TORN) and ran.code == ExitCode.DONE:
            problems.append("never struck: the calls of a run aren't the same each time")
        if chance.random() < _SHARE_KILLED_TWICE:
            second = Fault(chance.randint(1, reference.calls["kill"]), "kill")
            ran = case.run(box, second)
            problems += [
                f"killed again at {second.call}: {problem}"
                for problem in problems_after(case, box, second, ran, reference)
            ]
        ran = case.run(box)
        return problems + list(problems_at_end(case, box, ran, reference))


# The whole of it


def undisturbed(case: Case) -> Reference:
    """The reference of a case, and its mutating calls: all of them, and the writes among them, which torn counts."""
    calls = {}
    for mode in ("kill", "torn"):
        with case.box() as box:
            before = weights_of(case.output(box), KINDS[case.command])
            ran = case.run(box, Fault(0, mode))
            after = weights_of(case.output(box), KINDS[case.command]) if ran.code == ExitCode.DONE else None
            if after is None or not ran.calls:
                raise RuntimeError(f"{case.command} {case.variant}: exit code {ran.code}\n{ran.printed}")
            calls[mode] = ran.calls
    return Reference(after, before, {mode: calls["torn" if mode == "torn" else "kill"] for mode in MODES})


def make_inputs(work: Path) -> None:
    """Inputs of every command, an older artifact of each, and a run folder whose `--overwrite` was killed late."""
    from lorakit.cli import main

    inputs, older = work / "inputs", work / "older"

    def made(command: str, output: Path, *changed: str) -> None:
        code = main([*command_line(command, inputs, *changed), "--output", str(output)])
        if code:
            raise RuntimeError(f"{command}: exit code {code}")

    def kill_self(new: Path, target: Path, own: Collection[str]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def first() -> int:
        inputs.mkdir()
        make_llama(inputs / "tiny")
        (inputs / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        made("prepare", inputs / "blocks")
        made("train", inputs / "adapter")
        made("prepare", older / "prepare", "--block-size", "256", "--pack", "none")
        made("train", older / "train", "--seed", "1")
        made("merge", older / "merge", str(older / "train"))
        return 0

    def killed() -> int:
        artifacts.replace = kill_self  # type: ignore[assignment]
        made("train", work / "killed" / "train" / "output", "--seed", "2", "--overwrite")
        return 0

    log = work / "inputs.log"
    if forked(first, log):
        raise RuntimeError(log.read_text())
    shutil.copytree(older / "train", work / "killed" / "train" / "output")
    if forked(killed, log) != -signal.SIGKILL:
        raise RuntimeError(log.read_text())


def strike(
    work: Path,
    modes: Sequence[str],
    every: Mapping[str, int],
    jobs: int,
    variants: Sequence[str] | None = None,
    without: str | None = None,
) -> Tally:
    """Strike each command of `every` at every so manieth of its calls. A trial that was bad is a failure."""
    tally = Tally()
    for command, step in every.items():
        for variant in VARIANTS[command]:
            if (variants and variant not in variants) or (variant == "mount" and os.geteuid() != 0):
                continue
            reference = undisturbed(Case(work, command, variant))
            case = Case(work, command, variant, without)
            faults = [
                Fault(call, mode)
                for number, mode in enumerate(modes)
                for call in range(1 + number % step, reference.calls[mode] + 1, step)
            ]
            for fault, problems in zip(faults, spread(partial(trial, case, reference), faults, jobs), strict=True):
                tally.add(f"{command} {variant} {fault.mode} at call {fault.call}", problems)
    return tally


EVERY: Mapping[bool, Mapping[str, int]] = {
    True: {"prepare": 1, "train": 4, "merge": 1},
    False: {"prepare": 1, "train": 16, "merge": 4},
}
"""At every which call of a command a kill, or a failing disk, strikes."""


def prove(work: Path, *, kills: bool, short: bool, jobs: int, without: str | None = None) -> Tally:
    """P1 and P6. A protection is taken away where it is known to matter."""
    modes = ("kill", "torn") if kills else ("enospc", "eio", "full")
    if without is not None:
        command, variant, mode = FOUND_BY[without]
        return strike(work, [mode], {command: 1 if command == "prepare" else 3}, jobs, [variant], without)
    if short:
        return strike(work, modes, {"prepare": 9, "train": 45, "merge": 20}, jobs, ["new"])
    return strike(work, modes, EVERY[kills], jobs)


FOUND_BY = {
    "sweep": ("prepare", "new", "kill"),
    "manifest-last": ("prepare", "empty", "kill"),
    "replace-by-rename": ("prepare", "overwrite", "kill"),
    "whole-stages-only": ("prepare", "empty", "kill"),
    "write-errors": ("prepare", "new", "enospc"),
    "remove-by-rename": ("train", "new", "kill"),
}
"""Where the loop finds that a protection is missing."""
