"""The training loop: what it computes, that it goes on exactly, and what it never does."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from lorakit.core import offloading
from lorakit.core.blocks import Blocks
from lorakit.core.config import LoraSection
from lorakit.core.evaluation import loss_sum
from lorakit.core.model import add_lora, checkpoint_activations, load_base
from lorakit.core.training import loop
from lorakit.core.training.checkpoints import Checkpoints
from lorakit.core.training.schedule import Schedule
from lorakit.core.weights import open_weights
from tests.conftest import Ran, make_llama
from tests.live import LiveBytes

Cli = Callable[..., Ran]


@pytest.fixture
def blocks(cli: Cli, tiny_llama: Path, rows_file: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "blocks"
    assert cli("prepare", rows_file, "--tokenizer", tiny_llama, "--block-size", 128, "--output", folder).code == 0
    return folder


@pytest.fixture
def train(cli: Cli, tiny_llama: Path, blocks: Path, tmp_path: Path) -> Callable[..., Ran]:
    """Train on the tiny blocks: train("name", options…) writes tmp_path/name."""

    def run(name: str, *options: object, model: Path = tiny_llama) -> Ran:
        given = ("--model", model, "--blocks", blocks, "--output", tmp_path / name, "--learning-rate", "5e-3", "--json")
        return cli("train", *given, *options)

    return run


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_falls_and_the_result_says_so(train: Callable[..., Ran], tmp_path: Path) -> None:
    ran = train("run", "--max-steps", 30)
    assert ran.code == 0
    assert ran.json["last_loss"] < 0.9 * ran.json["first_loss"]
    assert ran.json["steps"] == 30
    assert len(losses(tmp_path / "run")) == 30
    assert losses(tmp_path / "run")[-1] == ran.json["last_loss"]


def test_each_line_of_metrics_has_the_documented_keys(train: Callable[..., Ran], tmp_path: Path) -> None:
    train("run", "--max-steps", 4, "--logging-steps", 3)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4]
    keys = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_bytes"}
    assert set(lines[0]) == keys


def test_the_first_loss_is_the_bases_own(train: Callable[..., Ran], tiny_llama: Path, blocks: Path) -> None:
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
    train: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...]
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
    train: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_accumulated_micro_steps_give_the_gradient_of_the_whole_batch(
    train: Callable[..., Ran], tmp_path: Path
) -> None:
    """The loss is over the trained tokens of the step, however unevenly they lie in its micro-steps."""
    train("whole", "--max-steps", 3, "--batch-size", 6)
    train("parts", "--max-steps", 3, "--batch-size", 2, "--effective-batch-size", 6)
    train("singles", "--max-steps", 3, "--gradient-accumulation-steps", 6)
    whole = safetensors.torch.load(adapter_bytes(tmp_path / "whole"))
    for name in ("parts", "singles"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
        for key, tensor in safetensors.torch.load(adapter_bytes(tmp_path / name)).items():
            torch.testing.assert_close(tensor, whole[key], rtol=1e-3, atol=2e-5)


def test_recomputing_activations_changes_nothing(train: Callable[..., Ran], tmp_path: Path) -> None:
    train("with", "--max-steps", 3, "--lora-dropout", "0.2", "--gradient-checkpointing")
    train("without", "--max-steps", 3, "--lora-dropout", "0.2", "--no-gradient-checkpointing")
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), rel=1e-6)


def test_only_the_lora_matrices_learn(train: Callable[..., Ran], tmp_path: Path, tiny_llama: Path) -> None:
    before = (tiny_llama / "model.safetensors").read_bytes()
    train("run", "--max-steps", 2, "--target-modules", "q_proj,down_proj")
    assert (tiny_llama / "model.safetensors").read_bytes() == before
    tensors = safetensors.torch.load(adapter_bytes(tmp_path / "run"))
    assert {name.split(".")[-3] for name in tensors} == {"q_proj", "down_proj"}
    assert len(tensors) == 2 * 2 * 2
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())


def test_lora_a_depends_on_the_seed_and_the_name_alone(train: Callable[..., Ran], tmp_path: Path) -> None:
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
def test_sixteen_bit_bases_learn_too(train: Callable[..., Ran], tmp_path: Path, dtype: str) -> None:
    ran = train("run", "--max-steps", 25, "--dtype", dtype)
    assert ran.code == 0, ran.err
    assert "slower than fp32" in ran.err
    assert ran.json["last_loss"] < 0.9 * ran.json["first_loss"]
    tensors = safetensors.torch.load(adapter_bytes(tmp_path / "run"))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_fp16_overflow_repeats_the_step_with_a_smaller_scale(
    train: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    train: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad_step: int
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


def test_an_infinite_gradient_under_a_finite_loss_is_caught(
    train: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    ran = train("run", "--max-steps", 2)
    assert ran.code == 8
    assert "gradient norm inf" in ran.err


def test_out_of_memory_says_what_to_lower(train: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(loop, "loss_sum", full)
    ran = train("run", "--max-steps", 2)
    assert ran.code == 9
    assert "Tried to allocate 2.00 GiB" in ran.err
    assert "--batch-size" in ran.err


def test_the_same_command_on_a_finished_run_is_already_done(train: Callable[..., Ran], tmp_path: Path) -> None:
    first = train("run", "--max-steps", 2)
    stamp = (tmp_path / "run" / "lorakit.json").stat().st_mtime_ns
    again = train("run", "--max-steps", 2, "--save-steps", 1)  # how often it saves decides nothing
    assert again.code == 0
    assert again.json["already_done"] is True
    assert again.json["last_loss"] == first.json["last_loss"]
    assert (tmp_path / "run" / "lorakit.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_on_a_run_are_refused_and_named(
    train: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    train("run", "--max-steps", 4, "--save-steps", 2)
    if not finished:
        (tmp_path / "run" / "lorakit.json").unlink()
        for path in (tmp_path / "run").iterdir():
            if path.name not in ("checkpoints", "metrics.jsonl"):
                path.unlink()
    ran = train("run", "--max-steps", 4, "--rank", 4)
    assert ran.code == 5
    assert "rank: found 16, asked for 4" in ran.err


def test_overwrite_keeps_the_old_run_until_the_new_one_is_whole(
    train: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("run", "--max-steps", 2)
    old = adapter_bytes(tmp_path / "run")
    original = loop.Run._finish

    def dies(run: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Run, "_finish", dies)
    assert train("run", "--max-steps", 3, "--overwrite").code == 130
    assert adapter_bytes(tmp_path / "run") == old
    monkeypatch.setattr(loop.Run, "_finish", original)
    ran = train("run", "--max-steps", 3, "--overwrite")
    assert ran.json["resumed_from"] == 3
    assert ran.json["path"] == str(tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 3
    assert [path.name for path in tmp_path.glob("run*")] == ["run"]


def test_what_a_killed_run_left_goes_with_the_next_one(
    train: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between saving a checkpoint and removing an older one, or while removing it: before and after the end."""
    command = ("run", "--max-steps", 4, "--save-steps", 2, "--keep-checkpoints", 1)

    def dies(checkpoints: Any, best_step: int) -> None:
        if checkpoints.last_saved() == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "remove_oldest", dies)
    assert train(*command).code == 130
    assert len(os.listdir(tmp_path / "run" / "checkpoints")) == 2
    monkeypatch.undo()
    for _ in range(2):
        shutil.copytree(tmp_path / "blocks", tmp_path / "run" / "checkpoints" / f".trash-step-00000002-{'0' * 32}")
        assert train(*command).code == 0
        assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-00000004"]


