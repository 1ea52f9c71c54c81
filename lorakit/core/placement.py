"""Bytes × budgets → which device holds what, and whether it fits. No torch.

A model is a chain: embedding, decoder layers, last norm and head (of a tied head the weight is the embedding's, so both
lie on the first device). `split` cuts it into consecutive pieces, a device each, so that the fullest device is as empty
as can be; `ddp` puts all of it on every device, `fsdp` a share of it.

With CPU memory beside GPUs, `split` offloads layers (offloading.py) where the GPUs don't hold all of them: as few as
can be, because what is offloaded crosses the bus twice in a micro-step. In each piece these are the first layers: their
copies are there when the least of what the forward pass kept is left, and what comes after them in the chain says which
GPU computes them. So a piece ends with something that isn't offloaded.
"""

import bisect
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lorakit import __version__
from lorakit.core.config import IN_8_BITS
from lorakit.core.errors import (
    EnvironmentUnusable,
    InputRefused,
    Mismatch,
    OutOfMemory,
    UsageError,
    differences,
    shown_bytes,
)
from lorakit.core.memory import (
    CPU_PROCESS_BYTES,
    LOSS_TOKENS,
    AttentionKind,
    Bytes,
    Part,
    StepMemory,
    Workload,
)
from lorakit.core.shapes import Shape
from lorakit.core.untrusted import read_json_object

Device = int | Literal["cpu"]
"""What `from_pretrained(device_map=…)` calls a device: a GPU's number, or "cpu"."""
Budgets = Mapping[Device, int]
Parallel = Literal["split", "ddp", "fsdp"]

