"""Packed matrix times int8 activations on int8 tensor cores: prefill, and decode of larger batches.

    out[m, n] = sum_k (code[n, k] - 1) * q[m, k]        int32, exact

The two-bit fields become int8 in registers, never in memory. That is why the weights are the *left* operand: Hopper's
wgmma takes its left operand from registers, so codes go from the load through a shift and a mask (two instructions for
four weights) into the tensor core, while activations, the right operand, are copied asynchronously to shared memory.
The result tile is then [N, M], and is transposed once, at the end. `WEIGHTS_LEFT = False` is the usual orientation,
where decoded weights are written to shared memory first.

A tile of one block is 64 bytes per row and holds K in four fields of 64 neighbours (kernels/gpu/layout.py): one load of
packed bytes feeds four products of depth 64, each with the 64 activations of its field. The codes stay 0, 1, 2; the sum
of q, one number per token, is subtracted at the end.

Floors on an H200 (4.3 TB/s; ~790 Tops bf16, measured, and twice that in int8, inferred): 512 tokens x 13824 x 2560 are
36 Gops, 23 us in int8 and 46 us in bf16, against 2 us for the packed weights and ~20 us for writing int32. Decoding
costs 2 * 128 * 64 / 4 instructions for a tile of 128 rows and one field, 32 for each of 128 threads; the products of a
128-token tile take 256 cycles meanwhile.

From 2 to 64 tokens the time is that of reading the weights, and K is split over the grid until every multiprocessor has
work; each split writes partial sums, as in kernels/gpu/gemv.py.

Dimensions: M tokens, N out-features, K in-features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet.kernels.gpu import tune
from bitnet.kernels.gpu.common import ASM, EXACT, PDL_LAUNCH, check_matrix
from bitnet.kernels.gpu.layout import BLOCK_K, GpuWeights


@triton.jit
def field(packed, SHIFT: tl.constexpr):
    """Field at SHIFT of each byte, as int8 0, 1 or 2; four bytes per instruction with inline PTX."""
    if not ASM:
        return ((packed >> SHIFT) & 3).to(tl.int8)
    if SHIFT == 0:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0x03030303;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )
    if SHIFT == 2:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shr.b32 t, $1, 2; and.b32 $0, t, 0x03030303; }",
            "=r,r",
            [packed],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    if SHIFT == 4:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shr.b32 t, $1, 4; and.b32 $0, t, 0x03030303; }",
            "=r,r",
            [packed],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; shr.b32 t, $1, 6; and.b32 $0, t, 0x03030303; }",
        "=r,r",
        [packed],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def packed_gemm_kernel(
    q_ptr,  # [M, blocks * 256] int8
    sum_ptr,  # [M] int32: sums of q
    w_ptr,  # [blocks, N, 64] uint8
    out_ptr,  # [splits, M, N] int32
    M,
    N,
    blocks,
    share,  # blocks of one split
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,  # row tiles that run together, so that they share columns in L2
    WEIGHTS_LEFT: tl.constexpr,
    PDL: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile, split = tl.program_id(0), tl.program_id(1)
    group = tile // (GROUP * tiles_n)
    height = min(tiles_m - group * GROUP, GROUP)
    tile_m = group * GROUP + (tile % (GROUP * tiles_n)) % height
    tile_n = (tile % (GROUP * tiles_n)) // height

    tokens = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    byte = tl.arange(0, 64)
    # Rows and tokens past the end wrap around: what they compute is never stored, and no load needs a mask.
    q_rows = q_ptr + (tokens % M)[:, None].to(tl.int64) * (blocks * 256) + byte[None, :]
    w_rows = w_ptr + (rows % N)[:, None] * 64 + byte[None, :]
    block_bytes = tl.full((), N, tl.int64) * 64
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((BLOCK_N if WEIGHTS_LEFT else BLOCK_M, BLOCK_M if WEIGHTS_LEFT else BLOCK_N), tl.int32)
    for block in range(split * share, min(split * share + share, blocks)):
        packed = tl.load(w_rows + block * block_bytes)
        for s in tl.static_range(4):
            q = tl.load(q_rows + block * 256 + 64 * s)
            codes = field(packed, 2 * s)
            if WEIGHTS_LEFT:
                acc = tl.dot(codes, tl.trans(q), acc, out_dtype=tl.int32)
            else:
                acc = tl.dot(q, tl.trans(codes), acc, out_dtype=tl.int32)
    if WEIGHTS_LEFT:
        acc = tl.trans(acc)
    if split == 0:
        acc -= tl.load(sum_ptr + tokens, mask=tokens < M, other=0)[:, None]
    mask = (tokens < M)[:, None] & (rows < N)[None, :]
    place = (split.to(tl.int64) * M + tokens[:, None]) * N + rows[None, :]
    tl.store(out_ptr + place, acc, mask=mask)


def packed_gemm(q: Tensor, sums: Tensor, weights: GpuWeights, config: tune.Config, *, pdl: bool = False) -> Tensor:
    """Partial sums [splits, M, N] int32 of q [M, blocks * 256] int8 (zero after K) and packed weights.

    sums: [M] int32, the sum of each row of q. splits = ceil(blocks / config["share"]). pdl: see `products`.
    Raises ValueError for a wrong shape.
    """
    check_matrix("packed_gemm: activations", q, torch.int8, weights.blocks * BLOCK_K)
    (M, N), c = (q.shape[0], weights.n), config
    if sums.shape != (M,) or sums.dtype != torch.int32:
        raise ValueError(f"packed_gemm: got sums {sums.dtype} {tuple(sums.shape)}, expected int32 [{M}]")
    splits = triton.cdiv(weights.blocks, c["share"])
    out = torch.empty(splits, M, N, dtype=torch.int32, device=q.device)
    if M == 0:
        return out
    grid = (triton.cdiv(M, c["block_m"]) * triton.cdiv(N, c["block_n"]), splits)
    packed_gemm_kernel[grid](
        q,
        sums,
        weights.data,
        out,
        M,
        N,
        weights.blocks,
        c["share"],
        BLOCK_M=c["block_m"],
        BLOCK_N=c["block_n"],
        GROUP=8,
        WEIGHTS_LEFT=bool(c["weights_left"]),
        PDL=pdl,
        num_warps=c["num_warps"],
        num_stages=c["num_stages"],
        **EXACT,
        **PDL_LAUNCH[pdl],
    )
    return out
