"""What was written is read back: any wrong number, wherever it comes from, is found before the model is in place."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lorakit.core import disk, merging
from lorakit.core.adapters import LoraPair, match
from lorakit.core.merging.apply import Computed
from lorakit.core.merging.plan import Plan, Target
from tests.conftest import Ran, make_llama
from tests.core.merging.adapted import LISTED, make_adapter

Cli = Callable[..., Ran]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("bases") / "base", dtype=torch.bfloat16)


def found_out(cli: Cli, tmp_path: Path, adapter: Path, words: str) -> None:
    """Asserts that a merge fails on what it wrote, and leaves nothing."""
    before = sorted(tmp_path.rglob("*"))
    ran = cli("merge", adapter, "--output", tmp_path / "merged")
    assert ran.code == 4, ran.err
    assert words in ran.err
    assert "nothing was put in place" in ran.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["plain", "rslora", "dora", "embedding", "dora on the embedding"])
@pytest.mark.parametrize("factor", [0.9, 1.02, -1.0])
def test_a_wrong_scale(
    kind: str, factor: float, cli: Cli, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, **LISTED[kind])

    def wrong(*arguments: Any) -> Any:
        return [
            replace(change, scale=change.scale * factor) if isinstance(change, LoraPair) else change
            for change in match(*arguments)
        ]

    monkeypatch.setattr(merging, "match", wrong)
    found_out(cli, tmp_path, adapter, "of the sample differ")


def test_a_pair_that_was_lost(cli: Cli, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    right = Computed.__init__

    def forgetful(self: Computed, target: Target) -> None:
        lost = target.name == "model.layers.1.mlp.gate_proj.weight"
        right(self, replace(target, terms=()) if lost else target)

    monkeypatch.setattr(Computed, "__init__", forgetful)
    found_out(cli, tmp_path, adapter, "model.layers.1.mlp.gate_proj.weight: found")


@pytest.mark.parametrize("kind", ["tokens", "modules to save", "bias of LoRA's"])
def test_what_is_replaced_or_shifted(
    kind: str, cli: Cli, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "bias of LoRA's":
        base = make_llama(tmp_path / "base", attention_bias=True)
    adapter = make_adapter(tmp_path / "adapter", base, **LISTED[kind])
    right = Computed.__init__

    def forgetful(self: Computed, target: Target) -> None:
        right(self, replace(target, rows=(), shifts=(), source=target.in_base or target.source))

    monkeypatch.setattr(Computed, "__init__", forgetful)
    if kind == "modules to save":  # copied, not computed
        monkeypatch.setattr(Target, "computed", True)
    found_out(cli, tmp_path, adapter, "of the sample differ")


def test_numbers_rounded_twice_or_down(cli: Cli, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.core.merging import apply

    adapter = make_adapter(tmp_path / "adapter", base)

    def cut_off(values: Any, dtype: str, out: Any, scratch: Any) -> bool:
        out.view(np.uint16)[:] = values.reshape(-1).view(np.uint32) >> 16
        return True

    monkeypatch.setattr(apply, "narrowed", cut_off)
    found_out(cli, tmp_path, adapter, "of the sample differ")


def test_a_disk_that_doesnt_keep_what_it_was_given(
    cli: Cli, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    right = disk.write_new

    def lossy(path: Path, content: disk.Content) -> Any:
        described = right(path, content)
        if path.name == "model.safetensors":
            with path.open("r+b") as file:
                file.seek(-30_000, 2)
                file.write(b"\x11\x77" * 15_000)
        return described

    monkeypatch.setattr(disk, "write_new", lossy)
    found_out(cli, tmp_path, adapter, "model.safetensors")


def test_the_largest_difference_is_that_of_rounding(cli: Cli, base: Path, tmp_path: Path) -> None:
    """At most half a place of the largest numbers, and no less than rounding at all costs."""
    adapter = make_adapter(tmp_path / "adapter", base)
    ran = cli("merge", adapter, "--output", tmp_path / "merged", "--json")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    largest = max(float(tensor.abs().max()) for name, tensor in merged.items() if "_proj" in name)
    assert 0 < ran.json["max_difference"] <= largest * 2.0**-8
    wide = cli("merge", adapter, "--output", tmp_path / "wide", "--dtype", "fp32", "--json")
    assert wide.json["max_difference"] < ran.json["max_difference"] / 1000


def test_every_changed_tensor_is_read(cli: Cli, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.core.merging import verifying

    adapter = make_adapter(tmp_path / "adapter", base)
    read: list[str] = []
    right = verifying._sample

    def noted(target: Target) -> list[int]:
        read.append(target.name)
        return right(target)

    monkeypatch.setattr(verifying, "_sample", noted)
    seen: list[Plan] = []
    monkeypatch.setattr(
        merging, "verify_rows", lambda plan, folder: seen.append(plan) or verifying.verify_rows(plan, folder)
    )
    assert cli("merge", adapter, "--output", tmp_path / "merged").code == 0
    assert read == [target.name for target in seen[0].changed]
    assert len(read) == 14
