"""What each of two processes does for test_parallel.py: `torchrun --nproc-per-node 2 two_processes.py TASKS RESULTS`.

One start serves many runs, for it takes seconds: the processes meet once, and every command line of TASKS then finds
the world that it would have made itself. Each process writes what it saw to RESULTS-<rank>.json.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

import lorakit.core.training as training
from lorakit.cli import main
from lorakit.core.environment import worker
from lorakit.core.errors import InputRefused, LorakitError, UsageError
from lorakit.core.parallel import World, clip_gradients, joined, put, whole
from lorakit.core.training import loop


class Watch:
    """What a run of this process did."""

    def __init__(self, stop_at: int | None) -> None:
        self.stop_at = stop_at
        self.batches: list[tuple[int, list[int]]] = []
        self.parameters: dict[str, tuple[bool, int, int]] = {}
        self._run: loop.Run | None = None
        self._go, self._step, self._loss_sum = loop.Run.go, loop.Run._step, loop.loss_sum

    @contextmanager
    def watching(self) -> Iterator[None]:
        watch = self

        def go(run: loop.Run, should_stop: Any) -> Any:
            watch._run = run
            for name, parameter in run.model.named_parameters():
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                watch.parameters[name] = (isinstance(parameter, DTensor), local.numel(), parameter.numel())
            return watch._go(run, should_stop)

        def step(run: loop.Run) -> Any:
            if run.state.step == watch.stop_at:
                raise KeyboardInterrupt
            return watch._step(run)

        def loss_sum(model: Any, batch: Any, *rest: Any) -> Any:
            if watch._run is not None:
                watch.batches.append((watch._run.state.step, [int(row.sum()) for row in batch.ids_BT]))
            return watch._loss_sum(model, batch, *rest)

        loop.Run.go, loop.Run._step, loop.loss_sum = go, step, loss_sum  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            loop.Run.go, loop.Run._step, loop.loss_sum = self._go, self._step, self._loss_sum  # type: ignore[method-assign]


def run(task: dict[str, Any], world: World) -> dict[str, Any]:
    """`lorakit train` with the options of a task, in the world that is there already."""
    parallel = task["argv"][task["argv"].index("--parallel") + 1]
    if "copy" in task and world.is_first:
        shutil.copytree(*task["copy"])
    world.gather(None)

    @contextmanager
    def already_joined(*_: Any) -> Iterator[World]:
        yield World(world.rank, world.size, world.device, parallel)

    watch = Watch(task.get("stop_at"))
    training.joined = already_joined  # type: ignore[assignment]
    with watch.watching():
        code = main(["train", *task["argv"]])
    return {"code": int(code), "batches": watch.batches, "parameters": watch.parameters}


def raised(world: World, mine: LorakitError | None) -> dict[str, Any]:
    """What comes out of together() where this process raises `mine`, or nothing."""
    try:
        with world.together():
            if mine is not None:
                raise mine
    except LorakitError as error:
        return {
            "kind": type(error).__name__,
            "message": error.message,
            "hint": error.hint,
            "shared": getattr(error, "shared", False),
            "code": int(error.exit_code),
        }
    return {"kind": None}


def telling(world: World) -> dict[str, Any]:
    """The exchanges of a world, one after the other: after a failure they still work."""
    first = world.is_first
    found: dict[str, Any] = {"gathered": world.gather({"rank": world.rank, "long": "ä" * 1000 * world.rank})}
    found["shared"] = world.share(["of", world.rank])
    found["fine"] = raised(world, None)
    found["one"] = raised(world, None if first else InputRefused("found a hole, need a wall", "mend it"))
    found["alike"] = raised(world, UsageError(f"found {world.rank}", "change it"))
    found["apart"] = raised(world, UsageError("found a", "h") if first else InputRefused("found b", "h"))
    try:
        with world.together(), world.together():
            if not first:
                raise InputRefused("found an inner hole", "mend it")
    except LorakitError as error:
        found["nested"] = [type(error).__name__, error.message]
    found["after"] = world.gather(world.rank)
    return found


def gradients(world: World) -> dict[str, Any]:
    """Sums, shards and clipping against the same on whole tensors."""
    made = {name: torch.nn.Parameter(torch.zeros(size)) for name, size in {"a": (3, 5), "b": (4,), "c": (2,)}.items()}
    for number, (name, parameter) in enumerate(made.items()):
        if name != "c" or world.rank == 1:  # the first process has no gradient for it
            parameter.grad = torch.arange(parameter.numel()).float().view_as(parameter) + 10 * world.rank + number
    copies = {name: parameter.grad.clone() if parameter.grad is not None else None for name, parameter in made.items()}
    ddp = World(world.rank, world.size, world.device, "ddp")
    fsdp = World(world.rank, world.size, world.device, "fsdp")
    ddp.sum_gradients(made.values())
    summed = {name: parameter.grad.tolist() for name, parameter in made.items() if parameter.grad is not None}
    for name, parameter in made.items():
        parameter.grad = copies[name]
    fsdp.sum_gradients(made.values())
    meant = {name: parameter.grad.tolist() for name, parameter in made.items() if parameter.grad is not None}
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world.size,))
    full = torch.arange(15.0).view(5, 3) - 4
    from torch.distributed.tensor import Shard

    sharded = distribute_tensor(full.clone(), mesh, [Shard(0)])
    assert isinstance(sharded, DTensor)
    mixed = [torch.nn.Parameter(sharded), torch.nn.Parameter(torch.zeros(4))]
    mixed[0].grad, mixed[1].grad = sharded * 2, torch.tensor([1.0, -2.0, 3.0, 4.0])
    norm = clip_gradients(mixed, 2.5).item()
    clipped = [whole(parameter.grad).tolist() for parameter in mixed if parameter.grad is not None]
    local = sharded.to_local().numel()
    with torch.no_grad():
        put(torch.full((5, 3), 7.0), sharded)
    return {
        "summed": summed,
        "meant": meant,
        "norm": norm,
        "clipped": clipped,
        "local": local,
        "put": whole(sharded).tolist(),
    }


def all_of_it(tasks_file: Path, results: Path) -> None:
    tasks = json.loads(tasks_file.read_text())
    with joined(worker(), "ddp", torch.device("cpu"), lambda: None) as world:
        found: dict[str, Any] = {}
        for name, task in tasks.items():
            if "argv" in task:
                found[name] = run(task, world)
            else:
                found[name] = {"telling": telling, "gradients": gradients}[task["check"]](world)
        results.with_name(f"{results.name}-{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    all_of_it(Path(sys.argv[1]), Path(sys.argv[2]))
