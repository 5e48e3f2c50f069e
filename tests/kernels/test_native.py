"""The compiled CPU products: every instruction set gives the reference's int32 sums, and a clear no to all else.

Sums of int8 times {-1, 0, +1} are exact in int32 while 128 * K < 2^31, so for every K below 2^24, which is the limit
that the kernels state; 100,000 and a million are tried at the extremes.
"""

import importlib
import json
import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import child_process
import numpy as np
import pytest
import torch
from compiler import why_no_compiler
from torch import Tensor, nn

from bitnet.cli import main
from bitnet.config import ModelConfig
from bitnet.doctor import examine
from bitnet.engine.cpu import CpuEngine
from bitnet.engine.load import load
from bitnet.engine.torch import TorchEngine
from bitnet.errors import BitNetError
from bitnet.files.packed import write_packed
from bitnet.kernels import native, ops, packing, reference
from bitnet.layers import BitLinear, PackedLinear
from bitnet.model import Transformer

CPU = torch.device("cpu")
SETS = native.instruction_sets()
HERE = [one.name for one in SETS if one.why_not is None]
SHAPES_EACH, CHUNKS = 7_200, 4  # random shapes an instruction set, in chunks so that a failure is found early

# Sizes at which something ends: tokens of a step (4) and of a block (16, 32, 64), tiles of 32 rows, panels of 128;
# words of 4, 9 and 16 weights, runs of int16 sums (240, 243, 252, 256 weights), stretches of K (972, 1280, 4096).
TOKENS = (1, 1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 79, 80, 81, 96, 97, 113, 127, 129)
ROWS = (1, 2, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 160, 191, 257, 289)
WEIGHTS = (
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    10,
    15,
    16,
    17,
    18,
    19,
    35,
    36,
    37,
    63,
    64,
    65,
    97,
    143,
    144,
    145,
    239,
    240,
    241,
    243,
)
WEIGHTS += (244, 251, 252, 253, 255, 256, 257, 261, 271, 511, 971, 972, 973, 1279, 1280, 1281, 1283, 4096, 4097)
WORK = 600_000  # multiply-accumulates of a shape: the reference is a plain loop


@pytest.fixture(params=SETS or [None], ids=lambda one: one.name if one else "none")
def isa(request: pytest.FixtureRequest) -> str:
    if request.param is None:
        pytest.skip(str(native.why_not()))
    if request.param.why_not:
        pytest.skip(f"{request.param.name}: {request.param.why_not}")
    return request.param.name


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.ENVIRONMENT, raising=False)
    monkeypatch.delenv(ops.ENVIRONMENT, raising=False)


