"""How the parts time: contenders interleaved, launches replayed from CUDA graphs; the floors; what the GPU is.

M rows, N out-features, K in-features.
"""

import platform
import statistics
from collections.abc import Callable
from datetime import date
from typing import Any

import torch

from bitnet.benchmarks.bench.interleaving import in_turn

# An H200 until it has been measured: bytes/s copied and bf16 operations/s; int8 has twice as many.
EXPECTED = {"copy": 4.3e12, "bf16": 790e12}
SHAPES = ((13824, 2560), (2560, 6912), (3840, 2560), (2560, 2560))  # N, K of gate/up, down, q/k/v, o of 2B4T
ROTATED = 512 * 2**20  # bytes of weights in rotation: ten times the L2 cache of an H200
ROUNDS = 9
Result = dict[str, Any]


def floors() -> list[Result]:
    """The least microseconds of each product, from bytes and operations alone."""
    rows = []
    for n, k in SHAPES:
        packed, full = n * k / 4, 2 * n * k
        row: Result = {"n": n, "k": k, "gemv_us": packed / EXPECTED["copy"] * 1e6}
        row["gemv_bf16_us"] = full / EXPECTED["copy"] * 1e6
        for m in (512, 4096):
            row[f"gemm_{m}_us"] = (
                max(2 * m * n * k / 2 / EXPECTED["bf16"], (packed + m * (k + 2 * n)) / EXPECTED["copy"]) * 1e6
            )
            row[f"gemm_{m}_bf16_us"] = 2 * m * n * k / EXPECTED["bf16"] * 1e6
        rows.append({key: round(value, 2) for key, value in row.items()})
    return rows


def median_times(contenders: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each contender, interleaved."""
    for run in contenders.values():
        run()
    torch.cuda.synchronize()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for name in in_turn(list(contenders), turn):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            contenders[name]()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3)
    return {name: statistics.median(values) for name, values in seconds.items()}


def graph_of(run: Callable[[int], Any], count: int) -> Callable[[], None]:
    """A function that replays a graph of `run(0)`, `run(1)` ... `run(count - 1)`, so that Python is not timed."""
    for i in range(min(count, 3)):
        run(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            run(i)
    return graph.replay


def bandwidth() -> float:
    """Bytes per second of a device-to-device copy; bytes read and bytes written both count."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / median_times({"copy": lambda: target.copy_(source)})["copy"]


def machine() -> Result:
    """What the GPU is, and its two ceilings in this run."""
    import triton

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    c, d = (torch.randint(-127, 128, (8192, 8192), device="cuda", dtype=torch.int8) for _ in range(2))
    times = median_times({"bf16": lambda: a @ b, "int8": lambda: torch._int_mm(c, d.T)})
    properties = torch.cuda.get_device_properties(0)
    return {
        "date": date.today().isoformat(),
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "copy_bytes_per_second": bandwidth(),
        "bf16_flops": 2 * 8192**3 / times["bf16"],
        "int8_ops_cublas": 2 * 8192**3 / times["int8"],
    }