def test_a_mount_point_is_refused_before_the_training_that_would_replace_its_run(
    train: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("run", "--max-steps", 2)
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "run"))
    ran = train("run", "--max-steps", 3, "--overwrite")
    assert ran.code == 5
    assert "found another run on a mount point" in ran.err
    assert len(losses(tmp_path / "run")) == 2
    assert [path.name for path in tmp_path.glob("run*")] == ["run"]


def test_a_damaged_checkpoint_is_passed_over_and_kept(
    train: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("whole", "--max-steps", 6, "--save-steps", 2)
    monkeypatch.setattr(loop.Run, "_finish", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
    train("run", "--max-steps", 6, "--save-steps", 2)
    monkeypatch.undo()
    newest = tmp_path / "run" / "checkpoints" / "step-00000006" / "optimizer.safetensors"
    damaged = bytearray(newest.read_bytes())
    damaged[-1] ^= 1
    newest.write_bytes(damaged)
    ran = train("run", "--max-steps", 6, "--save-steps", 2)
    assert ran.json["resumed_from"] == 4
    assert "passed over a damaged checkpoint" in ran.err
    assert len(list((tmp_path / "run" / "checkpoints").glob("bad-step-00000006-*"))) == 1
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


def test_an_epoch_sees_every_block_once_in_an_order_of_its_own() -> None:
    schedule = Schedule(num_blocks=7, blocks_per_step=3, total_blocks=21, seed=5)
    seen = [block for step in range(schedule.steps) for block in schedule.blocks_of_step(step)]
    epochs = [seen[at : at + 7] for at in range(0, 21, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = Schedule(num_blocks=7, blocks_per_step=3, total_blocks=21, seed=6)
    assert [other.blocks_of_step(step) for step in range(7)] != [schedule.blocks_of_step(step) for step in range(7)]


def test_the_last_step_takes_what_is_left(train: Callable[..., Ran], blocks: Path) -> None:
    count = len(Blocks(blocks))
    assert train("run", "--batch-size", 5).json["steps"] == math.ceil(count / 5)


def test_the_learning_rate_rises_then_falls_to_its_end(train: Callable[..., Ran], tmp_path: Path) -> None:
    train("run", "--max-steps", 10, "--warmup-ratio", "0.4", "--learning-rate", "1e-3")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] * 1e3 for line in lines]
    assert rates == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_the_adapter_loads_with_plain_peft(train: Callable[..., Ran], tmp_path: Path, tiny_llama: Path) -> None:
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


def test_a_gated_or_odd_model_is_refused_before_training(
    train: Callable[..., Ran], tmp_path: Path, tiny_llama: Path
) -> None:
    tied = make_llama(tmp_path / "tied", tie_word_embeddings=True)
    ran = train("run", "--max-steps", 1, "--target-modules", "lm_head", model=tied)
    assert ran.code == 3
    assert "whose weight is the embedding's too" in ran.err
    assert train("run2", "--max-steps", 1, "--target-modules", "lm_head").code == 0


# A quantized base


@pytest.mark.parametrize("quantize", ["int8", "nf4", "fp4"])
def test_a_quantized_base_is_bitsandbytes_own(
    quantize: str, train: Callable[..., Ran], tiny_llama: Path, blocks: Path
) -> None:
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
    quantize: str, train: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
def test_checkpointing_changes_no_loss(quantize: str, train: Callable[..., Ran], tmp_path: Path) -> None:
    command = ("--quantize", quantize, "--max-steps", 5, "--lora-dropout", "0.1")
    train("with", *command)
    train("without", *command, "--no-gradient-checkpointing")
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), rel=1e-6)


