"""The CPU kernels alone: python benchmarks/cpu.py; whole models are measured by `bitnet bench`.

Each instruction set: GEMV on > 300 MB of rotating weights, GEMM at 8, 64 and 256 tokens, beside torch's products.
Contenders take turns within one run; medians and quartiles are reported, beside the memory's read bandwidth measured
between them. The last line is one JSON document.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bitnet.benchmarks.bench import machine, table
from bitnet.benchmarks.bench.random_model import random_codes
from bitnet.cli import guarded
from bitnet.kernels import native, packing
from bitnet.threads import use_threads

N, K = 2560, 6912  # down_proj of 2B4T, the largest in-features there are
ROTATED = 300e6  # bytes of weights a GEMV walks through: more than any cache that one core may fill


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": middle, "low": low, "high": high}


def seconds(action: Callable[[], object]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def kernel_contenders() -> dict[str, tuple[Callable[[int], Callable[[], object]], int, float]]:
    """name -> (a call for so many tokens, copies of the weights it rotates through, bytes of one copy)."""
    generator = torch.Generator().manual_seed(0)
    codes = random_codes(N, K, generator)
    packed = packing.pack(codes)
    contenders = {}

    def ternary(isa: str) -> tuple[Callable[[int], Callable[[], object]], int, float]:
        first, _ = native.prepare(packed, K, isa)
        copies = [first.clone() for _ in range(int(ROTATED / first.numel()) + 1)]
        state = {"next": 0}

        def call(tokens: int) -> Callable[[], object]:
            q = torch.randint(-127, 128, (tokens, K), generator=generator, dtype=torch.int8)

            def once() -> object:
                state["next"] = (state["next"] + 1) % len(copies)
                return native.ternary_matmul(q, copies[state["next"]], N, isa)

            return once

        return call, len(copies), first.numel()

    def dense(dtype: torch.dtype) -> tuple[Callable[[int], Callable[[], object]], int, float]:
        weight = codes.to(dtype)
        copies = [weight.clone() for _ in range(int(ROTATED / weight.nbytes) + 1)]
        state = {"next": 0}

        def call(tokens: int) -> Callable[[], object]:
            x = torch.randn(tokens, K, generator=generator).to(dtype)

            def once() -> object:
                state["next"] = (state["next"] + 1) % len(copies)
                return torch.nn.functional.linear(x, copies[state["next"]])

            return once

        return call, len(copies), weight.nbytes

    for one in native.instruction_sets():
        if one.why_not is None:
            contenders[one.name] = ternary(one.name)
    contenders["torch fp32"], contenders["torch bf16"] = dense(torch.float32), dense(torch.bfloat16)
    return contenders


def kernels(rounds: int) -> dict[str, Any]:
    """GEMV in GB/s and weights/s, GEMM in multiply-accumulates/s; one of each contender a round."""
    contenders = kernel_contenders()
    times: dict[str, dict[int, list[float]]] = {name: {} for name in contenders}
    bandwidth = []
    with torch.inference_mode():
        for turn in range(rounds + 1):
            bandwidth.append(machine.read_bandwidth(1))
            for name, (call, copies, _) in contenders.items():
                for tokens in (1, 8, 64, 256):
                    if name == "scalar" and tokens > 8:
                        continue
                    action = call(tokens)
                    repeats = copies if tokens == 1 else 2
                    taken = seconds(lambda action=action, repeats=repeats: [action() for _ in range(repeats)]) / repeats
                    if turn:  # the first round warms up
                        times[name].setdefault(tokens, []).append(taken)
    rows = {}
    for name, by_tokens in times.items():
        size = contenders[name][2]
        rows[name] = {
            "bits_per_weight": size * 8 / (N * K),
            "gemv_gigabytes_per_second": spread([size / t / 1e9 for t in by_tokens[1]]),
            "gemv_gigaweights_per_second": spread([N * K / t / 1e9 for t in by_tokens[1]]),
            "gemm_gigamacs_per_second": {
                str(tokens): spread([tokens * N * K / t / 1e9 for t in taken])
                for tokens, taken in by_tokens.items()
                if tokens > 1
            },
        }
    return {"n": N, "k": K, "read_gigabytes_per_second": spread(bandwidth), "contenders": rows}


def kernel_table(report: dict[str, Any]) -> Table:
    """The kernels' figures for a person."""
    read = report["read_gigabytes_per_second"]["median"]
    table = Table(title=f"products, {N} x {K}, memory reads {read:.1f} GB/s", title_justify="left")
    for column in ("kernel", "bits", "GEMV GB/s", "of memory", "Gweights/s", "8 tokens", "64", "256 GMAC/s"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for name, row in report["contenders"].items():
        gemv = row["gemv_gigabytes_per_second"]["median"]
        gemm = row["gemm_gigamacs_per_second"]
        table.add_row(
            name,
            f"{row['bits_per_weight']:.2f}",
            f"{gemv:.1f}",
            f"{gemv / read:.0%}",
            f"{row['gemv_gigaweights_per_second']['median']:.0f}",
            *(f"{gemm[t]['median']:.0f}" if t in gemm else "-" for t in ("8", "64", "256")),
        )
    return table


def main() -> int:
    """Measure, print the table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads")
    options = parser.parse_args()
    use_threads(options.threads, "--threads")
    console = Console(stderr=True)
    report: dict[str, Any] = {"machine": machine.describe(), "instruction_set": native.select()}
    console.print(table.machine_line(report["machine"]))
    report["kernels"] = kernels(options.rounds)
    console.print(kernel_table(report["kernels"]))
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
