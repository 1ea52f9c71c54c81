"""A parallel run: its workers started, watched, stopped and judged.

How many there are is settled first (`in_world`); `elastic` starts them; `Watch` waits for their end. A signal is passed
on to every worker, which finishes its step and saves it. Where one fails, the others have a few seconds to end by
themselves before they are killed: they wait for the dead. What all ranks agree on is the run's exit code; else 10.
"""

import contextlib
import math
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from types import FrameType
from typing import TYPE_CHECKING, Any

import lorakit
from lorakit.core import artifacts, environment
from lorakit.core.config import TrainConfig
from lorakit.core.environment import Worker
from lorakit.core.errors import EnvironmentUnusable, ExitCode, RankFailed, Stopped, UsageError
from lorakit.core.events import Notice, Report

if TYPE_CHECKING:
    from lorakit.core.elastic import Others

_GRACE_SECONDS = 5.0  # for the other ranks, once one has failed
_STOPPING_SECONDS = 600.0  # for all ranks, once they were asked to stop: a step of a large model and its checkpoint
_KILLING_SECONDS = 2.0  # for the kernel
_POLL_SECONDS = 0.05
_LISTENING_SECONDS = 1.0
_SAME_SIGNAL_SECONDS = 1.0  # `timeout` sends its signal to the process and again to its group


def in_world(config: TrainConfig, worker: Worker | None) -> TrainConfig:
    """The settings with the number of processes that there are (in a worker) or will be (in a launcher).

    Raises UsageError where a worker's settings say otherwise than what started it, EnvironmentUnusable where processes
    are to be counted by GPUs and there are none, or are more than GPUs.
    """
    devices = config.devices
    shared_out = devices.parallel in ("ddp", "fsdp")
    if worker is None:
        if not shared_out:
            return config
        gpus = len(environment.free_gpu_bytes())
        if devices.num_processes is None and not gpus:
            raise EnvironmentUnusable(
                f"--parallel {devices.parallel}: found no GPU, need the number of processes",
                "add --num-processes 2 to train on the CPU, or see with nvidia-smi why there is no GPU",
            )
        if gpus and (devices.num_processes or 1) > gpus:
            raise EnvironmentUnusable(
                f"--num-processes {devices.num_processes}: found {gpus} GPUs, need one for each process",
                f"lower it to {gpus}, or look at CUDA_VISIBLE_DEVICES",
            )
        return _changed(config, num_processes=devices.num_processes or gpus)
    if devices.num_processes not in (None, worker.local_world_size):
        raise UsageError(
            f"--num-processes {devices.num_processes}: found {worker.local_world_size} processes on this machine, as "
            "torchrun or accelerate launch started them; need the same number, or none",
            "leave --num-processes out, or start it by `lorakit train` alone",
        )
    if worker.world_size == 1 and not shared_out:
        return config
    if not shared_out:
        raise UsageError(
            f"found {worker.world_size} processes and --parallel {devices.parallel or 'left out'}, "
            "need --parallel ddp or fsdp (split works in one process)",
            "add --parallel ddp, or start one process",
        )
    if devices.num_machines * worker.local_world_size == worker.world_size:
        return _changed(config, num_processes=worker.local_world_size)
    return _changed(config, num_processes=worker.world_size, num_machines=1, rendezvous=None)


def _changed(config: TrainConfig, **values: object) -> TrainConfig:
    return TrainConfig.resolve((None, {**config.flat(), **values}))


def starts_workers(config: TrainConfig) -> bool:
    """Whether settings `in_world` ask for more than this one process."""
    return config.data_parallel_size > 1


def launch_command(command: str, config: TrainConfig, options: Sequence[str], report: Report) -> int:
    """Run a command with these settings in workers, and return lorakit's exit code; raises as `launch`."""
    with tempfile.NamedTemporaryFile(prefix="lorakit-", suffix=".yaml") as file:
        file.write(artifacts.settings_text(config))
        file.flush()
        devices = config.devices
        machines = devices.num_machines, devices.rendezvous
        return launch([command, "--config", file.name, *options], devices.num_processes or 1, *machines, report)


