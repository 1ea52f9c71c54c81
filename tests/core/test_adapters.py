"""Adapters as peft writes them: every kind that it loads exactly is opened, and talked with, on its base."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from lorakit.core.adapters import match, open_adapter
from lorakit.core.model import open_model
from lorakit.core.weights import open_weights
from tests.conftest import Ran, make_llama
from tests.core.merging.adapted import BIASED, LISTED, TIED, adapted, logits, make_adapter

Cli = Callable[..., Ran]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "plain": make_llama(folder / "plain"),
        "tied": make_llama(folder / "tied", tie_word_embeddings=True),
        "biased": make_llama(folder / "biased", attention_bias=True, mlp_bias=True),
    }


@pytest.mark.parametrize(("over", "kind"), [*(("plain", kind) for kind in LISTED), *(("tied", kind) for kind in TIED)])
def test_a_model_to_talk_with_is_pefts_own(over: str, kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["biased" if kind in BIASED else over]
    config = (LISTED if over == "plain" else TIED)[kind]
    adapter = make_adapter(tmp_path / "adapter", base, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = open_model(str(adapter), str(base), "fp32", lambda event: None)
    torch.testing.assert_close(logits(opened.model), logits(adapted(base, adapter)), rtol=1e-5, atol=1e-5)
    if opened.kept_on is None:  # switched off, it leaves the base as it was
        with opened.model.disable_adapter():
            rows = AutoModelForCausalLM.from_pretrained(base).config.vocab_size
            alone = logits(AutoModelForCausalLM.from_pretrained(base))
            switched_off = logits(opened.model)[..., :rows]
            torch.testing.assert_close(switched_off, alone[..., : switched_off.shape[-1]], rtol=1e-5, atol=1e-5)
    else:
        assert kind == "bias"
    assert opened.adapter is not None
    assert opened.adapter.vocabulary == config.get("resized", opened.adapter.vocabulary)


@pytest.mark.parametrize("kind", LISTED)
def test_every_tensor_of_an_adapter_is_used_once(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["biased" if kind in BIASED else "plain"]
    adapter = open_adapter(make_adapter(tmp_path / "adapter", base, **LISTED[kind]), lambda event: None)
    used: list[str] = []
    for change in match(adapter, open_weights(base)):
        fields = vars(change)
        used += [fields[key] for key in ("name", "name_a", "name_b", "magnitude") if fields.get(key)]
    copies = [name for name in adapter.tensors if ".original_module." in name or ".modules_to_save." in name]
    assert sorted([*used, *copies]) == sorted(adapter.tensors)


def test_ranks_and_scales_are_pefts(bases: dict[str, Path], tmp_path: Path) -> None:
    """Patterns match a module's whole name or its end, and the first that matches counts."""
    config = {
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 3, "o_pro.": 5, "proj": 7},
        "alpha_pattern": {"v_proj": 9.5, r"model\.layers\.1\..*": 4},
    }
    for use_rslora in (False, True):
        folder = make_adapter(tmp_path / f"{use_rslora}", bases["plain"], use_rslora=use_rslora, **config)
        adapter = open_adapter(folder, lambda event: None)
        checked = 0
        for name, module in adapted(bases["plain"], folder).base_model.model.named_modules():
            if isinstance(module, LoraLayer):
                assert adapter.rank(name) == module.r["default"], name
                assert adapter.scale(name) == module.scaling["default"], name
                checked += 1
        assert checked == 14


def test_chat_and_evaluate_take_an_adapter_with_a_longer_vocabulary(
    cli: Cli, bases: dict[str, Path], rows_file: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", bases["tied"], **TIED["longer vocabulary and tokens"])
    assert cli("chat", adapter, "--prompt", "a", "--max-new-tokens", 3).code == 0
    line = ("prepare", rows_file, "--tokenizer", bases["tied"], "--block-size", 64, "--output", tmp_path / "blocks")
    assert cli(*line).code == 0
    assert cli("merge", adapter, "--output", tmp_path / "merged").code == 0
    losses = [
        cli("evaluate", model, "--blocks", tmp_path / "blocks", "--json").json["loss"]
        for model in (adapter, tmp_path / "merged")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
