"""One operator for a frozen matrix with LoRA on it, forward and backward written by hand.

    y  = x Wᵀ + h Bᵀ            h = x Aᵀ          (B holds the scale; layers that read the same x are one W, their A and
                                                   B one below the other, each with its own columns of h)
    dx = dy W + g A             g = dy B,  dA = gᵀ x,  dB = dyᵀ h

Computed in 8-bit floats, x and dy are rounded row by row: x Wᵀ = (q(x) Qᵀ) · sₓ · s, where W = s · Q. In the backward
pass s is multiplied into dy before that is rounded, so that dx uses the very same Q, transposed when it is needed: one
copy of the base serves both. LoRA's own products are always exact.

Shapes by suffix: M tokens, N outputs, K inputs, P layers (parts), R rank of one.
"""

import torch
from torch import Tensor

from lorakit.core.fast.storage import FP8, exact, parts_of_4_bits, rounded, rows_to_codes, table_of_4_bits

HOPPER = (9, 0)
"""The compute capability whose copy engine and tensor cores `product` is made for."""


def frozen_linear(
    x_MK: Tensor,
    codes_MK: Tensor | None,
    scale_M: Tensor | None,
    base: list[Tensor],
    kind: str,
    ends: list[int],
    a_PRK: Tensor,
    b_NR: Tensor,
) -> tuple[Tensor, ...]:
    """y of each part, [M, its outputs]. `base`, `kind` and `ends` are Stored's; with the codes and scales [M, 1] of x
    the product is computed in 8-bit floats, without them in x's number type."""
    given = (x_MK, a_PRK, b_NR, codes_MK, scale_M, kind, ends, x_MK.requires_grad, *base)
    parts: tuple[Tensor, ...] = _FrozenLinear.apply(*given)
    return parts


class _FrozenLinear(torch.autograd.Function):
    """The operators below as one for autograd. y comes out in parts, so that dy comes in parts: where the parts of y
    were views of one output, torch would write dy together first, in twice the time that making it takes."""

    @staticmethod
    def forward(ctx, x_MK, a_PRK, b_NR, codes_MK, scale_M, kind, ends, needs_dx, *base):  # type: ignore[no-untyped-def]
        y_MN, h_MR = frozen_linear_forward(x_MK, codes_MK, scale_M, list(base), kind, ends, a_PRK, b_NR)
        ctx.save_for_backward(x_MK, h_MR, a_PRK, b_NR, *base)
        ctx.settings = (kind, ends, codes_MK is not None, needs_dx)
        return y_MN.split([end - start for start, end in _parts(ends)], 1)

    @staticmethod
    def backward(ctx, *dys_MN):  # type: ignore[no-untyped-def]
        x_MK, h_MR, a_PRK, b_NR, *base = ctx.saved_tensors
        kind, ends, in_fp8, needs_dx = ctx.settings
        given = (x_MK, h_MR, base, kind, ends, a_PRK, b_NR, in_fp8, needs_dx)
        dx_MK, da_PRK, db_NR = frozen_linear_backward(list(dys_MN), *given)
        return dx_MK if needs_dx else None, da_PRK, db_NR, *[None] * (5 + len(base))


@torch.library.custom_op("lorakit::frozen_linear", mutates_args=())
def frozen_linear_forward(
    x_MK: Tensor,
    codes_MK: Tensor | None,
    scale_M: Tensor | None,
    base: list[Tensor],
    kind: str,
    ends: list[int],
    a_PRK: Tensor,
    b_NR: Tensor,
) -> tuple[Tensor, Tensor]:
    """y [M, N] of all parts and h [M, P·R]."""
    h = x_MK @ a_PRK.t()
    if codes_MK is None or scale_M is None:
        y = x_MK @ exact(base, kind, ends, x_MK.shape[1], x_MK.dtype).t()
    else:
        q_NK, scale_N = _fp8(base, kind, ends, x_MK.shape[1])
        if _in_one_kernel(x_MK, ends, b_NR.shape[1]):
            from lorakit.core.fast.kernels import product

            return product(codes_MK, scale_M, q_NK, scale_N, h, b_NR, tuple(ends)), h
        y = _scaled_product(codes_MK, scale_M, q_NK, scale_N, x_MK.dtype)
    for part, (start, end) in enumerate(_parts(ends)):
        y[:, start:end].addmm_(_columns(h, part, b_NR.shape[1]), b_NR[start:end].t())
    return y, h


