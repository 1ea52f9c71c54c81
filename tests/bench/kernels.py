"""The fast engine's kernels on a CUDA GPU, each against fp64: `python -m tests.bench.kernels`.

Odd numbers of rows, widths that no tile divides, every rank from 0 to 256, parts as queries, keys and values have them.
Every tensor that a kernel is given or makes lies between bands of NaN: what it reads beyond shows in its result, and
what it writes there is an error. Shown are the largest differences: of sums in units of their root mean square, of
rounding in units of what is rounded, of what calibration compensates how much more is lost. Names choose among the
checks.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lorakit.core.calibration import Grid, Spread, compensated
from lorakit.core.fast import kernels
from lorakit.core.fast.linear import _fp8
from lorakit.core.fast.storage import exact, store
from lorakit.core.quantization import Quantizing, quantized

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
    ((28672, 57344), 8192),  # gate and up of 70B
    ((53248, 106496), 16384),  # of 405B
)
RANKS = (0, 16, 32, 48, 64, 128, 256)
LARGEST_ERROR = 0.05
"""Of the root mean square, for 4,096 inputs or fewer: bf16 rounds numbers of five times as much by 0.016, and Hopper's
tensor cores add 8-bit products in fewer bits than fp32 has, so that errors grow with the root of the inputs."""


def of_product(rows: int, ends: tuple[int, ...], inputs: int, rank: int, generator: torch.Generator) -> float:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    a, scale_a = kernels.rows_to_fp8([normal(rows, inputs).bfloat16()], None)
    b, scale_b = kernels.rows_to_fp8([normal(ends[-1], inputs).bfloat16()], None)
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
    codes, scale = kernels.rows_to_fp8([x], factor)
    of_parts, again = kernels.rows_to_fp8([x[:, :16], x[:, 16:48], x[:, 48:]], factor)
    if not torch.equal(codes.view(torch.uint8), of_parts.view(torch.uint8)) or not torch.equal(scale, again):
        return float("inf")
    exact = x.double() * factor.double()
    largest = exact.abs().amax(-1, keepdim=True)
    rounding = float(((codes.double() * scale - exact).abs() / largest).max())  # half a place: 1/28 of the largest
    turned = kernels.transposed(codes)
    if not torch.equal(turned.view(torch.uint8), codes.view(torch.uint8).t()):
        return float("inf")
    return rounding if torch.allclose(scale.double() * 448, largest, rtol=1e-6) else float("inf")


def of_integers(rows: int, ends: tuple[int, ...], inputs: int, rank: int, generator: torch.Generator) -> float:
    """Sums of integers are exact; what differs from fp64 is the scaling in fp32, and the result's own places."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    outputs = ends[-1]
    a, b = ((40 * normal(size, inputs)).clamp(-127, 127).to(torch.int8) for size in (rows, outputs))
    scale_a, scale_b = normal(rows, 1).abs() + 0.1, normal(outputs).abs() + 0.1
    kept_a, kept_b = (normal(size, 32).bfloat16() * inputs**0.5 * 40 for size in (rows, outputs))
    h, lora = normal(rows, len(ends) * rank).bfloat16() * 40, normal(outputs, rank).bfloat16() * inputs**0.5
    found = kernels.product_of_integers(a, scale_a, b, scale_b, kept_a, kept_b, h, lora, ends)
    if not torch.equal(kernels.product_of_integers(a, scale_a, b, scale_b, kept_a, kept_b, h, lora, ends), found):
        return float("inf")
    exact = (a.double() @ b.double().t()) * scale_a.double() * scale_b.double() + kept_a.double() @ kept_b.double().t()
    for part, (start, end) in enumerate(zip((0, *ends[:-1]), ends, strict=True)):
        exact[:, start:end] += h[:, part * rank : (part + 1) * rank].double() @ lora[start:end].double().t()
    return float((found.double() - exact).abs().max() / exact.pow(2).mean().sqrt())


def of_loss(rows: int, words: int, generator: torch.Generator) -> float:
    """Losses and the logits' gradient, in bf16, against autograd in fp64."""
    logits = (3 * torch.randn(rows, words, device="cuda", generator=generator)).bfloat16()
    targets = torch.randint(0, words, (rows,), device="cuda", generator=generator)
    wide = logits.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(wide, targets, reduction="none")
    exact.sum().backward()
    again = logits.clone()
    losses, wanted = kernels.cross_entropy(logits, targets), wide.grad
    if not torch.equal(kernels.cross_entropy(again, targets), losses) or not torch.equal(again, logits):
        return float("inf")
    assert wanted is not None
    off = float(((logits.double() - wanted).abs() / (wanted.abs() + 1e-12)).max())  # half a place of bf16: 1/256
    return off if torch.allclose(losses.double(), exact, rtol=1e-5) else float("inf")


