"""A contender in a process of its own: python worker.py SCRIPT JSON-OPTIONS PARENT-ID.

Standard library only, so that any Python runs it: llama.cpp may live in another environment. SCRIPT.py lies beside this
file and defines `Contender`; loading is timed, then each JSON line on stdin is answered by one on stdout:

    {"do": "measure", "prompt": 512, "predict": 0, "depth": 0, "batch": 1}    -> seconds and joules of its parts
    {"do": NAME, ...}                                                         -> what Contender.NAME(...) returns

    class Contender:
        def __init__(self, **options): ...          loads the model
        facts: dict                                 what it is: JSON values
        def start(self, batch, depth, room): ...    a fresh session that has read `depth` tokens; not timed
        def prefill(self, tokens): ...              reads a prompt up to the logits behind it
        def decode(self, tokens): ...               writes so many tokens, one at a time

A contender may have `ready(prompt, predict)`, which is called between start and what is timed: inputs to be laid out.
A script may have `prepare(**options)`, which runs before the load and is not timed: files to be made, choices to be
measured; what it returns are further options of the contender. The process ends when stdin does and, on Linux, with
its parent. Whatever a contender prints goes to stderr.
"""

import ctypes
import json
import os
import resource
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_POWERCAP = Path("/sys/class/powercap")
_TICKS = 50  # updates of an energy counter, about a millisecond apart, below which a difference says nothing


def follow(parent: int) -> None:
    """End this process when its parent ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before we asked
        sys.exit(1)


def status(key: str) -> int:
    """Bytes in a line of /proc/self/status, such as VmRSS; elsewhere the peak that getrusage knows."""
    path = Path("/proc/self/status")
    if path.exists():
        lines = dict(line.split(":", 1) for line in path.read_text(encoding="ascii").splitlines())
        return int(lines[key].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak(path: Path = Path("/proc/self/clear_refs")) -> None:
    """Let VmHWM start from what is resident now; without Linux the peak counts what was prepared too."""
    if path.exists():
        path.write_text("5", encoding="ascii")


def packages(folder: Path = _POWERCAP) -> list[Path]:
    """RAPL's counters of whole CPU packages; empty where there are none or root alone may read them."""
    found = [path for path in sorted(folder.glob("*rapl:*")) if path.name.count(":") == 1]
    return [path for path in found if os.access(path / "energy_uj", os.R_OK)]


class Energy:
    """Joules drawn by the CPU packages (RAPL) or the GPU (NVML) while something ran; None where nothing tells."""

    def __init__(self, gpu: str | None, folder: Path = _POWERCAP) -> None:
        self._packages = packages(folder) if gpu is None else []
        self._nvml: Any = None
        self._gpu: Any = None
        if gpu is not None:
            self._nvml, self._gpu = _nvml(gpu)

    def read(self) -> list[int]:
        """Counters: microjoules of each package, or millijoules of the GPU."""
        if self._nvml is not None:
            value = ctypes.c_ulonglong()
            self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu, ctypes.byref(value))
            return [value.value]
        return [int((path / "energy_uj").read_text()) for path in self._packages]

    def since(self, before: list[int], seconds: float) -> float | None:
        """Joules since `before`; None where there is no counter or the time is too short for it."""
        after = self.read()
        if not after or seconds < _TICKS * 1e-3:
            return None
        if self._nvml is not None:
            return (after[0] - before[0]) / 1e3
        ranges = [int((path / "max_energy_range_uj").read_text()) for path in self._packages]
        return sum((b - a) % (limit + 1) for a, b, limit in zip(before, after, ranges)) / 1e6


def _nvml(uuid: str) -> tuple[Any, Any]:
    """NVML and its handle of a GPU; by UUID, for NVML counts GPUs that CUDA_VISIBLE_DEVICES hides."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None, None
    handle, probe = ctypes.c_void_p(), ctypes.c_ulonglong()
    failed = (
        library.nvmlInit_v2()
        or library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), ctypes.byref(handle))
        or library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(probe))
    )
    return (None, None) if failed else (library, handle)


def measure(contender: Any, energy: Energy, prompt: int, predict: int, depth: int, batch: int) -> dict[str, Any]:
    """Run one test once. Returns seconds of reading and of writing, and joules of both."""
    contender.start(batch, depth, depth + prompt + predict)
    if hasattr(contender, "ready"):
        contender.ready(prompt, predict)
    before = energy.read()
    started = time.perf_counter()
    if prompt:
        contender.prefill(prompt)
    read = time.perf_counter()
    if predict:
        contender.decode(predict)
    ended = time.perf_counter()
    joules = energy.since(before, ended - started)
    return {"prefill": read - started, "decode": ended - read, "joules": joules, "peak_bytes": peak_bytes(contender)}


def peak_bytes(contender: Any) -> int:
    """Most memory this process has held: on the GPU where the model is there, else resident."""
    on_gpu = contender.facts.get("gpu") is not None
    return contender.gpu_bytes() if on_gpu else status("VmHWM")


def load(script: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The contender, and what its load took."""
    module = runpy.run_path(str(Path(__file__).parent / f"{script}.py"))
    if "prepare" in module:
        options = options | (module["prepare"](**options) or {})
        forget_peak()
    base = status("VmRSS")
    started = time.perf_counter()
    contender = module["Contender"](**options)
    seconds = time.perf_counter() - started
    base = 0 if contender.facts.get("gpu") is not None else base
    facts = {"load_seconds": seconds, "base_bytes": base, "peak_bytes": peak_bytes(contender)}
    return contender, facts | contender.facts


def serve(script: str, options: dict[str, Any]) -> None:
    """Load, answer with the facts, and then line by line."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(reply: dict[str, Any]) -> None:
        out.write(json.dumps(reply) + "\n")
        out.flush()

    try:
        contender, facts = load(script, options)
        energy = Energy(facts.get("gpu"))
        answer(facts)
        for line in sys.stdin:
            command = json.loads(line)
            action = command.pop("do")
            if action == "measure":
                answer(measure(contender, energy, **command))
            else:
                answer(getattr(contender, action)(**command))
    except (ValueError, OSError, RuntimeError, MemoryError, ImportError) as error:
        if os.environ.get("BITNET_BENCH_DEBUG"):
            raise
        answer({"error": " ".join(str(error).split()) or type(error).__name__})


def main() -> None:
    """One contender, as the arguments say."""
    # The folder of this script would come first on the path, and its modules before others of the same name.
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [path for path in sys.path if str(Path(path or ".").resolve()) != here]
    follow(int(sys.argv[3]))
    serve(sys.argv[1], json.loads(sys.argv[2]))


if __name__ == "__main__":
    main()
