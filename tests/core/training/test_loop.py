"""The training loop: what it computes, that it goes on exactly, and what it never does."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from lorakit.core.blocks import Blocks
from lorakit.core.evaluation import loss_sum
from lorakit.core.training import loop
from lorakit.core.training.schedule import Schedule
from tests.conftest import Ran, make_llama
from tests.core.training.conftest import Train, adapter_bytes, losses

Cli = Callable[..., Ran]


def test_the_loss_falls_and_the_result_says_so(train: Train, tmp_path: Path) -> None:
    ran = train("run", "--max-steps", 30)
    assert ran.code == 0
    assert ran.json["last_loss"] < 0.9 * ran.json["first_loss"]
    assert ran.json["steps"] == 30
    assert len(losses(tmp_path / "run")) == 30
    assert losses(tmp_path / "run")[-1] == ran.json["last_loss"]


def test_each_line_of_metrics_has_the_documented_keys(train: Train, tmp_path: Path) -> None:
    train("run", "--max-steps", 4, "--logging-steps", 3)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4]
    keys = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_bytes"}
    assert set(lines[0]) == keys


def test_the_first_loss_is_the_bases_own(train: Train, tiny_llama: Path, blocks: Path) -> None:
    """B begins at zero, so the first step sees the base: checked against transformers' own loss, block by block."""
    from transformers import AutoModelForCausalLM

    ran = train("run", "--max-steps", 1, "--batch-size", 3)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    opened = Blocks(blocks)
    total, count = 0.0, 0
    for index in Schedule(len(opened), 3, 3, 0).blocks_of_step(0):
        tokens, trained, document = (array.astype(np.int64) for array in opened.arrays(index))
        for number in np.unique(document):
            ids = torch.from_numpy(tokens[document == number])[None]
            labels = torch.where(torch.from_numpy(trained[document == number])[None] == 1, ids, -100)
            targets = int((labels[:, 1:] != -100).sum())
            if targets:
                total += model(input_ids=ids, labels=labels).loss.item() * targets
                count += targets
    assert ran.json["first_loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    "options", [(), ("--lora-dropout", "0.3"), ("--batch-size", 2, "--lr-scheduler-type", "cosine")]
)
def test_a_stopped_run_goes_on_to_the_bytes_of_one_that_was_not(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...]
) -> None:
    steps = ("--max-steps", 9, "--save-steps", 4, *options)
    train("whole", *steps)
    original, calls = loop.Run._step, 0

    def stop_at_sixth(run: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return original(run)

    monkeypatch.setattr(loop.Run, "_step", stop_at_sixth)
    assert train("stopped", *steps).code == 130
    monkeypatch.setattr(loop.Run, "_step", original)
    ran = train("stopped", *steps)
    assert ran.json["resumed_from"] == 4
    assert adapter_bytes(tmp_path / "stopped") == adapter_bytes(tmp_path / "whole")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_an_asked_stop_saves_the_step_and_exits_75(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    original = loop.Run._step

    def signalled(run: Any) -> Any:
        line = original(run)
        if run.state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return line

    monkeypatch.setattr(loop.Run, "_step", signalled)
    stopped = train("run", "--max-steps", 5)
    assert stopped.code == 75
    assert "stopped after step 3 of 5" in stopped.err
    assert (tmp_path / "run" / "checkpoints" / "step-00000003" / "lorakit.json").is_file()
    monkeypatch.setattr(loop.Run, "_step", original)
    assert train("run", "--max-steps", 5).json["resumed_from"] == 3


def test_accumulated_micro_steps_give_the_gradient_of_the_whole_batch(train: Train, tmp_path: Path) -> None:
    """The loss is over the trained tokens of the step, however unevenly they lie in its micro-steps."""
    train("whole", "--max-steps", 3, "--batch-size", 6)
    train("parts", "--max-steps", 3, "--batch-size", 2, "--effective-batch-size", 6)
    train("singles", "--max-steps", 3, "--gradient-accumulation-steps", 6)
    whole = safetensors.torch.load(adapter_bytes(tmp_path / "whole"))
    for name in ("parts", "singles"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
        for key, tensor in safetensors.torch.load(adapter_bytes(tmp_path / name)).items():
            torch.testing.assert_close(tensor, whole[key], rtol=1e-3, atol=2e-5)


def test_recomputing_activations_changes_nothing(train: Train, tmp_path: Path) -> None:
    train("with", "--max-steps", 3, "--lora-dropout", "0.2", "--gradient-checkpointing")
    train("without", "--max-steps", 3, "--lora-dropout", "0.2", "--no-gradient-checkpointing")
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), rel=1e-6)


def test_only_the_lora_matrices_learn(train: Train, tmp_path: Path, tiny_llama: Path) -> None:
    before = (tiny_llama / "model.safetensors").read_bytes()
    train("run", "--max-steps", 2, "--target-modules", "q_proj,down_proj")
    assert (tiny_llama / "model.safetensors").read_bytes() == before
    tensors = safetensors.torch.load(adapter_bytes(tmp_path / "run"))
    assert {name.split(".")[-3] for name in tensors} == {"q_proj", "down_proj"}
    assert len(tensors) == 2 * 2 * 2
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())