_FORMAT = 1
_SHAPE = (
    *("model_type", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
    *("vocab_size", "tied", "parameters"),
)

_OPERATIONS_PER_SECOND = {
    "standard": {"none": 325e12, "int8": 103e12, "nf4": 270e12, "fp4": 270e12},
    "fast": {"none": 487e12, "int8": 442e12, "nf4": 636e12, "fp4": 636e12, "fp8": 729e12},
}
"""What one GPU of the Hopper generation computes in a second in training steps of an engine, second forward passes
included: tokens/s × 6 × 6.6e9 operations a token (Llama-2-7B, blocks of 2,048, rank 16 on all linear layers, gradient
checkpointing, torch 2.11). Standard, on an H200 (2026-11-24): 8,221 none, 2,594 int8, 6,826 nf4. Fast, on an H100
(2026-11-26), where the standard engine does 8,205: 16,065 nf4, 18,420 fp8, of rank 64 12,296 none and 11,162 int8.
Another card is slower in proportion."""

_BUS_BYTES_PER_SECOND = 63e9
"""What a PCIe 5.0 bus of 16 lanes carries one way at most (PCI-SIG): 32 GT/s × 16 × 128/130 bits."""


@dataclass(frozen=True)
class Load:
    """What one device holds at its fullest moment."""

    device: Device
    budget_bytes: int
    bytes: Bytes

    @property
    def name(self) -> str:
        """The device as torch calls it."""
        return "cpu" if self.device == "cpu" else f"cuda:{self.device}"

    @property
    def share(self) -> float:
        """The part of its budget that is used."""
        return self.bytes.total / max(self.budget_bytes, 1)

    @property
    def used(self) -> str:
        """How much of its budget is used, to be read."""
        total, budget = self.bytes.total, self.budget_bytes
        if min(total, budget) < 2**30:
            return f"{shown_bytes(total)} of {shown_bytes(budget)}"
        return f"{total / 2**30:.1f} of {budget / 2**30:.1f} GiB"


@dataclass(frozen=True)
class Plan:
    """Which device holds what. `device_map` goes into `from_pretrained`; None where every device holds the same."""

    shape: Shape
    work: Workload
    parallel: Parallel
    loads: tuple[Load, ...]
    device_map: dict[str, Device] | None
    computed_on: dict[str, Device]
    """Of each offloaded layer, which `device_map` has on the CPU, the GPU that computes it."""

    @property
    def fits(self) -> bool:
        return self.share <= 1

    @property
    def share(self) -> float:
        """How full the fullest device is."""
        return max(load.share for load in self.loads)

    @property
    def _computing(self) -> tuple[Load, ...]:
        """The loads of the devices that compute: not that of the CPU beside GPUs."""
        return tuple(load for load in self.loads if load.device != "cpu") or self.loads

    @property
    def offloaded_bytes(self) -> int:
        """What lies in CPU memory of a model that GPUs train."""
        return sum(load.bytes.weights for load in self.loads if load not in self._computing)

    @property
    def peak_bytes(self) -> int:
        """The most that a device that computes takes."""
        return max(load.bytes.total for load in self._computing)

    @property
    def allocated_bytes(self) -> int:
        """What torch measures as its peak on the fullest device."""
        return max(load.bytes.allocated for load in self._computing)

    @property
    def tokens_per_second(self) -> float | None:
        """A rough speed on H200s, to compare plans by: a frozen base takes 4 operations a parameter and token, with a
        second forward pass 6. Layers split over devices run one device at a time; copies and shards run at once.
        Nothing is computed while offloaded layers are copied."""
        if self.loads[0].device == "cpu":
            return None
        operations = (6 if self.work.gradient_checkpointing else 4) * self.shape.parameters
        at_once = 1 if self.parallel == "split" else len(self.loads)
        computed = operations / _OPERATIONS_PER_SECOND[self.work.engine][self.work.quantize]
        copied = 2 * self.offloaded_bytes / _BUS_BYTES_PER_SECOND / self.work.tokens
        return at_once / (computed + copied)

    def as_json(self) -> dict[str, Any]:
        """What `--json` shows and a plan file holds."""
        return {
            "format": _FORMAT,
            "lorakit": __version__,
            "model": self.shape.name,
            "shape": {field: getattr(self.shape, field) for field in _SHAPE},
            "settings": _settings(self.work),
            "parallel": self.parallel,
            "fits": self.fits,
            "peak_bytes": self.peak_bytes,
            "tokens_per_second": self.tokens_per_second,
            "devices": [
                {
                    "name": load.name,
                    "budget_bytes": load.budget_bytes,
                    "peak_bytes": load.bytes.total,
                    "bytes": load.bytes._asdict(),
                }
                for load in self.loads
            ],
            "device_map": self.device_map,
        }


def get_device_map(shape: Shape, budgets: Budgets, work: Workload) -> dict[str, Device]:
    """The device of every module, for `from_pretrained(device_map=…)`: consecutive layers, none of them cut, the
    fullest device as empty as can be.

    Raises OutOfMemory where no such map fits.
    """
    plan = make_plan(shape, budgets, work, "split")
    if not plan.fits or plan.device_map is None:
        fullest = max(plan.loads, key=lambda load: load.share)
        raise OutOfMemory(
            f"{shape.name}: found {fullest.bytes.total / 2**30:.1f} GiB for {fullest.name} at best, "
            f"need at most its {fullest.budget_bytes / 2**30:.1f}",
            "`lorakit plan-devices` says what would fit",
        )
    return plan.device_map


def make_plan(
    shape: Shape,
    budgets: Budgets,
    work: Workload,
    parallel: Parallel,
    device_map: Mapping[str, Device] | None = None,
) -> Plan:
    """The plan for one way of sharing the work; of split for a map that is there already, where one is given.

    Raises InputRefused where a LoRA target matches no layer, or the map isn't one of consecutive layers of this shape;
    UsageError where layers can't be offloaded (`budgets` has the CPU beside GPUs).
    """
    devices: list[Device] = [device for device in budgets if device != "cpu"] or list(budgets)
    if parallel == "fsdp" or (parallel == "split" and len(budgets) > 1):  # which the fast engine leaves to the other
        work = replace(work, engine="standard", loss_tokens=LOSS_TOKENS)
    may_offload = len(devices) < len(budgets)
    if may_offload:
        _require_offload(work, parallel)
    memory, parts, found = StepMemory(shape, work), [], None
    if parallel == "split":
        if device_map is not None:
            if not set(device_map.values()) <= set(budgets):
                raise _no_cut()
            parts = _parts_of(shape, device_map, devices)
        else:
            sizes = [budgets[device] for device in devices]
            parts, fits = _best_parts(memory, sizes)
            if may_offload and not fits:
                parts, _ = _best_parts(StepMemory(shape, work, offloads=True), sizes, offload=True)
        if any(part.offloaded for part in parts):
            memory = StepMemory(shape, work, offloads=True)
        loads = [memory.peak(part) if _holds(part) else Bytes() for part in parts]
        found = _device_map(shape, dict(zip(devices, parts, strict=True)))
        if device_map is not None and found != device_map:
            raise _no_cut()
    else:
        one = _part(shape, 0, shape.num_layers + 2)
        shared = {"copies": len(devices)} if parallel == "ddp" else {"shards": len(devices)}
        loads = [memory.peak(one, **shared)] * len(devices)
    if devices == ["cpu"]:
        loads = [load._replace(workspace=0, context=CPU_PROCESS_BYTES) for load in loads]
    if may_offload:
        moved = sum(map(memory.moved_bytes, parts))
        devices.append("cpu")
        loads.append(Bytes(weights=moved, context=CPU_PROCESS_BYTES) if moved else Bytes())
    names = _layer_names(shape)
    computed_on = {
        names[layer]: device
        for device, part in zip(devices, parts, strict=False)
        for layer in range(part.first, part.first + part.offloaded)
    }
    each = tuple(Load(device, budgets[device], load) for device, load in zip(devices, loads, strict=True))
    return Plan(shape, work, parallel, each, found, computed_on)


def _require_offload(work: Workload, parallel: Parallel) -> None:
    """Raises UsageError where a run of these settings can't have layers in CPU memory."""
    if parallel != "split":
        raise UsageError(
            f"--cpu beside --gpus: found --parallel {parallel}, need split", "layers are offloaded of split"
        )
    if not work.gradient_checkpointing:
        raise UsageError(
            "--cpu beside --gpus: found no gradient checkpointing, need it",
            "without, every offloaded layer would stay on the GPU from its forward to its backward pass",
        )
    if work.quantize in IN_8_BITS:
        raise UsageError(
            f"--cpu beside --gpus: found --quantize {work.quantize}, need none, nf4 or fp4",
            "what belongs to a weight in 8 bits lies outside of it, where it can't be offloaded",
        )


def _parts_of(shape: Shape, device_map: Mapping[str, Device], devices: list[Device]) -> list[Part]:
    """What each device holds by a device map. Raises InputRefused where it names other modules or devices."""
    if device_map.keys() != _device_map(shape, {devices[0]: _part(shape, 0, shape.num_layers + 2)}).keys():
        raise _no_cut()
    norms = (device_map[module.name] for module in shape.modules if module.layer is None and module.kind == "norm")
    end = next(norms, devices[-1])
    layers, offloaded = dict.fromkeys(devices, 0), dict.fromkeys(devices, 0)
    waiting = 0  # offloaded layers before the first one that isn't: the GPU of that one computes them
    for place in (*(device_map[name] for _, name in sorted(_layer_names(shape).items())), end):
        waiting += 1
        if place in layers:
            layers[place] += waiting
            offloaded[place] += waiting - 1
            waiting = 0
    if waiting:
        raise _no_cut()
    layers[end] -= 1  # the norm itself
    cuts = list(itertools.accumulate(layers.values()))
    first = next((place for place, device in enumerate(devices) if device in device_map.values()), 0)
    last = devices.index(end)
    cuts = [cut + (place >= first) + (place >= last) for place, cut in enumerate(cuts)]
    pieces = zip([0, *cuts], cuts, offloaded.values(), strict=False)
    return [_part(shape, start, end)._replace(offloaded=count) for start, end, count in pieces]


def _no_cut() -> InputRefused:
    return InputRefused(
        "device_map: found one that isn't of consecutive layers of this model, need such a one",
        "`lorakit plan-devices MODEL --output FILE` writes plans",
    )


def _part(shape: Shape, start: int, end: int) -> Part:
    """Links [start, end) of the chain: the embedding is 0, layer l is l + 1, norm and head are the last."""
    last, layers = end == shape.num_layers + 2 and start < end, shape.num_layers
    embedding = start == 0 < end
    clipped = min(max(start - 1, 0), layers), min(max(end - 1, 0), layers)
    return Part(*clipped, embedding=embedding, norm=last, head=embedding if shape.tied else last)


def _holds(part: Part) -> bool:
    return part.end > part.first or part.embedding or part.norm


class _Cost(NamedTuple):
    """What a placement is chosen by, the first thing first: nothing over its budget, few layers offloaded, and the
    fullest device as empty as can be."""

    excess: float
    """How full the fullest device is where that is too full, else 1."""
    offloaded: int
    share: float

    def beside(self, other: "_Cost") -> "_Cost":
        return _Cost(max(self.excess, other.excess), self.offloaded + other.offloaded, max(self.share, other.share))


def _best_parts(memory: StepMemory, budgets: list[int], *, offload: bool = False) -> tuple[list[Part], bool]:
    """What each device holds so that the fullest one is as empty as can be, and whether that fits; with `offload`, so
    that the fewest layers are offloaded with which it does.

    Dynamic programming over (devices so far, links placed): exact, because no placement is the best one whose beginning
    or whose pieces could be replaced by better ones. Devices may stay empty, the last ones first.
    """
    links, shape = memory.shape.num_layers + 2, memory.shape
    alike = len({id(layer) for layer in memory.layers}) <= 1
    known: dict[object, int] = {}

    def bytes_of(part: Part) -> int:
        key = (part.end - part.first, part.first == 0, part[2:]) if alike else part
        if key not in known:
            known[key] = memory.peak(part).total if _holds(part) else 0
        return known[key]

    def placed(start: int, end: int, budget: int) -> tuple[_Cost, Part]:
        part = _part(shape, start, end)
        if offload:  # what is offloaded takes no more room than it did
            counts = range(max(0, part.end - part.first - (not part.norm)))
            fewest = bisect.bisect_left(counts, True, key=lambda n: bytes_of(part._replace(offloaded=n)) <= budget)
            part = part._replace(offloaded=fewest)
        share = bytes_of(part) / max(budget, 1)
        return _Cost(max(share, 1), part.offloaded, share), part

    pieces = {
        budget: [[placed(start, end, budget) for start in range(end + 1)] for end in range(links + 1)]
        for budget in set(budgets)
    }
    worst = _Cost(math.inf, 0, math.inf)
    best = [_Cost(1, 0, 0.0)] + [worst] * links
    choices: list[list[int]] = []
    for place, budget in enumerate(budgets):
        if budgets[max(0, place - links) : place].count(budget) == links:  # more equal devices than links: it's empty
            choices.append(list(range(links + 1)))
            continue
        options = [
            min((best[start].beside(cost), -start) for start, (cost, _) in enumerate(row)) for row in pieces[budget]
        ]
        best = [cost for cost, _ in options]
        choices.append([-start for _, start in options])
    parts, end = [], links
    for budget, choice in zip(reversed(budgets), reversed(choices), strict=True):
        start = choice[end]
        parts.append(pieces[budget][end][start][1])
        end = start
    return parts[::-1], best[links].excess <= 1


def _device_map(shape: Shape, parts: Mapping[Device, Part]) -> dict[str, Device]:
    """Every module outside of the layers by its own name, every layer by the layer's."""
    found: dict[str, Device] = {}
    layer_device: dict[int, Device] = {}
    for name, part in parts.items():
        kept = part.first + part.offloaded
        layer_device |= {layer: "cpu" if layer < kept else name for layer in range(part.first, part.end)}
    first = next(name for name, part in parts.items() if part.embedding)
    last = next(name for name, part in parts.items() if part.norm)
    for module in shape.modules:
        if module.layer is not None:
            found[layer_name(module.name, module.layer)] = layer_device[module.layer]
        elif module.name == shape.head:
            found[module.name] = first if shape.tied else last
        else:
            found[module.name] = first if module.kind in ("embedding", "buffer") else last
    return found


def _layer_names(shape: Shape) -> dict[int, str]:
    return {module.layer: layer_name(module.name, module.layer) for module in shape.modules if module.layer is not None}


def layer_name(module: str, layer: int) -> str:
    """The name of the decoder layer that a module lies in."""
    head, _, _ = f"{module}.".partition(f".{layer}.")
    return f"{head}.{layer}"


# A run's plan


def plan_run(shape: Shape, work: Workload, free: Budgets, path: Path | None, parallel: Parallel = "split") -> Plan:
    """The plan that a run follows: that of the file, or the best for these devices. `free` is the memory that each
    device has now; the plan's budgets are these.

    Raises Mismatch (a plan for another model, other settings or another way of sharing the work), InputRefused (no
    plan), EnvironmentUnusable (a device that isn't here), DiskFailed.
    """
    if path is None:
        return make_plan(shape, free, work, parallel)
    plan = read_plan(path)
    _refuse_other_model(path, plan, shape)  # first: its devices and settings are another question then
    found = "split" if len(plan["devices"]) == 1 else plan["parallel"]
    if found != parallel:
        how = "--parallel split" if found == "split" else f"--parallel {found} --num-processes {len(plan['devices'])}"
        raise Mismatch(f"{path}: found a plan for {found}, need one for {parallel}", f"add {how}, or plan for this run")
    if parallel != "split":
        refuse_other_plan(path, plan, shape, work)
        if len(plan["devices"]) != len(free):
            raise Mismatch(
                f"{path}: found a plan for {len(plan['devices'])} devices, need one for {len(free)} processes",
                f"--num-processes {len(plan['devices'])}",
            )
        return make_plan(shape, free, work, parallel)
    names = {f"cuda:{device}" if device != "cpu" else "cpu": device for device in free}
    needed = [device["name"] for device in plan["devices"]]
    training = names if needed != ["cpu"] else list(names)[:1]  # a machine with GPUs doesn't train on its CPU
    lacking = [name for name in needed if name not in training]
    if lacking:
        raise EnvironmentUnusable(
            f"{path}: found {', '.join(training)} on this machine, need {', '.join(lacking)} too",
            "plan for this machine: `lorakit plan-devices` without --gpus",
        )
    refuse_other_plan(path, plan, shape, work)
    devices = [names[name] for name in needed]
    return make_plan(shape, {device: free[device] for device in devices}, work, "split", plan["device_map"])


def largest_batch(shape: Shape, work: Workload, budgets: Budgets, parallel: Parallel, of: int) -> int:
    """The largest micro-step that fits of those that make up `of` blocks evenly; 1 where none does."""
    sizes = [size for size in range(of, 0, -1) if of % size == 0]
    plans = ((size, replace(work, batch_size=size, accumulates=size < of)) for size in sizes)
    return next((size for size, changed in plans if make_plan(shape, budgets, changed, parallel).fits), 1)


def corrected(plan: Plan, factor: float) -> Plan:
    """The same plan, where what comes and goes in a step takes `factor` times as much as it was counted for."""
    loads = []
    for load in plan.loads:
        sizes = {name: round(factor * getattr(load.bytes, name)) for name in ("activations", "loss", "slack")}
        loads.append(replace(load, bytes=load.bytes._replace(**sizes)))
    return replace(plan, loads=tuple(loads))


def with_attention(plan: Plan, kind: AttentionKind) -> Plan:
    """The same plan, counted for the attention that a run found out that it uses."""
    budgets = {load.device: load.budget_bytes for load in plan.loads}
    return make_plan(plan.shape, budgets, replace(plan.work, attention=kind), plan.parallel, plan.device_map)


# The plan file


def read_plan(path: Path) -> dict[str, Any]:
    """A plan file as `lorakit plan-devices --output` wrote it. Raises InputRefused, DiskFailed."""
    hint = "`lorakit plan-devices MODEL --output FILE` writes plans"
    plan = read_json_object(path, hint)
    needed = {"format", "shape", "settings", "parallel", "fits", "peak_bytes", "devices", "device_map"}
    if plan.get("format") != _FORMAT or not needed <= set(plan) or not _is_whole(plan):
        raise InputRefused(f"{path}: found no plan of format {_FORMAT}, need one", hint)
    return plan


def _is_whole(plan: Mapping[str, Any]) -> bool:
    """Whether what a run reads of a plan has the types and names that it should have."""
    devices, placed = plan["devices"], plan["device_map"]
    if not isinstance(devices, list) or not all(isinstance(device, dict) for device in devices):
        return False
    names = [device.get("name") for device in devices]
    if not names or len(set(map(str, names))) < len(names) or not all(isinstance(name, str) for name in names):
        return False
    known = {
        "cpu" if name == "cpu" else int(name[5:]) if re.fullmatch(r"cuda:\d{1,4}", name) else name for name in names
    }
    whole_map = placed is None or (
        isinstance(placed, dict) and bool(placed) and all(type(device) in (int, str) for device in placed.values())
    )
    return (
        isinstance(plan["settings"], dict)
        and isinstance(plan["shape"], dict)
        and whole_map
        and set((placed or {}).values()) <= known
    )


def refuse_other_plan(path: Path, plan: Mapping[str, Any], shape: Shape, work: Workload) -> None:
    """Raises Mismatch with the differences where a plan was made for another model or other settings than a run's."""
    _refuse_other_model(path, plan, shape)
    if changed := differences(plan["settings"], _settings(work)):
        listed = "\n  ".join(changed)
        raise Mismatch(
            f"{path}: found a plan for another run, need one for these settings:\n  {listed}",
            "run `lorakit plan-devices` with this run's settings, or change the run's",
        )


def _refuse_other_model(path: Path, plan: Mapping[str, Any], shape: Shape) -> None:
    if changed := differences(plan["shape"], {field: getattr(shape, field) for field in _SHAPE}):
        listed = "\n  ".join(changed)
        raise Mismatch(
            f"{path}: found a plan for another model, need one for {shape.name}:\n  {listed}",
            "run `lorakit plan-devices` with this model, or give --model the plan's",
        )


def _settings(work: Workload) -> dict[str, Any]:
    found = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(work).items()}
    accumulates = found.pop("accumulates")
    return {**found, "accumulates_gradients": accumulates}
