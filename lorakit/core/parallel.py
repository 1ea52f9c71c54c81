"""The processes that train one adapter together, on torch.distributed: who they are, what they tell each other, how
gradients are summed, and how a model is cut into shards.

Every number that decides anything (a loss, a norm, a signal) is told to all before it is used, so that all processes
take the same way; a process that fails tells the others why instead of leaving them waiting.
"""

import json
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lorakit.core.environment import Worker
from lorakit.core.errors import (
    EnvironmentUnusable,
    ExitCode,
    LorakitError,
    RankFailed,
    Stopped,
    first_line,
    is_out_of_memory,
)
from lorakit.core.events import ShouldStop

_TIMEOUT = timedelta(minutes=30)
"""The longest that a process waits for the others in one exchange. The first one hashes a base that none has seen
inside of it: 130 GB from a disk that reads 200 MB a second take eleven minutes."""


@dataclass(frozen=True)
class World:
    """This process among those that train together; `parallel` is None where it is alone."""

    rank: int
    size: int
    device: torch.device
    parallel: Literal["ddp", "fsdp"] | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes, and speaks for all."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """What every process tells, by rank; anything that JSON holds.

        Raises RankFailed where a process tells of its failure instead.
        """
        if self.size == 1:
            return [value]
        told = _exchange({"told": value}, self.size)
        for rank, one in enumerate(told):
            if "failed" in one:
                raise _heard(rank, one)
        return [one["told"] for one in told]

    def share(self, value: Any) -> Any:
        """What the first process tells."""
        return self.gather(value)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is done inside is done by all processes or by none: where one fails, every one raises, with its exit
        code.

        An error whose exit code all failures have is marked as `shared`: the first process speaks, of its own or of
        what it heard.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        except Exception as error:
            if not getattr(error, "heard", False):
                mine = {"failed": first_line(error), "code": _code(error), "hint": getattr(error, "hint", "")}
                codes = {one["code"] for one in _exchange(mine, self.size) if "failed" in one}
                error.shared = codes == {mine["code"]}  # type: ignore[attr-defined]
                error.heard = True  # type: ignore[attr-defined]
            raise
        self.gather(None)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add up the gradients of all processes, in one exchange, so that a run that goes on adds in the same order as
        one that wasn't stopped (torch's DistributedDataParallel lays its buckets anew after the first step).

        Gradients of shards are summed by FSDP already, as a mean; others are made one too, for what is trained outside
        of the shards.
        """
        if self.size == 1:
            return
        trained = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
        if not trained:
            return
        whole = torch.cat([_gradient(parameter).flatten() for parameter in trained])
        dist.all_reduce(whole)
        whole /= self.mean_over
        for parameter, summed in zip(trained, whole.split([p.numel() for p in trained]), strict=True):
            parameter.grad = summed.view_as(parameter)

    @property
    def mean_over(self) -> int:
        """By how much a loss is multiplied before its backward pass: FSDP takes the mean of gradients, not the sum."""
        return self.size if self.parallel == "fsdp" else 1

    def shard(self, model: Any, layers: torch.nn.ModuleList) -> None:
        """Cut every one of a model's decoder layers into shards (torch's fully_shard), one for each process; what lies
        outside of the layers stays whole everywhere."""
        mesh = init_device_mesh(self.device.type, (self.size,))
        inner = model.get_base_model().base_model
        outside = set(inner.parameters()) - set(layers.parameters())
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(inner, mesh=mesh, ignored_params=outside)  # without weights of its own: it orders the layers' turns
        for module in (model.get_output_embeddings(), *inner.children()):
            if module is not layers:
                module.to(self.device)
        scales_to(self.device, layers)


def alone(device: torch.device) -> World:
    """A process that trains by itself."""
    return World(0, 1, device)


