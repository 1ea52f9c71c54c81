"""Every promise as a figure: `python -m tests.faults` prints the table; `--short` and names (`P1 P7`) make it quick.

Each row is proven, and then once more with a protection taken away: a row that stays green then proves nothing, and
counts as failed. The exit code is 1 where a row failed.
"""

import argparse
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")


def preloaded() -> None:
    """This program again with the shim before libc, which can only be put there at the start."""
    with tempfile.TemporaryDirectory(prefix="lorakit-shim-") as folder:
        shim = Path(folder) / "shim.so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", shim, HERE / "shim.c", "-ldl"], check=True)
        from tests.faults.server import ENVIRONMENT

        environment = {**os.environ, **ENVIRONMENT, "LD_PRELOAD": str(shim)}
        program = [sys.executable, "-m", "tests.faults", *sys.argv[1:]]
        sys.exit(subprocess.run(program, env=environment, check=False).returncode)


def main() -> int:
    from tests.faults.promises import PROMISES

    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"rows, of {' '.join(PROMISES)}; left out: all")
    parser.add_argument("--short", action="store_true", help="a few trials of each, as the tests do")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(PROMISES):
        parser.error(f"no such row: {' '.join(sorted(unknown))}")
    if "LD_PRELOAD" not in os.environ:
        preloaded()
    began, bad, lines = time.monotonic(), 0, []
    with tempfile.TemporaryDirectory(prefix="lorakit-faults-") as folder:
        work = Path(folder).resolve()
        os.environ |= {"LORAKIT_CACHE": str(work / "cache"), "HF_HOME": str(work / "hf"), "TMPDIR": str(work / "tmp")}
        (work / "tmp").mkdir()
        tempfile.tempdir = None
        from tests.faults.loop import make_inputs
        from tests.faults.server import import_all, said_by
        from tests.faults.trainer import compared

        chosen = {
            name: promise
            for name, promise in PROMISES.items()
            if name in asked.names or (not asked.names and (promise.in_short or not asked.short))
        }
        import_all()
        make_inputs(work)
        for name, promise in chosen.items():
            started, cpu_before = time.monotonic(), cpu_seconds()

            def proven(without: str | None, name: str = name) -> list[object]:
                room = work / f"{name}-{without or 'whole'}"
                room.mkdir()
                tally = PROMISES[name].prove(work, short=asked.short, jobs=asked.jobs, without=without)
                return [tally.count, tally.failures, tally.note]

            count, failures, note = said_by(lambda: proven(None), work / f"{name}.log", 3600)
            noticed = []
            for without in promise.without[:1] if asked.short else promise.without:
                if not said_by(lambda without=without: proven(without), work / f"{name}.log", 3600)[1]:  # type: ignore[misc]
                    failures.append(f"nothing was noticed without {without}")
                else:
                    noticed.append(without)
            bad += bool(failures) or not count
            seconds, cpu = time.monotonic() - started, cpu_seconds() - cpu_before
            red = f"red without {', '.join(noticed) or 'nothing'}"
            how = promise.how + (f"; {note}" if note else "")
            figures = (f"{count:,}", str(len(failures)), red, f"{seconds:.0f}", f"{cpu:.0f}")
            lines.append(f"| {' | '.join((name, promise.claim, how, *figures))} |")
            say(f"{name}: {count:,} trials, {len(failures)} failed, {red}, {seconds:.1f} s, {cpu:.1f} CPU s; {note}")
            for failure in failures[:20]:
                say(f"  {failure}")
        beside = (
            said_by(lambda: compared(work, asked.jobs), work / "peer.log", 3600)
            if "P1" in chosen and not asked.short
            else ""
        )
    columns = ("", "promise", "tested by", "trials", "failed", "negative control", "s", "CPU s")
    say(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    say("\n".join(lines))
    say(f"\n{beside}")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    say(
        f"\n{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({platform.machine()}), Linux {platform.release()}, "
        f"Python {platform.python_version()}, {versions}; {(time.monotonic() - began) / 60:.1f} minutes, "
        f"{cpu_seconds() / 60:.1f} of CPU time"
    )
    return int(bad > 0)


def cpu_seconds() -> float:
    """Processor time of all processes that this one has waited for, which other work on the machine adds little to."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
