"""Triton kernels of the fast engine: rows to 8 bits, their transpose, a matrix product of 8-bit floats that adds LoRA
where its sum is finished, what the backward pass makes of dy, which is read once for all of it, and the loss.

Shapes by suffix: M tokens, N outputs, K inputs, R rank (of all parts together: P·R). Every kernel masks what lies
outside, so that no width has to be a multiple of a tile; what TMA (Hopper's copy engine) asks for is checked by `fits`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lorakit.core.fast.storage import FP8, LARGEST, RANK_STEP

_TILE = (128, 256, 128)  # tokens, outputs, inputs: the fastest of those measured on an H200
_NARROW_TILE = (128, 128, 128)  # where parts end at other multiples than 256 (keys and values of small models)
_UNROLLED_RANK = 32  # above, the rank is a loop: unrolled, its chunks outgrow the 227 KB of shared memory
_INTEGER_TILE = (128, 256, 128, 8, 3)  # tokens, outputs, inputs, warps, stages: 144 KB of Hopper's shared memory
_SMALL_TILE = (128, 128, 64, 8, 4)  # 64 KB, of 99 that every GPU since Ampere has (not measured there)
_STRIP = (64, 128)  # rows of a step, columns: others took up to 2.5 times as long on an H200
_STRIP_RANKS = (16, 32)
"""From a rank of 64 on, Triton 3.6 makes the product for dB an asynchronous one (it has so many rows), and loads the
next rows of dy over those that it still reads: dB then differed from run to run."""
_STRIP_ROWS = 1024  # rows of a program: fewer leave more sums of dB to add up


@triton.jit
def _rows_to_fp8(
    x_1,
    x_2,
    x_3,
    factor,
    codes,
    scale,
    N,
    end_1,
    end_2,
    PARTS: tl.constexpr,
    LARGEST: tl.constexpr,
    FOLDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row, which lies in parts, read once: its largest number, then its codes; `factor` (of every column) is
    multiplied in first."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    value = tl.load(x_1 + row * end_1 + at, at < end_1, 0.0).to(tl.float32)
    if PARTS > 1:
        value += tl.load(x_2 + row * (end_2 - end_1) + at - end_1, (at >= end_1) & (at < end_2), 0.0).to(tl.float32)
    if PARTS > 2:
        value += tl.load(x_3 + row * (N - end_2) + at - end_2, (at >= end_2) & (at < N), 0.0).to(tl.float32)
    if FOLDS:
        value = value * tl.load(factor + at, at < N, 0.0)
    found = tl.maximum(tl.max(tl.abs(value), 0), 1e-30) / LARGEST
    tl.store(scale + row, found)
    tl.store(codes + row * N + at, (value / found).to(codes.dtype.element_ty), at < N)


@triton.jit
def _4_bits_to_fp8(packed, absmax, table, codes, scale, K, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """A row of bitsandbytes' 4 bits, two numbers a byte, the first in its upper half, a scale for 64 of them."""
    row, at, scales = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK), K // 64
    byte = tl.load(packed + row * (K // 2) + at, at < K // 2, 0).to(tl.int32)
    of_each = tl.load(absmax + row * scales + at // 32, at < K // 2, 0.0)
    found = tl.maximum(tl.max(of_each, 0), 1e-30) / LARGEST  # the largest number of either table is 1
    of_each = of_each / found
    first, second = tl.load(table + (byte >> 4)) * of_each, tl.load(table + (byte & 15)) * of_each
    both = tl.interleave(first, second).to(codes.dtype.element_ty)
    at = tl.arange(0, 2 * BLOCK)
    tl.store(codes + row * K + at, both, at < K)
    tl.store(scale + row, found)


@triton.jit
def _transpose(x, y, N, K, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (n[:, None] < N) & (k[None, :] < K)
    found = tl.load(x + n[:, None].to(tl.int64) * K + k[None, :], inside, 0)
    inside = (n[None, :] < N) & (k[:, None] < K)
    tl.store(y + k[:, None].to(tl.int64) * N + n[None, :], tl.trans(found), inside)


@triton.jit
def _product(
    a_mk,
    b_nk,
    out_mn,
    h_mr,
    lora_nr,
    scale_m,
    scale_n,
    M,
    N,
    K,
    end_1,
    end_2,
    R: tl.constexpr,
    STEP: tl.constexpr,
    UNROLLED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """out = (a bᵀ) · scale_m · scale_n + h_part lora_partᵀ; parts end at the columns end_1 and end_2."""
    rows, columns, steps = tl.cdiv(M, BM), tl.cdiv(N, BN), tl.cdiv(K, BK)
    for tile in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=True):
        band = tile // (GROUP * columns) * GROUP  # tiles that share inputs run side by side: what they read is cached
        height = min(rows - band, GROUP)
        m = band + (tile % (GROUP * columns)) % height
        n = (tile % (GROUP * columns)) // height
        total = tl.zeros((BM, BN), tl.float32)
        for i in range(steps):
            total = tl.dot(a_mk.load([m * BM, i * BK]), b_nk.load([n * BN, i * BK]).T, total)
        at_m, at_n = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN)
        total = total * tl.load(scale_m + at_m, at_m < M, 0.0)[:, None]
        total = total * tl.load(scale_n + at_n, at_n < N, 0.0)[None, :]
        if R > 0:
            part = (n * BN >= end_1).to(tl.int32) + (n * BN >= end_2).to(tl.int32)
            if R <= UNROLLED:
                for j in tl.static_range(R // STEP):
                    total = tl.dot(h_mr.load([m * BM, part * R + j * STEP]), lora_nr.load([n * BN, j * STEP]).T, total)
            else:
                for j in tl.range(R // STEP, num_stages=1):
                    total = tl.dot(h_mr.load([m * BM, part * R + j * STEP]), lora_nr.load([n * BN, j * STEP]).T, total)
        out_mn.store([m * BM, n * BN], total.to(tl.bfloat16))


@triton.jit
def _product_of_integers(
    a,
    b,
    out,
    scale_m,
    scale_n,
    kept_mk,
    kept_nk,
    h,
    lora,
    M,
    N,
    K,
    end_1,
    end_2,
    EVEN: tl.constexpr,
    KEPT: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    STEP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out = (a bᵀ) · scale_m · scale_n + kept_mk kept_nkᵀ + h_part lora_partᵀ for any GPU: a tile a program, integers
    summed in 32 bits."""
    tile, rows, columns = tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN)
    band = tile // (GROUP * columns) * GROUP
    height = min(rows - band, GROUP)
    n = (tile % (GROUP * columns)) // height
    at_m, at_n = (band + (tile % (GROUP * columns)) % height) * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN)
    from_m, from_n = (at_m % M).to(tl.int64), (at_n % N).to(tl.int64)  # rows outside are others', and aren't written
    at_k = tl.arange(0, BK)
    left, right = a + from_m[:, None] * K + at_k[None, :], b + from_n[None, :] * K + at_k[:, None]
    total = tl.zeros((BM, BN), tl.int32)
    for i in range(tl.cdiv(K, BK)):
        if EVEN:
            total = tl.dot(tl.load(left), tl.load(right), total, out_dtype=tl.int32)
        else:
            there = at_k < K - i * BK
            a_mk, b_kn = tl.load(left, there[None, :], 0), tl.load(right, there[:, None], 0)
            total = tl.dot(a_mk, b_kn, total, out_dtype=tl.int32)
        left += BK
        right += BK
    found = total.to(tl.float32) * tl.load(scale_m + from_m)[:, None] * tl.load(scale_n + from_n)[None, :]
    at_k = tl.arange(0, KEPT)
    columns_mk = tl.load(kept_mk + from_m[:, None] * KEPT + at_k[None, :])
    found = tl.dot(columns_mk, tl.load(kept_nk + from_n[None, :] * KEPT + at_k[:, None]), found)
    part, at_r = (n * BN >= end_1).to(tl.int32) + (n * BN >= end_2).to(tl.int32), tl.arange(0, STEP)
    for j in tl.range(R // STEP, num_stages=1):
        h_mr = tl.load(h + from_m[:, None] * RANKS + part * R + j * STEP + at_r[None, :])
        found = tl.dot(h_mr, tl.load(lora + from_n[None, :] * R + j * STEP + at_r[:, None]), found)
    at = at_m[:, None].to(tl.int64) * N + at_n[None, :]
    tl.store(out + at, found.to(out.dtype.element_ty), (at_m < M)[:, None] & (at_n < N)[None, :])


@triton.jit
def _largest_of_rows(
    dy_1, dy_2, dy_3, factor, scale, N, end_1, end_2, PARTS: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr
):
    """The scale of a row, which lies in parts, each column multiplied by its factor first."""
    row = tl.program_id(0).to(tl.int64)
    found = _largest_of_part(dy_1 + row * end_1, factor, end_1, tl.zeros((BLOCK,), tl.float32), BLOCK)
    if PARTS > 1:
        width = end_2 - end_1
        found = _largest_of_part(dy_2 + row * width, factor + end_1, width, found, BLOCK)
    if PARTS > 2:
        width = N - end_2
        found = _largest_of_part(dy_3 + row * width, factor + end_2, width, found, BLOCK)
    tl.store(scale + row, tl.maximum(tl.max(found, 0), 1e-30) / LARGEST)


@triton.jit
def _largest_of_part(row, factor, width, found, BLOCK: tl.constexpr):
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(row + at, at < width, 0.0).to(tl.float32) * tl.load(factor + at, at < width, 0.0)
        found = tl.maximum(found, tl.abs(value))
    return found


@triton.jit
def _strip_of_dy(
    dy_1,
    dy_2,
    dy_3,
    factor,
    scale,
    lora,
    h,
    codes,
    g_of_strips,
    db_of_chunks,
    M,
    N,
    end_1,
    end_2,
    strips_1,
    strips_2,
    STEPS: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """BN columns of a part of dy, BM rows after the other: their codes, what they give to g = dy B, and their rows of
    dB = dyᵀ h."""
    strip, chunk = tl.program_id(0), tl.program_id(1)
    dy, begin, end, first, part = dy_1, 0, end_1, 0, 0
    if strip >= strips_2:
        dy, begin, end, first, part = dy_3, end_2, N, strips_2, 2
    elif strip >= strips_1:
        dy, begin, end, first, part = dy_2, end_1, end_2, strips_1, 1
    at_p, at_r, width = (strip - first) * BN + tl.arange(0, BN), tl.arange(0, R), end - begin
    at_n, there = begin + at_p, at_p < width
    b_nr = tl.load(lora + at_n[:, None] * R + at_r[None, :], there[:, None], 0.0)
    factor_n = tl.load(factor + at_n, there, 0.0)
    db_rn = tl.zeros((R, BN), tl.float32)
    for step in range(STEPS):
        at_m = (chunk * STEPS + step) * BM + tl.arange(0, BM)
        rows = (at_m < M)[:, None]
        dy_mn = tl.load(dy + at_m[:, None].to(tl.int64) * width + at_p[None, :], rows & there[None, :], 0.0)
        scaled = dy_mn.to(tl.float32) * factor_n[None, :] / tl.load(scale + at_m, at_m < M, 1.0)[:, None]
        at = at_m[:, None].to(tl.int64) * N + at_n[None, :]
        tl.store(codes + at, scaled.to(codes.dtype.element_ty), rows & there[None, :])
        at = (strip.to(tl.int64) * M + at_m)[:, None] * R + at_r[None, :]
        tl.store(g_of_strips + at, tl.dot(dy_mn, b_nr), rows)
        h_mr = tl.load(h + at_m[:, None].to(tl.int64) * RANKS + part * R + at_r[None, :], rows, 0.0)
        db_rn = tl.dot(tl.trans(h_mr), dy_mn, db_rn)
    tl.store(db_of_chunks + (chunk.to(tl.int64) * N + at_n)[None, :] * R + at_r[:, None], db_rn, there[None, :])


@triton.jit
def _sum_of_strips(
    g_of_strips,
    g,
    M,
    strips,
    strips_1,
    strips_2,
    MOST: tl.constexpr,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    BM: tl.constexpr,
):
    """g of BM rows and a part: what its strips have given, always in the same order."""
    at_m, part, at_r = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1), tl.arange(0, R)
    first = tl.where(part == 0, 0, tl.where(part == 1, strips_1, strips_2))
    last = tl.where(part == 0, strips_1, tl.where(part == 1, strips_2, strips))
    rows = (at_m < M)[:, None]
    total = tl.zeros((BM, R), tl.float32)
    for i in range(MOST):
        at = ((first + i).to(tl.int64) * M + at_m)[:, None] * R + at_r[None, :]
        total += tl.load(g_of_strips + at, rows & (first + i < last), 0.0)
    at = at_m[:, None].to(tl.int64) * RANKS + part * R + at_r[None, :]
    tl.store(g + at, total.to(g.dtype.element_ty), rows)


@triton.jit
def _cross_entropy(logits, targets, losses, V, BLOCK: tl.constexpr):
    """A token's loss; its logits become their gradient. Read twice, the second time from the cache."""
    token = tl.program_id(0).to(tl.int64)
    logits += token * V
    target = tl.load(targets + token)
    of_target = tl.load(logits + target).to(tl.float32)
    largest, total = tl.full((BLOCK,), -1e30, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(logits + at, at < V, -float("inf")).to(tl.float32)
        larger = tl.maximum(largest, value)
        total = total * tl.exp(largest - larger) + tl.exp(value - larger)
        largest = larger
    of_all = tl.max(largest, 0)
    log_total = of_all + tl.log(tl.sum(total * tl.exp(largest - of_all), 0))
    tl.store(losses + token, log_total - of_target)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        share = tl.exp(tl.load(logits + at, at < V, 0.0).to(tl.float32) - log_total)
        tl.store(logits + at, (share - (at == target).to(tl.float32)).to(logits.dtype.element_ty), at < V)


@triton.jit
def _compensate(
    left,
    factors,
    scales,
    groups,
    table,
    between,
    made,
    lost,
    N,
    K: tl.constexpr,
    LARGEST: tl.constexpr,
    TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
):
    """Columns of a matrix, which lie here as rows, one after the other: rounded, the error passed on to those below."""
    n, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BLOCK)
    there = (k[:, None] < K) & (n[None, :] < N)
    rows = tl.load(left + k[:, None] * N + n[None, :], there, 0.0)
    for j in range(K):
        row = tl.sum(tl.where(k[:, None] == j, rows, 0.0), 0)
        scale = tl.load(scales + tl.load(groups + j) * N + n, n < N, 1.0)
        scaled = row / scale
        if TABLE == 0:
            number = tl.clamp(scaled, -LARGEST, LARGEST).to(tl.float8e4nv).to(tl.float32)
        else:
            at = tl.zeros((BN,), tl.int32)
            for t in tl.static_range(TABLE - 1):
                at += (scaled > tl.load(between + t)).to(tl.int32)
            number = tl.load(table + at)
        number = number * scale
        error = row - number
        factor = tl.load(factors + j * K + k, (k > j) & (k < K), 0.0)
        rows = rows - factor[:, None] * error[None, :]
        tl.store(made + j * N + n, number, n < N)
        tl.store(lost + j * N + n, error, n < N)


def reads_dy_once(ends: tuple[int, ...], rank: int) -> bool:
    """Whether `of_dy` can do it, and gains: of one layer alone, and of higher ranks, it gains nothing (H200)."""
    return 1 < len(ends) <= 3 and rank in _STRIP_RANKS


def fits(ends: tuple[int, ...], inputs: int, rank: int) -> bool:
    """Whether `product` can do it: parts end where tiles do, and rows begin at multiples of 16 bytes, as TMA needs."""
    return (
        all(end % _NARROW_TILE[1] == 0 for end in ends[:-1])
        and ends[-1] % 8 == 0
        and inputs % 16 == 0
        and rank % RANK_STEP == 0
        and len(ends) <= 3
    )


def product(
    a_MK: Tensor,
    scale_M: Tensor,
    b_NK: Tensor,
    scale_N: Tensor,
    h_MR: Tensor | None,
    lora_NR: Tensor | None,
    ends: tuple[int, ...],
) -> Tensor:
    """(a bᵀ) with the scales of rows and columns, and h·loraᵀ part by part: [M, N] in bf16, each element summed in one
    fp32 accumulator. `h_MR` holds the parts side by side, each as wide as `lora_NR`."""
    M, K = a_MK.shape
    N = b_NK.shape[0]
    BM, BN, BK = _TILE if all(end % _TILE[1] == 0 for end in ends[:-1]) else _NARROW_TILE
    out_MN = torch.empty(M, N, device=a_MK.device, dtype=torch.bfloat16)
    rank = lora_NR.shape[1] if lora_NR is not None else 0
    out = TensorDescriptor.from_tensor(out_MN, [BM, BN])
    h = TensorDescriptor.from_tensor(h_MR, [BM, RANK_STEP]) if h_MR is not None and rank else out
    lora = TensorDescriptor.from_tensor(lora_NR, [BN, RANK_STEP]) if lora_NR is not None and rank else out
    programs = torch.cuda.get_device_properties(a_MK.device).multi_processor_count
    _product[(programs,)](
        TensorDescriptor.from_tensor(a_MK, [BM, BK]),
        TensorDescriptor.from_tensor(b_NK, [BN, BK]),
        out,
        h,
        lora,
        scale_M,
        scale_N,
        M,
        N,
        K,
        *_first_two(ends),
        rank,
        RANK_STEP,
        _UNROLLED_RANK,
        BM,
        BN,
        BK,
        8,
        programs,
        num_stages=3,
        num_warps=8,
    )
    return out_MN


def _first_two(ends: tuple[int, ...]) -> tuple[int, ...]:
    """Where the first and the second part end, as kernels take them: of fewer parts, where all do."""
    return (*ends, ends[-1])[:2]


def product_of_integers(
    a_MK: Tensor,
    scale_M: Tensor,
    b_NK: Tensor,
    scale_N: Tensor,
    kept_MK: Tensor,
    kept_NK: Tensor,
    h_MR: Tensor,
    lora_NR: Tensor,
    ends: tuple[int, ...],
) -> Tensor:
    """(a bᵀ) of 8-bit integers with the scales of rows and columns, the product of the kept columns [M or N,
    KEPT_COLUMNS], and h·loraᵀ part by part: [M, N] in bf16, each element summed in one fp32 accumulator. Parts that
    don't end where tiles do are computed one by one."""
    (M, K), N, rank = a_MK.shape, b_NK.shape[0], lora_NR.shape[1]
    if len(ends) > 3 or any(end % _SMALL_TILE[1] for end in ends[:-1]):
        rows = [slice(start, end) for start, end in zip((0, *ends[:-1]), ends, strict=True)]
        of_parts = (h_MR[:, part * rank : (part + 1) * rank].contiguous() for part in range(len(ends)))
        made = [
            product_of_integers(
                a_MK, scale_M, b_NK[n], scale_N[n], kept_MK, kept_NK[n], h, lora_NR[n], (n.stop - n.start,)
            )
            for n, h in zip(rows, of_parts, strict=True)
        ]
        return torch.cat(made, 1)
    of_data_centers = (9, 0) <= torch.cuda.get_device_capability(a_MK.device) < (12, 0)
    large = of_data_centers and all(end % _INTEGER_TILE[1] == 0 for end in ends[:-1])
    BM, BN, BK, warps, stages = _INTEGER_TILE if large else _SMALL_TILE
    out_MN = torch.empty(M, N, device=a_MK.device, dtype=torch.bfloat16)
    given = (a_MK, b_NK, out_MN, scale_M, scale_N, kept_MK, kept_NK, h_MR, lora_NR, M, N, K)
    sizes = (K % BK == 0, kept_MK.shape[1], rank, h_MR.shape[1], RANK_STEP, BM, BN, BK, 8)
    grid = (triton.cdiv(M, BM) * triton.cdiv(N, BN),)
    _product_of_integers[grid](*given, *_first_two(ends), *sizes, num_warps=warps, num_stages=stages)
    return out_MN


def rows_to_fp8(parts_MN: list[Tensor], factor_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes [M, N] and scales [M, 1] of rows, which lie in up to three parts, `factor_N` multiplied in."""
    three, M, N, *ends = _three(parts_MN)
    codes = torch.empty(M, N, device=three[0].device, dtype=FP8)
    scale = torch.empty(M, 1, device=three[0].device, dtype=torch.float32)
    folds, block = factor_N is not None, triton.next_power_of_2(N)
    warps = 4 if block <= 1024 else 8 if block <= 4096 else 16
    given = (*three, factor_N if folds else scale, codes, scale, N, *ends)
    _rows_to_fp8[(M,)](*given, len(parts_MN), LARGEST, folds, block, num_warps=warps)
    return codes, scale


def _three(parts_MN: list[Tensor]) -> tuple[list[Tensor], int, int, int, int]:
    """Up to three parts [M, n] as kernels take them: always three, of which the last ones aren't read; M, N, and where
    the first and the second part end."""
    parts_MN = [part_MN.contiguous() for part_MN in parts_MN]
    widths = [part_MN.shape[1] for part_MN in parts_MN]
    three = [*parts_MN, *parts_MN[-1:] * (3 - len(parts_MN))]
    return three, len(three[0]), sum(widths), widths[0], sum(widths[:2])


def of_dy(
    dys_MN: list[Tensor], factor_N: Tensor, h_MR: Tensor, lora_NR: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a backward pass makes of dy, whose parts [M, n] lie apart: codes [M, N] and scales [M, 1] of its rows,
    `factor_N` multiplied in; g = dy B, the parts side by side as in `h_MR`; and dB = dyᵀ h [N, R]."""
    three, M, N, *ends = _three(dys_MN)
    R, rank, parts, (BM, BN) = h_MR.shape[1], lora_NR.shape[1], len(dys_MN), _STRIP
    strips = [triton.cdiv(dy_MN.shape[1], BN) for dy_MN in dys_MN]
    bounds = [sum(strips[: part + 1]) for part in range(2)]
    scale_M = torch.empty(M, 1, device=h_MR.device)
    _largest_of_rows[(M,)](*three, factor_N, scale_M, N, *ends, parts, LARGEST, 4096, num_warps=8)
    chunks = triton.cdiv(M, _STRIP_ROWS)
    codes_MN = torch.empty(M, N, device=h_MR.device, dtype=FP8)
    g_of_strips = torch.empty(sum(strips), M, rank, device=h_MR.device)
    db_of_chunks = torch.empty(chunks, N, rank, device=h_MR.device)
    given = (*three, factor_N, scale_M, lora_NR, h_MR, codes_MN, g_of_strips, db_of_chunks, M, N, *ends, *bounds)
    grid = (sum(strips), chunks)
    _strip_of_dy[grid](*given, _STRIP_ROWS // BM, rank, R, BM, BN, num_warps=4, num_stages=3)
    g_MR, grid = torch.empty_like(h_MR), (triton.cdiv(M, 64), parts)
    _sum_of_strips[grid](g_of_strips, g_MR, M, sum(strips), *bounds, max(strips), rank, R, 64, num_warps=4)
    return codes_MN, scale_M, g_MR, db_of_chunks.sum(0).to(lora_NR.dtype)


def cross_entropy(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """The loss of each token [C] in fp32; the logits are replaced by its gradient: softmax, less 1 at the target."""
    losses_C = torch.empty(len(targets_C), device=logits_CV.device)
    _cross_entropy[(len(targets_C),)](logits_CV, targets_C, losses_C, logits_CV.shape[1], 4096, num_warps=8)
    return losses_C


def fp8_of_4_bits(packed: Tensor, absmax: Tensor, table: Tensor, codes_NK: Tensor, scale_N: Tensor) -> None:
    """Fill in the codes and scales of rows of bitsandbytes' 4 bits, whose K is a multiple of 64: read and written once,
    where its own kernel and `rows_to_fp8` move four times as many bytes."""
    N, K = codes_NK.shape
    block = triton.next_power_of_2(K // 2)
    warps = 4 if block <= 2048 else 8
    _4_bits_to_fp8[(N,)](packed, absmax, table, codes_NK, scale_N, K, LARGEST, block, num_warps=warps)


def transposed(codes_NK: Tensor) -> Tensor:
    """The transpose of a matrix of bytes, in a tenth of the time that torch's copy takes."""
    N, K = codes_NK.shape
    out = torch.empty(K, N, device=codes_NK.device, dtype=codes_NK.dtype)
    grid = (triton.cdiv(N, 128), triton.cdiv(K, 128))
    _transpose[grid](codes_NK.view(torch.uint8), out.view(torch.uint8), N, K, 128, num_warps=8)
    return out


def compensated(
    left_KN: Tensor,
    factors_KK: Tensor,
    scales_GN: Tensor,
    groups_K: Tensor,
    table: Tensor | None,
    between: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Up to 128 columns of a matrix as numbers of a grid, and the errors that they leave to others, both [K, N]: what
    `calibration` defines, in one launch instead of a thousand."""
    K, N = left_KN.shape
    made_KN, lost_KN = torch.empty_like(left_KN), torch.empty_like(left_KN)
    entries = 0 if table is None else len(table)
    of_table, edges = (left_KN, left_KN) if table is None or between is None else (table, between)
    arguments = (left_KN, factors_KK, scales_GN, groups_K, of_table, edges, made_KN, lost_KN, N)
    _compensate[(triton.cdiv(N, 32),)](*arguments, K, LARGEST, entries, triton.next_power_of_2(K), 32, num_warps=4)
    return made_KN, lost_KN