def launch(
    arguments: Sequence[str], num_processes: int, num_machines: int, rendezvous: str | None, report: Report
) -> int:
    """Run `lorakit` with these arguments in `num_processes` workers, on this machine and likewise on the others, and
    return lorakit's exit code once all have ended: what all ranks agree on. They have printed why by then.

    Raises RankFailed (a rank failed alone), Stopped (workers that had to be killed after a signal), and
    EnvironmentUnusable (the machines don't meet).
    """
    here = Path(lorakit.__file__).parents[1] == Path.cwd()  # else a folder of that name here mustn't take its place
    program = [sys.executable, *([] if here else ["-P"]), "-m", "lorakit", *arguments]
    return start(program, num_processes, num_machines, rendezvous, report)


def start(program: Sequence[str], num_processes: int, num_machines: int, rendezvous: str | None, report: Report) -> int:
    """`launch` for any program that ends with lorakit's exit codes."""
    environment.ready_for_workers(num_processes)
    watch = Watch()
    with watch:
        from lorakit.core import elastic  # torch comes with it, and reads its log level then

        if num_machines > 1:
            report(Notice(f"waits at {rendezvous} until {num_machines} machines run this command"))
        elastic.run(program, num_processes, num_machines, rendezvous, watch)
    return watch.exit_code()


@dataclass(frozen=True)
class End:
    """How a worker ended: `code` is negative for a signal; `killed` by the launcher, for the sake of others."""

    rank: int
    pid: int
    code: int
    look: int
    """How often the launcher had looked before: ends of the same look can't be told apart in time."""
    killed: bool = False

    def __str__(self) -> str:
        if self.code < 0:
            number = -self.code
            known = number in list(signal.Signals)
            return f"ended by {signal.Signals(number).name if known else f'signal {number}'}"
        known = self.code in list(ExitCode)
        return f"exit code {self.code}" + (f" ({ExitCode(self.code).name.lower().replace('_', ' ')})" if known else "")