def test_lora_a_depends_on_the_seed_and_the_name_alone(train: Train, tmp_path: Path) -> None:
    """A layer's A is the same whether or not other layers have LoRA too; another seed gives another."""
    learns_nothing = ("--max-steps", 1, "--learning-rate", "1e-30")
    train("all", *learns_nothing)
    train("some", *learns_nothing, "--target-modules", "q_proj")
    train("other", *learns_nothing, "--seed", 1)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    everything, some, other = (
        safetensors.torch.load(adapter_bytes(tmp_path / name)) for name in ("all", "some", "other")
    )
    assert torch.equal(everything[key], some[key])
    assert not torch.equal(everything[key], other[key])
    bound = 1 / math.sqrt(everything[key].shape[1])
    assert 0.8 * bound < float(everything[key].abs().max()) <= bound


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sixteen_bit_bases_learn_too(train: Train, tmp_path: Path, dtype: str) -> None:
    ran = train("run", "--max-steps", 25, "--dtype", dtype)
    assert ran.code == 0, ran.err
    assert "slower than fp32" in ran.err
    assert ran.json["last_loss"] < 0.9 * ran.json["first_loss"]
    tensors = safetensors.torch.load(adapter_bytes(tmp_path / "run"))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_fp16_overflow_repeats_the_step_with_a_smaller_scale(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss scale that overflows every gradient is halved until it doesn't; no step is lost to it."""
    state = loop.State
    monkeypatch.setattr(loop, "State", lambda **given: state(**{"loss_scale": 2.0**40, **given}))
    ran = train("run", "--max-steps", 3, "--dtype", "fp16")
    assert ran.code == 0, ran.err
    saved = json.loads((tmp_path / "run" / "checkpoints" / "step-00000003" / "state.json").read_text())
    assert saved["loss_scale"] < 2.0**40
    assert len(losses(tmp_path / "run")) == 3


@pytest.mark.parametrize("bad_step", [1, 3, 4])
def test_a_step_that_is_not_finite_ends_the_run_before_it_is_saved(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad_step: int
) -> None:
    original, calls = loop.loss_sum, 0

    def poisoned(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*arguments) * (math.nan if calls == bad_step else 1)

    monkeypatch.setattr(loop, "loss_sum", poisoned)
    ran = train("run", "--max-steps", 6, "--save-steps", 2)
    assert ran.code == 8
    assert f"step {bad_step}: found loss nan" in ran.err
    assert not (tmp_path / "run" / "lorakit.json").exists()
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("step-*"):
        assert int(checkpoint.name[5:]) < bad_step
        tensors = safetensors.torch.load((checkpoint / "adapter_model.safetensors").read_bytes())
        assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    monkeypatch.setattr(loop, "loss_sum", original)
    assert train("run", "--max-steps", 6, "--save-steps", 2).code == 0


def test_an_infinite_gradient_under_a_finite_loss_is_caught(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    ran = train("run", "--max-steps", 2)
    assert ran.code == 8
    assert "gradient norm inf" in ran.err


def test_out_of_memory_says_what_to_lower(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(loop, "loss_sum", full)
    ran = train("run", "--max-steps", 2)
    assert ran.code == 9
    assert "Tried to allocate 2.00 GiB" in ran.err
    assert "--batch-size" in ran.err


def test_the_last_step_takes_what_is_left(train: Train, blocks: Path) -> None:
    count = len(Blocks(blocks))
    assert train("run", "--batch-size", 5).json["steps"] == math.ceil(count / 5)


def test_the_adapter_loads_with_plain_peft(train: Train, tmp_path: Path, tiny_llama: Path) -> None:
    """peft's own model on transformers' own base gives the loss that the run ended near."""
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    train("run", "--max-steps", 20)
    ids = torch.arange(40)[None]
    by_name = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")
    by_hand = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "run")
    with torch.no_grad():
        one, two = by_name(input_ids=ids).logits, by_hand(input_ids=ids).logits
        with by_hand.disable_adapter():
            base = by_hand(input_ids=ids).logits
    torch.testing.assert_close(one, two)
    assert (one - base).abs().max() > 0.1


def test_a_gated_or_odd_model_is_refused_before_training(train: Train, tmp_path: Path, tiny_llama: Path) -> None:
    tied = make_llama(tmp_path / "tied", tie_word_embeddings=True)
    ran = train("run", "--max-steps", 1, "--target-modules", "lm_head", model=tied)
    assert ran.code == 3
    assert "whose weight is the embedding's too" in ran.err
    assert train("run2", "--max-steps", 1, "--target-modules", "lm_head").code == 0


@pytest.mark.parametrize("quantize", ["int8", "nf4", "fp4"])
def test_a_quantized_base_is_bitsandbytes_own(quantize: str, train: Train, tiny_llama: Path, blocks: Path) -> None:
    """The first loss, before LoRA has changed anything, is that of transformers' own quantized model."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bits = {"load_in_4bit": True, "bnb_4bit_quant_type": quantize, "bnb_4bit_use_double_quant": True}
    how = BitsAndBytesConfig(**({"load_in_8bit": True} if quantize == "int8" else four_bits))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=how, device_map={"": "cpu"})
    opened = Blocks(blocks)
    batch = opened.batch(Schedule(len(opened), 2, 2, 0).blocks_of_step(0))
    model.train()  # bitsandbytes computes otherwise where nothing is trained
    expected = loss_sum(model, batch).item() / batch.trained_tokens
    ran = train(quantize, "--quantize", quantize, "--batch-size", 2, "--max-steps", 1)
    assert ran.json["first_loss"] == pytest.approx(expected, rel=1e-5)
    assert ran.json["first_loss"] != pytest.approx(
        train("none", "--batch-size", 2, "--max-steps", 1).json["first_loss"]
    )


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_over_a_quantized_base_the_loss_falls_and_a_stopped_run_goes_on_exactly(
    quantize: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("--quantize", quantize, "--max-steps", 12, "--save-steps", 5)
    ran = train("whole", *command)
    assert ran.json["last_loss"] < 0.95 * ran.json["first_loss"]
    monkeypatch.setattr(loop.Run, "_finish", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
    shutil.copytree(tmp_path / "whole" / "checkpoints", tmp_path / "kept")
    assert train("stopped", *command).code == 130
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-00000012")
    ran = train("stopped", *command)
    assert ran.json["resumed_from"] == 10
    assert adapter_bytes(tmp_path / "stopped") == adapter_bytes(tmp_path / "whole")


@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
def test_checkpointing_changes_no_loss(quantize: str, train: Train, tmp_path: Path) -> None:
    command = ("--quantize", quantize, "--max-steps", 5, "--lora-dropout", "0.1")
    train("with", *command)
    train("without", *command, "--no-gradient-checkpointing")
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), rel=1e-6)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_run_by_a_plan_is_the_run_without(
    quantize: str, train: Train, plan: Callable[..., Path], tmp_path: Path
) -> None:
    """Loaded by the plan's device map, all of it on the CPU here, it gives the same adapter in the planned bytes."""
    command = ("--quantize", quantize, "--max-steps", 3)
    without = train("without", *command)
    path = plan("--quantize", quantize)
    ran = train("with", *command, "--plan", path)
    assert (ran.code, without.code) == (0, 0)
    assert adapter_bytes(tmp_path / "with") == adapter_bytes(tmp_path / "without")
    [device] = json.loads(path.read_text())["devices"]
    outside = device["bytes"]["context"] + device["bytes"]["slack"]
    assert ran.json["planned_bytes"] == without.json["planned_bytes"] == device["peak_bytes"] - outside
    assert train("with", *command, "--plan", path).json["already_done"]


def test_planned_is_for_the_attention_that_runs(train: Train, plan: Callable[..., Path]) -> None:
    planned = {}
    for attention in ("varlen", "sdpa", "eager"):
        ran = train(attention, "--attention", attention, "--max-steps", 1, "--plan", plan("--attention", attention))
        assert ran.code == 0, ran.err
        planned[attention] = ran.json["planned_bytes"]
    assert planned["varlen"] < planned["sdpa"] < planned["eager"]
    ran = train("run", "--attention", "sdpa", "--max-steps", 1, "--plan", plan())
    assert ran.code == 5
    assert "attention: found 'documents', asked for 'sdpa'" in ran.err


def test_measured_stands_beside_planned(cli: Cli, tiny_llama: Path, blocks: Path, tmp_path: Path) -> None:
    ran = cli("train", "--model", tiny_llama, "--blocks", blocks, "--max-steps", 1, "--output", tmp_path / "run")
    assert re.search(r"peak memory +\d+\.\d\d GiB, \d+\.\d\d planned for tensors", ran.out)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (("--rank", 8), "rank: found 8, asked for 16"),
        (("--batch-size", 2), "batch_size: found 2, asked for 1"),
        (("--quantize", "int8"), "quantize: found 'int8', asked for 'none'"),
        (("--gradient-accumulation-steps", 2), "gradient_accumulation_steps: found 'more than 1', asked for '1'"),
    ],
)
def test_a_plan_for_other_settings_is_refused_with_the_difference(
    options: tuple[object, ...], difference: str, train: Train, plan: Callable[..., Path]
) -> None:
    ran = train("run", "--max-steps", 1, "--plan", plan(*options))
    assert ran.code == 5
    assert difference in ran.err


