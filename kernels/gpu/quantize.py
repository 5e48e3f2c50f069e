"""Activations and weights to codes: RMSNorm, absmax and int8 in one pass; absmean and ternary in two.

Rows. A row of activations stays in the registers of one thread block from the load to the codes: 4 bytes read per
element (2 in bf16), 1 written. As separate kernels, RMSNorm and the quantiser would also write and read the normalised
row in fp32: 8 bytes more. At 65,536 tokens x 768 that is 400 MB, 0.1 ms on an H200, four times per layer.

    r = 1 / sqrt(mean(x^2) + eps);  y = x * r * gain;  inv = 127 / max(max|y|, 1e-5);  q = round_half_even(y * inv)

`inv` is (1 / max) * 127 in two fp32 roundings, as in the reference, so that without the norm the codes equal the
reference's. With it they differ where y * inv is within a few roundings of a half, because sums of squares are added in
another order. The maximum is taken over bit patterns, where a NaN wins (fp32 `max` drops it): a row with a NaN or an
infinity gets inv = NaN or 0, and hence no finite output.

Backward of the norm, from dy (the straight-through gradient of q / inv with respect to y):

    dx = r * (dy * gain - x * r * mean(dy * gain * x * r)),   dgain = sum over rows of dy * x * r

Weights. One kernel sums |W| into a few hundred fp64 partial sums; in the second, every program adds those up in the
same order, and writes its codes. The host does not wait, there are no atomics, and the result does not depend on
scheduling. The order of additions inside a row is not torch's (which differs between CPU and GPU too), so the last bit
of the scale may differ from the reference; given the scale, the codes are equal. 9 bytes of traffic per weight: 4 read,
twice, and 1 written. 74 M weights take 0.15 ms on an H200, once per optimiser step.

Dimensions: M rows (tokens), N out-features, K in-features.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet.kernels.gpu.common import EXACT, narrow, round_even
from bitnet.kernels.gpu.device import INTERPRET
from bitnet.kernels.gpu.layout import BLOCK_K

MAX_ROW = 2**17  # elements of a row: 128 per thread of the largest thread block
# Partial sums of |W|: four programs for each multiprocessor of the largest GPUs, and one load to add them up.
_SUMS = 8 if INTERPRET else 512
_TILE = 4096  # elements of a weight in flight in one program: 16 to 32 per thread


class Rows(NamedTuple):
    """Quantised rows: codes [M, width] int8 (zero after K), inv_scale [M] fp32, sums [M] int32, rstd [M] fp32."""

    codes: Tensor
    inv_scale: Tensor
    sums: Tensor
    rstd: Tensor


@triton.jit
def rms(x, size, eps):
    """1 / sqrt(mean(x^2) + eps) of one row [BLOCK] fp32 that holds `size` values and zeros."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(x * x, axis=0), size * 1.0) + eps))


@triton.jit
def quantize_row(y, q_row, inv_ptr, sum_ptr, k, width):
    """Write one row [BLOCK] fp32, zero after its end, as `width` int8 codes with inverse scale and sum."""
    # |y| as integers: in the same order as the numbers, then infinity, then NaN.
    largest = tl.max(tl.abs(y).to(tl.int32, bitcast=True), axis=0).to(tl.float32, bitcast=True)
    inv = tl.div_rn(1.0, tl.where(largest < 1e-5, 1e-5, largest)) * 127.0
    codes = round_even(y * inv).to(tl.int32)
    tl.store(q_row + k, codes.to(tl.int8), mask=k < width)
    tl.store(inv_ptr, inv)
    tl.store(sum_ptr, tl.sum(codes, axis=0))


