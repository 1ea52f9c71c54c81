"""Runs on either engine: that a run says which, keeps it, and leaves an adapter as any other."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import Ran
from tests.core.training.conftest import adapter_bytes, losses

Train = Callable[..., Ran]


def test_a_run_says_which_engine_computed_it_and_why(train: Train) -> None:
    ran = train("auto", "--max-steps", 1)
    assert ran.json["engine"] == "standard"
    assert "engine: standard, since there is no GPU" in ran.err
    ran = train("fast", "--max-steps", 1, "--engine", "fast")
    assert (ran.code, ran.json["engine"]) == (0, "fast")
    assert "engine: fast\n" in ran.err
    assert json.loads((Path(ran.json["path"]) / "lorakit.json").read_text())["facts"]["engine"] == "fast"


def test_one_that_is_asked_for_and_cant_be_had_is_refused_before_anything_is_loaded(
    train: Train, tmp_path: Path
) -> None:
    ran = train("run", "--engine", "fast", "--use-dora")
    assert ran.code == 11
    assert "error: --engine fast: found that LoRA is DoRA (--use-dora); need what the fast engine can do" in ran.err
    assert "hint: change that, or leave out --engine" in ran.err
    ran = train("run", "--quantize", "fp8", "--lora-dropout", 0.1)
    assert ran.code == 11
    assert "--quantize fp8: found that LoRA has a dropout of 0.1, not 0" in ran.err
    assert "hint: change that, or choose another --quantize" in ran.err
    ran = train("run", "--quantize", "fp8", "--engine", "standard")
    assert ran.code == 2
    assert "found --quantize fp8 with --engine standard, need --engine fast or auto" in ran.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_both_engines_learn_the_same(quantize: str, train: Train, tmp_path: Path) -> None:
    for engine in ("standard", "fast"):
        assert train(engine, "--engine", engine, "--quantize", quantize, "--max-steps", 6).code == 0
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "standard"), rel=1e-5)


def test_a_run_goes_on_with_its_engine_and_ends_with_the_same_bytes(train: Train, tmp_path: Path) -> None:
    given = ("--quantize", "fp8", "--save-steps", 1)
    assert train("whole", *given, "--max-steps", 6).code == 0
    assert train("parts", *given, "--max-steps", 3, "--lr-scheduler-type", "constant").code == 0
    ran = train("parts", *given, "--max-steps", 6, "--lr-scheduler-type", "constant", "--extend")
    assert (ran.json["engine"], ran.json["resumed_from"]) == ("fast", 3)
    assert train("other", *given, "--max-steps", 6, "--lr-scheduler-type", "constant").code == 0
    assert adapter_bytes(tmp_path / "parts") == adapter_bytes(tmp_path / "other")


def test_an_adapter_of_dora_goes_on_in_the_standard_engine_alone(train: Train, tmp_path: Path) -> None:
    assert train("dora", "--use-dora", "--max-steps", 1).code == 0
    ran = train("next", "--engine", "fast", "--adapter", tmp_path / "dora", "--max-steps", 1)
    assert ran.code == 11
    assert "LoRA is DoRA" in ran.err


@pytest.mark.parametrize(("first", "second"), [("standard", "fast"), ("fast", "standard")])
def test_an_adapter_goes_on_in_the_other_engine(first: str, second: str, train: Train, tmp_path: Path) -> None:
    assert train("first", "--engine", first, "--max-steps", 6).code == 0
    ran = train("second", "--engine", second, "--adapter", tmp_path / "first", "--max-steps", 2)
    assert ran.code == 0
    assert ran.json["engine"] == second
    assert train("same", "--engine", first, "--adapter", tmp_path / "first", "--max-steps", 2).code == 0
    assert losses(tmp_path / "second") == pytest.approx(losses(tmp_path / "same"), rel=1e-5)
    assert losses(tmp_path / "second")[0] < 0.95 * losses(tmp_path / "first")[0]


def test_an_adapter_over_fp8_is_stock_peft_and_merges_as_it_was_trained(
    train: Train, cli: Callable[..., Ran], tmp_path: Path, tiny_llama: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert train("run", "--quantize", "fp8", "--no-calibrate", "--max-steps", 4).code == 0
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = PeftModel.from_pretrained(base, str(tmp_path / "run"))
    assert all(parameter.dtype is torch.float32 for name, parameter in model.named_parameters() if "lora_" in name)
    for precision in ("16bit", "as-trained"):
        output = tmp_path / precision
        assert cli("merge", tmp_path / "run", "--output", output, "--base-precision", precision).code == 0
    plain, rounded = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("16bit", "as-trained"))
    merged = model.merge_and_unload()
    for name, weight in merged.state_dict().items():
        assert torch.allclose(plain.state_dict()[name], weight, atol=1e-6)
    changed = plain.model.layers[0].mlp.up_proj.weight - rounded.model.layers[0].mlp.up_proj.weight
    largest = base.model.layers[0].mlp.up_proj.weight.abs().max()
    assert 0 < changed.abs().max() <= largest / 28 * 1.01  # half of what lies between two numbers of 8 bits


@pytest.mark.parametrize("quantize", ["fp8", "int8"])
def test_a_base_with_nan_is_refused_before_the_first_step(quantize: str, train: Train, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from tests.conftest import make_llama

    folder = make_llama(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ran = train("run", "--quantize", quantize, "--engine", "fast", model=folder)
    assert ran.code == 8
    assert "error: model.layers.1.mlp.up_proj: found NaN or infinity in the base's weights, need numbers" in ran.err
    assert "hint: download the model again" in ran.err
    assert not list(tmp_path.glob("run/checkpoints/*"))


@pytest.mark.parametrize("quantize", ["fp8", "int8"])
def test_lengths_of_dora_arent_those_of_codes(
    quantize: str, train: Train, cli: Callable[..., Ran], tmp_path: Path
) -> None:
    assert train("dora", "--use-dora", "--max-steps", 1).code == 0
    ran = cli("chat", tmp_path / "dora", "--quantize", quantize, "--prompt", "x")
    assert ran.code == 3
    assert f"error: --quantize {quantize}: found the DoRA adapter" in ran.err
    assert "hint: --quantize nf4, or leave it out" in ran.err
