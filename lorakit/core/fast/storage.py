"""Frozen matrices of the fast engine as they are stored: 8-bit codes with a scale a row, or as bitsandbytes or torch
have them; and what they are made into for a product.

Shapes by suffix: N outputs, K inputs.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of FP8."""
KEPT_COLUMNS = 32
"""Columns that an 8-bit integer product leaves in 16 bits. LLM.int8 found at most 7 that matter in models of up to 13B
(Dettmers et al. 2022, section 3.2); a product of so many more costs next to nothing."""
RANK_STEP = 16
"""Ranks are padded to multiples of this: what the tensor cores add up in one go."""


def rows_to_codes(weight_NK: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes [N, K] (float8_e4m3fn or int8) and scales [N] in fp32: each row by its largest number, rounded to the
    nearest code. A row of zeros gets the smallest scale."""
    if kind == "int8":  # as LLM.int8 has them, so that what training saw doesn't depend on the engine
        from bitsandbytes import functional

        codes, largest_N, _ = functional.int8_vectorwise_quant(weight_NK.detach().to(torch.float16))
        return codes, largest_N.flatten() / 127
    codes, scale_N1 = rounded(weight_NK)
    return codes, scale_N1.flatten()


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as 8-bit floats and their scales [M, 1], in operators that torch.compile joins with what made the rows."""
    values = x.detach().float()
    scale = values.abs().amax(-1, keepdim=True).clamp_min(1e-30) / LARGEST
    return (values / scale).to(FP8), scale


def rounded_to_integers(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as 8-bit integers, their scales [M, 1], and the KEPT_COLUMNS columns with the largest numbers of all, which
    are zeros there: they stay in x's number type. What becomes of a row depends a little on the others, which choose
    the columns too."""
    values = x.detach().float()
    kept = values.abs().amax(0).topk(min(KEPT_COLUMNS, x.shape[1])).indices
    values = values.index_fill(1, kept, 0.0)
    scale = values.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return (values / scale).round().to(torch.int8), scale, kept


class FrozenLinear(nn.Linear):
    """A linear layer over 8-bit codes. `weight` holds them as bytes, also those of fp8: PEFT gives its matrices the
    number type of a base that computes in floats, and they would be as coarse as it."""

    scale: Tensor

    def __init__(self, linear: nn.Linear, kind: str, stored: tuple[Tensor, Tensor] | None = None) -> None:
        """Of a linear layer's weight; or of codes and scales that `rows_to_codes` has given before."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = linear.in_features, linear.out_features, kind
        self.dtype = linear.weight.dtype
        codes, scale = stored or rows_to_codes(linear.weight, kind)
        self.weight = nn.Parameter(codes.view(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale, persistent=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """The layer as everyone computes it, with the stored numbers in the number type that it was made of."""
        ends = [self.out_features]
        weight = exact([self.weight, self.scale], self.kind, ends, self.in_features, self.dtype)
        return nn.functional.linear(x, weight, self.bias)


class Stored(NamedTuple):
    """The matrices of layers that read the same input, one below the other: what they are stored in, and how.

    kind    "plain" [weight], "fp8" or "int8" [codes, scales], all rows in one; or for each layer "nf4", "fp4" with
            [codes, scales] or, where the scales are quantized too, "nf4 nested" with [codes, scales, their scales,
            their code, offset]
    """

    tensors: list[Tensor]
    kind: str
    ends: list[int]
    """The row behind the last of each layer."""


def store(layers: list[Any]) -> Stored:
    """The matrices of layers, all stored alike; their rows one below the other where no other format comes of it."""
    ends, first = [sum(each.out_features for each in layers[: number + 1]) for number in range(len(layers))], layers[0]
    if hasattr(first.weight, "quant_state"):
        tensors, state = [], first.weight.quant_state
        for layer in layers:
            state = layer.weight.quant_state
            tensors += [layer.weight.data, state.absmax]
            tensors += [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
        return Stored(tensors, state.quant_type + (" nested" if state.nested else ""), ends)
    stacked = _in_one_piece([layer.weight for layer in layers])
    if isinstance(first, FrozenLinear):
        return Stored([stacked, torch.cat([layer.scale for layer in layers])], first.kind, ends)
    return Stored([stacked], "plain", ends)


def _in_one_piece(weights: list[nn.Parameter]) -> Tensor:
    """Matrices one below the other in memory; they themselves become parts of it."""
    if len(weights) == 1:
        return weights[0].data
    stacked = torch.cat([weight.data for weight in weights])
    at = 0
    for weight in weights:
        weight.data = stacked[at : at + len(weight)]
        at += len(weight)
    return stacked


def exact(tensors: list[Tensor], kind: str, ends: list[int], inputs: int, dtype: torch.dtype) -> Tensor:
    """The stored numbers themselves, [N, K] in `dtype`."""
    if kind == "plain":
        return tensors[0].to(dtype)
    if kind == "fp8":
        return (tensors[0].view(FP8).to(torch.float32) * tensors[1][:, None]).to(dtype)
    if kind == "int8":  # rounded once, and read and written once
        made_NK = torch.empty(tensors[0].shape, dtype=dtype, device=tensors[0].device)
        return torch.mul(tensors[0], tensors[1][:, None], out=made_NK)
    ops: Any = torch.ops.bitsandbytes
    made = [
        ops.dequantize_4bit(codes, absmax, 64, kind.split()[0], (end - start, inputs), dtype)
        for start, end, codes, absmax in parts_of_4_bits(tensors, ends)
    ]
    return torch.cat(made) if len(made) > 1 else made[0]


def parts_of_4_bits(tensors: list[Tensor], ends: list[int]) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Of each layer of a base in 4 bits: its first row and the row behind its last, its codes, and their scales (blocks
    of 64) in fp32."""
    import bitsandbytes  # noqa: F401 - registers the operators

    ops: Any = torch.ops.bitsandbytes
    size = len(tensors) // len(ends)
    for part, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        codes, absmax, *nested = tensors[part * size : (part + 1) * size]
        if nested:  # blocks of 256 of the scales themselves
            scales, code, offset = nested
            absmax = ops.dequantize_blockwise(absmax, scales, code, 256, torch.float32) + offset
        yield start, end, codes, absmax


@functools.cache
def table_of_4_bits(quant_type: str, device: torch.device) -> Tensor:
    """The sixteen numbers of nf4 or fp4, by their codes."""
    from bitsandbytes import functional

    table: Tensor = functional.get_4bit_type(quant_type, device=device)
    return table
