"""Int8 matrix products for training: forward from codes, input gradient from codes, on int8 tensor cores.

    y  [M, N] = (q  [M, K] . codes   [N, K]) * (scale[n] / inv_scale[m])      forward
    dx [M, K] = (qg [M, N] . codes^T [K, N]) * (1 / inv_scale[m])             qg: (dy * scale) in int8, a scale a row

One kernel for both: int8 tensor cores need both operands contiguous along the summed dimension, so the gradient reads a
transposed copy of the codes, one byte per weight. The sum is int32 and exact; the epilogue applies scales with the
roundings of `reference.scale_output`: `y` equals the reference to the last bit.

Floors on an H200: 2 * M * N * K operations at ~1,580 Tops (twice the 790 measured in bf16) and M * K + N * K bytes in,
2 * M * N out at 4.3 TB/s. At 65,536 tokens, 768 x 2048: 206 Gops, 130 us, against 75 us of memory: the product is just
compute-bound, because the output is written once, in bf16.

`RAW` writes the int32 sums instead: the `codes_matmul` of the backend.

Dimensions: M rows (tokens), N out-features, K in-features (the summed dimension).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet.kernels.gpu import tune
from bitnet.kernels.gpu.common import EXACT, check_matrix, narrow, scaled, starts


@triton.jit
def int8_gemm_kernel(
    a_ptr,  # [M, K] int8
    b_ptr,  # [N, K] int8
    out_ptr,  # [M, N] int32 if RAW, else float
    inv_ptr,  # [M] fp32, unless RAW
    scale_ptr,  # [SEGMENTS] fp32, unless RAW
    M,
    N,
    K,
    start1,  # first column of the second segment
    start2,  # and of the third
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K: no load needs a mask
    RAW: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ALIGNED: tl.constexpr,  # segments begin at multiples of BLOCK_N
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    group = tile // (GROUP * tiles_n)
    height = min(tiles_m - group * GROUP, GROUP)
    tile_m = group * GROUP + (tile % (GROUP * tiles_n)) % height
    tile_n = (tile % (GROUP * tiles_n)) // height

    tokens = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows past the end wrap around: what they compute is never stored.
    a = a_ptr + (tokens % M)[:, None].to(tl.int64) * K + k[None, :]
    b = b_ptr + (rows % N)[:, None].to(tl.int64) * K + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            left, right = tl.load(a + start), tl.load(b + start)
        else:
            inside = (start + k < K)[None, :]
            left, right = tl.load(a + start, mask=inside, other=0), tl.load(b + start, mask=inside, other=0)
        acc = tl.dot(left, tl.trans(right), acc, out_dtype=tl.int32)
    mask = (tokens < M)[:, None] & (rows < N)[None, :]
    place = tokens[:, None].to(tl.int64) * N + rows[None, :]
    if RAW:
        tl.store(out_ptr + place, acc, mask=mask)
    else:
        inv_scale = tl.load(inv_ptr + tokens, mask=tokens < M, other=1.0)
        y = scaled(acc, scale_ptr, inv_scale, rows, tile_n * BLOCK_N, start1, start2, SEGMENTS, ALIGNED)
        tl.store(out_ptr + place, narrow(y, out_ptr.dtype.element_ty), mask=mask)


# The reasons for the tiles: 128 x 256 takes 128 registers per thread for its int32 sums, and does the most products per
# byte from shared memory; 128 x 128 fills the machine when M * N is small; the last is for narrow outputs, few tokens.
# BLOCK_K of 128 bytes is the widest swizzle of shared memory: (128 + 256) * 128 bytes * 4 stages = 192 KiB of 227.
CONFIGS: tuple[tune.Config, ...] = (
    {"block_m": 128, "block_n": 256, "block_k": 128, "num_warps": 8, "num_stages": 3},
    {"block_m": 256, "block_n": 128, "block_k": 128, "num_warps": 8, "num_stages": 3},
    {"block_m": 128, "block_n": 128, "block_k": 128, "num_warps": 8, "num_stages": 3},
    {"block_m": 128, "block_n": 128, "block_k": 128, "num_warps": 4, "num_stages": 4},
    {"block_m": 64, "block_n": 64, "block_k": 128, "num_warps": 4, "num_stages": 4},
)
"""What the tuner tries, best guess for large shapes first."""


def int8_gemm(
    a: Tensor,
    b: Tensor,
    inv_scale: Tensor | None = None,
    scales: Tensor | None = None,
    dtype: torch.dtype = torch.int32,
    sizes: Sequence[int] = (),
    config: tune.Config | None = None,
) -> Tensor:
    """a [M, K] int8 times b [N, K] int8, exact in int32; times scales / inv_scale [M] (fp32) if both are given.

    scales: [S] fp32, one for each of the S <= 3 groups of rows of b, whose sizes add up to N (default: one group).
    Returns [M, N] in `dtype` (int32 without scales). `config` fixes the tile; default: the tuner's. Raises ValueError
    for wrong shapes and dtypes.
    """
    check_matrix("int8_gemm: a", a, torch.int8)
    check_matrix("int8_gemm: b", b, torch.int8, a.shape[1])
    (M, K), N = a.shape, b.shape[0]
    sizes = tuple(sizes) or (N,)
    start1, start2 = starts(sizes)
    if (scales is None) != (inv_scale is None) or (scales is None) != (dtype == torch.int32):
        raise ValueError(f"int8_gemm: got dtype {dtype}, expected int32 without scales and a float dtype with both")
    if scales is not None and inv_scale is not None:
        wrong = scales.shape != (len(sizes),) or inv_scale.numel() != M or sum(sizes) != N
        if wrong or scales.dtype != torch.float32 or inv_scale.dtype != torch.float32:
            raise ValueError(
                f"int8_gemm: got scales {scales.dtype} {tuple(scales.shape)} for rows {sizes} of {N}, inv_scale "
                f"{tuple(inv_scale.shape)}, expected fp32 [{len(sizes)}], sizes that add up to N, and [{M}]"
            )
    out = torch.empty(M, N, dtype=dtype, device=a.device)
    if M == 0 or N == 0:
        return out
    a, b = a.contiguous(), b.contiguous()

    def run(c: tune.Config) -> None:
        grid = (triton.cdiv(M, c["block_m"]) * triton.cdiv(N, c["block_n"]),)
        int8_gemm_kernel[grid](
            a,
            b,
            out,
            out if inv_scale is None else inv_scale,
            out if scales is None else scales,
            M,
            N,
            K,
            start1,
            start2,
            BLOCK_M=c["block_m"],
            BLOCK_N=c["block_n"],
            BLOCK_K=c["block_k"],
            GROUP=8,
            EVEN_K=K % c["block_k"] == 0,
            RAW=scales is None,
            SEGMENTS=len(sizes),
            ALIGNED=all(start % c["block_n"] == 0 for start in (start1, start2)),
            num_warps=c["num_warps"],
            num_stages=c["num_stages"],
            **EXACT,
        )

    run(config or tune.best("int8_gemm", (tune.bucket(M), N, K, str(dtype)), CONFIGS, run, a.device))
    return out
