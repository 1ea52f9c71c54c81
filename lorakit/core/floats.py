"""Floating-point numbers as safetensors hold them ↔ as numpy computes: bfloat16 too, which numpy doesn't know.

A bfloat16 is the upper half of a float32 (sign, 8 bits of exponent, 7 of fraction).
"""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

assert sys.byteorder == "little", "safetensors are little-endian, and so is every machine that lorakit runs on"

NAMES: Mapping[str, str] = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
"""What `--dtype` and a model's config call a number type → what safetensors do."""

CONFIG_NAMES: Mapping[str, str] = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
FRACTION_BITS: Mapping[str, int] = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}
SMALLEST: Mapping[str, float] = {"F64": 2.0**-1074, "F32": 2.0**-149, "F16": 2.0**-24, "BF16": 2.0**-133}
"""The distance between neighbours around zero, by safetensors' names."""

_NUMPY: Mapping[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
_LARGEST: Mapping[str, float] = {
    "F64": float(np.finfo(np.float64).max),
    "F32": float(np.finfo(np.float32).max),
    "F16": 65519.99609375,
    "BF16": float(np.uint32(0x7F7F7FFF).view(np.float32)),
}
"""The last float32 (float64) before those that are rounded to infinity."""


def widened(raw: bytes | memoryview, dtype: str) -> NDArray[Any]:
    """Stored numbers as a new flat array of float32; of float64 where they are F64."""
    if dtype == "BF16":
        halves = np.frombuffer(raw, np.uint16)
        return np.left_shift(halves, 16, dtype=np.uint32).view(np.float32)
    return np.frombuffer(raw, _NUMPY[dtype]).astype(np.float64 if dtype == "F64" else np.float32)


def narrowed(values: NDArray[Any], dtype: str) -> NDArray[Any] | None:
    """The numbers as they are stored, each rounded once, to the nearest and a tie to even; `values` are used up.

    None where one is NaN or infinite, or is rounded to infinity.
    """
    if values.size and not (values.max() <= _LARGEST[dtype] and values.min() >= -_LARGEST[dtype]):
        return None
    if dtype != "BF16":
        return values.astype(_NUMPY[dtype], copy=False)
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    odd = np.right_shift(bits, 16)
    odd &= 1
    odd += 0x7FFF  # half of the last place less one, so that a tie goes up only from an odd number
    bits += odd
    bits >>= 16
    return bits.astype(np.uint16)
