"""Workers started by torchrun's own engine (torch.distributed.elastic): ranks, environment, machines that meet.

Of torchrun's agent everything is kept but its supervision, which `launching.Watch` takes over: the agent ends workers
by a second signal after 30 seconds, starts them again when a machine comes late, and knows no exit codes.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from subprocess import Popen
from typing import Any, Protocol

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters, registry
from torch.distributed.elastic.rendezvous.api import (
    RendezvousConnectionError,
    RendezvousError,
    RendezvousHandler,
    RendezvousTimeoutError,
)

from lorakit.core.errors import EnvironmentUnusable

_MEETING_SECONDS = 600
_PARTING_SECONDS = 10  # that a machine stays after its workers, for others to hear how they ended
_FIRST_FAILURE = "lorakit/first_failure"


class Supervisor(Protocol):
    """Who watches the workers of this machine; `launching.Watch` is one."""

    def meeting(self) -> None:
        """Machines are waited for from now on."""

    def starting(self) -> None:
        """Workers are started from now on: what is raised would leave some of them behind."""

    def wait(self, workers: Mapping[int, "Popen[bytes]"], others: "Others") -> None:
        """Return once every worker has ended. `workers`: by their rank."""


class Others:
    """What the launchers of a run's machines tell each other through their store: the first failure that there was."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def tell(self, failure: Mapping[str, Any]) -> None:
        """Tell the others of a failure, unless one was told of before."""
        with self._asking():
            if self._store is not None:
                self._store.compare_set(_FIRST_FAILURE, "", json.dumps(failure))

    def first_failure(self) -> dict[str, Any] | None:
        """The failure that was told of first."""
        with self._asking():
            if self._store is not None and self._store.check([_FIRST_FAILURE]):
                return json.loads(self._store.get(_FIRST_FAILURE))
        return None

    @contextlib.contextmanager
    def _asking(self) -> Any:
        try:
            yield
        except RuntimeError:  # the machine that keeps the store has gone: workers notice by themselves if it matters
            self._store = None


def run(
    program: Sequence[str], num_processes: int, num_machines: int, rendezvous: str | None, supervisor: Supervisor
) -> None:
    """Start `program` in `num_processes` workers on this machine, where `num_machines` run the same, and return when
    the supervisor has seen them all end. One machine needs no `rendezvous` (HOST:PORT).

    Raises EnvironmentUnusable where the machines don't meet.
    """
    logger = logging.getLogger("torch.distributed.elastic")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
    where = _Meeting(rendezvous or "127.0.0.1:0", num_machines)
    hint = f"run the same command on each of the {num_machines} machines within {_MEETING_SECONDS // 60} minutes, with "
    hint += "an address and a free port of one of them, which all others can reach"
    handler = None
    try:
        supervisor.meeting()
        handler = where.connect()
        spec = WorkerSpec(
            role="lorakit",
            local_world_size=num_processes,
            rdzv_handler=handler,
            entrypoint=program[0],
            args=tuple(part.replace("$", "$$") for part in program[1:]),  # a template to torch
            max_restarts=0,
            local_addr=where.address,
        )
        if _Agent(spec, supervisor, alone=num_machines == 1).run() is None:  # there were enough machines without this
            raise EnvironmentUnusable(f"--rendezvous {rendezvous}: found {num_machines} machines without this", hint)
    except RendezvousTimeoutError:
        few = f"found fewer than {num_machines} machines in {_MEETING_SECONDS / 60:.0f} minutes, need all"
        raise EnvironmentUnusable(f"--rendezvous {rendezvous}: {few}", hint) from None
    except RendezvousError as error:
        found = f"found {str(error.__cause__ or error).splitlines()[0]}"
        raise EnvironmentUnusable(f"--rendezvous {rendezvous}: {found}, need machines that meet there", hint) from None
    finally:
        if handler is not None:
            with contextlib.suppress(Exception):  # the machine that keeps the store may have gone
                handler.shutdown()


class _Meeting:
    """Where machines meet, seen from this one: `address` is its own, by which the others reach it."""

    def __init__(self, rendezvous: str, num_machines: int) -> None:
        self._rendezvous, self._num_machines = rendezvous, num_machines
        host, port = rendezvous.rsplit(":", 1)
        try:
            kind, _, _, _, target = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
            with socket.socket(kind, socket.SOCK_DGRAM) as probe:
                probe.connect(target)  # sends nothing, and finds the interface that leads there
                own = str(probe.getsockname()[0])
        except OSError as error:
            raise EnvironmentUnusable(
                f"--rendezvous {rendezvous}: found {error.strerror or error}, need the address of one of the machines",
                "give its name or IP address, as the other machines know it",
            ) from None
        loopback = own.startswith("127.") or own == "::1"
        self._target = str(target[0]), int(target[1])
        self._is_here = loopback or own == self._target[0]
        self.address = host if loopback else own

    def connect(self) -> RendezvousHandler:
        """Keep the rendezvous if it is here, else wait for the machine that does. Not by torch's own waiting, which no
        signal ends and which prints a stack at each attempt. Raises RendezvousError."""
        deadline = time.monotonic() + _MEETING_SECONDS
        while True:
            kept = self._is_kept()
            if kept or self._is_here:
                try:
                    return registry.get_rendezvous_handler(self._parameters(is_host=not kept))
                except RendezvousConnectionError:  # another process here was faster
                    if time.monotonic() > deadline:
                        raise
            if time.monotonic() > deadline:
                raise RendezvousTimeoutError
            time.sleep(0.2)

    def _is_kept(self) -> bool:
        try:
            socket.create_connection(self._target, timeout=2).close()
        except OSError:
            return False
        return True

    def _parameters(self, *, is_host: bool) -> RendezvousParameters:
        return RendezvousParameters(
            backend="c10d",
            endpoint=self._rendezvous,
            run_id=f"lorakit-{self._rendezvous}",  # the same on all machines
            min_nodes=self._num_machines,
            max_nodes=self._num_machines,
            local_addr=self.address,
            join_timeout=_MEETING_SECONDS,
            is_host=str(is_host),
        )


class _Unchanged(LogsSpecs):
    """Workers write to the launcher's own stdout and stderr, and nothing else."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        nowhere = dict.fromkeys(envs, os.devnull)
        return LogsDest(stdouts=dict.fromkeys(envs, ""), stderrs=dict.fromkeys(envs, ""), error_files=nowhere)

    @property
    def root_log_dir(self) -> str:
        return os.devnull


class _Agent(LocalElasticAgent):
    """torchrun's agent, with its workers supervised by another."""

    def __init__(self, spec: WorkerSpec, supervisor: Supervisor, *, alone: bool) -> None:
        super().__init__(spec, _Unchanged(), exit_barrier_timeout=_PARTING_SECONDS)
        self._supervisor, self._alone = supervisor, alone

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._supervisor.starting()
        # Workers inherit that signals wait, and let them in (cli.main) once they can answer them.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
        try:
            return super()._start_workers(worker_group)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        handlers = self._pcontext.subprocess_handlers  # type: ignore[union-attr]
        workers = {worker.global_rank: handlers[worker.local_rank].proc for worker in worker_group.workers}
        self._supervisor.wait(workers, Others(None if self._alone else worker_group.store))
        # However they ended: after it the agent waits a little for the other machines, and that is what is needed.
        return RunResult(state=WorkerState.SUCCEEDED, return_values=dict.fromkeys(workers))

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        super()._shutdown(signal.SIGKILL)  # only where something went wrong in here is anyone left
