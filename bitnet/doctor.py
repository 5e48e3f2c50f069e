"""Is everything in place? Versions, CPU features, devices, kernel backends with reasons, and a self-test."""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import bitnet
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
# The instruction sets that kernels for ternary weights care about.
CPU_FEATURES = (
    "avx2 fma3 avx512_f avx512_bw avx512_vl avx512_vbmi avx512_vnni avx512_bf16 avx_vnni amx_int8 amx_bf16".split()
)


def examine() -> dict[str, Any]:
    """Look at the machine and test every backend that can run. JSON values; `healthy` is the verdict."""
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
    try:
        difference = ops.self_test(backend, device)
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        difference = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if difference:
        return {"status": "failed", "reason": difference}
    return {"status": "ok", "reason": "self-test: int32 sums equal the reference"}


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _features() -> list[str]:
    read = getattr(torch.cpu, "get_capabilities", None)  # torch before 2.12 cannot tell
    capabilities = read() if read else {}
    return [name for name in CPU_FEATURES if capabilities.get(name)]


def _cpu_name() -> str:
    if sys.platform == "linux":
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu_name()
