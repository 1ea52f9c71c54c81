"""Workers as small programs: every way in which they can end, and what the launcher makes of it."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.core import environment, launching
from lorakit.core.config import TrainConfig
from lorakit.core.environment import Worker
from lorakit.core.errors import EnvironmentUnusable, ExitCode, RankFailed, Stopped, UsageError
from lorakit.core.events import Notice, Progress

ROOT = Path(__file__).parents[2]
PYTHONPATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

PROLOGUE = """
import os, pathlib, signal, sys, time
rank = int(os.environ["RANK"])
here = pathlib.Path(os.environ["HERE"])
asked = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: asked.append(number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
(here / f"started-{rank}").write_text(str(os.getpid()))

def work(step_seconds=0.02, steps=3000):
    for step in range(steps):
        time.sleep(step_seconds)
        if asked:
            (here / f"saved-{rank}").write_text(f"{step} {len(asked)}")
            sys.exit(130 if asked[0] == signal.SIGINT else 75)
"""


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a launcher sets for its workers is taken back."""
    for name in ("OMP_NUM_THREADS", "TORCH_CPP_LOG_LEVEL", "TORCHELASTIC_SIGNALS_TO_HANDLE"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HERE", str(tmp_path))


Started = Callable[..., int]


@pytest.fixture
def start(tmp_path: Path) -> Started:
    """Run a program in workers: its exit code, or the launcher's error."""

    def run(program: str, num_processes: int = 2) -> int:
        path = tmp_path / "program.py"
        path.write_text(PROLOGUE + textwrap.dedent(program))
        return launching.start([sys.executable, "-S", str(path)], num_processes, 1, None, _silent)

    return run


def _silent(event: Progress | Notice) -> None: ...


def wait_for(*paths: Path) -> None:
    """Return when all files are there; a minute is more than anything here takes."""
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"none of {paths} after a minute"
        time.sleep(0.005)


def when_started(folder: Path, ranks: int, then: Callable[[], None]) -> threading.Thread:
    """Do something once all workers can answer signals."""

    def wait() -> None:
        wait_for(*(folder / f"started-{rank}" for rank in range(ranks)))
        then()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def pid_of(folder: Path, rank: int) -> int:
    return int((folder / f"started-{rank}").read_text())


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# Ends that all ranks agree on


@pytest.mark.parametrize("code", list(ExitCode))
def test_the_exit_code_that_all_ranks_end_with_is_the_runs(code: ExitCode, start: Started) -> None:
    assert start(f"sys.exit({int(code)})") == code


def test_a_code_of_the_ranks_that_failed_counts_where_the_others_were_done(start: Started) -> None:
    assert start("sys.exit(7 if rank == 0 else 0)") == ExitCode.DISK


def test_stopped_counts_more_than_done(start: Started) -> None:
    assert start("sys.exit(75 if rank == 1 else 0)") == ExitCode.STOPPED


def test_a_rank_may_take_its_time_after_another_has_stopped_or_is_done(
    start: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "_GRACE_SECONDS", 0.2)
    assert start("time.sleep(0 if rank else 1); sys.exit(75)") == ExitCode.STOPPED
    assert start("time.sleep(0 if rank else 1)") == ExitCode.DONE


def test_every_worker_gets_its_place_and_arguments_as_they_are(start: Started, tmp_path: Path) -> None:
    path = tmp_path / "place.py"
    path.write_text(
        "import os, sys, pathlib\n"
        "sys.path.insert(0, " + repr(str(ROOT)) + ")\n"
        "from lorakit.core.environment import worker\n"
        "place = worker()\n"
        "text = f'{place.rank}/{place.world_size} {place.local_rank}/{place.local_world_size} {sys.argv[1:]}'\n"
        "pathlib.Path(os.environ['HERE'], f'place-{place.rank}').write_text(text)\n"
    )
    odd = ["$x", "$$", "${local_rank}", "a b", "é"]
    assert launching.start([sys.executable, str(path), *odd], 2, 1, None, _silent) == 0
    for rank in (0, 1):
        assert (tmp_path / f"place-{rank}").read_text() == f"{rank}/2 {rank}/2 {odd}"


# A rank that fails alone


@pytest.mark.parametrize(
    ("program", "how"),
    [
        ("rank and os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("rank and os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("rank and sys.exit(3)", "exit code 3 (input refused)"),
        ("rank and sys.exit(1)", "exit code 1 (bug)"),
        ("rank and sys.exit(42)", "exit code 42"),
    ],
)
def test_a_rank_that_fails_alone_is_named_and_the_others_are_ended(
    program: str, how: str, start: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "_GRACE_SECONDS", 0.3)
    with pytest.raises(RankFailed) as caught:
        start(f"{program}\nwork()")
    assert f"rank 1 (pid {pid_of(tmp_path, 1)}): found " in caught.value.message
    assert caught.value.message.split("found ")[1].startswith(how if how.startswith("exit") else f"ended by {how}")
    assert "last checkpoint" in caught.value.hint
    assert caught.value.exit_code == ExitCode.RANK_FAILED == 10
    assert not (tmp_path / "saved-0").exists()  # wasn't asked to save: what would it wait for?
    assert not any(is_running(pid_of(tmp_path, rank)) for rank in (0, 1))


def test_a_job_ends_in_ten_seconds_after_a_rank_was_killed_though_the_other_hangs_and_ignores_signals(
    start: Started, tmp_path: Path
) -> None:
    killed: list[float] = []

    def kill() -> None:
        os.kill(pid_of(tmp_path, 1), signal.SIGKILL)
        killed.append(time.monotonic())

    thread = when_started(tmp_path, 2, kill)
    with pytest.raises(RankFailed, match=r"rank 1 .*SIGKILL"):
        start("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: time.sleep(9)")
    assert time.monotonic() - killed[0] < 10
    thread.join()
    assert not is_running(pid_of(tmp_path, 0))


def test_children_of_a_rank_that_is_killed_go_with_it(
    start: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "_GRACE_SECONDS", 1.0)
    child = "import subprocess; child = subprocess.Popen(['sleep', '60']); (here / 'child').write_text(str(child.pid))"
    with pytest.raises(RankFailed, match="rank 1"):
        start(f"if rank: time.sleep(0.5); sys.exit(3)\n{child}\nwork()")
    deadline = time.monotonic() + 5
    child_pid = int((tmp_path / "child").read_text())
    while _lives(child_pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _lives(child_pid)


def _lives(pid: int) -> bool:
    """Whether a process that isn't ours to reap still runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    "program", ["sys.exit(3 if rank else 10)", "time.sleep(0 if rank else 0.5); sys.exit(3 - rank)"]
)
def test_the_one_that_failed_first_is_named_and_not_who_only_heard_of_it(program: str, start: Started) -> None:
    with pytest.raises(RankFailed, match="rank 1 "):
        start(program)


# Signals


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_reaches_every_rank_once_and_each_finishes_its_step(
    number: signal.Signals, code: int, ranks: int, start: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "_GRACE_SECONDS", 0.1)  # isn't what counts here
    handlers = [signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    thread = when_started(tmp_path, ranks, lambda: os.kill(os.getpid(), number))
    assert start("work(step_seconds=1 + rank)", ranks) == code
    thread.join()
    for rank in range(ranks):
        assert (tmp_path / f"saved-{rank}").read_text() == "0 1"  # in the first step, one signal
    assert [signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == handlers


def test_a_signal_that_comes_twice_at_once_is_one(start: Started, tmp_path: Path) -> None:
    def twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)

    thread = when_started(tmp_path, 2, twice)
    assert start("work(step_seconds=1)") == 75
    thread.join()
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == ["0 1", "0 1"]


def test_a_second_signal_ends_the_workers_at_once(start: Started, tmp_path: Path) -> None:
    def insist() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = when_started(tmp_path, 2, insist)
    with pytest.raises(Stopped, match="second signal") as caught:
        start("work(step_seconds=60)")
    thread.join()
    assert caught.value.exit_code == 130
    assert not (tmp_path / "saved-0").exists()


def test_a_worker_that_never_stops_is_killed_in_the_end_and_named(
    start: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "_STOPPING_SECONDS", 1.0)
    thread = when_started(tmp_path, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="rank 0: found no end") as caught:
        start("work(step_seconds=60 if rank == 0 else 0.1)")
    thread.join()
    assert caught.value.exit_code == 75


def test_who_lost_a_rank_that_a_signal_ended_was_stopped_too(start: Started, tmp_path: Path) -> None:
    """While ranks look for one another, a signal ends them as it ends any program."""
    thread = when_started(tmp_path, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    program = """
    if rank == 1:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while not asked:
        time.sleep(0.01)
    sys.exit(10)
    """
    assert start(program) == ExitCode.STOPPED
    thread.join()


def test_a_failure_while_stopping_is_a_failure(start: Started, tmp_path: Path) -> None:
    thread = when_started(tmp_path, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert start("while not asked: time.sleep(0.01)\nsys.exit(7)") == ExitCode.DISK
    thread.join()


LAUNCHER = """
import sys
from lorakit.core.errors import LorakitError
from lorakit.core.launching import start
try:
    sys.exit(start(sys.argv[3:], int(sys.argv[1]), *eval(sys.argv[2]), lambda event: None))
except LorakitError as error:
    print("error:", error.message, file=sys.stderr)
    sys.exit(int(error.exit_code))
"""


def launcher(program: str, folder: Path, ranks: int, machines: int = 1, rendezvous: str | None = None) -> Any:
    """A launcher as a process of its own; its streams are collected."""
    path = folder / "program.py"
    path.write_text(PROLOGUE + textwrap.dedent(program))
    command = [sys.executable, "-c", LAUNCHER, str(ranks), str((machines, rendezvous)), sys.executable, "-S", str(path)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "HERE": str(folder)},
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_workers_that_are_stopped_at_random_moments_save_and_end_with_75(ranks: int, tmp_path: Path) -> None:
    """Also while they start: a signal then waits until they can answer it."""
    rng = random.Random(ranks)
    for trial in range(2):
        folder = tmp_path / str(trial)
        folder.mkdir()
        process = launcher("work(step_seconds=0.05)", folder, ranks)
        wait_for(folder / "started-0")
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (75, "", "")
        assert sorted(path.name for path in folder.glob("saved-*")) == [f"saved-{rank}" for rank in range(ranks)]


def test_streams_pass_through_and_nothing_else_is_said_or_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    program = """
    os.write(1, f"out {rank}\\n".encode())  # in one piece: both write into the same pipe
    os.write(2, f"err {rank}\\n".encode())
    if rank:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    sys.exit(10)
    """
    process = launcher(program, tmp_path, 2)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 10
    assert sorted(out.splitlines()) == ["out 0", "out 1"]
    lines = sorted(err.splitlines())
    assert lines[:2] == ["err 0", "err 1"]
    assert re.fullmatch(r"error: rank 1 \(pid \d+\): found ended by SIGKILL, need every rank to the end", lines[2])
    assert len(lines) == 3
    assert list((tmp_path / "tmp").iterdir()) == []


def test_workers_stop_when_their_launcher_is_killed(tmp_path: Path) -> None:
    program = f"""
    sys.path.insert(0, {str(ROOT)!r})
    from lorakit.core.environment import stop_with_parent
    stop_with_parent()
    (here / f"ready-{{rank}}").touch()
    work()
    """
    process = launcher(program, tmp_path, 2)
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    process.kill()
    process.communicate()
    wait_for(tmp_path / "saved-0", tmp_path / "saved-1")


@pytest.mark.parametrize(("ignored", "code"), [(True, 0), (False, 75)], ids=["nohup", "no nohup"])
def test_a_terminal_that_closes_stops_a_run_unless_nohup_started_it(
    ignored: bool, code: int, start: Started, tmp_path: Path
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        thread = when_started(tmp_path, 2, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert start("work(steps=40)") == code
        thread.join()
    finally:
        signal.signal(signal.SIGHUP, before)


# torch under it, and under torchrun

ALL_REDUCE = """
import torch.distributed as dist, torch
dist.init_process_group("gloo")
x = torch.tensor([float(rank + 1)])
dist.all_reduce(x)
(here / f"sum-{rank}").write_text(f"{x.item()} {dist.get_world_size()}")
dist.destroy_process_group()
"""


def test_ranks_find_each_other(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(PROLOGUE + ALL_REDUCE)
    assert launching.start([sys.executable, str(path)], 2, 1, None, _silent) == 0
    assert [(tmp_path / f"sum-{rank}").read_text() for rank in (0, 1)] == ["3.0 2", "3.0 2"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def rendezvous() -> str:
    return f"127.0.0.1:{free_port()}"


def test_two_machines_are_one_run(tmp_path: Path, rendezvous: str) -> None:
    program = ALL_REDUCE + 'print(os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"])'
    path = tmp_path / "program.py"
    path.write_text(PROLOGUE + program)
    command = [sys.executable, "-c", LAUNCHER, "1", str((2, rendezvous)), sys.executable, str(path)]
    environ = {**os.environ, "PYTHONPATH": PYTHONPATH}
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)
        for _ in range(2)
    ]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out, err) == (0, "0 2\n", "")
    assert [(tmp_path / f"sum-{rank}").read_text() for rank in (0, 1)] == ["3.0 2", "3.0 2"]


def test_a_failure_on_one_machine_ends_the_others_within_seconds(tmp_path: Path, rendezvous: str) -> None:
    both = [launcher("work()", tmp_path, 1, 2, rendezvous) for _ in range(2)]
    wait_for(tmp_path / "started-0", tmp_path / "started-1")
    began = time.monotonic()
    os.kill(pid_of(tmp_path, 1), signal.SIGKILL)
    said = [process.communicate(timeout=60) for process in both]
    assert time.monotonic() - began < 15
    assert [process.returncode for process in both] == [10, 10]
    for _, err in said:
        assert "rank 1 (pid " in err
        assert "ended by SIGKILL" in err
        assert len(err.splitlines()) == 1
    assert sum(socket.gethostname() in err for _, err in said) == 1  # on the other machine it says on which


def test_a_signal_to_one_machine_alone_leaves_its_code_to_the_ranks(tmp_path: Path, rendezvous: str) -> None:
    """Ranks agree to stop among themselves; here the other one is told by a file."""
    program = """
    while not asked and not list(here.glob("saved-*")):
        time.sleep(0.02)
    (here / f"saved-{rank}").touch()
    sys.exit(75)
    """
    both = [launcher(program, tmp_path, 1, 2, rendezvous) for _ in range(2)]
    wait_for(tmp_path / "started-0", tmp_path / "started-1")
    both[0].send_signal(signal.SIGTERM)
    assert [(process.communicate(timeout=60), process.returncode)[1] for process in both] == [75, 75]


def test_a_launcher_that_waits_for_machines_says_nothing_more_and_is_stopped_by_a_signal(tmp_path: Path) -> None:
    nobody = "192.0.2.1:29500"  # an address of documentation, RFC 5737
    process = launcher("work()", tmp_path, 1, 2, nobody)
    try:
        out, err = process.communicate(timeout=6)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (75, "", "error: stopped by SIGTERM before anything was written\n")


def test_machines_that_dont_meet_are_an_error(monkeypatch: pytest.MonkeyPatch, rendezvous: str) -> None:
    from lorakit.core import elastic

    monkeypatch.setattr(elastic, "_MEETING_SECONDS", 1)
    said: list[str] = []
    for where in (rendezvous, "192.0.2.1:29500"):
        with pytest.raises(EnvironmentUnusable, match="fewer than 2 machines"):
            launching.start([sys.executable, "-c", ""], 1, 2, where, lambda event: said.append(str(event)))
        assert where in said.pop()
    with pytest.raises(EnvironmentUnusable, match=r"nowhere\.invalid"):
        launching.start([sys.executable, "-c", ""], 1, 2, "nowhere.invalid:29500", _silent)


def test_a_worker_of_torchrun_knows_its_place(tmp_path: Path) -> None:
    path = tmp_path / "place.py"
    path.write_text(
        "import os, pathlib\nfrom lorakit.core.environment import worker\nplace = worker()\n"
        "pathlib.Path(os.environ['HERE'], f'place-{place.rank}').write_text(str(place))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(path)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": PYTHONPATH}, capture_output=True)
    assert [(tmp_path / f"place-{rank}").read_text() for rank in (0, 1)] == [str(Worker(r, 2, r, 2)) for r in (0, 1)]


# How many processes


def config(**settings: object) -> TrainConfig:
    return TrainConfig.resolve((None, {"model": "m", "blocks": ["b"], **settings}))


def gpus(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(environment, "free_gpu_bytes", lambda: [2**30] * number)


def test_processes_left_out_are_one_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 4)
    found = launching.in_world(config(parallel="ddp"), None)
    assert found.devices.num_processes == 4
    assert launching.starts_workers(found)
    gpus(monkeypatch, 1)
    assert not launching.starts_workers(launching.in_world(config(parallel="ddp"), None))
    assert not launching.starts_workers(launching.in_world(config(), None))
    assert not launching.starts_workers(launching.in_world(config(parallel="split"), None))


def test_without_gpus_processes_have_to_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    with pytest.raises(EnvironmentUnusable) as caught:
        launching.in_world(config(parallel="fsdp"), None)
    assert "--num-processes" in caught.value.hint
    assert launching.starts_workers(launching.in_world(config(parallel="fsdp", num_processes=2), None))
    two = config(parallel="fsdp", num_processes=1, num_machines=2, rendezvous="a:1")
    assert launching.starts_workers(launching.in_world(two, None))


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 2)
    with pytest.raises(EnvironmentUnusable, match="found 2 GPUs"):
        launching.in_world(config(parallel="ddp", num_processes=3), None)


def test_a_batch_that_the_gpus_cant_share_is_refused_once_they_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 3)
    with pytest.raises(UsageError, match="effective_batch_size: found 16, need a multiple of"):
        launching.in_world(config(parallel="ddp", effective_batch_size=16), None)


def test_a_worker_takes_the_world_that_it_finds() -> None:
    two = launching.in_world(config(parallel="ddp"), Worker(1, 2, 1, 2))
    assert two.devices.num_processes == two.data_parallel_size == 2
    told = config(parallel="ddp", num_processes=2, num_machines=2, rendezvous="a:1")
    assert launching.in_world(told, Worker(3, 4, 1, 2)) == told
    untold = launching.in_world(config(parallel="ddp"), Worker(3, 6, 1, 2))  # torchrun over three machines
    assert untold.data_parallel_size == 6
    assert launching.in_world(config(), Worker(0, 1, 0, 1)) == config()


@pytest.mark.parametrize(
    ("settings", "worker", "words"),
    [
        ({"parallel": "ddp", "num_processes": 4}, Worker(0, 2, 0, 2), "found 2 processes on this machine"),
        ({"parallel": "ddp", "num_processes": 2}, Worker(0, 1, 0, 1), "found 1 processes on this machine"),
        ({}, Worker(0, 2, 0, 2), "--parallel left out"),
        ({"parallel": "split"}, Worker(0, 2, 0, 2), "split works in one process"),
    ],
)
def test_settings_that_contradict_what_started_a_worker_are_refused(
    settings: dict[str, object], worker: Worker, words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        launching.in_world(config(**settings), worker)
    assert caught.value.shared
