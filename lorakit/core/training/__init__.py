"""Blocks + base → adapter: one loop, readable top to bottom, that can be stopped anywhere and goes on exactly.

Nothing is replayed on resume because nothing is carried along: which blocks a step sees is a function of (seed, epoch,
global index), every micro-step reseeds from (seed, step, micro-step), and the learning rate is a function of the step.
A checkpoint holds the adapter, the optimizer's states and a few counters; a run that was killed and resumed gives the
bytes of one that wasn't (on the CPU), on another number of processes the same samples in the same order.

A run folder, while the run goes on:    checkpoints/step-00000012/ (artifacts), metrics.jsonl, samples.jsonl
and at its end, beside them:            the adapter as PEFT writes it, tokenizer, model card, lorakit.yaml, lorakit.json

loop         one step after the other, evaluations and checkpoints between them
schedule     which blocks each step sees
optimizers   optimizers, their states, learning rates
checkpoints  what is on disk before the end
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lorakit.core import artifacts, disk
from lorakit.core.adapters import WEIGHTS, Adapter, open_adapter
from lorakit.core.artifacts import Artifact
from lorakit.core.blocks import Blocks
from lorakit.core.config import Engine, TrainConfig
from lorakit.core.environment import let_gpu_memory_grow, make_cublas_deterministic, worker
from lorakit.core.errors import InputRefused, Mismatch, Stopped, UsageError
from lorakit.core.events import Report, ShouldStop
from lorakit.core.hub import model_folder, push_folder
from lorakit.core.model import pick_device
from lorakit.core.parallel import World, joined
from lorakit.core.training.checkpoints import CHECKPOINTS, EXTENDS, Checkpoints, other_work_hint
from lorakit.core.training.loop import UNFINISHED, Run, schedule_of
from lorakit.core.weights import Weights, open_weights


@dataclass(frozen=True)
class Trained:
    """The result of `train`. `peak_bytes` is the fullest GPU's peak, or the process's on the CPU; `planned_bytes` what
    tensors were planned to take, None where a model can't be planned; `best_step` and `eval_loss` are those of the
    lowest held-out loss, None without evaluations; the adapter is that of `adapter_step`; `url` is where it was
    uploaded to."""

    path: Path
    steps: int
    first_loss: float
    last_loss: float
    tokens_per_second: float
    peak_bytes: int
    seconds: float
    resumed_from: int
    attention: str
    dtype: str
    already_done: bool
    engine: Engine = "standard"  # of a run from before there were two
    calibrated: bool = False
    planned_bytes: int | None = None
    best_step: int | None = None
    eval_loss: float | None = None
    adapter_step: int | None = None
    url: str | None = None


def train(
    config: TrainConfig, target: Path, folders: Sequence[Path], report: Report, should_stop: ShouldStop
) -> Trained:
    """Train an adapter on the blocks in `folders` into the run folder `target`, alone or as one of many processes.

    Goes on where an earlier run of the same work stopped.

    Raises UsageError, InputRefused, Mismatch (other data, base or settings than this folder's), ArtifactDamaged, Busy,
    DiskFailed, NonFinite, OutOfMemory, RankFailed, EnvironmentUnusable, HubFailed, and Stopped after a signal, with the
    last step saved.
    """
    let_gpu_memory_grow()
    device = pick_device()
    if asked := should_stop():
        raise Stopped.early(interrupted=asked == "interrupt")
    with (
        joined(worker(), config.devices.parallel, device, should_stop) as world,
        ExitStack() as locks,
        _kernels(deterministic=config.batch.deterministic),
    ):
        config = config.settled(num_processes=max(1, world.size // config.devices.num_machines))
        with world.together():
            blocks = Blocks(folders)
            weights, adapter, parents = _inputs(config, world, report)
            parents["blocks"] = blocks.fingerprint
        place, facts = None, None
        with world.together():
            if world.is_first:
                place = _claim(config, target, blocks, parents, report, locks)
                if place.done is not None:
                    done = place.done.facts_as(Trained, path=target, already_done=True)
                    facts = {**vars(done), "path": str(target)}  # as JSON holds it
        facts = world.share(facts)
        already = facts is not None and bool(place and place.folder == target)
        if facts is None:
            folder, newest = world.share(place.shared if place else None)
            with world.together():
                checkpoint = artifacts.open_artifact(Path(newest), "checkpoint") if newest else None
                run = Run(config, Path(folder), blocks, weights, adapter, parents, checkpoint, world, report)
                if place is not None and place.reopens:
                    artifacts.reopen(place.folder, UNFINISHED)
            facts = run.go(should_stop)
        if place and place.folder != target:
            artifacts.replace(place.folder, target, UNFINISHED)
        url, repository = None, config.hub.push_to_hub
        if world.is_first and repository is not None:
            url = push_folder(target, repository, private=config.hub.private, report=report)
    return Trained(**{**facts, "path": target, "already_done": already, "url": url})


@dataclass(frozen=True)
class _Place:
    """Where a run goes on: the folder, its newest checkpoint, or the artifact that it has become already."""

    folder: Path
    checkpoint: Artifact | None = None
    done: Artifact | None = None
    reopens: bool = False
    """Whether it is an adapter, for more steps: it becomes a run again when these can begin."""

    @property
    def shared(self) -> tuple[str, str | None]:
        """What all processes have to know."""
        return str(self.folder), str(self.checkpoint.path) if self.checkpoint else None


def _claim(
    config: TrainConfig,
    target: Path,
    blocks: Blocks,
    parents: Mapping[str, str],
    report: Report,
    locks: ExitStack,
) -> _Place:
    """Lock the target and find out how far this very work has come there; with --overwrite beside it, where other work
    is: the earlier run stays as it is until the new one is whole."""
    overwrite = config.output.overwrite
    beside = target.resolve().with_name(f".{target.resolve().name}.overwriting")
    for folder in (target, beside) if overwrite else (target,):
        locks.enter_context(artifacts.lock(folder))
        artifacts.sweep(folder / CHECKPOINTS)
    may_differ = EXTENDS if config.batch.extend else ()

    def found_in(folder: Path, *, replaceable: bool) -> _Place | None:
        done = artifacts.claim(
            folder,
            "adapter",
            config,
            parents,
            overwrite=replaceable,
            unfinished=UNFINISHED,
            may_differ=may_differ,
            hint=other_work_hint,
        )
        checkpoints = Checkpoints(folder, config, parents, report)
        other = {name: done.config.get(name) for name in may_differ} if done is not None else {}
        if done is not None and other != {name: config.flat()[name] for name in may_differ}:
            checkpoint = checkpoints.newest(may_differ)
            if checkpoint is None:
                raise InputRefused(
                    f"{folder}: found an adapter without its checkpoints, need one to go on from",
                    "begin a new run with --adapter and this folder: it has the weights, but no optimizer's states",
                )
            steps = schedule_of(config, blocks, checkpoint).steps
            if done.facts["steps"] >= steps:
                raise UsageError(
                    f"--extend: found {folder} with {done.facts['steps']} steps already, need more than these",
                    f"raise --max-steps or --epochs: these settings mean {steps} steps",
                )
            return _Place(folder, checkpoint, reopens=True)
        if done is not None:
            return _Place(folder, done=done)
        if artifacts.is_artifact(folder):
            return None
        return _Place(folder, checkpoints.newest(may_differ))

    try:
        if (place := found_in(target, replaceable=overwrite)) is not None:
            return place
    except Mismatch:
        if not overwrite:
            raise
    artifacts.refuse_foreign(target, UNFINISHED)
    if os.path.ismount(target.resolve()):
        raise Mismatch(
            f"{target}: found another run on a mount point, which can't be renamed; need a new or empty folder",
            f"choose another --output, such as {target / 'new'}",
        )
    try:
        return found_in(beside, replaceable=False) or _Place(beside)
    except Mismatch:  # left by another run with --overwrite
        artifacts.remove(beside)
        return _Place(beside)


def _inputs(config: TrainConfig, world: World, report: Report) -> tuple[Weights, Adapter | None, dict[str, str]]:
    """The base's weights, the adapter to begin with, and the fingerprints of both; hashed by the first process, and by
    the others found in its cache."""
    found: dict[str, str] = {}
    adapter = None
    for turn in (True, False):
        with world.together():
            if world.is_first is turn:
                weights = open_weights(model_folder(config.model.model))
                found["base"] = weights.fingerprint
                if config.lora_kind.adapter is not None:
                    adapter = open_adapter(model_folder(config.lora_kind.adapter, need="an adapter"), report)
                    found["adapter"] = disk.sha256(adapter.folder / WEIGHTS)
    return weights, adapter, found


@contextmanager
def _kernels(*, deterministic: bool) -> Iterator[None]:
    """Only kernels that give the same bytes each time, where that is asked for."""
    if not deterministic:
        yield
        return
    make_cublas_deterministic()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
