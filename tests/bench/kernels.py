"""The fast engine's kernels on a CUDA GPU, each against fp64: `python -m tests.bench.kernels`.

Odd numbers of rows, widths that no tile divides, every rank from 0 to 256, parts as queries, keys and values have them.
Shown are the largest differences in units of the result's root mean square, and of rows outside of the result, which
guard against writing too far (they must stay as they were).
"""

import argparse
import itertools
import sys

import torch
from torch import Tensor

from lorakit.core.fast import kernels
from lorakit.core.fast.storage import FP8

ROWS = (1, 77, 128, 1000, 4096)
SHAPES = (
    ((96,), 64),
    ((576,), 576),
    ((1536,), 576),
    ((4096,), 4096),
    ((4096, 5120, 6144), 4096),
    ((384, 512, 640), 256),
    ((11008, 22016), 4096),
    ((32000,), 4096),
)
RANKS = (0, 16, 32, 48, 64, 128, 256)
LARGEST_ERROR = 0.05
"""Of the root mean square: bf16 rounds numbers of five times as much by 0.016, and Hopper's tensor cores add 8-bit
products in fewer bits than fp32 has."""


def of_product(rows: int, ends: tuple[int, ...], inputs: int, rank: int, generator: torch.Generator) -> float:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    a, scale_a = kernels.rows_to_fp8(normal(rows, inputs).bfloat16(), None)
    b, scale_b = kernels.rows_to_fp8(normal(ends[-1], inputs).bfloat16(), None)
    h = normal(rows, len(ends) * rank).bfloat16() if rank else None
    lora = normal(ends[-1], rank).bfloat16() if rank else None
    found = kernels.product(a, scale_a, b, scale_b.flatten(), h, lora, ends)
    again = kernels.product(a, scale_a, b, scale_b.flatten(), h, lora, ends)
    if not torch.equal(found, again):
        return float("inf")
    exact = (a.double() * scale_a) @ (b.double() * scale_b).t()
    if h is not None and lora is not None:
        for part, (start, end) in enumerate(zip((0, *ends[:-1]), ends, strict=True)):
            exact[:, start:end] += h[:, part * rank : (part + 1) * rank].double() @ lora[start:end].double().t()
    return float((found.double() - exact).abs().max() / exact.pow(2).mean().sqrt())


def of_rounding(rows: int, width: int, generator: torch.Generator) -> float:
    """Codes and scales against the definition in fp64, the scale folded in."""
    x = torch.randn(rows, width, device="cuda", generator=generator).bfloat16()
    factor = torch.rand(width, device="cuda", generator=generator) + 0.5
    codes, scale = kernels.rows_to_fp8(x, factor)
    exact = x.double() * factor.double()
    largest = exact.abs().amax(-1, keepdim=True)
    rounding = float(((codes.double() * scale - exact).abs() / largest).max())  # half a place: 1/28 of the largest
    turned = kernels.transposed(codes)
    if not torch.equal(turned.view(torch.uint8), codes.view(torch.uint8).t()):
        return float("inf")
    return rounding if torch.allclose(scale.double() * 448, largest, rtol=1e-6) else float("inf")


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    generator, worst = torch.Generator("cuda").manual_seed(0), 0.0
    say(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    for ends, inputs in SHAPES:
        for rank in RANKS:
            if not kernels.fits(ends, inputs, rank):
                say(f"product N {ends}, K {inputs}, rank {rank}: doesn't fit, cuBLAS does it")
                continue
            try:
                found = [of_product(rows, ends, inputs, rank, generator) for rows in ROWS]
            except Exception as error:
                say(f"product N {ends}, K {inputs}, rank {rank}: {type(error).__name__} {str(error)[:200]}")
                worst = float("inf")
                continue
            worst = max(worst, *found)
            say(f"product N {ends}, K {inputs}, rank {rank}: {max(found):.4f}")
    for rows, width in itertools.product(ROWS, (96, 576, 4096, 11008, 22016, 32000)):
        found = of_rounding(rows, width, generator)
        if found > 1 / 27:
            say(f"rounding {rows} × {width}: {found}")
            worst = float("inf")
    assert FP8 is torch.float8_e4m3fn
    say(f"largest difference {worst:.4f} of the root mean square, need {LARGEST_ERROR}")
    return 0 if worst <= LARGEST_ERROR else 1


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
