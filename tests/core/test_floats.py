"""Number types in numpy: read, and rounded once, as torch does it, for every kind of number there is."""

import numpy as np
import pytest
import torch

from lorakit.core.floats import CONFIG_NAMES, FRACTION_BITS, SMALLEST, Scratch, item_bytes, narrowed, widened

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def raw(tensor: torch.Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.asarray(tensor.contiguous().view(torch.uint8).numpy().reshape(-1))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_number_of_sixteen_bits_is_read_as_torch_reads_it(dtype: str) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(DTYPES[dtype])
    found = widened(raw(every), dtype, Scratch())
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, every.float().numpy())


def numbers() -> torch.Tensor:
    """Random bits, every tie between two bfloat16, its neighbours, denormals, zeros of both signs."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator, dtype=torch.int64)
    ties = (torch.arange(2**16, dtype=torch.int64) << 16) + 0x8000
    bits = torch.cat([bits, ties, ties - 1, ties + 1, torch.tensor([0, 2**31, 1, 2**31 + 1])])
    return (bits & 0xFFFFFFFF).to(torch.uint32).view(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_torchs(dtype: str) -> None:
    values = numbers()
    if dtype == "F16":
        values = torch.cat([values, torch.linspace(-70000, 70000, 100_001), torch.linspace(-1e-4, 1e-4, 10_001)])
    values = values[values.isfinite()]
    expected = values.to(DTYPES[dtype])
    values, expected = values[expected.isfinite()], expected[expected.isfinite()]
    out = np.empty(len(values) * item_bytes(dtype), np.uint8)
    assert narrowed(values.clone().numpy(), dtype, out, Scratch())
    np.testing.assert_array_equal(out, raw(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_type_cant_hold_is_seen(dtype: str) -> None:
    """To the last number: the largest that is rounded down is taken, the next is not."""
    largest = torch.tensor(torch.finfo(DTYPES[dtype]).max, dtype=torch.float64)
    with np.errstate(all="ignore"):
        for value in (np.nan, np.inf, -np.inf):
            values = np.array([1.0, value, 2.0], np.float64 if dtype == "F64" else np.float32)
            assert not narrowed(values, dtype, np.empty(3 * item_bytes(dtype), np.uint8), Scratch())
        if dtype in ("F32", "F64"):
            return
        half = (
            largest.float() + (largest - torch.nextafter(largest.to(DTYPES[dtype]), largest.to(DTYPES[dtype]) * 0)) / 2
        )
        for sign in (1, -1):
            edge = np.array([sign * float(half)], np.float32)
            inside = np.nextafter(edge, np.float32(0))
            out = np.empty(item_bytes(dtype), np.uint8)
            assert narrowed(inside, dtype, out, Scratch())
            assert torch.from_numpy(out).view(DTYPES[dtype]).item() == sign * float(largest)
            assert not narrowed(edge, dtype, out, Scratch())


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_said_of_a_type_is_torchs(dtype: str) -> None:
    info = torch.finfo(DTYPES[dtype])
    assert info.eps == 2.0 ** -FRACTION_BITS[dtype]
    assert info.tiny * info.eps == SMALLEST[dtype]
    assert item_bytes(dtype) == info.bits // 8
    assert CONFIG_NAMES[dtype] == str(DTYPES[dtype]).removeprefix("torch.")


def test_nothing_is_rounded_of_nothing() -> None:
    for dtype in DTYPES:
        assert narrowed(np.empty(0, np.float32), dtype, np.empty(0, np.uint8), Scratch())


def test_a_scratch_is_used_again_and_grows() -> None:
    scratch = Scratch()
    first = scratch.array("a", 10, np.float32)
    first[:] = 3
    assert np.shares_memory(scratch.array("a", 5, np.float32), first)
    assert not np.shares_memory(scratch.array("b", 5, np.float32), first)
    assert scratch.array("a", 20, np.float64).shape == (20,)
