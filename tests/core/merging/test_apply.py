"""The numbers of a merged model: peft's own for every kind of adapter, and bit by bit those of a plain reference."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorakit.core.merging import plan
from lorakit.core.weights import read_header
from tests.conftest import Ran, make_llama
from tests.core.merging.adapted import BIASED, LISTED, STAY_TIED, TIED, adapted, logits, make_adapter

Cli = Callable[..., Ran]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "plain": make_llama(folder / "plain", max_shard_size="100KB"),
        "tied": make_llama(folder / "tied", tie_word_embeddings=True),
        "biased": make_llama(folder / "biased", attention_bias=True, mlp_bias=True),
    }


def merged_by(cli: Cli, folder: Path, *arguments: object) -> Any:
    ran = cli("merge", *arguments, "--output", folder, "--json")
    assert ran.code == 0, ran.err
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(loaded[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@pytest.mark.parametrize("kind", LISTED)
def test_every_tensor_is_what_peft_makes_of_it(kind: str, cli: Cli, bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["biased" if kind in BIASED else "plain"]
    adapter = make_adapter(tmp_path / "adapter", base, **LISTED[kind])
    model = merged_by(cli, tmp_path / "merged", adapter)
    theirs = adapted(base, adapter)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-4)
    expected, found = theirs.merge_and_unload().state_dict(), model.state_dict()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert any(not torch.equal(found[name], before[name]) for name in found)
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0]


@pytest.mark.parametrize("kind", TIED)
def test_over_a_tied_head_the_answers_are_those_of_base_and_adapter(
    kind: str, cli: Cli, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Not of peft's merged model: that puts what belongs to the head or the embedding alone into both."""
    adapter = make_adapter(tmp_path / "adapter", bases["tied"], **TIED[kind])
    model = merged_by(cli, tmp_path / "merged", adapter)
    torch.testing.assert_close(logits(model), logits(adapted(bases["tied"], adapter)), rtol=1e-4, atol=1e-4)
    assert model.config.tie_word_embeddings == (kind in STAY_TIED)
    names = set(load_file(tmp_path / "merged" / "model.safetensors"))
    assert ("lm_head.weight" in names) == (kind not in STAY_TIED)


def plain_reference(base: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """W + scale · B·A in fp32, rounded once, the whole tensor at a time."""
    change = (b.numpy().astype(np.float32) @ a.numpy().astype(np.float32)) * np.float32(scale)
    return torch.from_numpy(base.float().numpy() + change).to(base.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True, "r": 5, "rank_pattern": {"k_proj": 3}}], ids=["plain", "rs"]
)
def test_bit_by_bit_the_plain_reference_and_the_base(
    dtype: torch.dtype, config: dict[str, Any], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of a few rows, over several shards: not a bit depends on either."""
    monkeypatch.setattr(plan, "CHUNK_ELEMENTS", 700)
    base = make_llama(tmp_path / "base", dtype=dtype, max_shard_size="60KB")
    adapter = make_adapter(tmp_path / "adapter", base, **{"lora_alpha": 7, **config})
    ran = cli("merge", adapter, "--output", tmp_path / "merged", "--json")
    assert ran.code == 0, ran.err
    lora = load_file(adapter / "adapter_model.safetensors")
    changed = 0
    for shard in sorted(path.name for path in base.glob("*.safetensors")):
        before, after = load_file(base / shard), load_file(tmp_path / "merged" / shard)
        places = [read_header(folder / shard) for folder in (base, tmp_path / "merged")]
        assert places[0] == places[1]
        start = min(place.start for place in places[0].values())
        assert (base / shard).read_bytes()[:start] == (tmp_path / "merged" / shard).read_bytes()[:start]
        for name, tensor in after.items():
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"
            if key not in lora:
                assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
                continue
            a, b = lora[key], lora[key.replace("lora_A", "lora_B")]
            scale = 7 / (math.sqrt(len(a)) if config else len(a))
            expected = plain_reference(before[name], a, b, scale)
            assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8)), name
            assert not torch.equal(tensor, before[name])
            changed += 1
    assert (changed, ran.json["merged_tensors"]) == (14, 14)


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_another_number_type_is_rounded_to_once(name: str, cli: Cli, tmp_path: Path) -> None:
    """Not by way of the base's type."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    base = make_llama(
        tmp_path / "base", dtype=torch.bfloat16 if name != "bf16" else torch.float32, max_shard_size="60KB"
    )
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    assert cli("merge", adapter, "--output", tmp_path / "merged", "--dtype", name).code == 0
    before, lora = load_all(base), load_all(adapter)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    for key, tensor in load_all(tmp_path / "merged").items():
        assert tensor.dtype == dtype
        a = lora.get(f"base_model.model.{key.removesuffix('.weight')}.lora_A.weight")
        expected = before[key].float()
        if a is not None:
            b = lora[f"base_model.model.{key.removesuffix('.weight')}.lora_B.weight"]
            expected = plain_reference(before[key].float(), a, b, 2.0)
        assert torch.equal(tensor, expected.to(dtype)), key
    sizes = [tensor.numel() * tensor.element_size() for tensor in load_all(tmp_path / "merged").values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert model.dtype == dtype


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_gpt2s_linear_layers_lie_the_other_way_round(cli: Cli, tmp_path: Path) -> None:
    """Also those with a square weight, whose shape doesn't tell; and DoRA over them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = tmp_path / "base"
    GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=512, n_embd=64, n_layer=2, n_head=4)).save_pretrained(base)
    for number, use_dora in enumerate((False, True)):
        config = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": use_dora}
        adapter = make_adapter(tmp_path / f"adapter{number}", base, **config)
        model = merged_by(cli, tmp_path / f"merged{number}", adapter)
        expected = adapted(base, adapter).merge_and_unload().state_dict()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


def test_several_adapters_are_added_up_with_their_weights(cli: Cli, bases: dict[str, Path], tmp_path: Path) -> None:
    """Also of other ranks, on other modules, and with a weight below zero; peft's own sum of them is the reference."""
    base = bases["plain"]
    made = [
        make_adapter(tmp_path / "a:1", base, seed=2, r=2),  # a name with a colon is a name
        make_adapter(tmp_path / "b", base, seed=3, r=5, target_modules=["q_proj", "embed_tokens"], use_rslora=True),
        make_adapter(tmp_path / "c", base, seed=4, target_modules=["q_proj", "lm_head"]),
    ]
    weights = (1.0, 0.7, -0.3)
    model = merged_by(cli, tmp_path / "merged", made[0], f"{made[1]}:0.7", f"{made[2]}:-0.3")
    expected = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for adapter, weight in zip(made, weights, strict=True):
        before = AutoModelForCausalLM.from_pretrained(base).state_dict()
        alone = adapted(base, adapter).merge_and_unload().state_dict()
        for name in expected:
            expected[name] += weight * (alone[name] - before[name])
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)
    again = cli("merge", made[0], f"{made[1]}:0.7", f"{made[2]}:-0.4", "--output", tmp_path / "merged")
    assert again.code == 5
    assert "adapter 3: found" in again.err
    assert "× -0.4" in again.err