def of_dy(rows: int, ends: tuple[int, ...], rank: int, generator: torch.Generator) -> float:
    """g and dB against fp64; the codes and scales are those of `rows_to_fp8`, but for ties."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).bfloat16()

    dy, h, lora = normal(rows, ends[-1]), normal(rows, len(ends) * rank), normal(ends[-1], rank)
    factor = torch.rand(ends[-1], device="cuda", generator=generator) + 0.5
    parts = [part.contiguous() for part in dy.tensor_split(ends[:-1], 1)]
    codes, scale, g, db = kernels.of_dy(parts, factor, h, lora)
    again = kernels.of_dy(parts, factor, h, lora)
    same = all(torch.equal(*pair) for pair in zip((scale, g, db), again[1:], strict=True))
    same &= torch.equal(codes.view(torch.int8), again[0].view(torch.int8))
    alone, scale_alone = kernels.rows_to_fp8([dy], factor)
    others = (codes.view(torch.int8) != alone.view(torch.int8)).double().mean()
    if not same or not torch.allclose(scale, scale_alone, rtol=1e-6) or others > 1e-4:
        return float("inf")
    worst = 0.0
    for part, (start, end) in enumerate(zip((0, *ends[:-1]), ends, strict=True)):
        columns, y = slice(part * rank, (part + 1) * rank), dy[:, start:end].double()
        wanted = ((g[:, columns], y @ lora[start:end].double()), (db[start:end], y.t() @ h[:, columns].double()))
        worst = max(worst, *(float((found.double() - x).abs().max() / x.pow(2).mean().sqrt()) for found, x in wanted))
    return worst


def of_4_bits(outputs: int, inputs: int, kind: str, generator: torch.Generator) -> float:
    """Codes made of bitsandbytes' 4 bits against its own numbers, of three layers at once."""
    made = []
    for rows in (outputs, 16, 48):
        layer = torch.nn.Linear(inputs, rows, bias=False, device="cuda")
        layer.weight.data.normal_(0, 0.02, generator=generator)
        made.append(quantized(layer, Quantizing(kind, torch.bfloat16, double_quantization=outputs % 2 == 0)))
    stored = store(made)
    codes, scale = _fp8(stored.tensors, stored.kind, stored.ends, inputs)
    numbers = exact(stored.tensors, stored.kind, stored.ends, inputs, torch.float32).double()
    off = (codes.double() * scale.double()[:, None] - numbers).abs() / numbers.abs().amax(-1, keepdim=True)
    return float(off.max())


def of_compensating(outputs: int, inputs: int, table: Tensor | None, generator: torch.Generator) -> float:
    """How much more of the outputs is lost than by the same arithmetic in torch: a few roundings fall otherwise."""
    weight = torch.randn(outputs, inputs, device="cuda", generator=generator)
    x = torch.randn(2048, inputs, device="cuda", generator=generator)
    x = x @ torch.randn(inputs, inputs, device="cuda", generator=generator) / inputs**0.5  # inputs that hang together
    moments = x.t() @ x / len(x)
    size = 64 if table is not None else inputs
    largest = weight.view(outputs, -1, size).abs().amax(-1).t().contiguous()
    grid = Grid(largest if table is not None else largest / 448, table)
    found = compensated(weight, Spread.of(moments), grid)
    moments, on_cpu = moments.cpu(), Grid(grid.scales_GN.cpu(), None if table is None else table.cpu())
    expected = compensated(weight.cpu(), Spread.of(moments), on_cpu)
    lost = [
        float((((weight.cpu() - each.cpu()) @ moments) * (weight.cpu() - each.cpu())).sum())
        for each in (found, expected)
    ]
    return lost[0] / lost[1] - 1


KERNELS = (
    *("product", "product_of_integers", "rows_to_fp8", "of_dy", "cross_entropy"),
    *("fp8_of_4_bits", "transposed", "compensated"),
)
BAND_BYTES = 1 << 16
EMPTY, EMPTY_LIKE = torch.empty, torch.empty_like


