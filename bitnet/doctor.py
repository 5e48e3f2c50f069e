"""Check an installation: versions, CPU features, devices, and a self-test of every kernel backend.

`describe_machine` reports what decides the speed of this machine: cores, memory, huge pages, other processes, and the
kernels that torch has for it. All of it takes seconds; a check that takes longer than LIMIT counts as failed.
"""

import importlib.metadata
import importlib.util
import mmap
import os
import platform
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import bitnet
from bitnet import dense_products, machine
from bitnet.kernels import native, ops

PACKAGES = ("torch", "triton", "numpy", "einops", "sentencepiece", "safetensors", "typer", "rich")
OPTIONAL = {
    "matplotlib": "loss pictures",
    "tensorboard": "--tensorboard",
    "wandb": "--wandb",
    "tokenizers": "tokenizers of imported models",
    "huggingface-hub": "import by hub name",
    "starlette": "serve",
    "uvicorn": "serve",
    "prometheus-client": "serve",
}
LIMIT = 30.0  # seconds for one check, which takes a second at most on an idle machine
_HUGE_BYTES = 32 * 2**20  # requested to see whether huge pages are given: sixteen of 2 MiB
# The instruction sets that matter to kernels for ternary weights.
CPU_FEATURES = (
    "avx2 fma3 avx512_f avx512_bw avx512_vl avx512_vbmi avx512_vnni avx512_bf16 avx_vnni amx_int8 amx_bf16".split()
)


# Those that Linux spells differently.
_LINUX_NAMES = {"fma3": "fma"} | {f"avx512_{part}": f"avx512{part}" for part in ("f", "bw", "vl", "vbmi")}


def examine() -> dict[str, Any]:
    """Versions, devices and a test of every backend that can run, as JSON values; `healthy` is the verdict."""
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    backends = [_backend(backend, torch.device(device)) for device in devices for backend in ops.BACKENDS]
    instruction_sets = [_instruction_set(one) for one in native.instruction_sets()]
    selected, problem = {}, None
    for device in devices:
        try:
            selected[device] = ops.select(torch.device(device)).name
        except ValueError as error:
            problem = str(error)
    chosen = None
    if instruction_sets:
        try:
            chosen = native.select()
        except ValueError as error:
            problem = problem or str(error)
    failed = [row for row in backends + instruction_sets if row["status"] == "failed"]
    return {
        "bitnet": bitnet.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "optional": {name: {"version": _version(name), "for": use} for name, use in OPTIONAL.items()},
        "cpu": {
            "name": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "features": _features(),
        },
        "devices": {device: _device_name(device) for device in devices},
        "backends": backends,
        "instruction_sets": instruction_sets,
        "instruction_set": chosen,
        "native_problem": native.why_not(),
        "selected": selected,
        "problem": problem,
        "healthy": not failed and problem is None,
    }


def _instruction_set(one: native.InstructionSet) -> dict[str, Any]:
    row = {"instruction_set": one.name, "summary": one.summary}
    return row | _tested(ops.cpu_backend(one.name), torch.device("cpu"), one.why_not)


def _backend(backend: ops.Backend, device: torch.device) -> dict[str, Any]:
    row = {"backend": backend.name, "device": str(device), "summary": backend.summary}
    return row | _tested(backend, device, backend.why_not(device))


def _tested(backend: ops.Backend, device: torch.device, reason: str | None) -> dict[str, str]:
    if reason:
        return {"status": "unavailable", "reason": reason}
    answers: list[str | None] = []

    def test() -> None:
        try:
            answers.append(ops.self_test(backend, device))
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            answers.append(f"{type(error).__name__}: {' '.join(str(error).split())}")

    difference = answers[0] if within(LIMIT, test) else f"no answer within {LIMIT:.0f} s"
    if difference:
        return {"status": "failed", "reason": difference}
    return {"status": "ok", "reason": "self-test: int32 sums equal the reference"}


def within(limit: float, check: Callable[[], None]) -> bool:
    """Whether a check ends within `limit` seconds. One that does not keeps running in its daemon thread."""
    running = threading.Thread(target=check, daemon=True)
    running.start()
    running.join(limit)
    return not running.is_alive()


