"""One operator for a frozen matrix with LoRA on it, forward and backward written by hand.

    y  = x Wᵀ + h Bᵀ            h = x Aᵀ          (B holds the scale; layers that read the same x are one W, their A and
                                                   B one below the other, each with its own columns of h)
    dx = dy W + g A             g = dy B,  dA = gᵀ x,  dB = dyᵀ h

Computed in 8-bit integers, only the forward product is: x Wᵀ = (q(x) Qᵀ) · sₓ · s + x' W'ᵀ, where x' and W' are those
columns of x that hold its largest numbers, and zeros in q(x): in them integers would lose what is in all others. dx is
exact, since the few large numbers of dy are everywhere.

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
    rounded_x: tuple[Tensor, ...],
    base: list[Tensor],
    kind: str,
    ends: list[int],
    a_PRK: Tensor,
    b_NR: Tensor,
) -> tuple[Tensor, ...]:
    """y of each part, [M, its outputs]. `base`, `kind` and `ends` are Stored's; `rounded_x` is what storage makes of x
    for a product in 8 bits: codes, scales, and of integers the columns that are kept; () for one in x's own type."""
    codes_MK, scale_M, kept = (*rounded_x, None, None, None)[:3]
    learns = x_MK.requires_grad or a_PRK.requires_grad or b_NR.requires_grad
    if not (torch.is_grad_enabled() and learns):  # where torch.compile would mix up what apply is given (2.13)
        given = (x_MK, codes_MK, scale_M, kept, base, kind, ends, a_PRK, b_NR)
        return _split(frozen_linear_forward(*given)[0], ends)
    parts: tuple[Tensor, ...] = _FrozenLinear.apply(
        *(x_MK, a_PRK, b_NR, codes_MK, scale_M, kept, kind, ends, x_MK.requires_grad), *base
    )
    return parts


class _FrozenLinear(torch.autograd.Function):
    """The operators below as one for autograd. y comes out in parts, so that dy comes in parts: where the parts of y
    were views of one output, torch would write dy together first, in twice the time that making it takes."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x_MK, a_PRK, b_NR, codes_MK, scale_M, kept, kind, ends, needs_dx, *base
    ):
        y_MN, h_MR = frozen_linear_forward(x_MK, codes_MK, scale_M, kept, list(base), kind, ends, a_PRK, b_NR)
        ctx.save_for_backward(x_MK, h_MR, a_PRK, b_NR, *base)
        ctx.settings = (kind, ends, codes_MK is not None and kept is None, needs_dx)
        return _split(y_MN, ends)

    @staticmethod
    def backward(ctx, *dys_MN):  # type: ignore[no-untyped-def]
        x_MK, h_MR, a_PRK, b_NR, *base = ctx.saved_tensors
        kind, ends, in_fp8, needs_dx = ctx.settings
        given = (x_MK, h_MR, base, kind, ends, a_PRK, b_NR, in_fp8, needs_dx)
        dx_MK, da_PRK, db_NR = frozen_linear_backward(list(dys_MN), *given)
        return dx_MK if needs_dx else None, da_PRK, db_NR, *[None] * (6 + len(base))


@torch.library.custom_op("lorakit::frozen_linear", mutates_args=())
def frozen_linear_forward(
    x_MK: Tensor,
    codes_MK: Tensor | None,
    scale_M: Tensor | None,
    kept: Tensor | None,
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
    elif kept is not None:
        q_NK, scale_N = base
        kept_MK, kept_NK = x_MK[:, kept], (q_NK[:, kept] * scale_N[:, None]).to(x_MK.dtype)
        if x_MK.is_cuda:
            from lorakit.core.fast.kernels import product_of_integers

            given = (codes_MK, scale_M, q_NK, scale_N, kept_MK, kept_NK, h, b_NR, tuple(ends))
            return product_of_integers(*given), h
        y = _scaled_product(codes_MK, scale_M, q_NK, scale_N, x_MK.dtype).addmm_(kept_MK, kept_NK.t())
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
def _(x_MK, codes_MK, scale_M, kept, base, kind, ends, a_PRK, b_NR):  # type: ignore[no-untyped-def]
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
        g_MR, db_NR = _of_lora(dys_MN, h_MR, b_NR, ends)
        da_PRK = g_MR.t() @ x_MK
        if not needs_dx:
            return x_MK.new_empty(0), da_PRK, db_NR
        dy_MN = torch.cat(dys_MN, 1) if len(dys_MN) > 1 else dys_MN[0]
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


def rows_to_fp8(parts_MN: list[Tensor], factor_N: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of rows that lie in parts, each column multiplied by its factor first, and their scales [M, 1]."""
    if parts_MN[0].is_cuda:
        from lorakit.core.fast import kernels

        return kernels.rows_to_fp8(parts_MN, factor_N)
    return rounded(torch.cat(parts_MN, 1).float() * factor_N)


def _of_dy(
    dys_MN: list[Tensor], factor_N: Tensor, h_MR: Tensor, b_NR: Tensor, ends: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales of dy's rows, each column multiplied by its factor first; g [M, P·R] and dB [N, R]."""
    if h_MR.is_cuda and h_MR.dtype is torch.bfloat16:
        from lorakit.core.fast import kernels

        if kernels.reads_dy_once(tuple(ends), b_NR.shape[1]):
            return kernels.of_dy(dys_MN, factor_N, h_MR, b_NR)
    return *rows_to_fp8(dys_MN, factor_N), *_of_lora(dys_MN, h_MR, b_NR, ends)


def _of_lora(dys_MN: list[Tensor], h_MR: Tensor, b_NR: Tensor, ends: list[int]) -> tuple[Tensor, Tensor]:
    """g [M, P·R] and dB [N, R]."""
    g_MR, db_NR, rank = torch.empty_like(h_MR), torch.empty_like(b_NR), b_NR.shape[1]
    for part, (dy_MN, (start, end)) in enumerate(zip(dys_MN, _parts(ends), strict=True)):
        torch.mm(dy_MN, b_NR[start:end], out=_columns(g_MR, part, rank))
        torch.mm(dy_MN.t(), _columns(h_MR, part, rank), out=db_NR[start:end])
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
    codes, scale = kernels.rows_to_fp8([exact(base, kind, ends, inputs, torch.bfloat16)], None)
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


def _split(y_MN: Tensor, ends: list[int]) -> tuple[Tensor, ...]:
    return y_MN.split([end - start for start, end in _parts(ends)], 1)


def _parts(ends: list[int]) -> list[tuple[int, int]]:
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _columns(h: Tensor, part: int, rank: int) -> Tensor:
    return h[:, part * rank : (part + 1) * rank]
