"""The numbers of a merged model: peft's own for every kind of adapter, and bit by bit those of a plain reference."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

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
