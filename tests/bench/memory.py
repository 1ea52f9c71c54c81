"""Planned against measured memory: `python -m tests.bench.memory --output rows.jsonl` on a CUDA GPU.

Every row runs two steps of the very training step on a model of real shape with random weights, built on the GPU, and
compares the second one's peak with the plan. What the plan says doesn't fit is left out, what runs out of memory is
said. `--tiny` runs the same code on the CPU in seconds, with live tensors counted instead of the allocator asked.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np

from lorakit.core.environment import let_gpu_memory_grow

let_gpu_memory_grow()  # before torch asks

import torch  # noqa: E402

from lorakit.core.attention import apply  # noqa: E402
from lorakit.core.blocks import Batch  # noqa: E402
from lorakit.core.config import TrainConfig  # noqa: E402
from lorakit.core.fast.engine import make_fast  # noqa: E402
from lorakit.core.memory import Bytes, Part, StepMemory, Workload, loss_tokens  # noqa: E402
from lorakit.core.model import (  # noqa: E402
    add_lora,
    autocast,
    make_ready,
    trained_names,
    trained_parameters,
)
from lorakit.core.offloading import offload, offloaded  # noqa: E402
from lorakit.core.parallel import alone  # noqa: E402
from lorakit.core.quantization import Quantizing, quantized  # noqa: E402
from lorakit.core.shapes import Shape, config_of, shape_of  # noqa: E402
from lorakit.core.training import loop  # noqa: E402
from lorakit.core.training.checkpoints import State  # noqa: E402
from lorakit.core.training.optimizers import LearningRate, make_optimizer  # noqa: E402
from lorakit.core.training.schedule import Schedule  # noqa: E402
from tests.live import LiveBytes  # noqa: E402


class Row(NamedTuple):
    """One configuration. `layers`: fewer than the model has, for long blocks; 0: all. `full`: all logits at once.
    `offloaded`: so many of the first layers lie in CPU memory. `engine`: as train's option, but auto."""

    model: str
    quantize: str
    block: int
    batch: int
    checkpointing: bool
    full: bool
    rank: int
    layers: int = 0
    offloaded: int = 0
    optimizer: str = "adamw"
    engine: str = "standard"


