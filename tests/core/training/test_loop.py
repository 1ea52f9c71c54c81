"""The training loop: what it computes, that it goes on exactly, and what it never does."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.core import offloading
from lorakit.core.artifacts import open_artifact
from lorakit.core.blocks import Blocks
from lorakit.core.evaluation import loss_sum
from lorakit.core.training import loop
from lorakit.core.training.checkpoints import read
from lorakit.core.training.schedule import Schedule
from tests.conftest import Ran, make_llama
from tests.core.training.conftest import Opened, Train, adapter_bytes, lines_of, loss_by_documents, losses

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
    model, read_blocks = AutoModelForCausalLM.from_pretrained(tiny_llama), Blocks(blocks)
    indices = Schedule(len(read_blocks), 3, 3, 0).blocks_of_step(0)
    loss, _ = loss_by_documents(model, read_blocks, indices)
    assert ran.json["first_loss"] == pytest.approx(loss, rel=1e-5)


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


class Asked(TorchDispatchMode):
    """The names of the operators that run, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("engine", ["standard", "fast"])
def test_a_step_launches_everything_before_it_reads_anything(
    train: Train, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """A GPU would have nothing to do from each look at a number until the next launch. Sizes that depend on numbers,
    as those of boolean indices, are looks too."""
    original, seen = loop.Run._step, []

    def watched(run: Any) -> Any:
        with Asked() as asked:
            hook = run.optimizer.register_step_pre_hook(lambda *_: asked.names.append("update"))
            line = original(run)
        hook.remove()
        seen.append(asked.names)
        return line

    monkeypatch.setattr(loop.Run, "_step", watched)
    ran = train("run", "--max-steps", 2, "--batch-size", 1, "--effective-batch-size", 3, "--engine", engine)
    assert ran.code == 0, ran.err
    for names in seen:
        assert names.count("embedding") == 3
        update = names.index("update")
        looks = [at for at, name in enumerate(names[:update]) if name in ("_local_scalar_dense", "item", "nonzero")]
        # transformers looks whether documents are packed, as each forward pass begins
        assert [names[at - 1] for at in looks] == ["all"] * 3
        assert names[update:].count("_local_scalar_dense") >= 3 + 1  # the losses and the norm


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
    as_it_is = () if quantize == "int8" else ("--no-calibrate",)
    ran = train(quantize, "--quantize", quantize, *as_it_is, "--batch-size", 2, "--max-steps", 1)
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


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_run_with_offloaded_layers_gives_the_same_adapter(
    quantize: str,
    train: Train,
    plan: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Byte for byte, and when it goes on too. The CPU stands for the GPU: no plan for GPUs can be followed here."""
    command = ("--quantize", quantize, "--max-steps", 6, "--save-steps", 2, "--lora-dropout", "0.1")
    command += ("--no-calibrate",) if quantize == "nf4" else ()
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
        (("--gradient-accumulation-steps", 2), "accumulates_gradients: found True, asked for False"),
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
    ran = train("run", "--max-steps", 1, "--plan", plan("--gpus", "2x8GiB", model="smollm2-135m"))
    assert ran.code == 5, "its devices are no question where the model is another"
    assert "found a plan for another model" in ran.err
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


# What a run reaches


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rank": 4, "lora_alpha": 12.0, "lora_dropout": 0.25}, {"r": 4, "lora_alpha": 12, "lora_dropout": 0.25}),
        ({"target_modules": "q_proj,v_proj"}, {"target_modules": {"q_proj", "v_proj"}}),
        ({"target_modules": r".*\.[qk]_proj"}, {"target_modules": r".*\.[qk]_proj"}),
        ({"layers_to_transform": "1"}, {"layers_to_transform": [1]}),
        ({"use_rslora": True}, {"use_rslora": True}),
        ({"use_dora": True}, {"use_dora": True}),
        ({"modules_to_save": "lm_head"}, {"modules_to_save": ["lm_head"]}),
    ],
    ids=str,
)
def test_lora_is_as_it_was_asked_for(values: dict[str, object], expected: dict[str, object], opened: Opened) -> None:
    config = opened(**values).model.peft_config["default"].to_dict()
    assert {name: config[name] for name in expected} == expected


def test_the_base_is_quantized_as_it_was_asked_for(opened: Opened) -> None:
    base = opened(quantize="fp4", double_quantization=False).model.get_base_model()
    state = base.model.layers[0].mlp.up_proj.base_layer.weight.quant_state
    assert (state.quant_type, state.nested) == ("fp4", False)
    base = opened(quantize="int8", int8_threshold=2.5).model.get_base_model()
    assert base.model.layers[0].mlp.up_proj.base_layer.state.threshold == 2.5


@pytest.mark.parametrize("gradient_checkpointing", [True, False])
def test_checkpointing_is_on_where_it_was_asked_for(gradient_checkpointing: bool, opened: Opened) -> None:
    model = opened(gradient_checkpointing=gradient_checkpointing).model.get_base_model()
    assert {layer.gradient_checkpointing for layer in model.model.layers} == {gradient_checkpointing}


def test_deterministic_kernels_are_for_the_run_alone(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    original = loop.Run._step

    def looking(run: Any) -> Any:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return original(run)

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(loop.Run, "_step", looking)
    assert train("usual", "--max-steps", 1).code == 0
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert train("run", "--max-steps", 1, "--deterministic").code == 0
    assert seen == [False, True]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


def test_the_seed_is_that_of_the_order_and_of_dropout(train: Train, tmp_path: Path) -> None:
    learns_nothing = ("--max-steps", 4, "--learning-rate", "1e-30")
    for seed in (3, 4):
        train(f"order-{seed}", *learns_nothing, "--seed", seed)
    assert losses(tmp_path / "order-3") != losses(tmp_path / "order-4")
    count = len(Blocks(tmp_path / "blocks"))
    whole = ("--batch-size", count, "--learning-rate", "5e-2", "--max-steps", 3)
    for name, options in {"a": ("--seed", 3), "b": ("--seed", 3), "c": ("--seed", 4)}.items():
        train(name, *whole, "--lora-dropout", "0.5", *options)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a")[1:] != losses(tmp_path / "c")[1:]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_layers_are_compiled_where_it_was_asked_for(opened: Opened) -> None:
    for asked in (True, False):
        layers = opened(torch_compile=asked).model.get_base_model().model.layers
        assert [layer._compiled_call_impl is not None for layer in layers] == [asked, asked]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch compiles for a CPU by a C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_give_the_same_losses(opened: Opened) -> None:
    usual = opened(max_steps=3, learning_rate=5e-3, target_modules="q_proj", gradient_checkpointing=False)
    compiled = opened(
        max_steps=3, learning_rate=5e-3, target_modules="q_proj", gradient_checkpointing=False, torch_compile=True
    )
    expected = [usual._step()["loss"] for _ in range(3)]
    assert [compiled._step()["loss"] for _ in range(3)] == pytest.approx(expected, rel=1e-5)


def test_auto_is_the_largest_batch_that_fits_and_changes_no_loss(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("--batch-size", "auto", "--effective-batch-size", 6, "--max-steps", 3)
    found = {}
    for name, room in {"large": 2**40, "small": 0}.items():
        monkeypatch.setattr(loop, "free_ram_bytes", lambda room=room: room)
        ran = train(name, *command)
        assert ran.code == 0, ran.err
        found[name] = re.search(r"batch size: (\d+) of 6 blocks at once", ran.err)
    assert found["large"] is not None
    assert found["small"] is not None
    assert (found["large"][1], found["small"][1]) == ("6", "1")
    assert losses(tmp_path / "large") == pytest.approx(losses(tmp_path / "small"), rel=1e-5)
    assert train("small", "--batch-size", 2, *command[2:]).json["already_done"]  # how it is cut decides nothing


@pytest.mark.parametrize("room", [0, 2**40])
def test_a_run_goes_on_in_the_micro_steps_that_it_began_with(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """However much is free by then, as long as it is enough."""
    command = ("--batch-size", "auto", "--effective-batch-size", 6, "--lora-dropout", 0.3)
    command += ("--lr-scheduler-type", "constant")
    monkeypatch.setattr(loop, "free_ram_bytes", lambda: room)
    train("whole", *command, "--max-steps", 3)
    train("run", *command, "--max-steps", 2)
    monkeypatch.setattr(loop, "free_ram_bytes", lambda: 2**40 - room)
    ran = train("run", *command, "--max-steps", 3, "--extend")
    if room:
        assert "batch size: 1 of 6 blocks at once, 6 before" in ran.err
    else:
        assert "batch size: 1 of 6 blocks at once\n" in ran.err
        assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


def test_layers_split_over_the_one_device_there_is_give_the_same_adapter(train: Train, tmp_path: Path) -> None:
    train("usual", "--max-steps", 3)
    ran = train("split", "--max-steps", 3, "--parallel", "split")
    assert ran.code == 0, ran.err
    assert adapter_bytes(tmp_path / "split") == adapter_bytes(tmp_path / "usual")


# Whole modules and new tokens


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_with_whole_modules_loads_with_plain_peft(train: Train, tmp_path: Path, tied: bool) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = make_llama(tmp_path / "model", tie_word_embeddings=tied)
    names = "embed_tokens,lm_head"
    ran = train("run", "--max-steps", 3, "--save-steps", 2, "--modules-to-save", names, model=model)
    assert ran.code == 0, ran.err
    assert ran.json["planned_bytes"] is None
    tensors = safetensors.torch.load(adapter_bytes(tmp_path / "run"))
    base = AutoModelForCausalLM.from_pretrained(model)
    whole = {name: tensor for name, tensor in tensors.items() if "lora_" not in name}
    assert {tuple(tensor.shape) for tensor in whole.values()} == {(320, 64)}
    assert torch.equal(*whole.values()) is tied
    assert not torch.equal(whole["base_model.model.lm_head.weight"], base.lm_head.weight)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(base, tmp_path / "run")
        found = loaded(input_ids=ids).logits
    run_loss = losses(tmp_path / "run")
    assert run_loss[-1] < run_loss[0]
    _, states, _ = read(open_artifact(tmp_path / "run" / "checkpoints" / "step-00000003", "checkpoint"))
    assert len([name for name in states if name.startswith("exp_avg.") and "lora_" not in name]) == (1 if tied else 2)
    embedding = tensors["base_model.model.model.embed_tokens.weight"]
    torch.testing.assert_close(loaded.get_base_model().get_input_embeddings()(ids)[0], embedding[ids[0]])
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_are_learned_and_the_adapter_has_them(cli: Cli, rows_file: Path, tmp_path: Path, tied: bool) -> None:
    """For plain peft; what is learned of the embeddings are the rows of new tokens alone."""
    from peft import AutoPeftModelForCausalLM

    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    rows_file.write_text("".join(json.dumps({**row, "prompt": f"<ask>{row['prompt']}"}) + "\n" for row in rows))
    model = make_llama(tmp_path / "model", vocab_size=260, tie_word_embeddings=tied)
    blocks, run = tmp_path / "b", tmp_path / "run"
    add = ("--add-tokens", "<ask>,<say>")
    given = ("--tokenizer", model, "--block-size", 128, "--validation-split", 0.3, "--output", blocks)
    assert cli("prepare", rows_file, *given, *add).code == 0
    assert Blocks(blocks).largest_id() >= 259
    command = ("train", "--model", model, "--blocks", blocks, "--output", run, "--learning-rate", "5e-3", "--json")
    ran = cli(*command, "--max-steps", 8, "--eval-steps", 8, *add)
    assert ran.code == 0, ran.err
    assert losses(run)[-1] < losses(run)[0]
    tensors = safetensors.torch.load(adapter_bytes(run))
    rows_of = [tensor for name, tensor in tensors.items() if "lora_" not in name]
    assert {tuple(tensor.shape) for tensor in rows_of} == {(2, 64), (261, 64)}  # what is trained, and what has grown
    assert json.loads((run / "tokenizer.json").read_text())["added_tokens"][-2]["content"] == "<ask>"
    loaded = AutoPeftModelForCausalLM.from_pretrained(run)  # which takes the tokenizer's size from the folder
    loss, _ = loss_by_documents(loaded, Blocks(blocks, "validation"))
    assert lines_of(run, "eval_loss")[-1]["eval_loss"] == pytest.approx(loss, rel=1e-5)
    ran = cli(*command[:6], tmp_path / "other", "--max-steps", 1)
    assert ran.code == 5
    assert "blocks of another tokenizer, chat template or added tokens" in ran.err


# Evaluation


def test_evaluations_are_over_the_held_out_blocks(
    train: Train, held_out: Path, tmp_path: Path, tiny_llama: Path
) -> None:
    """Before the first step, every four steps and after the last one; without dropout, which training has."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ran = train("run", "--max-steps", 10, "--eval-steps", 4, "--lora-dropout", "0.3", "--save-steps", 4, data=held_out)
    assert ran.code == 0, ran.err
    lines = lines_of(tmp_path / "run", "eval_loss")
    assert [line["step"] for line in lines] == [0, 4, 8, 10]
    blocks = Blocks(held_out, "validation")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    expected = [loss_by_documents(base, blocks)]
    for folder in ("checkpoints/step-00000004", "checkpoints/step-00000008", "."):
        fresh = AutoModelForCausalLM.from_pretrained(tiny_llama)
        expected.append(loss_by_documents(PeftModel.from_pretrained(fresh, tmp_path / "run" / folder), blocks))
    assert [line["eval_loss"] for line in lines] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert [line["eval_tokens"] for line in lines] == [count for _, count in expected]
    perplexities = [math.exp(loss) for loss, _ in expected]
    assert [line["eval_perplexity"] for line in lines] == pytest.approx(perplexities, rel=1e-4)
    best = min(lines[1:], key=lambda line: line["eval_loss"])
    assert (ran.json["best_step"], ran.json["eval_loss"]) == (best["step"], best["eval_loss"])
    assert ran.json["adapter_step"] == 10


def hearing(monkeypatch: pytest.MonkeyPatch, *heard: float) -> list[float]:
    """Let evaluations find these losses; returns those that nobody asked for yet."""
    left = list(heard)
    monkeypatch.setattr(loop, "mean_loss", lambda *_: (left.pop(0), 100))
    return left


def test_the_run_ends_where_losses_stop_falling(
    train: Train, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = hearing(monkeypatch, 9.0, 3.0, 2.0, 2.5, 1.9, 2.0, 1.9, 0.1)
    command = ("--max-steps", 20, "--eval-steps", 1, "--early-stopping-patience", 2)
    ran = train("run", *command, data=held_out)
    assert left == [0.1]
    assert (ran.json["steps"], ran.json["best_step"], ran.json["eval_loss"]) == (6, 4, 1.9)
    assert ran.json["adapter_step"] == 6
    assert train("run", *command, data=held_out).json["already_done"]


def test_an_early_stop_is_kept_where_the_run_was_killed_before_its_end(
    train: Train, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("--max-steps", 20, "--eval-steps", 1, "--early-stopping-patience", 1)
    hearing(monkeypatch, 9.0, 3.0, 2.0, 2.5)
    monkeypatch.setattr(loop.Run, "_finish", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
    assert train("run", *command, data=held_out).code == 130
    monkeypatch.undo()
    ran = train("run", *command, data=held_out)
    assert (ran.json["steps"], ran.json["resumed_from"]) == (3, 3)


@pytest.mark.parametrize("best_at_end", [True, False])
def test_the_best_checkpoint_is_kept_and_can_be_the_adapter(
    train: Train, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best_at_end: bool
) -> None:
    hearing(monkeypatch, 9.0, 3.0, 2.0, 2.5, 2.6, 2.7)
    options = ("--load-best-model-at-end",) if best_at_end else ()
    command = ("--max-steps", 10, "--eval-steps", 2, "--save-steps", 1, "--keep-checkpoints", 1)
    ran = train("run", *command, *options, data=held_out)
    assert ran.code == 0, ran.err
    kept = sorted(os.listdir(tmp_path / "run" / "checkpoints"))
    assert kept == ["step-00000004", "step-00000010"]
    assert (ran.json["best_step"], ran.json["adapter_step"]) == (4, 4 if best_at_end else 10)
    chosen, other = (kept[0], kept[1]) if best_at_end else (kept[1], kept[0])
    checkpoints = tmp_path / "run" / "checkpoints"
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(checkpoints / chosen)
    assert adapter_bytes(tmp_path / "run") != adapter_bytes(checkpoints / other)


def test_a_stopped_run_remembers_its_evaluations(
    train: Train, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after any step, it writes each line once, and the plateau it waits on is the same."""
    plateau = ("--lr-scheduler-type", "reduce_lr_on_plateau", "--lr-scheduler-kwargs", "patience=0,factor=0.5")
    command = ("--max-steps", 9, "--eval-steps", 2, "--save-steps", 3, "--warmup-ratio", 0, *plateau)
    heard = {0: 9.0, 2: 3.0, 4: 3.5, 6: 3.6, 8: 2.0, 9: 2.5}
    runs: list[Any] = []
    original = loop.Run.go
    monkeypatch.setattr(loop.Run, "go", lambda run, should_stop: runs.append(run) or original(run, should_stop))
    monkeypatch.setattr(loop, "mean_loss", lambda *_: (heard[runs[-1].state.step], 100))
    assert train("whole", *command, data=held_out).code == 0
    step, killed, at = loop.Run._step, (2, 5, 7), [0]

    def dies(run: Any) -> Any:
        if run.state.step == at[0]:
            raise KeyboardInterrupt
        return step(run)

    for at[0] in killed:
        monkeypatch.setattr(loop.Run, "_step", dies)
        assert train("stopped", *command, data=held_out).code == 130
    monkeypatch.setattr(loop.Run, "_step", step)
    assert train("stopped", *command, data=held_out).code == 0
    assert lines_of(tmp_path / "stopped", "eval_loss") == lines_of(tmp_path / "whole", "eval_loss")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    rates = [line["learning_rate"] for line in lines_of(tmp_path / "stopped")]
    assert rates == [5e-3, 5e-3, 5e-3, 5e-3, 2.5e-3, 2.5e-3, 1.25e-3, 1.25e-3, 1.25e-3]
    assert adapter_bytes(tmp_path / "whole") == adapter_bytes(tmp_path / "stopped")


def test_prompts_are_answered_at_each_evaluation(
    train: Train, cli: Cli, held_out: Path, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As chat answers them with that adapter, and without a trace in what is learned."""
    monkeypatch.setattr(loop, "_SAMPLE_TOKENS", 8)
    prompts = tmp_path / "prompts.jsonl"
    rows = ["What is 1 plus 2?", "", json.dumps({"prompt": "Say: x"})]
    rows += [json.dumps({"messages": [{"role": "user", "content": "What is 2 plus 2?"}]})]
    prompts.write_text("\n".join(rows))
    command = ("--max-steps", 4, "--eval-steps", 2)
    ran = train("run", *command, "--sample-prompts", prompts, data=held_out)
    assert ran.code == 0, ran.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    asked = ["What is 1 plus 2?", "Say: x", "What is 2 plus 2?"]
    assert [(line["step"], line["prompt"]) for line in lines] == [(step, ask) for step in (0, 2, 4) for ask in asked]
    options = [part for ask in asked for part in ("--prompt", ask)]
    for model, first in ((tiny_llama, 0), (tmp_path / "run", 6)):
        chatted = cli("chat", model, *options, "--max-new-tokens", 8, "--json").out
        answers = [json.loads(line)["answer"] for line in chatted.splitlines()]
        assert [line["answer"] for line in lines[first : first + 3]] == answers
    assert train("without", *command, data=held_out).code == 0
    assert adapter_bytes(tmp_path / "without") == adapter_bytes(tmp_path / "run")
    assert "samples.jsonl" in open_artifact(tmp_path / "run", "adapter").manifest["files"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_prompt_ends_at_a_newline_and_nowhere_else(newline: str, tmp_path: Path) -> None:
    asked = ["a\u2028b", "c\u0085d\x0ce", "plain\u2029text"]
    prompts = tmp_path / "prompts.jsonl"
    rows = [*(json.dumps({"prompt": text}, ensure_ascii=False) for text in asked[:2]), asked[2]]
    prompts.write_bytes((newline.join(rows) + newline).encode())
    assert [message["content"] for [message] in loop._read_prompts(prompts)] == asked


@pytest.mark.parametrize("content", [None, '{"question": "x"}', "{broken", '{"messages": []}', '{"prompt": 3}'])
def test_a_file_of_no_prompts_is_refused(content: str | None, train: Train, held_out: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    if content is not None:
        prompts.write_text(content)
    ran = train("run", "--max-steps", 2, "--eval-steps", 1, "--sample-prompts", prompts, data=held_out)
    assert ran.code == 3
    assert str(prompts) in ran.err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_evaluations_without_held_out_blocks_are_refused(train: Train) -> None:
    ran = train("run", "--max-steps", 2, "--eval-steps", 1)
    assert ran.code == 2
    assert "eval_steps: found no held-out blocks" in ran.err


def test_a_held_out_loss_that_is_no_number_ends_the_run(
    train: Train, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hearing(monkeypatch, 3.0, 2.5, math.nan)
    ran = train("run", "--max-steps", 6, "--eval-steps", 2, "--save-steps", 1, data=held_out)
    assert ran.code == 8
    assert "step 4: found a held-out loss of nan" in ran.err
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints"))[-1] == "step-00000003"


# Saving


def test_a_checkpoint_is_saved_when_minutes_have_passed(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, original = [0.0], loop.Run._step

    def monotonic() -> float:
        now[0] += 0.01
        return now[0]

    def slowly(run: Any) -> Any:
        now[0] += 25
        return original(run)

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=monotonic))
    monkeypatch.setattr(loop.Run, "_step", slowly)
    ran = train("run", "--max-steps", 8, "--save-minutes", 1, "--keep-checkpoints", 9)
    assert ran.code == 0, ran.err
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == [f"step-{step:08d}" for step in (3, 6, 8)]


def test_as_many_checkpoints_are_kept_as_were_asked_for(train: Train, tmp_path: Path) -> None:
    assert train("run", "--max-steps", 7, "--save-steps", 2, "--keep-checkpoints", 2).code == 0
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step-00000006", "step-00000007"]


def test_what_a_checkpoint_says_is_plain_json(train: Train, held_out: Path, tmp_path: Path) -> None:
    train("run", "--max-steps", 2, "--eval-steps", 2, "--save-steps", 1, data=held_out)
    for path in tmp_path.glob("run/**/*.json"):
        json.loads(path.read_text(), parse_constant=lambda word, path=path: pytest.fail(f"{path}: {word}"))