@pytest.fixture
def poisoned(poison: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer that the wrappers allocate starts as 0x55 bytes."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    assert torch.empty(3, dtype=torch.int32).tolist() == [0x55555555] * 3


needs_module = pytest.mark.skipif(not SETS, reason=str(native.why_not()))


def draw(m: int, n: int, k: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    q = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=rng)
    return q, torch.randint(-1, 2, (n, k), dtype=torch.int8, generator=rng)


def product(isa: str, q: Tensor, codes: Tensor) -> Tensor:
    prepared, used = native.prepare(packing.pack(codes), codes.shape[1], isa)
    assert used == isa
    return native.ternary_matmul(q, prepared, codes.shape[0], isa)


def check(isa: str, q: Tensor, codes: Tensor) -> None:
    where = f"{isa} M{q.shape[0]}-N{codes.shape[0]}-K{q.shape[1]}"
    expected, got = reference.matmul(q, codes), product(isa, q, codes)
    assert got.dtype == torch.int32, where
    if not torch.equal(got, expected):
        row, column = (got != expected).nonzero()[0].tolist()
        pytest.fail(f"{where}: at [{row}, {column}] got {got[row, column]}, expected {expected[row, column]}")


# ---- the sums ----------------------------------------------------------------------------------------------


def test_what_this_machine_lacks() -> None:
    names = [one.name for one in SETS]
    assert len(set(names)) == len(names)
    assert not SETS or "scalar" in HERE  # runs anywhere
    assert [one.name for one in SETS if one.multiplies] in ([], ["vnni"])
    print("not on this machine:", {one.name: one.why_not for one in SETS if one.why_not} or "none")


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_shapes(isa: str, chunk: int, rng: torch.Generator, poisoned: None) -> None:
    def pick(sizes: tuple[int, ...], most: int) -> int:
        """One of the awkward ones, or any."""
        index = int(torch.randint(2 * len(sizes), (), generator=rng))
        return sizes[index] if index < len(sizes) else int(torch.randint(1, most + 1, (), generator=rng))

    for number in range(SHAPES_EACH // CHUNKS):
        m, n, k = pick(TOKENS, 12), pick(ROWS, 200), pick(WEIGHTS, 300)
        if m * n * k > WORK:  # an awkward size stays: one of the others becomes one
            m, n = (m, 1) if number % 2 else (1, n)
        q, codes = draw(m, n, k, rng)
        if number % 8 == 0:  # the largest sums there are
            q, codes = torch.full_like(q, 127 if number % 16 else -127), torch.ones_like(codes)
        check(isa, q, codes)


@pytest.mark.parametrize("weights", [-1, 0, 1])
@pytest.mark.parametrize("activations", [-127, 0, 127])
def test_extremes(isa: str, weights: int, activations: int, poisoned: None) -> None:
    for m in (1, 2, 3, 4, 9, 17, 33, 65):
        for n, k in ((1, 1), (31, 3), (33, 64), (129, 253), (2, 1021), (33, 2304)):
            check(isa, torch.full((m, k), activations).to(torch.int8), torch.full((n, k), weights).to(torch.int8))


@pytest.mark.parametrize("m", [1, 3, 5, 20, 40])
@pytest.mark.parametrize("k", [20_011, 100_000])
def test_long_rows_do_not_overflow(isa: str, m: int, k: int) -> None:
    """127 * 100,000 is far beyond what 16 bits hold and 1 in 169 of what 32 bits do."""
    q, codes = torch.full((m, k), 127, dtype=torch.int8), torch.ones(33, k, dtype=torch.int8)
    q[-1] = -127
    q[-1, -1] = -126  # an odd sum
    codes[1] = -1
    codes[2, ::3] = 0
    got = product(isa, q, codes)
    assert int(got[0, 0]) == (127 * k if m > 1 else 1 - 127 * k)
    check(isa, q, codes)


def test_a_million_weights_a_row(isa: str) -> None:
    k = 1_000_003
    for sign in (1, -1):
        got = product(isa, torch.full((1, k), 127 * sign, dtype=torch.int8), torch.ones(1, k, dtype=torch.int8))
        assert got.tolist() == [[127 * k * sign]]


@pytest.mark.parametrize("k", [100, 255, 3000])
def test_minus_128_does_not_overflow(isa: str, k: int) -> None:
    """The quantiser never makes it, yet int8 holds it."""
    for m in (1, 4, 40):
        for weight in (-1, 1):
            check(isa, torch.full((m, k), -128, dtype=torch.int8), torch.full((3, k), weight, dtype=torch.int8))


def test_one_weight_at_a_time(isa: str, rng: torch.Generator) -> None:
    """Each place of a row, with each value: a weight that went astray shows where."""
    k = 150
    codes = torch.cat((torch.eye(k), -torch.eye(k))).to(torch.int8)
    for m in (1, 4, 35):
        check(isa, draw(m, 1, k, rng)[0], codes)


@pytest.mark.parametrize("m", [1, 4, 6, 70])
def test_threads_change_nothing(isa: str, m: int, rng: torch.Generator, poisoned: None) -> None:
    """Panels of 128 rows go to threads: fewer of them than threads, as many, and more."""
    for n, k in ((1, 1), (33, 100), (129, 997), (300, 64), (1000, 271)):
        q, codes = draw(m, n, k, rng)
        layouts, sums = [], []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            layouts.append(native.prepare(packing.pack(codes), k, isa)[0])
            sums.append(native.ternary_matmul(q, layouts[0], n, isa))
        assert torch.equal(sums[0], reference.matmul(q, codes))
        for layout, got in zip(layouts, sums, strict=True):
            assert torch.equal(layout, layouts[0])
            assert torch.equal(got, sums[0])


def test_every_byte_of_the_layout_is_written(isa: str, rng: torch.Generator) -> None:
    for n, k in ((1, 1), (33, 10), (97, 145), (130, 1285)):
        packed = packing.pack(draw(1, n, k, rng)[1]).numpy()
        size = native.module().prepared_bytes(isa, n, k)
        buffers = [torch.full((size,), poison, dtype=torch.uint8) for poison in (0x00, 0x55, 0xFF)]
        for buffer in buffers:
            native.module().prepare(isa, packed, k, buffer.numpy(), 1)
            assert torch.equal(buffer, buffers[0]), f"N{n}-K{k}"


def test_no_tokens(isa: str) -> None:
    got = product(isa, torch.ones(0, 7, dtype=torch.int8), torch.ones(5, 7, dtype=torch.int8))
    assert (tuple(got.shape), got.dtype) == ((0, 5), torch.int32)


def test_views_are_multiplied_as_seen(isa: str, rng: torch.Generator) -> None:
    q, codes = draw(40, 66, 62, rng)
    for a, b in ((q[::2, ::2], codes[:, ::2]), (q.T[:20, :40], codes[:, :40]), (q[3:4], codes[5:7])):
        check(isa, a, b)
    packed = packing.pack(codes)
    strided = torch.zeros(66, 2 * packed.shape[1], dtype=torch.uint8)[:, ::2].copy_(packed)
    prepared, _ = native.prepare(strided, 62, isa)
    assert torch.equal(native.ternary_matmul(q, prepared, 66, isa), reference.matmul(q, codes))


def test_many_callers_at_once(isa: str, rng: torch.Generator) -> None:
    """The GIL is released: callers with other shapes and other thread counts wait for each other, and stay apart."""
    cases = [draw(m, n, k, rng) for m, n, k in ((1, 100, 300), (3, 33, 1000), (20, 64, 65), (70, 129, 31))]
    prepared = [native.prepare(packing.pack(codes), codes.shape[1], isa)[0].numpy() for _, codes in cases]
    expected = [reference.matmul(*case) for case in cases]

    def work(number: int) -> bool:
        i = number % len(cases)
        q, codes = cases[i]
        out = torch.full((q.shape[0], codes.shape[0]), 0x55555555, dtype=torch.int32)
        threads = 1 + number // 50 % 3
        native.module().matmul(isa, prepared[i], *codes.shape, q.numpy(), out.numpy(), threads)
        return torch.equal(out, expected[i])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(300)))


