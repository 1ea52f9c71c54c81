"""A model's name + devices + settings → the plan, and where it doesn't fit the single changes with which it would.

Answers come from shapes, memory and placement alone; only a model that isn't built in and is of no known family is laid
out by transformers.
"""

import itertools
import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorakit.core import disk
from lorakit.core.config import IN_8_BITS, Engine, PlanDevicesConfig, option_name
from lorakit.core.engines import lacking
from lorakit.core.environment import free_gpu_bytes, free_ram_bytes
from lorakit.core.errors import InputRefused, UsageError
from lorakit.core.events import Notice, Report
from lorakit.core.memory import Workload, loss_tokens
from lorakit.core.placement import Budgets, Parallel, Plan, corrected, make_plan, read_plan
from lorakit.core.shapes import FAMILIES, Shape, built_in, config_of, shape_of

if TYPE_CHECKING:
    from lorakit.core.probing import Probed

_LONGEST_BLOCK = 65_536  # what `prepare` makes at most
_BLOCK_STEP = 64
_MOST_GIB = 4096  # that a larger GPU is asked for
_QUANTIZATIONS: tuple[Literal["none", "int8", "fp8", "nf4"], ...] = ("none", "int8", "fp8", "nf4")


Asked = Literal["split", "ddp", "fsdp", "auto"]


@dataclass(frozen=True)
class Suggestion:
    """One change with which a plan fits that doesn't; `option` is what to type."""

    change: str
    option: str
    plan: Plan

    def as_json(self) -> dict[str, Any]:
        """What `--json` shows."""
        return {"change": self.change, "option": self.option, "peak_bytes": self.plan.peak_bytes}


@dataclass(frozen=True)
class Planned:
    """The answer: the plan, single changes that fit (the smallest first) where it doesn't, and what was compared."""

    plan: Plan
    suggestions: tuple[Suggestion, ...]
    compared: tuple[Plan, ...]
    probed: "Probed | None"
    """What one layer really took here, where that was asked for; everything else is corrected by it."""
    moved_bytes: int
    """By how much that moved the fullest device's peak."""

    def as_json(self) -> dict[str, Any]:
        """What `--json` shows."""
        facts = {**self.plan.as_json(), "suggestions": [change.as_json() for change in self.suggestions]}
        facts |= {"compared": [plan.as_json() for plan in self.compared]} if self.compared else {}
        return facts | (
            {"probed": {**vars(self.probed), "factor": self.probed.factor, "moved_bytes": self.moved_bytes}}
            if self.probed
            else {}
        )


def plan_devices(config: PlanDevicesConfig, report: Report) -> Planned:
    """Plan a training run, and write the plan to its file where one is asked for.

    Raises UsageError (settings that contradict), InputRefused (an unknown model, a mixture of experts, a config that
    lacks fields, a target that matches nothing), HubFailed, DiskFailed.
    """
    base = config_of(config.model.model)
    shape = find_shape(config.model.model, base, report)
    budgets = _budgets(config, report)
    on_cpu = list(budgets) == ["cpu"]
    dtype = ("fp32" if on_cpu else "bf16") if config.model.dtype == "auto" else config.model.dtype
    if (kind := config.model.quantize) in IN_8_BITS and config.devices.parallel == "fsdp":
        raise UsageError(
            f"--parallel fsdp: found --quantize {kind}, need none, nf4 or fp4", f"{kind} can't be cut into shards"
        )
    block, batch = config.batch.block_size, config.batch.batch_size
    first = (512 if block == "auto" else block, 1 if batch == "auto" else batch)
    accumulates = config.batch.gradient_accumulation_steps > 1
    layout = "--output" if config.plan.output is not None else None
    lacks = lacking(base, dtype, config.lora.model_dump(), layout=layout)
    engine = _engine(config, lacks, on_cpu=on_cpu)
    work = Workload.of(config, dtype, *first, accumulates=accumulates, on_gpu=not on_cpu, engine=engine)
    work = replace(work, loss_tokens=loss_tokens(engine, shape.vocab_size))

    probed = None
    if config.plan.probe:
        from lorakit.core.probing import probe

        probed = probe(config.model.model, base, work, config.lora, on_gpu=not on_cpu)
    factor = probed.factor if probed else 1.0

    def planned(work: Workload) -> Plan:
        return _choose(shape, budgets, work, config.devices.parallel, factor)

    if block == "auto":
        longest = min(_LONGEST_BLOCK, _context_tokens(base)) // _BLOCK_STEP
        step = _largest(lambda size: planned(replace(work, block_size=size * _BLOCK_STEP)).fits, longest)
        work = replace(work, block_size=max(step, 1) * _BLOCK_STEP)
    if batch == "auto":
        work = replace(
            work, batch_size=max(1, _largest(lambda size: planned(replace(work, batch_size=size)).fits, 65_536))
        )
    plan = planned(work)
    needs_fast = _require_engine(config, plan)
    suggestions = () if plan.fits else tuple(_changes(plan, work, budgets, config.devices.parallel, factor))
    suggestions = tuple(one for one in suggestions if not needs_fast or one.plan.work.engine == "fast")
    can_be_fast = lacks is None and config.model.engine != "standard"
    compared = tuple(_compare(shape, work, budgets, factor, can_be_fast=can_be_fast)) if config.plan.compare else ()
    if (output := config.plan.output) is not None:
        _write(plan, output, report)
    used = {load.device: load.budget_bytes for load in plan.loads}
    moved = plan.peak_bytes - make_plan(shape, used, work, plan.parallel).peak_bytes if probed else 0
    return Planned(plan, suggestions, compared, probed, moved)


