"""Promises about a run: exact after any stop, exact on any number of processes, ended by signals, deaths and NaN."""

import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorakit.core import parallel
from lorakit.core.blocks import Blocks
from lorakit.core.config import TrainConfig
from lorakit.core.training import loop
from lorakit.core.training.schedule import Schedule
from lorakit.core.weights import open_weights
from tests.core.training import test_exactness as poisons
from tests.core.training.test_reference import whole_gradients
from tests.faults.server import begun, command, ended, forked, spread
from tests.faults.tally import Tally

DDP = ("--parallel", "ddp")


def line(work: Path, output: Path, steps: int, *options: object) -> list[str]:
    given = ("--model", work / "inputs" / "tiny", "--blocks", work / "inputs" / "blocks", "--output", output)
    more = ("--max-steps", steps, "--lora-dropout", 0.2, "--no-gradient-checkpointing", "--quiet", *options)
    return ["train", *map(str, (*given, *more))]


def ranks(arguments: Sequence[str], log: Path, before: Callable[[int], None] = lambda rank: None) -> list[int]:
    """The pids of two processes that train together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def body(rank: int) -> int:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        before(rank)
        return command([*arguments, *DDP])

    return [begun(partial(body, rank), log.with_suffix(f".rank{rank}")) for rank in range(2)]


def adapter(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def states(folder: Path, step: int) -> bytes:
    return (folder / "checkpoints" / f"step-{step:08d}" / "optimizer.safetensors").read_bytes()


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [one["loss"] for one in lines if "loss" in one]


@contextmanager
def room_of(work: Path, name: str) -> Iterator[Path]:
    folder = work / name
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


# P2

VARIANTS: Mapping[str, Sequence[object]] = {
    "fp32": (),
    "bf16, accumulation 4": ("--dtype", "bf16", "--effective-batch-size", 4),
}


def goes_on(work: Path, steps: int, case: tuple[str, int]) -> list[str]:
    """A run that begins with the checkpoint that an undisturbed one made after a step."""
    variant, step = case
    whole = work / f"whole-{variant}"
    with room_of(work, f"resumed-{variant}-{step}") as folder:
        run, name = folder / "run", f"step-{step:08d}"
        shutil.copytree(whole / "checkpoints" / name, run / "checkpoints" / name)
        shutil.copy(whole / "metrics.jsonl", run)
        log = folder / "log"
        code = forked(lambda: command(line(work, run, steps, *_keeping_all(steps), *VARIANTS[variant])), log)
        if code:
            return [f"exit code {code}: {log.read_text()[-300:]}"]
        same = {
            "adapter": adapter(run) == adapter(whole),
            "optimizer": states(run, steps) == states(whole, steps),
            "losses": losses(run) == losses(whole),
        }
        return [f"another {what}" for what, is_same in same.items() if not is_same]


def _keeping_all(steps: int) -> tuple[object, ...]:
    return ("--save-steps", 1, "--keep-checkpoints", steps)


def prove_resume(work: Path, *, short: bool, jobs: int, without: str | None = None) -> Tally:
    steps = 12 if short or without else 60
    if without == "seeds of micro-steps":
        loop.torch = _Unseeded()
    tally = Tally()
    for variant, options in VARIANTS.items():
        log = work / "whole.log"
        whole = line(work, work / f"whole-{variant}", steps, *_keeping_all(steps), *options)
        if forked(partial(command, whole), log):
            raise RuntimeError(log.read_text())
        chosen = [3, 8] if short or without else range(1, steps)
        cases = [(variant, step) for step in chosen]
        for case, problems in zip(cases, spread(partial(goes_on, work, steps), cases, jobs), strict=True):
            tally.add(f"{variant}, gone on after step {case[1]}", problems)
        shutil.rmtree(work / f"whole-{variant}")
    return tally


class _Unseeded:
    """torch, where nothing is seeded."""

    def __getattr__(self, name: str) -> Any:
        return (lambda _: None) if name == "manual_seed" else getattr(torch, name)


# P3


def seen_by(rank: int, folder: Path) -> None:
    """Write down which blocks a process computes with, a line a micro-step."""
    original, go, running = loop.loss_sum, loop.Run.go, []

    def noted_go(run: Any, should_stop: Any) -> Any:
        running.append(run)
        return go(run, should_stop)

    def noted(model: Any, batch: Any, *rest: Any) -> Any:
        with (folder / f"seen-{rank}").open("a") as file:
            file.write(json.dumps([running[0].state.step, [int(row.sum()) for row in batch.ids_BT]]) + "\n")
        return original(model, batch, *rest)

    loop.loss_sum, loop.Run.go = noted, noted_go  # type: ignore[method-assign]


def samples(folder: Path) -> list[Any]:
    """All samples of each step, as their sums of ids."""
    seen = [json.loads(one) for path in folder.glob("seen-*") for one in path.read_text().splitlines()]
    return sorted([step, sum_of_ids] for step, sums in seen for sum_of_ids in sums)


def prove_world_sizes(work: Path, *, short: bool, jobs: int, without: str | None = None) -> Tally:
    """One process, two from a third of the steps on, one again from two thirds on: beside one all along."""
    tally = Tally()
    steps = 9 if short or without else 30
    third = steps // 3
    for seed in range(1 if short or without else 3):
        options = ("--effective-batch-size", 4, "--seed", seed, *_keeping_all(steps))
        with room_of(work, f"worlds-{seed}") as room:

            def before(rank: int, name: str, room: Path = room) -> None:
                (room / name).mkdir(exist_ok=True)
                seen_by(rank, room / name)
                if without is not None:
                    parallel.World.sum_gradients = lambda *_: None  # type: ignore[method-assign]

            def alone(name: str, options: tuple[object, ...] = options, room: Path = room) -> None:
                def body() -> int:
                    before(0, name, room)
                    return command(line(work, room / name / "run", steps, *options))

                if forked(body, room / "log"):
                    raise RuntimeError((room / "log").read_text())

            def together(name: str, options: tuple[object, ...] = options, room: Path = room) -> None:
                (room / name).mkdir(exist_ok=True)
                both = ranks(
                    line(work, room / name / "run", steps, *options),
                    room / "log",
                    lambda rank: before(rank, name, room),
                )
                if any([ended(pid) for pid in both]):
                    raise RuntimeError("".join(path.read_text() for path in room.glob("log.rank*")))

            def continues(name: str, earlier: str, step: int, room: Path = room) -> None:
                kept = room / name / "run" / "checkpoints"
                kept.mkdir(parents=True)
                shutil.copytree(room / earlier / "run" / "checkpoints" / f"step-{step:08d}", kept / f"step-{step:08d}")
                shutil.copy(room / earlier / "run" / "metrics.jsonl", kept.parent)

            alone("one")
            continues("two", "one", third)
            together("two")
            continues("again", "two", 2 * third)
            alone("again")
            expected = losses(room / "one" / "run")
            found = losses(room / "again" / "run")
            seen = [one for one in samples(room / "two") if one[0] < 2 * third] + samples(room / "again")
            same = seen == [one for one in samples(room / "one") if one[0] >= third]
            for step, (one, other) in enumerate(zip(expected, found, strict=True), 1):
                problems = [] if math.isclose(one, other, rel_tol=1e-6) else [f"loss {other}, need {one}"]
                tally.add(f"seed {seed}, step {step}", problems + ([] if same else ["other samples"]))
    return tally


# P8


_SECONDS_APART = 10.0  # they save together, and end


def _long(work: Path, output: Path) -> list[str]:
    return line(work, output, 24, "--save-steps", 1000, "--keep-checkpoints", 1, "--effective-batch-size", 2)


def _ended_as_launched(pids: Sequence[int]) -> list[int]:
    """Exit codes, where who is left is killed some seconds after the first has gone, as the launcher does it later."""
    codes: dict[int, int] = {}
    deadline = math.inf
    while len(codes) < len(pids):
        for pid in [pid for pid in pids if pid not in codes]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                deadline = min(deadline, time.monotonic() + _SECONDS_APART)
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return list(codes.values())


def stopped(work: Path, longest: float, number: int) -> Any:
    """A run that is told to stop at some moment, and run again: problems, the seconds until it had ended, and whether
    it stopped behind a step."""
    two = number % 2 == 1
    moment = random.Random(number).uniform(0.02, longest * (1.5 if two else 1))
    with room_of(work, f"stopped-{number}") as folder:
        run, log = folder / "run", folder / "log"
        arguments = _long(work, run)
        pids = ranks(arguments, log) if two else [begun(partial(command, arguments), log)]
        time.sleep(moment)
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        asked = time.monotonic()
        codes = set(_ended_as_launched(pids))
        seconds = time.monotonic() - asked
        said = "".join(path.read_text(errors="replace") for path in folder.glob("log*"))
        # 0: it was done; -15: it had not begun to listen, or looked for the other; 10: it had found one that did
        allowed = ({75}, {0}, {-15}, {-15, 75}, {-15, 10})
        problems = [] if codes in allowed else [f"exit codes {codes}: {said[-300:]}"]
        problems += ["a traceback"] if "Traceback" in said else []
        if found := re.search(r"stopped after step (\d+)", said):
            step = run / "checkpoints" / f"step-{int(found[1]):08d}"
            problems += [] if (step / "lorakit.json").is_file() else [f"{step.name} was said to be saved"]
        pids = ranks(arguments, log) if two else [begun(partial(command, arguments), log)]
        codes = {ended(pid) for pid in pids}
        same = codes == {0} and adapter(run) == adapter(work / f"undisturbed-{1 + two}")
        problems += [] if same else [f"run again: exit codes {codes}, or another adapter"]
        return [problems, seconds, found is not None]


def prove_signals(work: Path, *, short: bool, jobs: int, without: str | None = None) -> Tally:
    began = time.monotonic()
    for size in (1, 2):
        run, log = work / f"undisturbed-{size}", work / "undisturbed.log"
        pids = ranks(_long(work, run), log) if size == 2 else [begun(partial(command, _long(work, run)), log)]
        if any([ended(pid) for pid in pids]):
            raise RuntimeError("".join(path.read_text() for path in work.glob("undisturbed.*")))
    longest = (time.monotonic() - began) / 2
    if without is not None:
        loop.Run._save = lambda *_: None  # type: ignore[method-assign]
    numbers = range(10 if short or without else 100)
    tally, latest, behind_steps = Tally(), 0.0, 0
    for number, (problems, seconds, behind_step) in zip(
        numbers, spread(partial(stopped, work, longest), numbers, jobs), strict=True
    ):
        tally.add(f"moment {number}", problems)
        latest, behind_steps = max(latest, seconds), behind_steps + behind_step
    if not behind_steps:
        tally.failures.append("no moment met a step")
    for size in (1, 2):
        shutil.rmtree(work / f"undisturbed-{size}")
    tally.note = f"{behind_steps} met a step; at most {latest:.1f} s from the signal to the end"
    return tally


# P9

_TIMEOUT_SECONDS = 4


def bereaved(work: Path, without: str | None, number: int) -> list[str]:
    """Two ranks of which one is killed, or stops to answer: the other ends by itself and names what it found."""
    hangs = number % 3 == 2
    with room_of(work, f"bereaved-{number}") as folder:
        run, log = folder / "run", folder / "log"

        def before(rank: int) -> None:
            if without is None:
                parallel._TIMEOUT = parallel.timedelta(seconds=_TIMEOUT_SECONDS)

        pids = ranks(line(work, run, 100_000, "--save-steps", 5, "--keep-checkpoints", 2), log, before)
        deadline = time.monotonic() + 60
        while not list(run.glob("checkpoints/step-*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(random.Random(number).uniform(0, 1))
        os.kill(pids[1], signal.SIGSTOP if hangs else signal.SIGKILL)
        struck, allowed = time.monotonic(), 10 + (_TIMEOUT_SECONDS if hangs else 0)
        code = None
        while code is None and time.monotonic() - struck < allowed:
            done, status = os.waitpid(pids[0], os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if done else None
            time.sleep(0.02)
        for pid in pids[1:] if code is not None else pids:
            os.kill(pid, signal.SIGKILL)
            ended(pid)
        said = log.with_suffix(".rank0").read_text(errors="replace")
        problems = [] if code == 10 else [f"exit code {code} after {allowed} s: {said[-300:]}"]
        problems += ["a traceback"] if "Traceback" in said else []
        for checkpoint in run.glob("checkpoints/step-*"):
            problems += [] if (checkpoint / "lorakit.json").is_file() else [f"half of {checkpoint.name}"]
        return problems


def prove_deaths(work: Path, *, short: bool, jobs: int, without: str | None = None) -> Tally:
    numbers = [2] if without else range(3 if short else 15)
    tally = Tally(note="every third hangs instead of dying")
    found = spread(partial(bereaved, work, without), numbers, 1 if short or without else jobs)
    for number, problems in zip(numbers, found, strict=True):
        tally.add(f"rank 1 {'hung' if number % 3 == 2 else 'died'}, {number}", problems)
    return tally


# P11


def gradients(work: Path, without: str | None, case: tuple[int, int, int]) -> list[str]:
    """The gradients of a step cut into micro-steps, in fp64, beside those of transformers' own loss over all of it."""
    batch_size, blocks_of_a_step, seed = case
    values = {"batch_size": batch_size, "effective_batch_size": 8, "rank": 4, "gradient_checkpointing": False}
    blocks, tiny = work / "inputs" / "blocks", work / "inputs" / "tiny"
    config = TrainConfig.resolve((None, {"model": str(tiny), "blocks": str(blocks), **values})).settled()
    world = parallel.alone(torch.device("cpu"))
    with room_of(work, f"gradients-{'-'.join(map(str, case))}") as folder:
        run = loop.Run(
            config, folder / "run", Blocks([blocks]), open_weights(tiny), None, {}, None, world, lambda _: None
        )
        run.model.double()
        run.schedule = Schedule(len(run.blocks), blocks_of_a_step, blocks_of_a_step, seed)
        with torch.no_grad():
            for number, parameter in enumerate(run.parameters.values()):
                numbers = torch.Generator().manual_seed(100 * seed + number)
                parameter.copy_(torch.randn(parameter.shape, generator=numbers) / 10)
        expected, _, count = whole_gradients(run)
        found: list[torch.Tensor] = []

        def look(parameters: Any, _: float) -> torch.Tensor:
            found.extend(parameter.grad.clone() for parameter in parameters)
            return torch.ones(())

        original, summed = loop.clip_gradients, loop.loss_sum
        loop.clip_gradients = look
        if without is not None:  # a mean over each micro-step, as many trainers had it
            loop.loss_sum = lambda model, part, *rest: (
                summed(model, part, *rest) / max(part.trained_tokens, 1) * count / 4
            )
        try:
            run._step()
        finally:
            loop.clip_gradients, loop.loss_sum = original, summed
        worst = max(float((one - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True))
        return [] if worst < 1e-6 else [f"off by {worst:.3g}"]


def prove_accumulation(work: Path, *, short: bool, jobs: int, without: str | None = None) -> Tally:
    sizes = (1, 2, 4, 8)
    cases = list(itertools.product(sizes, (8, 7, 5), range(1 if short or without else 6)))
    tally = Tally()
    for case, problems in zip(cases, spread(partial(gradients, work, without), cases, jobs), strict=True):
        tally.add(f"{case[0]} of {case[1]} blocks at once, seed {case[2]}", problems)
    return tally


# P12


def poisoned(work: Path, without: str | None, number: int) -> list[str]:
    """A number that is none, somewhere in a run of six steps; every fifth in rank 1 of two, every tenth run again."""
    chance = random.Random(number)
    step = chance.randrange(6)
    value = chance.choice((math.nan, math.inf, -math.inf))
    poison = chance.choice(
        (
            lambda: poisons.in_loss(step + 1, value),
            lambda: poisons.in_gradient(step, chance.randrange(28), value),
            lambda: poisons.in_activation(step, chance.randrange(2)),
            lambda: poisons.in_parameter(step + 1, chance.randrange(28)),
        )
    )()
    two = number % 5 == 4
    with room_of(work, f"poisoned-{number}") as folder:
        run, log = folder / "run", folder / "log"
        options = ("--save-steps", chance.choice((1, 2, 6)), "--effective-batch-size", 2)
        arguments = line(work, run, 6, *options)

        def taken_away() -> None:
            if without is not None:
                loop.math = _Finite()  # type: ignore[assignment]
                loop.torch.isfinite = torch.ones_like

        def body() -> int:
            taken_away()
            poison(pytest.MonkeyPatch())
            return command(arguments)

        def before(rank: int) -> None:
            taken_away()
            if rank == 1:
                poison(pytest.MonkeyPatch())

        codes = [ended(pid) for pid in ranks(arguments, log, before)] if two else [forked(body, log)]
        said = "".join(path.read_text(errors="replace") for path in folder.glob("log*"))
        never = two and codes == [0, 0]  # rank 1 has only the second micro-step of each step
        problems = [] if set(codes) == {8} or never else [f"exit codes {codes}: {said[-200:]}"]
        problems += ["a traceback"] if "Traceback" in said else []
        problems += [f"{path.name} holds no number" for path in run.rglob("*.safetensors") if not _finite(path)]
        if number % 10 == 0 and not problems:
            code = forked(partial(command, arguments), log)
            clean = folder / "clean"
            forked(partial(command, line(work, clean, 6, *options)), log)
            problems += [] if code == 0 and adapter(run) == adapter(clean) else [f"run again: exit code {code}"]
        return problems


class _Finite:
    """math, where every number is finite."""

    def __getattr__(self, name: str) -> Any:
        return (lambda _: True) if name == "isfinite" else getattr(math, name)


def _finite(path: Path) -> bool:
    import safetensors.numpy

    tensors = safetensors.numpy.load(path.read_bytes()).values()
    return all(bool(np.isfinite(tensor).all()) for tensor in tensors if tensor.dtype.kind == "f")


def prove_no_nan(work: Path, *, short: bool, jobs: int, without: str | None = None) -> Tally:
    # 39: a parameter of rank 1 alone, in the step that is saved
    numbers = [*range(9), 39] if short else range(12 if without else 100)
    tally = Tally()
    for number, problems in zip(numbers, spread(partial(poisoned, work, without), numbers, jobs), strict=True):
        tally.add(f"poison {number}", problems)
    return tally
