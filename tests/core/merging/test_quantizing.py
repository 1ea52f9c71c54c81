"""A base's numbers through quantization and back, in pieces: bit for bit those of bitsandbytes on the whole tensor."""

from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import save_file

from lorakit.core.floats import Scratch
from lorakit.core.merging import plan
from lorakit.core.merging.plan import Rounding, Stored
from lorakit.core.merging.quantizing import there_and_back
from lorakit.core.weights import read_header

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def stored(tensor: torch.Tensor, folder: Path) -> Stored:
    save_file({"w": tensor}, folder / "w.safetensors")
    return Stored(folder / "w.safetensors", read_header(folder / "w.safetensors")["w"])


def whole(tensor: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """What a layer of bitsandbytes computes with. In 4 bits as one long row: on a CPU it (0.50.2) scales rows wrongly
    that aren't whole blocks long."""
    if rounding.kind == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(tensor.to(torch.float16))
        return codes.float() * scales[:, None] / 127
    flat = tensor.to(DTYPES[rounding.dtype]).reshape(-1)
    packed, state = functional.quantize_4bit(flat, blocksize=64, compress_statistics=True, quant_type=rounding.kind)
    return functional.dequantize_4bit(packed, state).float().reshape(tensor.shape)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(96, 64), (70, 96), (33, 50), (5, 7), (400, 1280)], ids=str)
def test_every_row_is_what_bitsandbytes_has(
    kind: str, dtype: str, shape: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "CHUNK_ELEMENTS", 1000)  # so that these are many pieces
    torch.manual_seed(shape[0])
    tensor = torch.randn(shape).mul_(torch.rand(shape[0], 1)).to(DTYPES[dtype])
    rounding = Rounding(kind, dtype)
    expected = whole(tensor, rounding).numpy()
    rows = there_and_back(stored(tensor, tmp_path), rounding)
    tolerance = 1e-6 if kind == "int8" else 0  # times 1/127 there, divided by 127 here
    for start, stop in [(0, shape[0]), (1, 3), (shape[0] - 1, shape[0]), (2, 5)]:
        found = rows(start, stop, Scratch())
        np.testing.assert_allclose(found, expected[start:stop], rtol=tolerance, atol=0)
    assert not np.array_equal(expected, tensor.float().numpy())


def test_without_a_rounding_the_numbers_are_the_bases(tmp_path: Path) -> None:
    tensor = torch.randn(6, 10).to(torch.bfloat16)
    rows = there_and_back(stored(tensor, tmp_path), None)
    np.testing.assert_array_equal(rows(2, 5, Scratch()), tensor.float().numpy()[2:5])
