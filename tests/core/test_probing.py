"""One layer, run: the probe agrees with what is counted here, and corrects what isn't."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.core import probing
from lorakit.core.quantization import Quantizing, quantized
from tests.conftest import Ran, make_llama

Cli = Callable[..., Ran]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A model of real proportions, of which only the config is read."""
    return make_llama(tmp_path / "tiny", hidden_size=128, intermediate_size=384, num_hidden_layers=4)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--quantize", "nf4", "--dtype", "bf16"),
        ("--quantize", "int8", "--no-gradient-checkpointing"),
        ("--attention", "sdpa", "--rank", 8),
    ],
    ids=str,
)
def test_the_probe_finds_what_is_counted(options: tuple[object, ...], cli: Cli, tiny: Path) -> None:
    """Measured by torch's allocator on this CPU: within 4 %, an operation's inner copies included; int8 is counted with
    its quantization of activations, which a CPU leaves out."""
    ran = cli("plan-devices", tiny, "--cpu", "8GiB", "--block-size", 256, *options, "--probe", "--json")
    assert ran.code == 0, ran.err
    probed = ran.json["probed"]
    assert probed["tokens"] == [128, 256]
    assert probed["factor"] == pytest.approx(1, abs=0.04)
    assert probed["factor"] == probed["measured_bytes"][1] / probed["planned_bytes"][1]


def test_what_is_measured_corrects_everything(cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("plan-devices", tiny, "--cpu", "8GiB", "--block-size", 256, "--json")
    before = cli(*command).json
    counted = cli(*command, "--probe").json["probed"]["planned_bytes"]
    measured = iter([2 * size for size in counted])
    monkeypatch.setattr(probing, "_step_bytes", lambda *_: next(measured))
    after = cli(*command, "--probe", "--compare").json
    [one], [other] = before["devices"], after["devices"]
    comes_and_goes = ("activations", "loss", "slack")
    assert {name: other["bytes"][name] for name in comes_and_goes} == {
        name: 2 * one["bytes"][name] for name in comes_and_goes
    }
    assert all(other["bytes"][name] == one["bytes"][name] for name in one["bytes"] if name not in comes_and_goes)
    assert after["probed"]["factor"] == 2
    assert after["probed"]["moved_bytes"] == after["peak_bytes"] - before["peak_bytes"] > 0
    assert after["compared"][0]["peak_bytes"] == after["peak_bytes"]


def test_another_kind_of_device_than_the_plans_is_refused(cli: Cli, tiny: Path) -> None:
    ran = cli("plan-devices", tiny, "--gpus", "24GiB", "--probe")
    assert ran.code == 11
    assert "--probe: found a CPU here, need a GPU, which is planned for" in ran.err


def test_a_layer_that_doesnt_fit_is_out_of_memory(cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(probing, "_step_bytes", full)
    ran = cli("plan-devices", tiny, "--cpu", "8GiB", "--probe")
    assert ran.code == 9
    assert "need room for one layer" in ran.err


@pytest.mark.parametrize("quantize", ["int8", "nf4", "fp4"])
def test_a_layer_quantized_in_place_computes_what_a_loaded_one_does(quantize: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = make_llama(tmp_path / "model", attention_bias=True)
    four_bits = {"load_in_4bit": True, "bnb_4bit_quant_type": quantize, "bnb_4bit_use_double_quant": True}
    how: dict[str, Any] = {"load_in_8bit": True} if quantize == "int8" else four_bits
    options = {"quantization_config": BitsAndBytesConfig(**how), "device_map": {"": "cpu"}}
    loaded = AutoModelForCausalLM.from_pretrained(folder, **options).model.layers[0].self_attn.q_proj
    plain = AutoModelForCausalLM.from_pretrained(folder).model.layers[0].self_attn.q_proj
    made = quantized(plain, Quantizing(quantize, torch.float32)).train()
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(made(inputs), loaded.train()(inputs))
    assert type(made) is type(loaded)
    assert made.weight.nbytes == loaded.weight.nbytes
