"""Dense products of torch on a CPU: the ways torch has to compute one, and which is the fastest on this machine.

Which way is fast depends on the CPU. Multiply-adds a second (billions) of one thread on an Intel Xeon, with AMX and
with oneDNN limited to what an AMD EPYC of 2024 has (ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16), weights 13824 x 2560:

                                       AMX, 1 row    AMX, 128 rows    no AMX, 1 row    no AMX, 128 rows
    int8  onednn.qlinear_pointwise             25              443            0.002                0.03
          _int_mm                              14              230               15                 137
    bf16  mkldnn._linear_pointwise              8              282                4                  30
          linear                                4              195                3                  28

qlinear_pointwise with signed activations has a fast kernel on CPUs with AMX; without it oneDNN runs its
reference code (`ref_int8` under ONEDNN_VERBOSE=1), ten thousand times slower. The function `compare` therefore first
times a product so small that even the reference code ends in a twentieth of a second, drops the ways that are far
behind, and times the others at the size that is asked about.

Dimensions: M rows, K in-features, N out-features.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor], Tensor]  # [M, K] -> [M, N]; of int8 the sums alone, int32 or fp32
Clock = Callable[[], float]  # seconds

# Up to so many rows, a token of each sequence, a product reads its weights and does little else; more are a prompt.
FEW_ROWS = 16
# With fewer, oneDNN 3.12 takes a path a thousand times slower for some shapes: rows of zeros are cheaper.
_LEAST_ROWS = 16
_PROBE = (16, 256, 256)  # M, N, K: a million multiply-adds, 0.05 s at the 0.02 billion a second of reference code
_FAR = 10.0  # times slower than the best: reference code is thousands of times slower, neighbours within three
_CALLS = 20  # of which the fastest counts: a neighbour can only slow one down
_PROBE_SECONDS = 0.05  # after which no other call begins: reference code gets one
_SECONDS = 0.2  # the same at the full size, where a product that takes a quarter of it is cut to fewer out-features


@dataclass(frozen=True)
class Way:
    """One way to compute a product: `make` brings a weight [N, K] into the layout it wants."""

    name: str
    make: Callable[[Tensor], Product]


@dataclass(frozen=True)
class Timed:
    """A way and its multiply-adds a second here. rate is None where it cannot run, for the reason `why_not`."""

    way: Way
    rate: float | None
    why_not: str = ""
    exact: bool = True  # whether sums of full-range int8 are right; without VNNI they saturate


def _qlinear(weight: Tensor) -> Product:
    """weight: [N, K] int8. Returns [M, K] int8 -> [M, N] fp32."""
    ordered = torch.ops.onednn.qlinear_prepack(weight, None)
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int64)

    def product(q: Tensor) -> Tensor:
        rows = q if q.shape[0] >= _LEAST_ROWS else F.pad(q, (0, 0, 0, _LEAST_ROWS - q.shape[0]))
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            rows, 1.0, 0, ordered, one, zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y[: q.shape[0]]

    return product


def _int_mm(weight: Tensor) -> Product:
    """weight: [N, K] int8. Returns [M, K] int8 -> [M, N] int32."""
    if weight.shape[1] == 1:  # torch 2.13 takes such a transpose for another layout and leaves its output unwritten
        return lambda q: q.to(torch.int32) * weight.T.to(torch.int32)
    return lambda q: torch._int_mm(q, weight.T)


def _linear_pointwise(weight: Tensor) -> Product:
    """weight: [N, K] bf16."""
    ordered = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, ordered, None, "none", [], "")


def _linear(weight: Tensor) -> Product:
    return lambda x: F.linear(x, weight)


_PREPACKED = {
    "int8": Way("onednn.qlinear_pointwise", _qlinear),
    "bf16": Way("mkldnn._linear_pointwise", _linear_pointwise),
}
_PLAIN = {"int8": Way("_int_mm", _int_mm), "bf16": Way("linear", _linear), "fp32": Way("linear", _linear)}
_TYPES = {"int8": torch.int8, "bf16": torch.bfloat16, "fp32": torch.float32}


def ways(dtype: str) -> list[Way]:
    """The ways of this build of torch to multiply in int8, bf16 or fp32."""
    prepacked = [_PREPACKED[dtype]] if dtype in _PREPACKED and torch.backends.mkldnn.is_available() else []
    return [*prepacked, _PLAIN[dtype]]


def operands(dtype: str, rows: int, n: int, k: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Random rows [M, K] and weights [N, K]."""
    if dtype == "int8":
        x, w = (torch.randint(-127, 128, (count, k), dtype=torch.int8, device=device) for count in (rows, n))
    else:
        x, w = (torch.randn(count, k, device=device, dtype=_TYPES[dtype]) for count in (rows, n))
    return x, w


