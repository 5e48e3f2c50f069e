"""What the machine allows, measured in the same run by a separate child: read bandwidth and peaks of products.

    read      bytes per second at which the contenders' threads (or the GPU) read a working set of a given size, over
              and over: a model that fits in a cache is held against the cache, not against the memory
    product   multiply-adds per second of one kind of product on matrices that stay in the caches: the best of a few
              shapes and of torch's ways to compute it, without norms, attention or scales around it

Both begin with a short call and do less on a slow machine, so that neither takes much longer than its SECONDS.

Contenders name the kinds of products: an instruction set of our C++ kernels, "torch fp32", "torch bf16", "torch int8",
and "int8 dot products", which are our comparison kernels that multiply (VNNI), where the CPU has them.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from bitnet import dense_products
from bitnet.benchmarks.bench.random_model import random_codes
from bitnet.kernels import native, packing

_PASSES = 7  # over a large working set
_ENOUGH = 64 * 2**20  # bytes: a small working set is read until so much has been read
# Tokens, out-features, in-features, by rising cost: the largest packed weights fill a core's second-level cache.
_SHAPES = ((64, 1024, 1024), (256, 1024, 1024), (64, 2560, 2560), (256, 2560, 6912))
_ROUNDS = 5
READ_SECONDS = 3.0  # of one working set: 512 MB eight times at 1.4 GB/s
PRODUCT_SECONDS = 5.0  # of one kind and way: all shapes at 7 GMAC/s
Make = Callable[[int, int, int], Callable[[], object]]  # tokens, out-features, in-features -> one product
DOT_PRODUCTS = "int8 dot products"


class Meter:
    """Measures what contenders are held against. device: where they run."""

    def __init__(self, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self.device = torch.device(device)
        self.facts: dict[str, Any] = {}

    def read(self, size: int) -> dict[str, Any]:
        """Bytes per second of reading `size` bytes again and again."""
        passes = max(_PASSES, _ENOUGH // size)
        compiled = self.device.type == "cpu" and native.why_not() is None
        read = native.read_bandwidth if compiled else self._read_torch
        once = size / read(size, 1)
        rate = read(size, max(1, min(passes, int(READ_SECONDS / once))))
        return {"rate": rate, "how": "C++ loop" if compiled else f"torch sum on the {self.device.type}"}

    def _read_torch(self, size: int, passes: int) -> float:
        values = torch.ones(max(1, size // 4), device=self.device)
        return values.nbytes / self._seconds(values.sum, passes, READ_SECONDS)

    def product(self, kind: str) -> dict[str, Any]:
        """Multiply-adds per second of one kind of product, and how it was computed; None where it cannot be here."""
        with torch.inference_mode():
            makes = self._makes(kind)
            if not makes:
                return {"rate": None, "how": None}
            shapes = ((8192, 8192, 8192),) if self.device.type == "cuda" else _SHAPES
            rate, how = max((self._rate(make, shapes), name) for name, make in makes.items())
            return {"rate": rate, "how": how}

    def _rate(self, make: Make, shapes: Sequence[tuple[int, int, int]]) -> float:
        """Multiply-adds per second of the best shape; costly ones are tried only while there is time for them."""
        started, best = time.perf_counter(), 0.0
        for m, n, k in shapes:
            left = PRODUCT_SECONDS - (time.perf_counter() - started)
            if best and m * n * k / best * (_ROUNDS + 1) > left:
                break
            best = max(best, m * n * k / self._seconds(make(m, n, k), _ROUNDS, left))
        return best

    def _makes(self, kind: str) -> dict[str, Make]:
        """The ways to compute a kind of product that may be the fastest; none where this machine has none."""
        if kind.startswith("torch "):
            dtype = kind.removeprefix("torch ")
            if self.device.type == "cuda":
                return {"_int_mm" if dtype == "int8" else "linear": lambda m, n, k: self._on_gpu(dtype, m, n, k)}
            ways = [one.way for one in dense_products.contending(dense_products.probe(dtype))]
            return {way.name: partial(_dense, way, dtype) for way in ways}
        sets = {one.name: one for one in native.instruction_sets() if one.why_not is None}
        if kind == DOT_PRODUCTS:
            kind = next((name for name, one in sets.items() if one.multiplies), "")
        return {kind: lambda m, n, k: _packed(kind, m, n, k)} if kind in sets else {}

    def _on_gpu(self, dtype: str, m: int, n: int, k: int) -> Callable[[], object]:
        x, w = dense_products.operands(dtype, m, n, k, self.device)
        return (lambda: torch._int_mm(x, w.T)) if dtype == "int8" else (lambda: torch.nn.functional.linear(x, w))

    def _seconds(self, action: Callable[[], object], rounds: int, within: float) -> float:
        """Median seconds of a call after one warm-up call; fewer calls, or the first alone, where time is short."""
        first = self._call(action)
        rounds = min(rounds, int(within / first)) if first > 0 else rounds
        return statistics.median([self._call(action) for _ in range(rounds)]) if rounds else first

    def _call(self, action: Callable[[], object]) -> float:
        started = time.perf_counter()
        action()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started


def load(threads: int, device: str) -> Meter:
    """The meter that child.py asks for."""
    return Meter(threads, device)


def _dense(way: dense_products.Way, dtype: str, m: int, n: int, k: int) -> Callable[[], object]:
    x, weight = dense_products.operands(dtype, m, n, k)
    product = way.make(weight)
    return lambda: product(x)


def _packed(isa: str, m: int, n: int, k: int) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    prepared, _ = native.prepare(packing.pack(random_codes(n, k, generator)), k, isa)
    q = torch.randint(-127, 128, (m, k), generator=generator, dtype=torch.int8)
    return lambda: native.ternary_matmul(q, prepared, n, isa)