@contextmanager
def joined(
    worker: Worker | None, parallel: str | None, device: torch.device, should_stop: ShouldStop
) -> Iterator[World]:
    """The world of this process, on its own GPU where there are GPUs.

    Raises EnvironmentUnusable where this machine has fewer GPUs than processes, or the processes don't find together,
    and Stopped where a signal has come before they look for one another.
    """
    if worker is None or worker.world_size == 1:
        yield alone(device)
        return
    if device.type == "cuda":
        if worker.local_world_size > torch.cuda.device_count():
            raise EnvironmentUnusable(
                f"found {torch.cuda.device_count()} GPUs for {worker.local_world_size} processes, need one for each",
                f"--num-processes {torch.cuda.device_count()}",
            )
        device = torch.device("cuda", worker.local_rank)
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        with _ended_by_signals(should_stop):
            dist.init_process_group(backend, timeout=_TIMEOUT, device_id=device if device.type == "cuda" else None)
    except (RuntimeError, ValueError) as error:
        raise EnvironmentUnusable(
            f"found no way to the other processes ({first_line(error)}), need all of them",
            "start all of them alike, and check that the address is reachable",
        ) from None
    if dist.get_world_size() != worker.world_size:
        raise EnvironmentUnusable(
            f"found WORLD_SIZE {worker.world_size}, where torch sees {dist.get_world_size()} processes; need the same",
            "start the run by lorakit itself: --num-processes",
        )
    yield World(worker.rank, worker.world_size, device, "fsdp" if parallel == "fsdp" else "ddp")
    dist.destroy_process_group()  # after a failure it may wait for processes that wait for this one; its end is enough


@contextmanager
def _ended_by_signals(should_stop: ShouldStop) -> Iterator[None]:
    """Signals end this process at once: while it looks for the others no handler of Python's runs, who is looked for
    may have been stopped before it began to look, and there is nothing to save yet. Raises Stopped where one came
    before: it won't come again."""
    before = {which: signal.signal(which, signal.SIG_DFL) for which in (signal.SIGTERM, signal.SIGINT)}
    try:
        if asked := should_stop():  # not earlier, or one might come in between
            raise Stopped.early(interrupted=asked == "interrupt")
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def scales_to(device: torch.device, layers: torch.nn.Module) -> None:
    """Move bitsandbytes' scales of 4-bit weights, which are no parameters and stay whole, to where they are needed."""
    for module in layers.modules():
        scales = getattr(module, "quant_state", None)
        if scales is not None:
            scales.to(device)


def whole(tensor: Tensor) -> Tensor:
    """A tensor as it is without shards, on the CPU; every process has to ask."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().contiguous().cpu()


def put(value: Tensor, into: Tensor) -> None:
    """Overwrite a tensor, or this process's shard of it, with a whole one. Raises ValueError for one of another shape,
    of which torch would take parts more than once."""
    if value.shape != into.shape:
        raise ValueError(f"a tensor of {list(value.shape)} for one of {list(into.shape)}")
    if isinstance(into, DTensor):
        # every process has all of it: none asks another, so that one that fails before keeps nobody waiting
        value = distribute_tensor(value.to(into.device), into.device_mesh, into.placements, src_data_rank=None)
    into.copy_(value)


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients down to a norm of `max_norm` together; returns the norm that they had, a scalar."""
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    kinds = [[p for p in trained if isinstance(p, DTensor) is sharded] for sharded in (False, True)]
    kinds = [kind for kind in kinds if kind]
    if len(kinds) == 1 and not isinstance(kinds[0][0], DTensor):
        return torch.nn.utils.clip_grad_norm_(kinds[0], max_norm)
    norms = [whole(torch.nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None])) for kind in kinds]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for kind in kinds:
        torch.nn.utils.clip_grads_with_norm_(kind, max_norm, norm.to(kind[0].device))
    return norm


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _code(error: BaseException) -> int:
    if is_out_of_memory(error):
        return int(ExitCode.OUT_OF_MEMORY)
    if isinstance(error, OSError):
        return int(ExitCode.DISK)
    return int(getattr(error, "exit_code", ExitCode.RANK_FAILED))


def _heard(rank: int, told: dict[str, Any]) -> LorakitError:
    error = RankFailed(f"rank {rank}: {told['failed']}", told["hint"] or "the same command again goes on")
    error.shared = error.heard = True
    error.exit_code = ExitCode(told["code"])
    return error


def _exchange(value: Any, size: int) -> list[Any]:
    """JSON between all processes, through gloo."""
    try:
        return _all_told(value, size)
    except RuntimeError as error:
        raise RankFailed(
            f"found that the connection to another process broke ({first_line(error)}), need all of them",
            "look for the first error; the same command goes on from the last checkpoint",
        ) from None


def _all_told(value: Any, size: int) -> list[Any]:
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([len(mine)]))
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(mine)] = mine
    received: Sequence[Tensor] = [torch.zeros_like(padded) for _ in range(size)]
    dist.all_gather(list(received), padded)
    return [
        json.loads(bytes(content[: int(length)].numpy())) for content, length in zip(received, lengths, strict=True)
    ]