@needs_module
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_multiplies_too() -> None:
    """Threads do not survive a fork (a data loader's worker): the child starts its own."""
    # The child keeps off torch: its OpenMP threads do not come back.
    code = """
import os, numpy, torch
from bitnet.kernels import native, packing, reference
q, codes = torch.randint(-127, 128, (5, 300)).to(torch.int8), torch.randint(-1, 2, (400, 300)).to(torch.int8)
expected, (prepared, isa) = reference.matmul(q, codes).numpy(), native.prepare(packing.pack(codes), 300)
q, prepared = q.numpy(), prepared.numpy()
def right(threads):
    out = numpy.zeros((5, 400), numpy.int32)
    native.module().matmul(isa, prepared, 400, 300, q, out, threads)
    return (out == expected).all()
assert right(2)
child = os.fork()
if child == 0:
    os._exit(0 if right(2) and right(3) and right(2) else 3)
assert right(2) and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("both")
"""
    command = [sys.executable, "-W", "ignore", "-c", code]  # Python 3.12 warns of any fork beside threads
    done = child_process.run(command, check=False)
    assert (done.returncode, done.stdout) == (0, "both\n"), done.stderr


# ---- the op of torch ---------------------------------------------------------------------------------------


def test_the_op_keeps_torchs_rules(isa: str, rng: torch.Generator) -> None:
    """Schema, fake tensors, autograd registration and tracing with dynamic shapes, as torch itself checks them."""
    for m, n, k in ((1, 5, 9), (20, 33, 64)):
        q, codes = draw(m, n, k, rng)
        prepared, _ = native.prepare(packing.pack(codes), k, isa)
        torch.library.opcheck(torch.ops.bitnet.ternary_matmul.default, (q, prepared, n, isa))


