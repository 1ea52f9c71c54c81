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
_CONNECTING_SECONDS = 10  # of one attempt, in which no signal is answered
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
    address = "127.0.0.1" if rendezvous is None else _own_address(*rendezvous.rsplit(":", 1))
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=rendezvous or "127.0.0.1:0",
        run_id=f"lorakit-{rendezvous}",  # the same on all machines
        min_nodes=num_machines,
        max_nodes=num_machines,
        local_addr=address,
        join_timeout=_MEETING_SECONDS,
        read_timeout=_CONNECTING_SECONDS if num_machines > 1 else 60,
    )
    hint = f"run the same command on each of the {num_machines} machines within {_MEETING_SECONDS // 60} minutes, with "
    hint += "an address and a free port of one of them, which all others can reach"
    handler = None
    try:
        supervisor.meeting()
        handler = _meet(parameters)
        spec = WorkerSpec(
            role="lorakit",
            local_world_size=num_processes,
            rdzv_handler=handler,
            entrypoint=program[0],
            args=tuple(part.replace("$", "$$") for part in program[1:]),  # a template to torch
            max_restarts=0,
            local_addr=address,
        )
        if _Agent(spec, supervisor, alone=num_machines == 1).run() is None:  # there were enough machines without this
            raise EnvironmentUnusable(f"--rendezvous {rendezvous}: found {num_machines} machines without this", hint)
    except RendezvousTimeoutError:
        few = f"found fewer than {num_machines} machines in {_MEETING_SECONDS // 60} minutes, need all"
        raise EnvironmentUnusable(f"--rendezvous {rendezvous}: {few}", hint) from None
    except RendezvousError as error:
        found = f"found {str(error.__cause__ or error).splitlines()[0]}"
        raise EnvironmentUnusable(f"--rendezvous {rendezvous}: {found}, need machines that meet there", hint) from None
    finally:
        if handler is not None:
            with contextlib.suppress(Exception):  # the machine that keeps the store may have gone
                handler.shutdown()


def _own_address(host: str, port: str) -> str:
    """The address by which other machines reach this one: that of the interface which leads to the rendezvous."""
    try:
        kind, _, _, _, target = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing
            own = str(probe.getsockname()[0])
    except OSError as error:
        raise EnvironmentUnusable(
            f"--rendezvous {host}:{port}: found {error.strerror or error}, need the address of one of the machines",
            "give its name or IP address, as the other machines know it",
        ) from None
    return host if own.startswith("127.") or own == "::1" else own


def _meet(parameters: RendezvousParameters) -> RendezvousHandler:
    """Connect to the machine that keeps the rendezvous, which may come later than this one."""
    deadline = time.monotonic() + _MEETING_SECONDS
    while True:
        try:
            return registry.get_rendezvous_handler(parameters)
        except RendezvousConnectionError:
            if time.monotonic() > deadline:
                raise


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
