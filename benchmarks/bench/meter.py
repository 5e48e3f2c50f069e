"""What the machine allows, measured in the same run by a process of its own: read bandwidth and products' peaks.

    read      bytes a second at which the contender's threads (or the GPU) read a working set of a given size, over and
              over: a model that fits in a cache is held against the cache, not against the memory
    product   multiply-adds a second of one kind of product on matrices that stay in the caches: the best of a few
              shapes, without norms, attention or scales around it

Kinds of products are named as contenders name them: an instruction set of our C++ kernels, "torch fp32", "torch bf16",
"torch int8", and "int8 dot products", which are our comparison kernels that multiply (VNNI), where the CPU has it.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from bitnet.benchmarks.bench.dense import bf16_product, int8_product
from bitnet.benchmarks.bench.random_model import random_codes
from bitnet.kernels import native, packing

_PASSES = 7  # over a large working set; small ones are read until _ENOUGH bytes have been
_ENOUGH = 64 * 2**20
# Tokens, out-features, in-features: packed weights in a core's second cache up to ones that fill it.
_SHAPES = ((64, 1024, 1024), (64, 2560, 2560), (256, 1024, 1024), (256, 2560, 6912))
_ROUNDS = 5
DOT_PRODUCTS = "int8 dot products"


class Contender:
    """No contender: what they are held against. device: where the contenders run."""

    def __init__(self, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self.device = torch.device(device)
        self.facts: dict[str, Any] = {}

    def read(self, size: int) -> dict[str, Any]:
        """Bytes a second of reading `size` bytes again and again."""
        passes = max(_PASSES, _ENOUGH // size)
        if self.device.type == "cuda":
            return {"rate": self._read_torch(size, passes), "how": "torch sum on the GPU"}
        if native.why_not() is None:
            return {"rate": native.read_bandwidth(size, passes), "how": "C++ loop"}
        return {"rate": self._read_torch(size, passes), "how": "torch sum"}

    def _read_torch(self, size: int, passes: int) -> float:
        values = torch.ones(max(1, size // 4), device=self.device)
        return values.nbytes / self._seconds(values.sum, passes)

    def product(self, kind: str) -> dict[str, Any]:
        """Multiply-adds a second of one kind of product; None where this machine has it not."""
        make = self._product(kind)
        if make is None:
            return {"rate": None}
        with torch.inference_mode():
            shapes = ((8192, 8192, 8192),) if self.device.type == "cuda" else _SHAPES
            return {"rate": max(m * n * k / self._seconds(make(m, n, k), _ROUNDS) for m, n, k in shapes)}

    def _product(self, kind: str) -> Callable[[int, int, int], Callable[[], object]] | None:
        if kind.startswith("torch "):
            return lambda m, n, k: self._dense(kind.removeprefix("torch "), m, n, k)
        sets = {one.name: one for one in native.instruction_sets() if one.why_not is None}
        if kind == DOT_PRODUCTS:
            kind = next((name for name, one in sets.items() if one.multiplies), "")
        return (lambda m, n, k: _packed(kind, m, n, k)) if kind in sets else None

    def _dense(self, dtype: str, m: int, n: int, k: int) -> Callable[[], object]:
        if dtype == "int8":
            q = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=self.device)
            w = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=self.device)
            if self.device.type == "cpu" and torch.backends.mkldnn.is_available():
                product = int8_product(w)
                return lambda: product(q)
            return lambda: torch._int_mm(q, w.T)
        kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
        a, b = (torch.randn(rows, k, device=self.device, dtype=kind) for rows in (m, n))
        if dtype == "bf16" and self.device.type == "cpu":
            product = bf16_product(b)
            return lambda: product(a)
        return lambda: torch.nn.functional.linear(a, b)

    def _seconds(self, action: Callable[[], object], rounds: int) -> float:
        """Median seconds of a call, after one that warms up."""
        taken = []
        for _ in range(rounds + 1):
            started = time.perf_counter()
            action()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            taken.append(time.perf_counter() - started)
        return statistics.median(taken[1:])

    def gpu_bytes(self) -> int:
        """Nothing: it holds no model."""
        return 0


def _packed(isa: str, m: int, n: int, k: int) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    prepared, _ = native.prepare(packing.pack(random_codes(n, k, generator)), k, isa)
    q = torch.randint(-127, 128, (m, k), generator=generator, dtype=torch.int8)
    return lambda: native.ternary_matmul(q, prepared, n, isa)
