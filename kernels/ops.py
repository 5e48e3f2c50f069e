"""Backends for the integer products: which exist, why one is not available, and the products themselves.

Two products, both exact in int32 on every backend:

    codes_matmul(q, codes)        int8 activations [M, K] x int8 codes [N, K]; training, where codes are fresh
    packed_matmul(q, prepared)    int8 activations [M, K] x weights prepared once from the packed file

BACKENDS is in order of priority: a device uses the first that can run on it. BITNET_BACKEND=name forces one, and is an
error if that one cannot run: there is no silent fallback.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bitnet.kernels import native, packing, reference
from bitnet.kernels.gpu import device as gpu

ENVIRONMENT = "BITNET_BACKEND"

# fp32 holds every integer up to 2^24, so a float product of codes is exact while 127 * K stays below it.
_EXACT_FP32_K = 2**24 // reference.Q_MAX


@dataclass(frozen=True)
class Backend:
    """One way to compute the products; `why_not(device)` is None if it can run there, else the reason."""

    name: str
    summary: str
    why_not: Callable[[torch.device], str | None]
    codes_matmul: Callable[[Tensor, Tensor], Tensor]  # q [M, K] int8, codes [N, K] int8 -> [M, N] int32
    prepare: Callable[[Tensor, int], Any]  # packed [N, ceil(K / 4)] uint8, K -> the backend's own layout
    packed_matmul: Callable[[Tensor, Any], Tensor]  # q [M, K] int8, prepared -> [M, N] int32


@dataclass(frozen=True)
class Prepared:
    """Packed weights [n, k] in the layout of the backend that multiplies by them."""

    backend: Backend
    data: Any
    n: int
    k: int

    @property
    def nbytes(self) -> int:
        """Bytes of memory they take."""
        parts = self.data if isinstance(self.data, tuple) else (getattr(self.data, "data", self.data),)
        return sum(part.nbytes for part in parts if isinstance(part, Tensor))


# A constant, because asking inside a compiled function breaks its graph.
_HAS_ONEDNN = torch.backends.mkldnn.is_available()


def _onednn_why_not(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"int8 products through oneDNN run on a CPU, not on {device.type}"
    if not _HAS_ONEDNN:
        return "this build of torch has no oneDNN"
    return None


def _onednn_matmul(q: Tensor, codes: Tensor) -> Tensor:
    if q.shape[1] == 1:  # torch._int_mm then mistakes the layout of codes.T and leaves its output unwritten
        return q.to(torch.int32) * codes.T.to(torch.int32)
    return torch._int_mm(q, codes.T)


def _float_matmul(q: Tensor, codes: Tensor) -> Tensor:
    # Codes and int8 values are exact in every float format down to bf16 (TF32 included). Sums in fp32 are exact up to
    # 2^24: longer rows are cut there, and their parts added as integers.
    k = q.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        if k <= _EXACT_FP32_K:
            return (q.float() @ codes.float().T).to(torch.int32)
        parts = range(0, k, _EXACT_FP32_K)
        acc = torch.zeros(q.shape[0], codes.shape[0], dtype=torch.int32, device=q.device)
        for part in (slice(i, i + _EXACT_FP32_K) for i in parts):
            acc += (q[:, part].float() @ codes[:, part].float().T).to(torch.int32)
        return acc


def _native_why_not(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"C++ kernels run on a CPU, not on {device.type}"
    try:
        native.select()
    except ValueError as error:
        return str(error)
    return None


# Fresh codes of training go to oneDNN: rearranging them for the lookups would cost more than these save.
def _fresh_matmul(q: Tensor, codes: Tensor) -> Tensor:
    return _float_matmul(q, codes) if _onednn_why_not(q.device) else _onednn_matmul(q, codes)


def _native_prepare(packed: Tensor, k: int, isa: str | None = None) -> tuple[Tensor, str, int]:
    data, isa = native.prepare(packed, k, isa)
    return data, isa, packed.shape[0]


def _native_matmul(q: Tensor, prepared: tuple[Tensor, str, int]) -> Tensor:
    data, isa, n = prepared
    return native.ternary_matmul(q, data, n, isa)


CPU = Backend(
    "cpu",
    "C++: looks partial sums up and adds them, no multiplication by a weight",
    _native_why_not,
    _fresh_matmul,
    _native_prepare,
    _native_matmul,
)


# Triton takes most of a second to import: import it only to multiply on a GPU.
def _triton_codes_matmul(q: Tensor, codes: Tensor) -> Tensor:
    from bitnet.kernels.gpu import products

    with gpu.current(q.device):
        return products.codes_matmul(q, codes)


def _triton_prepare(packed: Tensor, k: int) -> Any:
    from bitnet.kernels.gpu import layout

    return layout.arrange(packed, k)


def _triton_packed_matmul(q: Tensor, weights: Any) -> Tensor:
    from bitnet.kernels.gpu import products

    with gpu.current(q.device):
        return products.packed_matmul(q, weights)


TRITON = Backend(
    "triton",
    "Triton kernels on an NVIDIA GPU: dp4a and int8 tensor cores, weights at two bits",
    gpu.why_not,
    _triton_codes_matmul,
    _triton_prepare,
    _triton_packed_matmul,
)
ONEDNN = Backend(
    "onednn",
    "int8 x int8 products by oneDNN (VNNI where the CPU has it)",
    _onednn_why_not,
    _onednn_matmul,
    packing.unpack,
    _onednn_matmul,
)
FLOAT = Backend(
    "float",
    "fp32 products of the codes, any device",
    lambda device: None,
    _float_matmul,
    packing.unpack,
    _float_matmul,
)
REFERENCE = Backend(
    "reference",
    "int32 products in plain torch: the reference that the others are tested against",
    lambda device: None if device.type == "cpu" else "torch has integer matrix products on the CPU only",
    reference.matmul,
    lambda packed, k: packed,
    reference.packed_matmul,
)


def cpu_backend(isa: str) -> Backend:
    """The C++ backend on a given instruction set."""
    return replace(CPU, prepare=lambda packed, k: _native_prepare(packed, k, isa))


BACKENDS: tuple[Backend, ...] = (TRITON, CPU, ONEDNN, FLOAT, REFERENCE)


def select(device: torch.device) -> Backend:
    """The backend for a device: the one BITNET_BACKEND names, else the first that can run.

    Raises ValueError when the named one, or the instruction set that BITNET_CPU names, does not exist or cannot run.
    """
    forced = os.environ.get(ENVIRONMENT)
    if forced:
        known = {backend.name: backend for backend in BACKENDS}
        if forced not in known:
            raise ValueError(f"{ENVIRONMENT}: got '{forced}', expected one of {', '.join(known)}")
        reason = known[forced].why_not(device)
        if reason:
            raise ValueError(f"{ENVIRONMENT}={forced} cannot be used: {reason}; unset it to let bitnet choose")
        return known[forced]
    if device.type == "cpu" and native.why_not() is None:
        native.select()  # an unusable BITNET_CPU is an error, not a reason to take another backend
    return next(backend for backend in BACKENDS if backend.why_not(device) is None)


def selected(device: torch.device) -> str:
    """The name of `select`."""
    return select(device).name


# What torch.compiler.assume_constant_result sets. The answer does not change while a graph lives, and reading the
# environment or asking the C++ library would break the graph. The decorator itself would import the compiler, which
# takes seconds. It marks a function that returns a name: a graph holds numbers and strings as constants, not backends.
selected._dynamo_marked_constant = True  # type: ignore[attr-defined]


def trains_fused(device: torch.device) -> bool:
    """Whether linear layers on `device` use the fused operators of kernels/gpu/training.py."""
    return selected(device) == TRITON.name


def codes_matmul(q: Tensor, codes: Tensor) -> Tensor:
    """Integer product of int8 activations [M, K] and ternary codes [N, K] int8. Returns [M, N] int32, exact."""
    _check_activations(q, codes.shape[-1])
    if codes.dtype != torch.int8 or codes.dim() != 2 or codes.device != q.device:
        raise ValueError(
            f"codes: got {codes.dtype} {tuple(codes.shape)} on {codes.device}, expected int8 [N, K] on {q.device}"
        )
    name = selected(q.device)
    return next(backend for backend in BACKENDS if backend.name == name).codes_matmul(q, codes)


def prepare(packed: Tensor, k: int, backend: Backend | None = None) -> Prepared:
    """Rearrange packed weights [N, ceil(k / 4)] uint8 for a backend (default: the selected one).

    Raises TypeError / ValueError when `packed` is not a valid image of [N, k] codes.
    """
    packing.check(packed, k)
    backend = backend or select(packed.device)
    return Prepared(backend, backend.prepare(packed, k), packed.shape[0], k)


def packed_matmul(q: Tensor, weights: Prepared) -> Tensor:
    """Integer product of int8 activations [M, K] and prepared weights [N, K]. Returns [M, N] int32, exact."""
    _check_activations(q, weights.k)
    return weights.backend.packed_matmul(q, weights.data)


def _check_activations(q: Tensor, k: int) -> None:
    if q.dtype != torch.int8 or q.dim() != 2 or q.shape[1] != k:
        raise ValueError(f"activations: got {q.dtype} {tuple(q.shape)}, expected int8 [M, {k}]")


# Awkward sizes: one row, one column, primes, K not a multiple of 4, 16 or 64, sums that wrap in 16 bits.
_SELF_TEST_SHAPES = ((1, 1, 1), (3, 7, 1), (1, 129, 257), (3, 67, 101), (17, 31, 63), (64, 48, 100), (2, 5, 4099))


def self_test(backend: Backend, device: torch.device) -> str | None:
    """Compare a backend with the reference on random and extreme inputs. Returns None, or what differed."""
    generator = torch.Generator()
    generator.seed()
    for m, n, k in _SELF_TEST_SHAPES:
        codes = torch.randint(-1, 2, (n, k), generator=generator, dtype=torch.int8)
        codes[0] = 1  # with activations of 127 everywhere: the largest sum possible
        for q in (
            torch.randint(-127, 128, (m, k), generator=generator, dtype=torch.int8),
            torch.full((m, k), 127, dtype=torch.int8),
        ):
            expected = reference.matmul(q, codes)
            weights = prepare(packing.pack(codes).to(device), k, backend)
            for name, got in (
                ("codes", backend.codes_matmul(q.to(device), codes.to(device))),
                ("packed", packed_matmul(q.to(device), weights)),
            ):
                if got.dtype != expected.dtype or got.shape != expected.shape:
                    return f"{name} product M{m}-N{n}-K{k}: got {got.dtype} {tuple(got.shape)}, expected int32 [M, N]"
                if not torch.equal(got.cpu(), expected):
                    wrong = int((got.cpu() != expected).sum())
                    return f"{name} product M{m}-N{n}-K{k}: {wrong} of {m * n} sums differ from the reference"
    return None