def within_bands(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel whose tensors lie between bands of ones, which are NaN in every number type of floats."""

    def call(*arguments: Any) -> Any:
        wholes: list[Tensor] = []

        def made(*shape: Any, device: Any, dtype: torch.dtype = torch.float32) -> Tensor:
            size = torch.Size(shape[0] if isinstance(shape[0], torch.Size) else shape)
            inside = size.numel() * dtype.itemsize
            whole = torch.full((inside + 2 * BAND_BYTES,), 255, device=device, dtype=torch.uint8)
            wholes.append(whole)
            return whole[BAND_BYTES : BAND_BYTES + inside].view(dtype).view(size)

        def copied(given: Any) -> Any:
            if isinstance(given, list):
                return [copied(each) for each in given]
            return made(given.shape, device=given.device, dtype=given.dtype).copy_(given) if is_tensor(given) else given

        copies = [copied(given) for given in arguments]
        torch.empty, torch.empty_like = made, lambda x: made(x.shape, device=x.device, dtype=x.dtype)  # type: ignore
        try:
            result = kernel(*copies)
        finally:
            torch.empty, torch.empty_like = EMPTY, EMPTY_LIKE
        for whole in wholes:
            bands = torch.cat([whole[:BAND_BYTES], whole[-BAND_BYTES:]])
            assert bool((bands == 255).all()), f"{kernel.__name__} writes outside"
        for given, copy in zip(arguments, copies, strict=True):
            if is_tensor(given):
                given.copy_(copy)  # some are filled in
        return result

    return call


def is_tensor(given: Any) -> bool:
    return isinstance(given, Tensor)


Found = Iterator[tuple[str, float, float]]
"""What was computed, the largest difference, and the largest that may be."""


def products(generator: torch.Generator) -> Found:
    for (ends, inputs), rank in itertools.product(SHAPES, RANKS):
        if kernels.fits(ends, inputs, rank):  # else cuBLAS does it
            found = max(of_product(rows, ends, inputs, rank, generator) for rows in ROWS)
            yield f"N {ends}, K {inputs}, rank {rank}", found, LARGEST_ERROR * max(1.0, inputs / 4096) ** 0.5


def integers(generator: torch.Generator) -> Found:
    for (ends, inputs), rank in itertools.product(
        (*SHAPES[:-2], ((576, 768, 960), 576), ((4096,), 11008)), (0, 16, 48, 64, 256)
    ):
        found = max(of_integers(rows, ends, inputs, rank, generator) for rows in ROWS)
        yield f"N {ends}, K {inputs}, rank {rank}", found, LARGEST_ERROR


def rounding(generator: torch.Generator) -> Found:
    for width in (96, 576, 4096, 11008, 22016, 32000, 57344, 106496):
        yield f"{width} columns", max(of_rounding(rows, width, generator) for rows in ROWS), 1 / 27


def dy(generator: torch.Generator) -> Found:
    for (ends, _), rank in itertools.product(SHAPES, (16, 32)):
        yield f"N {ends}, rank {rank}", max(of_dy(rows, ends, rank, generator) for rows in ROWS), LARGEST_ERROR


def loss(generator: torch.Generator) -> Found:
    for words in (96, 576, 32000, 128256):
        yield f"{words} words", max(of_loss(rows, words, generator) for rows in ROWS), 1 / 250


def four_bits(generator: torch.Generator) -> Found:
    for (outputs, inputs), kind in itertools.product(((77, 64), (576, 1536), (4096, 11008)), ("nf4", "fp4")):
        yield f"{kind}, {outputs} × {inputs}", of_4_bits(outputs, inputs, kind, generator), 1 / 27


def compensating(generator: torch.Generator) -> Found:
    for outputs, inputs in ((77, 128), (576, 576), (1536, 576), (4096, 1088)):
        for table in (None, torch.linspace(-1, 1, 16, device="cuda")):
            found = abs(of_compensating(outputs, inputs, table, generator))
            yield f"{outputs} × {inputs}, {'fp8' if table is None else '4 bits'}", found, 0.01


CHECKS: dict[str, Callable[[torch.Generator], Found]] = {
    check.__name__: check for check in (products, integers, rounding, dy, loss, four_bits, compensating)
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(CHECKS), metavar="NAME", help=f"of {', '.join(CHECKS)}")
    for name in KERNELS:
        setattr(kernels, name, within_bands(getattr(kernels, name)))
    generator, bad = torch.Generator("cuda").manual_seed(0), 0
    say(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    for name in parser.parse_args().names:
        for what, found, allowed in CHECKS[name](generator):
            bad += not found <= allowed
            say(f"{name:<13} {what}: {found:.4f}" + ("" if found <= allowed else f", more than {allowed:.4f}"))
    say(f"{bad} were off by more than they may be")
    return 1 if bad else 0


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
