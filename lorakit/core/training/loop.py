"""The loop itself: one step after the other, with evaluations and checkpoints between them, in one process or many."""

import json
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lorakit import __version__
from lorakit.core import adapters, artifacts, disk, engines
from lorakit.core.adapters import Adapter
from lorakit.core.artifacts import Artifact
from lorakit.core.attention import apply
from lorakit.core.attention.implementations import set_implementation
from lorakit.core.blocks import VALIDATION, Batch, Blocks
from lorakit.core.calibration import CALIBRATION_TOKENS, Calibration
from lorakit.core.config import CALIBRATED, Engine, SamplingSection, TrainConfig, option_name
from lorakit.core.environment import free_ram_bytes
from lorakit.core.errors import (
    ArtifactDamaged,
    EnvironmentUnusable,
    InputRefused,
    LorakitError,
    Mismatch,
    NonFinite,
    OutOfMemory,
    RankFailed,
    Stopped,
    UsageError,
    base_gives_no_numbers,
    differences,
    first_line,
    is_out_of_memory,
)
from lorakit.core.evaluation import loss_sum, mean_loss, perplexity
from lorakit.core.events import Notice, Progress, Report, ShouldStop
from lorakit.core.fast.engine import make_fast
from lorakit.core.generation import answer
from lorakit.core.memory import CONTEXT_BYTES, Workload, attention_kind, loss_tokens
from lorakit.core.model import (
    Opened,
    add_lora,
    autocast,
    compile_layers,
    continue_lora,
    decoder_layers,
    dtype_name,
    grow,
    load_base,
    longer_embeddings,
    make_ready,
    pick_dtype,
    require_device,
    require_positions,
    require_readable,
    require_vocabulary,
    shape_for,
    trained_names,
    trained_parameters,
)
from lorakit.core.parallel import World, clip_gradients, put, whole
from lorakit.core.placement import Budgets, Plan, largest_batch, plan_run, with_attention
from lorakit.core.quantization import stacks
from lorakit.core.quantized_cache import QuantizedCache
from lorakit.core.reporting import data_summary, read_metrics, report_page
from lorakit.core.tokenization import load_tokenizer, spec_of, tokenizer_files
from lorakit.core.tracking import Tracker, open_tracker, require_tracker
from lorakit.core.training.checkpoints import CHECKPOINTS, EXTENDS, Checkpoints, State, read
from lorakit.core.training.optimizers import LearningRate, load_states, make_optimizer, pages_nothing, states_of
from lorakit.core.training.schedule import Schedule, seed_of
from lorakit.core.untrusted import parse_json
from lorakit.core.weights import Weights

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
TRACKING = "tracking"
UNFINISHED = (CHECKPOINTS, METRICS, SAMPLES, TRACKING)
"""What a run leaves in its folder before it is done."""

_SMALLEST_LOSS_SCALE = 2.0**-10
_SAMPLE_TOKENS = 128