def test_a_script_that_never_merges_writes_the_base_and_this_doesnt(
    cli: Cli, bases: dict[str, Path], tmp_path: Path
) -> None:
    """A well-known recipe takes the LoRA layers out again without adding them: its output is the base, byte by byte.
    What is written here differs from that by scale · B·A, in the layers that were trained and nowhere else."""
    base = bases["plain"]
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "v_proj"])
    adapted(base, adapter).unload().save_pretrained(tmp_path / "unmerged")
    before, unmerged = load_all(base), load_all(tmp_path / "unmerged")
    assert all(torch.equal(unmerged[name], tensor) for name, tensor in before.items())
    assert cli("merge", adapter, "--output", tmp_path / "merged").code == 0
    merged, lora = load_all(tmp_path / "merged"), load_all(adapter)
    differing = {name for name, tensor in merged.items() if not torch.equal(tensor, before[name])}
    assert differing == {name for name in before if "q_proj" in name or "v_proj" in name}
    for name in differing:
        a, b = (lora[f"base_model.model.{name.removesuffix('weight')}lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(merged[name] - before[name], 2.0 * b @ a, rtol=1e-4, atol=1e-6)
        assert float((merged[name] - before[name]).abs().max()) > 0.01


@pytest.mark.parametrize("kind", ["plain", "head", "embedding", "tokens", "longer vocabulary"])
@pytest.mark.parametrize("same", [True, False], ids=["the same numbers", "other numbers"])
def test_a_head_beside_a_tied_embedding(kind: str, same: bool, cli: Cli, tmp_path: Path) -> None:
    """Some bases hold one, though their config ties it: with the same numbers it is tied, with others it is not."""
    base = make_llama(tmp_path / "base", tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone() if same else torch.randn_like(embedding)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter = make_adapter(tmp_path / "adapter", base, **TIED[kind])
    if not same and kind != "plain":
        ran = cli("merge", adapter, "--output", tmp_path / "merged")
        assert ran.code == 3
        assert "tie_word_embeddings beside a head of other numbers" in ran.err
        return
    model = merged_by(cli, tmp_path / "merged", adapter)
    torch.testing.assert_close(logits(model), logits(adapted(base, adapter)), rtol=1e-4, atol=1e-4)
    assert model.config.tie_word_embeddings == (same and kind in STAY_TIED)
    if kind == "plain":
        assert torch.equal(load_all(tmp_path / "merged")["lm_head.weight"], tensors["lm_head.weight"])
