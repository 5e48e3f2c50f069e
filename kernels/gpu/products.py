"""The backend's products, and the choice of their kernel: GEMV or GEMM, tile and split of K.

Candidates and the reasons for them; the tuner (kernels/gpu/tune.py) measures them once per shape:

    1 token        dp4a GEMV, 32 to 128 rows per program; smaller tiles fill the machine at N = 2560, larger ones reuse
                   the activations in registers
    2..16 tokens   dp4a GEMV against the smallest tensor-core tile (16 tokens), which reads the same bytes
    17..64         tensor-core tiles of 32 and 64 tokens, K split
    65 and more    128 and 256 tokens; weights as the left operand (decoded in registers) or the right one

K is split until there are `_PROGRAMS` programs per multiprocessor, at most 16 times: the kernel that follows reads
4 bytes * splits * M * N of partial sums, which at 16 splits of 2560 rows is a tenth of the weights.

Dimensions: M tokens, N out-features, K in-features.
"""

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from bitnet.kernels.gpu import gemv, int8_gemm, packed_gemm, tune
from bitnet.kernels.gpu.device import multiprocessors
from bitnet.kernels.gpu.layout import BLOCK_K, GpuWeights

MAX_SPLITS = 16
_PROGRAMS = 4  # programs of 128 threads per multiprocessor: 32 KB of weights in flight; Little's law asks for 23


def candidates(tokens: int, weights: GpuWeights, device: torch.device) -> list[tune.Config]:
    """Configurations to measure for this many tokens, best guess first; "gemv": 1 for the GEMV, 0 for the GEMM."""
    programs = _PROGRAMS * multiprocessors(device)
    if tokens == 1:
        tiles = ((64, 2, 4), (32, 2, 4), (64, 1, 4), (32, 4, 4), (128, 2, 8), (16, 4, 2))
        return [_gemv_config(weights, programs * 4 // warps, rows, step, warps) for rows, step, warps in tiles]
    if tokens <= gemv.MAX_TOKENS:
        few = [_gemv_config(weights, programs, 32, 1, 4)] if tokens <= 8 else []
        return [_gemm_config(weights, programs, 1, 16, bn, 4, stages, 1) for bn, stages in ((64, 4), (128, 4))] + few
    if tokens <= 64:
        bm, tiles_m = triton.next_power_of_2(tokens), 1
        small = ((bm, 64, 4, 4, 1), (bm, 128, 4, 3, 1), (bm, 128, 8, 3, 1))
        return [_gemm_config(weights, programs // 2, tiles_m, *shape) for shape in small]
    shapes = (
        (128, 128, 8, 3, 1),  # 64 sums a thread; three stages of 40 KB
        (256, 128, 8, 3, 1),  # 128 sums a thread, most products for each decoded weight
        (128, 128, 4, 3, 1),
        (128, 128, 8, 3, 0),
        (64, 128, 4, 3, 1),  # a few hundred tokens: more tiles than multiprocessors
    )
    share = programs // _PROGRAMS
    return [_gemm_config(weights, share, triton.cdiv(tokens, shape[0]), *shape) for shape in shapes]


def _gemv_config(weights: GpuWeights, programs: int, block_n: int, step: int, warps: int) -> tune.Config:
    step = min(step, triton.next_power_of_2(weights.blocks))
    tiles = triton.cdiv(weights.blocks, step)
    splits = min(max(programs // triton.cdiv(weights.n, block_n), 1), tiles, MAX_SPLITS)
    return {"gemv": 1, "block_n": block_n, "step": step, "steps": triton.cdiv(tiles, splits), "num_warps": warps}


def _gemm_config(
    weights: GpuWeights, programs: int, tiles_m: int, bm: int, bn: int, warps: int, stages: int, left: int
) -> tune.Config:
    splits = min(max(programs // (triton.cdiv(weights.n, bn) * tiles_m), 1), weights.blocks, MAX_SPLITS)
    return {
        "gemv": 0,
        "block_m": bm,
        "block_n": bn,
        "share": triton.cdiv(weights.blocks, splits),
        "num_warps": warps,
        "num_stages": stages,
        "weights_left": left,
    }


def partial_sums(
    q: Tensor, sums: Tensor, weights: GpuWeights, config: tune.Config | None = None, pdl: bool = False
) -> Tensor:
    """[splits, M, N] int32 whose sum over the first dimension is the exact product of q and packed weights.

    q: [M, blocks * 256] int8, zero after K; sums: [M] int32, its row sums. `config`: default the tuner's. pdl: start
    while the kernel before this one still runs (programmatic dependent launch, compute capability 9.0 or more).
    """

    def run(c: tune.Config) -> Tensor:
        if c["gemv"]:
            return gemv.gemv(q, weights, c, pdl=pdl)
        return packed_gemm.packed_gemm(q, sums, weights, c, pdl=pdl)

    return run(config or _best(q, weights, run))


def _best(q: Tensor, weights: GpuWeights, run: Callable[[tune.Config], Tensor]) -> tune.Config:
    tokens = q.shape[0] if q.shape[0] <= 64 else tune.bucket(q.shape[0])
    choices = candidates(tokens, weights, q.device)
    return tune.best("packed", (tokens, weights.n, weights.k), choices, run, q.device)


# ---- the backend (kernels/ops.py) --------------------------------------------------------------------------


def codes_matmul(q: Tensor, codes: Tensor) -> Tensor:
    """q [M, K] int8 times codes [N, K] int8. Returns [M, N] int32, exact."""
    return int8_gemm.int8_gemm(q.contiguous(), codes.contiguous())


def packed_matmul(q: Tensor, weights: GpuWeights) -> Tensor:
    """q [M, K] int8 times packed weights [N, K]. Returns [M, N] int32, exact."""
    M, width = q.shape[0], weights.blocks * BLOCK_K
    if M == 0:
        return torch.empty(0, weights.n, dtype=torch.int32, device=q.device)
    padded = q
    if weights.k != width or not q.is_contiguous():
        padded = torch.zeros(M, width, dtype=torch.int8, device=q.device)
        padded[:, : weights.k] = q
    parts = partial_sums(padded, q.sum(dim=1, dtype=torch.int32), weights)
    return parts[0] if parts.shape[0] == 1 else parts.sum(dim=0, dtype=torch.int32)
