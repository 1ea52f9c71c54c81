"""Long work with memory and file handles that stay flat: steps with checkpoints, rows by the gigabyte, many merges."""

import gzip
import itertools
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lorakit.core import blocks
from lorakit.core.training import loop
from tests.faults.server import begun, command, ended, said_by_each
from tests.faults.tally import Tally
from tests.faults.training import line

MORE_BYTES = 24 * 2**20
"""How much more than after a tenth of the work is still flat: allocators keep what they once had."""
_PAGE = os.sysconf("SC_PAGE_SIZE")
_LEAKED: list[Any] = []


def resident_bytes(pid: int | str = "self") -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def flat(samples: list[tuple[int, int]]) -> list[str]:
    """Problems of (bytes, files) that were taken at even distances."""
    tenth = max(1, len(samples) // 10)
    bytes_then, files_then = (max(column) for column in zip(*samples[: tenth + 1], strict=True))
    bytes_now, files_now = (max(column) for column in zip(*samples[tenth:], strict=True))
    problems = [] if bytes_now <= bytes_then + MORE_BYTES else [f"{(bytes_now - bytes_then) / 2**20:.0f} MiB more"]
    return problems + ([] if files_now <= files_then else [f"{files_now - files_then} more open files"])


def leak(without: str | None) -> None:
    if without is not None:
        _LEAKED.append((bytearray(os.urandom(2**20)), open(os.devnull)))  # noqa: SIM115


def steps(work: Path, count: int, without: str | None) -> Any:
    """A run with a checkpoint each ten steps, looked at each hundred."""
    samples, one_step = [], loop.Run._one_step

    def watched(run: Any, should_stop: Any) -> None:
        one_step(run, should_stop)
        if run.state.step % 100 == 0:
            leak(without)
            samples.append((resident_bytes(), open_files()))

    loop.Run._one_step = watched  # type: ignore[method-assign]
    output = work / "endless"
    code = command(line(work, output, count, "--save-steps", 10, "--rank", 2, "--logging-steps", 10))
    shutil.rmtree(output)
    return [flat(samples) if code == 0 else [f"exit code {code}"], samples[-1][0], samples[-1][1]]


def merges(work: Path, count: int, without: str | None) -> Any:
    samples, output = [], work / "merged-again"
    for _ in range(count):
        code = command(["merge", work / "inputs" / "adapter", "--output", output, "--quiet"])
        if code:
            return [[f"exit code {code}"], 0, 0]
        shutil.rmtree(output)
        leak(without)
        samples.append((resident_bytes(), open_files()))
    return [flat(samples), samples[-1][0], samples[-1][1]]


def stream(path: Path, size_bytes: int) -> int:
    """JSONL that unpacks to so many bytes, in little room: one gzip member over and over. Rows are short conversations
    beside a column that isn't used, of 64 KB. Returns the bytes."""
    chance, rows = random.Random(0), []
    for number in range(256):
        words = " ".join(str(chance.random()) for _ in range(4))
        rows.append(json.dumps({"prompt": f"{number}?", "completion": words, "unused": words * 900}) + "\n")
    member = "".join(rows).encode()
    packed = gzip.compress(member, 6)
    times = size_bytes // len(member)
    with path.open("wb") as file:
        for _ in range(times):
            file.write(packed)
    return times * len(member)


def prepared(work: Path, size_bytes: int) -> tuple[int, int, list[int]]:
    """Bytes that `prepare` read, exit code, and the memory of its process, ten times a second."""
    source, output = work / "stream.jsonl.gz", work / "stream-blocks"
    read_bytes = stream(source, size_bytes)
    given = ["--tokenizer", work / "inputs" / "tiny", "--block-size", 256, "--output", output, "--quiet"]

    def body() -> int:
        blocks._SHARD_BYTES = (
            4 * 2**20
        )  # of which a quarter of the stream fills some too: one is held while it is filled
        return command(["prepare", source, *given, "--num-workers", 1])

    child = begun(body, work / "stream.log", 3600)
    samples, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(0.1):
            try:
                samples.append(resident_bytes(child))
            except (OSError, IndexError):
                return

    watcher = threading.Thread(target=look)
    watcher.start()
    code = ended(child)
    done.set()
    watcher.join()
    source.unlink()
    shutil.rmtree(output, ignore_errors=True)
    return read_bytes, code, samples


def rows(work: Path, size_bytes: int) -> Any:
    """A stream, of which the first quarter takes what all of it takes."""
    began = time.monotonic()
    read_bytes, code, samples = prepared(work, size_bytes)
    seconds = time.monotonic() - began
    first, peak = max(samples[: len(samples) // 4 + 1]), max(samples)
    problems = [] if code == 0 else [f"exit code {code}"]
    if peak > first + MORE_BYTES:
        problems.append(f"{peak / 2**20:.0f} MiB, {first / 2**20:.0f} in the first quarter")
    note = f"{read_bytes / 1e9:.1f} GB of rows in {peak / 2**20:.0f} MiB, {first / 2**20:.0f} in the first quarter"
    return [["rows by the gigabyte", problems, f"{note}, {read_bytes / 1e6 / seconds:.0f} MB/s"]]


def in_a_row(name: str, body: Callable[[], Any]) -> Any:
    problems, resident, files = body()
    return [[name, problems, f"{name} at {resident / 2**20:.0f} MiB with {files} open files"]]


def prove(work: Path, *, short: bool, jobs: int, without: str | None = None) -> Tally:
    """Steps by one process, merges and then rows by another: `jobs` isn't used."""
    num_steps, num_merges, size_bytes = (1000, 30, 2**28) if short else (10_000, 200, 20 * 10**9)
    num_merges = 40 if without else num_merges
    merging = partial(in_a_row, f"{num_merges} merges", partial(merges, work, num_merges, without))
    bodies: list[Callable[[], Any]] = [merging]
    if without is None:
        stepping = partial(in_a_row, f"{num_steps:,} steps", partial(steps, work, num_steps, None))
        bodies = [stepping, lambda: merging() + rows(work, size_bytes)]
    tally = Tally()
    for name, problems, note in itertools.chain(*said_by_each(bodies, work / "enduring.log", 3600)):
        tally += Tally(1, [f"{name}: {'; '.join(problems)}"] if problems else [], note)
    return tally
