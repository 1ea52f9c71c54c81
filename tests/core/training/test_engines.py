"""Runs on either engine: that a run says which, keeps it, and leaves an adapter as any other."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.core import engines, training
from lorakit.core.training import loop
from tests.conftest import Ran, make_llama, make_tokenizer
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


# What is refused before the first step


@pytest.mark.parametrize("quantize", ["fp8", "int8", "nf4", "none"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_base_with_what_is_no_number_is_refused_before_anything_is_learned(
    quantize: str, value: float, train: Train, tmp_path: Path
) -> None:
    """Rounded to few bits it would become a number like any other; in 16 it comes out in the first loss."""
    folder = make_llama(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ran = train("run", "--quantize", quantize, "--engine", "fast", model=folder)
    assert ran.code == 8
    if quantize != "none":
        name = "model.layers.1.mlp.up_proj.weight"
        assert f"error: {name}: found NaN or infinity in the base's weights, need numbers" in ran.err
        assert "hint: download the model again" in ran.err
    else:
        assert "error: step 1: found loss nan and gradient norm nan" in ran.err
    assert not list(tmp_path.glob("run/checkpoints/*"))


@pytest.mark.parametrize("quantize", ["fp8", "int8", "none"])
@pytest.mark.parametrize("of", ["the index", "index and shards"])
def test_a_base_that_lacks_a_layers_weights_is_refused(of: str, quantize: str, train: Train, tmp_path: Path) -> None:
    """What isn't in the files is never drawn at random."""
    folder = make_llama(tmp_path / "model", max_shard_size="60KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    gone = [name for name in content["weight_map"] if name.startswith("model.layers.1.mlp.")]
    shards = {content["weight_map"].pop(name) for name in gone}
    index.write_text(json.dumps(content))
    if of == "index and shards":
        for shard in (folder / name for name in shards):
            kept = {name: tensor for name, tensor in load_file(shard).items() if name not in gone}
            save_file(kept, shard, metadata={"format": "pt"})
    ran = train("run", "--quantize", quantize, "--engine", "fast", model=folder)
    assert ran.code == (3 if of == "index and shards" else 4)
    if of == "index and shards":
        assert "found weights without model.layers.1.mlp.down_proj.weight (3 such), need every tensor" in ran.err
    else:
        assert "found an index that names other tensors than its shards hold" in ran.err
    assert "hint: " in ran.err
    assert not list(tmp_path.glob("run/checkpoints/*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--quantize", "fp8"), "--quantize fp8: found that A card has no 8-bit floats (compute capability 8.9)"),
        (("--engine", "fast"), "--engine fast: found that triton isn't installed"),
    ],
)
def test_a_card_that_cant_is_named_before_anything_is_loaded(
    options: tuple[str, ...], words: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = {"get_device_capability": (8, 6), "get_device_name": "A card", "is_bf16_supported": True}
    for name, answer in card.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    monkeypatch.setattr(training, "pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(loop, "load_base", None)
    ran = train("run", *options)
    assert ran.code == 11
    assert f"error: {words}; need what the fast engine can do" in ran.err
    assert "hint: change that" in ran.err


@pytest.mark.parametrize("rank", [1, 20])
def test_a_rank_of_any_size_is_learned_as_it_is(rank: int, train: Train, tmp_path: Path) -> None:
    """Sixteens are the fast engine's own affair: what it fills up is in no file."""
    for engine in ("standard", "fast"):
        assert train(engine, "--engine", engine, "--rank", rank, "--max-steps", 4).code == 0
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "standard"), rel=1e-5)
    fast, standard = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("fast", "standard"))
    assert {tensor.shape[0] for name, tensor in fast.items() if "lora_A" in name} == {rank}
    for name, tensor in fast.items():
        assert torch.allclose(tensor, standard[name], atol=2e-5), name


def test_documents_beyond_what_a_model_was_made_for_are_said(
    train: Train, cli: Callable[..., Ran], tmp_path: Path
) -> None:
    """Their angles go on, alike in both engines; long blocks of short documents are nothing to say."""
    folder, rows = make_llama(tmp_path / "short", max_position_embeddings=64), tmp_path / "long.jsonl"
    rows.write_text(json.dumps({"prompt": "x" * 40, "completion": "y" * 60}) + "\n")
    given = ("prepare", rows, "--template", "none", "--tokenizer", folder, "--block-size", 128)
    assert cli(*given, "--output", tmp_path / "long").code == 0
    for engine in ("fast", "standard"):
        ran = train(engine, "--engine", engine, "--max-steps", 2, model=folder, data=tmp_path / "long")
        assert ran.code == 0
        assert "documents of up to 101 tokens: more than the 64 that the model was made for" in ran.err
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "standard"), rel=1e-5)
    rows.write_text('{"prompt": "x", "completion": "y"}\n')
    assert cli(*given, "--output", tmp_path / "many").code == 0
    ran = train("other", "--max-steps", 1, model=folder, data=tmp_path / "many")
    assert ran.code == 0
    assert "made for" not in ran.err


def test_more_positions_than_a_model_has_are_refused(train: Train, cli: Callable[..., Ran], tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder, rows = tmp_path / "gpt2", tmp_path / "long.jsonl"
    config = GPT2Config(vocab_size=320, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(folder)
    make_tokenizer(folder)
    rows.write_text(json.dumps({"prompt": "x" * 40, "completion": "y" * 60}) + "\n")
    given = ("prepare", rows, "--tokenizer", folder, "--block-size", 128, "--output", tmp_path / "long")
    assert cli(*given, "--template", "none").code == 0
    ran = train("run", "--max-steps", 1, model=folder, data=tmp_path / "long")
    assert ran.code == 3
    assert f"error: {tmp_path / 'long'}: found 101 tokens in a row, need at most 64" in ran.err
    assert "hint: `lorakit prepare … --block-size 64`" in ran.err
    assert cli("evaluate", folder, "--blocks", tmp_path / "long").code == 3


@pytest.mark.parametrize("quantize", ["fp8", "int8"])
def test_lengths_of_dora_arent_those_of_codes(
    quantize: str, train: Train, cli: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("dora", "--use-dora", "--max-steps", 1).code == 0
    ran = cli("chat", tmp_path / "dora", "--quantize", quantize, "--prompt", "x")
    assert ran.code == 3
    assert f"error: --quantize {quantize}: found the DoRA adapter" in ran.err
    assert "hint: --quantize nf4, or leave it out" in ran.err
    monkeypatch.setattr(loop, "load_base", lambda *_, **__: pytest.fail("the base is loaded"))
    for dora in (("--use-dora",), ("--adapter", tmp_path / "dora")):
        ran = train("run", "--max-steps", 1, "--quantize", quantize, *dora)
        assert ran.code == 3
        found = "--use-dora" if dora[0] == "--use-dora" else f"the DoRA adapter {tmp_path / 'dora'}"
        assert f"error: --quantize {quantize}: found {found}, need a base" in ran.err