class Watch:
    """The workers of this machine, from before their start to the end of the last. Signals are noted, and passed on to
    the workers; only while machines meet, which may take minutes, they end the waiting."""

    def __init__(self) -> None:
        self.ends: dict[int, End] = {}
        self._waits_for_machines = False
        self._asked: signal.Signals | None = None
        self._asked_at = 0.0
        self._insisted = False
        self._elsewhere: dict[str, Any] | None = None
        self._deadline = math.inf
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Watch":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._handlers[number] = signal.getsignal(number)
            if number != signal.SIGHUP or self._handlers[number] == signal.SIG_DFL:  # ignored under nohup
                signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked, self._asked_at = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM, now
        elif now - self._asked_at > _SAME_SIGNAL_SECONDS:
            self._insisted = True
        if self._waits_for_machines:
            self.meeting()

    def meeting(self) -> None:
        """Machines are waited for from now on. Raises Stopped where a signal has come, or as soon as one comes."""
        if self._asked is not None:
            self._waits_for_machines = False
            raise Stopped.early(interrupted=self._asked == signal.SIGINT)
        self._waits_for_machines = True

    def starting(self) -> None:
        """Workers are started from now on."""
        self._waits_for_machines = False

    def wait(self, workers: Mapping[int, "Popen[bytes]"], others: "Others") -> None:
        """Return when all have ended, by themselves or killed because of a failure or a second signal."""
        passed_on, listened, look = False, -math.inf, 0
        while len(self.ends) < len(workers):
            look += 1
            for rank, worker in workers.items():
                if rank not in self.ends and (code := worker.poll()) is not None:
                    self._saw(End(rank, worker.pid, code, look), others)
            now = time.monotonic()
            if now - listened > _LISTENING_SECONDS:
                listened = now
                if self._elsewhere is None and (told := others.first_failure()) and told["rank"] not in workers:
                    self._elsewhere = told
                    self._end_within(_GRACE_SECONDS)
            if self._asked is not None and not passed_on:
                passed_on = True
                self._end_within(_STOPPING_SECONDS)
                for worker in workers.values():
                    worker.send_signal(self._asked)
            if self._insisted or now > self._deadline:
                self._kill(workers, look)
                return
            time.sleep(_POLL_SECONDS)

    def _saw(self, end: End, others: "Others") -> None:
        self.ends[end.rank] = end
        if self._is_failure(end):
            self._end_within(_GRACE_SECONDS)
            others.tell({"rank": end.rank, "code": end.code, "how": _how(end, f" on {socket.gethostname()}")})
        elif end.code != ExitCode.DONE:
            self._end_within(_STOPPING_SECONDS)

    def _is_failure(self, end: End) -> bool:
        if self._asked is not None:
            # by that signal, or for one whom it ended while they looked for one another
            by_it = -int(self._asked)
            if end.code == by_it or (
                end.code == ExitCode.RANK_FAILED and any(each.code == by_it for each in self.ends.values())
            ):
                return False
        return end.code not in (ExitCode.DONE, ExitCode.STOPPED, ExitCode.INTERRUPTED)

    def _end_within(self, seconds: float) -> None:
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def _kill(self, workers: Mapping[int, "Popen[bytes]"], look: int) -> None:
        left = {rank: worker for rank, worker in workers.items() if rank not in self.ends and worker.poll() is None}
        for worker in left.values():
            with contextlib.suppress(OSError):
                os.killpg(worker.pid, signal.SIGKILL)  # with all that it started: elastic gives it a group of its own
        deadline = time.monotonic() + _KILLING_SECONDS
        for rank, worker in workers.items():
            if rank not in self.ends:
                with contextlib.suppress(TimeoutExpired):  # stuck in the kernel: SIGKILL waits there
                    worker.wait(max(deadline - time.monotonic(), 0.0))
                code = worker.returncode if worker.returncode is not None else -int(signal.SIGKILL)
                self.ends[rank] = End(rank, worker.pid, code, look + 1, killed=rank in left)

    def exit_code(self) -> int:
        """What the ranks agree on. Raises RankFailed where they don't, and Stopped where some had to be killed."""
        ends = self.ends.values()
        killed = [end.rank for end in ends if end.killed]
        failed = [end for end in ends if not end.killed and self._is_failure(end)]
        codes = {end.code for end in failed} | ({self._elsewhere["code"]} if self._elsewhere else set())
        if codes and (killed or len(codes) > 1 or not codes <= set(ExitCode)):
            if self._elsewhere:
                how, code = self._elsewhere["how"], self._elsewhere["code"]
            else:
                # who says that another rank failed isn't the one, and a signal comes from outside
                first = min(
                    failed, key=lambda end: (end.code == ExitCode.RANK_FAILED, end.look, end.code > 0, end.rank)
                )
                how, code = _how(first), first.code
            raise RankFailed(f"{how}, need every rank to the end", _hint(code))
        if codes:
            return codes.pop()
        interrupted = self._asked == signal.SIGINT or any(end.code == ExitCode.INTERRUPTED for end in ends)
        if killed:
            names = ", ".join(map(str, killed))
            waited = "a second signal" if self._insisted else f"no end in {_STOPPING_SECONDS / 60:.0f} minutes"
            raise Stopped(
                f"rank {names}: found {waited} after the first, need time to save; killed",
                "run the same command again: it goes on from the last checkpoint",
                interrupted=interrupted,
            )
        if all(end.code == ExitCode.DONE for end in ends):
            return ExitCode.DONE
        return ExitCode.INTERRUPTED if interrupted else ExitCode.STOPPED


def _how(end: End, where: str = "") -> str:
    return f"rank {end.rank} (pid {end.pid}{where}): found {end}"


def _hint(code: int) -> str:
    why = "what that rank printed says why"
    if code == -signal.SIGKILL:
        why = "the kernel kills what takes too much memory (`dmesg` tells): lower --batch-size or --block-size"
    elif code < 0:
        why = "PYTHONFAULTHANDLER=1 shows where it was"
    return f"{why}; the same command goes on from the last checkpoint"
