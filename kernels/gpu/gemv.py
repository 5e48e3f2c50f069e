"""Packed matrix times a few int8 vectors: decode at memory speed.

One token reads every weight once and reuses none, so the floor is bytes over bandwidth: 13824 x 2560 is 8.8 MB at two
bits, 2.1 us at 4.3 TB/s, against 16.5 us for bf16. At that pace one multiprocessor of an H200 gets 17 weights a cycle
and has 64 integer lanes, so one instruction per weight is too many: each has to process four weights.

    word = 16 weights (kernels/gpu/layout.py), one 16-byte load = 64 weights of a row
    word & 0x03030303            four codes 0, 1, 2 of field 0     dp4a with four int8 activations into `low`
    word & 0x30303030            field 2, still at 16 times its value                             into `high`
    (word >> 2) & either mask    fields 1 and 3

    sum = low + high / 16 - sum of q          exact: `high` is a multiple of 16

dp4a adds four products of a code in {0, 1, 2}: skip, add, add twice. Nine instructions for 16 weights, 0.56 each:
1.1 us of integer work for 13824 x 2560 on 132 multiprocessors at 1.98 GHz, less than the memory's 2.1 us. (A scalar
loop of test, add, subtract needs three instructions per weight: 6 us.) Bounds: |high| <= 2 * 16 * 128 * K / 2 < 2^31
for K < 2^20, and `low` and the total are smaller.

A program takes BLOCK_N rows and STEP blocks at a time: one load instruction per tile, all of it in flight together.
Little's law asks for some 3 MB in flight (4.3 TB/s times 700 ns), 23 KB per multiprocessor: two programs of 128 threads
with 64 bytes each in flight are 16 KB, four are 32. K is split over the grid until there are enough programs. Each
split writes its own int32 partial sums, without atomics and without zeroing, and the next kernel adds the splits. These
are integers, so any split gives the same bits.

Up to 16 tokens share the decoded words. Each token costs 4 more instructions for 16 weights, so tensor cores are faster
from a few tokens on: the tuner compares with the smallest tile of kernels/gpu/packed_gemm.py.

Dimensions: M tokens (1..16), N out-features, K in-features; blocks of 256 along K.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet.kernels.gpu import tune
from bitnet.kernels.gpu.common import ASM, EXACT, PDL_LAUNCH, check_matrix
from bitnet.kernels.gpu.layout import BLOCK_K, GpuWeights

MAX_TOKENS = 16


@triton.jit
def dp4a(codes, q, acc):
    """acc + the products of the four unsigned bytes of `codes` and the four signed bytes of `q`; int32 tensors."""
    if ASM:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, q, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    for byte in tl.static_range(4):
        acc += ((codes >> (8 * byte)) & 255) * ((q << (24 - 8 * byte)) >> 24)
    return acc


@triton.jit
def gemv_one_kernel(
    q_ptr,  # [blocks * 64] int32: int8 activations, four a word
    w_ptr,  # [blocks, N, 16] int32: words of 16 weights
    out_ptr,  # [splits, 1, N] int32
    N,
    blocks,
    steps,  # tiles along K for each program
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,  # blocks in a tile
    PDL: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * steps * STEP
    column = tl.arange(0, STEP * 16)
    low = tl.zeros((BLOCK_N, STEP * 16), tl.int32)
    high = tl.zeros((BLOCK_N, STEP * 16), tl.int32)
    total = tl.zeros((STEP * 16,), tl.int32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    for step in range(steps):
        block = first + step * STEP + column // 16
        inside = block < blocks
        # int64, because a head of 2^18 rows times 2^17 columns has more than 2^31 words.
        place = (block[None, :].to(tl.int64) * N + rows[:, None]) * 16 + (column % 16)[None, :]
        word = tl.load(
            w_ptr + place, mask=(rows < N)[:, None] & inside[None, :], other=0, eviction_policy="evict_first"
        )
        if PDL:
            tl.extra.cuda.gdc_wait()  # weights do not depend on the kernel before, activations do
        place = block * 64 + column % 16
        q0 = tl.load(q_ptr + place, mask=inside, other=0)
        q1 = tl.load(q_ptr + place + 16, mask=inside, other=0)
        q2 = tl.load(q_ptr + place + 32, mask=inside, other=0)
        q3 = tl.load(q_ptr + place + 48, mask=inside, other=0)
        shifted = word >> 2
        low = dp4a(word & 0x03030303, q0[None, :], low)
        low = dp4a(shifted & 0x03030303, q1[None, :], low)
        high = dp4a(word & 0x30303030, q2[None, :], high)
        high = dp4a(shifted & 0x30303030, q3[None, :], high)
        ones = tl.full((STEP * 16,), 0x01010101, tl.int32)
        total = dp4a(ones, q3, dp4a(ones, q2, dp4a(ones, q1, dp4a(ones, q0, total))))
    sums = tl.sum(low + (high >> 4), axis=1) - tl.sum(total, axis=0)
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * N + rows, sums, mask=rows < N)


@triton.jit
def gemv_kernel(
    q_ptr,  # [M, blocks * 64] int32
    w_ptr,  # [blocks, N, 16] int32
    out_ptr,  # [splits, M, N] int32
    M,
    N,
    blocks,
    steps,
    TOKENS: tl.constexpr,  # M or the power of two above it
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    PDL: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * steps * STEP
    token = tl.arange(0, TOKENS)
    column = tl.arange(0, STEP * 16)
    acc = tl.zeros((BLOCK_N, TOKENS, STEP * 16), tl.int32)
    total = tl.zeros((TOKENS, STEP * 16), tl.int32)
    ones = tl.full((TOKENS, STEP * 16), 0x01010101, tl.int32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for step in range(steps):
        block = first + step * STEP + column // 16
        inside = block < blocks
        place = (block[None, :].to(tl.int64) * N + rows[:, None]) * 16 + (column % 16)[None, :]
        word = tl.load(
            w_ptr + place, mask=(rows < N)[:, None] & inside[None, :], other=0, eviction_policy="evict_first"
        )
        place = token[:, None].to(tl.int64) * blocks * 64 + (block * 64 + column % 16)[None, :]
        mask = (token < M)[:, None] & inside[None, :]
        for field in tl.static_range(4):
            q = tl.load(q_ptr + place + 16 * field, mask=mask, other=0)
            codes = (word >> (2 * field)) & 0x03030303
            acc = dp4a(codes[:, None, :], q[None, :, :], acc)
            total = dp4a(ones, q, total)
    sums = tl.sum(acc, axis=2) - tl.sum(total, axis=1)[None, :]
    place = (tl.program_id(1).to(tl.int64) * M + token[None, :]) * N + rows[:, None]
    tl.store(out_ptr + place, sums, mask=(rows < N)[:, None] & (token < M)[None, :])


def gemv(q: Tensor, weights: GpuWeights, config: tune.Config, *, pdl: bool = False) -> Tensor:
    """Partial sums [splits, M, N] int32 of q [M, blocks * 256] int8 (zero after K) and packed weights.

    splits = ceil(blocks / (step * steps)) of the config; their sum over the first dimension is the product, exact.
    Raises ValueError for a wrong shape, and for more than 16 tokens.
    """
    check_matrix("gemv: activations", q, torch.int8, weights.blocks * BLOCK_K)
    M, c = q.shape[0], config
    if not 1 <= M <= MAX_TOKENS:
        raise ValueError(f"gemv: got {M} tokens, expected 1 to {MAX_TOKENS}; use the GEMM for more")
    shape = (triton.cdiv(weights.blocks, c["step"] * c["steps"]), M, weights.n)
    out = torch.empty(shape, dtype=torch.int32, device=q.device)
    grid = (triton.cdiv(weights.n, c["block_n"]), shape[0])
    words, codes = q.view(torch.int32), weights.data.view(torch.int32)
    options = {"BLOCK_N": c["block_n"], "STEP": c["step"], "PDL": pdl, "num_warps": c["num_warps"]}
    options |= EXACT | PDL_LAUNCH[pdl]
    if M == 1:
        gemv_one_kernel[grid](words, codes, out, weights.n, weights.blocks, c["steps"], **options)
    else:
        tokens = triton.next_power_of_2(M)
        gemv_kernel[grid](words, codes, out, M, weights.n, weights.blocks, c["steps"], TOKENS=tokens, **options)
    return out