def test_a_plan_for_another_model_or_other_devices_is_refused(
    train: Train, plan: Callable[..., Path], tmp_path: Path
) -> None:
    ran = train("run", "--max-steps", 1, "--plan", plan(model="smollm2-135m"))
    assert ran.code == 5
    assert "hidden_size: found 576, asked for 64" in ran.err
    (tmp_path / "plan.json").unlink()
    ran = train("run", "--max-steps", 1, "--plan", plan("--gpus", "2x8GiB"))
    assert ran.code == 11
    assert "found cpu on this machine, need cuda:0, cuda:1 too" in ran.err
    ran = train("run", "--max-steps", 1, "--plan", plan("--gpus", "2x8GiB", "--parallel", "ddp"))
    assert ran.code == 5
    assert "found a plan for ddp, need one for split" in ran.err
    assert "--parallel ddp --num-processes 2" in ran.err
    (tmp_path / "plan.json").write_text("{}")
    assert train("run", "--max-steps", 1, "--plan", tmp_path / "plan.json").code == 3


def test_a_run_that_will_exceed_the_memory_says_so_before_it_starts(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "free_ram_bytes", lambda: 2**20)
    ran = train("run", "--max-steps", 1)
    assert ran.code == 0
    assert re.search(r"planned \d\.\d GiB on cpu, found 0\.0 free: this run will likely run out of memory", ran.err)
    monkeypatch.undo()
    assert "planned" not in train("other", "--max-steps", 1).err
