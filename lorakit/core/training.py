"""Blocks + base → adapter: one loop, readable top to bottom, that can be stopped anywhere and goes on exactly.

Nothing is replayed on resume because nothing is carried along: which blocks a step sees is a function of (seed, epoch,
global index), every micro-step reseeds from (seed, step, micro-step), and the learning rate is a function of the step.
A checkpoint holds the adapter, AdamW's moments and a few counters; a run that was killed and resumed gives the bytes of
one that wasn't (on the CPU).

A run folder, while the run goes on:    checkpoints/step-00000012/ (artifacts), metrics.jsonl
and at its end, beside them:            the adapter as PEFT writes it, tokenizer, model card, lorakit.yaml, lorakit.json
"""

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
from peft import PeftModel
from torch import Tensor

from lorakit.core import adapters, artifacts, disk
from lorakit.core.artifacts import Artifact
from lorakit.core.attention import apply
from lorakit.core.blocks import Blocks
from lorakit.core.config import TrainConfig
from lorakit.core.environment import free_ram_bytes, let_gpu_memory_grow
from lorakit.core.errors import (
    ArtifactDamaged,
    InputRefused,
    Mismatch,
    NonFinite,
    OutOfMemory,
    Stopped,
    first_line,
    is_out_of_memory,
)
from lorakit.core.evaluation import loss_sum
from lorakit.core.events import Notice, Progress, Report
from lorakit.core.hub import model_folder
from lorakit.core.memory import CONTEXT_BYTES, Workload, attention_kind
from lorakit.core.model import (
    add_lora,
    autocast,
    dtype_name,
    load_base,
    lora_parameters,
    make_ready,
    pick_device,
    pick_dtype,
    require_device,
    require_vocabulary,
    shape_for,
)
from lorakit.core.placement import Budgets, Plan, plan_run, with_attention
from lorakit.core.tokenization import load_tokenizer, spec_of, tokenizer_files
from lorakit.core.weights import Weights, open_weights

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8
_FIRST_LOSS_SCALE = 2.0**16
_SMALLEST_LOSS_SCALE = 2.0**-10

ShouldStop = Callable[[], str | None]
"""Asked after every step: "terminate" or "interrupt" once such a signal has come, else None."""


@dataclass(frozen=True)
class Trained:
    """The result of `train`. `peak_bytes` is the fullest GPU's peak, or the process's on the CPU; `planned_bytes` what
    tensors were planned to take, None where a model can't be planned."""

    path: Path
    steps: int
    first_loss: float
    last_loss: float
    tokens_per_second: float
    peak_bytes: int
    seconds: float
    resumed_from: int
    attention: str
    already_done: bool
    planned_bytes: int | None = None


