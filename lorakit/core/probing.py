"""One decoder layer, run: what a training step really takes on this machine, beside what is planned for it.

The layer has the real sizes and random weights; the step is train's own: the same LoRA, loss, autocast and optimizer.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lorakit.core.attention import apply
from lorakit.core.blocks import Batch
from lorakit.core.config import LoraSection
from lorakit.core.environment import let_gpu_memory_grow, quiet_profiler
from lorakit.core.errors import EnvironmentUnusable, OutOfMemory, first_line, is_out_of_memory
from lorakit.core.evaluation import loss_sum
from lorakit.core.fast.engine import make_fast
from lorakit.core.memory import Part, StepMemory, Workload
from lorakit.core.model import (
    DTYPES,
    add_lora,
    autocast,
    make_ready,
    pick_device,
    random_base,
    shape_for,
    trained_parameters,
)

_LENGTHS = {"cuda": (1024, 2048), "cpu": (128, 256)}


@dataclass(frozen=True)
class Probed:
    """What a step on one layer took beside weights and optimizer, at two lengths; `factor` is measured / planned at the
    longer one."""

    tokens: tuple[int, ...]
    planned_bytes: tuple[int, ...]
    measured_bytes: tuple[int, ...]

    @property
    def factor(self) -> float:
        return self.measured_bytes[-1] / self.planned_bytes[-1]


def probe(name: str, config: Mapping[str, Any], work: Workload, lora: LoraSection, *, on_gpu: bool) -> Probed:
    """Measure one layer of a model of this config under the settings of `work`, on this machine's first device.

    Raises EnvironmentUnusable where that is of another kind than the plan's, OutOfMemory where no layer runs.
    """
    let_gpu_memory_grow()
    device = pick_device()
    if on_gpu != (device.type == "cuda"):
        raise EnvironmentUnusable(
            f"--probe: found a {'GPU' if device.type == 'cuda' else 'CPU'} here, "
            f"need a {'GPU' if on_gpu else 'CPU'}, which is planned for",
            "probe on the machine that will train, or leave out --probe",
        )
    one = {**config, "num_hidden_layers": 1}
    one |= {"layer_types": config["layer_types"][:1]} if config.get("layer_types") else {}
    shape, whole = shape_for(name, one), Part(0, 1, embedding=True, norm=True, head=True)
    dtype, planned, measured = DTYPES[work.dtype], [], []
    try:
        torch.manual_seed(0)
        fast = work.engine == "fast"
        base = random_base(one, work.quantize, dtype, device, fast=fast)
        apply(base, "auto" if work.attention in ("varlen", "documents") else work.attention)
        model = add_lora(base, lora, 0, name)
        make_ready(model, dtype, checkpointing=work.gradient_checkpointing)
        if fast:
            make_fast(model, work.quantize)
        for tokens in _LENGTHS[device.type]:
            found = StepMemory(shape, replace(work, block_size=tokens, batch_size=1, accumulates=False)).peak(whole)
            planned.append(found.gradients + found.activations + found.loss)
            measured.append(_step_bytes(model, tokens, dtype, device, work.loss_tokens))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"--probe: found {first_line(error)}, need room for one layer", "leave out --probe") from None
    return Probed(_LENGTHS[device.type], tuple(planned), tuple(measured))


def _step_bytes(model: Any, tokens: int, dtype: torch.dtype, device: torch.device, loss_tokens: int) -> int:
    """The most that a second step adds to what is there between steps."""
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, tokens))
    positions = np.arange(tokens)[None] % (tokens // 2)  # two documents
    batch = Batch(ids, positions, positions > 0)
    parameters = list(trained_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, fused=device.type == "cuda")

    def step() -> None:
        with autocast(device, dtype):
            loss = loss_sum(model, batch, loss_tokens)
        loss.backward()
        optimizer.step()

    step()
    optimizer.zero_grad(set_to_none=True)
    added = _added_on_gpu(step) if device.type == "cuda" else _added_on_cpu(step)
    optimizer.zero_grad(set_to_none=True)
    return added


def _added_on_gpu(step: Callable[[], None]) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def _added_on_cpu(step: Callable[[], None]) -> int:
    """As torch's profiler saw each call of the allocator."""
    quiet_profiler()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes, initial=0))