ROWS = [
    Row("llama-2-7b", "none", 512, 1, True, False, 16),
    Row("llama-2-7b", "none", 512, 1, True, False, 256),
    Row("llama-2-7b", "none", 2048, 1, True, True, 64),
    Row("llama-2-7b", "none", 2048, 4, True, False, 16),
    Row("llama-2-7b", "none", 8192, 1, True, False, 8),
    Row("llama-2-7b", "none", 2048, 1, False, False, 16),
    Row("llama-2-7b", "none", 512, 8, False, True, 8),
    Row("llama-2-7b", "nf4", 512, 1, True, False, 64),
    Row("llama-2-7b", "nf4", 2048, 2, True, False, 16),
    Row("llama-2-7b", "nf4", 8192, 2, True, False, 8),
    Row("llama-2-7b", "nf4", 4096, 1, True, True, 256),
    Row("llama-2-7b", "nf4", 2048, 1, False, True, 64),
    Row("llama-2-7b", "nf4", 512, 8, False, False, 256),
    Row("llama-2-7b", "int8", 512, 2, True, False, 64),
    Row("llama-2-7b", "int8", 2048, 2, True, False, 16),
    Row("llama-2-7b", "int8", 512, 1, False, False, 8),
    Row("llama-2-7b", "int8", 2048, 1, False, True, 256),
    Row("llama-3.1-8b", "none", 512, 1, True, False, 16),
    Row("llama-3.1-8b", "none", 2048, 2, True, True, 8),
    Row("llama-3.1-8b", "none", 4096, 1, True, False, 64),
    Row("llama-3.1-8b", "none", 2048, 1, False, False, 256),
    Row("llama-3.1-8b", "nf4", 512, 1, True, False, 256),
    Row("llama-3.1-8b", "nf4", 2048, 2, True, False, 64),
    Row("llama-3.1-8b", "nf4", 8192, 1, True, True, 16),
    Row("llama-3.1-8b", "nf4", 2048, 1, False, False, 16),
    Row("llama-3.1-8b", "nf4", 512, 4, False, True, 8),
    Row("llama-3.1-8b", "int8", 512, 2, True, False, 8),
    Row("llama-3.1-8b", "int8", 2048, 1, True, True, 64),
    Row("llama-3.1-8b", "int8", 1024, 2, False, False, 16),
    Row("llama-2-7b", "none", 8192, 8, True, False, 16, 8),
    Row("llama-3.1-8b", "nf4", 8192, 2, False, False, 8, 8),
    Row("llama-3.1-8b", "nf4", 8192, 8, True, False, 64, 8),
    Row("llama-2-7b", "none", 2048, 1, True, False, 16, offloaded=16),
    Row("llama-2-7b", "none", 512, 1, True, False, 16, offloaded=32),
    Row("llama-2-7b", "nf4", 2048, 2, True, False, 16, offloaded=16),
    Row("llama-3.1-8b", "none", 4096, 1, True, False, 64, offloaded=20),
    Row("llama-3.1-8b", "nf4", 512, 1, True, False, 64, offloaded=32),
    Row("llama-2-7b", "nf4", 512, 1, True, False, 64, optimizer="adamw_8bit"),
    Row("llama-2-7b", "nf4", 512, 1, True, False, 256, optimizer="adamw_8bit"),
    Row("llama-2-7b", "nf4", 512, 1, True, False, 64, optimizer="lion_8bit"),
    Row("llama-2-7b", "nf4", 512, 1, True, False, 256, optimizer="lion_8bit"),
    Row("llama-2-7b", "nf4", 512, 1, True, False, 64, optimizer="paged_adamw_8bit"),
    Row("llama-2-7b", "nf4", 512, 1, True, False, 256, optimizer="paged_adamw_8bit"),
    Row("llama-2-7b", "nf4", 512, 1, True, False, 256, optimizer="sgd"),
]
TINY_ROWS = [
    Row("tiny", "none", 64, 2, True, False, 8),
    Row("tiny", "none", 128, 1, False, True, 16),
    Row("tiny", "nf4", 64, 2, True, False, 8),
    Row("tiny", "int8", 64, 2, True, True, 8),
    Row("tiny", "none", 64, 2, True, False, 8, offloaded=2),
    Row("tiny", "nf4", 64, 2, True, False, 8, offloaded=3),
    Row("tiny", "nf4", 256, 4, True, False, 64, optimizer="adamw_8bit"),
    Row("tiny", "nf4", 256, 4, True, False, 64, optimizer="lion_8bit"),
    Row("tiny", "nf4", 256, 4, True, False, 64, optimizer="sgd"),
]
SPREAD = 0.005
TINY = {"model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def config_for(row: Row) -> dict[str, Any]:
    config = dict(TINY) if row.model == "tiny" else config_of(row.model)
    return {**config, "num_hidden_layers": row.layers or config["num_hidden_layers"]}


def workload(row: Row, device: torch.device) -> Workload:
    return Workload(
        dtype="bf16",
        quantize=row.quantize,  # type: ignore[arg-type]
        rank=row.rank,
        target_modules=("all-linear",),
        lora_dropout=0.0,
        block_size=row.block,
        batch_size=row.batch,
        accumulates=False,
        gradient_checkpointing=row.checkpointing,
        attention="varlen" if device.type == "cuda" else "sdpa",
        loss_tokens=10**9 if row.full else loss_tokens(row.engine, config_for(row)["vocab_size"]),  # type: ignore[arg-type]
        engine=row.engine,  # type: ignore[arg-type]
        optimizer=row.optimizer,  # type: ignore[arg-type]
    )


# The model


def random_base(row: Row, device: torch.device) -> Any:
    """A model of real shape as load_base gives it: frozen, quantized, in bf16, with random weights made in place. They
    are small, so that LLM.int8 finds no outliers, whose columns it would keep apart: real models have few."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in config_for(row).items() if key not in ("ids", "model_type")}
    config = AutoConfig.for_model(config_for(row)["model_type"], **fields)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            made = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            made = made.fill_(1) if made.dim() == 1 else made.normal_(0, SPREAD)
            setattr(module, key, torch.nn.Parameter(made, requires_grad=False))
        if isinstance(module, torch.nn.Linear) and module is not head and row.quantize != "none":
            parent, _, leaf = name.rpartition(".")
            by_rows = Quantizing.is_by_rows(row.quantize, fast=row.engine == "fast")
            made = quantized(module, Quantizing(row.quantize, torch.bfloat16, by_rows=by_rows))
            setattr(model.get_submodule(parent), leaf, made)
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.is_loaded_in_8bit = row.quantize == "int8" and row.engine == "standard"
    model.is_loaded_in_4bit = row.quantize in ("nf4", "fp4")
    model.requires_grad_(False)
    model.config.use_cache = False
    for layer in model.model.layers[: row.offloaded]:
        offload(layer, device)
    return model


# The step


class RandomBlocks:
    """Blocks of random tokens, two documents each, nearly all of them trained."""

    def __init__(self, row: Row, vocab_size: int) -> None:
        self.size, self._vocab_size = row.block, vocab_size

    def batch(self, indices: list[int]) -> Batch:
        ids = np.random.default_rng(indices[0]).integers(0, self._vocab_size, (len(indices), self.size))
        positions = np.tile(np.arange(self.size) % (self.size // 2), (len(indices), 1))
        return Batch(ids, positions, positions > 0)


def training_run(row: Row, base: Any, device: torch.device) -> loop.Run:
    """train's own run, ready to step, without its folder, its blocks and its checkpoints."""
    values = {"model": row.model, "blocks": "none", "quantize": row.quantize, "rank": row.rank, "dtype": "bf16"}
    values |= {"batch_size": row.batch, "gradient_checkpointing": row.checkpointing, "optimizer": row.optimizer}
    config = TrainConfig.resolve((None, values))
    run = loop.Run.__new__(loop.Run)
    run.config, run.world, run.device, run.state = config, alone(device), device, State()
    run.blocks = RandomBlocks(row, base.config.vocab_size)  # type: ignore[assignment]
    run.schedule, run.batch_size = Schedule(1000, row.batch, 1000, 0), row.batch
    run.loss_tokens = workload(row, device).loss_tokens
    run.model = add_lora(base, config.lora, 0, row.model, config.lora_kind)
    assert all(parameter.device.type == device.type for parameter in trained_parameters(run.model).values())
    assert bool(offloaded(base)) is bool(row.offloaded)
    make_ready(run.model, torch.bfloat16, checkpointing=row.checkpointing)
    if row.engine == "fast":
        make_fast(run.model, row.quantize)
    run.scaled, run.autocast = False, autocast(device, torch.bfloat16)
    run.names = trained_names(run.model)
    run.parameters = trained_parameters(run.model, run.names)
    run.optimizer = make_optimizer(config, run.parameters)
    run.learning_rate = LearningRate(config, run.schedule.steps)
    return run


def taken_back(run: Any) -> Any:
    """The base without what a run put on it."""
    base = run.model.unload()
    if run.config.batch.gradient_checkpointing:
        base.gradient_checkpointing_disable()
        base.disable_input_require_grads()
    return base


def measure(row: Row, base: Any, device: torch.device, shape: Shape) -> dict[str, int]:
    """The second step's peak, and what was there at other moments. On the CPU: planned weights and states + live."""
    cuda, found = device.type == "cuda", {}
    original = loop.loss_sum

    def allocated() -> int:
        return torch.cuda.memory_allocated() if cuda else 0

    def watched(model: Any, batch: Batch, chunk_tokens: int) -> torch.Tensor:
        loss = original(model, batch, chunk_tokens)
        found["forward_peak"] = torch.cuda.max_memory_allocated() if cuda else 0
        found["after_forward"] = allocated()
        return loss

    found["weights"] = allocated()
    run = training_run(row, base, device)
    found["with_lora"] = allocated()
    loop.loss_sum = watched  # type: ignore[assignment]
    try:
        run._step()
        run.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        found["between_steps"] = allocated()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with nullcontext() if cuda else LiveBytes() as counted:
            run._step()
        if cuda:
            torch.cuda.synchronize()
            found["peak"] = torch.cuda.max_memory_allocated()
            found["reserved"] = torch.cuda.max_memory_reserved()
            free, total = torch.cuda.mem_get_info()
            found["outside"] = total - free - torch.cuda.memory_reserved()
        else:
            planned = plan(row, shape, device)
            copies = planned.weights - resident_weights(row, shape, device)  # which are live tensors
            found["peak"] = planned.weights - copies + planned.lora + planned.optimizer + counted.peak  # type: ignore[union-attr]
    finally:
        loop.loss_sum = original
        taken_back(run)
        del run
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    return found


def plan(row: Row, shape: Shape, device: torch.device) -> Bytes:
    part = Part(0, shape.num_layers, True, True, True, row.offloaded)
    planned = StepMemory(shape, workload(row, device), offloads=row.offloaded > 0).peak(part)
    return planned if device.type == "cuda" else planned._replace(workspace=0)


def resident_weights(row: Row, shape: Shape, device: torch.device) -> int:
    """Those that stay on the device for the whole step."""
    memory, part = StepMemory(shape, workload(row, device)), Part(0, shape.num_layers, True, True, True, row.offloaded)
    return memory.peak(part._replace(offloaded=0)).weights - memory.moved_bytes(part)


def rows_in_turn(rows: list[Row], device: torch.device) -> Iterator[tuple[Row, Any, Shape]]:
    """Each row with its base; rows of one base follow each other, so that it is built once."""
    bases = list(dict.fromkeys((row.model, row.quantize, row.layers, row.offloaded) for row in rows))
    for key in bases:
        mine = [row for row in rows if (row.model, row.quantize, row.layers, row.offloaded) == key]
        base = random_base(mine[0], device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        for row in mine:
            if device.type == "cuda":
                apply(base, "varlen")
            yield row, base, shape_of(row.model, config_for(row))
        del base
        gc.collect()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--output", help="file for a JSON line a row")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of rows to run")
    parser.add_argument("--limit", type=float, default=390, help="start no row after so many seconds")
    given = parser.parse_args()
    device = torch.device("cpu" if given.tiny else "cuda")
    rows = TINY_ROWS if given.tiny else ROWS
    rows = [row for number, row in enumerate(rows) if not given.only or number in given.only]
    room = torch.cuda.mem_get_info()[0] if device.type == "cuda" else 2**40
    started, errors = time.monotonic(), []
    show(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'}")
    show(
        "model         base  block batch ck   loss  rank layers offloaded optimizer         planned  measured    error"
        "   seconds"
    )
    for row, base, shape in rows_in_turn(rows, device):
        at = time.monotonic()
        kind = f"{'yes' if row.checkpointing else 'no':<4} {'full' if row.full else 'chunk':<5}"
        name = f"{row.model:<13} {row.quantize:<5} {row.block:>5} {row.batch:>5} {kind} {row.rank:>4}"
        name += f" {shape.num_layers:>6} {row.offloaded:>9} {row.optimizer:<16}"
        planned = plan(row, shape, device)
        if at - started > given.limit or planned.total > room:
            why = "no room" if planned.total > room else "no time"
            show(f"{name}  {planned.allocated / 2**30:8.2f}  left out: {why}")
            continue
        try:
            found = measure(row, base, device, shape)
        except (RuntimeError, MemoryError) as error:
            show(f"{name}  {planned.allocated / 2**30:8.2f}  failed: {str(error).splitlines()[0][:90]}")
            continue
        share, seconds = planned.allocated / found["peak"] - 1, time.monotonic() - at
        errors.append(share)
        figures = f"{planned.allocated / 2**30:8.2f}  {found['peak'] / 2**30:8.2f}  {share:+7.2%}  {seconds:7.1f}"
        moments = {key: round(size / 2**20) for key, size in found.items()}
        causes = {key: round(size / 2**20) for key, size in planned._asdict().items()}
        show(f"{name}  {figures}  MiB measured {json.dumps(moments)} planned {json.dumps(causes)}")
        if given.output:
            facts = {**row._asdict(), "layers": shape.num_layers, "error": share, "seconds": seconds}
            with open(given.output, "a", encoding="utf-8") as file:
                file.write(json.dumps({**facts, "planned": planned._asdict(), "measured": found}) + "\n")
    if not errors:
        show("no row ran")
        return 1
    sizes = sorted(map(abs, errors))
    show(
        f"{len(sizes)} rows: largest error {sizes[-1]:.2%}, median {statistics.median(sizes):.2%}"
        if sizes
        else "no row ran"
    )
    return 0 if sizes and sizes[-1] <= 0.05 else 1


def show(line: str) -> None:
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