@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
def test_checkpointing_leaves_each_layers_input_alone(quantize: str, tiny_llama: Path) -> None:
    """Counted from outside: what is alive after a forward pass grows by one hidden state a layer, with LLM.int8 too."""
    base = load_base(open_weights(tiny_llama), torch.float32, torch.device("cpu"), quantize)
    model = add_lora(base, LoraSection(), 0, "tiny")
    checkpoint_activations(model)
    model.train()
    ids, all_layers = torch.zeros(2, 64, dtype=torch.int64), base.model.layers
    alive = []
    for layers in (1, 2):
        base.model.layers = all_layers[:layers]
        with LiveBytes() as counted:
            hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state
            alive.append(counted.live)
        del hidden
    assert alive[1] - alive[0] == ids.numel() * base.config.hidden_size * 4


# Plans


@pytest.fixture
def plan(cli: Cli, tiny_llama: Path, tmp_path: Path) -> Callable[..., Path]:
    """A plan file for the tiny model, by the command: plan(options…)."""

    def run(*options: object, model: object = tiny_llama) -> Path:
        path = tmp_path / "plan.json"
        given = (model, "--block-size", 128, "--output", path, *options)
        assert cli("plan-devices", *(given if "--gpus" in options else (*given, "--cpu", "8GiB"))).code == 0
        return path

    return run


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_run_by_a_plan_is_the_run_without(
    quantize: str, train: Callable[..., Ran], plan: Callable[..., Path], tmp_path: Path
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


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_run_with_offloaded_layers_gives_the_same_adapter(
    quantize: str,
    train: Callable[..., Ran],
    plan: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Byte for byte, and when it goes on too. The CPU stands for the GPU: no plan for GPUs can be followed here."""
    command = ("--quantize", quantize, "--max-steps", 6, "--save-steps", 2, "--lora-dropout", "0.1")
    assert train("without", *command).code == 0
    original, wrapped = loop.plan_run, []

    def plan_run(*given: Any) -> Any:
        return replace(original(*given), computed_on={"model.layers.0": "cpu"})

    def stopping(run: Any) -> Any:
        wrapped.append(len(offloading.offloaded(run.model)))
        return step(run) if len(wrapped) != 4 else _interrupted()

    step = loop.Run._step
    monkeypatch.setattr(loop, "plan_run", plan_run)
    monkeypatch.setattr(loop.Run, "_step", stopping)
    by_plan = (*command, "--plan", plan("--quantize", quantize, "--lora-dropout", "0.1"))
    assert train("with", *by_plan).code == 130
    assert train("with", *by_plan).json["resumed_from"] == 2
    assert set(wrapped) == {9}
    assert adapter_bytes(tmp_path / "with") == adapter_bytes(tmp_path / "without")
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def _interrupted() -> None:
    raise KeyboardInterrupt


def test_planned_is_for_the_attention_that_runs(train: Callable[..., Ran], plan: Callable[..., Path]) -> None:
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
    options: tuple[object, ...], difference: str, train: Callable[..., Ran], plan: Callable[..., Path]
) -> None:
    ran = train("run", "--max-steps", 1, "--plan", plan(*options))
    assert ran.code == 5
    assert difference in ran.err


def test_a_plan_for_another_model_or_other_devices_is_refused(
    train: Callable[..., Ran], plan: Callable[..., Path], tmp_path: Path
) -> None:
    ran = train("run", "--max-steps", 1, "--plan", plan(model="smollm2-135m"))
    assert ran.code == 5
    assert "hidden_size: found 576, asked for 64" in ran.err
    (tmp_path / "plan.json").unlink()
    ran = train("run", "--max-steps", 1, "--plan", plan("--gpus", "2x8GiB"))
    assert ran.code == 11
    assert "found cpu on this machine, need cuda:0, cuda:1 too" in ran.err
    ran = train("run", "--max-steps", 1, "--plan", plan("--gpus", "2x8GiB", "--parallel", "ddp"))
    assert ran.code == 3
    assert "found a plan for ddp over 2 devices, need split" in ran.err
    (tmp_path / "plan.json").write_text("{}")
    assert train("run", "--max-steps", 1, "--plan", tmp_path / "plan.json").code == 3


def test_a_run_that_will_exceed_the_memory_says_so_before_it_starts(
    train: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "free_ram_bytes", lambda: 2**20)
    ran = train("run", "--max-steps", 1)
    assert ran.code == 0
    assert re.search(r"planned \d\.\d GiB on cpu, found 0\.0 free: this run will likely run out of memory", ran.err)
    monkeypatch.undo()
    assert "planned" not in train("other", "--max-steps", 1).err