def test_the_op_compiles_without_a_break(isa: str, rng: torch.Generator) -> None:
    q, codes = draw(6, 33, 50, rng)
    prepared, _ = native.prepare(packing.pack(codes), 50, isa)

    def double(q: Tensor) -> Tensor:
        return torch.ops.bitnet.ternary_matmul(q, prepared, 33, isa) * 2

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q), 2 * reference.matmul(q, codes))
    assert torch.equal(compiled(q[:3]), 2 * reference.matmul(q[:3], codes))  # another number of tokens


class Foreign(nn.Module):
    """Somebody else's model: it knows nothing of backends."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) + 1
        return x


@needs_module
def test_a_foreign_module_uses_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    matmul = native.ternary_matmul
    monkeypatch.setattr(native, "ternary_matmul", lambda *args: (calls.append(args[0].shape), matmul(*args))[1])
    trained = [BitLinear(37, 50, bias=False), BitLinear(50, 11, bias=False)]
    packed = [PackedLinear.from_bit_linear(layer) for layer in trained]
    x = torch.randn(2, 5, 37)
    with torch.no_grad():
        got = Foreign(*packed)(x)
    assert calls == [(10, 37), (10, 50)]
    for layer in packed:
        backend, data = layer.prepare().backend, layer.prepare().data
        assert (backend, data[1]) == (ops.CPU, native.select())
    monkeypatch.setenv(ops.ENVIRONMENT, "reference")
    with torch.no_grad():
        assert torch.equal(got, Foreign(*(PackedLinear.from_bit_linear(layer) for layer in trained))(x))
    assert len(calls) == 2


@needs_module
def test_a_foreign_module_compiles() -> None:
    model = Foreign(PackedLinear.from_bit_linear(BitLinear(24, 40, bias=False)))
    x = torch.randn(3, 24)
    with torch.no_grad():
        expected = model(x)  # prepares
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


# ---- refusals ----------------------------------------------------------------------------------------------


class Call:
    """Right arguments of the compiled product, to be spoilt one by one."""

    def __init__(self, isa: str) -> None:
        codes = torch.ones(33, 21, dtype=torch.int8)
        self.isa, self.n, self.k, self.threads = isa, 33, 21, 1
        self.packed = packing.pack(codes).numpy()
        self.prepared = native.prepare(packing.pack(codes), 21, isa)[0].numpy()
        self.q = np.ones((4, 21), dtype=np.int8)
        self.out = np.zeros((4, 33), dtype=np.int32)

    def __call__(self) -> np.ndarray:
        native.module().matmul(self.isa, self.prepared, self.n, self.k, self.q, self.out, self.threads)
        return self.out

    def prepare(self) -> None:
        native.module().prepare(self.isa, self.packed, self.k, self.prepared, self.threads)


def beside(array: np.ndarray, offset: int) -> np.ndarray:
    """The same bytes, `offset` behind a multiple of 64."""
    room = np.zeros(array.nbytes + 128, dtype=np.uint8)
    start = -room.ctypes.data % 64 + offset
    room[start : start + array.nbytes] = array
    return room[start : start + array.nbytes]


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


WRONG_PRODUCTS: dict[str, tuple[Callable[[Call], dict[str, object]], type[Exception], str]] = {
    "unknown set": (lambda c: {"isa": "abacus"}, ValueError, "instruction set: got 'abacus'"),
    "too few bytes": (lambda c: {"prepared": c.prepared[:-64]}, ValueError, r"got \d+ bytes that were not prepared"),
    "no bytes": (lambda c: {"prepared": c.prepared[:0]}, ValueError, "prepared weights: got 0 bytes"),
    "too many rows": (
        lambda c: {"n": 65, "out": np.zeros((4, 65), np.int32)},
        ValueError,
        r"not prepared for \w+ \[65, 21\]",
    ),
    "negative rows": (lambda c: {"n": -1}, ValueError, "weights: got"),
    "rows that overflow": (lambda c: {"n": 2**62}, ValueError, "weights: got"),
    "no weights": (lambda c: {"k": 0}, ValueError, "weights: got"),
    "too many weights": (lambda c: {"k": 2**24}, ValueError, "weights: got"),
    "negative weights": (lambda c: {"k": -(2**40)}, ValueError, "weights: got"),
    # As many bytes as a matrix of this shape has, yet not its words.
    "another shape": (lambda c: {"k": 20, "q": c.q[:, :20].copy()}, ValueError, r"not prepared for \w+ \[33, 20\]"),
    "another set": (
        lambda c: {"isa": "scalar" if c.isa != "scalar" else "avx512"},
        ValueError,
        "not prepared for|this CPU has no|does not have",
    ),
    "short activations": (
        lambda c: {"q": c.q[:, :20].copy()},
        ValueError,
        r"activations: got \[4, 20\], expected .*21",
    ),
    "long activations": (lambda c: {"q": np.ones((4, 22), np.int8)}, ValueError, r"activations: got \[4, 22\]"),
    "short out": (lambda c: {"out": c.out[:3]}, ValueError, r"out: got \[3, 33\], expected \[4, 33\]"),
    "wide out": (lambda c: {"out": np.zeros((4, 34), np.int32)}, ValueError, r"out: got \[4, 34\], expected \[4, 33\]"),
    "no thread": (lambda c: {"threads": 0}, ValueError, "threads: got 0, expected 1 to 1024"),
    "negative threads": (lambda c: {"threads": -2}, ValueError, "threads: got -2, expected 1 to 1024"),
    "misaligned by 1": (lambda c: {"prepared": beside(c.prepared, 1)}, ValueError, "aligned to 64 bytes"),
    "misaligned by 32": (lambda c: {"prepared": beside(c.prepared, 32)}, ValueError, "aligned to 64 bytes"),
    "unsigned activations": (lambda c: {"q": c.q.astype(np.uint8)}, TypeError, "incompatible"),
    "float activations": (lambda c: {"q": c.q.astype(np.float32)}, TypeError, "incompatible"),
    "flat activations": (lambda c: {"q": c.q[0]}, TypeError, "incompatible"),
    "strided activations": (lambda c: {"q": np.ones((4, 42), np.int8)[:, ::2]}, TypeError, "incompatible"),
    "strided out": (lambda c: {"out": np.zeros((4, 66), np.int32)[:, ::2]}, TypeError, "incompatible"),
    "64-bit out": (lambda c: {"out": c.out.astype(np.int64)}, TypeError, "incompatible"),
    "constant out": (lambda c: {"out": read_only(c.out)}, TypeError, "incompatible"),
    "signed bytes": (lambda c: {"prepared": c.prepared.view(np.int8)}, TypeError, "incompatible"),
    "strided bytes": (lambda c: {"prepared": np.repeat(c.prepared, 2)[::2]}, TypeError, "incompatible"),
}


@pytest.mark.parametrize("wrong", WRONG_PRODUCTS)
def test_wrong_products_are_refused(isa: str, wrong: str) -> None:
    change, error, message = WRONG_PRODUCTS[wrong]
    call = Call(isa)
    expected = call().copy()
    assert (expected == 21).all()
    for name, value in change(call).items():
        setattr(call, name, value)
    with pytest.raises(error, match=message):
        call()
    assert (Call(isa)() == expected).all()  # and it still works


WRONG_WEIGHTS: dict[str, tuple[Callable[[Call], dict[str, object]], type[Exception], str]] = {
    "unknown set": (lambda c: {"isa": ""}, ValueError, "instruction set: got ''"),
    "code 3": (lambda c: {"packed": c.packed | 3}, ValueError, "got code 3; only 0, 1 and 2 exist"),
    "short rows": (
        lambda c: {"packed": c.packed[:, :-1].copy()},
        ValueError,
        r"got \[33, 5\], expected rows of 6 bytes",
    ),
    "K too large": (lambda c: {"k": 25}, ValueError, r"got \[33, 6\], expected rows of 7 bytes for K = 25"),
    "no K": (lambda c: {"k": 0}, ValueError, r"K: got 0, expected 1 to 16777215"),
    "huge K": (lambda c: {"k": 2**24}, ValueError, r"K: got 16777216, expected 1 to 16777215"),
    "negative K": (lambda c: {"k": -1}, ValueError, r"K: got -1, expected"),
    "small out": (lambda c: {"prepared": c.prepared[:-1]}, ValueError, r"got \d+ bytes, expected \d+"),
    "misaligned out": (lambda c: {"prepared": beside(c.prepared, 8)}, ValueError, "aligned to 64 bytes"),
    "constant out": (lambda c: {"prepared": read_only(c.prepared)}, TypeError, "incompatible"),
    "signed": (lambda c: {"packed": c.packed.view(np.int8)}, TypeError, "incompatible"),
    "flat": (lambda c: {"packed": c.packed[0]}, TypeError, "incompatible"),
    "strided": (lambda c: {"packed": c.packed.repeat(2, 1)[:, ::2]}, TypeError, "incompatible"),
    "no thread": (lambda c: {"threads": 0}, ValueError, "threads: got 0, expected 1 to 1024"),
}


@pytest.mark.parametrize("wrong", WRONG_WEIGHTS)
def test_wrong_weights_are_refused(isa: str, wrong: str) -> None:
    change, error, message = WRONG_WEIGHTS[wrong]
    call = Call(isa)
    call.prepare()
    for name, value in change(call).items():
        setattr(call, name, value)
    with pytest.raises(error, match=message):
        call.prepare()


@pytest.mark.parametrize(("row", "field"), [(0, 0), (7, 3), (32, 19), (32, 20), (129, 8)])
def test_code_3_is_found_anywhere(isa: str, row: int, field: int, rng: torch.Generator) -> None:
    packed = packing.pack(draw(1, 130, 21, rng)[1])
    packed[row, field // 4] |= 3 << 2 * (field % 4)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        with pytest.raises(ValueError, match="code 3"):
            native.prepare(packed, 21, isa)


@needs_module
@pytest.mark.parametrize(
    "q",
    [torch.zeros(2, 21), torch.zeros(2, 21, dtype=torch.uint8), torch.zeros(2, 90, dtype=torch.int8)],
    ids=lambda q: f"{str(q.dtype)[6:]}-{list(q.shape)}",
)
def test_the_op_refuses_wrong_activations(q: Tensor) -> None:
    isa = native.select()
    prepared, _ = native.prepare(packing.pack(torch.ones(33, 21, dtype=torch.int8)), 21, isa)
    with pytest.raises((TypeError, ValueError)):
        native.ternary_matmul(q, prepared, 33, isa)


# ---- which instruction set ---------------------------------------------------------------------------------


@needs_module
def test_the_best_that_does_not_multiply_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = [one for one in SETS if one.why_not is None and not one.multiplies]
    assert native.select() == usable[0].name
    only = [replace(one, why_not=None if one.name in ("scalar", "vnni") else "not today") for one in SETS]
    monkeypatch.setattr(native, "instruction_sets", lambda: only[::-1])
    assert native.select() == "scalar"


def test_the_environment_forces_one(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ENVIRONMENT, isa)
    assert native.select() == isa
    assert native.prepare(packing.pack(torch.ones(2, 3, dtype=torch.int8)), 3)[1] == isa
    assert ops.prepare(packing.pack(torch.ones(2, 3, dtype=torch.int8)), 3).data[1] == isa


@pytest.mark.slow
@needs_module
def test_the_environment_of_a_process_forces_one() -> None:
    code = "from bitnet.kernels import native, ops; import torch; "
    code += "print(native.select(), ops.select(torch.device('cpu')).name)"
    for name in HERE:
        environment = {**os.environ, native.ENVIRONMENT: name}
        done = child_process.run([sys.executable, "-c", code], env=environment)
        assert done.stdout.split() == [name, "cpu"]


@needs_module
def test_an_empty_variable_forces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = native.select()
    monkeypatch.setenv(native.ENVIRONMENT, "")
    assert native.select() == wanted


@needs_module
def test_an_unknown_set_is_an_error(
    monkeypatch: pytest.MonkeyPatch, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(native.ENVIRONMENT, "abacus")
    message = r"BITNET_CPU: got 'abacus', expected one of .*scalar"
    with pytest.raises(ValueError, match=message):
        native.select()
    with pytest.raises(ValueError, match=message):
        native.prepare(packing.pack(torch.ones(2, 3, dtype=torch.int8)), 3)
    with pytest.raises(ValueError, match=message):
        load(file)
    assert main(["generate", "-m", str(file), "-n", "1"]) == 2
    err = capsys.readouterr().err
    assert "BITNET_CPU: got 'abacus'" in err
    assert err.count("\n") == 1


@needs_module
def test_a_set_this_cpu_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = [replace(one, why_not="this CPU has no such unit") for one in SETS]
    monkeypatch.setattr(native, "instruction_sets", lambda: lacking)
    for one in SETS:
        monkeypatch.setenv(native.ENVIRONMENT, one.name)
        with pytest.raises(ValueError, match=rf"BITNET_CPU={one.name} cannot be used: .* no such unit; unset it"):
            native.select()


# ---- without a build ---------------------------------------------------------------------------------------


@pytest.fixture
def file(seed: int, tmp_path: Path) -> Path:
    model = Transformer(
        ModelConfig(
            vocab_size=31,
            hidden_size=12,
            intermediate_size=20,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
        )
    )
    model.init_weights(seed)
    return write_packed(tmp_path / "model.safetensors", model, None)


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> str:
    """As if the package had been installed without a compiler."""
    monkeypatch.setitem(sys.modules, "bitnet.kernels._cpu", None)
    module, reason = native._load()
    assert module is None
    monkeypatch.setattr(native, "_module", module)
    monkeypatch.setattr(native, "_reason", reason)
    return reason


def test_without_a_build_there_is_a_reason(not_built: str) -> None:
    assert "not built; install a C++20 compiler and run pip install again" in not_built
    assert native.why_not() == not_built
    assert native.instruction_sets() == []
    for call in (native.module, native.select):
        with pytest.raises(ValueError, match="not built; install a C"):
            call()


def test_a_library_that_does_not_load_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> object:
        raise ImportError(f"{name}: undefined symbol: x")

    monkeypatch.setattr(importlib, "import_module", fail)
    module, reason = native._load()
    assert module is None
    assert "cannot be loaded: bitnet.kernels._cpu: undefined symbol: x; run pip install again" in reason


def test_without_a_build_products_go_on(not_built: str, rng: torch.Generator) -> None:
    assert ops.CPU.why_not(CPU) == not_built
    wanted = ops.ONEDNN if ops.ONEDNN.why_not(CPU) is None else ops.FLOAT
    assert ops.select(CPU) is wanted
    q, codes = draw(3, 5, 9, rng)
    assert torch.equal(ops.packed_matmul(q, ops.prepare(packing.pack(codes), 9)), reference.matmul(q, codes))
    row = next(row for row in examine()["backends"] if row["backend"] == "cpu")
    assert (row["status"], row["reason"]) == ("unavailable", not_built)


def test_without_a_build_torch_runs_the_model_with_one_warning(
    not_built: str, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        engine = load(file)
    assert isinstance(engine, TorchEngine)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert not_built in record.getMessage()
    assert "torch" in record.getMessage()
    assert len(engine.generate([1, 2], 3)) == 3
    assert len(caplog.records) == 1
    assert isinstance(load(file, engine="torch"), TorchEngine)  # asked for: nothing to say
    assert len(caplog.records) == 1


def test_without_a_build_the_cpu_engine_is_an_error(
    not_built: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        BitNetError, match=r"engine: 'cpu' cannot be used: the C\+\+ kernels are not built; install a C"
    ):
        load(file, engine="cpu")
    assert main(["generate", "-m", str(file), "--engine", "cpu", "-n", "1"]) == 2
    err = capsys.readouterr().err
    assert "not built" in err
    assert err.count("\n") == 1


@needs_module
def test_with_a_build_the_cpu_engine_is_the_default(
    file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.DEBUG):
        assert isinstance(load(file), CpuEngine)
        assert isinstance(load(file, engine="torch"), TorchEngine)
        monkeypatch.setenv(ops.ENVIRONMENT, "reference")
        assert isinstance(load(file), TorchEngine)  # a product backend is torch's
        monkeypatch.setenv(ops.ENVIRONMENT, "cpu")
        assert isinstance(load(file), CpuEngine)
    assert not caplog.records


@needs_module
def test_the_doctor_sees_the_build(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["selected"]["cpu"] == "cpu"
    assert next(row for row in report["backends"] if row["backend"] == "cpu")["status"] == "ok"


@pytest.mark.skipif(why_no_compiler("c++") is not None, reason=str(why_no_compiler("c++")))
def test_a_compiler_means_a_build() -> None:
    """An install without a compiler succeeds without C++; on a machine with one, that must not pass unnoticed."""
    assert native.why_not() is None
