"""lorakit beside a plain loop: transformers and peft alone, one document after the other, the same blocks and A."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lorakit.core.blocks import Blocks
from lorakit.core.training import loop
from lorakit.core.training.schedule import Schedule
from tests.core.training.conftest import Opened

BLOCKS_PER_STEP, WARMUP, HIGHEST = 3, 5, 2e-3


def documents(blocks: Blocks, indices: Sequence[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Ids [1, T], labels [1, T] and how many tokens are trained, of each document of some blocks."""
    for index in indices:
        tokens, trained, document = (array.astype(np.int64) for array in blocks.arrays(index))
        for number in np.unique(document):
            ids = torch.from_numpy(tokens[document == number])[None]
            labels = torch.where(torch.from_numpy(trained[document == number])[None] == 1, ids, -100)
            if targets := int((labels[:, 1:] != -100).sum()):
                yield ids, labels, targets


def plain_losses(folder: Path, blocks: Blocks, first_a: dict[str, torch.Tensor], quantize: str) -> list[float]:
    """The losses of fifty steps."""
    how: dict[str, Any] = {}
    if quantize != "none":
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": quantize, "bnb_4bit_use_double_quant": True}
        kind = {"load_in_8bit": True} if quantize == "int8" else {**four, "bnb_4bit_compute_dtype": torch.float32}
        how = {"quantization_config": BitsAndBytesConfig(**kind), "device_map": {"": "cpu"}}
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora, autocast_adapter_dtype=False)
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_A" in name:
            parameter.data.copy_(first_a[name.replace(".default", "")])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=HIGHEST, weight_decay=0.0)
    losses = []
    for step in range(50):
        batch = list(documents(blocks, Schedule(len(blocks), BLOCKS_PER_STEP, 10**6, 0).blocks_of_step(step)))
        count = sum(targets for _, _, targets in batch)
        optimizer.zero_grad()
        total = 0.0
        for ids, labels, targets in batch:
            loss = model(input_ids=ids, labels=labels).loss * targets / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = HIGHEST * ((step + 1) / WARMUP if step < WARMUP else (50 - step) / (50 - WARMUP))
        optimizer.step()
        losses.append(total)
    return losses


@pytest.mark.parametrize("engine", ["standard", "fast"])
@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
def test_fifty_losses_are_those_of_a_plain_loop(
    quantize: str, engine: str, opened: Opened, tiny_llama: Path, uneven: Path
) -> None:
    run = opened(
        data=uneven,
        quantize=quantize,
        engine=engine,
        **({"calibrate": False} if quantize == "nf4" else {}),
        rank=8,
        lora_alpha=16,
        learning_rate=HIGHEST,
        warmup_ratio=WARMUP / 50,
        max_steps=50,
        batch_size=2,
        effective_batch_size=BLOCKS_PER_STEP + 1,
    )
    run.schedule = Schedule(len(run.blocks), BLOCKS_PER_STEP, 150, 0)  # micro-steps of two blocks and of one
    first_a = {name: tensor.detach().clone() for name, tensor in run.parameters.items() if "lora_A" in name}
    found = [run._step()["loss"] for _ in range(50)]
    assert found == pytest.approx(plain_losses(tiny_llama, Blocks(uneven), first_a, quantize), rel=1e-5)
    assert found[-1] < 0.95 * found[0]


# Gradients


def whole_gradients(run: loop.Run) -> tuple[list[torch.Tensor], float, int]:
    """The gradients of a run's first step by transformers' own logits of each document, its loss, and how many tokens
    are trained."""
    batch = list(documents(run.blocks, run.schedule.blocks_of_step(0)))
    count, total = sum(targets for _, _, targets in batch), torch.zeros((), dtype=torch.float64)
    for ids, labels, _ in batch:
        logits = run.model(input_ids=ids).logits
        total = total + torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
    return list(torch.autograd.grad(total / count, list(run.parameters.values()))), float(total.detach()) / count, count


@pytest.mark.parametrize("blocks_of_a_step", [8, 5, 1])
@pytest.mark.parametrize("batch_size", [8, 4, 2, 1])
def test_gradients_are_those_of_the_whole_step_however_it_is_cut(
    blocks_of_a_step: int, batch_size: int, opened: Opened, uneven: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp64, documents of unequal lengths, windows that micro-steps don't fill: one loss over all trained tokens,
    each document by itself."""
    run = opened(data=uneven, batch_size=batch_size, effective_batch_size=8, rank=4, gradient_checkpointing=False)
    run.model.double()
    run.schedule = Schedule(len(run.blocks), blocks_of_a_step, blocks_of_a_step, 0)
    with torch.no_grad():
        for number, parameter in enumerate(run.parameters.values()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) / 10)
    batch = list(documents(run.blocks, run.schedule.blocks_of_step(0)))
    assert blocks_of_a_step == 1 or len({ids.shape[1] for ids, _, _ in batch}) > 3
    expected, loss, _ = whole_gradients(run)
    found: list[torch.Tensor] = []

    def look(parameters: Any, _: float) -> torch.Tensor:
        found.extend(parameter.grad.clone() for parameter in parameters)
        return torch.ones(())

    monkeypatch.setattr(loop, "clip_gradients", look)
    line = run._step()
    assert line["loss"] == pytest.approx(loss, rel=1e-6)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-6
