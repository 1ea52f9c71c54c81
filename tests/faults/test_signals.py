"""Real runs, alone and on two ranks, that are told to stop or lose a rank: what is said, and what is left.

In full, 50 moments each: `pytest -m slow tests/faults/test_signals.py`.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Ran, make_llama

Command = list[str]
TWO_RANKS = ("--parallel", "ddp", "--num-processes", "2")


@pytest.fixture
def command(cli: Callable[..., Ran], rows_file: Path, tmp_path: Path) -> Callable[..., Command]:
    """The command line of a run of 60 steps in a folder: command("name", options…)."""
    model = make_llama(tmp_path / "model")
    prepared = cli("prepare", rows_file, "--tokenizer", model, "--block-size", 64, "--output", tmp_path / "blocks")
    assert prepared.code == 0

    def made(name: str, *options: str) -> Command:
        given = ("--model", model, "--blocks", tmp_path / "blocks", "--output", tmp_path / name, "--max-steps", 60)
        more = ("--save-steps", 15, "--lora-dropout", "0.1", "--effective-batch-size", 2, "--quiet", *options)
        return [sys.executable, "-m", "lorakit", "train", *map(str, (*given, *more))]

    return made


def started(command: Command) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finished(command: Command) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def folder_of(command: Command) -> Path:
    return Path(command[command.index("--output") + 1])


def adapter(command: Command) -> bytes:
    return (folder_of(command) / "adapter_model.safetensors").read_bytes()


def stopped_at_random(command: Callable[..., Command], options: tuple[str, ...], times: int) -> None:
    """Stopped `times` times at random moments, each time in a new folder, and run again: 75, and the same adapter."""
    whole = command("whole", *options)
    began = time.monotonic()
    finished(whole)
    seconds = time.monotonic() - began
    choose = random.Random(0)
    for number in range(times):
        run = command(f"stopped-{number}", *options)
        process = started(run)
        delay = choose.uniform(0.5, seconds)
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
        assert process.returncode in (75, 0), (delay, said)
        assert "Traceback" not in said
        if process.returncode == 75:
            assert said.count("error: ") == 1, said
            finished(run)
        assert adapter(run) == adapter(whole), delay


def test_a_run_that_is_told_to_stop_goes_on_to_the_same_adapter(command: Callable[..., Command]) -> None:
    stopped_at_random(command, (), 1)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("options", [(), TWO_RANKS], ids=["alone", "two ranks"])
def test_fifty_random_moments(command: Callable[..., Command], options: tuple[str, ...]) -> None:
    stopped_at_random(command, options, 50)


def workers_of(launcher: int) -> dict[str, int]:
    """The processes that a launcher started, by their rank."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            parent = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1]
            variables = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ranks = [variable[5:].decode() for variable in variables if variable.startswith(b"RANK=")]
        if int(parent) == launcher and ranks:
            found[ranks[0]] = int(name)
    return found


def saved(command: Command, process: subprocess.Popen[str]) -> None:
    """Wait until the run has a checkpoint."""
    deadline = time.monotonic() + 120
    while not (folder_of(command) / "checkpoints" / "step-00000015").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_two_ranks_stop_together_and_one_that_is_killed_ends_the_run_within_seconds(
    command: Callable[..., Command],
) -> None:
    whole, run = command("whole", *TWO_RANKS), command("run", *TWO_RANKS)
    finished(whole)
    process = started(run)
    saved(run, process)
    os.kill(workers_of(process.pid)["1"], signal.SIGKILL)
    killed = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - killed < 10
    assert process.returncode == 10
    assert "rank 1" in said
    assert "SIGKILL" in said
    assert "Traceback" not in said
    process = started(run)
    saved(run, process)
    time.sleep(5)  # inside of the imports or of the run, as it comes
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode in (75, 0), said
    for _ in range(2):  # the second time it is done already
        finished(run)
        assert adapter(run) == adapter(whole)
    # what the first rank alone refuses is refused by all, in one sentence and with its own exit code
    refused = subprocess.run([*run, "--rank", "4"], capture_output=True, text=True, check=False)
    assert refused.returncode == 5, refused.stderr
    assert refused.stderr.count("error: ") == 1
    assert "rank: found 16, asked for 4" in refused.stderr
