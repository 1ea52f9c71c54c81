"""`--verify full`: whole models' answers and losses, and that a wrong merge doesn't get past them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lorakit.core.merging import verifying
from lorakit.core.merging.apply import Computed
from tests.conftest import Ran, make_llama
from tests.core.merging.adapted import TIED, make_adapter

Cli = Callable[..., Ran]

TRAINING = ("--max-steps", 8, "--rank", 4, "--no-gradient-checkpointing", "--learning-rate", "0.02")


def test_the_answers_of_merged_and_of_base_and_adapter_are_compared(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_llama)
    ran = cli("merge", adapter, "--output", tmp_path / "merged", "--verify", "full", "--json")
    assert ran.code == 0, ran.err
    assert 0 < ran.json["logit_difference"] < 1e-4
    assert ran.json["losses"] is None
    shown = cli("merge", adapter, "--output", tmp_path / "merged", "--verify", "full")
    assert "(already done)" in shown.out, "asked for later, what was written is compared then"
    assert "between merged and base + adapter" in shown.out


@pytest.mark.parametrize("kind", ["head", "longer vocabulary", "saved and tied", "longer vocabulary and tokens"])
def test_every_kind_of_adapter_is_compared(kind: str, cli: Cli, tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", tie_word_embeddings=True, dtype=torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base, **TIED[kind])
    ran = cli("merge", adapter, "--output", tmp_path / "merged", "--verify", "full", "--json")
    assert ran.code == 0, ran.err
    assert 0 < ran.json["logit_difference"] < 0.5


def test_weighted_adapters_are_compared_with_their_weights(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    one, two = (make_adapter(tmp_path / f"{seed}", tiny_llama, seed=seed, r=seed) for seed in (2, 3))
    ran = cli("merge", f"{one}:0.7", f"{two}:-0.3", "--output", tmp_path / "merged", "--verify", "full", "--json")
    assert ran.code == 0, ran.err
    assert 0 < ran.json["logit_difference"] < 1e-4


def test_another_answer_is_never_put_in_place(
    cli: Cli, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of rows is taken away here."""
    adapter = make_adapter(tmp_path / "adapter", tiny_llama)
    right = Computed._added
    monkeypatch.setattr(Computed, "_added", lambda self, *where: right(self, *where) * 1.05)
    monkeypatch.setattr(verifying, "_half_a_place", lambda exact, dtype: 1.0)
    ran = cli("merge", adapter, "--output", tmp_path / "merged", "--verify", "full")
    assert ran.code == 4
    assert "merged logits that differ" in ran.err
    assert [path.name for path in tmp_path.iterdir() if "merged" in path.name] == []


def trained(cli: Cli, base: Path, rows_file: Path, folder: Path, quantize: str, *more: str) -> Path:
    blocks = cli(
        *("prepare", rows_file, "--tokenizer", base, "--block-size", 128, "--validation-split", 0.2),
        *("--output", folder / "blocks"),
    )
    assert blocks.code == 0, blocks.err
    ran = cli(
        *("train", "--model", base, "--blocks", folder / "blocks", "--output", folder / "run"),
        *("--quantize", quantize, *more, *TRAINING),
    )
    assert ran.code == 0, ran.err
    return folder / "run"


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_after_quantized_training_both_merges_are_measured(
    quantize: str, cli: Cli, rows_file: Path, tmp_path: Path
) -> None:
    base = make_llama(tmp_path / "base", intermediate_size=128)  # rows of whole blocks
    as_it_is = ("--no-calibrate",) if quantize == "nf4" else ()
    run = trained(cli, base, rows_file, tmp_path, quantize, *as_it_is)
    losses: dict[str, dict[str, float]] = {}
    for precision in ("16bit", "as-trained"):
        ran = cli(
            *("merge", run, "--output", tmp_path / precision, "--base-precision", precision),
            *("--verify", "full", "--json"),
        )
        assert ran.code == 0, ran.err
        losses[precision] = ran.json["losses"]
        assert ("--base-precision as-trained takes what training saw" in ran.err) == (precision == "16bit")
    names = [f"base in {quantize} + adapter", "merged, 16bit", "merged, as-trained"]
    assert sorted(losses["16bit"]) == sorted(losses["as-trained"]) == names
    for name in names:
        assert losses["16bit"][name] == pytest.approx(losses["as-trained"][name], rel=1e-3)
    trained_loss, plain, rounded = (losses["16bit"][name] for name in names)
    assert abs(rounded - trained_loss) < abs(plain - trained_loss)
    for precision in losses:  # what was printed is what the written model has
        found = cli("evaluate", tmp_path / precision, "--blocks", tmp_path / "blocks", "--json").json["loss"]
        assert found == pytest.approx(losses[precision][f"merged, {precision}"], rel=1e-4)
    tensors = [safetensors.torch.load_file(tmp_path / each / "model.safetensors") for each in losses]
    assert {name for name in tensors[0] if not torch.equal(tensors[0][name], tensors[1][name])} == {
        name for name in tensors[0] if "_proj" in name
    }


def test_how_an_adapter_without_a_manifest_was_trained_is_not_guessed(
    cli: Cli, tiny_llama: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_llama)
    ran = cli("merge", adapter, "--output", tmp_path / "merged", "--base-precision", "as-trained")
    assert ran.code == 3
    assert "without lorakit's manifest" in ran.err
    assert not (tmp_path / "merged").exists()


def test_what_was_found_is_kept_with_the_model(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_llama)
    ran = cli("merge", adapter, "--output", tmp_path / "merged", "--verify", "full", "--json")
    facts: dict[str, Any] = json.loads((tmp_path / "merged" / "lorakit.json").read_text())["facts"]
    assert facts["logit_difference"] == ran.json["logit_difference"]
