"""A base's numbers as a quantized base holds them: through bitsandbytes' quantization and back, some rows at a time.

4 bits (Dettmers et al. 2023): blocks of 64 numbers, each with its largest as a scale; the scales are quantized again,
less their mean, in blocks of 256. 8 bits (Dettmers et al. 2022): rows, each with its largest as a scale.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.core.floats import Scratch
from lorakit.core.merging.plan import Rounding, Stored

_BLOCK = 64

Rows = Callable[[int, int, Scratch], NDArray[Any]]
"""(start, stop, scratch) → those rows of a tensor as fp32."""


def there_and_back(stored: Stored, rounding: Rounding | None) -> Rows:
    """The rows of a tensor after quantization and back, bit for bit bitsandbytes'; without a rounding as they are."""
    if rounding is None:
        return stored.rows
    if rounding.kind == "fp8":
        return _by_row_to_fp8(stored, rounding)
    return _by_row(stored) if rounding.kind == "int8" else _by_block(stored, rounding)


def _by_row(stored: Stored) -> Rows:
    import torch
    from bitsandbytes import functional

    def rows(start: int, stop: int, scratch: Scratch) -> NDArray[Any]:
        values = torch.from_numpy(stored.rows(start, stop, scratch)).to(torch.float16)
        codes, scales, _ = functional.int8_vectorwise_quant(values)
        return np.asarray(functional.int8_vectorwise_dequant(codes, scales).numpy())

    return rows


def _by_row_to_fp8(stored: Stored, rounding: Rounding) -> Rows:
    """As the fast engine stores 8-bit floats: rows of the run's number type, each with its largest number as 448."""
    import torch

    from lorakit.core.fast.storage import rounded

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[rounding.dtype]

    def rows(start: int, stop: int, scratch: Scratch) -> NDArray[Any]:
        codes, scales = rounded(torch.from_numpy(stored.rows(start, stop, scratch)).to(dtype))
        return np.asarray((codes.float() * scales).to(dtype).float().numpy())

    return rows


def _by_block(stored: Stored, rounding: Rounding) -> Rows:
    import torch
    from bitsandbytes import functional

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[rounding.dtype]
    columns, total = stored.place.shape[1], stored.place.shape[0] * stored.place.shape[1]

    def quantized(first: int, last: int, scratch: Scratch) -> Any:
        """(codes, state) of the numbers [first, last), which are whole blocks."""
        top, bottom = first // columns, -(-last // columns)
        flat = stored.rows(top, bottom, scratch).reshape(-1)[first - top * columns : last - top * columns]
        return functional.quantize_4bit(torch.from_numpy(flat).to(dtype), blocksize=_BLOCK, quant_type=rounding.kind)

    def blocks(start: int, stop: int) -> tuple[int, int]:
        return start * columns // _BLOCK * _BLOCK, min(-(-stop * columns // _BLOCK) * _BLOCK, total)

    scales, scratch = torch.empty(-(-total // _BLOCK)), Scratch()
    for chunk in stored.chunks():
        first, last = blocks(*chunk)
        scales[first // _BLOCK : -(-last // _BLOCK)] = quantized(first, last, scratch)[1].absmax
    mean = scales.mean()
    codes, state = functional.quantize_blockwise(scales - mean, blocksize=256)
    scales = functional.dequantize_blockwise(codes, state) + mean

    def rows(start: int, stop: int, scratch: Scratch) -> NDArray[Any]:
        first, last = blocks(start, stop)
        packed, state = quantized(first, last, scratch)
        state.absmax = scales[first // _BLOCK : -(-last // _BLOCK)]
        flat = functional.dequantize_4bit(packed, state).float().numpy().reshape(-1)
        return np.asarray(flat[start * columns - first : stop * columns - first].reshape(stop - start, columns))

    return rows