@frozen_linear_forward.register_fake
def _(x_MK, codes_MK, scale_M, base, kind, ends, a_PRK, b_NR):  # type: ignore[no-untyped-def]
    return x_MK.new_empty(x_MK.shape[0], b_NR.shape[0]), x_MK.new_empty(x_MK.shape[0], a_PRK.shape[0])


@torch.library.custom_op("lorakit::frozen_linear_backward", mutates_args=())
def frozen_linear_backward(
    dys_MN: list[Tensor],
    x_MK: Tensor,
    h_MR: Tensor,
    base: list[Tensor],
    kind: str,
    ends: list[int],
    a_PRK: Tensor,
    b_NR: Tensor,
    in_fp8: bool,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [M, K], dA [P·R, K] and dB [N, R] in x's number type. dx is empty where it isn't needed, as of what the first
    layer reads from a frozen embedding: then the base isn't looked at."""
    if not (in_fp8 and needs_dx):
        dy_MN = _side_by_side(dys_MN)
        g_MR, db_NR = _of_lora(dy_MN, h_MR, b_NR, ends)
        da_PRK = g_MR.t() @ x_MK
        if not needs_dx:
            return x_MK.new_empty(0), da_PRK, db_NR
        return (dy_MN @ exact(base, kind, ends, x_MK.shape[1], x_MK.dtype)).addmm_(g_MR, a_PRK), da_PRK, db_NR
    q_NK, scale_N = _fp8(base, kind, ends, x_MK.shape[1])
    codes_MN, scale_M, g_MR, db_NR = _of_dy(dys_MN, scale_N, h_MR, b_NR, ends)
    da_PRK = g_MR.t() @ x_MK
    q_KN, ones_K = _transposed(q_NK), torch.ones(x_MK.shape[1], device=x_MK.device)
    whole = [x_MK.shape[1]]
    if _in_one_kernel(x_MK, whole, h_MR.shape[1]):
        from lorakit.core.fast.kernels import product

        dx = product(codes_MN, scale_M, q_KN, ones_K, g_MR, a_PRK.t().contiguous(), tuple(whole))
    else:
        dx = _scaled_product(codes_MN, scale_M, q_KN, ones_K, x_MK.dtype).addmm_(g_MR, a_PRK)
    return dx, da_PRK, db_NR


@frozen_linear_backward.register_fake
def _(dys_MN, x_MK, h_MR, base, kind, ends, a_PRK, b_NR, in_fp8, needs_dx):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_MK) if needs_dx else x_MK.new_empty(0), torch.empty_like(a_PRK), torch.empty_like(b_NR)