@dataclass
class _State:
    """What a checkpoint carries besides tensors."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_loss: float = math.nan
    last_loss: float = math.nan
    loss_scale: float = _FIRST_LOSS_SCALE
    loss_scale_age: int = 0
    attention: str = ""
    """The implementation that the first step was computed with: the others are too."""


@dataclass(frozen=True)
class Schedule:
    """Which blocks each optimizer step takes, for a whole run. The last step may be short."""

    num_blocks: int
    blocks_per_step: int
    total_blocks: int
    seed: int

    @property
    def steps(self) -> int:
        return math.ceil(self.total_blocks / self.blocks_per_step)

    def blocks_of_step(self, step: int) -> list[int]:
        """The blocks of a step, counted from 0: every epoch is a permutation drawn from (seed, epoch)."""
        first = step * self.blocks_per_step
        chosen = range(first, min(first + self.blocks_per_step, self.total_blocks))
        orders = {epoch: self._order(epoch) for epoch in {index // self.num_blocks for index in chosen}}
        return [int(orders[index // self.num_blocks][index % self.num_blocks]) for index in chosen]

    def _order(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.num_blocks)


def train(
    config: TrainConfig, target: Path, folders: Sequence[Path], report: Report, should_stop: ShouldStop
) -> Trained:
    """Train an adapter on the blocks in `folders` into the run folder `target`.

    Goes on where an earlier run of the same work stopped.

    Raises InputRefused, Mismatch (other data, base or settings than this folder's), ArtifactDamaged, Busy, DiskFailed,
    NonFinite, OutOfMemory, HubFailed, and Stopped after a signal, with the last step saved.
    """
    let_gpu_memory_grow()
    overwrite = config.output.overwrite
    beside = target.resolve().with_name(f"{target.resolve().name}.new")
    with artifacts.lock(target), artifacts.lock(beside) if overwrite else nullcontext():
        for folder in (target, beside) if overwrite else (target,):
            artifacts.sweep(folder / CHECKPOINTS)
        blocks = Blocks(folders)
        weights = open_weights(model_folder(config.model.model))
        parents = {"blocks": blocks.fingerprint, "base": weights.fingerprint}
        in_progress = (CHECKPOINTS, METRICS)
        done = artifacts.claim(target, "adapter", config, parents, overwrite=overwrite, unfinished=in_progress)
        if done is not None:
            return Trained(path=target, already_done=True, **done.facts)
        try:
            if not artifacts.is_artifact(target):
                return _Run(config, target, blocks, weights, parents, report).run(should_stop)
        except Mismatch:
            if not overwrite:
                raise
        # The earlier run stays as it is until the new one, made beside it, is whole.
        if os.path.ismount(target.resolve()):
            raise Mismatch(
                f"{target}: found another run on a mount point, which can't be renamed; need a new or empty folder",
                f"choose another --output, such as {target / 'new'}",
            )
        try:
            done = artifacts.claim(beside, "adapter", config, parents, overwrite=False, unfinished=in_progress)
            run = None if done else _Run(config, beside, blocks, weights, parents, report)
        except Mismatch:  # left by another run with --overwrite
            artifacts.remove(beside)
            run = _Run(config, beside, blocks, weights, parents, report)
        facts = vars(run.run(should_stop)) if run else {**done.facts, "already_done": False}  # type: ignore[union-attr]
        artifacts.replace(beside, target)
        return Trained(**{**facts, "path": target})


class _Run:
    """One run folder and all that its loop needs."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        blocks: Blocks,
        weights: Weights,
        parents: Mapping[str, str],
        report: Report,
    ) -> None:
        self.config, self.folder, self.blocks, self.parents, self.report = config, folder, blocks, parents, report
        batch = config.batch
        per_step = batch.batch_size * batch.accumulation_steps
        wanted = batch.max_steps * per_step if batch.max_steps else max(1, round(batch.epochs * len(blocks)))
        self.schedule = Schedule(len(blocks), per_step, wanted, batch.seed)
        self.state = _State()
        checkpoint = self._newest_checkpoint()
        self.device = pick_device()
        dtype = pick_dtype(config.model.dtype, self.device)
        require_device(dtype, self.device, report)
        self.tokenizer = load_tokenizer(weights.folder)
        if spec_of(self.tokenizer).fingerprint != blocks.tokenizer:
            raise Mismatch(
                f"{blocks.path}: found blocks of another tokenizer or chat template, "
                f"need those of {config.model.model}",
                f"`lorakit prepare … --tokenizer {config.model.model}`",
            )
        self.plan = self._plan(weights, dtype)
        followed = self.plan if config.devices.plan else None
        places = (followed.device_map, followed.computed_on) if followed else ()
        base = load_base(weights, dtype, self.device, config.model.quantize, *places)
        self.state.attention = _attention(base, config, checkpoint, report)
        report(Notice(f"attention: {self.state.attention}"))
        if self.plan:
            on_gpu = self.device.type == "cuda"
            self.plan = with_attention(self.plan, attention_kind(self.state.attention, on_gpu=on_gpu))
            _say_what_wont_fit(self.plan, report)
        self.model = add_lora(base, config.lora, batch.seed, config.model.model)
        require_vocabulary(self.model, blocks.largest_id(), blocks.path)
        if blocks.template is not None:
            self.tokenizer.chat_template = blocks.template  # whoever talks with the adapter asks as it was trained
        make_ready(self.model, dtype, checkpointing=batch.gradient_checkpointing)
        self.scaled, self.autocast = dtype is torch.float16, autocast(self.device, dtype)
        self.parameters = lora_parameters(self.model)
        self.fused = self.device.type == "cuda"  # without: another fp32 copy of the adapter in every step
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=config.optimizer.learning_rate,
            betas=_BETAS,
            eps=_EPSILON,
            weight_decay=config.optimizer.weight_decay,
            fused=self.fused,
        )
        self.rate_at = _learning_rates(config, self.optimizer, self.schedule.steps)
        adapter_bytes = sum(parameter.numel() * 4 for parameter in self.parameters.values())
        disk.require_free_bytes(folder, 3 * adapter_bytes * (config.saving.save_total_limit + 2))
        if checkpoint is not None:
            self._load(checkpoint)
        self.resumed_from = self.state.step

    def _plan(self, weights: Weights, dtype: torch.dtype) -> Plan | None:
        """What the run is going to take; None where it can't be planned."""
        config, path = self.config, self.config.devices.plan
        try:
            shape = shape_for(config.model.model, weights.config)
        except InputRefused:
            if path is not None:
                raise
            return None
        on_gpu, block = self.device.type == "cuda", self.blocks.size
        work = Workload.of(config, dtype_name(dtype), block, config.batch.batch_size, on_gpu=on_gpu)
        free: Budgets = {"cpu": free_ram_bytes()}
        if on_gpu:
            # what is asked has its context by then, which the plan counts
            asked = range(torch.cuda.device_count()) if path is not None else (torch.cuda.current_device(),)
            gpus: Budgets = {number: torch.cuda.mem_get_info(number)[0] + CONTEXT_BYTES for number in asked}
            free = {**gpus, **free}  # the CPU's is for layers that a plan offloads
        return plan_run(shape, work, free, path)

    def run(self, should_stop: ShouldStop) -> Trained:
        disk.make_folder(self.folder / CHECKPOINTS)
        self._remove_oldest_checkpoints()  # which a killed run may not have come to
        metrics_path = self.folder / METRICS
        _cut_back(metrics_path, self.state.step)
        metrics = disk.AppendedFile(metrics_path)
        try:
            while self.state.step < self.schedule.steps:
                line = self._step()
                step, last = self.state.step, self.state.step == self.schedule.steps
                if step % self.config.saving.logging_steps == 0 or last:
                    metrics.append(json.dumps(line))
                self.report(Progress("training", step, self.schedule.steps, "steps", f"loss {line['loss']:.4f}"))
                signal = None if last else should_stop()
                if step % self.config.saving.save_steps == 0 or last or signal:
                    metrics.sync()
                    self._save()
                    self._remove_oldest_checkpoints()
                if signal:
                    raise Stopped(
                        f"{self.folder}: stopped after step {step} of {self.schedule.steps}, which is saved",
                        "run the same command again: it goes on from there",
                        interrupted=signal == "interrupt",
                    )
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(
                f"step {self.state.step + 1}: found {first_line(error)}, need more memory",
                "lower --batch-size (raise --gradient-accumulation-steps) or --block-size, or keep "
                "--gradient-checkpointing on; the same command goes on from the last checkpoint",
            ) from None
        finally:
            metrics.close()
        return self._finish()

    def _step(self) -> dict[str, Any]:
        """One optimizer step; returns its line of metrics. Raises NonFinite before anything is changed by it."""
        started = time.monotonic()
        state, size = self.state, self.config.batch.batch_size
        indices = self.schedule.blocks_of_step(state.step)
        micro_batches = [self.blocks.batch(indices[at : at + size]) for at in range(0, len(indices), size)]
        trained_tokens = sum(batch.trained_tokens for batch in micro_batches)
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            scale = state.loss_scale if self.scaled else 1.0
            total = 0.0
            for micro_step, batch in enumerate(micro_batches):
                torch.manual_seed(_seed(self.config.batch.seed, state.step, micro_step))
                with self.autocast:
                    loss = loss_sum(self.model, batch) / max(trained_tokens, 1)
                total += loss.item()
                (loss * scale).backward()
            gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
            if self.scaled:
                torch._foreach_mul_(gradients, 1 / scale)
            norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.optimizer.max_grad_norm))
            if math.isfinite(total) and math.isfinite(norm):
                break
            if not (self.scaled and math.isfinite(total) and scale > _SMALLEST_LOSS_SCALE):
                raise NonFinite(
                    f"step {state.step + 1}: found loss {total} and gradient norm {norm}, need numbers "
                    f"(blocks {', '.join(map(str, indices[:8]))}{' …' if len(indices) > 8 else ''})",
                    f"lower --learning-rate, or try --dtype fp32; nothing after step {self._last_saved()} was kept",
                )
            state.loss_scale, state.loss_scale_age = scale / 2, 0  # fp16 overflowed: the same step with a smaller scale
        rate = self.rate_at(state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        state.loss_scale_age += 1
        if state.loss_scale_age == 2000:  # the growth interval of torch.amp.GradScaler
            state.loss_scale, state.loss_scale_age = state.loss_scale * 2, 0
        seconds = time.monotonic() - started
        tokens = len(indices) * self.blocks.size
        state.step += 1
        state.tokens += tokens
        state.seconds += seconds
        state.first_loss = total if state.step == 1 else state.first_loss
        state.last_loss = total
        return {
            "step": state.step,
            "loss": total,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens_per_second": tokens / seconds,
            "peak_bytes": _peak_bytes(self.device),
        }

    def _newest_checkpoint(self) -> Artifact | None:
        """The newest whole checkpoint, of this very work. A damaged one is passed over, kept, and said."""
        damaged: ArtifactDamaged | None = None
        for folder in sorted((self.folder / CHECKPOINTS).glob("step-????????"), reverse=True):
            try:
                checkpoint = artifacts.open_artifact(folder, "checkpoint")
            except ArtifactDamaged as error:
                damaged = error
                aside = artifacts.set_aside(folder)
                self.report(Notice(f"passed over a damaged checkpoint, kept as {aside.name}: {error.message}"))
                continue
            hint = "choose another --output, or add --overwrite"
            artifacts.refuse_other_work(checkpoint, self.config, self.parents, hint)
            return checkpoint
        if damaged is not None:
            raise ArtifactDamaged(damaged.message, "no checkpoint is whole; the same command again begins anew")
        return None

    def _last_saved(self) -> int:
        return max((int(path.name[5:]) for path in (self.folder / CHECKPOINTS).glob("step-????????")), default=0)

    def _load(self, checkpoint: Artifact) -> None:
        weights = safetensors.torch.load((checkpoint.path / adapters.WEIGHTS).read_bytes())
        moments = safetensors.torch.load((checkpoint.path / OPTIMIZER).read_bytes())
        self.state = _State(**json.loads((checkpoint.path / STATE).read_bytes()))
        for name, parameter in self.parameters.items():
            parameter.data.copy_(weights[name])
            self.optimizer.state[parameter] = {
                # where torch's own fused step keeps it
                "step": torch.tensor(float(self.state.step), device=parameter.device if self.fused else None),
                "exp_avg": moments[f"exp_avg.{name}"].to(parameter.device),
                "exp_avg_sq": moments[f"exp_avg_sq.{name}"].to(parameter.device),
            }
        self.report(Notice(f"goes on after step {self.state.step} of {self.schedule.steps}"))

    def _save(self) -> None:
        """Commit a checkpoint."""
        folder = self.folder / CHECKPOINTS / f"step-{self.state.step:08d}"
        if not folder.exists():
            moments = {
                f"{moment}.{name}": self.optimizer.state[parameter][moment]
                for name, parameter in self.parameters.items()
                for moment in ("exp_avg", "exp_avg_sq")
            }
            files = {
                **self._adapter_files(),
                OPTIMIZER: safetensors.torch.save(_on_cpu(moments)),
                STATE: json.dumps(vars(self.state)).encode(),
            }
            artifacts.commit(
                folder, "checkpoint", files.items(), config=self.config, parents=self.parents, facts=vars(self.state)
            )

    def _remove_oldest_checkpoints(self) -> None:
        kept = sorted((self.folder / CHECKPOINTS).glob("step-????????"))
        for old in kept[: -self.config.saving.save_total_limit]:
            artifacts.remove(old)

    def _finish(self) -> Trained:
        """Put the adapter beside the checkpoints: the run folder becomes an artifact."""
        state = self.state
        facts: dict[str, Any] = {
            "steps": state.step,
            "first_loss": state.first_loss,
            "last_loss": state.last_loss,
            "tokens_per_second": state.tokens / max(state.seconds, 1e-9),
            "peak_bytes": _peak_bytes(self.device),
            "planned_bytes": self.plan.allocated_bytes if self.plan else None,
            "seconds": state.seconds,
            "resumed_from": self.resumed_from,
            "attention": state.attention,
        }
        files = {
            **self._adapter_files(),
            **tokenizer_files(self.tokenizer),
            "README.md": _model_card(self.config, facts).encode(),
        }
        artifacts.commit(
            self.folder, "adapter", files.items(), config=self.config, parents=self.parents, facts=facts, keep=[METRICS]
        )
        return Trained(path=self.folder, already_done=False, **facts)

    def _adapter_files(self) -> dict[str, bytes]:
        """The adapter as PEFT writes it."""
        return {
            adapters.WEIGHTS: safetensors.torch.save(_on_cpu(self.parameters), metadata={"format": "pt"}),
            adapters.CONFIG: _adapter_config(self.model),
        }


def _adapter_config(model: PeftModel) -> bytes:
    config = {**model.peft_config["default"].to_dict(), "inference_mode": True}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return (json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n").encode()


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}


def _say_what_wont_fit(plan: Plan, report: Report) -> None:
    if not plan.fits:
        load = max(plan.loads, key=lambda load: load.share)
        needs = f"planned {load.bytes.total / 2**30:.1f} GiB on {load.name}, found {load.budget_bytes / 2**30:.1f} free"
        report(Notice(f"{needs}: this run will likely run out of memory; `lorakit plan-devices` helps"))


def _attention(base: Any, config: TrainConfig, checkpoint: Artifact | None, report: Report) -> str:
    """Give the base its implementation of attention: a run that goes on keeps the one that it began with."""
    if checkpoint is None:
        return apply(base, config.model.attention, report)
    try:
        return apply(base, str(checkpoint.facts["attention"]), report)
    except InputRefused as error:
        raise Mismatch(
            f"{error.message}: the run began with it", "go on where it can run, or begin anew with --overwrite"
        ) from None


def _learning_rates(config: TrainConfig, optimizer: torch.optim.Optimizer, steps: int) -> Callable[[int], float]:
    """transformers' schedule as a function of the step, counted from 0."""
    warmup_steps = math.ceil(config.optimizer.warmup_ratio * steps)
    name = config.optimizer.lr_scheduler_type
    scheduler = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps)
    after_warmup = scheduler.lr_lambdas[0]

    def rate_at(step: int) -> float:
        # A step counts as its own end of warm-up, so that the first one learns already.
        factor = (step + 1) / warmup_steps if step < warmup_steps else float(after_warmup(step))
        return config.optimizer.learning_rate * factor

    return rate_at


def _seed(*parts: int) -> int:
    """A seed for torch from counters: independent draws for neighbouring steps."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") % 2**63


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return max(torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count()))
    import resource

    # kilobytes on Linux, bytes on macOS: getrusage(2) of each
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _cut_back(path: Path, step: int) -> None:
    """Keep the lines of metrics up to `step`: what came after the checkpoint will be written again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line if line.endswith(b"\n") else line + b"\n")
    content = b"".join(kept)
    if content != path.read_bytes():
        disk.write_file(path, content)


def _model_card(config: TrainConfig, facts: Mapping[str, Any]) -> str:
    base = config.model.model
    base_line = f"base_model: {base}\n" if not Path(base).exists() else ""
    return f"""---
library_name: peft
{base_line}tags: [lora, lorakit]
---
# LoRA adapter for {Path(base).name}

Made by lorakit: rank {config.lora.rank}, alpha {config.lora.lora_alpha:g}, targets \
{", ".join(config.lora.target_modules)}; {facts["steps"]} steps, training loss {facts["first_loss"]:.4f} → \
{facts["last_loss"]:.4f}. `lorakit.yaml` holds every setting; `lorakit train --config lorakit.yaml` repeats the run.

```python
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("this folder")
```
"""