def _context_tokens(base: Mapping[str, Any]) -> int:
    """The most tokens that a model was made for, as far as its config says."""
    found = base.get("max_position_embeddings")
    return found if type(found) is int and found >= _BLOCK_STEP else _LONGEST_BLOCK


def _write(plan: Plan, output: Path, report: Report) -> None:
    """Write a plan file; of what is there only another plan is ever replaced, and that is said. Raises InputRefused,
    DiskFailed."""
    content = plan.as_json()
    if output.exists():
        try:
            before = read_plan(output)
        except InputRefused:
            raise InputRefused(
                f"{output}: found something else than a plan of lorakit's, need a new name or a plan to replace",
                "choose another --output",
            ) from None
        if before != json.loads(json.dumps(content)):
            report(Notice(f"{output}: replaced the plan for {before.get('model')} that was there"))
    disk.make_folder(output.parent)
    disk.write_file(output, (json.dumps(content, indent=1) + "\n").encode())


def _engine(config: PlanDevicesConfig, lacks: str | None, *, on_cpu: bool) -> Engine:
    """The engine that train will take on one device or on copies, as far as it doesn't depend on the GPU itself. Raises
    UsageError where one is asked for that these settings can't have, since the fast one `lacks` something."""
    needed = _needing_fast(config)
    if needed is not None and lacks is not None:
        raise UsageError(f"{needed}: found that {lacks}; need what the fast engine can do", "change one of them")
    if lacks is not None or config.model.engine == "standard" or (on_cpu and needed is None):
        return "standard"
    return "fast"


def _needing_fast(config: PlanDevicesConfig) -> str | None:
    """The option that only the fast engine can follow, where one was given."""
    return (
        "--engine fast"
        if config.model.engine == "fast"
        else ("--quantize fp8" if config.model.quantize == "fp8" else None)
    )


def _require_engine(config: PlanDevicesConfig, plan: Plan) -> bool:
    """Whether the settings need the fast engine. Raises UsageError where the plan isn't one for it."""
    needed = _needing_fast(config)
    if needed is not None and plan.work.engine != "fast":
        raise UsageError(
            f"{needed}: found {plan.parallel} over {len(plan.loads)} devices, need one GPU, or copies of the model",
            "--parallel ddp, or --gpus with one GPU",
        )
    return needed is not None