def rows_to_fp8(x_MN: Tensor, factor_N: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of x's rows, each column multiplied by its factor first, and their scales [M, 1]."""
    if x_MN.is_cuda:
        from lorakit.core.fast import kernels

        return kernels.rows_to_fp8(x_MN, factor_N)
    return rounded(x_MN.float() * factor_N)


def _of_dy(
    dys_MN: list[Tensor], factor_N: Tensor, h_MR: Tensor, b_NR: Tensor, ends: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales of dy's rows, each column multiplied by its factor first; g [M, P·R] and dB [N, R]."""
    # in one kernel where that is faster: one layer alone or a higher rank gains nothing (measured on an H200)
    if h_MR.is_cuda and h_MR.dtype is torch.bfloat16 and 1 < len(ends) <= 3 and b_NR.shape[1] in (16, 32, 64):
        from lorakit.core.fast import kernels

        return kernels.of_dy(dys_MN, factor_N, h_MR, b_NR)
    dy_MN = _side_by_side(dys_MN)
    return *rows_to_fp8(dy_MN, factor_N), *_of_lora(dy_MN, h_MR, b_NR, ends)


def _side_by_side(dys_MN: list[Tensor]) -> Tensor:
    return torch.cat(dys_MN, 1) if len(dys_MN) > 1 else dys_MN[0].contiguous()


def _of_lora(dy_MN: Tensor, h_MR: Tensor, b_NR: Tensor, ends: list[int]) -> tuple[Tensor, Tensor]:
    """g [M, P·R] and dB [N, R]."""
    g_MR, db_NR, rank = torch.empty_like(h_MR), torch.empty_like(b_NR), b_NR.shape[1]
    for part, (start, end) in enumerate(_parts(ends)):
        torch.mm(dy_MN[:, start:end], b_NR[start:end], out=_columns(g_MR, part, rank))
        torch.mm(dy_MN[:, start:end].t(), _columns(h_MR, part, rank), out=db_NR[start:end])
    return g_MR, db_NR


def _fp8(base: list[Tensor], kind: str, ends: list[int], inputs: int) -> tuple[Tensor, Tensor]:
    """The base as 8-bit floats [N, K] and the scales of its rows [N]: as it is stored, or rounded for this pass."""
    if kind == "fp8":
        return base[0].view(FP8), base[1]
    if not base[0].is_cuda:
        return rows_to_codes(exact(base, kind, ends, inputs, torch.bfloat16), "fp8")
    from lorakit.core.fast import kernels

    if kind.startswith(("nf4", "fp4")) and inputs % 64 == 0:
        codes_NK = torch.empty(ends[-1], inputs, device=base[0].device, dtype=FP8)
        scale_N = torch.empty(ends[-1], device=base[0].device)
        table = table_of_4_bits(kind.split()[0], base[0].device)
        for start, end, packed, absmax in parts_of_4_bits(base, ends):
            kernels.fp8_of_4_bits(packed, absmax, table, codes_NK[start:end], scale_N[start:end])
        return codes_NK, scale_N
    codes, scale = kernels.rows_to_fp8(exact(base, kind, ends, inputs, torch.bfloat16), None)
    return codes, scale.flatten()


def _transposed(codes: Tensor) -> Tensor:
    if codes.is_cuda:
        from lorakit.core.fast import kernels

        return kernels.transposed(codes)
    return codes.t().contiguous()


def _in_one_kernel(x: Tensor, ends: list[int], rank: int) -> bool:
    """Whether the product and LoRA are one kernel here: on Hopper, whose copy engine it uses, for shapes that fit."""
    if not x.is_cuda or x.dtype is not torch.bfloat16 or torch.cuda.get_device_capability(x.device) != HOPPER:
        return False
    from lorakit.core.fast.kernels import fits

    return fits(tuple(ends), x.shape[1], rank)


def _scaled_product(a_MK: Tensor, scale_M: Tensor, b_NK: Tensor, scale_N: Tensor, dtype: torch.dtype) -> Tensor:
    """(a bᵀ) with the scales of its rows and columns: by cuBLAS, on the CPU with the codes as they are."""
    if a_MK.is_cuda:
        return torch._scaled_mm(
            a_MK, b_NK.t(), scale_a=scale_M, scale_b=scale_N[None], out_dtype=dtype, use_fast_accum=True
        )
    return ((a_MK.float() * scale_M) @ (b_NK.float() * scale_N[:, None]).t()).to(dtype)


def _parts(ends: list[int]) -> list[tuple[int, int]]:
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _columns(h: Tensor, part: int, rank: int) -> Tensor:
    return h[:, part * rank : (part + 1) * rank]
