"""Every backend gives the same int32 sums: held against NumPy's int64 product over thousands of shapes."""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator

import child_process
import numpy as np
import pytest
import torch
from torch import Tensor

from bitnet.kernels import ops, packing, reference
from bitnet.kernels.ops import Backend

CPU = torch.device("cpu")
HERE = [backend for backend in ops.BACKENDS if backend.why_not(CPU) is None]
SHAPES_EACH = 7_200  # random shapes a backend, in chunks so that a failure is found early
EXTREMES = ("zero-codes", "zero-activations", "all-plus", "all-minus", "minus-minus", "alternating")


def extreme_operands(extreme: str, m: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    q, codes = torch.full((m, k), 127, dtype=torch.int8), torch.ones(n, k, dtype=torch.int8)
    if extreme == "alternating":
        signs = (1 - 2 * (torch.arange(k) % 2)).to(torch.int8)
        return q * signs, codes * signs
    q *= {"zero-activations": 0, "minus-minus": -1}.get(extreme, 1)
    codes *= {"zero-codes": 0, "all-minus": -1, "minus-minus": -1}.get(extreme, 1)
    return q, codes


@pytest.fixture(params=ops.BACKENDS, ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    reason = request.param.why_not(CPU)
    if reason:
        pytest.skip(f"{request.param.name}: {reason}")
    return request.param


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For thousands of tiny products: two threads wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ops.ENVIRONMENT, raising=False)


def truth(q: Tensor, codes: Tensor) -> Tensor:
    product = q.numpy().astype(np.int64) @ codes.numpy().astype(np.int64).T
    assert np.abs(product).max(initial=0) < 2**31
    return torch.from_numpy(product.astype(np.int32))


def draw(m: int, n: int, k: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    q = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=rng)
    return q, torch.randint(-1, 2, (n, k), dtype=torch.int8, generator=rng)


def check(backend: Backend, q: Tensor, codes: Tensor) -> None:
    where = f"{backend.name} M{q.shape[0]}-N{codes.shape[0]}-K{q.shape[1]}"
    expected = truth(q, codes)
    prepared = ops.prepare(packing.pack(codes), q.shape[1], backend)
    for got in (backend.codes_matmul(q, codes), ops.packed_matmul(q, prepared)):
        assert got.dtype == torch.int32, where
        assert torch.equal(got, expected), where


# ---- the sums ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(4))
def test_random_shapes(backend: Backend, chunk: int, rng: torch.Generator, one_thread: None) -> None:
    sizes = torch.rand(SHAPES_EACH // 4, 3, generator=rng).pow(2)  # more small ones than large ones
    for m, n, k in (1 + sizes * torch.tensor([11, 60, 260])).int().tolist():
        check(backend, *draw(m, n, k, rng))


@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes(backend: Backend, extreme: str, one_thread: None) -> None:
    for m in (1, 3, 17):
        for n in (1, 2, 31, 101):
            for k in (1, 3, 4, 63, 64, 65, 100, 255, 256, 1021):
                check(backend, *extreme_operands(extreme, m, n, k))


@pytest.mark.parametrize(("m", "n", "k"), [(1, 257, 4096), (129, 67, 515), (64, 251, 1000), (200, 1, 7)], ids=str)
def test_larger_shapes(backend: Backend, m: int, n: int, k: int, rng: torch.Generator) -> None:
    check(backend, *draw(m, n, k, rng))


@pytest.mark.parametrize("k", [132_104, 132_105, 132_107, 140_001])
def test_sums_beyond_fp32(backend: Backend, k: int, rng: torch.Generator) -> None:
    """127 * K passes 2^24 at K = 132,105: an fp32 sum would lose its last bit from there on."""
    q, codes = torch.full((2, k), 127, dtype=torch.int8), torch.ones(3, k, dtype=torch.int8)
    q[1] = -127
    q[1, -1] = 126  # odd and even sums, so that a lost last bit shows
    codes[1] = -1
    codes[2, :: 1 + k // 7] = 0
    check(backend, q, codes)
    check(backend, *draw(1, 2, k, rng))


def test_minus_128_is_not_special(backend: Backend, rng: torch.Generator) -> None:
    """The quantiser never makes it, yet int8 holds it: a product must not saturate."""
    _, codes = draw(1, 31, 100, rng)
    check(backend, torch.full((2, 100), -128, dtype=torch.int8), codes)


def test_views_are_multiplied_as_seen(backend: Backend, rng: torch.Generator) -> None:
    q, codes = draw(10, 14, 62, rng)
    for a, b in ((q[::2, ::2], codes[:, ::2]), (q.T[:10, :10], codes[:, :10]), (q[3:4], codes.T.contiguous().T)):
        assert torch.equal(backend.codes_matmul(a, b), truth(a, b))
        assert torch.equal(ops.packed_matmul(a, ops.prepare(packing.pack(b), a.shape[1], backend)), truth(a, b))


def test_no_rows(backend: Backend, rng: torch.Generator) -> None:
    q, codes = draw(1, 7, 12, rng)
    got = backend.codes_matmul(q[:0], codes)
    assert got.shape == (0, 7)
    assert got.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(backend: Backend, dtype: torch.dtype, rng: torch.Generator) -> None:
    q, codes = draw(5, 31, 4099, rng)
    with torch.autocast("cpu", dtype=dtype):
        check(backend, q, codes)
        check(backend, torch.full_like(q, 127), torch.ones_like(codes))


@pytest.mark.slow
@pytest.mark.skipif(ops.ONEDNN not in HERE, reason="no oneDNN here")
@pytest.mark.parametrize("isa", ["SSE41", "AVX2"])
def test_onednn_is_exact_without_vnni(isa: str) -> None:
    """Older CPUs add int8 products in saturating int16 pairs: ternary codes must stay clear of that."""
    code = "import torch; from bitnet.kernels import ops; print(ops.self_test(ops.ONEDNN, torch.device('cpu')))"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    done = child_process.run([sys.executable, "-c", code], env=environment)
    assert done.stdout.strip() == "None"


# ---- the door ----------------------------------------------------------------------------------------------


def test_backends_have_distinct_names_and_the_truth_is_last() -> None:
    names = [backend.name for backend in ops.BACKENDS]
    assert len(set(names)) == len(names)
    assert ops.BACKENDS[-1] is ops.REFERENCE
    print("not on this machine:", {b.name: b.why_not(CPU) for b in ops.BACKENDS if b not in HERE} or "none")


def test_the_first_available_backend_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.select(CPU) is HERE[0]
    unavailable = dataclasses.replace(ops.REFERENCE, name="never", why_not=lambda device: "not today")
    monkeypatch.setattr(ops, "BACKENDS", (unavailable, ops.FLOAT, ops.REFERENCE))
    assert ops.select(CPU) is ops.FLOAT


def test_environment_forces_a_backend(backend: Backend, monkeypatch: pytest.MonkeyPatch, rng: torch.Generator) -> None:
    calls: list[str] = []

    def spy(name: str, product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: (calls.append(name), product(*args))[1]

    spied = tuple(
        dataclasses.replace(
            b, codes_matmul=spy(b.name, b.codes_matmul), packed_matmul=spy(f"{b.name} packed", b.packed_matmul)
        )
        for b in ops.BACKENDS
    )
    monkeypatch.setattr(ops, "BACKENDS", spied)
    monkeypatch.setenv(ops.ENVIRONMENT, backend.name)
    assert ops.select(CPU).name == backend.name
    q, codes = draw(3, 5, 9, rng)
    assert torch.equal(ops.codes_matmul(q, codes), truth(q, codes))
    assert torch.equal(ops.packed_matmul(q, ops.prepare(packing.pack(codes), 9)), truth(q, codes))
    assert calls == [backend.name, f"{backend.name} packed"]


def test_an_empty_variable_forces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ops.ENVIRONMENT, "")
    assert ops.select(CPU) is HERE[0]


def test_unknown_backend_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ops.ENVIRONMENT, "abacus")
    with pytest.raises(ValueError, match=r"BITNET_BACKEND: got 'abacus', expected one of .*onednn.*reference"):
        ops.select(CPU)


def test_forced_backend_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch, rng: torch.Generator) -> None:
    """Never a silent second choice."""
    broken = dataclasses.replace(ops.ONEDNN, why_not=lambda device: "no such unit here")
    monkeypatch.setattr(ops, "BACKENDS", (broken, ops.FLOAT, ops.REFERENCE))
    monkeypatch.setenv(ops.ENVIRONMENT, "onednn")
    message = r"BITNET_BACKEND=onednn cannot be used: no such unit here; unset it"
    q, codes = draw(2, 3, 4, rng)
    with pytest.raises(ValueError, match=message):
        ops.codes_matmul(q, codes)
    with pytest.raises(ValueError, match=message):
        ops.prepare(packing.pack(codes), 4)


def test_reasons_against_other_devices() -> None:
    assert "not on cuda" in str(ops.ONEDNN.why_not(torch.device("cuda")))
    assert "CPU only" in str(ops.REFERENCE.why_not(torch.device("cuda")))
    cuda = torch.device("cuda")
    assert ops.select(cuda) is (ops.FLOAT if ops.TRITON.why_not(cuda) else ops.TRITON)


@pytest.mark.parametrize(
    "q",
    [
        torch.zeros(2, 8),
        torch.zeros(2, 8, dtype=torch.uint8),
        torch.zeros(2, 8, dtype=torch.int32),
        torch.zeros(2, 7, dtype=torch.int8),
        torch.zeros(2, 9, dtype=torch.int8),
        torch.zeros(8, dtype=torch.int8),
        torch.zeros(1, 2, 8, dtype=torch.int8),
    ],
    ids=lambda q: f"{str(q.dtype)[6:]}-{list(q.shape)}",
)
def test_wrong_activations_are_refused(q: Tensor) -> None:
    codes = torch.zeros(3, 8, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"activations: got .* expected int8 \[M, 8\]"):
        ops.codes_matmul(q, codes)
    with pytest.raises(ValueError, match=r"activations: got .* expected int8 \[M, 8\]"):
        ops.packed_matmul(q, ops.prepare(packing.pack(codes), 8))


@pytest.mark.parametrize(
    "codes",
    [torch.zeros(3, 8), torch.zeros(3, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, dtype=torch.int8)],
    ids=lambda codes: f"{str(codes.dtype)[6:]}-{list(codes.shape)}",
)
def test_wrong_codes_are_refused(codes: Tensor) -> None:
    with pytest.raises(ValueError, match=r"codes: got .* expected int8 \[N, K\]"):
        ops.codes_matmul(torch.zeros(2, 8, dtype=torch.int8), codes)


def test_prepare_checks_the_image(backend: Backend) -> None:
    good = packing.pack(torch.zeros(3, 8, dtype=torch.int8))
    prepared = ops.prepare(good, 8, backend)
    assert (prepared.backend, prepared.n, prepared.k) == (backend, 3, 8)
    with pytest.raises(ValueError, match="code 3"):
        ops.prepare(good | 3, 8, backend)
    with pytest.raises(ValueError, match="expected"):
        ops.prepare(good, 12, backend)
    with pytest.raises(TypeError, match="uint8"):
        ops.prepare(good.to(torch.int8), 8, backend)


# ---- the self-test -----------------------------------------------------------------------------------------


def test_self_test_passes(backend: Backend) -> None:
    assert ops.self_test(backend, CPU) is None


def int16_lanes(q: Tensor, codes: Tensor) -> Tensor:
    return reference.matmul(q, codes).to(torch.int16).to(torch.int32)


WRONG: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "zeros": lambda q, codes: torch.zeros(q.shape[0], codes.shape[0], dtype=torch.int32),
    "one off in one place": lambda q, codes: reference.matmul(q, codes).index_put(
        (torch.tensor(-1), torch.tensor(-1)), torch.tensor(1, dtype=torch.int32), accumulate=True
    ),
    "K tail left out": lambda q, codes: reference.matmul(q[:, : q.shape[1] // 4 * 4], codes[:, : q.shape[1] // 4 * 4]),
    "bf16 result": lambda q, codes: reference.matmul(q, codes).bfloat16().to(torch.int32),
    "int16 lanes that wrap": int16_lanes,
    "wrong dtype": lambda q, codes: reference.matmul(q, codes).long(),
    "wrong shape": lambda q, codes: reference.matmul(q, codes).T,
    "last row unwritten": lambda q, codes: torch.cat((reference.matmul(q[:-1], codes), reference.matmul(q[:1], codes))),
}


@pytest.mark.parametrize("product", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("path", ["codes", "packed"])
def test_self_test_sees_a_wrong_backend(product: Callable[[Tensor, Tensor], Tensor], path: str) -> None:
    planted = dataclasses.replace(ops.FLOAT, name="planted", **{f"{path}_matmul": product})
    report = ops.self_test(planted, CPU)
    assert report is not None
    assert f"{path} product M" in report
