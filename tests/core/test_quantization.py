"""Linear layers and what they are quantized to: one at a time, whichever way round they lie, and never NaN."""

import weakref
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lorakit.core import quantization
from lorakit.core.errors import NonFinite
from lorakit.core.fast.storage import FrozenLinear, exact
from lorakit.core.quantization import Quantizing, quantize_layers, quantized, unquantized
from tests.live import LiveBytes

CPU = torch.device("cpu")


def llama(layers: int = 6) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 96}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", num_hidden_layers=layers, **sizes))


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_one_layer_in_16_bits_is_there_at_a_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, alive, most = llama(), weakref.WeakSet[torch.nn.Module](), [0]
    original = quantized

    def watched(linear: Any, *given: Any) -> torch.nn.Module:
        alive.add(linear)
        most.append(len(alive))
        return original(linear, *given)

    monkeypatch.setattr(quantization, "quantized", watched)
    quantize_layers(model, "", Quantizing(kind, torch.bfloat16, by_rows=kind == "fp8"), CPU)
    assert len(most) == 1 + 6 * 7
    assert max(most) <= 2, "the one before may not be gone yet"


def test_what_is_made_is_no_larger_than_its_codes_and_scales() -> None:
    model = llama(1)
    with LiveBytes() as live:
        quantize_layers(model, "", Quantizing("fp8", torch.float32, by_rows=True), CPU)
    numbers = 4 * 64 * 64 + 3 * 64 * 128
    rows = sum(module.out_features for module in model.modules() if isinstance(module, FrozenLinear))
    assert live.live <= numbers + 4 * rows + 8192


def test_what_isnt_quantized_of_experts_is_said_with_its_bytes() -> None:
    """Two layers of 8 experts, each of three matrices of 64 by 128 in 16 bits."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 96}
    config = AutoConfig.for_model("mixtral", num_hidden_layers=2, num_local_experts=8, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    quantize_layers(model, "", Quantizing("nf4", torch.bfloat16), CPU)
    said = unquantized(model)
    assert said is not None
    assert f"{2 * 8 * 3 * 64 * 128 * 2 / 2**20:.1f} MiB of the base stay in bfloat16" in said
    assert unquantized(llama(1)) is None


@pytest.mark.parametrize("kind", ["fp8", "nf4", "int8"])
def test_linear_layers_that_lie_the_other_way_round_are_quantized_too(kind: str) -> None:
    """GPT-2's."""
    config = AutoConfig.for_model("gpt2", vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config).eval()
    made = AutoModelForCausalLM.from_config(config).eval()
    made.load_state_dict(plain.state_dict())
    quantize_layers(made, "", Quantizing(kind, torch.float32, by_rows=kind == "fp8"), CPU)
    layer = made.transformer.h[0].attn.c_attn
    assert type(layer).__name__ == {"fp8": "FrozenLinear", "nf4": "Linear4bit", "int8": "Linear8bitLt"}[kind]
    if isinstance(layer, FrozenLinear):
        stored = exact([layer.weight, layer.scale], "fp8", [192], 64, torch.float32)
        assert torch.allclose(stored, plain.transformer.h[0].attn.c_attn.weight.t(), rtol=0.07, atol=1e-3)
    ids = torch.arange(20)[None]
    expected, found = plain(ids).logits, made(ids).logits
    assert (found - expected).norm() / expected.norm() < 0.2


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4", "fp4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_number_is_made_of_what_is_none(kind: str, bad: float) -> None:
    linear = torch.nn.Linear(64, 8)
    linear.weight.data[3, 5] = bad
    with pytest.raises(NonFinite, match=r"up_proj\.weight: found NaN or infinity"):
        quantized(linear, Quantizing(kind, torch.float32), "up_proj")


def test_int8_has_no_number_for_what_its_scales_in_fp16_cant_hold() -> None:
    linear = torch.nn.Linear(64, 8)
    linear.weight.data[3, 5] = 1e5
    for by_rows in (True, False):
        with pytest.raises(NonFinite, match="need numbers that int8 holds"):
            quantized(linear, Quantizing("int8", torch.float32, by_rows=by_rows))
    quantized(linear, Quantizing("fp8", torch.float32, by_rows=True))


def test_a_linear_layer_can_be_quantized_by_its_own_name() -> None:
    """As an entry of a device map."""
    model = llama(1)
    quantize_layers(model, "model.layers.0.mlp.up_proj", Quantizing("fp8", torch.float32, by_rows=True), CPU)
    made = [name for name, module in model.named_modules() if isinstance(module, FrozenLinear)]
    assert made == ["model.layers.0.mlp.up_proj"]


@pytest.mark.parametrize("double", [True, False])
def test_scales_of_4_bits_are_quantized_where_it_is_asked_for(double: bool) -> None:
    made: Any = quantized(torch.nn.Linear(256, 64), Quantizing("nf4", torch.float32, double))
    assert made.weight.quant_state.nested == double