def describe_machine(root: Path = machine.ROOT) -> dict[str, Any]:
    """What decides the speed of this machine, as JSON values; `remarks` are sentences about what slows it down."""
    cpus = machine.affinity()
    report: dict[str, Any] = {
        "cpus": os.cpu_count(),
        "physical_cores": machine.physical_cores(root),
        "affinity": len(cpus) or None,
        "quota": machine.cpu_quota(root),
        "usable": machine.usable_cores(root),
        "memory_available": machine.available_memory(root),
        "huge_pages": {"rule": machine.huge_pages(root), "asked": _HUGE_BYTES, "given": huge_bytes_given()},
        "busy_cpus": machine.busy(cpus, root),
        "load_average": machine.load(root),
        "products": dense_kernels(),
    }
    return report | {"remarks": remarks(report)}


def dense_kernels() -> list[dict[str, Any]]:
    """Torch's matrix products on this CPU, by type: the fastest way, its rate, and which kernel is missing.

    Other engines depend on them. Each is timed on a million multiply-adds, which is enough to distinguish an optimised
    kernel from reference code but is no benchmark.
    """
    found: list[dict[str, Any]] = []

    def probe() -> None:
        with torch.inference_mode():
            timed = {dtype: dense_products.probe(dtype) for dtype in ("fp32", "bf16", "int8")}
        features = _features()
        for dtype, ways in timed.items():
            best, missing = ways[0], dense_products.remark(ways)
            if dtype == "bf16" and features and not {"avx512_bf16", "amx_bf16"} & {*features}:
                missing = "; ".join(part for part in ("this CPU has neither AVX512-BF16 nor AMX", missing) if part)
            rate = best.rate / 1e9 if best.rate else None
            found.append({"type": dtype, "way": best.way.name, "gigamacs_per_second": rate, "missing": missing or None})

    return list(found) if within(LIMIT, probe) else [{"type": "all", "missing": f"no answer within {LIMIT:.0f} s"}]


def huge_bytes_given(size: int = _HUGE_BYTES) -> int | None:
    """Bytes that are on huge pages after requesting `size` bytes on them; None where the system does not report it.

    A virtual machine may allow huge pages and still give none.
    """
    advice, smaps = getattr(mmap, "MADV_HUGEPAGE", None), Path("/proc/self/smaps_rollup")
    if advice is None or not smaps.exists():
        return None

    def huge_bytes() -> int:
        lines = smaps.read_text(encoding="ascii").splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages:"))

    before = huge_bytes()
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        try:
            pages.madvise(advice)
        except OSError:  # the Linux kernel was built without them
            return 0
        for at in range(0, size, mmap.PAGESIZE):
            pages[at] = 1
        return max(0, huge_bytes() - before)


def remarks(report: dict[str, Any]) -> list[str]:
    """Sentences about everything in `describe_machine` that makes this machine slower than it looks."""
    found = []
    cpus, quota, affinity = report["cpus"], report["quota"], report["affinity"]
    if quota is not None and quota < cpus:
        found.append(f"a container limits this process to {quota:.3g} of {cpus} CPUs")
    if affinity is not None and affinity < cpus:
        found.append(f"this process may run on {affinity} of {cpus} CPUs (affinity)")
    busy, of = report["busy_cpus"], affinity or cpus
    if busy is not None and busy > machine.BUSY * of:
        found.append(f"a busy machine: other processes keep {busy:.1f} of {of} CPUs busy; measure when it is idle")
    huge = report["huge_pages"]
    if huge["rule"] == "never":
        found.append("huge pages are off (transparent_hugepage: never): reading the weights of large models is slower")
    elif huge["given"] is not None and huge["given"] < huge["asked"] // 2:
        found.append(
            f"huge pages: {huge['given'] >> 20} of {huge['asked'] >> 20} MiB given though the rule is "
            f"'{huge['rule']}': reading the weights of large models is slower"
        )
    found += [f"torch {one['type']}: {one['missing']}" for one in report["products"] if one["missing"]]
    return found


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _features() -> list[str]:
    read = getattr(torch.cpu, "get_capabilities", None)
    if read:
        capabilities = read()
        return [name for name in CPU_FEATURES if capabilities.get(name)]
    flags = _cpu_line("flags").split()  # torch before 2.12 does not report them
    return [name for name in CPU_FEATURES if _LINUX_NAMES.get(name, name) in flags]


def _cpu_name() -> str:
    return _cpu_line("model name") or platform.processor() or platform.machine()


def _cpu_line(key: str) -> str:
    """The first value of a key in /proc/cpuinfo; empty where there is none."""
    if sys.platform == "linux":
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == key:
                    return value.strip()
    return ""


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu_name()