class Run:
    """One run folder and all that its loop needs."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        blocks: Blocks,
        weights: Weights,
        adapter: Adapter | None,
        parents: Mapping[str, str],
        checkpoint: Artifact | None,
        world: World,
        report: Report,
    ) -> None:
        self.config, self.folder, self.blocks, self.parents = config, folder, blocks, parents
        self.world, self.report, self.device = world, report, world.device
        self.held_out = blocks.of(VALIDATION)
        self.data = data_summary(blocks.artifacts)
        self.prompts = _read_prompts(config.evaluation.sample_prompts)
        self._require_usable()
        self.schedule = schedule_of(config, blocks, checkpoint)
        self.learning_rate = LearningRate(config, self.schedule.steps)
        self.state = State()
        if checkpoint is not None:
            self.state.attention = str(checkpoint.facts["attention"])
            self.state.engine = checkpoint.facts.get("engine", self.state.engine)
            for name in ("calibrated", "not_calibrated", "batch_size"):
                setattr(self.state, name, checkpoint.facts.get(name, getattr(self.state, name)))
        self.checkpoints = Checkpoints(folder, config, parents, report)
        dtype = pick_dtype(config.model.dtype, self.device)
        require_device(dtype, self.device, report)
        begun_with = checkpoint.facts["dtype"] if checkpoint is not None else dtype_name(dtype)
        if begun_with != dtype_name(dtype):
            raise Mismatch(
                f"--dtype {config.model.dtype}: found {dtype_name(dtype)} here, need {begun_with}, "
                "with which the run began",
                f"--dtype {begun_with}, or begin anew with --overwrite",
            )
        self.state.dtype = begun_with
        self.tokenizer = load_tokenizer(weights.folder, config.tokens.add_tokens)
        if spec_of(self.tokenizer).fingerprint != blocks.tokenizer:
            raise Mismatch(
                f"{blocks.path}: found blocks of another tokenizer, chat template or added tokens, "
                f"need those of {config.model.model}",
                f"`lorakit prepare … --tokenizer {shlex.quote(config.model.model)}`, with the same --add-tokens",
            )
        self.new_tokens: list[int] = self.tokenizer.convert_tokens_to_ids(list(config.tokens.add_tokens))
        if config.lora_kind.use_dora:
            require_readable(config.model.quantize, "--use-dora")
        if adapter is not None:
            if adapter.config.get("use_dora"):
                require_readable(config.model.quantize, f"the DoRA adapter {adapter.folder}")
            _refuse_other_lora(adapter, config)
            _refuse_untrained_tokens(adapter, weights, config, self.new_tokens)
        begun_on = self.state.engine if checkpoint is not None else None
        self.state.engine = _engine(config, weights.config, adapter, begun_with, self.device, begun_on, report)
        if config.model.cache_quantized and config.model.quantize == "int8" and self.state.engine == "standard":
            raise UsageError(
                "--cache-quantized: found --quantize int8 with the standard engine, need the fast one or another kind",
                "leave it out: what bitsandbytes' LLM.int8 makes of a base isn't kept",
            )
        self.loss_tokens = loss_tokens(self.state.engine, int(weights.config.get("vocab_size") or 1))
        self.batch_size, self.plan = self._plan(weights, dtype)
        self.model = self._make_model(weights, adapter, dtype, goes_on=checkpoint is not None)
        if blocks.template is not None:
            self.tokenizer.chat_template = blocks.template  # whoever talks with the adapter asks as it was trained
        make_ready(self.model, dtype, checkpointing=config.batch.gradient_checkpointing)
        self.names = trained_names(self.model)
        if world.parallel == "fsdp":
            world.shard(self.model, decoder_layers(self.model))
        if self.state.engine == "fast":
            make_fast(self.model, config.model.quantize)
        if config.batch.torch_compile:
            compile_layers(self.model)
        self.parameters = trained_parameters(self.model, self.names)
        self.scaled, self.autocast = dtype is torch.float16, autocast(self.device, dtype)
        self.optimizer = make_optimizer(config, self.parameters)
        if pages_nothing(config, self.parameters):
            report(Notice("--optimizer: found no matrix of 100,000 numbers or more, so nothing will be paged"))
        adapter_bytes = sum(parameter.numel() * 4 for parameter in self.parameters.values())
        needed_bytes = 3 * adapter_bytes * (config.saving.keep_checkpoints + 2) - self.checkpoints.size_bytes
        disk.require_free_bytes(folder, max(needed_bytes, 2 * 3 * adapter_bytes))
        if checkpoint is not None:
            self._load(checkpoint)
        self.state.batch_size = self.batch_size
        self.resumed_from = self.state.step
        self._files: dict[str, disk.AppendedFile] = {}
        self._tracker: Tracker | None = None
        self._saved_at = time.monotonic()

    # What it begins with

    def _require_usable(self) -> None:
        """Raises UsageError with all settings that can't be followed here, before anything is loaded."""
        config, problems = self.config, []
        kind = config.optimizer_kind.optimizer
        if kind.startswith("paged") and self.device.type != "cuda":
            problems.append(f"optimizer: found {kind} without a GPU, need {kind.removeprefix('paged_')}")
        if self.world.parallel == "fsdp" and kind not in ("adamw", "sgd"):
            problems.append(
                f"optimizer: found {kind} with --parallel fsdp, need adamw or sgd: others don't know shards"
            )
        if config.evaluation.eval_steps is not None and not len(self.held_out):
            problems.append(
                f"eval_steps: found no held-out blocks in {self.blocks.path}, need some: "
                "`lorakit prepare --validation-split 0.05`, or leave out --eval-steps"
            )
        if len(self.blocks) < self.world.size:
            problems.append(f"found {self.world.size} processes for {len(self.blocks)} blocks, need at most as many")
        if config.saving.track is not None:
            require_tracker(config.saving.track)
        if problems:
            raise UsageError("\n".join(problems), "change these settings, or the machine")

    def _plan(self, weights: Weights, dtype: torch.dtype) -> tuple[int, Plan | None]:
        """The blocks of a micro-step, and what the run is going to take; None where that can't be planned."""
        config, path = self.config, self.config.devices.plan
        asked, each = config.batch.batch_size, self.schedule.blocks_per_step // self.world.size
        kind = config.lora_kind
        uncounted = {
            "use_dora": kind.use_dora,
            "modules_to_save": kind.modules_to_save,
            "adapter": kind.adapter,
            "add_tokens": config.tokens.add_tokens,
        }
        try:
            for name in (name for name, value in uncounted.items() if value):
                raise InputRefused(f"found {option_name(name)}, whose memory isn't planned", "leave it out")
            shape = shape_for(config.model.model, weights.config)
        except InputRefused as error:
            if path is not None or asked == "auto" or config.devices.parallel == "split":
                raise
            self.report(Notice(f"memory isn't planned: {error.message}"))
            return int(asked), None
        on_gpu = self.device.type == "cuda"
        work = Workload.of(
            config,
            dtype_name(dtype),
            self.blocks.size,
            1 if asked == "auto" else asked,
            accumulates=asked == "auto" or each > asked,
            on_gpu=on_gpu,
            engine=self.state.engine,
        )
        work = replace(work, loss_tokens=self.loss_tokens)
        parallel: Literal["ddp", "fsdp", "split"] = self.world.parallel or "split"
        budgets = self._budgets(on_gpu, everything=path is not None or config.devices.parallel == "split")
        batch_size = largest_batch(shape, work, budgets, parallel, each) if asked == "auto" else asked
        if asked == "auto":
            # a run that goes on keeps what it began with: other micro-steps round otherwise, and drop out otherwise
            begun_with = min(self.state.batch_size, each)
            before = f", {begun_with} before" if begun_with > batch_size else ""
            batch_size = min(batch_size, begun_with or batch_size)
            self.report(Notice(f"batch size: {batch_size} of {each} blocks at once{before}"))
            work = replace(work, batch_size=batch_size, accumulates=each > batch_size)
        return batch_size, plan_run(shape, work, budgets, path, parallel)

    def _budgets(self, on_gpu: bool, *, everything: bool) -> Budgets:
        """What is free on each device that the run may use; in a parallel run the least of all, for every process has
        to plan alike."""
        if not on_gpu:
            return {"cpu": min(self.world.gather(free_ram_bytes())) // self.world.size}
        if self.world.size > 1:
            free = torch.cuda.mem_get_info(self.device)[0] + CONTEXT_BYTES
            return dict.fromkeys(range(self.world.size), min(self.world.gather(free)))
        # what is asked has its context by then, which the plan counts
        asked = range(torch.cuda.device_count()) if everything else (torch.cuda.current_device(),)
        gpus: Budgets = {number: torch.cuda.mem_get_info(number)[0] + CONTEXT_BYTES for number in asked}
        # the CPU's is for layers that a plan offloads
        return {**gpus, "cpu": free_ram_bytes()} if self.config.devices.plan is not None else gpus

    def _make_model(self, weights: Weights, adapter: Adapter | None, dtype: torch.dtype, *, goes_on: bool) -> PeftModel:
        """The base with its attention, and LoRA on it."""
        config, world = self.config, self.world
        followed = self.plan if config.devices.plan is not None or config.devices.parallel == "split" else None
        calibration = self._calibration(followed, goes_on=goes_on)

        def ready(base: PreTrainedModel) -> None:
            rows = base.get_input_embeddings().weight.shape[0]
            grow(base, max((token + 1 for token in self.new_tokens), default=0))
            if adapter is not None:
                grow(base, adapter.vocabulary or 0)
            self.is_longer = base.get_input_embeddings().weight.shape[0] > rows
            for part in (self.blocks, self.held_out):
                require_vocabulary(base, part.largest_id(), self.blocks.path)
                require_positions(base, part, self.report)

        keeps = config.model.cache_quantized
        cache = QuantizedCache(config, weights.fingerprint, world.gather, self.report) if keeps else None
        base = load_base(
            weights,
            dtype,
            torch.device("cpu") if world.parallel == "fsdp" else self.device,
            config.model.quantize,
            *((followed.device_map, followed.computed_on) if followed is not None else ()),
            double_quantization=config.model.double_quantization,
            int8_threshold=config.model.int8_threshold,
            fast=self.state.engine == "fast",
            sharded=world.parallel == "fsdp",
            calibration=calibration,
            ready=ready,
            cache=cache,
            report=self.report,
        )
        where = " (from the cache)" if cache is not None and cache.was_found else ""
        if calibration is not None:
            _require_alike(self.world.gather(calibration.exceptions))
            exceptions = artifacts.fingerprint(calibration.exceptions) if calibration.exceptions else ""
            if goes_on and exceptions != self.state.not_calibrated:
                raise Mismatch(
                    f"found {len(calibration.exceptions)} matrices that can't be calibrated, need those that couldn't "
                    "be when the run began: this is another base",
                    "go on where as much memory is free as then, or begin anew with --overwrite",
                )
            self.state.calibrated, self.state.not_calibrated = calibration.changes, exceptions
            if self.device.type == "cuda":  # what it took is free again, and no part of a step's peak
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            self.report(Notice(calibration.told(config.model.quantize, dtype_name(dtype)) + where))
        elif where:
            self.report(Notice(f"base in {config.model.quantize}{where}"))
        self.state.attention = _attention(base, config, self.state.attention, self.report)
        self.report(Notice(f"attention: {self.state.attention}"))
        if self.plan is not None:
            on_gpu = self.device.type == "cuda"
            self.plan = with_attention(self.plan, attention_kind(self.state.attention, on_gpu=on_gpu))
            _say_what_wont_fit(self.plan, self.report)
        if adapter is not None:
            return continue_lora(base, adapter, config.model.model)
        if stacks(base):
            self.report(Notice("LoRA is on linear layers: experts, which are stacks of matrices, get none"))
        return add_lora(base, config.lora, config.batch.seed, config.model.model, config.lora_kind, self.new_tokens)

    def _calibration(self, followed: Plan | None, *, goes_on: bool) -> Calibration | None:
        """What a quantized base is rounded by, and measured on: the first of the blocks. None where it doesn't lie on
        one device. A run that goes on keeps the rounding that it began with. Raises Mismatch where it can't."""
        kind = self.config.model.quantize
        if kind == "none":
            return None
        compensates = self.state.calibrated if goes_on else self.config.model.calibrate and kind in CALIBRATED
        places = set((followed.device_map or {}).values()) if followed is not None else set()
        apart = followed is not None and (followed.computed_on or len(places) > 1)
        if self.world.parallel == "fsdp" or apart:
            if goes_on and compensates:
                raise Mismatch(
                    "found the base on several devices, need it on one: the run began with a calibrated one",
                    "go on without --parallel fsdp or split and --plan, or begin anew with --overwrite",
                )
            if compensates:
                self.report(Notice(f"base in {kind}, rounded to the nearest: calibration needs it on one device"))
            return None
        return calibration_on(self.blocks, compensates=compensates)

    def _load(self, checkpoint: Artifact) -> None:
        tensors, states, self.state = read(checkpoint)
        made_for = {name: checkpoint.config.get(name) for name in EXTENDS}
        if made_for != {name: self.config.flat()[name] for name in EXTENDS}:  # --extend, for the first time
            self.state.stopped_early, self.state.evaluations_without_better = False, 0
        try:
            load_states(self.optimizer, self.parameters, states)
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    put(tensors[name], parameter)
            self.learning_rate.remember(self.state.learning_rate)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise ArtifactDamaged(
                f"{checkpoint.path}: found {first_line(error)}, need the adapter and the states of this run",
                "remove this checkpoint: the same command goes on from the one before it, or begins anew",
            ) from None
        self.report(Notice(f"goes on after step {self.state.step} of {self.schedule.steps}"))

    # The loop

    @property
    def is_done(self) -> bool:
        return self.state.step >= self.schedule.steps or self.state.stopped_early

    def go(self, should_stop: ShouldStop) -> dict[str, Any]:
        """Train to the end and put the adapter into the run folder; returns the facts of the run."""
        if self.world.is_first:
            disk.make_folder(self.folder / CHECKPOINTS)
            self.checkpoints.remove_oldest(self.state.best_step)  # which a killed run may not have come to
            for name in (METRICS, SAMPLES):
                cut_back(self.folder / name, self.state.step)
            names = (METRICS, SAMPLES) if self.prompts else (METRICS,)
            self._files = {name: disk.AppendedFile(self.folder / name) for name in names}
            if (tracker := self.config.saving.track) is not None:
                place, settings = self.folder / TRACKING, self.config.flat()
                self._tracker = open_tracker(
                    tracker, self.folder.name, place, settings, self.report, after_step=self.state.step
                )
        try:
            if self.state.step == 0 and self.config.evaluation.eval_steps is not None:
                self._evaluate()
            while not self.is_done:
                self._one_step(should_stop)
        except (MemoryError, RuntimeError) as error:
            raise self._understood(error) from None
        finally:
            for file in self._files.values():
                file.close()
            if self._tracker is not None:
                self._tracker.finish()
        return self._finish()

    def _one_step(self, should_stop: ShouldStop) -> None:
        """A step, and what is due after it: a line of metrics, an evaluation, a checkpoint, a stop."""
        config, state = self.config, self.state
        line = self._step()
        step, last = state.step, state.step == self.schedule.steps
        if step % config.saving.logging_steps == 0 or last:
            self._append(METRICS, line)
        self.report(Progress("training", step, self.schedule.steps, "steps", _live(line)))
        every = config.evaluation.eval_steps
        better = self._evaluate() if every is not None and (step % every == 0 or last) else False
        waited = (time.monotonic() - self._saved_at) / 60
        told = self.world.gather({"stop": None if self.is_done else should_stop(), "waited": waited})
        stop = next((one["stop"] for one in told if one["stop"]), None)
        late = config.saving.save_minutes is not None and told[0]["waited"] >= config.saving.save_minutes
        if step % config.saving.save_steps == 0 or self.is_done or stop or better or late:
            self._save()
        if stop:
            error = Stopped(
                f"{self.folder}: stopped after step {step} of {self.schedule.steps}, which is saved",
                "run the same command again: it goes on from there",
                interrupted=stop == "interrupt",
            )
            raise _shared(error)

    def _step(self) -> dict[str, Any]:
        """One optimizer step; returns its line of metrics. Raises NonFinite, after which nothing may be kept.

        Figures are read from the device once, when all that it has to do is launched.
        """
        started = time.monotonic()
        state, size, world = self.state, self.batch_size, self.world
        indices = self.schedule.blocks_of_step(state.step)
        batches = [self.blocks.batch(indices[at : at + size]) for at in range(0, len(indices), size)]
        trained_tokens = max(sum(batch.trained_tokens for batch in batches), 1)
        rate = self.learning_rate.at(state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            scale = state.loss_scale if self.scaled else 1.0
            losses = self._backward(batches, scale / trained_tokens)
            world.sum_gradients(self.parameters.values())
            if self.scaled:
                for parameter in self.parameters.values():
                    if parameter.grad is not None:
                        parameter.grad.mul_(1 / scale)
            clipped = clip_gradients(self.parameters.values(), self.config.optimizer.max_grad_norm)
            if not self.scaled:
                self.optimizer.step()
            total = sum(world.gather(sum(loss.item() / trained_tokens for loss in losses)))
            norm = clipped.item()
            if math.isfinite(total) and math.isfinite(norm):
                break
            if not (self.scaled and math.isfinite(total) and scale > _SMALLEST_LOSS_SCALE):
                place = f"blocks {', '.join(map(str, indices[:8]))}{' …' if len(indices) > 8 else ''}"
                raise self._not_finite(
                    f"loss {total} and gradient norm {norm} ({place})",
                    state.step + 1,
                    of_base=state.step == 0 and not math.isfinite(total),
                )
            state.loss_scale, state.loss_scale_age = scale / 2, 0  # fp16 overflowed: the same step with a smaller scale
        if self.scaled:
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
            "epoch": round(self.schedule.epoch_after(state.step), 6),
            "loss": total,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens_per_second": tokens / seconds,
            "peak_bytes": peak_bytes(self.device),
        }

    def _backward(self, batches: Sequence[Batch], factor: float) -> list[Tensor]:
        """This process's share of the micro-steps, forward and backward; returns the loss of each, summed over its
        trained tokens.

        Each micro-step is seeded by its place in the step, so that dropout doesn't depend on who computes it. Shards
        are fetched by all processes together: one that has no batch left computes another's for nothing.
        """
        world, losses = self.world, []
        for turn in range(0, len(batches), world.size):
            mine = turn + world.rank
            if mine >= len(batches) and world.parallel != "fsdp":
                continue
            batch, share = (batches[mine], factor) if mine < len(batches) else (batches[turn], 0.0)
            torch.manual_seed(seed_of(self.config.batch.seed, self.state.step, mine))
            with self.autocast:
                loss = loss_sum(self.model, batch, self.loss_tokens)
            if share:
                losses.append(loss.detach())
            (loss * (share * world.mean_over)).backward()
        return losses

    def _not_finite(self, found: str, step: int | None = None, *, of_base: bool = False) -> LorakitError:
        step = self.state.step if step is None else step
        if of_base and self.config.lora_kind.adapter is None:  # LoRA begins as nothing at all
            return _shared(base_gives_no_numbers(f"step {step}: found {found}", self.state.dtype))
        error = NonFinite(
            f"step {step}: found {found}, need numbers",
            f"lower --learning-rate, or try --dtype fp32; nothing after step {self.checkpoints.last_saved()} was kept",
        )
        return _shared(error)

    def _understood(self, error: Exception) -> Exception:
        """What a failure in the loop means."""
        if is_out_of_memory(error):
            return OutOfMemory(
                f"step {self.state.step + 1}: found {first_line(error)}, need more memory",
                "lower --batch-size (--effective-batch-size keeps what is learned) or --block-size, or keep "
                "--gradient-checkpointing on; the same command goes on from the last checkpoint",
            )
        if self.world.size > 1 and isinstance(error, RuntimeError):
            return RankFailed(
                f"rank {self.world.rank}, step {self.state.step + 1}: found {first_line(error)}, need all processes",
                "look for the first error above; the same command goes on from the last checkpoint",
            )
        return error

    # Evaluation

    def _evaluate(self) -> bool:
        """The loss over the held-out blocks, and answers to the prompts; returns whether it is the best so far."""
        state = self.state
        self.model.eval()
        try:
            with self.autocast:
                loss, tokens = mean_loss(
                    self.model, self.held_out, self.batch_size, self.report, "evaluating", self.world
                )
            answers = self._answers()
        finally:
            self.model.train()
        if not math.isfinite(loss):
            raise self._not_finite(f"a held-out loss of {loss}", of_base=state.step == 0)
        line = {"step": state.step, "eval_loss": loss, "eval_perplexity": perplexity(loss), "eval_tokens": tokens}
        self._append(METRICS, line)
        for one in answers:
            self._append(SAMPLES, {"step": state.step, **one})
        self.report(Notice(f"step {state.step}: held-out loss {loss:.4f}"))
        if state.step == 0:
            return False
        self.learning_rate.hear(loss)
        state.learning_rate = self.learning_rate.memory
        better = state.best_loss is None or loss < state.best_loss
        if better:
            state.best_loss, state.best_step, state.evaluations_without_better = loss, state.step, 0
        else:
            state.evaluations_without_better += 1
        patience = self.config.evaluation.early_stopping_patience
        state.stopped_early = patience is not None and state.evaluations_without_better >= patience
        return better

    def _answers(self) -> list[dict[str, str]]:
        """What the model answers to each prompt, as it is now. Attention by lengths knows no cache: sdpa does it."""
        if not self.prompts:
            return []
        whole_model = self.model.get_base_model()
        opened = Opened(self.model, self.tokenizer, None)
        sampling = SamplingSection(max_new_tokens=_SAMPLE_TOKENS)
        used = whole_model.config._attn_implementation
        set_implementation(whole_model, "sdpa")
        try:
            with self.autocast:
                return [
                    {
                        "prompt": messages[-1]["content"],
                        "answer": answer(opened, messages, sampling, lambda _: None).answer,
                    }
                    for messages in self.prompts
                ]
        finally:
            set_implementation(whole_model, used)

    # What it leaves

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        if self.world.is_first:
            self._files[name].append(json.dumps(line))
            if self._tracker is not None and name == METRICS:
                self._tracker.log(line, line["step"])

    def _save(self) -> None:
        """Commit a checkpoint: gathered by all, written by the first, believed when all heard that it was written."""
        tensors, gathers = self._tensors(), self.world.is_first or self.world.parallel == "fsdp"
        states = states_of(self.optimizer, self.parameters) if gathers else {}
        with self.world.together():
            if self.world.is_first:
                for file in self._files.values():
                    file.sync()
                self.checkpoints.save(self._adapter_files(tensors), states, self.state)
                self.checkpoints.remove_oldest(self.state.best_step)
        self._saved_at = time.monotonic()

    def _finish(self) -> dict[str, Any]:
        """Put the adapter beside the checkpoints: the run folder becomes an artifact."""
        state = self.state
        best = self.config.evaluation.load_best_model_at_end and state.best_step
        tensors = self._tensors()
        if best:
            try:
                tensors = self.checkpoints.adapter_of(state.best_step)
            except (ArtifactDamaged, InputRefused) as error:
                self.report(Notice(f"the adapter is that of the last step, not of the best: {error.message}"))
                best = 0
        facts: dict[str, Any] = {
            "steps": state.step,
            "first_loss": state.first_loss,
            "last_loss": state.last_loss,
            "tokens_per_second": state.tokens / max(state.seconds, 1e-9),
            "peak_bytes": max(self.world.gather(peak_bytes(self.device))),
            "planned_bytes": self.plan.allocated_bytes if self.plan is not None else None,
            "seconds": state.seconds,
            "resumed_from": self.resumed_from,
            "attention": state.attention,
            "engine": state.engine,
            "dtype": state.dtype,
            "calibrated": state.calibrated,
            "best_step": state.best_step or None,
            "eval_loss": state.best_loss,
            "adapter_step": state.best_step if best else state.step,
        }
        with self.world.together():
            if self.world.is_first:
                files = {
                    **self._adapter_files({**tensors, **(longer_embeddings(self.model) if self.is_longer else {})}),
                    **tokenizer_files(self.tokenizer),
                    "README.md": _model_card(
                        self.config, self.model.peft_config["default"], facts, self.blocks
                    ).encode(),
                    "report.html": self._report_page(facts),
                }
                kept = [name for name in (METRICS, SAMPLES) if (self.folder / name).exists()]
                artifacts.commit(
                    self.folder,
                    "adapter",
                    files.items(),
                    config=self.config,
                    parents=self.parents,
                    facts=facts,
                    keep=kept,
                )
        return facts

    def _report_page(self, facts: Mapping[str, Any]) -> bytes:
        metrics, samples = (read_metrics(self.folder / name) for name in (METRICS, SAMPLES))
        loads = self.plan.loads if self.plan is not None else ()
        planned = {load.name: load.bytes._asdict() for load in loads} or None
        return report_page(self.config, facts, metrics, samples, self.data, planned, self.folder)

    def _tensors(self) -> dict[str, Tensor]:
        """What is trained, whole and on the CPU. Raises NonFinite, in all processes, where an update left what is no
        number in one of them."""
        tensors = {name: whole(parameter) for name, parameter in self.parameters.items()}
        bad = next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)
        for rank, name in enumerate(self.world.gather(bad)):
            if name is not None:
                where = f" in rank {rank}" if self.world.size > 1 else ""
                raise self._not_finite(f"{name} with NaN or infinity{where}")
        return tensors

    def _adapter_files(self, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
        """The adapter as PEFT writes it: what is tied twice."""
        first = {self.names[name]: name for name in tensors if name in self.names}
        tied = {name: first[inner] for name, inner in self.names.items() if name not in tensors}
        every = {**tensors, **{name: tensors[other].clone() for name, other in tied.items()}}
        return {
            adapters.WEIGHTS: safetensors.torch.save(every, metadata={"format": "pt"}),
            adapters.CONFIG: _adapter_config(self.model),
        }


def schedule_of(config: TrainConfig, blocks: Blocks, checkpoint: Artifact | None) -> Schedule:
    """Which blocks each step of a run takes, from a checkpoint on."""
    batch, per_step = config.batch, config.blocks_per_step
    facts = checkpoint.facts if checkpoint is not None else {"step": 0, "tokens": 0}
    step, taken = facts["step"], facts["tokens"] // blocks.size
    wanted = max(1, round(batch.epochs * len(blocks)))
    if batch.max_steps:
        wanted = taken + (batch.max_steps - step) * per_step
    return Schedule(len(blocks), per_step, wanted, batch.seed, step, taken)


def _attention(base: Any, config: TrainConfig, begun_with: str, report: Report) -> str:
    """Give the base its implementation of attention: a run that goes on keeps the one that it began with."""
    if not begun_with:
        return apply(base, config.model.attention, report)
    try:
        return apply(base, begun_with, report)
    except InputRefused as error:
        raise Mismatch(
            f"{error.message}: the run began with it", "go on where it can run, or begin anew with --overwrite"
        ) from None


def _engine(
    config: TrainConfig,
    model: Mapping[str, Any],
    adapter: Adapter | None,
    dtype: str,
    device: torch.device,
    begun_on: Engine | None,
    report: Report,
) -> Engine:
    """What computes the decoder layers; a run that goes on keeps what it began with. Raises EnvironmentUnusable where
    that, or what is asked for, can't be had here."""
    asked, devices, quantize = config.model.engine, config.devices, config.model.quantize
    needed = engines.ON_REQUEST if asked == "fast" else {}
    if quantize == "fp8":
        needed = {**needed, "--quantize fp8": "change that, or choose another --quantize"}
    if begun_on == "fast":
        hint = "go on where it can be had, or begin anew with --overwrite"
        needed = {**needed, "the fast engine, which the run began with": hint}

    def lacks() -> str | None:
        lora = ({**config.lora.model_dump(), **config.lora_kind.model_dump()}, adapter.config if adapter else {})
        layout, threshold = "--plan" if devices.plan is not None else None, config.model.int8_threshold
        reason = engines.lacking(
            model, dtype, *lora, parallel=devices.parallel, layout=layout, int8_threshold=threshold
        )
        return reason or engines.lacking_on(device, quantize)

    return engines.choose(begun_on if begun_on == "standard" else asked, needed, lacks, device, report)


def calibration_on(blocks: Blocks, *, compensates: bool) -> Calibration:
    """A base's calibration on the first of the blocks, or on the beginning of one long block."""
    found = blocks.batch(range(min(len(blocks), -(-CALIBRATION_TOKENS // blocks.size))))
    most = slice(CALIBRATION_TOKENS)
    batch = Batch(found.ids_BT[:, most], found.positions_BT[:, most], found.trained_BT[:, most])

    def loss_of(model: Any) -> float:
        with torch.no_grad():
            return loss_sum(model, batch).item() / max(batch.trained_tokens, 1)

    return Calibration(loss_of, compensates, batch.fingerprint)


def _require_alike(found: Sequence[Sequence[str]]) -> None:
    """Raises EnvironmentUnusable where ranks have rounded other matrices: their gradients would be of other bases."""
    if any(names != found[0] for names in found):
        raise EnvironmentUnusable(
            f"ranks: found {', '.join(str(len(names)) for names in found)} matrices that couldn't be calibrated, need "
            "the same on each: gradients over one base",
            "free memory on all GPUs alike, or --no-calibrate",
        )


def _refuse_other_lora(adapter: Adapter, config: TrainConfig) -> None:
    """Raises UsageError where settings beside --adapter say otherwise than the adapter itself."""
    usual = type(config).resolve((None, {"model": config.model.model, "blocks": config.data.blocks}))
    given = {**config.lora.model_dump(), **config.lora_kind.model_dump(exclude={"adapter"})}
    default = {**usual.lora.model_dump(), **usual.lora_kind.model_dump(exclude={"adapter"})}
    changed = [option_name(line.partition(":")[0]) for line in differences(given, default)]
    if changed:
        raise UsageError(
            f"found {', '.join(changed)} beside --adapter, need them as {adapter.folder} has them", "leave them out"
        )


def _refuse_untrained_tokens(adapter: Adapter, weights: Weights, config: TrainConfig, new_tokens: list[int]) -> None:
    """Raises UsageError where an adapter would learn nothing of --add-tokens, Mismatch where it isn't the base's."""
    ids = adapters.unlearned(adapters.match(adapter, weights), weights, new_tokens)
    names = [name for name, token in zip(config.tokens.add_tokens, new_tokens, strict=True) if token in ids]
    if names:
        raise UsageError(
            f"--add-tokens: found {', '.join(names)}, which {adapter.folder} has no rows for and wouldn't learn; need "
            "tokens that it was made with",
            "begin without --adapter; or `lorakit merge` it, and give the merged model as --model",
        )


def _read_prompts(path: Path | None) -> list[list[dict[str, str]]]:
    """Conversations to be answered: a line each, of text, or JSON with `prompt` or `messages`. Raises InputRefused."""
    if path is None:
        return []
    hint = 'a line each: plain text, {"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}'
    try:
        # a line ends with a newline alone: splitlines would cut strings at U+2028, which JSON may hold as it is
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        if not lines:
            raise ValueError("no line at all")
        return [_conversation(parse_json(line.encode()) if line.lstrip().startswith("{") else line) for line in lines]
    except OSError as error:
        raise InputRefused(f"{path}: found {error.strerror}, need a file of prompts", hint) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputRefused(
            f"{path}: found a line that is no prompt ({first_line(error)}), need prompts", hint
        ) from None


def _conversation(row: Any) -> list[dict[str, str]]:
    messages = row["messages"] if isinstance(row, dict) and "messages" in row else None
    if messages is None:
        text = row["prompt"] if isinstance(row, dict) else row
        messages = [{"role": "user", "content": text}]
    found = [{"role": message["role"], "content": message["content"]} for message in messages]
    if not found or not all(isinstance(value, str) for message in found for value in message.values()):
        raise ValueError("no text")
    return found


def _shared(error: LorakitError) -> LorakitError:
    """An error that every process of a run raises alike, so that one of them speaks."""
    error.shared = error.heard = True
    return error


def _live(line: Mapping[str, Any]) -> str:
    """A step's line of metrics, short."""
    return (
        f"loss {line['loss']:.4f}, epoch {line['epoch']:.2f}, lr {line['learning_rate']:.1e}, "
        f"{line['tokens_per_second']:,.0f} tokens/s, {line['peak_bytes'] / 2**30:.2f} GiB"
    )


def _say_what_wont_fit(plan: Plan, report: Report) -> None:
    if not plan.fits:
        load = max(plan.loads, key=lambda load: load.share)
        needs = f"planned {load.bytes.total / 2**30:.1f} GiB on {load.name}, found {load.budget_bytes / 2**30:.1f} free"
        report(Notice(f"{needs}: this run will likely run out of memory; `lorakit plan-devices` helps"))


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process took: on the fullest GPU, or of the process."""
    if device.type == "cuda":
        return max(torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count()))
    import resource

    # kilobytes on Linux, bytes on macOS: getrusage(2) of each
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cut_back(path: Path, step: int) -> None:
    """Keep the lines of a JSONL file up to `step`: what came after the checkpoint will be written again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if step == 0 or json.loads(line)["step"] > step:  # step 0 is evaluated anew
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line if line.endswith(b"\n") else line + b"\n")
    content = b"".join(kept)
    if content != path.read_bytes():
        disk.write_file(path, content)


def _adapter_config(model: PeftModel) -> bytes:
    config = {**model.peft_config["default"].to_dict(), "inference_mode": True}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return (json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n").encode()


def _model_card(config: TrainConfig, lora: Any, facts: Mapping[str, Any], blocks: Blocks) -> str:
    base = config.model.model
    base_line = f"base_model: {base}\n" if not Path(base).exists() else ""
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(sorted(lora.target_modules))
    precision = "full precision" if config.model.quantize == "none" else config.model.quantize
    held_out = f", held-out loss {facts['eval_loss']:.4f}" if facts["eval_loss"] is not None else ""
    return f"""---
library_name: peft
{base_line}tags: [lora, lorakit]
---
# LoRA adapter for {Path(base).name}

Made by lorakit {__version__}: rank {lora.r}, alpha {lora.lora_alpha:g}, targets {targets}, base in {precision}; \
{facts["steps"]} steps, training loss {facts["first_loss"]:.4f} → {facts["last_loss"]:.4f}{held_out}. \
Data: blocks {blocks.fingerprint[:16]}. \
`lorakit.yaml` holds every setting; `lorakit train --config lorakit.yaml` repeats the run.

```python
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("this folder")
```
"""