def next_command(config: PlanDevicesConfig, plan: Plan) -> str:
    """The command that trains as it was planned. Layers lie in CPU memory by a plan's file alone: where there is none,
    that it has to be written first."""
    given, usual = config.flat(), PlanDevicesConfig.resolve((None, {"model": config.model.model})).flat()
    names = (
        *("dtype", "quantize", "engine", "attention", "rank", "lora_alpha", "lora_dropout", "target_modules"),
        *("layers_to_transform", "optimizer", "batch_size", "gradient_accumulation_steps"),
    )
    given |= {"batch_size": plan.work.batch_size}
    options = []
    for name in names:
        if given[name] != usual[name]:
            value = ",".join(map(str, given[name])) if isinstance(given[name], list) else given[name]
            options += [option_name(name), str(value)]
    options += [] if plan.work.double_quantization else ["--no-double-quantization"]
    options += [] if plan.work.gradient_checkpointing else ["--no-gradient-checkpointing"]
    computing = [load for load in plan.loads if load.device != "cpu"]
    if len(computing) > 1:
        options += ["--parallel", plan.parallel]
        options += ["--num-processes", str(len(computing))] if plan.parallel != "split" else []
    ids = built_in().get(config.model.model.lower(), {}).get("ids") or [config.model.model]
    file = str(config.plan.output) if config.plan.output is not None else "plan.json" if plan.computed_on else None
    where = ["--blocks", "DIR", *(["--plan", file] if file is not None else [])]
    command = shlex.join(["lorakit", "train", "--model", ids[0], *options, *where])
    unwritten = config.plan.output is None and file is not None
    return f"add --output {file}, which train needs to offload layers, then `{command}`" if unwritten else command


def find_shape(name: str, config: Mapping[str, Any], report: Report) -> Shape:
    """The shape of a model by its config. Raises InputRefused."""
    if config.get("model_type") in FAMILIES or not config.get("model_type"):
        return shape_of(name, config)  # without torch
    from lorakit.core.model import shape_for

    shape = shape_for(name, config)
    report(Notice(f"{name}: its weights are counted exactly, its activations as those of a Llama layer of its sizes"))
    return shape


def _budgets(config: PlanDevicesConfig, report: Report) -> Budgets:
    devices = config.devices
    if devices.cpu and not devices.gpus:
        return {"cpu": devices.cpu[0]}
    sizes = list(devices.gpus) or free_gpu_bytes()
    if not sizes:
        report(Notice("no GPU here: planned for this machine's CPU; --gpus 1x24GiB plans for another machine"))
        return {"cpu": free_ram_bytes()}
    return {**dict(enumerate(sizes)), **({"cpu": devices.cpu[0]} if devices.cpu else {})}


def _gpus(budgets: Budgets) -> Budgets:
    return {device: size for device, size in budgets.items() if device != "cpu"}


def _make(shape: Shape, budgets: Budgets, work: Workload, parallel: Parallel, factor: float) -> Plan:
    return corrected(make_plan(shape, budgets, work, parallel), factor)


