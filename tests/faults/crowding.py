"""Eight processes run the same command on the same output at the same moment: one artifact, whole, of one of them.

Also where the file system's locks do nothing (flock that always succeeds, as on some network disks): then a file
that names its owner takes their place.
"""

import fcntl
import time
from collections.abc import Iterator
from pathlib import Path

from lorakit.core import disk
from lorakit.core.errors import ExitCode, LorakitError
from tests.faults import loop
from tests.faults.server import begun, command, ended
from tests.faults.tally import Tally

PROCESSES = 8
_TOLD = {ExitCode.DONE, ExitCode.BUSY}


def crowd(case: loop.Case, box: Path, *, locks: bool, without: str | None) -> list[tuple[int, str]]:
    """How each process ended, and what it printed."""
    start = time.monotonic() + 0.15

    def body() -> int:
        if not locks:
            fcntl.flock = lambda *_: None  # type: ignore[assignment]
        if without is not None:
            disk._owned = lambda _: None
        time.sleep(max(0.0, start - time.monotonic()))
        return command(case.arguments(case.output(box)))

    logs = [case.work / f"crowd-{number}.log" for number in range(PROCESSES)]
    children = [begun(body, log) for log in logs]
    return [(ended(child), log.read_text(errors="replace")) for child, log in zip(children, logs, strict=True)]


def problems_of(
    case: loop.Case, box: Path, reference: loop.Reference, ends: list[tuple[int, str]], *, locks: bool
) -> Iterator[str]:
    codes = [code for code, _ in ends]
    for code, said in ends:
        if code not in _TOLD or (code != 0) != (said.count("error: ") == 1) or "Traceback" in said:
            yield f"exit code {code}: {said[-200:]}"
    if ExitCode.DONE not in codes:
        yield f"no winner: {sorted(codes)}"
    try:
        found = loop.weights_of(case.output(box), loop.KINDS[case.command])
        if found is None and ExitCode.DONE in codes:
            yield "a winner, and nothing there"
        elif found not in (None, reference.new):
            yield "a mixture"
    except LorakitError as error:
        yield error.message
    ran = case.run(box)
    yield from loop.problems_at_end(case, box, ran, reference)


def prove(work: Path, *, short: bool, jobs: int, without: str | None = None) -> Tally:
    """`jobs` isn't used: the crowd is all at once."""
    rounds = {"prepare": 2, "merge": 2} if short or without else {"prepare": 20, "merge": 20, "train": 10}
    tally, won, told = Tally(), 0, 0
    for name, count in rounds.items():
        case = loop.Case(work, name, "new")
        reference = loop.undisturbed(case)
        for locks in (False,) if without else (True, False):
            for number in range(count):
                with case.box() as box:
                    ends = crowd(case, box, locks=locks, without=without)
                    won += sum(code == 0 for code, _ in ends)
                    told += sum(code != 0 for code, _ in ends)
                    problems = list(problems_of(case, box, reference, ends, locks=locks))
                tally.add(f"{name}, round {number}, {'locks' if locks else 'locks that do nothing'}", problems)
    tally.note = f"{PROCESSES} processes a round: {won} finished or found it done, {told} were told why not"
    return tally
