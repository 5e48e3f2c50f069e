"""What a device can do while contenders run on it: samples of its read bandwidth and of its products' peaks."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bitnet.benchmarks.bench import limits, machine
from bitnet.benchmarks.bench.meter import DOT_PRODUCTS
from bitnet.benchmarks.bench.plan import Test
from bitnet.benchmarks.bench.series import Series
from bitnet.benchmarks.children.process import Child, TooSlowError

FLOATS = ("torch fp32", "torch bf16")  # products that are held against their own peak; all others are int8
METER = 60.0  # seconds for one answer of the meter, which limits itself to 5 per way: a longer one hangs


@dataclass
class DeviceMeter:
    """What was measured of one device while contenders ran on so many threads. `start` makes the child that does it."""

    device: str
    start: Callable[[], Child]
    reads: dict[int, list[float]] = field(default_factory=dict)  # working set -> bytes/s, a sample per visit
    products: dict[str, list[float]] = field(default_factory=dict)  # kind -> multiply-adds/s; empty: it has none
    ways: dict[str, str] = field(default_factory=dict)  # kind -> torch's fastest way to compute it, or the kernel
    hung: set[str] = field(default_factory=set)  # kinds that were not measured in time
    child: Child | None = None

    def close(self) -> None:
        """End the child."""
        if self.child:
            self.child.close()
            self.child = None

    def _ask(self, do: str, **command: Any) -> dict[str, Any]:
        self.child = self.child or self.start()
        try:
            return self.child.ask(do, METER, **command)
        except TooSlowError:
            self.close()
            raise

    def read(self, sizes: set[int], status: Callable[[str], None]) -> None:
        """Take one more sample of each working set, and of memory."""
        for size in sorted({machine.MEMORY, *sizes}):
            status(f"measuring how fast {size / 1e6:,.3g} MB are read")
            self.reads.setdefault(size, []).append(self._ask("read", size=size)["rate"])

    def product(self, kinds: set[str], status: Callable[[str], None]) -> None:
        """Take one more sample of the peaks of these products."""
        for kind in sorted(kinds - self.hung):
            status(f"measuring the peak of {kind}")
            rates = self.products.setdefault(kind, [])
            try:
                answer = self._ask("product", kind=kind)
            except TooSlowError:  # a row without a peak has an unknown limit
                self.hung.add(kind)
                continue
            if answer["rate"]:
                if answer["rate"] > max(rates, default=0.0):
                    self.ways[kind] = answer["how"]
                rates.append(answer["rate"])

    @property
    def peaks(self) -> dict[str, float | None]:
        """Multiply-adds/s, the best of all visits; None where the device has no such product."""
        return {kind: max(rates, default=None) for kind, rates in self.products.items()}

    def bandwidth(self, size: int) -> float:
        """Bytes/s, the median of the samples."""
        return statistics.median(self.reads[size])


def working_set(series: Series, test: Test) -> int:
    """Bytes that a step reads, at most those of `machine.MEMORY`: larger sets are read no slower."""
    return min(machine.MEMORY, limits.working_set(series.model_bytes, test))


def needed_peaks(all_series: list[Series], tests: list[Test], device: str) -> set[str]:
    """The products that bound a row of these contenders on a device: their own and, for our int8 ones, those of others.

    Arithmetic bounds prompts and batches. A single answer reads more than it computes and needs no peak.
    """
    found: set[str] = set()
    for series in all_series:
        bound = [test for test in tests if test not in series.left_out and (test.prompt or test.batch > 1)]
        if bound and series.facts["peak"]:
            kind = series.facts["peak"]
            rivals = {"torch int8", DOT_PRODUCTS} if device == "cpu" else {"torch int8"}
            found |= {kind} | (rivals if series.contender.ours and kind not in FLOATS else set())
    return found
