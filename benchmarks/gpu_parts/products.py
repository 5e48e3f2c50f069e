"""GEMV and GEMM with packed weights, as replays of CUDA graphs over rotating copies of the weights.

M rows, N out-features, K in-features.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bitnet.benchmarks.gpu_parts.timing import EXPECTED, ROTATED, SHAPES, Result, bandwidth, graph_of, median_times
from bitnet.kernels import packing
from bitnet.kernels.gpu import layout, products, quantize
from bitnet.kernels.gpu.layout import GpuWeights


def random_weights(n: int, k: int) -> GpuWeights:
    """Packed random codes [n, k] on the GPU, in the kernels' tiles."""
    codes = torch.randint(-1, 2, (n, k), dtype=torch.int8, device="cuda")
    return layout.arrange(packing.pack(codes), k)


def copies_of(weights: GpuWeights) -> list[GpuWeights]:
    """So many copies of packed weights that they do not fit the cache."""
    count = max(2, -(-ROTATED // weights.data.nbytes))
    return [weights, *(GpuWeights(weights.data.clone(), weights.n, weights.k) for _ in range(count - 1))]


def _dense(x: Tensor, weights: list[Tensor], i: int) -> Tensor:
    """x [M, K] times the i-th copy of weights [N, K], by cuBLAS."""
    return x @ weights[i % len(weights)].T


def _partial_sums(q: Any, weights: list[GpuWeights], config: Any, i: int) -> Any:
    """Quantised rows times the i-th copy of the packed weights, before scales."""
    return products.partial_sums(q.codes, q.sums, weights[i], config)


def gemv() -> Result:
    """Products of 1 to 16 tokens at the 2B4T shapes: every candidate of ours, and cuBLAS in bf16."""
    copy, rows = bandwidth(), []
    for n, k in SHAPES:
        weights = copies_of(random_weights(n, k))
        full = [
            torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(max(2, -(-ROTATED // (2 * n * k))))
        ]
        for m in (1, 4, 16) if n == 13824 else (1,):
            x = torch.randn(m, k, device="cuda")
            q, half = quantize.quantize_rows(x, width=quantize.padded(k)), x.bfloat16()
            configs = products.candidates(m, weights[0], q.codes.device)
            contenders = {"cublas": graph_of(partial(_dense, half, full), len(full))}
            for j, config in enumerate(configs):
                contenders[str(j)] = graph_of(partial(_partial_sums, q, weights, config), len(weights))
            times = median_times(contenders)
            each = {name: s / len(full if name == "cublas" else weights) * 1e6 for name, s in times.items()}
            best = min((name for name in each if name != "cublas"), key=lambda name: each[name])
            packed = n * k / 4
            rows.append({
                "m": m, "n": n, "k": k, "us": each[best], "cublas_bf16_us": each["cublas"],
                "floor_us": packed / copy * 1e6, "bandwidth_share": packed / (each[best] / 1e6) / copy,
                "speedup": each["cublas"] / each[best], "config": configs[int(best)],
                "all_us": {json.dumps(c): each[str(j)] for j, c in enumerate(configs)},
            })  # fmt: skip
        del weights, full
    return {"copy_bytes_per_second": copy, "rows": rows}


def gemm() -> Result:
    """Products of a prefill, with the scales in the epilogue: every candidate of ours, and cuBLAS in bf16."""
    rows = []
    for n, k in SHAPES[:3]:
        weights = copies_of(random_weights(n, k))[:8]
        full = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        for m in (512, 1024, 2048, 4096):
            x = torch.randn(m, k, device="cuda")
            q, half = quantize.quantize_rows(x, width=quantize.padded(k)), x.bfloat16()
            configs = [c for c in products.candidates(m, weights[0], half.device) if not c["gemv"]]
            contenders: dict[str, Callable[[], Any]] = {"cublas": graph_of(partial(_dense, half, full), 8)}
            for j, config in enumerate(configs):
                contenders[str(j)] = graph_of(
                    partial(_partial_sums, q, weights, config),
                    8,
                )
            each = {name: s / 8 * 1e6 for name, s in median_times(contenders, 7).items()}
            best = min((name for name in each if name != "cublas"), key=lambda name: each[name])
            rows.append({
                "m": m, "n": n, "k": k, "us": each[best], "cublas_bf16_us": each["cublas"],
                "floor_us": max(m * n * k / EXPECTED["bf16"], (n * k / 4 + m * (k + 2 * n)) / EXPECTED["copy"]) * 1e6,
                "tops": 2 * m * n * k / (each[best] / 1e6) / 1e12, "speedup": each["cublas"] / each[best],
                "config": configs[int(best)],
                "all_us": {json.dumps(c): each[str(j)] for j, c in enumerate(configs)},
            })  # fmt: skip
    return {"rows": rows}
