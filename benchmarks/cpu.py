"""The CPU kernels alone: python benchmarks/cpu.py (`bitnet bench` measures complete models)

Each instruction set: GEMV over more than 300 MB of weights in rotation, GEMM at 8, 64 and 256 tokens, beside torch's
products. Contenders take turns within one run. Medians and quartiles are reported, beside the read bandwidth of memory
measured between them. The last line of stdout is one JSON document.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bitnet.benchmarks.bench import machine, table
from bitnet.benchmarks.bench.interleaving import in_turn, quartiles
from bitnet.benchmarks.bench.random_model import random_codes
from bitnet.cli import guarded
from bitnet.kernels import native, packing
from bitnet.threads import use_threads

N, K = 2560, 6912  # down_proj of 2B4T, the largest in-features there are
ROTATED = 300e6  # bytes of weights in rotation: more than any cache that one core may fill


def seconds(action: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


class Weights:
    """Weights of one product, in as many copies as leave the caches. multiply(x, copy) computes the product."""

    def __init__(self, first: Tensor, multiply: Callable[[Tensor, Tensor], object], dtype: torch.dtype) -> None:
        self.copies = [first.clone() for _ in range(int(ROTATED / first.nbytes) + 1)]
        self.bytes = first.nbytes
        self._multiply, self._dtype, self._next = multiply, dtype, 0

    def call(self, tokens: int) -> Callable[[], object]:
        """A product of random activations [tokens, K]; each call takes the next copy."""
        if self._dtype == torch.int8:
            x = torch.randint(-127, 128, (tokens, K), dtype=torch.int8)
        else:
            x = torch.randn(tokens, K).to(self._dtype)

        def once() -> object:
            self._next = (self._next + 1) % len(self.copies)
            return self._multiply(x, self.copies[self._next])

        return once


def kernel_contenders() -> dict[str, Weights]:
    """The products of every available instruction set and of torch, by name."""
    codes = random_codes(N, K, torch.Generator().manual_seed(0))
    packed = packing.pack(codes)
    found = {}
    for one in native.instruction_sets():
        if one.why_not is None:
            prepared, _ = native.prepare(packed, K, one.name)
            found[one.name] = Weights(
                prepared, lambda q, w, isa=one.name: native.ternary_matmul(q, w, N, isa), torch.int8
            )
    for name, dtype in (("torch fp32", torch.float32), ("torch bf16", torch.bfloat16)):
        found[name] = Weights(codes.to(dtype), torch.nn.functional.linear, dtype)
    return found


def kernels(rounds: int) -> dict[str, Any]:
    """GEMV in GB/s and weights/s, GEMM in multiply-adds/s; every contender runs once in a round."""
    contenders = kernel_contenders()
    times: dict[str, dict[int, list[float]]] = {name: {} for name in contenders}
    bandwidth = []
    with torch.inference_mode():
        for turn in range(rounds + 1):
            bandwidth.append(machine.read_bandwidth(1))
            for name, weights in in_turn(list(contenders.items()), turn):
                for tokens in (1, 8, 64, 256):
                    if name == "scalar" and tokens > 8:
                        continue
                    action = weights.call(tokens)
                    repeats = len(weights.copies) if tokens == 1 else 2
                    taken = seconds(lambda action=action, repeats=repeats: [action() for _ in range(repeats)]) / repeats
                    if turn:  # the first round warms up
                        times[name].setdefault(tokens, []).append(taken)
    rows = {}
    for name, by_tokens in times.items():
        size = contenders[name].bytes
        rows[name] = {
            "bits_per_weight": size * 8 / (N * K),
            "gemv_gigabytes_per_second": quartiles([size / t / 1e9 for t in by_tokens[1]]),
            "gemv_gigaweights_per_second": quartiles([N * K / t / 1e9 for t in by_tokens[1]]),
            "gemm_gigamacs_per_second": {
                str(tokens): quartiles([tokens * N * K / t / 1e9 for t in taken])
                for tokens, taken in by_tokens.items()
                if tokens > 1
            },
        }
    return {"n": N, "k": K, "read_gigabytes_per_second": quartiles(bandwidth), "contenders": rows}


def kernel_table(report: dict[str, Any]) -> Table:
    """The kernels' figures as a table."""
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