def probe(dtype: str, found: list[Way] | None = None, clock: Clock = time.perf_counter) -> list[Timed]:
    """All ways at a small size, the fastest first; those that cannot run, or compute wrong sums, last.

    On one thread: a second one that waits for a CPU would make any way as slow as reference code.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        timed = [_probed(way, dtype, clock) for way in (ways(dtype) if found is None else found)]
    finally:
        torch.set_num_threads(threads)
    return sorted(timed, key=lambda one: -(one.rate or 0.0))


def compare(
    dtype: str, rows: int, n: int, k: int, found: list[Way] | None = None, clock: Clock = time.perf_counter
) -> list[Timed]:
    """All ways as `probe` gives them; those that are not far behind timed at [rows, k] x [n, k]."""
    timed = probe(dtype, found, clock)
    near = contending(timed)
    if len(near) < 2:
        return timed
    slowest = min(one.rate or 0.0 for one in near)
    n = max(1, min(n, int(slowest * _SECONDS / 4 / (rows * k))))
    x, weight = operands(dtype, rows, n, k)
    again = [
        Timed(one.way, rows * n * k / _fastest(one.way.make(weight), x, clock, _SECONDS), "", one.exact) for one in near
    ]
    rest = [one for one in timed if one not in near]
    return sorted(again, key=lambda one: -(one.rate or 0.0)) + rest


def contending(timed: list[Timed]) -> list[Timed]:
    """Those of `timed` that are not far behind the fastest."""
    best = max((one.rate or 0.0 for one in timed), default=0.0)
    return [one for one in timed if one.rate and one.rate * _FAR >= best]


def remark(timed: list[Timed]) -> str:
    """Which ways are left out here, and why; empty where none is."""
    near = contending(timed)
    parts = [
        f"{one.way.name} {f'runs reference code here, {one.rate / 1e9:.2g} GMAC/s' if one.rate else one.why_not}"
        for one in timed
        if one not in near
    ]
    if near and not near[0].exact:
        parts.append(f"{near[0].way.name} saturates sums of full-range weights: this CPU has no VNNI")
    return "; ".join(parts)


def _probed(way: Way, dtype: str, clock: Clock) -> Timed:
    rows, n, k = _PROBE
    x, weight = operands(dtype, rows, n, k)
    try:
        product = way.make(weight)
        rate = rows * n * k / _fastest(product, x, clock, _PROBE_SECONDS)
        exact = dtype != "int8" or _right(product(x), x, weight)
        ternary = weight.remainder(3) - 1 if dtype == "int8" else weight
        good = exact or _right(way.make(ternary)(x), x, ternary)
    except (RuntimeError, AttributeError) as error:  # this CPU, or this build of torch, does not have it
        return Timed(way, None, "cannot run here: " + " ".join(str(error).split()))
    return Timed(way, rate, "", exact) if good else Timed(way, None, "computes wrong sums here", False)


def _right(got: Tensor, x: Tensor, weight: Tensor) -> bool:
    return torch.equal(got.double(), x.double() @ weight.double().T)  # sums below 2^24, which fp32 holds too


def _fastest(product: Product, x: Tensor, clock: Clock, seconds: float) -> float:
    """Seconds of the fastest of some calls, after one that warms up; no call begins after `seconds`."""
    product(x)
    begun = clock()
    taken: list[float] = []
    while not taken or (len(taken) < _CALLS and clock() - begun < seconds):
        started = clock()
        product(x)
        taken.append(clock() - started)
    return max(min(taken), 1e-9)  # a clock may stand still between two readings