def _choose(
    shape: Shape,
    budgets: Budgets,
    work: Workload,
    parallel: Asked,
    factor: float,
) -> Plan:
    """The plan asked for; of auto the first that fits: copies are the fastest, then shards, then split layers."""
    if parallel != "auto":
        return _make(shape, budgets, work, parallel, factor)
    gpus = _gpus(budgets)
    ways: list[Parallel] = ["ddp", "fsdp"] if len(gpus) > 1 else []
    plans = (_make(shape, gpus, work, way, factor) for way in ways if way == "ddp" or work.quantize not in IN_8_BITS)
    fitting = next((plan for plan in plans if plan.fits), None)
    return fitting or _make(shape, budgets, work, "split", factor)


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` that fits, 0 where not even 1 does; what is larger takes no less."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _changes(plan: Plan, work: Workload, budgets: Budgets, parallel: Asked, factor: float) -> Iterator[Suggestion]:
    """Each single change that makes a plan fit, those that cost least first; `work` and `parallel` as they were asked
    for."""
    shape = plan.shape

    def again(changed: Workload, budgets: Budgets = budgets, parallel: Asked = parallel) -> Plan:
        return _choose(shape, budgets, changed, parallel, factor)

    gpus = _gpus(budgets)
    offloads = 0 < len(gpus) < len(budgets)
    tried: list[tuple[str, str, Plan]] = []
    batch = _largest(lambda size: again(replace(work, batch_size=size)).fits, work.batch_size - 1)
    if batch:
        smaller = again(replace(work, batch_size=batch))
        tried.append((f"{batch} blocks in a micro-step", f"--batch-size {batch}", smaller))
    if not work.gradient_checkpointing:
        tried.append(("checkpointing", "--gradient-checkpointing", again(replace(work, gradient_checkpointing=True))))
    if work.quantize == "none" and parallel != "fsdp" and not offloads:  # int8 can be neither sharded nor offloaded
        tried.append(("an 8-bit base", "--quantize int8", again(replace(work, quantize="int8"))))
    if work.quantize in ("none", *IN_8_BITS):
        tried.append(("a 4-bit base", "--quantize nf4", again(replace(work, quantize="nf4"))))
    steps = _largest(lambda size: again(replace(work, block_size=64 * size)).fits, (work.block_size - 1) // 64)
    if steps:
        tried.append(
            (f"blocks of {64 * steps}", f"--block-size {64 * steps}", again(replace(work, block_size=64 * steps)))
        )
    rank = _largest(lambda rank: again(replace(work, rank=rank)).fits, work.rank - 1)
    if rank:
        tried.append((f"rank {rank}", f"--rank {rank}", again(replace(work, rank=rank))))
    if len(gpus) > 1 and parallel in ("split", "ddp") and work.quantize not in IN_8_BITS and not offloads:
        tried.append(("shards of all weights", "--parallel fsdp", again(work, parallel="fsdp")))
    if len(gpus) > 1 and parallel == "ddp":
        tried.append(("layers over devices", "--parallel split", again(work, parallel="split")))
    if gpus and parallel in ("split", "auto") and work.gradient_checkpointing and work.quantize not in IN_8_BITS:
        room = again(work, budgets={**budgets, "cpu": 2**60}).loads[-1].bytes.total
        size = -(-room // 2**30)
        offloading = again(work, budgets={**budgets, "cpu": size * 2**30})
        tried.append((f"{len(offloading.computed_on)} layers in CPU memory", f"--cpu {size}GiB", offloading))
    if gpus and parallel != "ddp" and work.quantize != "fp8":
        more: Budgets = {**gpus, len(gpus): max(gpus.values()), **budgets}
        tried.append(("one more GPU", f"--gpus {_typed(more)}", again(work, budgets=more)))

    def of_size(gib: int) -> Budgets:
        return {**budgets, **dict.fromkeys(gpus or budgets, gib * 2**30)}

    least = of_size(1 + _largest(lambda gib: not again(work, budgets=of_size(gib)).fits, _MOST_GIB))
    amount = f"{max(least[device] for device in gpus or least) >> 30} GiB"
    option = f"--gpus {_typed(least)}" if gpus else f"--cpu {amount.replace(' ', '')}"
    tried.append((f"GPUs of {amount}" if gpus else f"{amount} of memory", option, again(work, budgets=least)))
    yield from (Suggestion(*change) for change in tried if change[2].fits)


def _typed(budgets: Budgets) -> str:
    """Budgets as `--gpus` takes them."""
    gpus = _gpus(budgets).values()
    sizes = [f"{size >> 30}GiB" if size % 2**30 == 0 else f"{size >> 20}MiB" for size in gpus]
    return f"{len(sizes)}x{sizes[0]}" if len(set(sizes)) == 1 else ",".join(sizes)


def _compare(shape: Shape, work: Workload, budgets: Budgets, factor: float, *, can_be_fast: bool) -> Iterator[Plan]:
    """Every way of sharing the work with every kind of base that it can have; layers are offloaded where they can be.
    A base in fp8 is the fast engine's, which computes on one GPU or on copies."""
    gpus = _gpus(budgets)
    ways: tuple[Parallel, ...] = ("split", "ddp", "fsdp") if len(gpus) > 1 else ("split",)
    fast = replace(work, engine="fast", loss_tokens=loss_tokens("fast", shape.vocab_size))
    for way, quantize in itertools.product(ways, _QUANTIZATIONS):
        in_8_bits, in_fp8 = quantize in IN_8_BITS, quantize == "fp8"
        if way == "fsdp" and in_8_bits:
            continue
        if in_fp8 and not (can_be_fast and (way == "ddp" or len(gpus) < 2)):
            continue
        usable = budgets if way == "split" and not in_8_bits else gpus or budgets
        yield _make(shape, usable, replace(fast if in_fp8 else work, quantize=quantize), way, factor)
