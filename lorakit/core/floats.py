"""Floating-point numbers as safetensors hold them ↔ as numpy computes: bfloat16 too, which numpy doesn't know.

A bfloat16 is the upper half of a float32 (sign, 8 bits of exponent, 7 of fraction).
"""

import math
import sys
import threading
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


class Scratch(threading.local):
    """Arrays that a thread uses again and again: the kernel would have to clear every new one."""

    def __init__(self) -> None:
        self._kept: dict[str, NDArray[np.uint8]] = {}

    def array(self, name: str, size: int, dtype: Any) -> NDArray[Any]:
        """The thread's array of this name, with whatever it holds."""
        size_bytes = size * np.dtype(dtype).itemsize
        if name not in self._kept or len(self._kept[name]) < size_bytes:
            self._kept[name] = np.empty(size_bytes, np.uint8)
        return self._kept[name][:size_bytes].view(dtype)


def item_bytes(dtype: str) -> int:
    """Bytes of one number, by safetensors' name of its type."""
    return 2 if dtype == "BF16" else int(np.dtype(_NUMPY[dtype]).itemsize)


def computed_in(dtype: str) -> Any:
    """numpy's type that numbers of this one are computed in: float32, of F64 float64."""
    return np.float64 if dtype == "F64" else np.float32


def widened(raw: NDArray[np.uint8], dtype: str, scratch: Scratch) -> NDArray[Any]:
    """Stored numbers as a flat array of float32 (float64 of F64), which is the scratch's."""
    found = scratch.array("widened", len(raw) // item_bytes(dtype), computed_in(dtype))
    if dtype == "BF16":
        np.left_shift(raw.view(np.uint16), 16, out=found.view(np.uint32), dtype=np.uint32)
    else:
        found[:] = raw.view(_NUMPY[dtype])
    return found


def narrowed(values: NDArray[Any], dtype: str, out: NDArray[np.uint8], scratch: Scratch) -> bool:
    """The numbers as they are stored, in `out`, each rounded once, to the nearest and a tie to even; `values` are used
    up.

    Whether all of them are finite: False where one is NaN or infinite, or is rounded to infinity.
    """
    if not _all_within(values.reshape(-1), _LARGEST[dtype]):
        return False
    if dtype != "BF16":
        out.view(_NUMPY[dtype])[:] = values.reshape(-1)
        return True
    bits = values.astype(np.float32, copy=False).reshape(-1).view(np.uint32)
    odd = scratch.array("odd", bits.size, np.uint32)
    np.right_shift(bits, 16, out=odd)
    odd &= 1
    odd += 0x7FFF  # half of the last place less one, so that a tie goes up only from an odd number
    bits += odd
    np.right_shift(bits, 16, out=out.view(np.uint16), dtype=np.uint32, casting="unsafe")
    return True


def _all_within(values: NDArray[Any], largest: float) -> bool:
    """Whether no number is NaN or beyond ± largest: what their squares sum up to mostly says so in one pass."""
    with np.errstate(all="ignore"):
        squares = float(np.dot(values, values))
    if math.isfinite(squares) and squares <= largest * largest:
        return True
    return not values.size or (float(values.max()) <= largest and float(values.min()) >= -largest)