@triton.jit
def quantize_kernel(
    x_ptr,  # [M, K] float, rows `stride` apart
    gain_ptr,  # [K] fp32, if NORM
    q_ptr,  # [M, width] int8
    inv_ptr,  # [M] fp32
    sum_ptr,  # [M] int32
    rstd_ptr,  # [M] fp32, if NORM
    K,
    width,
    stride,
    eps,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    y = tl.load(x_ptr + row * stride + k, mask=k < K, other=0.0).to(tl.float32)
    if NORM:
        rstd = rms(y, K, eps)
        y = y * rstd * tl.load(gain_ptr + k, mask=k < K, other=0.0)
        tl.store(rstd_ptr + row, rstd)
    quantize_row(y, q_ptr + row * width, inv_ptr + row, sum_ptr + row, k, width)


@triton.jit
def norm_backward_kernel(
    dy_ptr,  # [M, K] float
    x_ptr,  # [M, K] float
    gain_ptr,  # [K] fp32
    rstd_ptr,  # [M] fp32
    dx_ptr,  # [M, K] float
    dgain_ptr,  # [programs, K] fp32
    M,
    K,
    BLOCK: tl.constexpr,
):
    k = tl.arange(0, BLOCK)
    gain = tl.load(gain_ptr + k, mask=k < K, other=0.0)
    dgain = tl.zeros((BLOCK,), tl.float32)
    # Interleaved, so that programs that run together read neighbouring rows.
    for row in range(tl.program_id(0), M, tl.num_programs(0)):
        place = row * tl.full((), K, tl.int64) + k
        dy = tl.load(dy_ptr + place, mask=k < K, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normed = tl.load(x_ptr + place, mask=k < K, other=0.0).to(tl.float32) * rstd
        scaled = dy * gain
        dx = rstd * (scaled - normed * (tl.sum(scaled * normed, axis=0) / K))
        tl.store(dx_ptr + place, narrow(dx, dx_ptr.dtype.element_ty), mask=k < K)
        dgain += dy * normed
    tl.store(dgain_ptr + tl.program_id(0).to(tl.int64) * K + k, dgain, mask=k < K)


@triton.jit
def abs_sum_kernel(w_ptr, sum_ptr, size, TILE: tl.constexpr):
    total = tl.zeros((), tl.float64)
    # A grid-stride loop over tiles; sums are fp32 within a tile, fp64 across tiles.
    for start in range(tl.program_id(0) * TILE, size, tl.num_programs(0) * TILE):
        i = start + tl.arange(0, TILE).to(tl.int64)
        w = tl.load(w_ptr + i, mask=i < size, other=0.0).to(tl.float32)
        total += tl.sum(tl.abs(w), axis=0).to(tl.float64)
    tl.store(sum_ptr + tl.program_id(0), total)


@triton.jit
def _mean_abs(sum_ptr, size, SUMS: tl.constexpr):
    mean = (tl.sum(tl.load(sum_ptr + tl.arange(0, SUMS)), axis=0) / (size * tl.full((), 1.0, tl.float64))).to(
        tl.float32
    )
    return tl.where(mean < 1e-5, 1e-5, mean)


@triton.jit
def _code(w, scale):
    # Clamp first: a huge weight would leave the range in which adding 1.5 * 2^23 rounds.
    scaled = w.to(tl.float32) * tl.div_rn(1.0, scale)
    return round_even(tl.minimum(tl.maximum(scaled, -2.0), 2.0))


@triton.jit
def ternary_kernel(
    w_ptr,  # [size] float
    sum_ptr,  # [SUMS] fp64
    code_ptr,  # [size] int8
    scale_ptr,  # [] fp32
    size,
    SUMS: tl.constexpr,
    TILE: tl.constexpr,
):
    scale = _mean_abs(sum_ptr, size, SUMS)
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    code = _code(tl.load(w_ptr + i, mask=i < size, other=0.0), scale)
    code = tl.minimum(tl.maximum(code, -1.0), 1.0)
    tl.store(code_ptr + i, code.to(tl.int8), mask=i < size)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, scale)


def row_warps(block: int) -> int:
    """Warps for a row of `block` elements: 16 elements per thread, four 16-byte loads in fp32."""
    return min(max(block // 512, 1), 32)


def padded(k: int) -> int:
    """K rounded up to whole blocks of packed weights."""
    return -(-k // BLOCK_K) * BLOCK_K


def quantize_rows(x: Tensor, gain: Tensor | None = None, eps: float = 0.0, width: int | None = None) -> Rows:
    """Int8 codes of x [M, K] float, after an RMSNorm with `gain` [K] fp32 and `eps` if a gain is given.

    width: columns of the codes, K or more (default K); those after K are zero. rstd is empty without a gain.
    Raises ValueError for a wrong shape or dtype and for K above 131,072.
    """
    is_matrix = x.dim() == 2 and x.is_floating_point() and 1 <= x.shape[1] <= MAX_ROW
    if not is_matrix or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(f"quantize: got {x.dtype} {tuple(x.shape)}, expected float [M, 1..{MAX_ROW}], contiguous rows")
    (M, K), width = x.shape, width or x.shape[1]
    if width < K or (gain is not None and (gain.shape != (K,) or gain.dtype != torch.float32)):
        raise ValueError(
            f"quantize: got width {width} and gain {None if gain is None else tuple(gain.shape)}, expected {K} or "
            f"more and fp32 [{K}]"
        )
    out = Rows(
        torch.empty(M, width, dtype=torch.int8, device=x.device),
        torch.empty(M, dtype=torch.float32, device=x.device),
        torch.empty(M, dtype=torch.int32, device=x.device),
        torch.empty(0 if gain is None else M, dtype=torch.float32, device=x.device),
    )
    if M == 0:
        return out
    block = triton.next_power_of_2(width)
    quantize_kernel[(M,)](
        x,
        x if gain is None else gain,
        out.codes,
        out.inv_scale,
        out.sums,
        out.rstd,
        K,
        width,
        x.stride(0),
        eps,
        BLOCK=block,
        NORM=gain is not None,
        num_warps=row_warps(block),
        **EXACT,
    )
    return out


def norm_backward(dy: Tensor, x: Tensor, gain: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of RMSNorm: dx [M, K] in x's dtype and dgain [K] fp32, from dy, x [M, K], gain [K], rstd [M].

    Raises ValueError for a wrong shape.
    """
    M, K = x.shape
    if dy.shape != x.shape or gain.shape != (K,) or rstd.shape != (M,):
        raise ValueError(
            f"norm_backward: got dy {tuple(dy.shape)}, gain {tuple(gain.shape)}, rstd {tuple(rstd.shape)} for x "
            f"{tuple(x.shape)}, expected [M, K], [K], [M]"
        )
    dy, x = dy.contiguous(), x.contiguous()
    # A gain's gradient is a sum over all rows: a few hundred programs keep partial sums in registers.
    programs = max(1, min(M, _SUMS))
    dx, dgain = torch.empty_like(x), torch.empty(programs, K, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(K)
    norm_backward_kernel[(programs,)](
        dy, x, gain, rstd, dx, dgain, M, K, BLOCK=block, num_warps=row_warps(block), **EXACT
    )
    return dx, dgain.sum(dim=0)


def ternary_weights(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Absmean codes [N, K] int8 and scale [] fp32 of a weight [N, K] float; the host does not wait for the device.

    Raises ValueError for another rank or dtype.
    """
    weight, sums, scale = _abs_sums(weight)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    grid = (triton.cdiv(weight.numel(), _TILE),)
    ternary_kernel[grid](weight, sums, codes, scale, weight.numel(), SUMS=_SUMS, TILE=_TILE, num_warps=8, **EXACT)
    return codes, scale


def _abs_sums(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check = weight.detach()
    if check.dim() != 2 or not check.is_floating_point() or check.numel() == 0:
        raise ValueError(f"weight: got {weight.dtype} {tuple(weight.shape)}, expected float [N, K]")
    check = check.contiguous()
    sums = torch.empty(_SUMS, dtype=torch.float64, device=weight.device)
    abs_sum_kernel[(_SUMS,)](check, sums, check.numel(), TILE=_TILE, num_warps=8, **EXACT)
    return check, sums, torch.empty((), dtype=torch.float32, device=weight.device)
