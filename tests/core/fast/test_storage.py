"""What frozen matrices are stored in: codes against their definition, and bitsandbytes' own numbers."""

import bitsandbytes as bnb
import numpy as np
import pytest
import torch

from lorakit.core.fast.storage import FP8, FrozenLinear, exact, rows_to_codes, store
from lorakit.core.quantization import Quantizing, quantized


def linear(outputs: int, inputs: int, *, bias: bool = False, seed: int = 0) -> torch.nn.Linear:
    torch.manual_seed(seed)
    made = torch.nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        made.weight.mul_(torch.logspace(-2, 1, outputs)[:, None])  # rows of very different sizes
    return made


def every_fp8() -> np.ndarray:
    """The numbers of float8_e4m3fn by its definition: a sign, 4 bits of exponent less 7, 3 of fraction; no infinity."""
    codes = np.arange(256)
    exponent, fraction = codes >> 3 & 15, codes & 7
    size = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7.0))
    size[(exponent == 15) & (fraction == 7)] = np.nan
    return np.where(codes >> 7, -size, size)


def test_a_row_of_fp8_is_rounded_to_the_nearest_number_that_there_is() -> None:
    weight = linear(24, 40).weight
    codes, scale = rows_to_codes(weight, "fp8")
    values = weight.detach().double().numpy()
    assert scale.numpy() == pytest.approx(np.abs(values).max(1) / 448, rel=1e-6)
    scaled, there_are = values / scale.double().numpy()[:, None], every_fp8()
    nearest = np.nanmin(np.abs(scaled[..., None] - there_are), axis=-1)
    assert np.abs(codes.double().numpy() - scaled) == pytest.approx(nearest, rel=1e-4, abs=1e-5)


def test_a_row_of_int8_is_that_of_llm_int8() -> None:
    weight = linear(24, 40).weight
    codes, scale = rows_to_codes(weight, "int8")
    other, largest, _ = bnb.functional.int8_vectorwise_quant(weight.detach().half())
    assert torch.equal(codes, other)
    found = exact([codes, scale], "int8", [24], 40, torch.float32)
    assert torch.allclose(found, bnb.functional.int8_vectorwise_dequant(other, largest), rtol=1e-6)


def test_a_row_of_zeros_is_zeros() -> None:
    weight = torch.zeros(2, 16)
    for kind in ("fp8", "int8"):
        codes, scale = rows_to_codes(weight, kind)
        assert torch.isfinite(scale).all()
        assert not exact([codes.view(torch.int8), scale], kind, [2], 16, torch.float32).any()


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bit_layers_side_by_side_are_what_bitsandbytes_makes_of_each(kind: str, double: bool) -> None:
    layers = [quantized(linear(size, 128, seed=size), Quantizing(kind, torch.float32, double)) for size in (64, 32, 96)]
    stored = store(layers)
    assert stored.ends == [64, 96, 192]
    found = exact(stored.tensors, stored.kind, stored.ends, 128, torch.float32)
    wanted = [bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state) for layer in layers]
    assert torch.equal(found, torch.cat(wanted))


@pytest.mark.parametrize("kind", ["plain", "fp8", "int8"])
def test_rows_of_layers_lie_in_one_piece_and_stay_theirs(kind: str) -> None:
    plain = [linear(size, 32, seed=size) for size in (16, 8, 8)]
    before = [layer.weight.detach().clone() for layer in plain]
    layers = plain if kind == "plain" else [FrozenLinear(layer, kind) for layer in plain]
    codes = [layer.weight.detach().clone() for layer in layers]
    stored = store(layers)
    assert stored.kind == kind
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 1
    assert all(torch.equal(layer.weight, code) for layer, code in zip(layers, codes, strict=True))
    found = exact(stored.tensors, kind, stored.ends, 32, torch.float32)
    assert torch.allclose(
        found, torch.cat(before), atol=0 if kind == "plain" else 0.04 * float(torch.cat(before).max())
    )


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_a_frozen_layer_is_the_layer_with_its_numbers_rounded(kind: str) -> None:
    plain, x = linear(24, 48, bias=True), torch.randn(3, 5, 48)
    frozen = FrozenLinear(plain, kind)
    assert frozen.weight.dtype is torch.int8  # a float would make PEFT's matrices as coarse as it is
    assert not frozen.weight.requires_grad
    codes, scale = rows_to_codes(plain.weight, kind)
    weight = codes.float() * scale[:, None]
    assert torch.allclose(frozen(x), torch.nn.functional.linear(x, weight, plain.bias), atol=1e-6)
    assert codes.dtype is (FP8 if kind == "fp8" else torch.int8)
