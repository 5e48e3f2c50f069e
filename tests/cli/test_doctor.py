"""`bitnet doctor`: what it reports about a healthy machine, and that it detects a broken backend."""

import dataclasses
import json
import os
import platform
import threading
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor

from bitnet import dense_products, doctor, machine
from bitnet.cli import main
from bitnet.doctor import examine
from bitnet.kernels import native, ops, reference

CPU = torch.device("cpu")
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ops.ENVIRONMENT, raising=False)
    monkeypatch.delenv(native.ENVIRONMENT, raising=False)


def plant(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> str:
    """Register a changed copy of the reference as the first backend. Returns its name."""
    broken = dataclasses.replace(ops.REFERENCE, name="planted", why_not=lambda device: None, **changes)
    monkeypatch.setattr(ops, "BACKENDS", (broken, *ops.BACKENDS))
    return broken.name


def test_a_healthy_machine(capsys: Captured) -> None:
    assert main(["doctor", "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert captured.err == ""
    assert report["healthy"] is True
    assert report["problem"] is None
    assert report["python"] == platform.python_version()
    for package in ("torch", "numpy", "sentencepiece", "safetensors", "typer", "rich", "einops"):
        assert report["packages"][package] == version(package)
    assert report["cpu"]["cores"] == os.cpu_count()
    assert len(report["devices"]) == 1 + torch.cuda.device_count()
    on_cpu = [row for row in report["backends"] if row["device"] == "cpu"]
    assert [row["backend"] for row in on_cpu] == [backend.name for backend in ops.BACKENDS]
    for row, backend in zip(on_cpu, ops.BACKENDS, strict=True):
        assert row["status"] == ("unavailable" if backend.why_not(CPU) else "ok")
        assert row["reason"]
    assert report["selected"]["cpu"] == next(row["backend"] for row in on_cpu if row["status"] == "ok")
    assert report["native_problem"] == native.why_not()
    assert report["instruction_set"] == (native.select() if native.why_not() is None else None)
    for row, one in zip(report["instruction_sets"], native.instruction_sets(), strict=True):
        assert (row["instruction_set"], row["summary"]) == (one.name, one.summary)
        assert row["status"] == ("unavailable" if one.why_not else "ok")
        assert row["reason"] == one.why_not or "equal the reference" in row["reason"]


def test_what_limits_this_machine(capsys: Captured) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["machine"]
    assert found["cpus"] == os.cpu_count()
    assert found["usable"] == machine.usable_cores()
    assert found["affinity"] == (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None)
    assert found["huge_pages"]["rule"] == machine.huge_pages()
    assert (found["memory_available"] is None) == (machine.available_memory() is None)
    assert [one["type"] for one in found["products"]] == ["fp32", "bf16", "int8"]
    for one in found["products"]:
        assert one["way"] in [way.name for way in dense_products.ways(one["type"])]
        assert one["gigamacs_per_second"] > 0
    assert found["remarks"] == doctor.remarks(found)


QUIET: dict[str, Any] = {
    "cpus": 64,
    "physical_cores": 32,
    "affinity": 64,
    "quota": None,
    "usable": 64,
    "memory_available": 10**10,
    "huge_pages": {"rule": "madvise", "asked": 2**25, "given": 2**25},
    "busy_cpus": 0.5,
    "load_average": 0.5,
    "products": [{"type": "int8", "way": "_int_mm", "gigamacs_per_second": 100.0, "missing": None}],
}
SLOWER = {
    "container": ({"quota": 1.5}, "a container limits this process to 1.5 of 64 CPUs"),
    "affinity": ({"affinity": 4, "busy_cpus": 0.1}, "this process may run on 4 of 64 CPUs (affinity)"),
    "busy": ({"busy_cpus": 20.0}, "a busy machine: other processes keep 20.0 of 64 CPUs busy"),
    "no huge pages": ({"huge_pages": {"rule": "never", "asked": 9, "given": 0}}, "huge pages are off"),
    "huge pages not given": (
        {"huge_pages": {"rule": "madvise", "asked": 2**25, "given": 0}},
        "huge pages: 0 of 32 MiB given though the rule is 'madvise'",
    ),
    "reference code": (
        {"products": [{"type": "int8", "missing": "onednn.qlinear_pointwise runs reference code here, 0.03 GMAC/s"}]},
        "torch int8: onednn.qlinear_pointwise runs reference code here",
    ),
}


@pytest.mark.parametrize("case", SLOWER)
def test_what_makes_a_machine_slower_than_it_looks_is_reported(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    changes, sentence = SLOWER[case]
    assert doctor.remarks(QUIET) == []
    (remark,) = doctor.remarks(QUIET | changes)
    assert sentence in remark
    monkeypatch.setattr(doctor, "describe_machine", lambda: QUIET | changes | {"remarks": [remark]})
    monkeypatch.setenv("COLUMNS", "250")
    assert main(["doctor"]) == 0
    assert f"note: {remark}" in capsys.readouterr().out


def test_a_cpu_without_an_int8_kernel_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = {
        "int8": [dense_products.Timed(dense_products.ways("int8")[-1], 3e11)],
        "bf16": [dense_products.Timed(dense_products.ways("bf16")[-1], 1e10)],
        "fp32": [dense_products.Timed(dense_products.ways("fp32")[-1], 5e10)],
    }
    slow = dense_products.Timed(dense_products.Way("prepacked", dense_products.ways("int8")[-1].make), 3e7)
    timed["int8"].append(slow)
    monkeypatch.setattr(dense_products, "probe", timed.__getitem__)
    monkeypatch.setattr(doctor, "_features", lambda: ["avx2", "avx512_vnni"])
    found = {one["type"]: one for one in doctor.dense_kernels()}
    assert found["int8"]["way"] == "_int_mm"
    assert found["int8"]["missing"] == "prepacked runs reference code here, 0.03 GMAC/s"
    assert found["bf16"]["missing"] == "this CPU has neither AVX512-BF16 nor AMX"
    assert found["fp32"]["missing"] is None


def test_a_check_that_hangs_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()

    def hanging(q: Tensor, codes: Tensor) -> Tensor:
        free.wait()
        return reference.matmul(q, codes)

    name = plant(monkeypatch, codes_matmul=hanging)
    monkeypatch.setattr(doctor, "LIMIT", 0.1)
    row = doctor._backend(ops.BACKENDS[0], CPU)
    assert (row["backend"], row["status"], row["reason"]) == (name, "failed", "no answer within 0 s")
    probe = dense_products.probe
    monkeypatch.setattr(dense_products, "probe", lambda dtype: (free.wait(), probe(dtype))[1])
    (products,) = doctor.dense_kernels()
    assert products["missing"] == "no answer within 0 s"
    free.set()
    for thread in threading.enumerate():
        if thread.daemon and thread is not threading.current_thread():
            thread.join(60)


def test_huge_pages_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    given = doctor.huge_bytes_given(2**22)
    assert given is None or given >= 0
    monkeypatch.delattr(doctor.mmap, "MADV_HUGEPAGE", raising=False)
    assert doctor.huge_bytes_given() is None


def test_the_same_as_a_table(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "everything works" in out
    assert f"torch {torch.__version__}" in out or f"torch {version('torch')}" in out
    assert all(backend.name in out for backend in ops.BACKENDS)
    in_use = 1 + torch.cuda.device_count() + bool(native.instruction_sets())  # one per device, and one instruction set
    assert out.count("in use") - out.count("threads in use") == in_use
    assert all(one.name in out for one in native.instruction_sets())


def off_by_one(q: Tensor, codes: Tensor) -> Tensor:
    acc = reference.matmul(q, codes)
    acc[-1, -1] += 1  # one sum, the last one
    return acc


def zeros(q: Tensor, codes: Tensor) -> Tensor:
    """The silent failure of a kernel that does not know a shape."""
    return torch.zeros(q.shape[0], codes.shape[0], dtype=torch.int32)


def as_float(q: Tensor, codes: Tensor) -> Tensor:
    return reference.matmul(q, codes).float()


def failing(q: Tensor, codes: Tensor) -> Tensor:
    raise RuntimeError("illegal\ninstruction")


def too_narrow(q: Tensor, codes: Tensor) -> Tensor:
    """Sums in int16: right for short rows, wrong for more than 32,767 / 127 terms."""
    return reference.matmul(q, codes).to(torch.int16).to(torch.int32)


@pytest.mark.parametrize("product", [off_by_one, zeros, as_float, failing, too_narrow])
def test_a_broken_training_product_is_detected(
    product: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    name = plant(monkeypatch, codes_matmul=product)
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    failed = [row["backend"] for row in report["backends"] if row["status"] == "failed"]
    assert failed == [name] * len(report["devices"])
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert name in out
    assert "do not trust" in out


def test_a_broken_packed_product_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    name = plant(monkeypatch, packed_matmul=lambda q, packed: reference.packed_matmul(q, packed) * -1)
    report = examine()
    assert not report["healthy"]
    row = next(row for row in report["backends"] if row["status"] == "failed")
    assert row["backend"] == name
    assert "packed product" in row["reason"]


def test_a_backend_that_cannot_run_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = dataclasses.replace(ops.REFERENCE, name="absent", why_not=lambda device: "no such chip")
    monkeypatch.setattr(ops, "BACKENDS", (absent, *ops.BACKENDS))
    report = examine()
    assert report["healthy"]
    row = report["backends"][0]
    assert (row["backend"], row["status"], row["reason"]) == ("absent", "unavailable", "no such chip")
    assert report["selected"]["cpu"] != "absent"


def test_a_forced_backend_is_the_one_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ops.ENVIRONMENT, "reference")
    assert examine()["selected"]["cpu"] == "reference"


def test_an_unknown_forced_backend_is_a_problem(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setenv(ops.ENVIRONMENT, "abacus")
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert "abacus" in report["problem"]
    assert all(backend.name in report["problem"] for backend in ops.BACKENDS)
    assert main(["doctor"]) == 1
    assert "abacus" in capsys.readouterr().out


needs_module = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))


@needs_module
def test_a_broken_instruction_set_is_detected(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    """All of them are tested, not only the one in use."""
    make = ops.cpu_backend

    def broken(isa: str) -> ops.Backend:
        backend = make(isa)
        if isa != "scalar":
            return backend
        return dataclasses.replace(backend, packed_matmul=lambda q, data: backend.packed_matmul(q, data) + 1)

    monkeypatch.setattr(ops, "cpu_backend", broken)
    report = examine()
    assert not report["healthy"]
    (row,) = (row for row in report["instruction_sets"] if row["status"] == "failed")
    assert row["instruction_set"] == "scalar"
    assert "packed product" in row["reason"]
    assert main(["doctor"]) == 1
    assert "do not trust" in capsys.readouterr().out


@needs_module
def test_an_instruction_set_this_cpu_lacks_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    scalar = next(one for one in native.instruction_sets() if one.name == "scalar")
    lacking = dataclasses.replace(scalar, name="avx1024", why_not="this CPU has no AVX-1024")
    monkeypatch.setattr(native, "instruction_sets", lambda: [lacking, scalar])
    report = examine()
    assert report["healthy"]
    assert report["instruction_set"] == "scalar"
    first = report["instruction_sets"][0]
    assert (first["status"], first["reason"]) == ("unavailable", "this CPU has no AVX-1024")


@needs_module
def test_a_forced_instruction_set_is_the_one_in_use(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setenv(native.ENVIRONMENT, "scalar")
    assert examine()["instruction_set"] == "scalar"
    monkeypatch.setenv(native.ENVIRONMENT, "abacus")
    assert main(["doctor", "--json"]) == 1
    assert "BITNET_CPU: got 'abacus'" in json.loads(capsys.readouterr().out)["problem"]


def test_without_a_build_the_doctor_says_why(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(native, "_module", None)
    monkeypatch.setattr(native, "_reason", "nothing is built")
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor"]) == 0  # torch computes instead: no failure
    assert capsys.readouterr().out.count("nothing is built") == 2  # the backend, and its instruction sets
    assert examine()["instruction_sets"] == []
